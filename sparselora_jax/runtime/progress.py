"""Report the progress of a long job, as a bar or as lines with rate and ETA, and its peak memory."""

import resource
import sys
import time
from io import TextIOBase

from tqdm import tqdm

from sparselora_jax.runtime import processes


class Progress:
    """Report how much of a job is done: a bar in a terminal, otherwise a line every few seconds.

    Only process 0 reports.

    Args:
      name: label of the job, such as 'evaluate dense'.
      total: number of items to do.
      first: number of items done by the earlier run that this run resumes; the rate excludes them.
      interval: minimum seconds between two lines.
      file: where to write; standard error by default.
    """

    def __init__(
        self, name: str, total: int, *, first: int = 0, interval: int | float = 10, file: TextIOBase | None = None
    ):
        self.name = name
        self.total = total
        self.first = first
        self.interval = interval
        self.file = file or sys.stderr
        self.started = time.monotonic()
        self.printed = self.started
        self.bar = None
        if self.file.isatty() and processes.first():
            self.bar = tqdm(desc=name, total=total, initial=first, file=self.file, dynamic_ncols=True)

    def __call__(self, done: int, note: str = '') -> None:
        """Report that `done` of the total are done.

        Args:
          done: number of items done, including those of an earlier run.
          note: text to append to the line.
        """
        if self.bar is not None:
            self._move_bar(done, note)
            return
        now = time.monotonic()
        has_ended = done >= self.total
        if not processes.first() or not (has_ended or now - self.printed >= self.interval):
            return
        self.printed = now
        # Items of an earlier run took no time in this run.
        seconds = (now - self.started) / max(done - self.first, 1)
        rate = f'{seconds:.2f} s each' if seconds >= 1 else f'{1 / max(seconds, 1e-9):.1f} a second'
        left = int(seconds * (self.total - done))
        line = f'{self.name} {done}/{self.total} | {rate} | ETA {left // 60}:{left % 60:02d}'
        print(f'{line} | {note}' if note else line, file=self.file, flush=True)

    def _move_bar(self, done: int, note: str) -> None:
        self.bar.set_postfix_str(note, refresh=False)
        self.bar.update(done - self.bar.n)  # tqdm redraws at most ten times a second
        if done >= self.total:
            self.bar.close()


def peak_memory() -> int:
    """Return the peak memory use of this process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux reports KiB
