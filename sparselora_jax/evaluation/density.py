"""What a finished model's kernels say about themselves: density, pattern, violations; no mask is believed."""

import jax.numpy as jnp
import numpy as np

from sparselora_jax.sparse import rules
from sparselora_jax.sparse.dense import dense_kernel
from sparselora_jax.sparse.masks import parse_pattern, violations


def _block_kernels(params: dict, tower: str) -> dict:
    found = rules.kernels(params).items()
    return {path: kernel for path, kernel in found if path.startswith(f'{tower}/') and '/blocks/' in path}


def block_count(params: dict) -> int:
    """How many blocks all towers have together."""
    stacks = {
        path.split('/blocks/')[0]: kernel.shape[0]
        for path, kernel in rules.kernels(params).items()
        if '/blocks/' in path
    }
    return sum(stacks.values())


def tower_sparsity(
    params: dict,
    tower: str,
    pattern: str | float,
    *,
    group: str = 'output',
    zeros: dict[str, np.ndarray] | None = None,
) -> dict:
    """Density of a tower's block kernels, counted, and the comparison groups without exactly the promised zeros.

    A kept weight that happens to be zero would count as a violation too: none is expected.

    Args:
      zeros: of each layer's kernel, by path, where they are not the pattern's (see `pruning.allocate`).
    """
    found, parsed = _block_kernels(params, tower), parse_pattern(pattern)
    kept = sum(int(jnp.count_nonzero(kernel)) for kernel in found.values())
    size = sum(kernel.size for kernel in found.values())
    wrong = 0
    for path, kernel in found.items() if not parsed.dense else ():
        wrong += int(violations(kernel != 0, parsed, group, (zeros or {}).get(path)).sum())
    return {'pattern': str(pattern), 'density': kept / size, 'violations': wrong}


def layer_density(params: dict, tower: str) -> dict[str, list[float]]:
    """{kernel path: density of each layer} of a tower's blocks."""
    found = _block_kernels(params, tower)
    return {path: (jnp.count_nonzero(k, axis=(1, 2)) / k[0].size).tolist() for path, k in found.items()}


def plain_lora_density(params: dict, masks: dict, lora: dict) -> float:
    """Density of the pruned kernels if `lora` were merged outside the mask, `W * M + s*A*B`, as plain LoRA does.

    Args:
      params: kernels may be packed or quantised.
    """
    flat, factors = rules.flatten(params), rules.flatten(lora)
    kept = size = 0
    for path, mask in rules.flatten(masks).items():
        kernel = jnp.where(mask, dense_kernel(flat[path], jnp.float32), 0.0)
        if path in factors:
            kernel = kernel + factors[path].scale * jnp.matmul(factors[path].a, factors[path].b)
        kept, size = kept + int(jnp.count_nonzero(kernel)), size + kernel.size
    return kept / size if size else 1.0
