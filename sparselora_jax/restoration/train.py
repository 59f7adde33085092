"""Make a train step from a loss, and run it in a loop that logs, checkpoints, stops and resumes bit for bit."""

import math
import signal
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jax.experimental import multihost_utils
from jaxtyping import Array, Int, PyTree

from sparselora_jax.restoration import guard
from sparselora_jax.restoration.saved_state import Checkpoints
from sparselora_jax.runtime import profiling
from sparselora_jax.runtime.errors import SparseloraError


class BadStepError(SparseloraError, RuntimeError):
    """A loss or a gradient is not finite, or the loss spikes; the last good checkpoint stays."""


class Interrupted(SparseloraError):  # noqa: N818  a stop that was asked for, not an error
    """SIGTERM or Ctrl-C: the state is saved, and the same command continues from there."""


class State(NamedTuple):
    """The part of a run that a step changes.

    Attributes:
      trained: the tree that is trained, e.g. LoRA.
      optimizer: state of the optimizer.
      step: number of steps done.
    """

    trained: PyTree
    optimizer: PyTree
    step: Int[Array, '']


Step = Callable[[State, PyTree, PyTree], tuple[State, dict[str, Array]]]


@runtime_checkable
class Batches(Protocol):
    """Batches by the index of their step, e.g. a list or a `grain.MapDataset`.

    The same index must always give the same batch: a resumed run asks for it again.
    """

    def __getitem__(self, index: int) -> PyTree:
        """Return the batch of global step `index`."""


def init_state(trained: PyTree, tx: optax.GradientTransformation) -> State:
    """Return the state before the first step.

    The state holds a copy of `trained`. A step donates its state, which deletes the buffers: without the copy it would
    delete the caller's buffers. The copy doubles the memory of a large tree for as long as the caller keeps its own.

    Args:
      trained: the tree to train; it may be used again after the steps.
      tx: the optimizer.

    Returns:
      The state at step 0. Arrays keep their shardings.
    """
    placement = None
    if jax.process_count() > 1:
        # An array with shards in other processes can only be copied with its own sharding.
        placement = jax.tree.map(lambda leaf: leaf.sharding, trained)
    # Not `jnp.copy`, which would compile a program for each shape.
    copied = jax.device_put(trained, placement, may_alias=False)
    return State(copied, tx.init(copied), jnp.zeros((), jnp.int32))


def make_step(
    loss: Callable[[PyTree, PyTree, PyTree], tuple[Array, dict[str, Array]]],
    tx: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    prepare: Callable[[PyTree, Array], PyTree] = lambda batch, step: batch,
) -> Step:
    """Return the jitted step, `(state, frozen, batch) -> (state, metrics)`.

    It trains LoRA under the masks of any model whose loss merges it (see the example). The unmerged `frozen.params` can
    be a teacher there.

    Args:
      loss: `loss(trained, frozen, batch) -> (loss, metrics)`, differentiated in `trained`.
      tx: the optimizer. Under `guard.skip_bad_steps` the metrics have the number of bad steps in a row as `skipped`.
      accumulate: micro-batches of a step; must divide the batch. Their losses, metrics and gradients are *added*, so
        the loss of a part must be its share of the loss of the whole batch.
      prepare: `prepare(batch, steps_done)`, applied to the whole batch before it is split. It can add values that such
        a loss needs, e.g. the weight of each token, which depends on the number of tokens. Random numbers that it
        derives from `steps_done` are the same in a resumed run.

    Returns:
      The step. `state` is donated: its buffers are gone after the call. `frozen` is an argument rather than a constant
      of the program, so that another base needs no new compilation; all its leaves are arrays. Metrics include `loss`
      and `grad_norm`.

    >>> from sparselora_jax.restoration.restore import Frozen
    >>> from sparselora_jax.sparse.weights import init_lora, merge
    >>> params = {'kernel': jnp.ones((4, 2))}
    >>> masks = {'kernel': jnp.array([[True, False]] * 4)}
    >>> lora = init_lora(jax.random.key(0), params, [('.*', (2, 4))])
    >>> def loss(lora, frozen, x):
    ...     restored = merge(frozen.params, frozen.masks, lora)
    ...     return jnp.mean((x @ restored['kernel'] - 1.0) ** 2), {}
    >>> tx = optax.sgd(0.1)
    >>> step = make_step(loss, tx)
    >>> state, metrics = step(init_state(lora, tx), Frozen(params, masks), jnp.ones((1, 4)))
    >>> float(metrics['loss'])
    5.0
    """
    tx = optax.with_extra_args_support(tx)

    def gradients(trained, frozen, batch):
        return jax.value_and_grad(loss, has_aux=True)(trained, frozen, batch)

    def accumulated(trained, frozen, batch):
        if accumulate == 1:
            return gradients(trained, frozen, batch)
        # A part is every n-th row. If the batch is split over devices, a part has rows of every device, so no rows
        # move.
        parts = jax.tree.map(lambda leaf: leaf.reshape(-1, accumulate, *leaf.shape[1:]).swapaxes(0, 1), batch)
        first = jax.tree.map(lambda leaf: leaf[0], parts)
        # Shapes of losses and gradients are traced, not computed: the scan can begin with zeros and compiles one body.
        zeros = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(gradients, trained, frozen, first)
        )

        def add(total, part):
            return jax.tree.map(jnp.add, total, gradients(trained, frozen, part)), None

        return jax.lax.scan(add, zeros, parts)[0]

    def step(state, frozen, batch):
        (value, metrics), grads = accumulated(state.trained, frozen, prepare(batch, state.step))
        with jax.numpy_dtype_promotion('standard'):  # optax's Adam multiplies its integer counter with floats
            updates, optimizer = tx.update(grads, state.optimizer, state.trained, value=value)
        # A loss of parts may report its sum itself.
        metrics = {'loss': value} | metrics | {'grad_norm': optax.tree.norm(grads)}
        if (skipped := guard.skipped(optimizer)) is not None:
            metrics['skipped'] = skipped
        return State(optax.apply_updates(state.trained, updates), optimizer, state.step + 1), metrics

    return jax.jit(step, donate_argnums=0)


