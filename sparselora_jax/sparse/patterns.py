"""Sparsity patterns: dense, an unstructured share of zeros, or N:M."""

import math
import re
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32

from sparselora_jax.runtime.errors import SparseloraError


class PatternError(SparseloraError, ValueError):
    """A pattern that does not parse or does not fit an array."""


@dataclass(frozen=True)
class Pattern:
    """A sparsity pattern: `dense`, an unstructured sparsity in (0, 1), or N:M.

    Attributes:
      sparsity: the share of zeros; 0 for `dense`. That of N:M follows from N and M.
      n: number of kept weights in each group of `m` inputs; 0 unless N:M.
      m: size of a group along the input axis; 0 unless N:M.
    """

    sparsity: float = 0.0
    n: int = 0
    m: int = 0

    def __post_init__(self) -> None:
        """Check the numbers, and set the sparsity of N:M.

        Raises:
          PatternError: they are no pattern.
        """
        if self.n or self.m:
            is_integer = isinstance(self.n, int) and isinstance(self.m, int)
            if not is_integer or not 0 < self.n < self.m:
                raise PatternError(f"pattern '{self.n}:{self.m}': N:M needs 0 < N < M")
            sparsity = 1 - self.n / self.m
            if self.sparsity not in (0.0, sparsity):
                raise PatternError(f"pattern '{self.n}:{self.m}' has the sparsity {sparsity:g}, not {self.sparsity!r}")
            # The fields are frozen for everybody else.
            object.__setattr__(self, 'sparsity', sparsity)
        # NaN fails the comparison too. 1 is no pattern of a recipe, but the bound of an allocation.
        elif not 0 <= self.sparsity <= 1:
            raise PatternError(f'pattern {self.sparsity!r}: a sparsity must be in [0, 1)')

    @property
    def dense(self) -> bool:
        """Return whether nothing is pruned."""
        return self.sparsity == 0.0

    @property
    def structured(self) -> bool:
        """Return whether the pattern is N:M."""
        return self.m > 0

    @property
    def kind(self) -> 'Pattern':
        """Return a representative pattern: patterns of one kind share a compiled pruner.

        A compiled program depends on N and M. It does not depend on an unstructured sparsity, since the number of zeros
        is traced. So all unstructured patterns are of one kind.
        """
        # Any sparsity will do: the number of zeros comes from the pattern itself, not from its kind.
        return self if self.structured or self.dense else Pattern(sparsity=0.5)

    def __str__(self) -> str:
        if self.structured:
            return f'{self.n}:{self.m}'
        return 'dense' if self.dense else f'{self.sparsity:g}'

    def zeros(self, size: int) -> int:
        """Return the exact number of zeros that a comparison group gets.

        Args:
          size: number of weights of the group.

        Raises:
          PatternError: the pattern is N:M, and M does not divide `size`.
        """
        if self.structured:
            if size % self.m:
                raise PatternError(f'pattern {self} does not fit: {self.m} does not divide the input axis of {size}')
            return size // self.m * (self.m - self.n)  # N:M keeps n of m, so m - n are zero
        # Rounded first, since the product of floats may be slightly below an integer, such as 28.99... for 0.29 of 100.
        return math.floor(round(self.sparsity * size, 6))


def parse_pattern(text: str | float | Pattern) -> Pattern:
    """Parse `'2:4'`, `'4:8'`, `'0.7'`, `0.7` or `'dense'`.

    Args:
      text: the pattern; a `Pattern` is returned unchanged.

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
    if n_of_m := re.fullmatch(r'(\d+):(\d+)', text):
        n, m = map(int, n_of_m.groups())
        if not m:
            raise PatternError(f'pattern {text!r}: N:M needs 0 < N < M')
        return Pattern(n=n, m=m)
    # 'nan' parses as a float, but fails the range check below.
    try:
        sparsity = float(text)
    except ValueError:
        raise PatternError(f"pattern {text!r}: expected 'dense', a sparsity such as 0.7, or N:M such as 2:4") from None
    if not 0 <= sparsity < 1:
        raise PatternError(f'pattern {text!r}: a sparsity must be in [0, 1)')
    return Pattern(sparsity=sparsity)


def spread(total: int, groups: int) -> Int32[np.ndarray, ' {groups}']:
    """Spread the zeros of a kernel over its comparison groups, as evenly as integers allow.

    Args:
      total: number of zeros of the kernel.
      groups: number of comparison groups; if they do not divide `total`, the first groups get one zero more.

    >>> spread(7, 3).tolist()
    [3, 2, 2]
    """
    return (total // groups + (np.arange(groups) < total % groups)).astype(np.int32)
