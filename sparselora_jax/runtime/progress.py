"""How a long job reports: a line with rate and ETA, a JSONL log, TensorBoard scalars."""

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

    The log is appended to, so a resumed job continues in the same file. Of many processes only the first writes.

    Args:
      workdir: the job's working directory.
    """

    def __init__(self, workdir: str | Path):
        self.path = Path(workdir) / 'log.jsonl'
        if processes.first():
            from tensorboardX import SummaryWriter  # not at the top: only a process that writes needs it

            self.path.parent.mkdir(parents=True, exist_ok=True)
            # A run whose disk was full may have ended within a line.
            if self.path.exists() and not self.path.read_bytes().endswith(b'\n'):
                with self.path.open('a') as file:
                    file.write('\n')
            self.writer = SummaryWriter(str(workdir))

    def scalars(self, stage: str, step: int, values: dict[str, float]) -> None:
        """Append one record.

        Args:
          stage: the stage of the job: 'restore'.
          step: the step of the stage.
          values: scalars by name.
        """
        if not processes.first():
            return
        with self.path.open('a') as file:
            file.write(json.dumps({'stage': stage, 'step': step} | values) + '\n')
        for name, value in values.items():
            self.writer.add_scalar(f'{stage}/{name}', value, step)

    def curve(self, stage: str, name: str) -> list[tuple[int, float]]:
        """Return (step, value) of a scalar, by step.

        A job that was killed and resumed has run some steps twice: their last value counts. Incomplete lines are left
        out.

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
    except json.JSONDecodeError:  # a line that was not written to its end
        return {}


class Progress:
    """Report how much of a job is done: a bar in a terminal, else a line every few seconds.

    Of many processes only the first reports.

    Args:
      name: what is counted: 'evaluate dense'.
      total: how many there are.
      first: how many an earlier run has done, which this run resumes. They do not count for the rate.
      interval: seconds between two lines.
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
          done: how many are done, those of an earlier run included.
          note: what to write behind the figures.
        """
        if self.bar is not None:
            self._move_bar(done, note)
            return
        now = time.monotonic()
        has_ended = done >= self.total
        if not processes.first() or not (has_ended or now - self.printed >= self.interval):
            return
        self.printed = now
        # What an earlier run has done took no time of this one.
        seconds = (now - self.started) / max(done - self.first, 1)
        rate = f'{seconds:.2f} s each' if seconds >= 1 else f'{1 / max(seconds, 1e-9):.1f} a second'
        left = int(seconds * (self.total - done))
        line = f'{self.name} {done}/{self.total} | {rate} | ETA {left // 60}:{left % 60:02d}'
        print(f'{line} | {note}' if note else line, file=self.file, flush=True)

    def _move_bar(self, done: int, note: str) -> None:
        self.bar.set_postfix_str(note, refresh=False)
        self.bar.update(done - self.bar.n)  # draws at most ten times a second
        if done >= self.total:
            self.bar.close()


def peak_memory() -> int:
    """Return the most memory that this process has used, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
