"""Global magnitude pruning (e.g. arXiv 1506.02626): one threshold on |W| for all kernels of a model together.

It is an allocation: with `Magnitude(group='matrix')` its zeros are exactly the smallest weights of the whole model;
with another method only the ratios of the layers are those of global magnitude.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparselora_jax.pruning.allocate import bounds, check_left, kernel_sizes, total
from sparselora_jax.sparse import rules as rules_lib
from sparselora_jax.sparse.masks import ordered_bits

DIGIT = 16  # bits of a weight that one pass over the model settles


@functools.partial(jax.jit, static_argnames=('digit', 'dtype'))
def _histogram(
    kernel: Float[Array, 'inputs outputs'], found: Array, *, digit: int, dtype: str
) -> Int[Array, ' values']:
    """How many weights have each value of a digit of |W|'s bits, of those whose digits before it are `found`."""
    bits = ordered_bits(jnp.abs(kernel.astype(dtype)))
    last = bits.dtype.itemsize * 8 - DIGIT * (digit + 1)
    values = (bits >> last) & (2**DIGIT - 1)
    if digit:
        values = jnp.where(bits >> (last + DIGIT) == found, values, 2**DIGIT)
    counts = jnp.zeros(2**DIGIT, jnp.int32)
    return counts.at[values.astype(jnp.int32).reshape(-1)].add(1, mode='drop')


def global_magnitude_zeros(
    params: dict, uniform: dict[str, np.ndarray], *, highest: float = 1.0
) -> dict[str, np.ndarray]:
    """Zeros of each layer's kernel: its weights among the smallest |W| of all kernels together.

    The threshold is found 16 bits at a time, from counts: weights are read a layer of a kernel at a time, twice (four
    times in fp64), and never sorted or put together. So leaves may be weights on disk (`models.on_disk`).

    Args:
      uniform: what uniform pruning would make (see `uniform_zeros`): its kernels are compared, its sum is the budget.
      highest: sparsity that no layer's kernel exceeds; towers of small weights would be pruned away whole. What is over
        it goes to the smallest weights of the other layers.

    Returns:
      {path: zeros}. Of equal weights those of the earlier path (by name), layer and position are pruned first.

    Raises:
      PatternError: a layer's kernel would keep no weight, or the budget does not fit under `highest`.
    """
    flat, sizes, budget = rules_lib.flatten(params), kernel_sizes(params, uniform), total(uniform)
    dtype = 'float64' if any(flat[path].dtype.itemsize == 8 for path in uniform) else 'float32'
    word = np.dtype(dtype.replace('float', 'uint')).type
    most = bounds(sizes, {path: np.shape(of_layers) for path, of_layers in uniform.items()}, budget, highest)
    most = np.concatenate([np.atleast_1d(of_layers) for of_layers in most.values()])
    found, below = word(0), np.zeros(len(most), np.int64)  # weights of each layer under what is found of the threshold
    for digit in range(np.dtype(dtype).itemsize * 8 // DIGIT):
        counts = [np.asarray(_histogram(w, found, digit=digit, dtype=dtype)) for w in _kernels(flat, uniform)]
        pruned = sum(
            np.minimum(under + np.cumsum(of_layer, dtype=np.int64), bound)
            for under, of_layer, bound in zip(below, counts, most, strict=True)
        )
        value = int(np.searchsorted(pruned, budget))  # of the last weight that is pruned
        below += [of_layer[:value].sum(dtype=np.int64) for of_layer in counts]
        found, equal = word((int(found) << DIGIT) | value), np.array([of_layer[value] for of_layer in counts])
    smaller = np.minimum(below, most)
    room = np.minimum(below + equal, most) - smaller
    flat_zeros = smaller + np.clip(budget - smaller.sum() - (np.cumsum(room) - room), 0, room)
    ends = np.cumsum([np.size(of_layers) for of_layers in uniform.values()])[:-1]
    parts = zip(uniform.items(), np.split(flat_zeros, ends), strict=True)
    zeros = {path: part.reshape(np.shape(of_layers)) for (path, of_layers), part in parts}
    check_left(zeros, sizes)
    return zeros


def _kernels(flat: dict, paths: dict):
    """Each layer's kernel, one at a time."""
    for path in paths:
        leaf = flat[path]
        yield from (leaf[layer] for layer in range(leaf.shape[0])) if leaf.ndim == 3 else (leaf,)
