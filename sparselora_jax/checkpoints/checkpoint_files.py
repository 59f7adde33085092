"""The tensors of a Hugging Face directory, read one at a time (or some rows of one) into plain host memory.

Headers are parsed here and bytes are read at their place, not mapped: mapped pages would count as memory of the process
for as long as the kernel likes, and a damaged file would end it with a bus error.

Format: https://huggingface.co/docs/safetensors, "Format": 8 bytes (little-endian) that say the header's length, the
header in JSON, then the tensors' bytes without gaps.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from jaxtyping import Shaped

from sparselora_jax.checkpoints.trees import DTYPES
from sparselora_jax.runtime.files import StorageError

CONFIG, SINGLE, INDEX = 'config.json', 'model.safetensors', 'model.safetensors.index.json'
PICKLES = ('.bin', '.pt', '.pth', '.ckpt', '.pkl')
_LONGEST_HEADER = 100_000_000  # bytes; the format's own limit


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: bytes `start` to `start + size` of a file."""

    name: str
    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def row_size(self) -> int:
        """Bytes of one row of the first axis."""
        return self.size // self.shape[0] if self.shape and self.shape[0] else 0


@dataclass(frozen=True)
class Checkpoint:
    """Every tensor of a directory, by name, and the files that hold them."""

    folder: Path
    files: tuple[Path, ...]
    entries: dict[str, Entry]


