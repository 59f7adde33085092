"""How many zeros each layer's kernel gets: a model's zeros shared out over its layers, as integers on the host.

An allocation is `{path: zeros of each layer's kernel}`, which `prune` and `prune_tree` take as `zeros`. Each of them
sums exactly to what uniform pruning would make (`uniform_zeros`), so allocations can be compared. Only unstructured
patterns can be allocated: N:M says how many zeros there are.

`allocate` is the rule of ECoFLaP (arXiv 2310.02998): every block keeps what the highest sparsity leaves it, and what
else may be kept goes to the blocks by their scores, whatever their tower; a block that is full takes no more.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from sparselora_jax.pruning.targets import methods_of, pattern_zeros, patterns_of
from sparselora_jax.sparse import rules as rules_lib
from sparselora_jax.sparse.masks import Pattern, PatternError

GRANULARITIES = ('block', 'kernel')


def kernel_sizes(params: dict, paths: Iterable[str]) -> dict[str, int]:
    """Weights of one layer's kernel, for each path."""
    flat = rules_lib.flatten(params)
    return {path: int(np.prod(flat[path].shape[-2:])) for path in paths}


def uniform_zeros(params: dict, rules: Sequence[tuple[str, Any]], *, method: Any) -> dict[str, np.ndarray]:
    """Zeros of each layer's kernel as the patterns have them: their sum is the budget of every allocation.

    Args:
      params: anything with the shapes of a params tree.
      rules, method: see `prune_tree`.

    Raises:
      PatternError: an N:M pattern, or nothing but dense kernels. PatternError, RuleError: see `prune_tree`.
    """
    patterns = patterns_of(params, rules)
    for path, pattern in patterns.items():
        if pattern.structured:
            expected = 'expected an unstructured sparsity such as 0.5, or uniform allocation'
            raise PatternError(f'{path}: zeros cannot be allocated under the N:M pattern {pattern}: {expected}')
    if not patterns:
        raise PatternError('there are no zeros to allocate: the pattern of every kernel is dense')
    return pattern_zeros(rules_lib.flatten(params), patterns, methods_of(params, method))


def total(zeros: dict[str, np.ndarray]) -> int:
    """Zeros of all kernels and layers together."""
    return sum(int(np.sum(of_layers)) for of_layers in zeros.values())


def block_of(path: str) -> str:
    """What a layer's kernels have in common: the path of their stack of blocks; a kernel outside of one is its own."""
    return path.split('/blocks/')[0] if '/blocks/' in path else path


def check_bound(zeros: dict[str, np.ndarray], sizes: dict[str, int], highest: float) -> None:
    """Checks that as many zeros fit under a highest sparsity, whatever the scores.

    Args:
      zeros: of each layer's kernel under uniform pruning.

    Raises:
      PatternError: they do not, or `highest` does not lie in (0, 1].
    """
    bounds(sizes, {path: np.shape(of_layers) for path, of_layers in zeros.items()}, total(zeros), highest)


def bounds(sizes: dict[str, int], shapes: dict[str, tuple], budget: int, highest: float) -> dict[str, np.ndarray]:
    """The most zeros that each layer's kernel may have; raises as `check_bound` does."""
    if not 0 < highest <= 1:
        raise PatternError(f'highest sparsity {highest}: expected a share in (0, 1]')
    bound = Pattern(sparsity=highest)
    most = {path: np.full(shape, bound.zeros(sizes[path])) for path, shape in shapes.items()}
    if budget > total(most):
        weights = sum(sizes[path] * int(np.prod(shape)) for path, shape in shapes.items())
        share = f'{budget} of {weights} weights ({budget / weights:.4f})'
        raise PatternError(
            f'{share} are to be pruned, and a highest sparsity of {highest} allows {total(most)}: '
            'raise it, or ask for a lower sparsity'
        )
    return most


def check_left(zeros: dict[str, np.ndarray], sizes: dict[str, int]) -> None:
    """Raises `PatternError` where a layer's kernel would keep no weight."""
    for path, of_layers in zeros.items():
        empty = np.flatnonzero(np.atleast_1d(of_layers) >= sizes[path])
        if empty.size:
            expected = 'bound the sparsity of a layer, or ask for a lower one'
            raise PatternError(f'{path}, layer {empty[0]}: all {sizes[path]} weights would be pruned; {expected}')


def allocate(
    scores: dict[str, np.ndarray],
    sizes: dict[str, int],
    budget: int,
    *,
    highest: float,
    granularity: str = 'block',
) -> dict[str, np.ndarray]:
    """Zeros of each layer's kernel: kept weights go where the scores are.

    A group of `size` weights keeps `min(size, (1 - highest) * size + c * score)`, with the one c that leaves `budget`
    zeros in the model; it is found in float64. The ratios of all groups become integers by largest remainders.

    Args:
      scores: importance of each layer's kernel, not negative; those of a group are added up.
      sizes: weights of one layer's kernel.
      budget: zeros of the whole model.
      highest: sparsity that no layer's kernel exceeds.
      granularity: `'block'`: all kernels of a layer of a tower share a ratio; `'kernel'`: each has its own.

    Returns:
      {path: zeros}, of the shapes of `scores`; together exactly `budget`.

    Raises:
      PatternError: a score that is negative or not finite, scores of zero where weights are to be kept, a budget that
        does not fit under `highest`, or a kernel left without a weight.

    >>> allocate({'fc/kernel': np.array([1.0, 3.0])}, {'fc/kernel': 100}, 100, highest=0.8)['fc/kernel'].tolist()
    [65, 35]
    """
    if granularity not in GRANULARITIES:
        raise PatternError(f'granularity {granularity!r}: expected one of {", ".join(GRANULARITIES)}')
    for path, of_layers in scores.items():
        odd = np.flatnonzero(~(np.isfinite(np.atleast_1d(of_layers)) & (np.atleast_1d(of_layers) >= 0)))
        if odd.size:
            found = np.atleast_1d(of_layers)[odd[0]]
            raise PatternError(f'{path}, layer {odd[0]}: importance {found}: expected a finite number of 0 or more')
    most = bounds(sizes, {path: np.shape(of_layers) for path, of_layers in scores.items()}, budget, highest)
    groups = {path: block_of(path) if granularity == 'block' else path for path in scores}
    summed, weights = (
        _sums(scores, groups),
        _sums({path: np.full(most[path].shape, sizes[path]) for path in most}, groups),
    )
    flat_sizes = np.concatenate([weights[group] for group in weights])
    lowest = (1 - highest) * flat_sizes
    kept = _fill(np.concatenate([summed[group] for group in weights]), lowest, flat_sizes, flat_sizes.sum() - budget)
    ends = np.cumsum([len(of_layers) for of_layers in weights.values()])[:-1]
    sparsity = dict(zip(weights, np.split(1 - kept / flat_sizes, ends), strict=True))
    wanted = {path: sparsity[groups[path]].reshape(most[path].shape) * sizes[path] for path in scores}
    zeros = round_zeros(wanted, budget, most)
    check_left(zeros, sizes)
    return zeros


def _sums(values: dict[str, np.ndarray], groups: dict[str, str]) -> dict[str, np.ndarray]:
    """{group: sum over its kernels, of each layer}, in float64."""
    found: dict[str, np.ndarray] = {}
    for path, of_layers in values.items():
        of_layers = np.atleast_1d(np.asarray(of_layers, np.float64))
        found[groups[path]] = found[groups[path]] + of_layers if groups[path] in found else of_layers
    return found


def _fill(scores: np.ndarray, lowest: np.ndarray, sizes: np.ndarray, kept: float) -> np.ndarray:
    """`min(sizes, lowest + c * scores)` for the c that makes their sum `kept`."""
    full_at = np.full(len(scores), np.inf)
    np.divide(sizes - lowest, scores, out=full_at, where=scores > 0)

    def filled(c):
        return np.minimum(sizes, lowest + c * scores)

    # Their sum is linear in c between two points at which groups are full.
    points = np.unique(full_at[np.isfinite(full_at)])
    found = next((point for point in points if filled(point).sum() >= kept), None)
    if found is not None:
        rest = full_at >= found
        c = (kept - sizes[~rest].sum() - lowest[rest].sum()) / scores[rest].sum()
        return filled(max(c, 0.0))
    most = filled(points[-1]) if points.size else lowest
    if kept - most.sum() > 0.5:
        raise PatternError(
            f'{np.count_nonzero(scores == 0)} of {len(scores)} groups of kernels have importance 0, and the others '
            f'cannot hold the {round(kept)} weights to be kept: calibrate on more samples, or on other ones'
        )
    return most


def round_zeros(wanted: dict[str, np.ndarray], budget: int, most: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Integers next to `wanted` that sum exactly to `budget`: the largest remainders get one more, the earlier first.

    Args:
      wanted: zeros of each layer's kernel, not integers; their sum is `budget` but for rounding.
      most: what none may exceed.

    Raises:
      PatternError: all together may not be as many.

    >>> round_zeros({'q': np.array([1.5, 2.5])}, 4, {'q': np.array([9, 9])})['q'].tolist()
    [2, 2]
    """
    real = np.concatenate([np.atleast_1d(of_layers) for of_layers in wanted.values()])
    caps = np.concatenate([np.atleast_1d(of_layers) for of_layers in most.values()]).astype(np.int64)
    zeros = np.clip(np.floor(real).astype(np.int64), 0, caps)
    while (missing := budget - int(zeros.sum())) > 0:
        open_ = np.flatnonzero(zeros < caps)
        if not open_.size:
            raise PatternError(f'{budget} zeros are to be shared out, and no more than {zeros.sum()} may be')
        chosen = open_[np.argsort(-(real - zeros)[open_], kind='stable')[:missing]]
        zeros[chosen] += 1
    ends = np.cumsum([np.size(of_layers) for of_layers in wanted.values()])[:-1]
    parts = np.split(zeros, ends)
    return {path: part.reshape(np.shape(wanted[path])) for path, part in zip(wanted, parts, strict=True)}
