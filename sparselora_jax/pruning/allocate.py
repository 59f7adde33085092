"""How many zeros each layer's kernel gets: a model's zeros shared out over its layers, as integers on the host.

Zeros are `{path: zeros of each layer's kernel}`, which `prune` and `prune_tree` take as `zeros`. Every allocation sums
exactly to what uniform pruning would make (`uniform_zeros`), so allocations can be compared. Only unstructured patterns
can be allocated: N:M says how many zeros there are.

`allocate` is the rule of ECoFLaP (arXiv 2310.02998): every block keeps what the highest sparsity leaves it. What else
may be kept goes to the blocks by their scores, whatever their tower; a block that is full takes no more.
"""

from collections.abc import Iterable, Mapping

import numpy as np
from jaxtyping import Float, PyTree

from sparselora_jax.pruning.allocation import Zeros
from sparselora_jax.pruning.targets import Methods, PatternRules, methods_of, pattern_zeros, patterns_of
from sparselora_jax.sparse.patterns import Pattern, PatternError
from sparselora_jax.sparse.rules import flatten, stack_of


def kernel_sizes(params: PyTree, paths: Iterable[str]) -> dict[str, int]:
    """Return the number of weights of one layer's kernel, for each path.

    Args:
      params: anything with the shapes of a params tree.
      paths: of kernels.
    """
    flat = flatten(params)
    return {path: int(np.prod(flat[path].shape[-2:])) for path in paths}


def uniform_zeros(params: PyTree, rules: PatternRules, *, method: Methods) -> Zeros:
    """Return the zeros of each layer's kernel as the patterns have them: their sum is the budget of every allocation.

    Args:
      params: anything with the shapes of a params tree.
      rules: see `prune_tree`.
      method: see `prune_tree`.

    Raises:
      PatternError: an N:M pattern, or nothing but dense kernels; or see `prune_tree`.
      RuleError: see `prune_tree`.
    """
    patterns = patterns_of(params, rules)
    for path, pattern in patterns.items():
        if pattern.structured:
            expected = 'expected an unstructured sparsity such as 0.5, or uniform allocation'
            raise PatternError(f'{path}: zeros cannot be allocated under the N:M pattern {pattern}: {expected}')
    # Uniform pruning of nothing is legal, so `patterns_of` does not refuse it; sharing nothing out is a mistake.
    if not patterns:
        raise PatternError('there are no zeros to allocate: the pattern of every kernel is dense')
    return pattern_zeros(flatten(params), patterns, methods_of(params, method))


def total(zeros: Zeros) -> int:
    """Return the zeros of all kernels and layers together."""
    return sum(int(np.sum(of_layers)) for of_layers in zeros.values())


def check_bound(zeros: Zeros, sizes: dict[str, int], highest: float) -> None:
    """Check that as many zeros fit under a highest sparsity, whatever the scores.

    Args:
      zeros: of each layer's kernel under uniform pruning.
      sizes: weights of one layer's kernel.
      highest: sparsity that no layer's kernel exceeds.

    Raises:
      PatternError: they do not, or `highest` does not lie in (0, 1].
    """
    bounds(sizes, {path: np.shape(of_layers) for path, of_layers in zeros.items()}, total(zeros), highest)


def bounds(sizes: dict[str, int], shapes: dict[str, tuple[int, ...]], budget: int, highest: float) -> Zeros:
    """Return the most zeros that each layer's kernel may have.

    Args:
      sizes: weights of one layer's kernel.
      shapes: of the result: `(layers,)`, or `()` for a kernel that is no stack.
      budget: zeros of the whole model.
      highest: sparsity that no layer's kernel exceeds.

    Raises:
      PatternError: see `check_bound`.
    """
    if not 0 < highest <= 1:
        raise PatternError(f'highest sparsity {highest}: expected a share in (0, 1]')
    # The same rounding as of any pattern: what a tower at sparsity `highest` has is within the bound.
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


def check_left(zeros: Zeros, sizes: dict[str, int]) -> None:
    """Check that every layer's kernel keeps a weight.

    Args:
      zeros: of each layer's kernel.
      sizes: weights of one layer's kernel.

    Raises:
      PatternError: names the first kernel and layer that would not.
    """
    for path, of_layers in zeros.items():
        empty = np.flatnonzero(np.atleast_1d(of_layers) >= sizes[path])
        if empty.size:
            expected = 'bound the sparsity of a layer, or ask for a lower one'
            raise PatternError(f'{path}, layer {empty[0]}: all {sizes[path]} weights would be pruned; {expected}')