def read(entry: Entry, rows: tuple[int, int] | None = None) -> Shaped[np.ndarray, '...']:
    """A tensor, or its rows `rows[0]` to `rows[1]` of the first axis, in a fresh array.

    Raises:
      StorageError: the file has become shorter since its header was read.
    """
    start, shape = entry.start, entry.shape
    if rows is not None:
        start, shape = start + rows[0] * entry.row_size, (rows[1] - rows[0], *shape[1:])
    count = math.prod(shape) * entry.dtype.itemsize
    data = np.fromfile(entry.file, np.uint8, count, offset=start)
    if data.size != count:
        raise StorageError(f'{entry.file}: {entry.name} ends early ({data.size} of {count} bytes); download it again')
    return data.view(entry.dtype).reshape(shape)


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """The tensors of `model.safetensors`, or of the shards that `model.safetensors.index.json` names; none is read.

    Raises:
      StorageError: the directory, its config.json or its weights are missing, the weights are pickled, a file is
        truncated or damaged, or the index does not fit the shards.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise StorageError(f'{folder}: no such directory')
    if not (folder / CONFIG).is_file():
        raise StorageError(f'{folder}: no {CONFIG}; expected a model directory, as save_pretrained writes it')
    if (folder / INDEX).is_file():
        index = _read_index(folder)
        files = tuple(folder / name for name in dict.fromkeys(index.values()))
    elif (folder / SINGLE).is_file():
        index, files = {}, (folder / SINGLE,)
    else:
        raise _no_weights(folder)
    entries: dict[str, Entry] = {}
    for file in files:
        for entry in read_header(file):
            if entry.name in entries:
                raise StorageError(f'{file}: {entry.name} also lies in {entries[entry.name].file.name}; expected once')
            entries[entry.name] = entry
    for name, file in index.items():
        if name not in entries or entries[name].file != folder / file:
            raise StorageError(f'{folder / INDEX}: {name} should lie in {file}, which has no such tensor')
    return Checkpoint(folder, files, entries)


def _no_weights(folder: Path) -> StorageError:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if not pickles:
        return StorageError(f'{folder}: neither {SINGLE} nor {INDEX}; download the weights into it')
    return pickled(folder, f'the weights are pickled ({", ".join(pickles[:3])})', f'{folder}-safetensors')


def pickled(source: str | Path, problem: str, target: str) -> StorageError:
    """The error of weights that are not safetensors: why only those are read, and a command that writes them.

    Args:
      source: a directory, or the id of a hub repository.
      problem: what is wrong with it.
      target: the directory to convert it to.
    """
    # Written for whoever may run it: it needs torch, and unpickles where the user has decided to trust the file.
    convert = (
        'python -c "import sys, transformers as t; s, d = sys.argv[1:]; '
        'a = t.AutoConfig.from_pretrained(s).architectures[0]; '
        "getattr(t, a).from_pretrained(s, dtype='auto').save_pretrained(d, safe_serialization=True)"
        f'" {source} {target}'
    )
    return StorageError(
        f'{source}: {problem}, and unpickling runs whatever code the file holds, so only safetensors are read. If you '
        f'trust the file, convert it (with torch), then copy the tokenizer and processor files too: {convert}'
    )


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose names must differ."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f'it names {twice} twice')
    return found


def _read_index(folder: Path) -> dict[str, str]:
    """Tensor name -> file, both as the index writes them; no file lies outside the directory.

    Names alone are looked at, not where links lead: the hub's own cache is a directory of links to files elsewhere.
    """
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(), object_pairs_hook=_pairs)['weight_map']
        names = set(index.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(f'{path}: not an index of safetensors ({error}); download it again') from None
    for name in sorted(names, key=str):
        if not isinstance(name, str) or not name.endswith('.safetensors'):
            raise StorageError(f'{path}: it names {name!r}; expected the name of a .safetensors file')
        if PurePosixPath(name).is_absolute() or '..' in PurePosixPath(name).parts or '\\' in name or ':' in name:
            raise StorageError(f'{path}: it names {name!r}, outside the directory; do not use this checkpoint')
        if not (folder / name).is_file():
            missing = sorted(tensor for tensor, file in index.items() if file == name)
            raise StorageError(f'{path}: shard {name} ({len(missing)} tensors) is missing; download it into {folder}')
    if not names:
        raise StorageError(f'{path}: it names no tensor; download it again')
    return index


def read_header(file: Path) -> list[Entry]:
    """The tensors of one file, in the order of their bytes.

    Raises:
      StorageError: it is truncated, or not a safetensors file.
    """
    have = file.stat().st_size
    with file.open('rb') as stream:
        length = int.from_bytes(stream.read(8), 'little')
        if have < 8 or length > _LONGEST_HEADER:
            raise StorageError(f'{file}: not a safetensors file ({have} bytes; its header would be {length} bytes)')
        if 8 + length > have:
            raise _truncated(file, f'its header alone takes {8 + length}', have)
        text = stream.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_pairs)
        header.pop('__metadata__', None)
        entries = [_entry(file, name, item, 8 + length) for name, item in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(f'{file}: not a safetensors file: its header does not parse ({error})') from None
    entries = sorted(entries, key=lambda entry: (entry.start, entry.size))
    end = _end_without_gaps(file, entries, 8 + length)
    if end > have:
        raise _truncated(file, f'its header promises {end}', have)
    if end < have:
        raise StorageError(f'{file}: {have} bytes, but its header promises {end}; download it again')
    return entries


def _truncated(file: Path, promise: str, have: int) -> StorageError:
    return StorageError(f'{file}: truncated: {have} bytes, but {promise}; download it again')


def _entry(file: Path, name: str, item: dict, base: int) -> Entry:
    if item['dtype'] not in DTYPES:
        raise ValueError(f'{name} has dtype {item["dtype"]}; known are {", ".join(DTYPES)}')
    begin, end = item['data_offsets']
    shape = tuple(item['shape'])
    if not all(isinstance(number, int) and number >= 0 for number in (begin, end, *shape)):
        raise ValueError(f'{name} has shape {shape} at {begin}:{end}')
    entry = Entry(name, file, DTYPES[item['dtype']], shape, base + begin)
    if entry.size != end - begin:
        raise ValueError(f'{name} of shape {shape} takes {entry.size} bytes, not {end - begin}')
    return entry


def _end_without_gaps(file: Path, entries: Iterable[Entry], end: int) -> int:
    """The end of the last tensor; two that overlap, or a gap, are damage (and an export would write over one)."""
    for entry in entries:
        if entry.start != end:
            raise StorageError(f'{file}: {entry.name} starts at byte {entry.start}, where {end} is due; damaged')
        end = entry.start + entry.size
    return end
