"""Copy pieces of a checkpoint to our (sharded) device arrays and back, with only a few pieces on the host at a time.

A piece has at most `layout.PIECE` bytes, whatever the model's size. While the device transposes, casts and places one
piece, the host reads the next one.
"""

import functools
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Bool, Shaped

from sparselora_jax.checkpoints import layout, safetensors_format
from sparselora_jax.checkpoints.layout import Piece
from sparselora_jax.models import towers
from sparselora_jax.runtime.ahead import map_ahead
from sparselora_jax.runtime.files import StorageError
from sparselora_jax.sparse import rules, sharding


def read_params(
    shapes: dict, pieces: Sequence[Piece], dtype: DTypeLike | None = None, mesh: Mesh | None = None
) -> dict:
    """Read arrays to the device or mesh, piece by piece.

    Args:
      shapes: a tree of tuples.
      pieces: every piece of these arrays.
      dtype: dtype of the arrays; None: for each array, the widest dtype of its tensors in the files.
      mesh: the mesh to split them over by `sharding.RULES`; None: one device.

    Raises:
      UnsupportedModelError: a T5 would be in float16; this is checked before anything is read.
      StorageError: a number of a file is not finite; names the tensor and the file.
    """
    flat_shapes = rules.flatten(shapes)
    dtypes = _file_dtypes(pieces) if dtype is None else dict.fromkeys(flat_shapes, jnp.dtype(dtype))
    towers.check_dtypes(dtypes)
    # Allocate all arrays before reading, so that a model that does not fit fails at once.
    structs = {path: jax.ShapeDtypeStruct(shape, dtypes[path]) for path, shape in flat_shapes.items()}
    targets: dict[str, NamedSharding] = {}
    if mesh is not None:
        targets = rules.flatten(sharding.shardings(rules.unflatten(structs), mesh))
    flat = {path: jnp.zeros(leaf.shape, leaf.dtype, device=targets.get(path)) for path, leaf in structs.items()}
    # One piece ahead: the host holds two pieces at most.
    for piece, host_array in map_ahead(_read_piece, pieces, ahead=1):
        path = piece.path
        target = targets.get(path)
        block = jax.device_put(host_array, None if target is None else _source_sharding(target, piece))
        del host_array  # otherwise the host would hold two pieces while it reads the next
        block, is_finite = _convert(block, piece.sizes, flat[path].dtype, rules.named_kernel(path))
        flat[path] = _placer(target)(flat[path], block, np.asarray(piece.starts, np.int32))
        # Here tensor and file are known. Later there would only be a loss that is not finite.
        if not is_finite:
            raise StorageError(
                f'{piece.entry.file}: {piece.entry.name} ({path}) has NaN or infinite numbers; download it again, or '
                'convert it from the original precision'
            )
        flat[path].block_until_ready()  # otherwise the host would hold all pieces that the device has not taken yet
    return rules.unflatten(flat)


def read_host_array(shape: tuple[int, ...], pieces: Sequence[Piece]) -> Shaped[np.ndarray, '...']:
    """Read one array into host memory, in its file's dtype and bit for bit.

    Args:
      shape: shape of the array.
      pieces: every piece of the array; all their tensors have the same dtype.
    """
    array = np.empty(shape, pieces[0].entry.dtype)  # the pieces cover all of it
    for piece in pieces:
        data = safetensors_format.read(piece.entry, piece.rows)
        array[piece.block] = layout.to_params(data, piece.sizes, kernel=rules.named_kernel(piece.path))
    return array


def read_block(array: jax.Array | np.ndarray, piece: Piece, dtype: np.dtype | None = None) -> Shaped[np.ndarray, '...']:
    """Return the block of one of our arrays that a piece covers, in the checkpoint's layout.

    Args:
      array: array in our layout.
      piece: the piece.
      dtype: dtype of the result; that of the file by default.
    """
    kernel = rules.named_kernel(piece.path)
    if isinstance(array, np.ndarray):
        block = layout.to_checkpoint(array[piece.block], piece.file_shape, kernel=kernel)
    else:
        # Sliced and transposed on the device, so the host holds only one piece of a sharded array.
        block = _take(array, np.asarray(piece.starts, np.int32), piece.sizes, piece.file_shape, kernel)
    # Cast on the host, since devices have no fp64. Numbers may overflow; the caller checks that.
    with np.errstate(over='ignore'):
        return np.asarray(block).astype(piece.entry.dtype if dtype is None else dtype, copy=False)


def _file_dtypes(pieces: Iterable[Piece]) -> dict[str, np.dtype]:
    """Return the widest dtype of each array's tensors, by the array's path."""
    dtypes: dict[str, np.dtype] = {}
    # Remove duplicates first: a model has thousands of pieces, and promotion takes longer than hashing.
    for path, file_dtype in {(piece.path, piece.entry.dtype) for piece in pieces}:
        dtype = jax.dtypes.canonicalize_dtype(file_dtype)  # devices hold no fp64
        with jax.numpy_dtype_promotion('standard'):
            dtypes[path] = jnp.promote_types(dtypes.get(path, dtype), dtype)
    return dtypes


def _read_piece(piece: Piece) -> tuple[Piece, np.ndarray]:
    """Return a piece and its tensor's rows."""
    return piece, safetensors_format.read(piece.entry, piece.rows)


def _source_sharding(target: NamedSharding, piece: Piece) -> NamedSharding:
    """Return the sharding of a piece in the checkpoint's layout with which each device receives only its own share."""
    missing = len(piece.sizes) - len(target.spec)
    spec = [*target.spec, *[None] * missing][-2:]  # the layer's two axes
    if len(piece.file_shape) != 2:
        spec = []  # vectors and convolutions are small, so they are replicated
    if rules.named_kernel(piece.path):
        spec = spec[::-1]  # checkpoints hold [out, in]
    return sharding.fitting(target.mesh, PartitionSpec(*spec), piece.file_shape)


# Sizes are static but offsets are traced, so all layers of a stack share one program.
@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _convert(
    block: jax.Array, sizes: tuple[int, ...], dtype: np.dtype, kernel: bool
) -> tuple[jax.Array, Bool[jax.Array, '']]:
    """Return a piece in our layout and dtype, and whether all its numbers in the file are finite."""
    return layout.to_params(block, sizes, kernel=kernel).astype(dtype), jnp.isfinite(block).all()


@functools.cache
def _placer(target: NamedSharding | None) -> Callable[[jax.Array, jax.Array, np.ndarray], jax.Array]:
    """Return a function that writes a block into an array; it compiles once per shape, since the offset is traced.

    It works on bits and is separate from `_convert`. On CPUs a half-precision update would walk the whole array, and
    transposing bits is slower than transposing floats.
    """

    def place(array: jax.Array, block: jax.Array, starts: jax.Array) -> jax.Array:
        bits = jax.lax.dynamic_update_slice(_bits(array), _bits(block), list(starts))
        return jax.lax.bitcast_convert_type(bits, array.dtype)

    # The array is donated, so the update is in place and memory holds the model once.
    return jax.jit(place, donate_argnums=0, out_shardings=target)


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, f'uint{8 * x.dtype.itemsize}')


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _take(
    array: jax.Array, starts: jax.Array, sizes: tuple[int, ...], file_shape: tuple[int, ...], kernel: bool
) -> jax.Array:
    block = jax.lax.dynamic_slice(array, list(starts), sizes)
    return layout.to_checkpoint(block, file_shape, kernel=kernel)
