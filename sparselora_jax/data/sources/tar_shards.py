"""Tar files of images and captions, as img2dataset writes them: a sample is a few members with the same key.

A shard `00000.tar` holds `000000000.jpg`, `000000000.txt` and `000000000.json` for each sample. The caption is the
text of the `.txt`; without one, the field `caption` of the `.json`. Other members are ignored, and so are those whose
names begin with `._`, which archives made on a Mac have beside each file.

Only the headers of a tar file are read to index it; images and captions are then read by their place. The index of a
file is kept in the folder of prepared data, and used again as long as the file has the same size and time.
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import filelock
import numpy as np
from jaxtyping import Int64

from sparselora_jax.data.benchmarks import records
from sparselora_jax.data.benchmarks.picture_files import IMAGE_SUFFIXES
from sparselora_jax.data.parts import find_part
from sparselora_jax.data.sources.pictures import FilePart, ImagePart
from sparselora_jax.data.sources.place import Place
from sparselora_jax.data.sources.source import SourceRecord
from sparselora_jax.runtime import files, os_errors
from sparselora_jax.runtime.errors import DataError

SUFFIX = '.tar'
CAPTION_FIELD = 'caption'
SHOWN = 3  # samples that a note names
_COMPRESSED_SUFFIXES = ('.tar.gz', '.tgz', '.tar.bz2', '.tar.xz', '.tar.zst')
# The first bytes of files of gzip, bzip2, xz and zstandard.
_COMPRESSED_STARTS = (b'\x1f\x8b', b'BZh', b'\xfd7zXZ', b'\x28\xb5\x2f\xfd')
# Columns of an index: where the image begins and its bytes, then those of the caption, and whether it is JSON.
_COLUMNS = 5


@dataclass(frozen=True)
class Shard:
    """A tar file that has been indexed.

    Attributes:
      path: the file.
      rows: for each sample: offset and size of the image, offset and size of the caption, 1 if the caption is JSON.
      keys: key of each sample.
      incomplete: keys of samples that lack an image or a caption.
    """

    path: Path
    rows: Int64[np.ndarray, 'samples 5']
    keys: list[str]
    incomplete: tuple[str, ...]


class TarShards:
    """The samples of tar files, in their order; see `source.OpenedSource`."""

    def __init__(self, shards: Sequence[Shard], index_dir: Path | None):
        """Take indexed files together.

        Args:
          shards: the files, in order.
          index_dir: folder in which their indices are kept; None: they are not kept.
        """
        self.shards = shards
        self.index_dir = index_dir
        self.notes = _notes(shards)
        self._ends = np.cumsum([len(shard.rows) for shard in shards])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> SourceRecord:
        shard, row = self._find(index)
        image_offset, image_size, caption_offset, caption_size, is_json = shard.rows[row].tolist()
        image = ImagePart(FilePart(shard.path, image_offset, image_size), f'{shard.path}, image {shard.keys[row]}')
        data = FilePart(shard.path, caption_offset, caption_size).read()
        try:
            caption = _caption_of_json(data) if is_json else data.decode()
        except (ValueError, RecursionError, DataError) as error:
            member = '.json' if is_json else '.txt'
            raise DataError(f'{self.name_record(index)}: no caption in its {member} ({error})') from None
        return SourceRecord(image, caption.strip())

    def keep_index(self) -> None:
        """Write the index of each file that has none, for the next run."""
        if self.index_dir is None:
            return
        try:
            self.index_dir.mkdir(parents=True, exist_ok=True)
            # Other processes and runs may keep the same indices. They are not waited for: where a file system has no
            # locks, the lock of a process that was killed stays.
            with filelock.FileLock(self.index_dir / 'lock', blocking=False):
                for shard in self.shards:
                    _save_index(_index_file(self.index_dir, shard.path), shard)
        except (OSError, files.StorageError):
            # A folder that cannot be written to, or is locked, costs time in the next run, and nothing else.
            return

    def _find(self, index: int) -> tuple[Shard, int]:
        number, row = find_part(self._ends, index)
        return self.shards[number], row

    def image_name(self, index: int) -> str:
        """Return the name of the file and the key of a sample.

        Args:
          index: which record.
        """
        shard, row = self._find(index)
        return f'{shard.path.name}/{shard.keys[row]}'

    def name_record(self, index: int) -> str:
        """Return the file and the key of a sample.

        Args:
          index: which record.
        """
        shard, row = self._find(index)
        return f'{shard.path}, sample {shard.keys[row]}'


def _caption_of_json(data: bytes) -> str:
    return records.text(json.loads(data), CAPTION_FIELD)


def _notes(shards: Sequence[Shard]) -> tuple[str, ...]:
    """Return a note about samples without image or caption, if there are any."""
    incomplete = [f'{key} of {shard.path.name}' for shard in shards for key in shard.incomplete]
    if not incomplete:
        return ()
    names = ', '.join(incomplete[:SHOWN])
    return (f'{len(incomplete):,} samples without image or caption are left out, such as {names}',)


def index_shard(path: Path) -> Shard:
    """Read the headers of a tar file.

    Args:
      path: the file.

    Raises:
      DataError: the file is damaged or cut off, or two samples have the same key.
    """
    images: dict[str, tuple[int, int]] = {}
    texts: dict[str, tuple[int, int]] = {}
    fields: dict[str, tuple[int, int]] = {}
    by_suffix = dict.fromkeys(IMAGE_SUFFIXES, images) | {'.txt': texts, '.json': fields}
    keys: dict[str, None] = {}  # as a dict, which keeps the order
    count = 0
    try:
        # Without compression only ('r:'): members of a compressed file have no places.
        with tarfile.open(path, 'r:') as archive:
            for member in archive:
                count += 1
                key, suffix = os.path.splitext(member.name)
                places = by_suffix.get(suffix.lower())
                if places is None or not member.isreg() or os.path.basename(key).startswith('._'):
                    continue
                if key in places:
                    raise DataError(f'{path}: two members {member.name}; each sample needs its own key')
                keys[key] = None
                places[key] = (member.offset_data, member.size)
                # tarfile remembers all members, which would cost more than the index.
                archive.members = []
            # tarfile takes a header that is cut off for the end of the archive.
            if not _has_end_mark(path, archive.offset):
                raise tarfile.ReadError('no end mark')
    except tarfile.ReadError as error:
        if _begins_compressed(path):
            raise DataError(f'{path}: a compressed tar file, whose members have no places; unpack it') from None
        reason = str(error)
        cut = f' behind {count:,} members' if count else ''
        raise DataError(f'{path}: not a tar file, or cut off{cut} ({reason}); download it again') from None
    except OSError as error:
        raise DataError(os_errors.describe(error)) from None
    rows = []
    complete = []
    for key in keys:
        caption = texts.get(key) or fields.get(key)
        if key in images and caption is not None:
            rows.append((*images[key], *caption, int(key not in texts)))
            complete.append(key)
    incomplete = tuple(key for key in keys if key not in set(complete)) if len(complete) < len(keys) else ()
    return Shard(path, np.array(rows, np.int64).reshape(-1, _COLUMNS), complete, incomplete)


def is_compressed(path: Path) -> bool:
    """Return whether the name of a file is that of a compressed tar file.

    Args:
      path: the file.
    """
    return path.name.lower().endswith(_COMPRESSED_SUFFIXES)


def _begins_compressed(path: Path) -> bool:
    """Return whether a file begins as compressed files do."""
    with path.open('rb') as file:
        return file.read(8).startswith(_COMPRESSED_STARTS)


def _has_end_mark(path: Path, offset: int) -> bool:
    """Return whether a tar file ends as it must where its last member ends: with a block of zeros."""
    with path.open('rb') as file:
        file.seek(offset)
        return file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)


def _load_or_index(path: Path, index_dir: Path | None) -> Shard:
    """Return the index of a tar file: the one that was kept, or what the headers say."""
    kept = None if index_dir is None else _load_index(_index_file(index_dir, path), path)
    return index_shard(path) if kept is None else kept


def _index_file(index_dir: Path, path: Path) -> Path:
    """Return the file of an index, whose name changes with the tar file, so that it never belongs to another one."""
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(os_errors.describe(error)) from None
    stamp = f'{path.absolute()}\0{status.st_size}\0{status.st_mtime_ns}'
    return index_dir / f'{hashlib.sha256(stamp.encode()).hexdigest()[:32]}.npz'


def _load_index(file: Path, path: Path) -> Shard | None:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            rows = arrays['rows']
            names = json.loads(arrays['names'].tobytes())
            keys = list(names['keys'])
            incomplete = tuple(names['incomplete'])
    # A damaged index is only written again: it holds nothing that the tar file does not.
    except Exception:
        return None
    if rows.dtype != np.int64 or rows.shape != (len(keys), _COLUMNS):
        return None
    return Shard(path, rows, keys, incomplete)


def _save_index(file: Path, shard: Shard) -> None:
    if _load_index(file, shard.path) is not None:
        return
    # JSON, because names in a tar file may hold line breaks, and bytes that are not UTF-8.
    names = json.dumps({'keys': shard.keys, 'incomplete': shard.incomplete}).encode()
    with files.whole(file) as partial, partial.open('wb') as target:
        np.savez_compressed(target, rows=shard.rows, names=np.frombuffer(names, np.uint8))


class TarFormat:
    """Opens tar files; see `source.SourceFormat`."""

    title = 'tar shards with .jpg, .txt and .json, as img2dataset writes them'
    takes_images = False

    def open(self, place: Place) -> TarShards | None:
        """Return the samples; None if there are no tar files.

        Args:
          place: a tar file, or a folder with tar files.

        Raises:
          DataError: a file is damaged, or no sample has an image and a caption.
        """
        if place.path.is_file():
            paths = [place.path] if place.path.suffix.lower() == SUFFIX else []
        else:
            found = [*place.path.glob(f'*{SUFFIX}'), *place.path.glob(f'*/*{SUFFIX}')]
            paths = sorted(path for path in found if path.is_file())
        if not paths:
            return None
        index_dir = place.index_dir and place.index_dir / 'tar_index'
        shards = [_load_or_index(path, index_dir) for path in paths]
        if not any(len(shard.rows) for shard in shards):
            raise DataError(f'{place.path}: no sample with an image and a caption (.txt or .json) in its tar files')
        return TarShards(shards, index_dir)
