"""Run a model's blocks layer by layer over the calibration samples, so that each layer can be observed or changed."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jaxtyping import Array, PyTree

from sparselora_jax.models.runners import valid_rows
from sparselora_jax.pruning import calibrate
from sparselora_jax.pruning.calibration_inputs import check_batches
from sparselora_jax.pruning.method import MethodError
from sparselora_jax.pruning.offload import held
from sparselora_jax.pruning.one_pass import Chunk as OnePassChunk
from sparselora_jax.pruning.one_pass import Level, OnePass, Place
from sparselora_jax.pruning.tracing import program as tracing
from sparselora_jax.pruning.tracing.schedule import Schedule, make_schedule
from sparselora_jax.sparse import sharding
from sparselora_jax.sparse.rules import block_path, flatten, unflatten

# A block of a tower: `block(w, x, ctx, cache) -> (x, cache)`, see `models.runners`.
Block = Callable[..., Any]
# Hidden states of a chunk of samples, and what a block only reads.
Chunk = tuple[Array, dict]
# `visit(layer, layers, w, chunks) -> (w, outputs)`: see `walk`.
Visit = Callable[[int, int, dict, list[Chunk]], tuple[dict, list[Array] | None]]


def joined(batches: Iterable[dict], chunk: int) -> dict:
    """Concatenate the batches into one batch of all samples.

    If samples are split over devices, the first `chunk` samples go to the first device, the next to the second, and so
    on. The first chunks of all devices are then, in order, the first chunks of a single device.

    Args:
      batches: dicts of arrays, samples first.
      chunk: number of samples processed at a time on each device.

    Raises:
      CalibrationError: no batch, the batches are no list of dicts or differ in their arrays, or `chunk` is below one.
    """
    check_batches(batches)
    if not isinstance(chunk, Integral) or chunk < 1:
        raise calibrate.CalibrationError(f'chunk {chunk!r}: expected a number of samples, 1 or more')
    batches = list(batches)
    for batch in batches:
        if not isinstance(batch, Mapping):
            raise calibrate.CalibrationError(f'a batch is a {type(batch).__name__}, expected a dict of arrays')
    if not batches:
        raise calibrate.CalibrationError('the calibration set is empty: no batch arrived')
    _check_alike(batches)
    whole = jax.tree.map(lambda *leaves: jnp.concatenate([jnp.asarray(leaf) for leaf in leaves]), *batches)
    mesh = sharding.mesh_of_rows(batches[0])
    # On one device the order of samples stays.
    if mesh is None:
        return whole
    parts = sharding.row_parts(mesh)

    def deal(leaf):
        # If the last chunk of a device is smaller, no order equals that of a single device.
        if leaf.shape[0] % (parts * chunk):
            return leaf
        return leaf.reshape(-1, parts, chunk, *leaf.shape[1:]).swapaxes(0, 1).reshape(leaf.shape)

    by_row = NamedSharding(mesh, sharding.BATCH)
    return jax.jit(lambda tree: jax.tree.map(deal, tree), out_shardings=by_row)(whole)


def _check_alike(batches: Sequence[Mapping]) -> None:
    """Check that all batches have the same arrays of the same shapes, apart from their numbers of samples.

    Raises:
      CalibrationError: a batch differs from the first, or holds no array with samples.
    """
    for index, batch in enumerate(batches):
        shapes = [jax.tree.map(np.shape, dict(one)) for one in (batches[0], batch)]
        sizes = {shape[0] if shape else None for shape in jax.tree.leaves(shapes[1], is_leaf=_is_shape)}
        if None in sizes or not sizes:
            raise calibrate.CalibrationError(f'batch {index} has {shapes[1]}: expected arrays, samples first')
        ours, first = (jax.tree.map(lambda shape: shape[1:], one, is_leaf=_is_shape) for one in reversed(shapes))
        if ours != first:
            raise calibrate.CalibrationError(
                f'batch {index} has arrays of the shapes {shapes[1]}, and batch 0 of {shapes[0]}: all batches need the '
                'same arrays, of the same shapes apart from the number of samples'
            )


def _is_shape(value: object) -> bool:
    return isinstance(value, tuple)


def block_observer(
    block: Block, stats: calibrate.StatisticOf, mesh: Mesh | None, *, one_scale: bool = False
) -> Callable[..., Any]:
    """Return `(w, chunks) -> {name: (sum, tokens)}`: statistics of the inputs of a layer's kernels.

    Args:
      block: block function of the tower.
      stats: name within the block -> the statistic of that kernel, or None for a kernel that is not observed.
      mesh: mesh over which samples are split; see `sharding.mesh_of_rows`.
      one_scale: see `calibrate.make_observer`.
    """
    return calibrate.make_observer(
        _forward_of(block),
        stats=stats,
        token_weights=_valid_rows_of_chunk,
        mesh=mesh,
        one_scale=one_scale,
        name_of_batch='chunk',
    )


def block_sums(block: Block, stats: calibrate.StatisticOf, mesh: Mesh | AbstractMesh | None) -> calibrate.Sums:
    """Return the programs that `block_observer` runs.

    Args:
      block: see `block_observer`.
      stats: see `block_observer`.
      mesh: see `block_observer`; an abstract mesh is enough for tracing.
    """
    return calibrate.make_sums(_forward_of(block), stats=stats, token_weights=_valid_rows_of_chunk, mesh=mesh)


def _forward_of(block: Block) -> calibrate.Forward:
    """Return a block as a forward of (w, (x, ctx))."""
    return lambda w, inputs: block(w, *inputs, None)


def _valid_rows_of_chunk(name: str, inputs: Chunk) -> Array | None:
    """Return True for the rows of a kernel's input that are not padding."""
    return valid_rows(name, inputs[1])


