"""Masks with an exact number of zeros, and checks that a tree obeys its patterns."""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer, Shaped

from sparselora_jax.runtime import processes
from sparselora_jax.sparse.patterns import Pattern, PatternError, parse_pattern, spread
from sparselora_jax.sparse.rules import first_match, flatten


def keep_largest(
    scores: Float[Array, '*shape'], num_zeros: int | Integer[Array, '*groups'], *, axis: int = -1
) -> Bool[Array, '*shape']:
    """Return True for all but the smallest scores along an axis; of equal scores the earlier is pruned first.

    The threshold is found bit by bit, by counting the scores below it: a compiler runs that in parallel, which it
    cannot a sort.

    Args:
      scores: importance of each weight.
      num_zeros: how many are pruned, one integer or one for each group. It may be traced, so that one compilation
        serves every ratio.
      axis: along which scores are compared.
    """
    bits = ordered_bits(scores)
    axis = axis % scores.ndim
    groups = tuple(size for i, size in enumerate(scores.shape) if i != axis)
    # A group is all but the axis: its number of zeros is broadcast along that.
    zeros = jnp.expand_dims(jnp.broadcast_to(jnp.asarray(num_zeros, jnp.int32), groups), axis)

    # In int32: a bool summed under numpy's rules would be int64 where 64 bits are enabled.
    def count(chosen):
        return jnp.sum(chosen, axis=axis, keepdims=True, dtype=jnp.int32)

    def find_largest(num_bits: int, fits: Callable) -> Array:
        """Return the largest number of so many bits that fits, for each group; all smaller ones fit too."""

        def set_next_bit(i, number):
            candidate = number | (jnp.ones((), number.dtype) << (num_bits - 1 - i).astype(number.dtype))
            return jnp.where(fits(candidate), candidate, number)

        return jax.lax.fori_loop(0, num_bits, set_next_bit, jnp.zeros(zeros.shape, bits.dtype))

    # The last score that is pruned. All below it are pruned, and as many of its equals as are then missing.
    threshold = find_largest(bits.dtype.itemsize * 8, lambda value: count(bits < value) < zeros)
    below = bits < threshold
    equal = bits == threshold
    missing = zeros - count(below)
    position = jax.lax.broadcasted_iota(bits.dtype, scores.shape, axis)

    def choose_earliest(equal):
        num_bits = scores.shape[axis].bit_length()
        last = find_largest(num_bits, lambda end: count(equal & (position < end)) < missing)
        return equal & (position <= last) & (missing > 0)

    # The second search is only run where there are more equals than are missing, which is rare.
    is_tied = jnp.any(count(equal) > missing)
    return ~(below | jax.lax.cond(is_tied, choose_earliest, lambda equal: equal, equal))


def ordered_bits(scores: Float[Array, '*shape']) -> Shaped[Array, '*shape']:
    """Return unsigned integers that compare as the scores do."""
    scores = scores.astype(jnp.float32) if scores.dtype.itemsize < 4 else scores
    scores = jnp.where(scores == 0, jnp.zeros((), scores.dtype), scores)  # -0.0 is equal to 0.0
    kind = jnp.uint64 if scores.dtype == jnp.float64 else jnp.uint32
    bits = jax.lax.bitcast_convert_type(scores, kind)
    sign = jnp.asarray(1 << (bits.dtype.itemsize * 8 - 1), kind)
    # Positive floats compare as their bits do; those of negative ones compare the other way round.
    return jnp.where(bits >= sign, ~bits, bits | sign)


