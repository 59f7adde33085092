"""Recognise files that have changed: by size and time first, and by content where these differ or where it matters."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from sparselora_jax.runtime.files import StorageError, read_json

STAMP = 'sha256'  # the field of a stamped JSON file that holds the hash of all other fields
DigestKind = TypeVar('DigestKind')  # `Digest`, or another class of named tuples
LARGE = 2**30  # bytes to hash above which a line says that this takes time


class Digest(NamedTuple):
    """A file as it was at some time.

    Attributes:
      size: number of bytes.
      mtime_ns: time of the last change. A copy of a file may have another one.
      sha256: hash of the content.
    """

    size: int
    mtime_ns: int
    sha256: str


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, whatever its size.

    Args:
      path: the file.
    """
    with path.open('rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def take(files: Mapping[str, Path], known: Mapping[str, Digest] | None = None) -> dict[str, Digest]:
    """Return the digests of files.

    Args:
      files: name -> file.
      known: earlier digests by the same names. A file whose size and time are those of its earlier digest is not read.
    """
    known = known or {}
    status = {name: file.stat() for name, file in files.items()}
    to_hash = [
        name
        for name, of_file in status.items()
        if name not in known or known[name][:2] != (of_file.st_size, of_file.st_mtime_ns)
    ]
    size = sum(status[name].st_size for name in to_hash)
    if size > LARGE:
        print(f'hashing {size / 2**30:.1f} GiB, once for these files', flush=True)
    # hashlib releases the lock of the interpreter, so shards are hashed at the same time.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        hashes = dict(zip(to_hash, pool.map(lambda name: sha256(files[name]), to_hash), strict=True))
    return {
        name: Digest(of_file.st_size, of_file.st_mtime_ns, hashes.get(name) or known[name].sha256)
        for name, of_file in status.items()
    }


def difference(file: Path, digest: Digest, *, reads: bool) -> str:
    """Return how a file differs from its digest, or '' if it does not.

    Args:
      file: the file.
      digest: its earlier digest.
      reads: compare the content even if size and time are unchanged. They are after a bit has flipped on the disk.
    """
    if not file.is_file():
        return 'is missing'
    status = file.stat()
    if status.st_size != digest.size:
        return f'has {status.st_size:,} bytes, {digest.size:,} were written'
    if (reads or status.st_mtime_ns != digest.mtime_ns) and sha256(file) != digest.sha256:
        return 'is damaged: its content is not what was written'
    return ''


def to_json(digests: Mapping[str, tuple]) -> dict[str, Any]:
    """Return digests as values that JSON can hold.

    Args:
      digests: digests by name, named tuples of any class.
    """
    return {name: digest._asdict() for name, digest in digests.items()}


def from_json(values: Mapping[str, Any], kind: type[DigestKind]) -> dict[str, DigestKind]:
    """Return the digests of which `to_json` made values.

    Args:
      values: result of `to_json`.
      kind: the class of the digests.
    """
    return {name: kind(**fields) for name, fields in values.items()}


def stamp(values: Mapping[str, Any], owner: str) -> str:
    """Return values as JSON, with a hash that `read_stamped` checks.

    Args:
      values: fields that JSON can hold.
      owner: whose values these are; part of the hash, so that a file of another owner is noticed.
    """
    return json.dumps({**values, STAMP: _hash_of(values, owner)})


def read_stamped(path: Path, remedy: str, owner: str) -> dict[str, Any]:
    """Read a file of `stamp`.

    Args:
      path: the file.
      remedy: what to do if it is damaged; the end of the message.
      owner: see `stamp`.

    Raises:
      StorageError: the file is not JSON, has changed since it was written, or is another owner's.
    """
    values = read_json(path, remedy)
    written = values.pop(STAMP, None)
    if written != _hash_of(values, owner):
        raise StorageError(f'{path}: has changed since it was written, or is a file of another run; {remedy}')
    return values


def _hash_of(values: Mapping[str, Any], owner: str) -> str:
    # Numbers and texts survive a round trip through JSON, so the text of what was read is the text that was written.
    return hashlib.sha256(json.dumps([owner, values]).encode()).hexdigest()


def files_in(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    """Return the files of some names, those within folders included; names that do not exist are left out.

    Args:
      folder: the folder of the names.
      names: names of files and folders.

    Returns:
      Files by their path relative to `folder`, in order.
    """
    found = []
    for name in names:
        path = folder / name
        found += sorted(file for file in path.rglob('*') if file.is_file()) if path.is_dir() else [path]
    return {str(file.relative_to(folder)): file for file in found if file.is_file()}