def allocate(scores: Mapping[str, np.ndarray], sizes: dict[str, int], budget: int, *, highest: float) -> Zeros:
    """Return zeros of each layer's kernel, so that kept weights go where the scores are.

    All kernels of a layer of a tower are a group and share a ratio. A group of `size` weights keeps
    `min(size, (1 - highest) * size + c * score)`, with the one c that leaves `budget` zeros in the model; it is found
    in float64. The ratios of all groups become integers by largest remainders.

    Args:
      scores: importance of each layer's kernel, not negative; those of a group are added up.
      sizes: weights of one layer's kernel.
      budget: zeros of the whole model.
      highest: sparsity that no layer's kernel exceeds.

    Returns:
      {path: zeros}, of the shapes of `scores`; together exactly `budget`.

    Raises:
      PatternError: a score that is negative or not finite, scores of zero where weights are to be kept, a budget that
        does not fit under `highest`, or a kernel left without a weight.

    >>> allocate({'fc/kernel': np.array([1.0, 3.0])}, {'fc/kernel': 100}, 100, highest=0.8)['fc/kernel'].tolist()
    [65, 35]
    """
    for path, of_layers in scores.items():
        of_layers = np.atleast_1d(of_layers)
        odd = np.flatnonzero(~(np.isfinite(of_layers) & (of_layers >= 0)))
        if odd.size:
            value = of_layers[odd[0]]
            raise PatternError(f'{path}, layer {odd[0]}: importance {value}: expected a finite number of 0 or more')
    most = bounds(sizes, {path: np.shape(of_layers) for path, of_layers in scores.items()}, budget, highest)
    # {stack: of each layer}; a kernel outside of all blocks is a group of its own.
    group_scores = _sum_by_stack(scores)
    group_sizes = _sum_by_stack({path: np.full(most[path].shape, sizes[path]) for path in most})
    # One vector over the groups of all towers: they compete for one budget.
    flat_sizes = np.concatenate([group_sizes[group] for group in group_sizes])
    flat_scores = np.concatenate([group_scores[group] for group in group_sizes])
    # What a group keeps at the highest sparsity, whatever its score.
    lowest = (1 - highest) * flat_sizes
    kept = _fill(flat_scores, lowest, flat_sizes, flat_sizes.sum() - budget)
    # Back to {stack: sparsity of each layer}.
    ends = np.cumsum([len(of_layers) for of_layers in group_sizes.values()])[:-1]
    sparsity = dict(zip(group_sizes, np.split(1 - kept / flat_sizes, ends), strict=True))
    # Every kernel of a group gets the group's ratio, so these are no integers yet.
    wanted = {path: sparsity[stack_of(path)].reshape(most[path].shape) * sizes[path] for path in scores}
    zeros = round_zeros(wanted, budget, most)
    check_left(zeros, sizes)
    return zeros


def _sum_by_stack(values: Mapping[str, np.ndarray]) -> dict[str, Float[np.ndarray, ' layers']]:
    """Return {stack of blocks: sum over its kernels, of each layer}, in float64."""
    sums: dict[str, np.ndarray] = {}
    for path, of_layers in values.items():
        of_layers = np.atleast_1d(np.asarray(of_layers, np.float64))
        # All kernels of a layer lie in one stack; a kernel outside of blocks is its own.
        group = stack_of(path)
        sums[group] = sums[group] + of_layers if group in sums else of_layers
    return sums


def _fill(
    scores: Float[np.ndarray, ' groups'],
    lowest: Float[np.ndarray, ' groups'],
    sizes: Float[np.ndarray, ' groups'],
    kept: float,
) -> Float[np.ndarray, ' groups']:
    """Return `min(sizes, lowest + c * scores)` for the c that makes their sum `kept`.

    Args:
      scores: of each group.
      lowest: weights that each group keeps whatever its score.
      sizes: weights of each group.
      kept: weights that the whole model keeps.

    Raises:
      PatternError: groups with a score of 0 leave no room.
    """
    # The c at which each group is full; never, where its score is 0.
    full_at = np.full(len(scores), np.inf)
    np.divide(sizes - lowest, scores, out=full_at, where=scores > 0)

    def filled(c):
        return np.minimum(sizes, lowest + c * scores)

    # The sum is linear in c between two points at which groups are full, so c is solved for between two of them.
    points = np.unique(full_at[np.isfinite(full_at)])
    enough = next((point for point in points if filled(point).sum() >= kept), None)
    if enough is not None:
        rest = full_at >= enough
        c = (kept - sizes[~rest].sum() - lowest[rest].sum()) / scores[rest].sum()
        return filled(max(c, 0.0))
    most = filled(points[-1]) if points.size else lowest
    if kept - most.sum() > 0.5:  # less than a weight is rounding
        raise PatternError(
            f'{np.count_nonzero(scores == 0)} of {len(scores)} groups of kernels have importance 0, and the others '
            f'cannot hold the {round(kept)} weights to be kept: calibrate on more samples, or on other ones'
        )
    return most


def round_zeros(wanted: Mapping[str, np.ndarray], budget: int, most: Zeros) -> Zeros:
    """Return integers next to `wanted` that sum exactly to `budget`: the largest remainders get one more.

    Of equal remainders the earlier one does.

    Args:
      wanted: zeros of each layer's kernel, not integers; their sum is `budget` but for rounding.
      budget: zeros of the whole model.
      most: what none may exceed.

    Raises:
      PatternError: all together may not be as many.

    >>> round_zeros({'q': np.array([1.5, 2.5])}, 4, {'q': np.array([9, 9])})['q'].tolist()
    [2, 2]
    """
    # A kernel that is no stack has a number where others have a vector.
    real = np.concatenate([np.atleast_1d(of_layers) for of_layers in wanted.values()])
    caps = np.concatenate([np.atleast_1d(of_layers) for of_layers in most.values()]).astype(np.int64)
    zeros = np.clip(np.floor(real).astype(np.int64), 0, caps)
    # More than one round where those with the largest remainders are at their cap.
    while (missing := budget - int(zeros.sum())) > 0:
        below_cap = np.flatnonzero(zeros < caps)
        if not below_cap.size:
            raise PatternError(f'{budget} zeros are to be shared out, and no more than {zeros.sum()} may be')
        # A stable sort of the negated remainders: of equal ones the earlier comes first.
        chosen = below_cap[np.argsort(-(real - zeros)[below_cap], kind='stable')[:missing]]
        zeros[chosen] += 1
    ends = np.cumsum([np.size(of_layers) for of_layers in wanted.values()])[:-1]
    parts = np.split(zeros, ends)
    return {path: part.reshape(np.shape(wanted[path])) for path, part in zip(wanted, parts, strict=True)}
