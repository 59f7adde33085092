"""Runs a model's blocks layer by layer over the calibration samples, so that each can be looked at or changed."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jaxtyping import Array

from sparselora_jax.models.runners import valid_rows
from sparselora_jax.pruning import calibrate
from sparselora_jax.sparse import rules as rules_lib
from sparselora_jax.sparse import sharding


def joined(batches: Iterable[dict], chunk: int) -> dict:
    """One batch of all samples.

    Of samples that are split over devices, the first `chunk` go to the first device, the next to the second, and so on:
    the devices' first chunks are then the first ones of a single device, in the same order.

    Raises:
      CalibrationError: no batch.
    """
    if not (batches := list(batches)):
        raise calibrate.CalibrationError('the calibration set is empty: no batch arrived')
    whole = jax.tree.map(lambda *leaves: jnp.concatenate([jnp.asarray(leaf) for leaf in leaves]), *batches)
    if (mesh := sharding.mesh_of_rows(batches[0])) is None:
        return whole
    parts = sharding.row_parts(mesh)

    def dealt(leaf):
        if leaf.shape[0] % (parts * chunk):  # a device's last chunk is smaller: no order would be that of one device
            return leaf
        return leaf.reshape(-1, parts, chunk, *leaf.shape[1:]).swapaxes(0, 1).reshape(leaf.shape)

    where = NamedSharding(mesh, sharding.BATCH)
    return jax.jit(lambda tree: jax.tree.map(dealt, tree), out_shardings=where)(whole)


def block_observer(block: Callable, stats: Callable[[str], Callable | None], mesh: Mesh | None) -> Callable[..., Any]:
    """`(w, chunks) -> {name: (sum, tokens)}`: what the kernels of a layer read; see `calibrate.make_observer`.

    Args:
      stats: the statistic of a kernel, by its name within the block, or None: it is not watched.
      mesh: over which samples are split; see `sharding.mesh_of_rows`.
    """
    return calibrate.make_observer(**_watched(block, stats), mesh=mesh)


def block_sums(
    block: Callable, stats: Callable[[str], Callable | None], mesh: Mesh | AbstractMesh | None
) -> calibrate.Sums:
    """The programs that `block_observer` runs."""
    return calibrate.make_sums(**_watched(block, stats), mesh=mesh)


def _watched(block: Callable, stats: Callable[[str], Callable | None]) -> dict[str, Callable]:
    return {
        'forward': lambda w, inputs: block(w, *inputs, None),
        'stats': stats,
        'valid': lambda name, inputs: valid_rows(name, inputs[1]),
    }


def block_step(block: Callable, mesh: Mesh | AbstractMesh | None) -> Callable[..., Any]:
    """`(w, (x, ctx)) -> x`: the program that takes a chunk through a layer."""

    def run_block(w, inputs):
        return block(w, *inputs, None)[0]

    return jax.jit(sharding.on_own_rows(run_block, mesh))


def walk(
    forward: Callable[..., Any],
    params: dict,
    samples: dict,
    enter: Callable[[str, Callable], Callable[[int, int, dict, list], dict]],
    *,
    chunk: int,
) -> None:
    """Runs `forward` over all samples, block by block, `chunk` samples at a time; see `prune`.

    Of samples that are split over devices (`joined`), each device runs blocks on chunks of its own.

    Args:
      enter: `enter(tower, block)`, called at each stack of blocks, returns `visit(layer, layers, w, chunks)`: that is
        given a layer's weights by path and its inputs, `[(x, ctx), ...]`, and returns the weights to go on with.

    Raises:
      CalibrationError: one of `visit`, which names a kernel within its block: with tower and layer.
    """
    mesh = sharding.mesh_of_rows(samples)

    def run(tower, block, weights, x, ctx, cache=None):
        visit = enter(tower, block)
        step = block_step(block, mesh)
        chunks = in_chunks(x, ctx, chunk, mesh)
        layers = jax.tree.leaves(weights)[0].shape[0]
        for layer in range(layers):
            w = jax.tree.map(lambda leaf, layer=layer: jnp.asarray(leaf[layer]), weights)
            w = rules_lib.flatten(w if mesh is None else sharding.everywhere(w, mesh))  # they may come from disk
            try:
                w = visit(layer, layers, w, chunks)
            except calibrate.CalibrationError as error:
                raise calibrate.CalibrationError(f'{tower}/blocks/{error} (layer {layer})') from None
            for i, (x, ctx) in enumerate(chunks):  # one by one: two sets of hidden states are never held
                chunks[i] = (step(rules_lib.unflatten(w), (x, ctx)), ctx)
        return _whole([x for x, _ in chunks], mesh=mesh), cache

    forward(params, samples, run)


def in_chunks(x: Array, ctx: dict, chunk: int, mesh: Mesh | None = None) -> list[tuple[Array, dict]]:
    """Chunks of samples; arrays of `ctx` have the batch, or 1, as their leading axis.

    Args:
      mesh: over which samples are split; a chunk then has `chunk` of each device's.
    """
    batch = x.shape[0] // sharding.row_parts(mesh)
    return [_part((x, ctx), first, size=min(chunk, batch - first), mesh=mesh) for first in range(0, batch, chunk)]


@functools.partial(jax.jit, static_argnames=('size', 'mesh'))
def _part(arrays: tuple[Array, dict], first: Any, *, size: int, mesh: Mesh | None) -> Any:
    batch = arrays[0].shape[0]

    def part(leaf):
        if leaf.shape[0] == 1 and batch > 1:
            return leaf
        return _joint(jax.lax.dynamic_slice_in_dim(_of_devices(leaf, mesh), first, size, axis=1), mesh)

    return jax.tree.map(part, arrays)


@functools.partial(jax.jit, static_argnames='mesh')
def _whole(chunks: list[Array], *, mesh: Mesh | None) -> Array:
    """The samples of all chunks, in the order in which they were divided."""
    return _joint(jnp.concatenate([_of_devices(x, mesh) for x in chunks], axis=1), mesh)


def _of_devices(array: Array, mesh: Mesh | None) -> Array:
    return array.reshape(sharding.row_parts(mesh), -1, *array.shape[1:])


def _joint(of_devices: Array, mesh: Mesh | None) -> Array:
    array = of_devices.reshape(-1, *of_devices.shape[2:])
    return array if mesh is None else sharding.split_rows(array, mesh)
