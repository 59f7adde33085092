"""x @ W and g @ W.T of a `Packed24` on a CPU.

Few rows are multiplied without unpacking W: each value by the input that its position picks. A run of inputs becomes
one row of partial sums, elementwise over outputs, which XLA compiles to one vectorised pass over the packed bytes; a
product with ones adds the rows up. (A sum over them would be fused, and read by columns.)
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num, UInt8

from sparselora_jax.sparse.kernels.reference import reference
from sparselora_jax.sparse.packing.packed24 import BYTE, SCALED, Packed24, as_bits, nibble

RUN = 2  # bytes of positions in a partial sum: more of them compile longer and run no faster
ROWS = 8  # beyond, unpacking pays: it is done once for all rows


def product(x: Float[Array, 'rows m'], kernel: Packed24, *, transposed: bool) -> Float[Array, 'rows n']:
    """`x @ W` or `x @ W.T`, summed in fp32, in x's dtype."""
    if not transposed and x.shape[0] <= ROWS:
        return matmul(x, kernel)
    # In fp32, to which XLA for CPUs widens both sides of any other product: it would write W once more for that.
    return reference(x.astype(jnp.float32), kernel, transposed=transposed).astype(x.dtype)


@jax.jit
def matmul(x: Float[Array, 'rows inputs'], kernel: Packed24) -> Float[Array, 'rows outputs']:
    """`x @ W` in x's dtype, summed in fp32."""
    rows, (octets, outputs) = x.shape[0], kernel.positions.shape
    runs = -(-octets // RUN)
    inputs = _filled(x.astype(jnp.float32).T, runs * RUN * BYTE).T.reshape(rows, runs, RUN, BYTE, 1)
    positions = _filled(kernel.positions, runs * RUN).reshape(runs, RUN, outputs)
    values = _filled(as_bits(kernel.values), runs * RUN * kernel.values.shape[0] // octets).reshape(
        runs, RUN, -1, outputs
    )
    sums = jnp.zeros((), jnp.float32)
    for at in range(RUN):
        picked = _pick([inputs[:, :, at, place] for place in range(BYTE)], positions[:, at])
        for x_of, value in zip(picked, _octet(values[:, at], kernel.scale is not None), strict=True):
            sums += x_of * value
    if kernel.scale is not None:
        sums *= jnp.repeat(kernel.scale.astype(jnp.float32), SCALED // (RUN * BYTE), axis=0)[:runs]
    return jnp.matmul(jnp.ones((rows, 1, runs), jnp.float32), sums)[:, 0].astype(x.dtype)


def _filled(array: Array, rows: int) -> Array:
    """With zeros behind its rows."""
    return jnp.pad(array, ((0, rows - array.shape[0]), (0, 0)))


def _pick(inputs: list[Float[Array, 'rows runs 1']], octet: UInt8[Array, 'runs outputs']) -> list[Array]:
    """Of eight inputs the four that positions name, `[rows, runs, outputs]`."""

    def bit(index):
        return octet & (1 << index) != 0

    found = []
    for half in (0, 4):
        x0, x1, x2, x3 = inputs[half : half + 4]
        found.append(jnp.where(bit(half + 1), x2, jnp.where(bit(half), x1, x0)))  # the first of two is never at 3
        found.append(jnp.where(bit(half + 3), jnp.where(bit(half + 2), x3, x2), x1))  # the second never at 0
    return found


def _octet(values: Num[Array, 'runs of outputs'], four_bits: bool) -> list[Float[Array, 'runs outputs']]:
    """The four values of eight inputs; int4 ones not scaled."""
    if four_bits:
        words = values.astype(jnp.int32)
        return [nibble(words[:, group], high).astype(jnp.float32) for group in (0, 1) for high in (False, True)]
    return [_widen(values[:, index]) for index in range(4)]


def _widen(values: Num[Array, '*of']) -> Float[Array, '*of']:
    if values.dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(values.astype(jnp.uint32) << 16, jnp.float32)
    return values.astype(jnp.float32)
