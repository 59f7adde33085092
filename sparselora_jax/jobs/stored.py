"""The JSON files of a workdir, and the digests of all files that stages have written: damage is noticed, and named.

A stage asks for the path of each file or folder that it writes (`writes`), so its result can hold their digests. The
hash of a JSON file covers the recipe of the run too, so a file of another run is refused.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from sparselora_jax.jobs import names
from sparselora_jax.recipe import CONFIG_REMEDY, NO_RESULT, stored_fields
from sparselora_jax.runtime import digests, files
from sparselora_jax.runtime.digests import Digest
from sparselora_jax.runtime.files import StorageError

_OUTPUTS = 'files'  # the field of a result file that holds the digests of the other files of its stage


def owner_of(workdir: Path, config: ConfigDict) -> str:
    """Return what tells the files of a run from those of other runs: a hash of the recipe with which it began.

    Args:
      workdir: the folder of the run. If the run has begun, its own recipe counts, whose paths may be written otherwise.
        Of a path, its last part counts.
      config: the recipe. Fields that change no result do not count, nor do those that are None, as in a missing field.

    Raises:
      StorageError: the config in the workdir is damaged.
    """
    fields = {name: value for name, value in stored_fields(workdir, config).items() if name not in NO_RESULT}
    return hashlib.sha256(json.dumps(_comparable(fields), sort_keys=True).encode()).hexdigest()


def _comparable(value: Any) -> Any:
    """Return a value of a recipe without fields that are None and without the folders of its paths."""
    if isinstance(value, dict):
        return {name: _comparable(part) for name, part in value.items() if part is not None}
    # A run may be moved together with its model and data. What these hold is compared by their digests.
    if isinstance(value, str) and os.path.isabs(value):
        return os.path.basename(value)
    return value


def remedy(stage: str) -> str:
    """Return what to do about a damaged file of a stage.

    Args:
      stage: its name.
    """
    return (
        f'put back a copy; or delete {names.result_file(stage)}, to run the stage again, and the results of the stages '
        'after it; or use another workdir'
    )


class Stored:
    """What a run has stored in its workdir.

    Attributes:
      workdir: the folder of the run.
      owner: see `owner_of`.
    """

    def __init__(self, workdir: Path, owner: str):
        """Set the folder; nothing is read yet.

        Args:
          workdir: the folder of the run.
          owner: see `owner_of`.
        """
        self.workdir = workdir
        self.owner = owner
        self._written: set[str] = set()  # files and folders of the running stage
        # Files whose content was compared by this process, as they were then.
        self._compared: dict[Path, tuple[int, int]] = {}

    # JSON files.

    def read(self, name: str, remedy: str) -> dict[str, Any] | None:
        """Read a JSON file of the run, or return None if there is none.

        Args:
          name: name of the file.
          remedy: what to do if it is damaged; the end of the message.

        Raises:
          StorageError: the file is damaged, or was written by another run.
        """
        file = self.workdir / name
        return digests.read_stamped(file, remedy, f'{self.owner} {name}') if file.exists() else None

    def write(self, name: str, values: dict[str, Any]) -> None:
        """Write a JSON file of the run.

        Args:
          name: name of the file.
          values: fields that JSON can hold.
        """
        files.write_text(self.workdir / name, digests.stamp(values, f'{self.owner} {name}'))

    def adopt(self, stage: str, giver: 'Stored') -> None:
        """Take the result of a stage from another run, with the files that it has written, unless this run has one.

        Args:
          stage: name of the stage; nothing happens unless the other run has done it.
          giver: files of the other run.

        Raises:
          StorageError: a result is damaged.
        """
        values = giver._read_result(stage)
        if values is None or (self.workdir / names.result_file(stage)).exists():
            return
        self.workdir.mkdir(parents=True, exist_ok=True)
        begun_with = giver.read(names.INPUTS, CONFIG_REMEDY)
        if begun_with is not None and not (self.workdir / names.INPUTS).exists():
            self.write(names.INPUTS, begun_with)
        for name in values[_OUTPUTS]:
            files.link(giver.workdir / name, self.workdir / name)
        # Last: if it exists, the other files do too.
        self.write(names.result_file(stage), values)

    # Results of stages.

    def result(self, stage: str) -> dict[str, Any] | None:
        """Return the result of a stage, or None if the stage is not done.

        Args:
          stage: its name.

        Raises:
          StorageError: see `read`.
        """
        values = self._read_result(stage)
        if values is not None:
            del values[_OUTPUTS]
        return values

    def results(self) -> dict[str, dict[str, Any]]:
        """Return the results of all stages that are done, by name.

        Raises:
          StorageError: see `read`.
        """
        results = {stage: self.result(stage) for stage in names.STAGES}
        return {stage: result for stage, result in results.items() if result is not None}

    def _read_result(self, stage: str) -> dict[str, Any] | None:
        """Return the result of a stage with the digests of its files."""
        return self.read(names.result_file(stage), remedy(stage))

    def begin(self) -> None:
        """Begin a stage, which has written nothing yet."""
        self._written.clear()

    def writes(self, name: str) -> Path:
        """Return the path of a file or folder that the running stage is about to write beside its result.

        Args:
          name: name in the workdir.
        """
        self._written.add(name)
        return self.workdir / name

    def write_result(self, stage: str, result: dict[str, Any]) -> None:
        """Write the result of a stage, with the digests of all files that it has written.

        Args:
          stage: its name.
          result: values that JSON can hold.
        """
        written = digests.take(digests.files_in(self.workdir, sorted(self._written)))
        self.write(names.result_file(stage), result | {_OUTPUTS: digests.to_json(written)})

    def renew(self, stage: str, name: str) -> None:
        """Take the digest of a file again, after another stage has changed it.

        Args:
          stage: name of the stage that wrote the file; nothing happens unless it is done.
          name: name of the file in the workdir.
        """
        values = self._read_result(stage)
        if values is not None and name in values[_OUTPUTS]:
            values[_OUTPUTS] |= digests.to_json(digests.take({name: self.workdir / name}))
            self.write(names.result_file(stage), values)

    # Checks.

    def output(self, stage: str, name: str) -> Path:
        """Return the path of a file that a stage has written, after its content was compared with its digest.

        The file is not checked while the stage is still running. It need not exist if the stage did not write it.

        Args:
          stage: name of the stage.
          name: name of the file.

        Raises:
          StorageError: the file is missing or damaged, or the stage did not write it.
        """
        file = self.workdir / name
        values = self._read_result(stage)
        if values is None:
            return file
        if name in values[_OUTPUTS]:
            self._refuse_changed(stage, file, digests.from_json(values[_OUTPUTS], Digest)[name], reads=True)
        elif file.exists():
            raise StorageError(f'{file}: the stage {stage} did not write it; delete it')
        return file

    def check(self, *, reads: bool) -> None:
        """Check everything that the run has stored, so that no stage begins on damaged files.

        Args:
          reads: compare the content of files even if their size and time are unchanged.

        Raises:
          StorageError: a file is missing or damaged, or of another run; names it and its stage.
        """
        outputs = list(self._outputs())
        # Without it, nothing would say of which model and records the results are.
        if outputs and self.read(names.INPUTS, CONFIG_REMEDY) is None:
            raise StorageError(f'{self.workdir / names.INPUTS} is missing, and stages are done; {CONFIG_REMEDY}')
        for stage, recorded in outputs:
            for name, digest in digests.from_json(recorded, Digest).items():
                self._refuse_changed(stage, self.workdir / name, digest, reads=reads)

    def _outputs(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (stage, digests of its files) of the stages that are done."""
        for stage in names.STAGES:
            values = self._read_result(stage)
            if values is not None:
                yield stage, values[_OUTPUTS]

    def _refuse_changed(self, stage: str, file: Path, digest: Digest, *, reads: bool) -> None:
        """Check one file of a stage; of a text for people a line says that it has changed, as its readers edit it."""
        if file.exists() and self._compared.get(file) == _state(file):
            return
        difference = digests.difference(file, digest, reads=reads)
        if difference and file.name in names.EDITABLE:
            again = f'delete {names.result_file(stage)} to write it again'
            print(f'note: {file} {difference}; keep it if you have edited it, or {again}', file=sys.stderr)
        elif difference:
            raise StorageError(f'{file} {difference}; {remedy(stage)}')
        if reads and file.exists():
            self._compared[file] = _state(file)


def _state(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns
