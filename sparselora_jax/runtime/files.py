"""Files that appear whole or not at all, and the lock of a working directory."""

import errno
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from sparselora_jax.runtime.errors import SparseloraError

PARTIAL = '.partial'  # suffix of a file while it is written
LOCK = 'lock'  # file in a working directory that names the process that works there

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}

# Locks of this process. Nothing releases them: the operating system does when the process ends, however it ends.
_LOCKS: dict[Path, FileLock] = {}


class StorageError(SparseloraError, ValueError):
    """A file that is missing, truncated or not what it should be."""


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a file beside `path` to write to, which is renamed to `path` at the end.

    So `path` appears whole or not at all. The bytes reach the disk before the file gets its name: not even a power cut
    leaves half a file.

    Args:
      path: the file to write.

    Raises:
      StorageError: the disk is full. A file that was there before stays.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        yield partial
        _sync(partial)
        partial.replace(path)
        _sync(path.parent)  # a rename is in the folder, which has a cache of its own
    except BaseException as error:
        partial.unlink(missing_ok=True)
        # safetensors wraps the system's errors in one of its own, without their number.
        if isinstance(error, SafetensorError) or getattr(error, 'errno', None) in _NO_ROOM:
            raise StorageError(f'{path} cannot be written ({error}); make room, then start the same again') from None
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file that appears whole or not at all.

    Args:
      path: the file to write.
      text: its content.

    Raises:
      StorageError: the disk is full.
    """
    with whole(path) as partial:
        partial.write_text(text)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)  # a folder opens no other way
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hold(folder: Path) -> None:
    """Make a folder, and keep other processes out of it until this one ends.

    A process may hold a folder that it holds already.

    Args:
      folder: the working directory.

    Raises:
      StorageError: another process holds it; names that process.
    """
    path = folder.resolve() / LOCK
    if path in _LOCKS:
        return
    folder.mkdir(parents=True, exist_ok=True)
    # Soft locks outlive a process that was killed, so a file system without real ones gets none.
    lock = FileLock(path, blocking=False, thread_local=False, fallback_to_soft=False, on_acquired=_write_holder)
    try:
        lock.acquire()
    except Timeout:
        holder = path.read_text().strip()
        raise StorageError(f'{folder}: another run is in it ({holder}); use another workdir') from None
    except OSError as error:
        # Some file systems of clusters have no locks. Other errors (no permission, no room) stay errors.
        if error.errno not in _NO_LOCKS:
            raise
        print(f'{folder} cannot be locked ({error}): make sure that no other run uses it', file=sys.stderr)
    _LOCKS[path] = lock


def _write_holder(descriptor: int) -> None:
    """Write into the lock file who holds it."""
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f'process {os.getpid()} on {socket.gethostname()}\n'.encode())