def block_step(block: Block, mesh: Mesh | AbstractMesh | None) -> Callable[..., Any]:
    """Return `(w, (x, ctx)) -> x`: the program that runs a chunk through a layer.

    Args:
      block: block function of the tower.
      mesh: mesh over which samples are split.
    """

    def run_block(w, inputs):
        return block(w, *inputs, None)[0]

    return jax.jit(sharding.on_own_rows(run_block, mesh))


@contextlib.contextmanager
def naming(tower: str, layer: int) -> Iterator[None]:
    """Add the tower and the layer to errors that begin with the name of a kernel within a block.

    Args:
      tower: path of the tower.
      layer: number of the layer.
    """
    try:
        yield
    except (calibrate.CalibrationError, MethodError) as error:
        name, colon, message = str(error).partition(':')
        raise type(error)(f'{block_path(tower, name)}, layer {layer}{colon}{message}') from None


class BlockPass:
    """Runs the chunks through the layers of a tower in one pass: kernels are pruned within the block (`one_pass`)."""

    def __init__(self, block: Block, paths: Mapping[str, str], mesh: Mesh | None):
        """Create the pass of a tower, before its first layer.

        Args:
          block: block function of the tower.
          paths: {name within the block: path} of the kernels to prune.
          mesh: mesh over which samples are split; None: one device.
        """
        self._forward = _forward_of(block)
        self._paths = paths
        self._mesh = mesh
        self._schedules: dict[Any, Schedule] = {}

    def run(self, layer: int, w: dict[str, Array], chunks: Sequence[Chunk], one_pass: OnePass) -> Sequence[Array]:
        """Prune one layer, and return its outputs for all chunks.

        Args:
          layer: number of the layer.
          w: its weights, by name.
          chunks: its inputs.
          one_pass: prunes the kernels. It keeps compiled programs, so use one for all layers.
        """
        # The last chunk may be smaller than the others, and then has a schedule of its own.
        levels: list[Level] = []
        number_of: dict[int, int] = {}
        samples = []
        for x, ctx in chunks:
            inputs = _of_devices((x, ctx), mesh=self._mesh)
            schedule = self._schedule(w, inputs)
            if id(schedule) not in number_of:
                number_of[id(schedule)] = len(levels)
                levels.append(Level.of_arguments(schedule, tracing.arrays_of(w)))
            number = number_of[id(schedule)]
            inputs = one_pass.kept(inputs)
            values = levels[number].values_of_chunk(tracing.arrays_of(inputs))
            samples.append(OnePassChunk(number, values, functools.partial(valid_rows, ctx=inputs[1])))
        # In the stack of all layers, the axes of a layer's kernel come after that of the layers.
        places = {name: Place(path, {0: layer}, ((1,), (2,))) for name, path in self._paths.items()}
        one_pass.run(levels, samples, places)
        outputs = [levels[chunk.level].schedule.program.jaxpr.outvars[0] for chunk in samples]
        results = (
            _of_rows(one_pass.on_device(chunk.values[output]), mesh=self._mesh)
            for chunk, output in zip(samples, outputs, strict=True)
        )
        return held(results, offload=one_pass.offload)

    def _output(self, w: dict[str, Array], inputs: Chunk) -> Array:
        return self._forward(unflatten(w), inputs)[0]

    def _schedule(self, w: dict[str, Array], inputs: Chunk) -> Schedule:
        """Return the schedule of the block for inputs of these shapes."""
        leaves, structure = jax.tree.flatten(inputs)
        key = structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        if key not in self._schedules:
            # On a mesh each device runs the program on its own entry.
            of_device = inputs if self._mesh is None else jax.tree.map(_shape_of_entry, inputs)
            program = tracing.trace(self._output, w, of_device, self._paths.__contains__)
            calibrate.check_found(program)
            self._schedules[key] = make_schedule(program, needs_results=True)
        return self._schedules[key]


def _shape_of_entry(leaf: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)


