"""Block-wise reconstruction: after a block is pruned, train its kept weights to give the dense block's output.

EBFT (arXiv 2402.12419) and Wanda++ (arXiv 2503.04992). The loss is the squared error of the block's output on the
calibration samples, relative to the dense output of each token. The papers do not divide; then a few tokens with very
large hidden states make up most of the sum. The loss needs no labels, and memory holds one block at a time. Masks stay
as they are, so reconstruction follows any method and any pattern. Norms, biases and kernels that are not pruned stay as
they are too.
"""

import functools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from sparselora_jax.models.runners import valid_rows
from sparselora_jax.pruning.offload import held
from sparselora_jax.pruning.walk import Block, Chunk, block_step, part
from sparselora_jax.runtime import processes
from sparselora_jax.runtime.errors import SparseloraError
from sparselora_jax.sparse import sharding
from sparselora_jax.sparse.rules import unflatten

TARGETS = ('dense', 'pruned')

_ADAM = optax.scale_by_adam()

# Weights of one block, by their names within the block.
Weights = dict[str, Array]
# A chunk of samples: the block's input, what it only reads, and the output that it is trained to give. A tree of arrays
# whose first leaf has the samples, as `sharding.on_own_rows` expects.
Samples = tuple[Array, tuple[dict, Array]]


class ReconstructError(SparseloraError, ValueError):
    """An illegal option of reconstruction."""


@dataclass(frozen=True)
class Reconstruct:
    """Options of block-wise reconstruction.

    Attributes:
      passes: number of passes over the calibration samples for each block.
      rate: highest learning rate of Adam; it falls to 0 along a cosine.
      batch: number of samples in a step, in total over all devices; at most those of a chunk.
      target: output that a block is trained to give. `'dense'`: that of the dense block on the outputs of the dense
        blocks before it. `'pruned'`: that of the dense block on its own input, the output of the pruned blocks before
        it.
    """

    passes: int = 4
    rate: float = 2e-3
    batch: int = 4
    target: str = 'dense'

    def __post_init__(self):
        """Check the options.

        Raises:
          ReconstructError: an option is illegal; names it, its value and what is expected.
        """
        for name in ('passes', 'batch'):
            value = getattr(self, name)
            if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
                raise ReconstructError(f'reconstruct.{name} {value!r}: expected a whole number, 1 or more')
        if not isinstance(self.rate, Real) or not 0 < self.rate < math.inf:
            raise ReconstructError(f'reconstruct.rate {self.rate!r}: expected a positive number')
        if self.target not in TARGETS:
            raise ReconstructError(f'reconstruct.target {self.target!r}: expected one of {", ".join(TARGETS)}')


def check_reconstruct(options: object, at_once: int, parts: int) -> None:
    """Check options of reconstruction against the samples that are processed at a time.

    Args:
      options: what a user gave as options; None: no reconstruction.
      at_once: number of samples that all devices process at a time.
      parts: number of devices over which samples are split.

    Raises:
      ReconstructError: it is no `Reconstruct`, the devices do not divide its batch, or the batch is larger than
        `at_once`.
    """
    if options is None:
        return
    if not isinstance(options, Reconstruct):
        raise ReconstructError(f'reconstruct: expected an instance such as sl.Reconstruct(), not {options!r}')
    if options.batch % parts:
        raise ReconstructError(
            f'reconstruct.batch {options.batch}: expected a multiple of {parts}, the devices that split the samples'
        )
    if options.batch > at_once:
        raise ReconstructError(
            f'reconstruct.batch {options.batch}: expected at most {at_once}, the samples that are processed at a '
            'time; lower it, or raise chunk'
        )


class _Trained(NamedTuple):
    """What a step changes: the trained kernels and the state of Adam, all in fp32."""

    kernels: Weights
    adam: Any


class _Like(NamedTuple):
    """The dtype and the place of a pruned kernel; hashable, so that a program can be compiled for them.

    Attributes:
      dtype: its dtype.
      place: its sharding on a mesh; None: one device.
    """

    dtype: np.dtype
    place: NamedSharding | None