def keep_n_of_m(
    scores: Float[Array, '*layers inputs outputs'], n: int, m: int
) -> Bool[Array, '*layers inputs outputs']:
    """Return the N:M mask: in each run of `m` inputs the `n` largest scores are kept; ties prune the earlier.

    Args:
      scores: importance of each weight.
      n: how many are kept of each group.
      m: the size of a group; divides the inputs.
    """
    *layers, inputs, outputs = scores.shape
    groups = scores.reshape(*layers, inputs // m, m, outputs)
    # The rank of an entry is the number of entries that are pruned before it: m*m comparisons beat a sort for small m.
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
      scores: importance of each weight, kernels `[*layers, in, out]`; comparison happens in the scores' dtype.
      pattern: N:M groups run along `in` whatever `group` says.
      group: for an unstructured pattern, `'output'` compares the inputs of one output, `'matrix'` the whole matrix.
      num_zeros: zeros per group instead of the pattern's own: one integer or one for each group (`[*layers, outputs]`
        or `[*layers]`), may be traced (a layer-wise ratio then compiles once). Unstructured patterns only.

    Raises:
      PatternError: M does not divide the input axis, or `num_zeros` with an N:M pattern.

    >>> scores = jnp.array([[1.0, 4.0], [2.0, 3.0], [3.0, 2.0], [4.0, 1.0]])
    >>> mask_from_scores(scores, '2:4').astype(int).tolist()
    [[0, 1], [0, 1], [1, 0], [1, 0]]
    """
    pattern = parse_pattern(pattern)
    *layers, inputs, outputs = scores.shape
    if pattern.structured:
        if num_zeros is not None:
            raise PatternError(f'num_zeros has no meaning for the N:M pattern {pattern}')
        pattern.zeros(inputs)  # raises where M does not divide the inputs
        return keep_n_of_m(scores, pattern.n, pattern.m)
    if group == 'output':
        return keep_largest(scores, pattern.zeros(inputs) if num_zeros is None else num_zeros, axis=-2)
    if group == 'matrix':
        # Position order is that of the stored kernel [in, out], row by row.
        zeros = pattern.zeros(inputs * outputs) if num_zeros is None else num_zeros
        return keep_largest(scores.reshape(*layers, inputs * outputs), zeros).reshape(scores.shape)
    raise PatternError(f"group {group!r}: expected 'output' or 'matrix'")


def density(masks: dict) -> dict[str, float]:
    """Return the share of kept weights by path, and of all of them under `'total'`.

    Args:
      masks: the masks tree.

    >>> density({'q': {'kernel': jnp.array([[True, False]])}})
    {'q/kernel': 0.5, 'total': 0.5}
    """
    flat = flatten(masks)
    counts = {path: int(jnp.count_nonzero(mask)) for path, mask in flat.items()}
    size = sum(mask.size for mask in flat.values())
    densities = {path: counts[path] / mask.size for path, mask in flat.items()}
    return densities | {'total': sum(counts.values()) / size if size else 1.0}


def violations(
    mask: Bool[Array, '*layers inputs outputs'],
    pattern: Pattern,
    group: str = 'output',
    zeros: Integer[np.ndarray, '*layers'] | None = None,
) -> Integer[np.ndarray, '*layers']:
    """Count the comparison groups of each layer whose number of zeros is not the promised one.

    Args:
      mask: the mask of one kernel or of a stack.
      pattern: what was promised.
      group: the comparison group, see `mask_from_scores`.
      zeros: of each layer's kernel, where they are not the pattern's (see `spread`).

    Returns:
      A number for each layer; of a single matrix an array without axes.
    """
    *layers, inputs, outputs = mask.shape
    if pattern.structured:
        groups = jnp.swapaxes(mask.reshape(*layers, -1, pattern.m, outputs), -1, -2)  # [*layers, groups, outputs, m]
        promised = pattern.zeros(pattern.m)
    elif group == 'matrix':
        groups = mask.reshape(*layers, inputs * outputs)
        promised = pattern.zeros(inputs * outputs) if zeros is None else zeros
    else:
        groups = jnp.swapaxes(mask, -1, -2)  # [*layers, outputs, inputs]
        promised = pattern.zeros(inputs)
        if zeros is not None:
            counts = [spread(int(total), outputs) for total in zeros.reshape(-1)]
            promised = np.stack(counts).reshape(*layers, outputs)
    wrong = jnp.sum(~groups, axis=-1, dtype=jnp.int32) != jnp.asarray(promised, jnp.int32)
    return processes.on_host(jnp.sum(wrong, axis=tuple(range(len(layers), wrong.ndim))))


def check_masks(
    masks: dict,
    rules: Sequence[tuple[str, Pattern | str | float]],
    *,
    group: str = 'output',
    zeros: Mapping[str, Integer[np.ndarray, '...']] | None = None,
) -> None:
    """Check that every mask has exactly its pattern's zeros in every comparison group.

    Args:
      masks: the masks tree; a path whose rule says `dense` must be absent or all True.
      rules: `(regex, pattern)` pairs, as given to `prune`.
      group: the comparison group, see `mask_from_scores`.
      zeros: path -> zeros of each layer's kernel, as given to `prune`.

    Raises:
      PatternError: names the path, the first offending layer and how many groups are wrong.
    """
    for path, mask in flatten(masks).items():
        # Unlike in `match`, rules may be about kernels that have no mask.
        pattern = parse_pattern(first_match([*rules, ('.*', 'dense')], path))
        count = np.atleast_1d(violations(mask, pattern, group, (zeros or {}).get(path)))
        if count.any():
            layer = np.argwhere(count)[0].tolist()
            raise PatternError(f'{path}, layer {layer}: {count[tuple(layer)]} groups break pattern {pattern}')


def check_sparse(params: dict, masks: dict) -> None:
    """Check that no weight is non-zero where its mask is False.

    Args:
      params: the params tree, plain arrays.
      masks: the masks tree.

    Raises:
      PatternError: names the path, the first offending layer and the number of weights.
    """
    flat = flatten(params)
    for path, mask in flatten(masks).items():
        if path not in flat:
            raise PatternError(f'{path}: has a mask but no kernel')
        count = np.atleast_1d(processes.on_host(jnp.sum((flat[path] != 0) & ~mask, axis=(-2, -1))))
        if count.any():
            layer = np.argwhere(count)[0].tolist()
            raise PatternError(f'{path}, layer {layer}: {count[tuple(layer)]} weights are non-zero outside the mask')
