"""OWL (arXiv 2310.05175): a block with more outliers among its Wanda scores keeps more weights.

A block's outlier share D is the share of its scores `|W_ij| * ||x_i||_2` above M times their mean (the paper's
layerwise outlier distribution). The ratios are those of the public code: shares are stretched to a range of 2 lambda,
and shifted so that the mean ratio stays: `kept = (1 - s) + d - mean d`, `d = 2 lambda (D - min D) / (max D - min D)`.
The source's model has blocks of one size and one sparsity s; here the mean weighs a block by its weights, and s is the
kernel's own.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sparselora_jax.pruning import calibrate
from sparselora_jax.pruning.allocate import block_of, check_left, round_zeros, total
from sparselora_jax.pruning.targets import in_blocks
from sparselora_jax.pruning.walk import block_observer, joined, walk
from sparselora_jax.sparse import rules as rules_lib
from sparselora_jax.sparse import sharding
from sparselora_jax.sparse.masks import PatternError


@jax.jit
def _outliers(kernels: list[Array], squares: list[Array], threshold: Array) -> Array:
    """Scores of each kernel above `threshold` times the mean of all of them."""
    scores = [
        jnp.abs(w.astype(jnp.float32)) * jnp.sqrt(sums)[:, None] for w, sums in zip(kernels, squares, strict=True)
    ]
    mean = sum(jnp.sum(s) for s in scores) / sum(s.size for s in scores)
    return jnp.stack([jnp.sum(s > threshold * mean, dtype=jnp.int32) for s in scores])


def outlier_shares(
    forward: Callable[..., Any],
    params: dict,
    batches: Iterable[dict],
    paths: Iterable[str],
    *,
    threshold: float = 5.0,
    chunk: int = 8,
    progress: Callable[[str, int, int], None] = lambda tower, layer, layers: None,
) -> dict[str, np.ndarray]:
    """The share of outliers in each block of the dense model.

    Memory holds the samples' hidden states and one block with its statistics, as in `prune`: leaves may be weights on
    disk.

    Args:
      forward, params, batches, chunk, progress: see `prune`.
      paths: of the kernels to be pruned; they alone are looked at.
      threshold: the paper's M: how many times the block's mean an outlier exceeds.

    Returns:
      {stack of blocks (see `block_of`): share of each layer}.

    Raises:
      CalibrationError: no batch, or non-finite activations. RuleError: a kernel outside of all blocks.
    """
    samples, paths, shares = joined(batches, chunk), set(paths), {}
    mesh = sharding.mesh_of_rows(samples)

    def enter(tower, block):
        names = sorted(in_blocks(paths, tower))
        observe = block_observer(block, dict.fromkeys(names, calibrate.squares).get, mesh)

        def visit(layer, layers, w, chunks):
            progress(tower, layer, layers)
            if names:
                stats = observe(rules_lib.unflatten(w), chunks)
                counts = _outliers([w[name] for name in names], [stats[name][0] for name in names], threshold)
                size = sum(w[name].size for name in names)
                shares.setdefault(tower, []).append(int(np.asarray(counts).sum(dtype=np.int64)) / size)
            return w

        return visit

    walk(forward, params, samples, enter, chunk=chunk)
    if missed := sorted(path for path in paths if block_of(path) not in shares):
        raise rules_lib.RuleError(f'{missed[0]}: not inside the blocks of a tower that the forward runs; make it dense')
    return {tower: np.array(of_layers) for tower, of_layers in shares.items()}


def owl_zeros(
    shares: dict[str, np.ndarray],
    uniform: dict[str, np.ndarray],
    sizes: dict[str, int],
    *,
    spread: float = 0.08,
) -> dict[str, np.ndarray]:
    """Zeros of each layer's kernel: the ratios of uniform pruning, moved by each block's outlier share.

    Args:
      shares: see `outlier_shares`.
      uniform: what uniform pruning would make (see `uniform_zeros`); its sum is kept.
      sizes: weights of one layer's kernel.
      spread: the paper's lambda: ratios differ by 2 lambda at most where the patterns agree.

    Raises:
      PatternError: a ratio outside [0, 1], or a layer's kernel left without a weight.

    >>> uniform = {'language/blocks/q/kernel': np.array([50, 50])}
    >>> shares = {'language': np.array([0.01, 0.03])}
    >>> owl_zeros(shares, uniform, {'language/blocks/q/kernel': 100})['language/blocks/q/kernel'].tolist()
    [58, 42]
    """
    every = np.concatenate(list(shares.values()))
    width = every.max() - every.min()
    moved = {block: 2 * spread * (d - every.min()) / width if width else 0 * d for block, d in shares.items()}
    weights = sum(sizes[path] * zeros.size for path, zeros in uniform.items())
    mean = sum(sizes[path] * moved[block_of(path)].sum() for path in uniform) / weights
    wanted = {path: zeros - sizes[path] * (moved[block_of(path)] - mean) for path, zeros in uniform.items()}
    for path, of_layers in wanted.items():
        odd = np.flatnonzero((of_layers < 0) | (of_layers > sizes[path]))
        if odd.size:
            ratio = of_layers[odd[0]] / sizes[path]
            raise PatternError(
                f"{path}, layer {odd[0]}: OWL's sparsity would be {ratio:.3f}; ask for a smaller spread than {spread}"
            )
    most = {path: np.full(zeros.shape, sizes[path]) for path, zeros in uniform.items()}
    zeros = round_zeros(wanted, total(uniform), most)
    check_left(zeros, sizes)
    return zeros
