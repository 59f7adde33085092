"""Any mask in one bit an element, alone or with the weights that it keeps."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Shaped, UInt32

from sparselora_jax.sparse.packing.errors import PackingError
from sparselora_jax.sparse.packing.stacks import kernel_shape, over_layers

WORD = 32
RUNS = 2  # of words, to be a loop
BIT = np.left_shift(np.uint32(1), np.arange(WORD, dtype=np.uint32))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedMask:
    """A mask `[*layers, inputs, outputs]` in bits.

    Attributes:
      bits: `uint8 [*layers, ceil(inputs / 8), outputs]`; bit j of a byte is input 8 * row + j.
    """

    bits: Any
    inputs: int = field(metadata={'static': True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the mask."""
        return kernel_shape(self.bits, self.inputs)

    @property
    def ndim(self) -> int:
        return self.bits.ndim


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Bitmask:
    """A kernel `[*layers, inputs, outputs]` as its mask and the weights that it keeps.

    Attributes:
      values: `[*layers, kept]`, in the order of the kernel's rows; layers that keep fewer are filled up with zeros.
      mask: a `PackedMask`.
    """

    values: Any
    mask: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the kernel."""
        return self.mask.shape

    @property
    def ndim(self) -> int:
        return self.mask.ndim

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    @property
    def dtype(self) -> Any:
        """Of the kernel."""
        return self.values.dtype


def pack_mask(mask: Bool[Array, '*layers inputs outputs']) -> PackedMask:
    """A mask in one bit an element.

    >>> packed = pack_mask(jnp.array([[True], [False], [True]]))
    >>> packed.bits.tolist(), unpack_mask(packed).tolist()
    ([[5]], [[True], [False], [True]])
    """
    return PackedMask(jnp.packbits(mask, axis=-2, bitorder='little'), mask.shape[-2])


def unpack_mask(packed: PackedMask) -> Bool[Array, '*layers inputs outputs']:
    """The mask, True where a weight is kept."""
    return jnp.unpackbits(packed.bits, axis=-2, count=packed.inputs, bitorder='little').astype(bool)


def pack_bitmask(
    kernel: Shaped[Array, '*layers inputs outputs'], mask: Bool[Array, '*layers inputs outputs'] | None = None
) -> Bitmask:
    """The kernel's values where the mask is True, and the mask. Lossless.

    Args:
      mask: which weights are kept; None: those that are not zero.
    """
    mask = kernel != 0 if mask is None else mask
    *layers, inputs, outputs = kernel.shape
    # On the host: how many values there are depends on the mask.
    kernels, masks = (np.asarray(array).reshape(-1, inputs * outputs) for array in (kernel, mask))
    values = np.zeros((len(kernels), int(masks.sum(axis=1).max())), kernels.dtype)
    for row, one, kept in zip(values, kernels, masks, strict=True):
        row[: kept.sum()] = one[kept]
    return Bitmask(jnp.asarray(values.reshape(*layers, -1)), pack_mask(jnp.asarray(mask)))


def unpack_bitmask(packed: Bitmask) -> Shaped[Array, '*layers inputs outputs']:
    """The kernel with its zeros."""
    return over_layers(_unpack_matrix, packed.ndim)(packed)


def _unpack_matrix(packed: Bitmask) -> Array:
    mask = unpack_mask(packed.mask)
    if not packed.values.size:  # nothing to take from
        return jnp.zeros(mask.shape, packed.dtype)
    bits = jnp.pad(mask.reshape(-1), (0, -mask.size % (RUNS * WORD))).reshape(RUNS, -1, WORD)
    words = jnp.sum(jnp.where(bits, BIT, jnp.uint32(0)), axis=2, dtype=jnp.uint32)
    _, places = jax.lax.scan(_places, jnp.zeros((), jnp.int32), words)
    values = packed.values.at[places.reshape(-1)[: mask.size].reshape(mask.shape)].get(mode='clip')
    return jnp.where(mask, values, jnp.zeros((), values.dtype))


def _places(start: Int[Array, ''], words: UInt32[Array, 'words']) -> tuple[Int[Array, ''], Int[Array, 'words 32']]:
    """How many weights are kept until behind these words, and before each of their bits: there its value stands.

    Those of all words before, by a sum over words (over weights it would take twice as long as all the rest), and those
    of lower bits of its own. A step of a loop, or XLA for CPUs would count within the gather of the values, bit by bit,
    in three times the time.
    """
    counts = jax.lax.population_count(words).astype(jnp.int32)
    until = start + jnp.cumsum(counts, dtype=jnp.int32)
    lower = jax.lax.population_count(words[:, None] & (BIT - 1)).astype(jnp.int32)
    return until[-1], (until - counts)[:, None] + lower


def check_bitmask(packed: Bitmask | PackedMask) -> None:
    """Checks what was read from a file.

    Raises:
      PackingError: shapes that do not belong together, more values than bits that are set, or bits behind the end.
    """
    mask = packed.mask if isinstance(packed, Bitmask) else packed
    *layers, rows, _outputs = mask.bits.shape
    if mask.bits.dtype != jnp.uint8 or rows != -(-mask.inputs // 8):
        raise PackingError(f'bits are {mask.bits.dtype} {mask.bits.shape}, expected uint8 for {mask.inputs} inputs')
    behind = mask.inputs % 8
    if behind and bool(jnp.any(mask.bits[..., -1, :] >> behind)):
        raise PackingError(f'bits are set behind the last of {mask.inputs} inputs')
    if isinstance(packed, Bitmask):
        kept = np.asarray(jnp.sum(unpack_mask(mask), axis=(-2, -1), dtype=jnp.int32))
        if packed.values.shape != (*layers, int(kept.max(initial=0))):
            raise PackingError(f'values are {packed.values.shape}, the masks keep {kept.tolist()}')