@functools.partial(jax.jit, static_argnames='mesh')
def _of_devices(inputs: Chunk, *, mesh: Mesh | None) -> Chunk:
    """Return a chunk with an axis of devices in front of each array; without a mesh, the chunk itself."""
    if mesh is None:
        return inputs
    parts = sharding.row_parts(mesh)
    rows = inputs[0].shape[0]

    # What a block only reads may be the same for all samples.
    def split(leaf):
        if leaf.shape[:1] == (rows,):
            return sharding.split_rows(_by_device(leaf, mesh), mesh)
        return sharding.split_rows(jnp.broadcast_to(leaf, (parts, *leaf.shape)), mesh)

    return jax.tree.map(split, inputs)


@functools.partial(jax.jit, static_argnames='mesh')
def _of_rows(outputs: Array, *, mesh: Mesh | None) -> Array:
    """Return the samples of all devices without their axis; see `_of_devices`."""
    return outputs if mesh is None else _by_row(outputs, mesh)


def walk(
    forward: Callable[..., Any],
    params: dict,
    samples: dict,
    enter: Callable[[str, Block], Visit],
    *,
    chunk: int,
    offload: bool = False,
) -> None:
    """Run `forward` over all samples, block by block, `chunk` samples at a time; see `prune`.

    If samples are split over devices (`joined`), each device runs the blocks on its own chunks.

    Args:
      forward: `forward(weights, batch, run)`.
      params: weights; those of blocks may lie on disk.
      samples: one batch of all samples.
      enter: `enter(tower, block)` is called at each stack of blocks and returns `visit(layer, layers, w, chunks)`.
        `visit` takes a layer's weights by path and its inputs, `[(x, ctx), ...]`. It returns the weights that the layer
        then runs with, and the outputs of all chunks, or None to have them computed with these weights.
      chunk: number of samples processed at a time on each device.
      offload: whether the chunks wait on the host while others run.
    """
    mesh = sharding.mesh_of_rows(samples)

    def run(tower, block, weights, x, ctx, cache=None):
        visit = enter(tower, block)
        # Compiled once for all layers of the tower.
        step = block_step(block, mesh)
        chunks = held(in_chunks(x, ctx, chunk, mesh), offload=offload)
        layers = jax.tree.leaves(weights)[0].shape[0]
        for layer in range(layers):
            # Weights on disk are read here.
            w = jax.tree.map(lambda leaf, layer=layer: jnp.asarray(leaf[layer]), weights)
            w = flatten(w if mesh is None else sharding.everywhere(w, mesh))
            w, outputs = visit(layer, layers, w, chunks)
            for i, (x, ctx) in enumerate(chunks):  # one by one: memory never holds two sets of hidden states
                chunks[i] = (outputs[i] if outputs else step(unflatten(w), (x, ctx)), ctx)
        return _whole([x for x, _ in chunks], mesh=mesh), cache

    forward(params, samples, run)


def in_chunks(x: Array, ctx: dict, chunk: int, mesh: Mesh | None = None) -> list[Chunk]:
    """Split samples into chunks.

    Args:
      x: hidden states, samples first.
      ctx: arrays that have the batch, or 1, as their leading axis.
      chunk: number of samples in a chunk; the last one may have fewer.
      mesh: mesh over which samples are split; a chunk then has `chunk` samples of each device.
    """
    batch = x.shape[0] // sharding.row_parts(mesh)
    return [part((x, ctx), first, size=min(chunk, batch - first), mesh=mesh) for first in range(0, batch, chunk)]


@functools.partial(jax.jit, static_argnames=('size', 'mesh'))
def part(
    arrays: tuple[Array, PyTree], first: jax.typing.ArrayLike, *, size: int, mesh: Mesh | None
) -> tuple[Array, PyTree]:
    """Return `size` samples of each device, from index `first` on.

    Args:
      arrays: arrays that have the batch, or 1, as their leading axis; the first one has the batch.
      first: index of the first sample on each device.
      size: number of samples of each device.
      mesh: mesh over which samples are split.
    """
    batch = arrays[0].shape[0]

    def cut(leaf):
        if leaf.shape[0] == 1 and batch > 1:  # the same for all samples
            return leaf
        return _by_row(jax.lax.dynamic_slice_in_dim(_by_device(leaf, mesh), first, size, axis=1), mesh)

    return jax.tree.map(cut, arrays)


@functools.partial(jax.jit, static_argnames='mesh')
def _whole(chunks: list[Array], *, mesh: Mesh | None) -> Array:
    """Concatenate the samples of all chunks in their original order."""
    return _by_row(jnp.concatenate([_by_device(x, mesh) for x in chunks], axis=1), mesh)


def _by_device(array: Array, mesh: Mesh | None) -> Array:
    """Return samples as `[devices, samples of each, ...]`."""
    return array.reshape(sharding.row_parts(mesh), -1, *array.shape[1:])


def _by_row(parts: Array, mesh: Mesh | None) -> Array:
    """Return `[devices, samples of each, ...]` as samples again, split over the devices."""
    array = parts.reshape(-1, *parts.shape[2:])
    return array if mesh is None else sharding.split_rows(array, mesh)
