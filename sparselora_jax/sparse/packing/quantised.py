"""Dense kernels in four bits (qwix's `QArray`), for masks that no packed format stores in less."""

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import qwix
from jaxtyping import Array, Bool, Float

from sparselora_jax.sparse.packing.format import ShapeLike
from sparselora_jax.sparse.packing.four_bits import best_scale, nearest
from sparselora_jax.sparse.patterns import Pattern

FOUR_BITS = {'int4': jnp.int4, 'nf4': 'nf4'}  # kinds of levels, and qwix's types


@dataclass(frozen=True)
class FourBitFormat:
    """The format of dense kernels in four bits, including zeros: 4 1/8 bits per weight, for any mask.

    Its kernels do not store their masks. Separate packed masks take one bit per weight.

    Attributes:
      levels: `int4` or `nf4`, see `quantise`.
    """

    levels: str
    kernel_type: ClassVar[type] = qwix.QArray
    brings_mask: ClassVar[bool] = False

    def takes(self, pattern: Pattern) -> bool:
        """Return whether a pattern prunes anything."""
        return not pattern.dense

    def pack(
        self, kernel: Float[Array, '*layers inputs outputs'], mask: Bool[Array, '*layers inputs outputs']
    ) -> qwix.QArray:
        """Round a kernel by `quantise`, with zeros where the mask is False."""
        return quantise(jnp.where(mask, kernel, jnp.zeros((), kernel.dtype)), self.levels)

    def pack_shapes(self, kernel: ShapeLike, density: float) -> qwix.QArray:
        """Return the shapes of the rounded kernel."""
        del density  # zeros take as much space as other weights
        return jax.eval_shape(functools.partial(quantise, kind=self.levels), kernel)

    def inputs_per_scale(self, inputs: int) -> int:
        """Return how many inputs share a scale, see `tile`."""
        return tile(inputs)


def tile(inputs: int) -> int:
    """Return how many inputs share a scale: 128, or the largest power of two below it that divides the inputs.

    Args:
      inputs: number of inputs of the kernel.
    """
    return math.gcd(inputs, 128)


def quantise(kernel: Float[Array, '*layers inputs outputs'], kind: str) -> qwix.QArray:
    """Round a kernel to four bits, with a bf16 scale for 128 inputs of each output.

    The tried scale with the least squared error is used. Values that are on a grid already, such as those of `sl.GPTQ`,
    are stored exactly.

    Args:
      kernel: the kernel or a stack of them.
      kind: `int4`: evenly spaced levels; `nf4`: levels at quantiles of the normal distribution (QLoRA, section 3 of
        arXiv 2305.14314).

    >>> quantise(jnp.array([[7.0], [-3.2]]), 'int4').qvalue.tolist()
    [[7], [-3]]
    """
    if kernel.ndim == 2:
        return _quantise_matrix(kernel, kind)
    # One layer at a time, to save memory: NF4 compares each weight with 16 levels. Experts are a second axis of layers.
    return jax.lax.map(lambda layer: quantise(layer, kind), kernel)


@functools.partial(jax.jit, static_argnames='kind')
def _quantise_matrix(kernel: Float[Array, 'inputs outputs'], kind: str) -> qwix.QArray:
    blocks = kernel.astype(jnp.float32).reshape(-1, tile(kernel.shape[0]), kernel.shape[1])
    scale = best_scale(blocks, kind)
    codes = nearest(blocks, scale, kind).reshape(kernel.shape)
    # In qwix's representation: int4 as signed numbers, NF4 as the index of the level.
    codes = (codes - 8).astype(jnp.int4) if kind == 'int4' else codes.astype(jnp.uint4)
    return qwix.QArray(codes, scale, None, FOUR_BITS[kind])


def dequantise(kernel: qwix.QArray) -> Float[Array, '*layers inputs outputs']:
    """Return the kernel in float32.

    Args:
      kernel: the kernel or a stack of them.
    """
    return qwix.dequantize(kernel.astype(jnp.float32))