@contextmanager
def stop_signal() -> Iterator[Callable[[int], bool]]:
    """Yield a function of the step that tells whether the run should stop, because of SIGTERM or Ctrl-C.

    A second Ctrl-C ends the process at once. With many processes any of them may receive the signal (SIGTERM only);
    JAX then finds a step at which all of them can stop.
    """
    if jax.process_count() > 1:
        # A step contains collectives: if one process stopped alone, the others would wait for it forever.
        yield multihost_utils.reached_preemption_sync_point
        return
    arrived: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        if arrived and number == signal.SIGINT:
            raise KeyboardInterrupt
        arrived.append(number)

    # A handler only records the signal; the loop checks it between steps, when the state is complete.
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda step: bool(arrived)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def fit(
    step: Step,
    state: State,
    frozen: PyTree,
    batches: Batches,
    *,
    steps: int,
    checkpoints: Checkpoints,
    every: int = 100,
    patience: int = 1,
    log: Callable[[int, dict[str, float]], None] = lambda step, metrics: None,
    profile: str | Path | None = None,
) -> State:
    """Run `step` up to global step `steps`, from the newest checkpoint if there is one.

    On the same machine, a resumed run ends bit-identical to a run that was never stopped.

    Args:
      step: result of `make_step` or `make_train_step`.
      state: the state to begin with if there is no checkpoint; it is donated.
      frozen: trees that the step only reads.
      batches: `batches[i]` is the batch of global step i, whatever ran before.
      steps: number of steps of the whole run.
      checkpoints: where states are saved. Before it returns or raises, this function waits until the last one is
        complete.
      every: steps between checkpoints. A killed process loses at most these steps, and the steps done while a
        checkpoint is written.
      patience: number of bad steps in a row at which to stop; above 1 with an optimizer under `guard.skip_bad_steps`.
      log: called after each step with the number of steps done and the metrics.
      profile: folder for a trace of a few steps, see `profiling.steps`; None: no trace.

    Returns:
      The state after the last step.

    Raises:
      BadStepError: a step was bad; the message names the step and the last good state.
      Interrupted: SIGTERM or Ctrl-C; the state was saved first.
      CheckpointError: a state could not be written, see `Checkpoints.finish`.
    """
    restored = checkpoints.restore(state)
    if restored is not None:
        state = restored
    first = int(state.step)
    indices = profiling.steps(range(first, steps), profile)

    def draw(index: int) -> PyTree:
        if index >= steps:
            return None
        with jax.profiler.TraceAnnotation(profiling.DATA):
            return batches[index]

    # `checkpoints` comes first, so it is left last: signals are those of the caller while it waits for its writer.
    with checkpoints, stop_signal() as should_stop, closing(indices):
        batch = draw(first)
        for index in indices:
            done = index + 1
            state, metrics = step(state, frozen, batch)
            # JAX returns before the step is computed; reading its metrics waits for it. The next batch is drawn
            # between the two, so that the host prepares data while the device computes.
            batch = draw(done)
            values = {name: float(value) for name, value in metrics.items()}
            if problem := _why_bad(values, patience):
                raise BadStepError(f'step {done}: {problem}; the last good state is {_last_good(checkpoints)}')
            log(done, values)
            is_stopping = should_stop(done)
            if done % every == 0 or done == steps or is_stopping:
                checkpoints.save(done, state)
            if is_stopping:
                checkpoints.finish()  # before the message that says so
                raise Interrupted(f'step {done} of {steps} is saved; the same command goes on from there')
    return state


def _last_good(checkpoints: Checkpoints) -> str:
    """Return a phrase for the state from which a run resumes."""
    saved = checkpoints.steps()
    return f'that of step {saved[-1]}' if saved else 'the start'


def _why_bad(values: dict[str, float], patience: int) -> str | None:
    """Return why training must stop after a step, or None."""
    # The loss is named first, because a bad loss is often the cause of other metrics that are not finite.
    not_finite = [name for name in sorted(values, key='loss'.__ne__) if not math.isfinite(values[name])]
    in_a_row = values.get('skipped', patience if not_finite else 0)
    if in_a_row < patience:
        return None
    if not_finite:
        what = f'{not_finite[0]} is {values[not_finite[0]]}'
    else:
        # A guarded step with finite metrics can only be bad because of a spike.
        what = f'the loss has jumped to {values["loss"]:.4g}'
    return what + (f', {in_a_row:.0f} bad steps in a row' if patience > 1 else '')
