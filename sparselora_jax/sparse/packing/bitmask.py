"""Stores any mask in one bit per element, alone or with the kept weights."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Int, Num, Shaped, UInt32

from sparselora_jax.sparse.packing.format import PackedKernel, PackingError, ShapeLike, Stored
from sparselora_jax.sparse.packing.stacks import kernel_shape, over_layers
from sparselora_jax.sparse.patterns import Pattern

WORD = 32  # bits that one `population_count` counts
RUNS = 2  # number of runs of words: the smallest that XLA compiles to a loop
BIT = np.left_shift(np.uint32(1), np.arange(WORD, dtype=np.uint32))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedMask(Stored):
    """A mask `[*layers, inputs, outputs]` stored as bits.

    Attributes:
      bits: `uint8 [*layers, ceil(inputs / 8), outputs]`; bit j of a byte is input 8 * row + j.
      inputs: number of inputs of the mask; bits after the last input are 0.
    """

    stored_as: ClassVar[str] = 'packed_mask'
    required_arrays: ClassVar[tuple[str, ...]] = ('bits',)

    bits: Any  # JAX unflattens placeholders into the fields, so they carry no shape check
    inputs: int = field(metadata={'static': True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the mask."""
        return kernel_shape(self.bits, self.inputs)

    @property
    def ndim(self) -> int:
        """Return the number of axes of the mask."""
        return self.bits.ndim

    def to_arrays(self) -> dict[str, Any]:
        """Return the arrays by the names of their fields."""
        return {'bits': self.bits}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array], inputs: int) -> 'PackedMask':
        """Build a mask from these arrays, and check it by `check_packed_mask`."""
        packed = cls(arrays['bits'], inputs)
        check_packed_mask(packed)
        return packed


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Bitmask(PackedKernel):
    """A kernel `[*layers, inputs, outputs]` stored as its mask and its kept weights.

    Attributes:
      values: `[*layers, kept]`, in the order of the kernel's rows; layers that keep fewer are padded with zeros.
      mask: a `PackedMask`.
    """

    stored_as: ClassVar[str] = 'bitmask'
    required_arrays: ClassVar[tuple[str, ...]] = ('values', 'bits')

    values: Any
    mask: Any

    @property
    def inputs(self) -> int:
        """Return the number of inputs of the kernel."""
        return self.mask.inputs

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the kernel."""
        return self.mask.shape

    @property
    def ndim(self) -> int:
        """Return the number of axes of the kernel."""
        return self.mask.ndim

    @property
    def dtype(self) -> Any:
        """Return the dtype of the kernel."""
        return self.values.dtype

    def unpack(self, dtype: DTypeLike | None = None) -> Num[Array, '*layers inputs outputs']:
        """Return the kernel with its zeros, as `unpack_bitmask` does."""
        kernel = unpack_bitmask(self)
        return kernel if dtype is None else kernel.astype(dtype)

    def unpack_mask(self) -> Bool[Array, '*layers inputs outputs']:
        """Return the mask, True where a weight is kept."""
        return unpack_mask(self.mask)

    def to_arrays(self) -> dict[str, Any]:
        """Return the arrays by the names of their fields."""
        return {'values': self.values, 'bits': self.mask.bits}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array], inputs: int) -> 'Bitmask':
        """Build a kernel from these arrays, and check it by `check_bitmask`."""
        packed = cls(arrays['values'], PackedMask(arrays['bits'], inputs))
        check_bitmask(packed)
        return packed

    @staticmethod
    def stack(layers: Sequence['Bitmask']) -> 'Bitmask':
        """Stack the kernels of single layers on the host; layers with fewer kept weights are padded with zeros."""
        # Layers were packed one by one, so they differ in the number of values.
        longest = max(layer.values.size for layer in layers)
        padded = [
            dataclasses.replace(layer, values=np.pad(layer.values, (0, longest - layer.values.size)))
            for layer in layers
        ]
        return jax.tree.map(lambda *arrays: np.stack(arrays), *padded)


@dataclass(frozen=True)
class BitmaskFormat:
    """The format of `Bitmask`: any mask, without loss."""

    kernel_type: ClassVar[type] = Bitmask
    brings_mask: ClassVar[bool] = True
    levels: ClassVar[None] = None

    def takes(self, pattern: Pattern) -> bool:
        """Return whether a pattern prunes anything."""
        return not pattern.dense

    def pack(
        self, kernel: Shaped[Array, '*layers inputs outputs'], mask: Bool[Array, '*layers inputs outputs']
    ) -> Bitmask:
        """Pack a kernel by `pack_bitmask`."""
        return pack_bitmask(kernel, mask)

    def pack_shapes(self, kernel: ShapeLike, density: float) -> Bitmask:
        """Return the shapes of the packed kernel, if each layer keeps this share of its weights."""
        *layers, inputs, outputs = kernel.shape
        # Rounded up, because the layer that keeps the most decides the size for all layers.
        num_kept = math.ceil(density * inputs * outputs)
        return Bitmask(jax.ShapeDtypeStruct((*layers, num_kept), kernel.dtype), mask_shapes(kernel))


def mask_shapes(kernel: ShapeLike) -> PackedMask:
    """Return the shapes of a `PackedMask`.

    Args:
      kernel: the kernel or its shape.
    """
    *layers, inputs, outputs = kernel.shape
    return PackedMask(jax.ShapeDtypeStruct((*layers, -(-inputs // 8), outputs), jnp.uint8), inputs)


def pack_mask(mask: Bool[Array, '*layers inputs outputs']) -> PackedMask:
    """Return a mask in one bit per element.

    Args:
      mask: True where a weight is kept.

    >>> packed = pack_mask(jnp.array([[True], [False], [True]]))
    >>> packed.bits.tolist(), unpack_mask(packed).tolist()
    ([[5]], [[True], [False], [True]])
    """
    return PackedMask(jnp.packbits(mask, axis=-2, bitorder='little'), mask.shape[-2])


def unpack_mask(packed: PackedMask) -> Bool[Array, '*layers inputs outputs']:
    """Return the mask, True where a weight is kept.

    Args:
      packed: the mask or a stack of them.
    """
    return jnp.unpackbits(packed.bits, axis=-2, count=packed.inputs, bitorder='little').astype(bool)


def pack_bitmask(
    kernel: Shaped[Array, '*layers inputs outputs'], mask: Bool[Array, '*layers inputs outputs'] | None = None
) -> Bitmask:
    """Return the kernel's values where the mask is True, and the mask, without loss.

    Args:
      kernel: the kernel or a stack of them.
      mask: True where a weight is kept; None: keep all non-zero weights.
    """
    mask = kernel != 0 if mask is None else mask
    *layers, inputs, outputs = kernel.shape
    # On the host, since the number of values depends on the mask.
    kernels = np.asarray(kernel).reshape(-1, inputs * outputs)
    masks = np.asarray(mask).reshape(-1, inputs * outputs)
    # The array is rectangular, so all layers have as many values as the layer that keeps the most.
    values = np.zeros((len(kernels), int(masks.sum(axis=1).max())), kernels.dtype)
    for row, layer_kernel, layer_mask in zip(values, kernels, masks, strict=True):
        row[: layer_mask.sum()] = layer_kernel[layer_mask]
    return Bitmask(jnp.asarray(values.reshape(*layers, -1)), pack_mask(jnp.asarray(mask)))


def unpack_bitmask(packed: Bitmask) -> Shaped[Array, '*layers inputs outputs']:
    """Return the kernel with its zeros.

    Args:
      packed: the kernel or a stack of them.
    """
    return over_layers(_unpack_matrix, packed.ndim)(packed)


def _unpack_matrix(packed: Bitmask) -> Shaped[Array, 'inputs outputs']:
    mask = unpack_mask(packed.mask)
    if not packed.values.size:  # a gather cannot read from an empty array
        return jnp.zeros(mask.shape, packed.dtype)
    # Words run along the kernel's rows, like the values. The bytes of the mask run down the inputs instead.
    bits = jnp.pad(mask.reshape(-1), (0, -mask.size % (RUNS * WORD))).reshape(RUNS, -1, WORD)
    words = jnp.sum(jnp.where(bits, BIT, jnp.uint32(0)), axis=2, dtype=jnp.uint32)
    # A loop, because otherwise XLA for CPUs counts bit by bit inside the gather, which takes three times as long.
    _, places = jax.lax.scan(_places, jnp.zeros((), jnp.int32), words)
    # For pruned weights the place is meaningless and may be past the end, so it is clipped here and masked below.
    values = packed.values.at[places.reshape(-1)[: mask.size].reshape(mask.shape)].get(mode='clip')
    return jnp.where(mask, values, jnp.zeros((), values.dtype))


def _places(start: Int[Array, ''], words: UInt32[Array, ' words']) -> tuple[Int[Array, ''], Int[Array, 'words 32']]:
    """Return the number of kept weights up to the end of these words, and before each of their bits.

    The index of a weight in `values` is the number of kept weights before it. These are in earlier words, or in lower
    bits of the same word. Earlier words are counted by a sum over words: a sum over weights would take twice as long as
    everything else.

    Args:
      start: number of kept weights before the first of these words.
      words: bits of the mask.
    """
    # population_count returns the dtype of its argument. The gather needs int32 indices.
    counts = jax.lax.population_count(words).astype(jnp.int32)
    until = start + jnp.cumsum(counts, dtype=jnp.int32)
    lower = jax.lax.population_count(words[:, None] & (BIT - 1)).astype(jnp.int32)
    return until[-1], (until - counts)[:, None] + lower


def check_packed_mask(packed: PackedMask) -> None:
    """Check a packed mask that was read from a file.

    Args:
      packed: the mask or a stack of them.

    Raises:
      PackingError: the shapes do not match, or bits are set after the last input.
    """
    rows = packed.bits.shape[-2]
    if packed.bits.dtype != jnp.uint8 or rows != -(-packed.inputs // 8):
        raise PackingError(
            f'bits are {packed.bits.dtype} {packed.bits.shape}, expected uint8 for {packed.inputs} inputs'
        )
    # docs/formats.md: bits after the last input are 0, so that equal masks give equal files.
    in_last_byte = packed.inputs % 8
    if in_last_byte and bool(jnp.any(packed.bits[..., -1, :] >> in_last_byte)):
        raise PackingError(f'bits are set after the last of {packed.inputs} inputs')


def check_bitmask(packed: Bitmask) -> None:
    """Check a kernel that was read from a file.

    Args:
      packed: the kernel or a stack of them.

    Raises:
      PackingError: see `check_packed_mask`; also if the numbers of values and of set bits differ.
    """
    check_packed_mask(packed.mask)
    layers = packed.shape[:-2]
    counts = np.asarray(jnp.sum(unpack_mask(packed.mask), axis=(-2, -1), dtype=jnp.int32))
    if packed.values.shape != (*layers, int(counts.max(initial=0))):
        raise PackingError(f'values are {packed.values.shape}, the masks keep {counts.tolist()}')
