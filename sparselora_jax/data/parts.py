"""Sequences that consist of parts, such as files, one after the other."""

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int


def find_part(ends: Sequence[int] | Int[np.ndarray, ' parts'], index: int) -> tuple[int, int]:
    """Return in which part an entry of a sequence is, and its place there.

    Args:
      ends: for each part, the number of entries of all parts up to its end.
      index: the entry.

    Raises:
      IndexError: there is no such entry.

    >>> find_part([2, 2, 5], 2)
    (2, 0)
    """
    count = int(ends[-1]) if len(ends) else 0
    if not 0 <= index < count:
        raise IndexError(f'entry {index} of {count}')
    # The first part that ends behind the entry.
    number = bisect_right(ends, index)
    first = ends[number - 1] if number else 0
    return number, int(index) - int(first)
