"""Distribute a model's zeros over its layers: an integer number of zeros for each layer's kernel, on the host.

The result is `{path: zeros of each layer's kernel}`, the argument `zeros` of `prune` and `prune_tree`. Every allocation
has exactly as many zeros as uniform pruning (`uniform_zeros`), so allocations can be compared. Only unstructured
patterns can be allocated: an N:M pattern fixes the number of zeros.

`allocate` follows ECoFLaP (arXiv 2310.02998). Every block keeps at least the weights that the highest allowed sparsity
leaves. The other kept weights go to the blocks of all towers in proportion to their scores. A block that already keeps
all its weights gets no more.
"""

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np
from jaxtyping import Float, Int, PyTree

from sparselora_jax.pruning.allocation import Allocation, AllocationError, AllocationInputs, Zeros
from sparselora_jax.pruning.targets import Methods, PatternRules, methods_of, pattern_zeros, patterns_of
from sparselora_jax.runtime.errors import calling
from sparselora_jax.sparse.patterns import Pattern, PatternError
from sparselora_jax.sparse.rules import flatten, stack_of


def kernel_sizes(params: PyTree, paths: Iterable[str]) -> dict[str, int]:
    """Return the number of weights of one layer's kernel, for each path.

    Args:
      params: anything with the shapes of a params tree.
      paths: paths of the kernels.
    """
    flat = flatten(params)
    return {path: int(np.prod(flat[path].shape[-2:])) for path in paths}


def uniform_zeros(params: PyTree, rules: PatternRules, *, method: Methods) -> Zeros:
    """Return the zeros of each layer's kernel under uniform pruning; their sum is the budget of every allocation.

    Args:
      params: anything with the shapes of a params tree.
      rules: see `prune_tree`.
      method: see `prune_tree`.

    Raises:
      PatternError: a pattern is N:M, or all kernels are dense; or see `prune_tree`.
      RuleError: see `prune_tree`.
    """
    patterns = patterns_of(params, rules)
    for path, pattern in patterns.items():
        if pattern.structured:
            expected = 'expected an unstructured sparsity such as 0.5, or uniform allocation'
            raise PatternError(f'{path}: zeros cannot be allocated under the N:M pattern {pattern}: {expected}')
    # Pruning no kernel is legal, so `patterns_of` accepts it. An allocation without any zeros is a mistake.
    if not patterns:
        raise PatternError('there are no zeros to allocate: the pattern of every kernel is dense')
    return pattern_zeros(flatten(params), patterns, methods_of(params, method))


def total(zeros: Zeros) -> int:
    """Return the total number of zeros over all kernels and layers."""
    return sum(int(np.sum(of_layers)) for of_layers in zeros.values())


def check_bound(zeros: Zeros, sizes: dict[str, int], highest: float) -> None:
    """Check that the zeros fit under the highest sparsity, whatever the scores.

    Args:
      zeros: number of zeros of each layer's kernel under uniform pruning, by path.
      sizes: number of weights of one layer's kernel, by path.
      highest: sparsity that no layer's kernel exceeds.

    Raises:
      PatternError: the zeros do not fit, or `highest` does not lie in (0, 1].
    """
    shapes = {path: np.shape(of_layers) for path, of_layers in zeros.items()}
    try:
        bounds(sizes, shapes, total(zeros), highest)
    except PatternError as error:
        raise PatternError(f'highest: {error}') from None


def bounds(sizes: dict[str, int], shapes: dict[str, tuple[int, ...]], budget: int, highest: float) -> Zeros:
    """Return the maximum number of zeros of each layer's kernel.

    Args:
      sizes: number of weights of one layer's kernel, by path.
      shapes: shapes of the result, by path: `(layers,)`, or `()` for a kernel that is not stacked.
      budget: number of zeros of the whole model.
      highest: sparsity that no layer's kernel exceeds.

    Raises:
      PatternError: see `check_bound`.
    """
    if not 0 < highest <= 1:
        raise PatternError(f'highest sparsity {highest}: expected a share in (0, 1]')
    # Round as `Pattern` does, so that a tower pruned to exactly `highest` is within the bound.
    bound = Pattern(sparsity=highest)
    most = {path: np.full(shape, bound.zeros(sizes[path])) for path, shape in shapes.items()}
    if budget > total(most):
        weights = sum(sizes[path] * int(np.prod(shape)) for path, shape in shapes.items())
        share = f'{budget} of {weights} weights ({budget / weights:.4f})'
        raise PatternError(
            f'{share} are to be pruned, but a highest sparsity of {highest} allows {total(most)}: '
            'raise it, or use a lower sparsity'
        )
    return most


