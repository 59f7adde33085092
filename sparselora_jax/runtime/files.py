"""Atomic file writes, and the lock of a working directory."""

import errno
import fcntl
import json
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from sparselora_jax.runtime.errors import SparseloraError

# The umask can only be read by setting it.
_UMASK = os.umask(0)
os.umask(_UMASK)
PARTIAL = '.partial'  # suffix of a file while it is being written
LOCK = 'lock'  # lock file in a working directory, which names the process that uses it

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}

# Locks that this process holds. The operating system releases them when the process ends, even after a crash.
_LOCKS: dict[Path, FileLock] = {}


class StorageError(SparseloraError, ValueError):
    """A file that is missing, truncated or has the wrong content."""


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and rename the file to `path` at the end.

    The write is atomic: `path` is either complete or unchanged. The bytes reach the disk before the rename, so even a
    power cut leaves no partial file.

    Args:
      path: the file to write.

    Raises:
      StorageError: the disk is full. An existing file at `path` is kept.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        yield partial
        # Some writers make files that only their owner may read. Others get to read this one as the umask says.
        partial.chmod(0o666 & ~_UMASK)
        _sync(partial)
        partial.replace(path)
        _sync(path.parent)  # the rename changes the folder, which is cached separately
    except BaseException as error:
        partial.unlink(missing_ok=True)
        # safetensors wraps operating system errors in its own class, without the errno.
        if isinstance(error, SafetensorError) or getattr(error, 'errno', None) in _NO_ROOM:
            raise StorageError(f'{path} cannot be written ({error}); make room, then run the command again') from None
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically: it is either complete or unchanged.

    Args:
      path: the file to write.
      text: its content.

    Raises:
      StorageError: the disk is full.
    """
    with whole(path) as partial:
        partial.write_text(text)


def link(source: Path, target: Path) -> None:
    """Link a file to another place, or copy it if the disk does not support hard links; an existing target is kept.

    Args:
      source: the file.
      target: its other place.
    """
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        with whole(target) as partial:
            shutil.copy2(source, partial)  # with its time, so that its digest need not be taken again


def read_json(path: Path, remedy: str, *, has_unique_names: bool = False) -> dict[str, Any]:
    """Read a JSON object.

    Args:
      path: the file.
      remedy: what to do if it is damaged; the end of the message.
      has_unique_names: refuse an object that names a field twice.

    Raises:
      StorageError: the file is not a JSON object; the message names the position of the fault.
    """
    if not path.is_file():
        # Opening a pipe would wait for ever.
        raise StorageError(f'{path}: not a file; {remedy}')
    try:
        values = json.loads(path.read_bytes(), object_pairs_hook=unique_names if has_unique_names else None)
    except (ValueError, RecursionError) as error:  # thousands of brackets exhaust the stack
        raise StorageError(f'{path}: not JSON ({error}); {remedy}') from None
    if not isinstance(values, dict):
        raise StorageError(f'{path}: not a JSON object; {remedy}')
    return values


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dict, for `json.loads(object_pairs_hook=)`.

    Raises:
      ValueError: a name occurs twice; Python would keep the last value and say nothing.
    """
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f'it names {twice} twice')
    return values


def _sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's list of names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)  # a folder can only be opened read-only
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hold(folder: Path) -> None:
    """Create a folder, and lock it against other processes until this one ends.

    Calling this again for the same folder does nothing.

    Args:
      folder: the working directory.

    Raises:
      StorageError: another process holds the lock; the message names that process.
    """
    # Not `resolve`, which raises RuntimeError for a loop of links; making the folder raises an OSError with its path.
    path = Path(os.path.realpath(folder)) / LOCK
    if path in _LOCKS:
        return
    folder.mkdir(parents=True, exist_ok=True)
    # Soft locks outlive a killed process. So on a file system without real locks, no lock is used.
    lock = FileLock(path, blocking=False, thread_local=False, fallback_to_soft=False, on_acquired=_write_holder)
    try:
        lock.acquire()
    except Timeout:
        raise _held(folder, path) from None
    except OSError as error:
        # Some cluster file systems have no locks. Other errors (no permission, disk full) are raised.
        if error.errno not in _NO_LOCKS:
            raise
        print(f'{folder} cannot be locked ({error}): make sure that no other run uses it', file=sys.stderr)
    _LOCKS[path] = lock


def refuse_held(folder: Path) -> None:
    """Check that no other process has locked a folder, without writing into it.

    Args:
      folder: the working directory, which need not exist.

    Raises:
      StorageError: another process holds the lock; the message names that process.
    """
    path = Path(os.path.realpath(folder)) / LOCK
    if path in _LOCKS or not path.is_file():
        return
    with path.open() as file:
        try:
            # Given back when the file is closed.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _held(folder, path) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise


def _held(folder: Path, path: Path) -> StorageError:
    """Return the error of a folder that another process has locked."""
    return StorageError(f'{folder}: another run is in it ({path.read_text().strip()}); use another folder')


def _write_holder(descriptor: int) -> None:
    """Write the holder's process id and host name into the lock file."""
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f'process {os.getpid()} on {socket.gethostname()}\n'.encode())
