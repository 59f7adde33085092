"""Packs 2:4 kernels: two values of each group of four inputs, and half a byte for their positions.

Rows keep the kernel's order (docs/formats.md), so a run of inputs is a run of rows in every array. It can be sliced, or
put on another device, without unpacking.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Integer, Num, Shaped, UInt8

from sparselora_jax.sparse.packing.format import PackedKernel, PackingError, ShapeLike
from sparselora_jax.sparse.packing.four_bits import best_scale, nearest
from sparselora_jax.sparse.packing.stacks import in_layer, kernel_shape, over_layers
from sparselora_jax.sparse.patterns import Pattern

BYTE = 8  # inputs that share a byte of positions: two groups of four
SCALED = 128  # inputs that share an int4 scale
HALVES = np.arange(2, dtype=np.int32)[:, None]  # the low and the high half of a byte
PLACES = np.arange(4, dtype=np.int32)[:, None]  # places in a group


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Packed24(PackedKernel):
    """A kernel `[*layers, inputs, outputs]` with at most two non-zeros in each four inputs of an output.

    Attributes:
      values: `[*layers, 2 * groups, outputs]`: the first and the second value of each group of four inputs. For int4,
        `uint8 [*layers, groups, outputs]`: the first value in the low half of a byte, the second in the high half.
      positions: `uint8 [*layers, groups / 2, outputs]`: bits 0-1 and 2-3 are the places of the first and the second
        value of an even group, bits 4-7 those of the next odd group. The first place is always below the second.
      scale: scales of int4 values, bf16 `[*layers, ceil(inputs / 128), outputs]`; None: values are not scaled.
      inputs: number of inputs of the kernel; groups of zeros fill the last byte.
    """

    stored_as: ClassVar[str] = 'packed24'
    required_arrays: ClassVar[tuple[str, ...]] = ('values', 'positions')
    optional_arrays: ClassVar[tuple[str, ...]] = ('scale',)

    values: Any  # JAX unflattens placeholders into the fields, so they carry no shape check
    positions: Any
    scale: Any
    inputs: int = field(metadata={'static': True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the kernel."""
        return kernel_shape(self.positions, self.inputs)

    @property
    def ndim(self) -> int:
        """Return the number of axes of the kernel."""
        return self.positions.ndim

    @property
    def dtype(self) -> Any:
        """Return the dtype of the unpacked kernel; for int4 values, the dtype of their scale."""
        return self.values.dtype if self.scale is None else self.scale.dtype

    def unpack(self, dtype: DTypeLike | None = None) -> Num[Array, '*layers inputs outputs']:
        """Return the kernel with its zeros, as `unpack24` does."""
        return unpack24(self, dtype)

    def unpack_mask(self) -> Bool[Array, '*layers inputs outputs']:
        """Return the mask, as `mask24` does."""
        return mask24(self)

    def to_arrays(self) -> dict[str, Any]:
        """Return the arrays by the names of their fields."""
        arrays = {'values': self.values, 'positions': self.positions}
        return arrays if self.scale is None else arrays | {'scale': self.scale}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array], inputs: int) -> 'Packed24':
        """Build a kernel from these arrays, and check it by `check_packed24`."""
        packed = cls(arrays['values'], arrays['positions'], arrays.get('scale'), inputs)
        check_packed24(packed)
        return packed


@dataclass(frozen=True)
class Packed24Format:
    """The format of `Packed24`: two of each four inputs.

    Attributes:
      four_bits: round the values to int4.
    """

    four_bits: bool = False
    kernel_type: ClassVar[type] = Packed24
    brings_mask: ClassVar[bool] = True

    @property
    def levels(self) -> str | None:
        """Return the levels to which it rounds values."""
        return 'int4' if self.four_bits else None

    def takes(self, pattern: Pattern) -> bool:
        """Return whether a pattern is 2:4."""
        return (pattern.n, pattern.m) == (2, 4)

    def pack(
        self, kernel: Shaped[Array, '*layers inputs outputs'], mask: Bool[Array, '*layers inputs outputs']
    ) -> Packed24:
        """Pack a kernel by `pack24`, and round its values if the format is four-bit."""
        packed = pack24(kernel, mask)
        return quantise24(packed) if self.four_bits else packed

    def pack_shapes(self, kernel: ShapeLike, density: float = 0.5) -> Packed24:
        """Return the shapes of the packed kernel, see `shapes24`."""
        del density  # always stores half of the weights
        return shapes24(kernel, four_bits=self.four_bits)

    def inputs_per_scale(self, inputs: int) -> int:
        """Return how many inputs share a scale; the last run may be shorter."""
        del inputs
        return SCALED


