"""Progress reports of a long job: a line with rate and ETA, a JSONL log, TensorBoard scalars."""

import json
import resource
import sys
import time
from io import TextIOBase
from pathlib import Path

from tqdm import tqdm

from sparselora_jax.runtime import processes


class Log:
    """Scalars of one job: `<workdir>/log.jsonl`, and TensorBoard events beside it.

    Records are appended, so a resumed job continues the same file. Only process 0 writes.

    Args:
      workdir: the job's working directory.
    """

    def __init__(self, workdir: str | Path):
        self.path = Path(workdir) / 'log.jsonl'
        if processes.first():
            from tensorboardX import SummaryWriter  # imported here, since only the process that writes needs it

            self.path.parent.mkdir(parents=True, exist_ok=True)
            # If the disk was full, the last run may have ended in the middle of a line.
            if self.path.exists() and not self.path.read_bytes().endswith(b'\n'):
                with self.path.open('a') as file:
                    file.write('\n')
            self.writer = SummaryWriter(str(workdir))

    def scalars(self, stage: str, step: int, values: dict[str, float]) -> None:
        """Append one record.

        Args:
          stage: name of the stage of the job, such as 'restore'.
          step: step number within the stage.
          values: scalars by name.
        """
        if not processes.first():
            return
        with self.path.open('a') as file:
            file.write(json.dumps({'stage': stage, 'step': step} | values) + '\n')
        for name, value in values.items():
            self.writer.add_scalar(f'{stage}/{name}', value, step)

    def curve(self, stage: str, name: str) -> list[tuple[int, float]]:
        """Return the (step, value) pairs of a scalar, sorted by step.

        A job that was killed and resumed may have logged some steps twice; the last value is used. Incomplete lines are
        skipped.

        Args:
          stage: the stage of the job.
          name: the name of the scalar.
        """
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        records = [_parse_record(line) for line in lines]
        values = {r['step']: r[name] for r in records if r.get('stage') == stage and name in r}
        return sorted(values.items())


def _parse_record(line: str) -> dict:
    try:
        return json.loads(line)
    except json.JSONDecodeError:  # an incomplete line
        return {}


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