def run_allocation(allocation: Allocation, inputs: AllocationInputs) -> Zeros:
    """Return the zeros that an allocation gives each layer's kernel, checked.

    Args:
      allocation: the allocation, which may be anybody's code.
      inputs: what it may use.

    Raises:
      AllocationError: it fails.
      PatternError: see `check_zeros`.
    """
    # It gets copies. Numbers that it changes in place would otherwise be compared with themselves.
    copies = dataclasses.replace(
        inputs,
        uniform={path: of_layers.copy() for path, of_layers in inputs.uniform.items()},
        sizes=dict(inputs.sizes),
    )
    with calling(f'allocation {type(allocation).__name__}', AllocationError):
        zeros = allocation(copies)
        if isinstance(zeros, Mapping):
            zeros = {path: np.asarray(of_layers) for path, of_layers in zeros.items()}
    check_zeros(zeros, inputs.uniform, inputs.sizes)
    return zeros


def check_zeros(zeros: object, uniform: Zeros, sizes: dict[str, int]) -> None:
    """Check what an allocation returned.

    It must have the kernels and layers of uniform pruning, whole numbers, and their sum. Every kernel keeps a weight.

    Args:
      zeros: what the allocation returned, of which nothing is known yet.
      uniform: what uniform pruning would make.
      sizes: number of weights of one layer's kernel, by path.

    Raises:
      PatternError: names the path, or both sums.
    """
    if not isinstance(zeros, Mapping):
        raise PatternError(f'zeros of the allocation: expected a dict by path, not {type(zeros).__name__}')
    for path in sorted(zeros.keys() | uniform.keys(), key=str):
        if path not in zeros or path not in uniform:
            problem = 'missing' if path in uniform else 'no kernel that is pruned'
            raise PatternError(f'zeros of the allocation: {path} is {problem}')
        given = np.asarray(zeros[path])
        if given.shape != uniform[path].shape or not np.issubdtype(given.dtype, np.integer):
            raise PatternError(
                f'zeros of the allocation: {path} has {given.dtype} numbers of shape {given.shape}, expected whole '
                f'numbers of shape {uniform[path].shape}'
            )
        if given.min() < 0:
            raise PatternError(f'zeros of the allocation: {path} has {given.min()}, expected 0 or more')
    check_left(zeros, sizes)
    if total(zeros) != total(uniform):
        raise PatternError(
            f'zeros of the allocation: {total(zeros)} in all, expected {total(uniform)}, the sum of uniform pruning; '
            'pruning.allocate.round_zeros makes such numbers'
        )


def check_left(zeros: Zeros, sizes: dict[str, int]) -> None:
    """Check that every layer's kernel keeps at least one weight.

    Args:
      zeros: number of zeros of each layer's kernel, by path.
      sizes: number of weights of one layer's kernel, by path.

    Raises:
      PatternError: a kernel would keep none; the message names the first such kernel and layer.
    """
    for path, of_layers in zeros.items():
        empty = np.flatnonzero(np.atleast_1d(of_layers) >= sizes[path])
        if empty.size:
            expected = 'limit the sparsity of a layer, or use a lower sparsity'
            raise PatternError(f'{path}, layer {empty[0]}: all {sizes[path]} weights would be pruned; {expected}')