def shapes24(kernel: ShapeLike, *, four_bits: bool = False) -> Packed24:
    """Return the shapes of a `Packed24`.

    Args:
      kernel: the kernel or its shape.
      four_bits: the values are int4.

    >>> packed = shapes24(jax.ShapeDtypeStruct((2, 16, 3), jnp.bfloat16))
    >>> packed.values.shape, packed.positions.shape
    ((2, 8, 3), (2, 2, 3))
    """
    *layers, inputs, outputs = kernel.shape
    rows = -(-inputs // BYTE)  # rows of bytes; each byte holds the places of four values
    positions = jax.ShapeDtypeStruct((*layers, rows, outputs), jnp.uint8)
    if not four_bits:
        values = jax.ShapeDtypeStruct((*layers, 4 * rows, outputs), kernel.dtype)
        return Packed24(values, positions, None, inputs)
    values = jax.ShapeDtypeStruct((*layers, 2 * rows, outputs), jnp.uint8)
    scale = jax.ShapeDtypeStruct((*layers, -(-inputs // SCALED), outputs), jnp.bfloat16)
    return Packed24(values, positions, scale, inputs)


def pack24(
    kernel: Shaped[Array, '*layers inputs outputs'], mask: Bool[Array, '*layers inputs outputs'] | None = None
) -> Packed24:
    """Return the kernel's values where the mask is True, and their positions, without loss.

    A group that keeps fewer than two weights is padded with zeros.

    Args:
      kernel: the kernel or a stack of them.
      mask: True where a weight is kept; None: keep all non-zero weights.

    Raises:
      PackingError: a group of four keeps more than two weights; names layer, group and output.

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
    """Check that every four inputs of an output keep at most two weights.

    Args:
      mask: the mask of a kernel or of a stack.

    Raises:
      PackingError: a group keeps more than two weights; names the first one.
    """
    counts = over_layers(_count_kept, mask.ndim)(mask)
    # This reads the result on the host, so kernels cannot be packed under jit. The place is only needed for an error.
    if bool(jnp.any(counts > 2)):
        *layer, group, output = (int(i) for i in jnp.argwhere(counts > 2, size=1)[0])
        raise PackingError(
            f'{in_layer(layer)}inputs {4 * group} to {4 * group + 3} of output {output}: '
            f'{int(counts[*layer, group, output])} weights are kept, 2:4 allows two'
        )


def _count_kept(mask: Bool[Array, 'inputs outputs']) -> Int[Array, 'groups outputs']:
    """Count the weights that each group of four inputs keeps."""
    # The number of inputs need not be a multiple of four: missing inputs count as pruned.
    mask = jnp.pad(mask, ((0, -mask.shape[0] % 4), (0, 0)))
    return jnp.sum(mask.reshape(-1, 4, mask.shape[1]), axis=1, dtype=jnp.int32)


def _pack_matrix(
    kernel: Shaped[Array, 'inputs outputs'], mask: Bool[Array, 'inputs outputs']
) -> tuple[Shaped[Array, 'rows outputs'], UInt8[Array, 'bytes outputs']]:
    outputs = kernel.shape[1]
    fill = ((0, -kernel.shape[0] % BYTE), (0, 0))
    mask = jnp.pad(mask, fill).reshape(-1, 4, outputs)
    kernel = jnp.where(mask, jnp.pad(kernel, fill).reshape(-1, 4, outputs), jnp.zeros((), kernel.dtype))
    first = jnp.argmax(mask, axis=1)
    last = 3 - jnp.argmax(mask[:, ::-1], axis=1)
    count = jnp.sum(mask, axis=1, dtype=jnp.int32)
    # A group with fewer than two kept weights also stores a zero, at the next place, or at 2 before a weight at 3.
    first = jnp.where(count == 0, 0, jnp.where((count == 1) & (first == 3), 2, first))
    # [groups, 2, outputs]
    places = jnp.stack([first, jnp.where(count == 2, last, first + 1)], axis=1)
    values = jnp.take_along_axis(kernel, places, axis=1).reshape(-1, outputs)
    # Half a byte per group; the even group is in the low half of a byte.
    codes = (places[:, 0] | places[:, 1] << 2).astype(jnp.uint8)
    return values, codes[0::2] | codes[1::2] << 4


def split_codes(positions: UInt8[Array, 'bytes outputs']) -> Int[Array, 'groups outputs']:
    """Return half a byte per group: the place of its first value (bits 0-1) and of its second (bits 2-3).

    Args:
      positions: positions of one matrix.

    >>> split_codes(jnp.uint8([[0b01001101]])).tolist() == [[0b1101], [0b0100]]
    True
    """
    word = positions.astype(jnp.int32)[:, None]
    return ((word >> 4 * HALVES) & 15).reshape(-1, positions.shape[1])


def _split_values(packed: Packed24) -> Num[Array, 'groups 2 outputs']:
    """Return the two values of each group: int4 values as unscaled integers, bf16 values as bits (`as_bits`)."""
    if packed.scale is None:
        return as_bits(packed.values).reshape(-1, 2, packed.values.shape[-1])
    return nibble(packed.values.astype(jnp.int32)[:, None], HALVES)


def as_bits(values: Num[Array, '*shape']) -> Num[Array, '*shape']:
    """Return bf16 values reinterpreted as integers, and other values unchanged.

    This avoids a conversion: XLA for CPUs widens bf16 to fp32 to slice it or to select from it.

    Args:
      values: values of any dtype.

    >>> as_bits(jnp.bfloat16([1.0])).tolist() == [0x3F80]
    True
    """
    return jax.lax.bitcast_convert_type(values, jnp.uint16) if values.dtype == jnp.bfloat16 else values


def nibble(word: Int[Array, '*shape'], high: bool | np.ndarray) -> Int[Array, '...']:
    """Return four bits of a byte as a signed number.

    Args:
      word: bytes.
      high: True: the high four bits; False: the low ones.

    >>> int(nibble(jnp.int32(0xF3), True)), int(nibble(jnp.int32(0xF3), False))
    (-1, 3)
    """
    return (word << 28 - 4 * high) >> 28  # the right shift extends the sign


def unpack24(packed: Packed24, dtype: DTypeLike | None = None) -> Num[Array, '*layers inputs outputs']:
    """Return the kernel with its zeros.

    Args:
      packed: the kernel or a stack of them.
      dtype: dtype of the result; default: the dtype of the values (or scales).
    """
    return over_layers(_unpack_matrix, packed.ndim)(packed).astype(dtype or packed.dtype)


def _unpack_matrix(packed: Packed24) -> Num[Array, 'inputs outputs']:
    # Elementwise over [groups, 4, outputs]: stacking rows instead would take twice as long on a CPU.
    values = _split_values(packed)
    codes = split_codes(packed.positions)[:, None]
    second = jnp.where(codes >> 2 == PLACES, values[:, 1:], jnp.zeros((), values.dtype))
    matrix = jnp.where(codes & 3 == PLACES, values[:, :1], second).reshape(-1, packed.shape[-1])[: packed.inputs]
    if packed.scale is not None:
        return scaled(matrix, packed.scale)
    return matrix if matrix.dtype == packed.dtype else jax.lax.bitcast_convert_type(matrix, packed.dtype)


def scaled(
    matrix: Integer[Array, 'inputs outputs'], scale: Float[Array, 'blocks outputs']
) -> Float[Array, 'inputs outputs']:
    """Multiply integers by the scale of their 128 inputs, in fp32.

    Args:
      matrix: int4 values as integers.
      scale: one scale for each 128 inputs.
    """
    wide = jnp.repeat(scale.astype(jnp.float32), SCALED, axis=0)[: matrix.shape[0]]
    return matrix.astype(jnp.float32) * wide


def mask24(packed: Packed24) -> Bool[Array, '*layers inputs outputs']:
    """Return a mask that is True at the two stored values of each group.

    It equals the mask that the kernel was packed with, if that kept exactly two weights of each group.

    Args:
      packed: the kernel or a stack of them.
    """
    return over_layers(_mask_matrix, packed.ndim)(packed.positions)[..., : packed.inputs, :]


def _mask_matrix(positions: UInt8[Array, 'bytes outputs']) -> Bool[Array, 'inputs outputs']:
    codes = split_codes(positions)[:, None]
    return ((codes & 3 == PLACES) | (codes >> 2 == PLACES)).reshape(-1, positions.shape[1])


def quantise24(packed: Packed24) -> Packed24:
    """Round values to int4 by the bf16 scales with the least squared error, one for 128 inputs of an output.

    One tried scale maps the largest magnitude to -8, since int4 has no +8. Smaller scales are tried too: they clip the
    largest values and round the others more finely.

    Args:
      packed: the kernel or a stack of them; int4 values are returned unchanged.
    """
    if packed.scale is not None:
        return packed
    values, scale = over_layers(_quantise_matrix, packed.ndim)(packed.values)
    return Packed24(values, packed.positions, scale, packed.inputs)


def _quantise_matrix(
    values: Float[Array, 'rows outputs'],
) -> tuple[UInt8[Array, 'groups outputs'], Float[Array, 'blocks outputs']]:
    rows, outputs = values.shape
    rows_per_scale = SCALED // 2  # half of the inputs are kept
    wide = jnp.pad(values.astype(jnp.float32), ((0, -rows % rows_per_scale), (0, 0)))
    wide = wide.reshape(-1, rows_per_scale, outputs)
    scale = best_scale(wide, 'int4')
    # `nearest` numbers levels from 0, which is -8. So subtract 8, and keep four bits of two's complement.
    codes = (nearest(wide, scale, 'int4') - 8).reshape(-1, outputs)[:rows] & 15
    return (codes[0::2] | codes[1::2] << 4).astype(jnp.uint8), scale


def check_packed24(packed: Packed24) -> None:
    """Check a kernel that was read from a file.

    Args:
      packed: the kernel or a stack of them.

    Raises:
      PackingError: the shapes or dtypes do not match, or positions are not two different places in ascending order;
        names the first error.
    """
    *layers, rows, outputs = packed.positions.shape
    value_rows = 4 * rows if packed.scale is None else 2 * rows
    _check_array('positions', packed.positions, (*layers, -(-packed.inputs // BYTE), outputs), jnp.uint8)
    _check_array('values', packed.values, (*layers, value_rows, outputs), None if packed.scale is None else jnp.uint8)
    if packed.scale is not None:
        _check_array('scale', packed.scale, (*layers, -(-packed.inputs // SCALED), outputs), jnp.bfloat16)
    word = packed.positions.astype(jnp.int32)
    for half in (0, 4):
        first = (word >> half) & 3
        second = (word >> half + 2) & 3
        if bool(jnp.any(first >= second)):
            *layer, row, output = (int(i) for i in jnp.argwhere(first >= second, size=1)[0])
            pair = (int(first[*layer, row, output]), int(second[*layer, row, output]))
            group = 2 * row + half // 4
            raise PackingError(
                f'{in_layer(layer)}group {group} of output {output}: {pair} are not two different places of four in '
                'ascending order'
            )


def _check_array(name: str, array: Array, shape: tuple[int, ...], dtype: DTypeLike | None) -> None:
    """Check shape and dtype of one array; a dtype of None accepts any."""
    if array.shape != shape or (dtype is not None and array.dtype != dtype):
        expected = array.dtype if dtype is None else jnp.dtype(dtype)
        raise PackingError(f'{name} is {array.dtype} {array.shape}, expected {expected} {shape}')
