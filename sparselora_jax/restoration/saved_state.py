"""Write checkpoints of one training run while training continues, and verify them before they are read.

Orbax's `CheckpointManager` copies a state to the host, writes it in a thread and deletes the oldest checkpoint. This
module adds what it lacks. Each checkpoint has a manifest, the SHA-256 of every file of its arrays, so a truncated file
or a flipped bit is detected and the previous checkpoint is used. A full disk is reported before the first byte is
written.
"""

import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree
from orbax.checkpoint import checkpoint_managers

from sparselora_jax.runtime import processes
from sparselora_jax.runtime.digests import sha256
from sparselora_jax.runtime.errors import SparseloraError
from sparselora_jax.runtime.files import write_text

MANIFEST = 'manifest.json'  # beside the arrays: {file: SHA-256}; a folder without it is not a checkpoint
STATE = 'state'  # folder of the arrays inside a checkpoint
SPARE_ROOM = 1.1  # free bytes that a checkpoint requires, relative to the bytes of its arrays


class CheckpointError(SparseloraError, RuntimeError):
    """A checkpoint that cannot be written."""


class _StepsWithManifest(ocp.path.step.NameFormat):
    """Naming scheme that tells Orbax which folders are checkpoints: those with a manifest, named by step."""

    def build_name(self, step: int) -> str:
        """Return the name of the folder of `step`."""
        return str(step)

    def find_all(self, base_path: ocp.path.step.epath.PathLike) -> Iterator[ocp.path.step.Metadata]:
        """Yield the checkpoints in a folder.

        Orbax deletes only in the first process, so the others do not look: on a shared file system they may see the
        folder as it was some seconds ago.
        """
        if processes.first():
            for step in _complete_steps(Path(base_path)):
                yield self.find_step(base_path, step)

    def find_step(self, base_path: ocp.path.step.epath.PathLike, step: int) -> ocp.path.step.Metadata:
        """Return the folder of `step`."""
        return ocp.path.step.Metadata(step, ocp.path.step.build_step_path(base_path, self, step))


class _Manager(ocp.CheckpointManager):
    """Orbax's manager, which leaves preemption to `train.stop_signal`."""

    def reached_preemption(self, step: int) -> bool:
        """Return False.

        Orbax would ask JAX from a thread about a past step. JAX would take it for the current step of this process, and
        the processes would not agree on a step at which to stop.
        """
        del step
        return False


class _Writing(NamedTuple):
    """One checkpoint that is being written: the manager that writes it, and its folder."""

    manager: ocp.CheckpointManager
    target: Path

    def wait(self) -> None:
        """Wait until this process has written its part.

        Raises:
          CheckpointError: it could not be written.
        """
        with _named(self.target):
            try:
                self.manager.wait_until_finished()
            finally:
                self.manager.close()


@contextmanager
def _named(target: Path) -> Iterator[None]:
    """Raise any error of Orbax as a CheckpointError that names the checkpoint.

    Orbax raises errors of many types when a disk is full.
    """
    try:
        yield
    except Exception as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f'{target} cannot be written ({line}); the checkpoints before it stay') from error


def _is_news(record: logging.LogRecord) -> bool:
    """Return False for a traceback from one of Orbax's threads, since `_named` raises the same error as one line."""
    return not (record.exc_info and 'orbax' in record.pathname)


# A filter of the logger, not a level: other warnings of Orbax, and those of other libraries, still appear.
logging.getLogger('absl').addFilter(_is_news)


def _complete_steps(folder: Path) -> list[int]:
    """Return the steps of the folders that have a manifest, oldest first."""
    names = [path.parent.name for path in folder.glob(f'*/{MANIFEST}')]
    # A folder that is being written has its manifest just before Orbax takes the suffix from its name.
    return sorted(int(name) for name in names if name.isdigit())