def allocate(scores: Mapping[str, np.ndarray], sizes: dict[str, int], budget: int, *, highest: float) -> Zeros:
    """Distribute kept weights over the layers by their scores, and return the zeros of each layer's kernel.

    All kernels of one layer of a tower form a group with one sparsity. It keeps `min(size, (1 - highest) * size + c *
    score)` of its `size` weights. The constant c is the same for all groups. It is chosen so that the model has
    `budget` zeros, and computed in float64. The method of largest remainders turns the results into integers.

    Args:
      scores: importance of each layer's kernel, 0 or more; the scores of a group are summed.
      sizes: number of weights of one layer's kernel, by path.
      budget: number of zeros of the whole model.
      highest: sparsity that no layer's kernel exceeds.

    Returns:
      {path: zeros}, with the shapes of `scores` and exactly `budget` zeros in total.

    Raises:
      PatternError: a score is negative or not finite; the scores of too many groups are zero; the budget does not fit
        under `highest`; or a kernel would keep no weight.

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
    # {stack: sum of each layer}; a kernel outside all blocks is a group of its own.
    group_scores = _sum_by_stack(scores)
    group_sizes = _sum_by_stack({path: np.full(most[path].shape, sizes[path]) for path in most})
    # One vector over the groups of all towers: they compete for one budget.
    flat_sizes = np.concatenate([group_sizes[group] for group in group_sizes])
    flat_scores = np.concatenate([group_scores[group] for group in group_sizes])
    # The minimum that a group keeps, at the highest sparsity.
    lowest = (1 - highest) * flat_sizes
    kept = _fill(flat_scores, lowest, flat_sizes, flat_sizes.sum() - budget)
    # Back to {stack: sparsity of each layer}.
    ends = np.cumsum([len(of_layers) for of_layers in group_sizes.values()])[:-1]
    sparsity = dict(zip(group_sizes, np.split(1 - kept / flat_sizes, ends), strict=True))
    # Every kernel of a group gets the group's sparsity, so these numbers are not yet integers.
    wanted = {path: sparsity[stack_of(path)].reshape(most[path].shape) * sizes[path] for path in scores}
    zeros = round_zeros(wanted, budget, most)
    check_left(zeros, sizes)
    return zeros


def _sum_by_stack(values: Mapping[str, np.ndarray]) -> dict[str, Float[np.ndarray, ' layers']]:
    """Return {stack of blocks: sum over its kernels, per layer}, in float64."""
    sums: dict[str, np.ndarray] = {}
    for path, of_layers in values.items():
        of_layers = np.atleast_1d(np.asarray(of_layers, np.float64))
        # All kernels of a layer lie in one stack; a kernel outside the blocks is a group of its own.
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
      scores: score of each group.
      lowest: number of weights that each group keeps whatever its score.
      sizes: number of weights of each group.
      kept: number of weights that the whole model keeps.

    Raises:
      PatternError: too many groups have a score of 0, so the others cannot keep enough weights.
    """
    # The value of c at which each group keeps all its weights; infinite where its score is 0.
    full_at = np.full(len(scores), np.inf)
    np.divide(sizes - lowest, scores, out=full_at, where=scores > 0)

    def filled(c):
        return np.minimum(sizes, lowest + c * scores)

    # The sum is piecewise linear in c and bends where a group becomes full. So find the piece with the solution first,
    # then solve a linear equation.
    points = np.unique(full_at[np.isfinite(full_at)])
    enough = next((point for point in points if filled(point).sum() >= kept), None)
    if enough is not None:
        rest = full_at >= enough
        c = (kept - sizes[~rest].sum() - lowest[rest].sum()) / scores[rest].sum()
        return filled(max(c, 0.0))
    most = filled(points[-1]) if points.size else lowest
    if kept - most.sum() > 0.5:  # a smaller difference is rounding
        raise PatternError(
            f'{np.count_nonzero(scores == 0)} of {len(scores)} groups of kernels have importance 0, and the others '
            f'cannot hold the {round(kept)} weights to be kept: calibrate on more samples, or on other ones'
        )
    return most


def round_zeros(wanted: Mapping[str, np.ndarray], budget: int, most: Zeros) -> Zeros:
    """Round `wanted` to integers that sum exactly to `budget`, by the method of largest remainders.

    Of equal remainders, the earlier one is rounded up. Numbers below 0 or above `most` are set to that limit, and the
    others make up for it: all by the same amount, as far as their own limits allow.

    Args:
      wanted: zeros of each layer's kernel, as real numbers that sum to `budget` up to rounding.
      budget: number of zeros of the whole model.
      most: maximum number of zeros of each layer's kernel.

    Raises:
      PatternError: `budget` is more than the sum of `most`.

    >>> round_zeros({'q': np.array([1.5, 2.5])}, 4, {'q': np.array([9, 9])})['q'].tolist()
    [2, 2]
    """
    # A kernel that is not stacked has a scalar; the others have a vector.
    real = np.concatenate([np.atleast_1d(of_layers) for of_layers in wanted.values()])
    caps = np.concatenate([np.atleast_1d(of_layers) for of_layers in most.values()]).astype(np.int64)
    real = _lower_to(real, caps, budget)
    zeros = np.clip(np.floor(real).astype(np.int64), 0, caps)
    # Another round is needed if kernels with the largest remainders are at their maximum.
    while (missing := budget - int(zeros.sum())) > 0:
        below_cap = np.flatnonzero(zeros < caps)
        if not below_cap.size:
            raise PatternError(f'{budget} zeros are to be allocated, and at most {zeros.sum()} may be')
        # A stable sort of the negated remainders: of equal remainders the earlier comes first.
        chosen = below_cap[np.argsort(-(real - zeros)[below_cap], kind='stable')[:missing]]
        zeros[chosen] += 1
    ends = np.cumsum([np.size(of_layers) for of_layers in wanted.values()])[:-1]
    parts = np.split(zeros, ends)
    return {path: part.reshape(np.shape(wanted[path])) for path, part in zip(wanted, parts, strict=True)}


def _lower_to(
    real: Float[np.ndarray, ' kernels'], caps: Int[np.ndarray, ' kernels'], budget: int
) -> Float[np.ndarray, ' kernels']:
    """Lower all numbers by the same amount, so that they sum to `budget` once they are limited to 0 and `caps`.

    Numbers whose sum is not above the budget are returned unchanged.
    """
    if np.clip(real, 0, caps).sum() < budget + 1:  # a smaller surplus is rounding
        return real
    # The limited sum falls as the amount rises, so the amount is bracketed and halved to the precision of float64.
    low = 0.0
    high = float(real.max())
    for _ in range(100):
        middle = (low + high) / 2
        if np.clip(real - middle, 0, caps).sum() > budget:
            low = middle
        else:
            high = middle
    return real - high