class Targets:
    """The outputs that the blocks of one tower are trained to give.

    Besides the samples that `walk` holds, memory holds one more set of hidden states. With the target `'dense'` it is
    kept from one block to the next, since the targets of a block are the dense inputs of the next block.
    """

    def __init__(self, block: Block, mesh: Mesh | None, target: str, *, offload: bool = False):
        """Create the targets of a tower, before its first block.

        Args:
          block: block function of the tower.
          mesh: mesh over which samples are split; None: one device.
          target: see `Reconstruct`.
          offload: whether the targets wait on the host.
        """
        self._offload = offload
        self._step = block_step(block, mesh)
        self._target = target
        self._outputs: Sequence[Array] = []

    def of_layer(self, w: dict[str, Array], chunks: Sequence[Chunk]) -> Sequence[Array]:
        """Return the targets of a layer; layers are called in order, each once.

        Args:
          w: the layer's dense weights, by name.
          chunks: the inputs of the pruned block.

        Returns:
          Hidden states of each chunk. The list is changed by the next call.
        """
        # The inputs of a tower's first block are the same for both targets.
        if self._target == 'pruned' or not self._outputs:
            self._outputs = held((x for x, _ in chunks), offload=self._offload)
        weights = unflatten(w)
        for index, (_, ctx) in enumerate(chunks):  # one by one, as in `walk`
            self._outputs[index] = self._step(weights, (self._outputs[index], ctx))
        return self._outputs


def _copied(kernels: Weights, dtype: Any = None) -> Weights:
    """Return copies of kernels, since a step deletes the buffers that it is given."""

    def copy(leaf):
        # Without a mesh no place is named: arrays with a named place would make all programs compile again.
        cast = leaf if dtype is None else leaf.astype(dtype)
        return jax.device_put(cast, sharding.on_mesh(leaf), may_alias=False)

    return jax.tree.map(copy, kernels)


def _cast(kernels: Weights, like: dict[str, _Like]) -> Weights:
    """Return kernels in the dtypes of the pruned ones."""
    return {name: leaf.astype(like[name].dtype) for name, leaf in kernels.items()}


def _error_of(block: Block) -> Callable[[Weights, Samples], Float[Array, '']]:
    """Return `(w, samples) -> error`: the sum of relative squared errors over rows that are not padding, in fp32."""

    def error(w, samples):
        x, (ctx, target) = samples
        valid = valid_rows('', ctx)
        # No other row reads padding, but NaN in it would reach the gradient of every kernel as 0 times NaN.
        if valid is not None:
            x = jnp.where(valid[..., None] | jnp.isfinite(x), x, jnp.zeros((), x.dtype))
        output = block(unflatten(w), x, ctx, None)[0]
        target = target.astype(jnp.float32)
        difference = output.astype(jnp.float32) - target
        # Chosen before the squares, which may overflow on padding.
        if valid is not None:
            difference = jnp.where(valid[..., None], difference, 0.0)
            target = jnp.where(valid[..., None], target, 0.0)
        size = jnp.sum(jnp.square(target), axis=-1)
        # Nothing is relative to 0: padding adds nothing, and a row of zeros its squared error as it is.
        return jnp.sum(jnp.sum(jnp.square(difference), axis=-1) / jnp.where(size == 0, 1.0, size))

    return error


class _Programs(NamedTuple):
    """The programs that reconstruct the layers of a tower.

    Attributes:
      error: `error(w, samples)` returns the squared error of a chunk, summed over all devices.
      step: `step(trained, layer, samples, first, scale, rate, size=, like=)` returns what is trained after a step, and
        the squared error of its samples before it.
    """

    error: Callable[..., Array]
    step: Callable[..., tuple[_Trained, Array]]


class _Layer(NamedTuple):
    """What a step only reads: the weights that are not trained, and the masks of those that are."""

    fixed: Weights
    masks: Weights


