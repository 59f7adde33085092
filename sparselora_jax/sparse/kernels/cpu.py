"""Products with a `Packed24` on a CPU, and workarounds for how XLA for CPUs compiles packed kernels.

For few rows, `x @ W` does not unpack W: each value is multiplied by the input that its position selects. A run of
inputs gives one row of partial sums. This is elementwise over outputs, so XLA compiles it to one vectorised pass over
the packed bytes. A matmul with ones then sums the rows of partial sums. (XLA would fuse a plain sum into the pass, and
read the packed bytes by columns.)
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num, UInt8

from sparselora_jax.sparse.kernels.reference import reference
from sparselora_jax.sparse.packing.packed24 import BYTE, SCALED, Packed24, as_bits, nibble

RUN = 2  # bytes of positions per partial sum: longer runs compile more slowly and run no faster
ROWS = 8  # with more rows than this, it is faster to unpack W once for all of them


def takes(dtype: DTypeLike, packed: Packed24) -> bool:
    """Return True, since `product` accepts every dtype and shape."""
    del dtype, packed
    return True


def product(x: Float[Array, 'rows m'], kernel: Packed24, *, transposed: bool) -> Float[Array, 'rows n']:
    """Return `x @ W` or `x @ W.T`, summed in fp32, in x's dtype.

    Args:
      x: the rows to multiply.
      kernel: W, one matrix.
      transposed: multiply with W.T.
    """
    if not transposed and x.shape[0] <= ROWS:
        return matmul(x, kernel)
    # In fp32, because XLA for CPUs widens both operands of other products to fp32, and would write W a second time.
    return reference(x.astype(jnp.float32), kernel, transposed=transposed).astype(x.dtype)


@jax.jit
def matmul(x: Float[Array, 'rows inputs'], kernel: Packed24) -> Float[Array, 'rows outputs']:
    """Return `x @ W` in x's dtype, summed in fp32, without unpacking W.

    Args:
      x: at most `ROWS` rows.
      kernel: W, one matrix.
    """
    rows = x.shape[0]
    octets, outputs = kernel.positions.shape
    runs = -(-octets // RUN)
    # All arrays are split into the same runs. Zeros pad the last run and add nothing.
    inputs = _pad_rows(x.astype(jnp.float32).T, runs * RUN * BYTE).T.reshape(rows, runs, RUN, BYTE, 1)
    positions = _pad_rows(kernel.positions, runs * RUN).reshape(runs, RUN, outputs)
    value_rows = kernel.values.shape[0] // octets  # per octet: 4, or 2 for int4, where two values share a byte
    values = _pad_rows(as_bits(kernel.values), runs * RUN * value_rows).reshape(runs, RUN, -1, outputs)
    sums = jnp.zeros((), jnp.float32)
    for octet in range(RUN):
        picked = _pick([inputs[:, :, octet, place] for place in range(BYTE)], positions[:, octet])
        weights = _octet_values(values[:, octet], kernel.scale is not None)
        for picked_input, weight in zip(picked, weights, strict=True):
            sums += picked_input * weight
    if kernel.scale is not None:
        # A scale covers whole runs, so it is applied once to their partial sums.
        sums *= jnp.repeat(kernel.scale.astype(jnp.float32), SCALED // (RUN * BYTE), axis=0)[:runs]
    return jnp.matmul(jnp.ones((rows, 1, runs), jnp.float32), sums)[:, 0].astype(x.dtype)


def unpack_after(packed: Packed24, x: Array) -> Packed24:
    """Return the kernel unchanged, but with a data dependency on `x`, so that XLA for CPUs cannot unpack it earlier.

    XLA for CPUs drops optimisation barriers before it orders operations. It would then unpack the kernels of all blocks
    at the same time, each into its own memory. Here the positions depend on an element of `x` through a comparison
    that is never true, since no number is above infinity. XLA does not know that, so it must wait for `x`.

    Args:
      packed: the kernel.
      x: the input of the kernel's block.
    """
    zero = (x.reshape(-1)[0] > jnp.inf).astype(packed.positions.dtype)
    return dataclasses.replace(packed, positions=packed.positions | zero)


def copy_out_of_stack(packed: Packed24, *, layer: Int[Array, '']) -> Packed24:
    """Copy the kernel of one layer, which a scan slices from a stack, to separate arrays.

    XLA for CPUs would fuse the slice into its consumer, and so read the kernel weight by weight through the stack.
    Unpacking would then take at least five times as long. XLA copies the result of a conditional. This one
    always takes the same branch, since a layer's index is never negative, but XLA cannot know that.

    Args:
      packed: the slice of a stack.
      layer: its index, a traced number.
    """
    return jax.lax.cond(layer < 0, lambda leaf: jax.tree.map(jnp.zeros_like, leaf), lambda leaf: leaf, packed)


def _pad_rows(array: Array, rows: int) -> Array:
    """Add rows of zeros at the end, up to `rows`."""
    return jnp.pad(array, ((0, rows - array.shape[0]), (0, 0)))


def _pick(inputs: list[Float[Array, 'rows runs 1']], octet: UInt8[Array, 'runs outputs']) -> list[Array]:
    """Select the four of eight inputs that positions name, as arrays `[rows, runs, outputs]`.

    Args:
      inputs: input 0, 1, ... and 7 of each octet.
      octet: the byte of positions of each octet, two groups of four inputs (see `Packed24`).
    """

    def bit(index):
        return octet & (1 << index) != 0

    picked = []
    for half in (0, 4):  # the bits of the first group, and of the second
        x0, x1, x2, x3 = inputs[half : half + 4]
        # The first value is before the second. So the first is never at place 3, the second never at place 0.
        picked.append(jnp.where(bit(half + 1), x2, jnp.where(bit(half), x1, x0)))
        picked.append(jnp.where(bit(half + 3), jnp.where(bit(half + 2), x3, x2), x1))
    return picked


def _octet_values(values: Num[Array, 'runs of outputs'], four_bits: bool) -> list[Float[Array, 'runs outputs']]:
    """Return the four values of eight inputs in fp32; int4 values without their scale."""
    if four_bits:
        words = values.astype(jnp.int32)
        return [nibble(words[:, group], high).astype(jnp.float32) for group in (0, 1) for high in (False, True)]
    return [_widen(values[:, index]) for index in range(4)]


def _widen(values: Num[Array, '*of']) -> Float[Array, '*of']:
    if values.dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(values.astype(jnp.uint32) << 16, jnp.float32)
    return values.astype(jnp.float32)
