"""Pieces of a checkpoint -> our (sharded) device arrays and back, a few pieces on the host at a time.

A piece has at most `layout.PIECE` bytes, whatever the model's size; while the device transposes, casts and places one,
the next is read.
"""

import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Shaped

from sparselora_jax.checkpoints import checkpoint_files, layout
from sparselora_jax.checkpoints.layout import Piece
from sparselora_jax.models import towers
from sparselora_jax.sparse import rules, sharding


def read_params(shapes: dict, pieces: list[Piece], dtype: Any = None, mesh: Mesh | None = None) -> dict:
    """Arrays of `shapes` on the device (or mesh), filled piece by piece.

    Args:
      dtype: None: the widest that an array's tensors have in the files.

    Raises:
      UnsupportedModelError: a T5 in float16; nothing has been read then.
    """
    shapes = rules.flatten(shapes)
    dtypes = _dtypes(pieces) if dtype is None else dict.fromkeys(shapes, jnp.dtype(dtype))
    towers.check_dtypes(dtypes)
    like = {path: jax.ShapeDtypeStruct(shape, dtypes[path]) for path, shape in shapes.items()}
    where = {} if mesh is None else rules.flatten(sharding.shardings(rules.unflatten(like), mesh))
    flat = {path: jnp.zeros(leaf.shape, leaf.dtype, device=where.get(path)) for path, leaf in like.items()}
    for piece, array in _read_ahead(pieces):
        path, target = piece.path, where.get(piece.path)
        block = jax.device_put(array, None if target is None else _source_sharding(target, piece))
        del array
        block = _convert(block, piece.sizes, flat[path].dtype, rules.named_kernel(path))
        flat[path] = _placer(target)(flat[path], block, np.asarray(piece.starts, np.int32))
        flat[path].block_until_ready()  # or the host would hold every piece that the device has yet to take
    return rules.unflatten(flat)


def read_block(array: Any, piece: Piece) -> Shaped[np.ndarray, '...']:
    """What a checkpoint should hold of one of our arrays: a piece in its layout and dtype."""
    kernel = rules.named_kernel(piece.path)
    if isinstance(array, np.ndarray):
        block = array[tuple(slice(start, start + size) for start, size in zip(piece.starts, piece.sizes, strict=True))]
        block = layout.to_checkpoint(block, piece.file_shape, kernel=kernel)
    else:
        block = _take(array, np.asarray(piece.starts, np.int32), piece.sizes, piece.file_shape, kernel)
    with np.errstate(over='ignore'):  # for the caller to look at
        return np.asarray(block).astype(piece.entry.dtype, copy=False)  # on the host: devices have no fp64


def _dtypes(pieces: list[Piece]) -> dict[str, Any]:
    found = {}
    for path, dtype in {(piece.path, piece.entry.dtype) for piece in pieces}:
        dtype = jax.dtypes.canonicalize_dtype(dtype)
        with jax.numpy_dtype_promotion('standard'):
            found[path] = jnp.promote_types(found.get(path, dtype), dtype)
    return found


def _read_ahead(pieces: list[Piece]) -> Iterator[tuple[Piece, np.ndarray]]:
    """Reads a piece while the one before is used."""
    with ThreadPoolExecutor(1) as pool:
        coming = None
        for piece in pieces:
            following = piece, pool.submit(checkpoint_files.read, piece.entry, piece.rows)
            if coming is not None:
                yield coming[0], coming[1].result()
            coming = following
        if coming is not None:
            yield coming[0], coming[1].result()


def _source_sharding(target: NamedSharding, piece: Piece) -> NamedSharding:
    """Splits a piece, still in the checkpoint's layout, as its place is split: each device is sent its share."""
    shape, spec = piece.file_shape, [*target.spec, *[None] * (len(piece.sizes) - len(target.spec))][-2:]
    if len(shape) != 2:
        spec = []
    spec = PartitionSpec(*(spec[::-1] if rules.named_kernel(piece.path) else spec))
    return sharding.fitting(target.mesh, spec, shape)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _convert(block, sizes, dtype, kernel):
    return layout.to_params(block, sizes, kernel=kernel).astype(dtype)


@functools.cache
def _placer(target: NamedSharding | None) -> Any:
    """Puts a block in its place: compiled once per shape, since where it goes is traced.

    Kept apart from `_convert`, and done on bits: on CPUs a half-precision update walks the whole array, and bits are
    slower to transpose than floats.
    """

    def place(array, block, starts):
        bits = jax.lax.dynamic_update_slice(_bits(array), _bits(block), list(starts))
        return jax.lax.bitcast_convert_type(bits, array.dtype)

    return jax.jit(place, donate_argnums=0, out_shardings=target)


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, f'uint{8 * x.dtype.itemsize}')


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _take(array, starts, sizes, file_shape, kernel):
    block = jax.lax.dynamic_slice(array, list(starts), sizes)
    return layout.to_checkpoint(block, file_shape, kernel=kernel)
