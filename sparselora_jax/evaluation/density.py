"""Measure density, pattern and violations of a finished model from its kernels alone, never from stored masks."""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sparselora_jax.sparse import rules
from sparselora_jax.sparse.dense import dense_kernel
from sparselora_jax.sparse.masks import violations
from sparselora_jax.sparse.patterns import parse_pattern
from sparselora_jax.sparse.weights import effective_weight


@runtime_checkable
class Stack(Protocol):
    """A stack of kernels: an array, or an object that reads a layer from disk when it is indexed."""

    shape: tuple[int, ...]

    def __getitem__(self, layer: int) -> Array:
        """Return the kernel of a layer."""


def _block_kernels(params: dict, tower: str) -> dict[str, Stack]:
    """Return the kernels of a tower's blocks by path, stacked: `[layers, in, out]`."""
    kernels = rules.kernels(params)
    return {
        path: kernel for path, kernel in kernels.items() if path.startswith(f'{tower}/') and rules.is_in_block(path)
    }


def block_count(params: dict) -> int:
    """Return the number of blocks of all towers together.

    Args:
      params: the whole params tree.
    """
    # All kernels of one stack of blocks have the same leading axis, the layers.
    layers_of_stack = {
        rules.stack_of(path): kernel.shape[0]
        for path, kernel in rules.kernels(params).items()
        if rules.is_in_block(path)
    }
    return sum(layers_of_stack.values())


def tower_sparsity(
    params: dict,
    tower: str,
    pattern: str | float,
    *,
    group: str = 'output',
    zeros: Mapping[str, np.ndarray] | None = None,
) -> dict:
    """Measure the density of a tower's block kernels, and count the comparison groups with a wrong number of zeros.

    A kept weight that happens to be zero would also count as a violation; trained weights have no such zeros.

    Args:
      params: plain kernels, with zeros in place, or stacks of kernels that are read a layer at a time.
      tower: name of the tower.
      pattern: pattern to which the tower was pruned.
      group: comparison group of an unstructured pattern (see `sparse.masks`).
      zeros: number of zeros of each layer's kernel, by path, where they differ from the pattern's (see
        `pruning.allocate`).

    Returns:
      `pattern` as text, `weights` (number of weights), `density` (share of weights that are not zero) and `violations`
      (number of groups).
    """
    parsed = parse_pattern(pattern)
    # Counted in Python integers: a tower may have more weights than int32 counts.
    weights = 0
    nonzero = 0
    wrong_groups = 0
    for path, kernel in _block_kernels(params, tower).items():
        zeros_of_layers = (zeros or {}).get(path)
        # One layer at a time, since all layers of a stack on disk may not fit into memory.
        for layer in range(kernel.shape[0]):
            is_kept = jnp.asarray(kernel[layer]) != 0
            weights += is_kept.size
            nonzero += int(jnp.count_nonzero(is_kept))
            if not parsed.dense:  # a dense tower promises no zeros
                promised = None if zeros_of_layers is None else np.asarray(zeros_of_layers[layer])
                wrong_groups += int(violations(is_kept, parsed, group, promised))
    return {'pattern': str(pattern), 'weights': weights, 'density': nonzero / weights, 'violations': wrong_groups}


def layer_density(params: dict, tower: str) -> dict[str, list[float]]:
    """Return the density of each layer of a tower's block kernels, by path.

    Args:
      params: plain kernels, with zeros in place.
      tower: name of the tower.
    """
    densities = {}
    for path, kernel in _block_kernels(params, tower).items():
        nonzero_of_layers = jnp.count_nonzero(kernel, axis=(1, 2))  # [layers, in, out] -> [layers]
        densities[path] = (nonzero_of_layers / kernel[0].size).tolist()
    return densities


def plain_lora_density(params: dict, masks: dict, lora: dict) -> float:
    """Return the density of the pruned kernels if `lora` were merged without the mask, `W * M + s*A*B`.

    Plain LoRA merges this way, and the product fills the zeros.

    Args:
      params: base weights; kernels may be packed or quantised.
      masks: the pruning masks.
      lora: factors, of some or all pruned kernels.

    Returns:
      The share of weights that are not zero; 1 if nothing is pruned.
    """
    kernels = rules.flatten(params)
    factors = rules.flatten(lora)
    nonzero = 0
    size = 0
    for path, mask in rules.flatten(masks).items():
        # In fp32, so that a small product of the factors is not lost when it is added to a weight.
        kernel = jnp.where(mask, dense_kernel(kernels[path], jnp.float32), 0.0)
        if path in factors:  # the other pruned kernels keep the density of their masks
            kernel = effective_weight(kernel, None, factors[path])
        nonzero += int(jnp.count_nonzero(kernel))
        size += kernel.size
    return nonzero / size if size else 1.0
