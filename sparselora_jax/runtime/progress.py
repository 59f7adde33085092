"""What a long job tells: a line with rate and ETA, a JSONL log, tensorboard scalars."""

import json
import resource
import sys
import time
from pathlib import Path

from sparselora_jax.runtime import processes


class Log:
    """Scalars of one job: `<workdir>/log.jsonl` and tensorboard events beside it."""

    def __init__(self, workdir: str | Path):
        """The log is appended to, so a resumed job goes on in the same file."""
        self.path = Path(workdir) / 'log.jsonl'
        if processes.first():
            from tensorboardX import SummaryWriter

            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists() and not self.path.read_bytes().endswith(b'\n'):
                with self.path.open('a') as file:  # a run ended while it wrote, for want of room
                    file.write('\n')
            self.writer = SummaryWriter(str(workdir))

    def scalars(self, stage: str, step: int, values: dict[str, float]) -> None:
        """One record; of many processes the first writes it."""
        if not processes.first():
            return
        with self.path.open('a') as file:
            file.write(json.dumps({'stage': stage, 'step': step} | values) + '\n')
        for name, value in values.items():
            self.writer.add_scalar(f'{stage}/{name}', value, step)

    def curve(self, stage: str, name: str) -> list[tuple[int, float]]:
        """(step, value) of a scalar; of steps run twice, because a job was killed between, the last counts.

        Lines that are not whole are left out.
        """
        records = [_record(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []
        return sorted({r['step']: r[name] for r in records if r.get('stage') == stage and name in r}.items())


def _record(line: str) -> dict:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return {}


class Progress:
    """Prints `name done/total | rate | ETA`: in place in a terminal, else a line every `interval` seconds."""

    def __init__(self, name: str, total: int, *, first: int = 0, interval: int | float = 10, file=None):
        """`first`: done before, by the run that is resumed; `interval`: seconds between plain lines."""
        self.name, self.total, self.interval, self.file = name, total, interval, file or sys.stderr
        self.started = self.printed = time.monotonic()
        self.first = first

    def __call__(self, done: int, note: str = '') -> None:
        """`done` of `total` are done."""
        now = time.monotonic()
        tty, ended = self.file.isatty(), done >= self.total
        if not processes.first() or not (ended or now - self.printed >= (0.1 if tty else self.interval)):
            return
        self.printed = now
        each = (now - self.started) / max(done - self.first, 1)
        rate = f'{each:.2f} s each' if each >= 1 else f'{1 / max(each, 1e-9):.1f} a second'
        left = int(each * (self.total - done))
        line = (
            f'{self.name} {done}/{self.total} | {rate} | ETA {left // 60}:{left % 60:02d}{" | " if note else ""}{note}'
        )
        print(('\r\x1b[K' if tty else '') + line, end='' if tty and not ended else '\n', file=self.file, flush=True)


def peak_memory() -> int:
    """The most memory that this process has held, in bytes (Linux counts KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
