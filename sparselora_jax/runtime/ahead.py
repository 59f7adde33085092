"""Computes results in threads ahead of the loop that uses them."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

# Twice the cores: Pillow releases Python's lock while it decodes or resizes, and a thread often waits for that lock.
READING_THREADS = min(8, 2 * (os.cpu_count() or 1))

Item = TypeVar('Item')
Result = TypeVar('Result')


def map_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], *, ahead: int, threads: int = 1
) -> Iterator[Result]:
    """Yield the result of a function for each item, in order; the next ones are computed while the caller works.

    An error of an item is raised in its place, after the results before it. Then, or if the caller stops early, items
    that are not begun are dropped.

    Args:
      function: computes a result. Threads help only where it waits, or releases Python's lock.
      items: its arguments.
      ahead: largest number of results that are held or computed beside the one that the caller has.
      threads: number of threads; one computes the results one after the other, in order.

    >>> list(map_ahead(abs, [-3, 1, -2], ahead=2))
    [3, 1, 2]
    """
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        # A caller that is interrupted waits for the items that are being computed, and for no others.
        pool.shutdown(cancel_futures=True)
