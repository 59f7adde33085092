"""Files that appear whole or not at all, and the lock of a working directory."""

import errno
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from safetensors import SafetensorError

from sparselora_jax.runtime.errors import SparseloraError


class StorageError(SparseloraError, ValueError):
    """A file that is missing, truncated or not what it should be."""


PARTIAL = '.partial'  # of a file's name while it is written
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, which takes its place at the end: `path` appears whole or not at all.

    Its bytes are on the disk before it has its name, so that not even a power cut leaves half of it.

    Raises:
      StorageError: there is no room. What was there before stays.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        yield partial
        _sync(partial)
        partial.replace(path)
        _sync(path.parent)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, SafetensorError) or getattr(error, 'errno', None) in _NO_ROOM:
            raise StorageError(f'{path} cannot be written ({error}); make room, then start the same again') from None
        raise


def _sync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


LOCK = 'lock'  # in a workdir: who works in it
_HELD: dict[Path, IO] = {}


def hold(folder: Path) -> None:
    """Makes a folder, and keeps other processes out of it until this one ends, however it ends.

    Raises:
      StorageError: another one is in it.
    """
    path = folder.resolve() / LOCK
    if path in _HELD:
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = path.open('a+')
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise StorageError(f'{folder}: another run is in it ({file.read().strip()}); use another workdir') from None
    except OSError as error:  # some file systems of clusters have no locks
        print(f'{folder} cannot be locked ({error}): see to it that no other run is in it', file=sys.stderr)
    file.truncate(0)
    file.write(f'process {os.getpid()} on {socket.gethostname()}\n')
    file.flush()
    _HELD[path] = file


def write_text(path: Path, text: str) -> None:
    """Writes a file that appears whole or not at all."""
    with whole(path) as partial:
        partial.write_text(text)
