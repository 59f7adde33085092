"""Masks with an exact number of zeros, and checks that a tree obeys its patterns."""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer, PyTree, Shaped

from sparselora_jax.runtime import processes
from sparselora_jax.sparse.axes import AxesByPath, roles_by_path, unusual_roles
from sparselora_jax.sparse.patterns import Pattern, PatternError, parse_pattern, spread
from sparselora_jax.sparse.rules import first_match, flatten, paths_of


def keep_largest(
    scores: Float[Array, '*shape'], num_zeros: int | Integer[Array, '*groups'], *, axis: int = -1
) -> Bool[Array, '*shape']:
    """Return True for all but the smallest scores along an axis; among equal scores, the earlier are pruned first.

    The threshold is found bit by bit, by counting the scores below it. Compilers parallelise this well, unlike a sort.

    Args:
      scores: importance of each weight.
      num_zeros: number of pruned weights, as one integer or one for each group. It may be traced, so that one
        compilation serves every ratio.
      axis: the axis along which scores are compared.
    """
    bits = ordered_bits(scores)
    axis = axis % scores.ndim
    groups = tuple(size for i, size in enumerate(scores.shape) if i != axis)
    # Each index of the other axes is a group. Its number of zeros is broadcast along the axis.
    zeros = jnp.expand_dims(jnp.broadcast_to(jnp.asarray(num_zeros, jnp.int32), groups), axis)

    # Sum in int32: with 64-bit types enabled, a sum of bools would be int64.
    def count(chosen):
        return jnp.sum(chosen, axis=axis, keepdims=True, dtype=jnp.int32)

    def find_largest(num_bits: int, fits: Callable) -> Array:
        """Return each group's largest number of `num_bits` bits that fits, where all smaller ones fit too."""

        def set_next_bit(i, number):
            candidate = number | (jnp.ones((), number.dtype) << (num_bits - 1 - i).astype(number.dtype))
            return jnp.where(fits(candidate), candidate, number)

        return jax.lax.fori_loop(0, num_bits, set_next_bit, jnp.zeros(zeros.shape, bits.dtype))

    # The threshold is the largest pruned score. All lower scores are pruned, then as many equal ones as are missing.
    threshold = find_largest(bits.dtype.itemsize * 8, lambda value: count(bits < value) < zeros)
    below = bits < threshold
    equal = bits == threshold
    missing = zeros - count(below)
    position = jax.lax.broadcasted_iota(bits.dtype, scores.shape, axis)

    def choose_earliest(equal):
        num_bits = scores.shape[axis].bit_length()
        last = find_largest(num_bits, lambda end: count(equal & (position < end)) < missing)
        return equal & (position <= last) & (missing > 0)

    # The second search runs only if there are more equal scores than missing zeros, which is rare.
    is_tied = jnp.any(count(equal) > missing)
    return ~(below | jax.lax.cond(is_tied, choose_earliest, lambda equal: equal, equal))


def ordered_bits(scores: Float[Array, '*shape']) -> Shaped[Array, '*shape']:
    """Return unsigned integers with the same order as the scores."""
    scores = scores.astype(jnp.float32) if scores.dtype.itemsize < 4 else scores
    scores = jnp.where(scores == 0, jnp.zeros((), scores.dtype), scores)  # -0.0 is equal to 0.0
    kind = jnp.uint64 if scores.dtype == jnp.float64 else jnp.uint32
    bits = jax.lax.bitcast_convert_type(scores, kind)
    sign = jnp.asarray(1 << (bits.dtype.itemsize * 8 - 1), kind)
    # Positive floats have the same order as their bits; negative floats have the reverse order.
    return jnp.where(bits >= sign, ~bits, bits | sign)


def keep_n_of_m(
    scores: Float[Array, '*layers inputs outputs'], n: int, m: int
) -> Bool[Array, '*layers inputs outputs']:
    """Return the N:M mask: keep the `n` largest scores of each `m` inputs; of equal scores, prune the earlier.

    Args:
      scores: importance of each weight.
      n: number of kept weights in each group.
      m: size of a group; must divide the number of inputs.
    """
    *layers, inputs, outputs = scores.shape
    # NaN compares with nothing, so it would be kept or pruned beside the count: it counts as the lowest score.
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    groups = scores.reshape(*layers, inputs // m, m, outputs)
    # The rank of an entry is the number of entries pruned before it. For small m, m*m comparisons beat a sort.
    before = (
        (groups[..., j : j + 1, :] < groups) | ((groups[..., j : j + 1, :] == groups) & (jnp.arange(m) > j)[:, None])
        for j in range(m)
    )
    rank = sum(entry.astype(jnp.int32) for entry in before)
    return (rank >= m - n).reshape(scores.shape)


def mask_from_scores(
    scores: Float[Array, '*layers inputs outputs'],
    pattern: Pattern | str | float,
    *,
    group: str = 'output',
    num_zeros: int | Integer[Array, '...'] | None = None,
) -> Bool[Array, '*layers inputs outputs']:
    """Keep the highest scores of each comparison group, with exactly the promised number of zeros.

    Ties are broken by position.

    Args:
      scores: importance of each weight, `[*layers, in, out]`; they are compared in their own dtype.
      pattern: the sparsity pattern; N:M groups run along `in`, whatever `group` is.
      group: for an unstructured pattern, `'output'` compares the inputs of one output, `'matrix'` the whole matrix.
      num_zeros: zeros per group, in place of the pattern's: one integer, or one for each group (`[*layers, outputs]`
        or `[*layers]`). It may be traced, so that layer-wise ratios compile once. Unstructured patterns only.

    Raises:
      PatternError: M does not divide the input axis, `num_zeros` with an N:M pattern, or it is no number of weights of
        a group; or the group is unknown, or the scores have fewer than two axes.

    >>> scores = jnp.array([[1.0, 4.0], [2.0, 3.0], [3.0, 2.0], [4.0, 1.0]])
    >>> mask_from_scores(scores, '2:4').astype(int).tolist()
    [[0, 1], [0, 1], [1, 0], [1, 0]]
    """
    pattern = parse_pattern(pattern)
    if np.ndim(scores) < 2:
        raise PatternError(f'scores of shape {list(np.shape(scores))}: expected [*layers, inputs, outputs]')
    if group not in ('output', 'matrix'):
        raise PatternError(f"group {group!r}: expected 'output' or 'matrix'")
    *layers, inputs, outputs = scores.shape
    if pattern.structured:
        if num_zeros is not None:
            raise PatternError(f'num_zeros has no meaning for the N:M pattern {pattern}')
        pattern.zeros(inputs)  # raises where M does not divide the inputs
        return keep_n_of_m(scores, pattern.n, pattern.m)
    _check_num_zeros(num_zeros, inputs if group == 'output' else inputs * outputs)
    if group == 'output':
        return keep_largest(scores, pattern.zeros(inputs) if num_zeros is None else num_zeros, axis=-2)
    # Ties are broken in the order of the stored kernel [in, out], row by row.
    zeros = pattern.zeros(inputs * outputs) if num_zeros is None else num_zeros
    return keep_largest(scores.reshape(*layers, inputs * outputs), zeros).reshape(scores.shape)


def _check_num_zeros(num_zeros: object, size: int) -> None:
    """Check that numbers of zeros are integers from 0 to the size of a group; traced ones have no values yet."""
    if num_zeros is None or isinstance(num_zeros, jax.core.Tracer):
        return
    values = np.asarray(num_zeros)
    if not np.issubdtype(values.dtype, np.integer) or (values.size and not 0 <= values.min() <= values.max() <= size):
        given = repr(num_zeros) if not values.shape else f'of {values.dtype} {list(values.shape)}'
        raise PatternError(f'num_zeros {given}: expected integers from 0 to {size}, the weights of a group')


def density(masks: dict) -> dict[str, float]:
    """Return the share of kept weights for each path, and for all paths together under `'total'`.

    Args:
      masks: the masks tree.

    >>> density({'q': {'kernel': jnp.array([[True, False]])}})
    {'q/kernel': 0.5, 'total': 0.5}
    """
    flat = flatten(masks)
    counts = {path: int(jnp.count_nonzero(mask)) for path, mask in flat.items()}
    size = sum(mask.size for mask in flat.values())
    densities = {path: counts[path] / mask.size if mask.size else 1.0 for path, mask in flat.items()}
    return densities | {'total': sum(counts.values()) / size if size else 1.0}


def violations(
    mask: Bool[Array, '*layers inputs outputs'],
    pattern: Pattern,
    group: str = 'output',
    zeros: Integer[np.ndarray, '*layers'] | None = None,
) -> Integer[np.ndarray, '*layers']:
    """Count, for each layer, the comparison groups with a wrong number of zeros.

    Args:
      mask: the mask of one kernel or of a stack.
      pattern: the expected pattern.
      group: the comparison group, see `mask_from_scores`.
      zeros: number of zeros of each layer's kernel, if it differs from the pattern's (see `spread`).

    Returns:
      A count for each layer; for a single matrix, a scalar array.
    """
    *layers, inputs, outputs = mask.shape
    if pattern.structured:
        promised = pattern.zeros(pattern.m)
    elif group == 'matrix':
        promised = pattern.zeros(inputs * outputs) if zeros is None else zeros
    else:
        promised = pattern.zeros(inputs)
        if zeros is not None:
            counts = [spread(int(total), outputs) for total in zeros.reshape(-1)]
            promised = np.stack(counts).reshape(*layers, outputs)
    wrong = zeros_of_groups(mask, pattern, group) != jnp.asarray(promised, jnp.int32)
    return processes.on_host(jnp.sum(wrong, axis=tuple(range(len(layers), wrong.ndim))))


def zeros_of_groups(
    mask: Bool[Array, '*layers inputs outputs'], pattern: Pattern, group: str
) -> Integer[Array, '*layers_and_groups']:
    """Count the zeros of each comparison group.

    Args:
      mask: the mask of one kernel or of a stack.
      pattern: the expected pattern.
      group: the comparison group, see `mask_from_scores`.
    """
    *layers, inputs, outputs = mask.shape
    if pattern.structured:
        return jnp.sum(~mask.reshape(*layers, inputs // pattern.m, pattern.m, outputs), axis=-2, dtype=jnp.int32)
    if group == 'matrix':
        return jnp.sum(~mask, axis=(-2, -1), dtype=jnp.int32)
    return jnp.sum(~mask, axis=-2, dtype=jnp.int32)


def check_masks(
    masks: dict,
    rules: Sequence[tuple[str, Pattern | str | float]],
    *,
    group: str = 'output',
    zeros: Mapping[str, Integer[np.ndarray, '...']] | None = None,
    axes: AxesByPath | None = None,
) -> None:
    """Check that every mask has exactly its pattern's zeros in every comparison group.

    Args:
      masks: the masks tree; a path whose rule says `dense` must be absent or all True.
      rules: `(regex, pattern)` pairs, as given to `prune`.
      group: the comparison group, see `mask_from_scores`.
      zeros: path -> number of zeros of each layer's kernel, as given to `prune`.
      axes: the roles of the axes of kernels that are not `[*layers, inputs, outputs]`: what `collect` returned, the
        `axes` of a `PruneResult`, or `{path: KernelAxes}`.

    Raises:
      PatternError: a mask breaks its pattern; names the path, the first wrong layer and its number of wrong groups.
      RuleError: the axes do not fit a mask.

    >>> from sparselora_jax.sparse.axes import KernelAxes
    >>> masks = {'q': jnp.array([[True, False], [True, False]])}  # [outputs, inputs]
    >>> check_masks(masks, [('q', '1:2')], axes={'q': KernelAxes(layers=(), inputs=(1,), outputs=(0,))})
    """
    flat = flatten(masks)
    for path, mask in flat.items():
        _check_is_mask(path, mask)
    # Dense kernels have axes too, but no mask.
    roles = unusual_roles(flat, {path: roles for path, roles in roles_by_path(axes).items() if path in flat})
    for path, mask in flat.items():
        # Unlike in `match`, rules may match kernels that have no mask.
        pattern = parse_pattern(first_match([*rules, ('.*', 'dense')], path))
        if path in roles:
            mask = roles[path].to_matrix(mask)
        # Groups of M inputs could not be formed at all.
        try:
            pattern.zeros(mask.shape[-2])
        except PatternError as error:
            raise PatternError(f'{path}: {error}') from None
        count = np.atleast_1d(violations(mask, pattern, group, (zeros or {}).get(path)))
        if count.any():
            layer = np.argwhere(count)[0].tolist()
            raise PatternError(f'{path}, layer {layer}: {count[tuple(layer)]} groups break pattern {pattern}')


def _check_is_mask(path: str, mask: object) -> None:
    if getattr(mask, 'dtype', None) != np.bool_:
        kind = getattr(mask, 'dtype', type(mask).__name__)
        raise PatternError(f'{path}: the mask is {kind}, expected an array of booleans')


def check_sparse(params: PyTree, masks: dict) -> None:
    """Check that no weight is non-zero where its mask is False.

    Args:
      params: the params, any tree of plain arrays.
      masks: the masks tree.

    Raises:
      PatternError: a pruned weight is not zero; names the path, the first wrong layer and the number of weights.
    """
    flat = paths_of(params)
    for path, mask in flatten(masks).items():
        if path not in flat:
            raise PatternError(f'{path}: has a mask but no kernel')
        _check_is_mask(path, mask)
        # Other shapes could broadcast.
        if np.shape(mask) != flat[path].shape:
            raise PatternError(f'{path}: a mask of shape {np.shape(mask)} for a kernel of shape {flat[path].shape}')
        count = np.atleast_1d(processes.on_host(jnp.sum((flat[path] != 0) & ~mask, axis=(-2, -1))))
        if count.any():
            layer = np.argwhere(count)[0].tolist()
            raise PatternError(f'{path}, layer {layer}: {count[tuple(layer)]} weights are non-zero outside the mask')
