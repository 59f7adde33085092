"""2:4 kernels without their zeros: two values of each four inputs, and where they stand, in half a byte.

Rows keep the order of the kernel's (docs/formats.md), so a run of inputs is a run of rows in every array: it can be cut
out, or laid on another device, without unpacking.
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, Num, Shaped, UInt8

from sparselora_jax.sparse.packing.errors import PackingError
from sparselora_jax.sparse.packing.four_bits import best_scale, nearest
from sparselora_jax.sparse.packing.stacks import kernel_shape, of_layer, over_layers

BYTE = 8  # inputs that share a byte of positions: two groups of four
SCALED = 128  # inputs that share an int4 scale
HALVES, PLACES = (np.arange(count, dtype=np.int32)[:, None] for count in (2, 4))  # of a byte, and of a group


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Packed24:
    """A kernel `[*layers, inputs, outputs]` with at most two non-zeros in each four inputs of an output.

    Attributes:
      values: `[*layers, 2 * groups, outputs]`: the first and the second of each group of four inputs; as int4,
        `uint8 [*layers, groups, outputs]`: the first in the low half of a byte, the second in the high one.
      positions: `uint8 [*layers, groups / 2, outputs]`: bits 0-1 and 2-3 say where the first and the second value of
        an even group stand, bits 4-7 the same of the odd group behind it. The first stands before the second.
      scale: of int4 values, bf16 `[*layers, ceil(inputs / 128), outputs]`; None: values are what they are.
      inputs: of the kernel; groups of zeros fill the last byte.
    """

    values: Any  # JAX unflattens placeholders into the fields, so they carry no shape check
    positions: Any
    scale: Any
    inputs: int = field(metadata={'static': True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the kernel that it holds."""
        return kernel_shape(self.positions, self.inputs)

    @property
    def ndim(self) -> int:
        return self.positions.ndim

    @property
    def dtype(self) -> Any:
        """Of the kernel that it is read as."""
        return self.values.dtype if self.scale is None else self.scale.dtype

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


def pack24(
    kernel: Shaped[Array, '*layers inputs outputs'], mask: Bool[Array, '*layers inputs outputs'] | None = None
) -> Packed24:
    """The kernel's values where the mask is True, and their positions. Lossless.

    A group that keeps fewer than two weights is filled up with zeros.

    Args:
      mask: which weights are kept; None: those that are not zero.

    Raises:
      PackingError: a group of four keeps more than two weights: names layer, group and output.

    >>> kernel = jnp.array([[0.0], [3.0], [0.0], [5.0]])
    >>> packed = pack24(kernel)
    >>> packed.values[:, 0].tolist(), bin(packed.positions[0, 0]), unpack24(packed).tolist() == kernel.tolist()
    ([3.0, 5.0, 0.0, 0.0], '0b1001101', True)
    """
    mask = kernel != 0 if mask is None else mask
    check24(mask)
    values, positions = over_layers(_pack_matrix, kernel.ndim)(kernel, mask)
    return Packed24(values, positions, None, kernel.shape[-2])


def check24(mask: Bool[Array, '*layers inputs outputs']) -> None:
    """Raises `PackingError` unless every four inputs of an output keep at most two weights."""
    kept = over_layers(_count_kept, mask.ndim)(mask)
    if bool(jnp.any(kept > 2)):
        *layer, group, output = (int(i) for i in jnp.argwhere(kept > 2, size=1)[0])
        raise PackingError(
            f'{of_layer(layer)}inputs {4 * group} to {4 * group + 3} of output {output}: '
            f'{int(kept[*layer, group, output])} weights are kept, 2:4 allows two'
        )


def _count_kept(mask):
    """Of each group of four inputs."""
    mask = jnp.pad(mask, ((0, -mask.shape[0] % 4), (0, 0)))
    return jnp.sum(mask.reshape(-1, 4, mask.shape[1]), axis=1, dtype=jnp.int32)


def _pack_matrix(kernel, mask):
    outputs = kernel.shape[1]
    fill = ((0, -kernel.shape[0] % BYTE), (0, 0))
    mask = jnp.pad(mask, fill).reshape(-1, 4, outputs)
    kernel = jnp.where(mask, jnp.pad(kernel, fill).reshape(-1, 4, outputs), jnp.zeros((), kernel.dtype))
    first, last = jnp.argmax(mask, axis=1), 3 - jnp.argmax(mask[:, ::-1], axis=1)
    count = jnp.sum(mask, axis=1, dtype=jnp.int32)
    # A group that keeps one weight, or none, also holds a zero beside it.
    first = jnp.where(count == 0, 0, jnp.where((count == 1) & (first == 3), 2, first))
    places = jnp.stack([first, jnp.where(count == 2, last, first + 1)], axis=1)
    values = jnp.take_along_axis(kernel, places, axis=1).reshape(-1, outputs)
    codes = (places[:, 0] | places[:, 1] << 2).astype(jnp.uint8)
    return values, codes[0::2] | codes[1::2] << 4


def split_codes(positions: UInt8[Array, 'bytes outputs']) -> Int[Array, 'groups outputs']:
    """Half a byte a group: where its first value stands (bits 0-1), and its second (bits 2-3).

    >>> split_codes(jnp.uint8([[0b01001101]])).tolist() == [[0b1101], [0b0100]]
    True
    """
    word = positions.astype(jnp.int32)[:, None]
    return ((word >> 4 * HALVES) & 15).reshape(-1, positions.shape[1])


