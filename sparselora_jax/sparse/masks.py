"""Sparsity patterns, masks with an exact number of zeros, and checks that a tree obeys its pattern."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer, Shaped

from sparselora_jax.runtime import processes
from sparselora_jax.runtime.errors import SparseloraError
from sparselora_jax.sparse import rules as rules_lib


class PatternError(SparseloraError, ValueError):
    """A pattern that does not parse or does not fit an array."""


@dataclass(frozen=True)
class Pattern:
    """`dense`, an unstructured sparsity in (0, 1), or N:M (n kept of every m along the input axis)."""

    sparsity: float = 0.0
    n: int = 0
    m: int = 0

    @property
    def dense(self) -> bool:
        return self.sparsity == 0.0

    @property
    def structured(self) -> bool:
        return self.m > 0

    @property
    def kind(self) -> 'Pattern':
        """What a compiled pruner depends on: N:M, or only that it is unstructured, where counts come from elsewhere."""
        return self if self.structured or self.dense else Pattern(sparsity=0.5)

    def __str__(self) -> str:
        return f'{self.n}:{self.m}' if self.structured else 'dense' if self.dense else f'{self.sparsity:g}'

    def zeros(self, size: int) -> int:
        """How many zeros a comparison group of `size` weights gets; computed on the host, exact.

        Raises:
          PatternError: N:M whose M does not divide `size`.
        """
        if self.structured:
            if size % self.m:
                raise PatternError(f'pattern {self} does not fit: {self.m} does not divide the input axis of {size}')
            return size // self.m * (self.m - self.n)
        # Through a decimal string: 0.7 * 10 is 7.000000000000001 one way and 6.99... another.
        return math.floor(round(self.sparsity * size, 6))


def parse_pattern(text: str | float | Pattern) -> Pattern:
    """Parses `'2:4'`, `'4:8'`, `'0.7'`, `0.7` or `'dense'`.

    Raises:
      PatternError: anything else, including a sparsity outside [0, 1) and N:M with N not in 1..M-1.

    >>> str(parse_pattern('2:4')), parse_pattern(0.5).zeros(10)
    ('2:4', 5)
    """
    if isinstance(text, Pattern):
        return text
    text = str(text).strip()
    if text == 'dense':
        return Pattern()
    if found := re.fullmatch(r'(\d+):(\d+)', text):
        n, m = map(int, found.groups())
        if not 0 < n < m:
            raise PatternError(f'pattern {text!r}: N:M needs 0 < N < M')
        return Pattern(sparsity=1 - n / m, n=n, m=m)
    try:
        sparsity = float(text)
    except ValueError:
        raise PatternError(f"pattern {text!r}: expected 'dense', a sparsity such as 0.7, or N:M such as 2:4") from None
    if not 0 <= sparsity < 1:
        raise PatternError(f'pattern {text!r}: a sparsity lies in [0, 1)')
    return Pattern(sparsity=sparsity)


def spread(total: int, groups: int) -> np.ndarray:
    """`total` zeros of a kernel over its comparison groups, as evenly as integers go: the first get one more.

    >>> spread(7, 3).tolist()
    [3, 2, 2]
    """
    return (total // groups + (np.arange(groups) < total % groups)).astype(np.int32)


def keep_largest(
    scores: Float[Array, '*shape'], num_zeros: int | Integer[Array, '*groups'], *, axis: int = -1
) -> Bool[Array, '*shape']:
    """True for all but the `num_zeros` smallest scores along `axis`; of equal scores the earlier is pruned first.

    The threshold is found bit by bit, by counting the scores below it: a compiler can do that in parallel, which it
    cannot a sort. `num_zeros` (one integer, or one for each group) may be traced, so that one compilation serves every
    ratio.
    """
    bits, axis = ordered_bits(scores), axis % scores.ndim
    groups = tuple(size for i, size in enumerate(scores.shape) if i != axis)
    zeros = jnp.expand_dims(jnp.broadcast_to(jnp.asarray(num_zeros, jnp.int32), groups), axis)

    def count(chosen):
        return jnp.sum(chosen, axis=axis, keepdims=True, dtype=jnp.int32)

    def largest(top, fits):
        """The largest number of `top` bits that fits, of each group; all smaller ones fit too."""

        def refine(i, found):
            candidate = found | (jnp.ones((), found.dtype) << (top - 1 - i).astype(found.dtype))
            return jnp.where(fits(candidate), candidate, found)

        return jax.lax.fori_loop(0, top, refine, jnp.zeros(zeros.shape, bits.dtype))

    # The last score that is pruned; all below it are, and as many of its equals as are then missing.
    threshold = largest(bits.dtype.itemsize * 8, lambda value: count(bits < value) < zeros)
    below, equal = bits < threshold, bits == threshold
    missing = zeros - count(below)
    position = jax.lax.broadcasted_iota(bits.dtype, scores.shape, axis)

    def earliest(equal):
        last = largest(scores.shape[axis].bit_length(), lambda end: count(equal & (position < end)) < missing)
        return equal & (position <= last) & (missing > 0)

    tied = jnp.any(count(equal) > missing)
    return ~(below | jax.lax.cond(tied, earliest, lambda equal: equal, equal))


def ordered_bits(scores: Float[Array, '*shape']) -> Shaped[Array, '*shape']:
    """Unsigned integers that compare as the scores do."""
    scores = scores.astype(jnp.float32) if scores.dtype.itemsize < 4 else scores
    scores = jnp.where(scores == 0, jnp.zeros((), scores.dtype), scores)  # -0.0 is equal to 0.0
    kind = jnp.uint64 if scores.dtype == jnp.float64 else jnp.uint32
    bits = jax.lax.bitcast_convert_type(scores, kind)
    sign = jnp.asarray(1 << (bits.dtype.itemsize * 8 - 1), kind)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def keep_n_of_m(
    scores: Float[Array, '*layers inputs outputs'], n: int, m: int
) -> Bool[Array, '*layers inputs outputs']:
    """The N:M mask: in each run of `m` inputs, the `n` largest scores are kept; ties prune the earlier."""
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
    """Keeps the highest scores of each comparison group; exactly the promised number of zeros, ties by position.

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
        pattern.zeros(inputs)
        return keep_n_of_m(scores, pattern.n, pattern.m)
    if group == 'output':
        return keep_largest(scores, pattern.zeros(inputs) if num_zeros is None else num_zeros, axis=-2)
    if group == 'matrix':
        # Position order is that of the stored kernel [in, out], row by row.
        zeros = pattern.zeros(inputs * outputs) if num_zeros is None else num_zeros
        return keep_largest(scores.reshape(*layers, inputs * outputs), zeros).reshape(scores.shape)
    raise PatternError(f"group {group!r}: expected 'output' or 'matrix'")


