"""Record the scalars of a job: a JSONL file, and TensorBoard events."""

import json
import sys
from pathlib import Path

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
            # Imported here, since only the process that writes needs it.
            from tensorboardX import SummaryWriter

            self.path.parent.mkdir(parents=True, exist_ok=True)
            unreadable = sum(not _parse_record(line) for line in self._lines())
            if unreadable:
                note = f'note: {self.path}: damaged lines, which the curves of the report lack: {unreadable}'
                print(note, file=sys.stderr)
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
        records = [_parse_record(line) for line in self._lines()]
        values = {
            record['step']: record[name]
            for record in records
            if record.get('stage') == stage and _is_number(record.get('step')) and _is_number(record.get(name))
        }
        return sorted(values.items())

    def _lines(self) -> list[str]:
        # Undecodable bytes only spoil their own line. An empty line ends one that was cut off.
        lines = self.path.read_text(errors='replace').splitlines() if self.path.exists() else []
        return [line for line in lines if line]


def _parse_record(line: str) -> dict:
    """Return the record of a line, or an empty one if the line is incomplete or damaged."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # thousands of brackets exhaust the stack
        return {}
    return record if isinstance(record, dict) else {}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)