def _split_values(packed: Packed24) -> Array:
    """`[groups, 2, outputs]` of one matrix; int4 values as integers, not scaled; bf16 as `as_bits`."""
    if packed.scale is None:
        return as_bits(packed.values).reshape(-1, 2, packed.values.shape[-1])
    return nibble(packed.values.astype(jnp.int32)[:, None], HALVES)


def as_bits(values: Num[Array, '*of']) -> Num[Array, '*of']:
    """bf16 as the integers that its bits are, others as they are: XLA for CPUs widens bf16 to cut it up, or to select.

    >>> as_bits(jnp.bfloat16([1.0])).tolist() == [0x3F80]
    True
    """
    return jax.lax.bitcast_convert_type(values, jnp.uint16) if values.dtype == jnp.bfloat16 else values


def nibble(word: Int[Array, '*of'], high: bool | np.ndarray) -> Int[Array, '...']:
    """Four bits of a byte as a signed number.

    >>> int(nibble(jnp.int32(0xF3), True)), int(nibble(jnp.int32(0xF3), False))
    (-1, 3)
    """
    return (word << 28 - 4 * high) >> 28  # the shift to the right copies the sign


def unpack24(packed: Packed24, dtype: Any = None) -> Float[Array, '*layers inputs outputs']:
    """The kernel with its zeros.

    Args:
      dtype: of the result; that of its values (or scales) by default.
    """
    return over_layers(_unpack_matrix, packed.ndim)(packed).astype(dtype or packed.dtype)


def _unpack_matrix(packed: Packed24) -> Array:
    # Elementwise over [groups, 4, outputs]: rows that are stacked instead would take XLA twice as long on a CPU.
    values, codes = _split_values(packed), split_codes(packed.positions)[:, None]
    second = jnp.where(codes >> 2 == PLACES, values[:, 1:], jnp.zeros((), values.dtype))
    matrix = jnp.where(codes & 3 == PLACES, values[:, :1], second).reshape(-1, packed.shape[-1])[: packed.inputs]
    if packed.scale is not None:
        return scaled(matrix, packed.scale)
    return matrix if matrix.dtype == packed.dtype else jax.lax.bitcast_convert_type(matrix, packed.dtype)


def scaled(matrix: Integer[Array, 'inputs outputs'], scale: Float[Array, 'blocks outputs']) -> Float[Array, '...']:
    """Integers times the scale of their 128 inputs, in fp32."""
    wide = jnp.repeat(scale.astype(jnp.float32), SCALED, axis=0)[: matrix.shape[0]]
    return matrix.astype(jnp.float32) * wide


def mask24(packed: Packed24) -> Bool[Array, '*layers inputs outputs']:
    """Where the kernel's two values of each group stand: the mask that it was packed with, if that kept two of each."""
    return over_layers(_mask_matrix, packed.ndim)(packed.positions)[..., : packed.inputs, :]


def _mask_matrix(positions):
    codes = split_codes(positions)[:, None]
    return ((codes & 3 == PLACES) | (codes >> 2 == PLACES)).reshape(-1, positions.shape[1])


def quantise24(packed: Packed24) -> Packed24:
    """Values as int4 with a bf16 scale for 128 inputs of each output: to the nearest, with the least squared error.

    A scale is tried that makes the largest magnitude -8, which int4 has on one side only, and smaller ones, which cut
    off the largest values and round the others more finely.
    """
    if packed.scale is not None:
        return packed
    values, scale = over_layers(_quantise_matrix, packed.ndim)(packed.values)
    return Packed24(values, packed.positions, scale, packed.inputs)


def _quantise_matrix(values: Float[Array, 'rows outputs']):
    rows, outputs = values.shape
    per = SCALED // 2  # half of the inputs are kept
    wide = jnp.pad(values.astype(jnp.float32), ((0, -rows % per), (0, 0))).reshape(-1, per, outputs)
    scale = best_scale(wide, 'int4')
    found = (nearest(wide, scale, 'int4') - 8).reshape(-1, outputs)[:rows] & 15
    return (found[0::2] | found[1::2] << 4).astype(jnp.uint8), scale


def check_packed24(packed: Packed24) -> None:
    """Checks what was read from a file.

    Raises:
      PackingError: shapes or dtypes that do not belong together, or positions that are not two different places in
        order: names the first.
    """
    *layers, rows, outputs = packed.positions.shape
    values, dtype = (4 * rows, None) if packed.scale is None else (2 * rows, jnp.uint8)
    expected = {
        'positions': (packed.positions, (*layers, -(-packed.inputs // BYTE), outputs), jnp.uint8),
        'values': (packed.values, (*layers, values, outputs), dtype),
    }
    if packed.scale is not None:
        expected['scale'] = (packed.scale, (*layers, -(-packed.inputs // SCALED), outputs), jnp.bfloat16)
    for name, (array, shape, dtype) in expected.items():
        if array.shape != shape or (dtype is not None and array.dtype != dtype):
            raise PackingError(f'{name} is {array.dtype} {array.shape}, expected {dtype or array.dtype} {shape}')
    word = packed.positions.astype(jnp.int32)
    for half in (0, 4):
        first, second = (word >> half) & 3, (word >> half + 2) & 3
        if bool(jnp.any(first >= second)):
            *layer, row, output = (int(i) for i in jnp.argwhere(first >= second, size=1)[0])
            pair = int(first[*layer, row, output]), int(second[*layer, row, output])
            group = 2 * row + half // 4
            raise PackingError(
                f'{of_layer(layer)}group {group} of output {output}: {pair} are not two places of four, in order'
            )
