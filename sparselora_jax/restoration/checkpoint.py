"""Checkpoints by Orbax, each with a manifest of hashes: what is read back is what was written, or is not used.

They are written while training goes on. A process killed meanwhile leaves a folder without a manifest, which is never
read.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from sparselora_jax.runtime import processes
from sparselora_jax.runtime.errors import SparseloraError
from sparselora_jax.runtime.files import write_text

MANIFEST = 'manifest.json'


class CheckpointError(SparseloraError, RuntimeError):
    """A checkpoint that cannot be written."""


@contextmanager
def _named(target: Path) -> Iterator[None]:
    """What Orbax raises, as an error that names the checkpoint; it has many kinds for a disk that is full."""
    try:
        yield
    except Exception as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f'{target} cannot be written ({line}); the checkpoints before it stay') from error


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob('*') if path.is_file() and path.name != MANIFEST)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class Checkpoints:
    """The newest `keep` states of one job in a folder, named by step."""

    def __init__(self, folder: str | Path, *, keep: int = 2, warn: Callable[[str], None] | None = None):
        """`warn` is told of a damaged checkpoint; stderr by default."""
        self.folder = Path(folder).absolute()
        self.keep = keep
        self.warn = warn or (lambda message: print(message, file=sys.stderr))
        self._writer = ThreadPoolExecutor(1)
        self._written: Future | None = None

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, oldest first; the same in all processes.

        Raises:
          CheckpointError: see `finish`.
        """
        self.finish()
        return processes.agreed(self._complete)

    def _complete(self) -> list[int]:
        return sorted(int(path.parent.name) for path in self.folder.glob(f'*/{MANIFEST}'))

    def save(self, step: int, tree: Any) -> None:
        """Copies a state and begins to write it; then its manifest, after which older ones beyond `keep` go.

        Of many processes each writes its own parts of arrays, and the first the manifest of all.

        Raises:
          CheckpointError: the disk is too full, or the state before could not be written. Those before it stay.
        """
        self.finish()
        target = self.folder / str(step)
        processes.agreed(lambda: self._make_room(target, tree))
        checkpointer = ocp.StandardCheckpointer()
        with _named(target):
            checkpointer.save(target, tree)
        self._written = self._writer.submit(self._write, checkpointer, target)

    def _write(self, checkpointer: ocp.StandardCheckpointer, target: Path) -> None:
        """Waits for the arrays, then makes this one of the checkpoints; in a thread beside the steps."""
        with _named(target), checkpointer:
            checkpointer.wait_until_finished()
        if processes.first():
            write_text(target / MANIFEST, json.dumps(_hashes(target)))
            for old in self._complete()[: -self.keep]:
                shutil.rmtree(self.folder / str(old))

    def finish(self) -> None:
        """Waits until the state that was saved last lies on the disk.

        Raises:
          CheckpointError, StorageError, OSError: it could not be written. Those before it stay.
        """
        if (written := self._written) is not None:
            self._written = None
            processes.agreed(written.result)
            written.result()

    def _make_room(self, target: Path, tree: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        need = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
        free = shutil.disk_usage(self.folder).free
        if free < 1.1 * need:
            raise CheckpointError(f'{target}: {-(-need // 2**20)} MiB to write, {free // 2**20} MiB free on this disk')
        if target.exists():
            shutil.rmtree(target)

    def restore(self, like: Any) -> Any | None:
        """The newest state whose hashes hold, shaped and sharded as `like`; None if there is none."""
        for step in reversed(self.steps()):
            folder = self.folder / str(step)
            if not processes.agreed(lambda folder=folder: self._good(folder)):
                continue
            with ocp.StandardCheckpointer() as checkpointer:
                return checkpointer.restore(folder, jax.tree.map(ocp.utils.to_shape_dtype_struct, like))
        return None

    def _good(self, folder: Path) -> bool:
        """Whether the hashes hold; else it no longer counts, so that it displaces no good one."""
        if (folder / MANIFEST).read_text() == json.dumps(_hashes(folder)):
            return True
        self.warn(f'{folder}: the checkpoint is damaged (hashes differ); falling back to the one before')
        (folder / MANIFEST).unlink()
        return False