def density(masks: dict) -> dict[str, float]:
    """Share of kept weights per path, and of all of them under `'total'`.

    >>> density({'q': {'kernel': jnp.array([[True, False]])}})
    {'q/kernel': 0.5, 'total': 0.5}
    """
    flat = rules_lib.flatten(masks)
    kept = {path: int(jnp.count_nonzero(mask)) for path, mask in flat.items()}
    total = sum(mask.size for mask in flat.values())
    return {path: kept[path] / flat[path].size for path in flat} | {
        'total': sum(kept.values()) / total if total else 1.0
    }


def violations(
    mask: Bool[Array, '*layers inputs outputs'],
    pattern: Pattern,
    group: str = 'output',
    zeros: Integer[np.ndarray, '*layers'] | None = None,
) -> np.ndarray:
    """Comparison groups per layer whose number of zeros is not the promised one; 0-d for a single matrix.

    Args:
      zeros: of each layer's kernel, where they are not the pattern's (see `spread`).
    """
    *layers, inputs, outputs = mask.shape
    if pattern.structured:
        groups = jnp.swapaxes(mask.reshape(*layers, -1, pattern.m, outputs), -1, -2)
        want = pattern.zeros(pattern.m)
    elif group == 'matrix':
        groups = mask.reshape(*layers, inputs * outputs)
        want = pattern.zeros(inputs * outputs) if zeros is None else zeros
    else:
        groups = jnp.swapaxes(mask, -1, -2)
        counts = None if zeros is None else [spread(int(total), outputs) for total in zeros.reshape(-1)]
        want = pattern.zeros(inputs) if counts is None else np.stack(counts).reshape(*layers, outputs)
    wrong = jnp.sum(~groups, axis=-1, dtype=jnp.int32) != jnp.asarray(want, jnp.int32)
    return processes.on_host(jnp.sum(wrong, axis=tuple(range(len(layers), wrong.ndim))))


def check_masks(
    masks: dict,
    rules: Sequence[tuple[str, Any]],
    *,
    group: str = 'output',
    zeros: dict[str, np.ndarray] | None = None,
) -> None:
    """Checks that every mask has exactly its pattern's zeros in every comparison group.

    Args:
      masks: the masks tree; a path whose rule says `dense` must be absent or all True.
      rules: `(regex, pattern)` pairs, as given to `prune`; so are `zeros`.

    Raises:
      PatternError: names the path, the first offending layer and how many groups are wrong.
    """
    flat = rules_lib.flatten(masks)
    for path, mask in flat.items():
        pattern = parse_pattern(rules_lib.first_match([*rules, ('.*', 'dense')], path))
        count = np.atleast_1d(violations(mask, pattern, group, (zeros or {}).get(path)))
        if count.any():
            layer = np.argwhere(count)[0].tolist()
            raise PatternError(f'{path}, layer {layer}: {count[tuple(layer)]} groups break pattern {pattern}')


def check_sparse(params: dict, masks: dict) -> None:
    """Checks that no weight is non-zero where its mask is False.

    Raises:
      PatternError: names the path, the first offending layer and the number of weights.
    """
    flat = rules_lib.flatten(params)
    for path, mask in rules_lib.flatten(masks).items():
        if path not in flat:
            raise PatternError(f'{path}: has a mask but no kernel')
        leaks = processes.on_host(jnp.sum((flat[path] != 0) & ~mask, axis=(-2, -1)))
        if leaks.any():
            layer = np.argwhere(np.atleast_1d(leaks))[0].tolist()
            count = np.atleast_1d(leaks)[tuple(layer)]
            raise PatternError(f'{path}, layer {layer}: {count} weights are non-zero outside the mask')