def _hashes(checkpoint: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of the arrays, by its path in the checkpoint."""
    files = sorted(path for path in (checkpoint / STATE).rglob('*') if path.is_file())
    return {str(path.relative_to(checkpoint)): sha256(path) for path in files}


class Checkpoints:
    """The newest states of one run, each in a subfolder named by its step.

    As a context manager (`with checkpoints: ...`) it waits for its writer on every exit. Otherwise call `finish` before
    the process ends, or the last saved state is lost.
    """

    def __init__(self, folder: str | Path, *, keep: int = 2, warn: Callable[[str], None] | None = None):
        """Set the folder; nothing is read or written yet.

        Args:
          folder: folder of the checkpoints; created when the first one is saved.
          keep: number of checkpoints to keep; with one, there is no fallback if it is damaged.
          warn: called with one line about a damaged checkpoint; prints to stderr by default.
        """
        self.folder = Path(folder).absolute()
        self.keep = keep
        self.warn = warn or (lambda message: print(message, file=sys.stderr))
        self._writing: _Writing | None = None

    def __enter__(self) -> 'Checkpoints':
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the writer, without replacing an error that is already raised."""
        if error is None:
            self.finish()
        elif self._writing is not None:
            # The other processes may be anywhere, so this one waits only for its own writer.
            try:
                self._writing.wait()
            except CheckpointError as second:
                self.warn(str(second))
            self._writing = None

    def steps(self) -> list[int]:
        """Return the steps with a complete checkpoint, oldest first; the same in all processes.

        Raises:
          CheckpointError: see `finish`.
        """
        self.finish()
        return processes.agreed(lambda: _complete_steps(self.folder))

    def save(self, step: int, tree: PyTree) -> None:
        """Copy a state and start to write it; once it is complete, all but the newest `keep` are deleted.

        With many processes each writes its own parts of the arrays, and the first writes the manifest.

        Args:
          step: number of steps done; a checkpoint of the same step is replaced.
          tree: the state, a tree of arrays. It may be donated as soon as this returns.

        Raises:
          CheckpointError: the disk is too full, or the previous state could not be written. Older ones stay.
        """
        self.finish()
        target = self.folder / str(step)
        processes.agreed(lambda: self._make_room(target, tree))
        # A new manager for each state reads the folder again, so that damaged checkpoints no longer count.
        manager = self._manager(lambda: self._write_manifest(step))
        arguments = ocp.args.Composite(**{STATE: ocp.args.StandardSave(tree)})
        with _named(target):
            # Without `force` Orbax would skip a step that is not above the existing ones.
            manager.save(step, args=arguments, force=True)
        self._writing = _Writing(manager, target)

    def finish(self) -> None:
        """Wait until the last saved state is on the disk.

        Raises:
          CheckpointError: it could not be written. Older ones stay.
        """
        if self._writing is None:
            return
        writing = self._writing
        self._writing = None
        processes.agreed(writing.wait)  # an error of the first process is an error of all
        if not processes.first():
            writing.wait()

    def restore(self, like: PyTree) -> PyTree | None:
        """Read the newest state whose hashes match.

        Args:
          like: a tree of arrays whose shapes, dtypes and shardings the result has.

        Returns:
          The state, or None if there is no valid checkpoint.

        Raises:
          CheckpointError: see `finish`.
        """
        wanted = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        for step in reversed(self.steps()):
            if processes.agreed(lambda step=step: self._holds(step)):
                arguments = ocp.args.Composite(**{STATE: ocp.args.StandardRestore(wanted)})
                with self._manager() as manager:
                    return manager.restore(step, args=arguments)[STATE]
        return None

    def _manager(self, before_rename: Callable[[], None] | None = None) -> ocp.CheckpointManager:
        """Return a new Orbax manager of the folder; it calls `before_rename` when all files are written."""
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.LatestN(self.keep),
            step_name_format=_StepsWithManifest(),
            async_options=ocp.AsyncOptions(post_finalization_callback=before_rename),
            create=False,  # `_make_room` creates it, so that saving creates a folder but reading does not
            lightweight_initialize=True,  # does not read times of checkpoints, which are not used
            save_root_metadata=False,
        )
        return _Manager(self.folder, options=options)

    def _write_manifest(self, step: int) -> None:
        """Write the hashes into the folder that Orbax is about to rename; called in the first process only."""
        # All processes have written by now. Orbax may still change its metadata beside the arrays, which is neither
        # hashed nor read.
        partial = ocp.path.step.find_step_path(self.folder, _StepsWithManifest(), step=step, include_uncommitted=True)
        write_text(Path(partial) / MANIFEST, json.dumps(_hashes(Path(partial))))

    def _make_room(self, target: Path, tree: PyTree) -> None:
        """Create the folder and check that a state fits; delete the remains of a damaged checkpoint of this step."""
        self.folder.mkdir(parents=True, exist_ok=True)
        need = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
        free = shutil.disk_usage(self.folder).free
        if free < SPARE_ROOM * need:
            raise CheckpointError(f'{target}: {-(-need // 2**20)} MiB to write, {free // 2**20} MiB free on this disk')
        if target.exists():  # it has no manifest, or the step is run again
            shutil.rmtree(target)

    def _holds(self, step: int) -> bool:
        """Return whether the hashes match; if not, delete the manifest, so that it displaces no good checkpoint."""
        checkpoint = self.folder / str(step)
        # Bytes, since a damaged manifest may be no text.
        if (checkpoint / MANIFEST).read_bytes() == json.dumps(_hashes(checkpoint)).encode():
            return True
        self.warn(f'{checkpoint}: the checkpoint is damaged (hashes differ); falling back to the one before')
        (checkpoint / MANIFEST).unlink()
        return False