def _programs(block: Block, mesh: Mesh | None) -> _Programs:
    """Return the programs of a tower; each device runs them on its own samples."""
    error = _error_of(block)

    def error_on_device(w, samples):
        return error(w, samples)[None]  # the new axis has one entry for each device

    @jax.jit
    def error_of_chunk(w: Weights, samples: Samples) -> Float[Array, '']:
        return jnp.sum(sharding.on_own_rows(error_on_device, mesh)(w, samples))

    @functools.partial(jax.jit, static_argnames=('size', 'like'), donate_argnums=0)
    def step(
        trained: _Trained,
        layer: _Layer,
        samples: Samples,
        first: ArrayLike,
        scale: ArrayLike,
        rate: ArrayLike,
        *,
        size: int,
        like: tuple[tuple[str, _Like], ...],
    ) -> tuple[_Trained, Float[Array, '']]:
        """Train on `size` samples of each device, from its sample `first` on; `scale` multiplies the loss."""

        def gradient_on_device(weights, samples):
            kernels, fixed, first = weights
            batch = part(samples, first, size=size, mesh=None)
            error_and_gradient = jax.value_and_grad(lambda kernels: error(fixed | _cast(kernels, dict(like)), batch))
            return jax.tree.map(lambda leaf: leaf[None], error_and_gradient(kernels))

        on_devices = sharding.on_own_rows(gradient_on_device, mesh)
        errors, of_devices = on_devices((trained.kernels, layer.fixed, first), samples)
        gradient = {}
        for name, kind in like:
            # The gradient of a pruned weight is 0, so its moments and its updates are exactly 0.
            total = jnp.where(layer.masks[name], scale * jnp.sum(of_devices[name], axis=0), 0.0)
            gradient[name] = total if kind.place is None else jax.lax.with_sharding_constraint(total, kind.place)
        with jax.numpy_dtype_promotion('standard'):  # optax multiplies its integer counter with floats
            updates, adam = _ADAM.update(gradient, trained.adam)
        kernels = {name: kernel - rate * updates[name] for name, kernel in trained.kernels.items()}
        return _Trained(kernels, adam), jnp.sum(errors)

    return _Programs(error_of_chunk, step)


class _Errors(NamedTuple):
    """Relative squared errors of one block, summed over the rows of all samples.

    Attributes:
      as_pruned: of the pruned kernels.
      of_passes: of each pass, summed over its steps.
      of_best: of the kernels after the pass with the lowest error.
    """

    as_pruned: float
    of_passes: list[float]
    of_best: float

    @property
    def best(self) -> int:
        """Number of the pass with the lowest error."""
        return self.of_passes.index(min(error for error in self.of_passes if math.isfinite(error)))

    @property
    def fell(self) -> bool:
        """Whether the best kernels have a lower error than the pruned ones; False if theirs is NaN."""
        return self.of_best < self.as_pruned


def block_reconstructor(block: Block, options: Reconstruct, mesh: Mesh | None = None) -> Callable[..., Weights]:
    """Return `(w, pruned, masks, chunks, targets, place) -> kernels`, which reconstructs one layer of a tower.

    Its programs are compiled once for all layers of the tower, or twice if the batch does not divide a chunk.

    Args:
      block: block function of the tower.
      options: options of reconstruction.
      mesh: mesh over which samples are split; None: one device. Each device computes the error and the gradient of its
        own samples; both are then summed over the devices.

    Returns:
      A function of the layer's weights by name, of which only those that are not pruned are read; its pruned kernels;
      their masks; its inputs `[(x, ctx), ...]`; the target of each of these chunks (see `Targets`); and the block's
      name for the log. The error of a pass is the sum over its steps, each taken before the step changes the kernels.
      Of the kernels after each pass, it chooses those of the pass with the lowest error, and returns them if their
      error over all samples is lower than that of the pruned kernels. So the result is never worse than these. It has
      their dtype and their zeros.
    """
    programs = _programs(block, mesh)
    parts = sharding.row_parts(mesh)

    def reconstruct(
        w: Weights, pruned: Weights, masks: Weights, chunks: Sequence[Chunk], targets: Sequence[Array], place: str
    ) -> Weights:
        # Read one by one: what waits on the host need not all fit on a device.
        def samples_of(index: int) -> Samples:
            x, ctx = chunks[index]
            return x, (ctx, targets[index])

        layer = _Layer({name: leaf for name, leaf in w.items() if name not in pruned}, masks)
        like = {name: _Like(kernel.dtype, sharding.on_mesh(kernel)) for name, kernel in pruned.items()}

        def error_of(kernels: Weights) -> float:
            errors = [programs.error(layer.fixed | kernels, samples_of(index)) for index in range(len(chunks))]
            return sum(float(processes.on_host(error)) for error in errors)

        as_pruned = error_of(pruned)
        if not math.isfinite(as_pruned):
            _warn(place, f'not reconstructed: its relative squared error is {as_pruned} as pruned')
            return pruned
        # Nothing is wrong, so there is nothing to train.
        if as_pruned == 0:
            return pruned
        rows = [samples_of(index)[0].shape[0] // parts for index in range(len(chunks))]
        batches = _batches(rows, options.batch // parts)
        steps = options.passes * len(batches)
        # The loss of a step is then about 1 at first, whatever the size of hidden states: Adam's epsilon is absolute.
        scale = np.float32(len(batches) / as_pruned)
        kernels = _copied(pruned, jnp.float32)
        trained = _Trained(kernels, _ADAM.init(kernels))
        best = pruned
        of_passes = []
        for number in range(options.passes):
            of_steps = []
            for done, (index, first, size) in enumerate(batches, start=number * len(batches)):
                rate = np.float32(options.rate * (1 + math.cos(math.pi * done / steps)) / 2)
                samples = samples_of(index)
                trained, error = programs.step(
                    trained, layer, samples, first, scale, rate, size=size, like=tuple(like.items())
                )
                of_steps.append(error)
            # Read after the pass: a step need not wait until the error of the one before is on the host.
            of_passes.append(sum(float(processes.on_host(error)) for error in of_steps))
            if not math.isfinite(of_passes[-1]):
                break
            if of_passes[-1] == min(of_passes):
                best = _copied(_cast(trained.kernels, like))
        errors = _Errors(as_pruned, of_passes, as_pruned if best is pruned else error_of(best))
        _warn_if_diverged(errors, place)
        return best if errors.fell else pruned

    return reconstruct


def _batches(rows: Sequence[int], size: int) -> list[tuple[int, int, int]]:
    """Return the batches of one pass: (number of the chunk, first sample on each device, samples of each device).

    Args:
      rows: number of samples of each chunk on each device.
      size: number of samples of a batch on each device.
    """
    batches = []
    for index, of_chunk in enumerate(rows):
        batches += [(index, first, min(size, of_chunk - first)) for first in range(0, of_chunk, size)]
    return batches


def _warn_if_diverged(errors: _Errors, place: str) -> None:
    """Log one line if the error of a pass was above the initial one, or not finite, or did not fall in the end.

    Args:
      errors: the errors of the block.
      place: name of the block.
    """
    bad = [index for index, error in enumerate(errors.of_passes) if not error <= errors.as_pruned]
    if errors.fell and not bad:
        return
    found = f'{errors.of_passes[bad[0]]:.3g} in pass {bad[0] + 1}' if bad else f'{errors.of_best:.3g} at the end'
    kept = f'those after pass {errors.best + 1}' if errors.fell else 'as pruned'
    _warn(
        place,
        f'reconstruction diverged: relative squared error {errors.as_pruned:.3g} as pruned, {found}; its weights are '
        f'{kept}; lower reconstruct.rate',
    )


def _warn(place: str, message: str) -> None:
    # All processes have the same errors, so only one of them logs.
    if processes.first():
        logging.getLogger(__name__).warning('%s: %s', place, message)
