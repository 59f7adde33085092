"""Global magnitude pruning (e.g. arXiv 1506.02626): one threshold on `|W|` for all kernels of a model.

It is an allocation. With `Magnitude(group='matrix')` it prunes exactly the smallest weights of the whole model. With
another method only the sparsity of each layer is that of global magnitude pruning.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from sparselora_jax.pruning.allocate import bounds, check_bound, check_left, kernel_sizes, total
from sparselora_jax.pruning.allocation import Allocation, AllocationInputs, Zeros, check_highest
from sparselora_jax.sparse.masks import ordered_bits
from sparselora_jax.sparse.rules import flatten

DIGIT = 16  # bits of the threshold that one pass over the model determines


@functools.partial(jax.jit, static_argnames=('digit', 'dtype'))
def _histogram(
    kernel: Float[Array, 'inputs outputs'], settled: Shaped[Array, ''], *, digit: int, dtype: str
) -> Int[Array, ' values']:
    """Count the weights of a kernel by the value of one digit, `DIGIT` bits, of `|W|`.

    Args:
      kernel: kernel of one layer.
      settled: the threshold's digits before this one; weights with other leading digits are not counted.
      digit: index of the digit; 0 is the most significant.
      dtype: dtype in which weights are compared.
    """
    bits = ordered_bits(jnp.abs(kernel.astype(dtype)))
    # Position of the digit's lowest bit. The bits, as integers, are in the same order as the weights.
    last = bits.dtype.itemsize * 8 - DIGIT * (digit + 1)
    values = (bits >> last) & (2**DIGIT - 1)
    if digit:
        # An index out of range, which the scatter below drops.
        values = jnp.where(bits >> (last + DIGIT) == settled, values, 2**DIGIT)
    counts = jnp.zeros(2**DIGIT, jnp.int32)
    return counts.at[values.astype(jnp.int32).reshape(-1)].add(1, mode='drop')


def global_magnitude_zeros(params: dict, uniform: Zeros, *, highest: float = 1.0) -> Zeros:
    """Return how many weights of each layer's kernel are among the smallest `|W|` of the whole model.

    The threshold is found 16 bits at a time by counting. Each pass reads one layer of one kernel at a time, and there
    are two passes (four in fp64). Weights are never sorted or concatenated, so leaves may be weights on disk
    (`checkpoints.on_disk`).

    Args:
      params: the dense weights.
      uniform: zeros under uniform pruning (see `uniform_zeros`). Its kernels are compared, and its sum is the budget.
      highest: sparsity that no layer's kernel exceeds. Without this limit, a tower of small weights would be pruned
        entirely. Zeros above the limit go to the smallest weights of the other layers.

    Returns:
      {path: zeros}. Of equal weights those of the earlier path (by name), layer and position are pruned first.

    Raises:
      PatternError: a layer's kernel would keep no weight, or the budget does not fit under `highest`.
    """
    flat = flatten(params)
    sizes = kernel_sizes(params, uniform)
    budget = total(uniform)
    dtype = 'float64' if any(flat[path].dtype.itemsize == 8 for path in uniform) else 'float32'
    word = np.dtype(dtype.replace('float', 'uint')).type
    most_by_path = bounds(sizes, {path: np.shape(of_layers) for path, of_layers in uniform.items()}, budget, highest)
    most = np.concatenate([np.atleast_1d(of_layers) for of_layers in most_by_path.values()])
    # The digits of the threshold found so far, and the number of each layer's weights below it.
    threshold = word(0)
    below = np.zeros(len(most), np.int64)
    for digit in range(np.dtype(dtype).itemsize * 8 // DIGIT):
        counts = [np.asarray(_histogram(w, threshold, digit=digit, dtype=dtype)) for w in _layers(flat, uniform)]
        # For each value of the digit: how many weights of the model are pruned if the threshold has it.
        pruned = sum(
            np.minimum(under + np.cumsum(of_layer, dtype=np.int64), bound)
            for under, of_layer, bound in zip(below, counts, most, strict=True)
        )
        value = int(np.searchsorted(pruned, budget))  # of the last weight that is pruned
        below += [of_layer[:value].sum(dtype=np.int64) for of_layer in counts]
        threshold = word((int(threshold) << DIGIT) | value)
        equal = np.array([of_layer[value] for of_layer in counts])
    smaller = np.minimum(below, most)
    # The zeros still missing are weights equal to the threshold, those of earlier layers first.
    room = np.minimum(below + equal, most) - smaller
    flat_zeros = smaller + np.clip(budget - smaller.sum() - (np.cumsum(room) - room), 0, room)
    ends = np.cumsum([np.size(of_layers) for of_layers in uniform.values()])[:-1]
    parts = np.split(flat_zeros, ends)
    zeros = {
        path: part.reshape(np.shape(of_layers)) for (path, of_layers), part in zip(uniform.items(), parts, strict=True)
    }
    check_left(zeros, sizes)
    return zeros


def _layers(flat: Mapping[str, Any], paths: Iterable[str]) -> Iterator[Array]:
    """Yield each layer's kernel, one at a time."""
    for path in paths:
        leaf = flat[path]
        if leaf.ndim == 3:
            yield from (leaf[layer] for layer in range(leaf.shape[0]))
        else:
            yield leaf


@dataclass(frozen=True)
class GlobalMagnitude(Allocation):
    """Prune the smallest weights of the whole model.

    Attributes:
      highest: sparsity that no layer's kernel exceeds.
    """

    highest: float = 1.0
    needs_model_in_memory: ClassVar[bool] = False

    def __post_init__(self):
        check_highest(self.highest)

    def check(self, uniform: Zeros, sizes: dict[str, int]) -> None:
        """Check that the budget fits under `highest`.

        Args:
          uniform: see `AllocationInputs`.
          sizes: see `AllocationInputs`.

        Raises:
          PatternError: it does not.
        """
        check_bound(uniform, sizes, self.highest)

    def __call__(self, inputs: AllocationInputs) -> Zeros:
        """Return the zeros of each layer's kernel under one threshold for all.

        Args:
          inputs: see `Allocation`.

        Raises:
          PatternError: see `global_magnitude_zeros`.
        """
        return global_magnitude_zeros(inputs.params, inputs.uniform, highest=self.highest)
