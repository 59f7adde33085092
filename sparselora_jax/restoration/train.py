"""A train step from a loss, and the loop that runs it: logged, checkpointed, interruptible, resumable bit for bit."""

import math
import signal
from collections.abc import Callable
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.experimental import multihost_utils
from jaxtyping import Array, Int

from sparselora_jax.restoration import guard
from sparselora_jax.restoration.checkpoint import Checkpoints
from sparselora_jax.runtime import profiling
from sparselora_jax.runtime.errors import SparseloraError


class BadStepError(SparseloraError, RuntimeError):
    """A loss or a gradient that is not finite, or a loss that spikes; the last good checkpoint is kept."""


class Interrupted(SparseloraError):  # noqa: N818  a stop that was asked for, no error
    """SIGTERM or Ctrl-C: the state was saved, the same command goes on from there."""


class State(NamedTuple):
    """What a step changes."""

    trained: Any
    optimizer: Any
    step: Int[Array, '']


def init_state(trained: Any, tx: optax.GradientTransformation) -> State:
    """The state before the first step."""
    trained = jax.device_put(trained, may_alias=False)
    return State(trained, tx.init(trained), jnp.zeros((), jnp.int32))


def make_step(
    loss: Callable[[Any, Any, dict], tuple[Array, dict[str, Array]]],
    tx: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    prepare: Callable[[dict], dict] = lambda batch: batch,
) -> Callable[[State, Any, dict], tuple[State, dict[str, Array]]]:
    """The jitted step, `(state, frozen, batch) -> (state, metrics)`; only `state` is donated.

    Args:
      loss: `loss(trained, frozen, batch) -> (loss, metrics)`, differentiated in `trained`.
      tx: under `guard.skip_bad_steps`, metrics have the bad steps in a row as `skipped`.
      accumulate: micro-batches a step; must divide the batch. Their losses, metrics and gradients are *added*, so the
        loss of a part must be its share of the whole batch's.
      prepare: applied to the whole batch before it is divided: what makes such a loss possible, e.g. the weight of each
        token, which depends on how many there are.
    """
    tx = optax.with_extra_args_support(tx)

    def gradients(trained, frozen, batch):
        return jax.value_and_grad(loss, has_aux=True)(trained, frozen, batch)

    def accumulated(trained, frozen, batch):
        if accumulate == 1:
            return gradients(trained, frozen, batch)
        # A part is every n-th row: of a batch that is split over devices, rows of each device's own.
        parts = jax.tree.map(lambda leaf: leaf.reshape(-1, accumulate, *leaf.shape[1:]).swapaxes(0, 1), batch)
        first = jax.tree.map(lambda leaf: leaf[0], parts)
        zeros = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(gradients, trained, frozen, first)
        )

        def add(total, part):
            return jax.tree.map(jnp.add, total, gradients(trained, frozen, part)), None

        return jax.lax.scan(add, zeros, parts)[0]

    def step(state, frozen, batch):
        (value, metrics), grads = accumulated(state.trained, frozen, prepare(batch))
        with jax.numpy_dtype_promotion('standard'):  # optax's Adam multiplies its integer counter with floats
            updates, optimizer = tx.update(grads, state.optimizer, state.trained, value=value)
        metrics['grad_norm'] = optax.tree.norm(grads)
        if (skipped := guard.skipped(optimizer)) is not None:
            metrics['skipped'] = skipped
        return State(optax.apply_updates(state.trained, updates), optimizer, state.step + 1), metrics

    return jax.jit(step, donate_argnums=0)


@contextmanager
def stop_signal():
    """Yields a function of the step that tells whether SIGTERM or Ctrl-C has arrived; a second Ctrl-C ends at once.

    Of many processes any may have been told: JAX then finds a step at which all of them stop (SIGTERM only).
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    arrived = []

    def note(number, frame):
        if arrived and number == signal.SIGINT:
            raise KeyboardInterrupt
        arrived.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda step: bool(arrived)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def fit(
    step: Callable[[State, Any, dict], tuple[State, dict[str, Array]]],
    state: State,
    frozen: Any,
    batches: Any,
    *,
    steps: int,
    checkpoints: Checkpoints,
    every: int = 100,
    patience: int = 1,
    log: Callable[[int, dict[str, float]], None] = lambda step, metrics: None,
    profile: str | Path | None = None,
) -> State:
    """Runs `step` up to global step `steps`, from the newest checkpoint if there is one.

    Args:
      batches: `batches[i]` is the batch of global step i, whatever ran before.
      every: steps between checkpoints; a killed process loses at most these, and those made while one is written.
      patience: with an optimizer under `guard.skip_bad_steps`: bad steps in a row at which to stop.
      log: called with the number of steps done and the metrics of the last.
      profile: a folder for a trace of a few steps, see `profiling.steps`; None: none.

    Raises:
      BadStepError: names the step. Interrupted: the state was saved first. CheckpointError: see `Checkpoints.finish`.
    """
    state = checkpoints.restore(state) or state
    first = int(state.step)
    indices = profiling.steps(range(first, steps), profile)

    def draw(index):
        if index >= steps:
            return None
        with jax.profiler.TraceAnnotation(profiling.DATA):
            return batches[index]

    with checkpoints, stop_signal() as stopped, closing(indices):
        batch = draw(first)
        for index in indices:
            state, metrics = step(state, frozen, batch)
            batch = draw(index + 1)  # before its numbers are waited for, so that the device has work meanwhile
            values = {name: float(value) for name, value in metrics.items()}
            if bad := _why_bad(values, patience):
                saved = checkpoints.steps()
                last = f'that of step {saved[-1]}' if saved else 'the start'
                raise BadStepError(f'step {index + 1}: {bad}; the last good state is {last}')
            log(index + 1, values)
            stopping = stopped(index + 1)
            if (index + 1) % every == 0 or index + 1 == steps or stopping:
                checkpoints.save(index + 1, state)
            if stopping:
                checkpoints.finish()
                raise Interrupted(f'step {index + 1} of {steps} is saved; the same command goes on from there')
    return state


def _why_bad(values: dict[str, float], patience: int) -> str | None:
    """What is wrong with a step after which training must not go on."""
    wrong = [name for name in sorted(values, key='loss'.__ne__) if not math.isfinite(values[name])]
    in_a_row = values.get('skipped', patience if wrong else 0)
    if in_a_row < patience:
        return None
    what = f'{wrong[0]} is {values[wrong[0]]}' if wrong else f'the loss has jumped to {values["loss"]:.4g}'
    return what + (f', {in_a_row:.0f} bad steps in a row' if patience > 1 else '')
