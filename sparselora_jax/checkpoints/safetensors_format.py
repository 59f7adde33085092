"""Read and write files in the safetensors format: headers, and the bytes of single tensors.

A tensor, or some of its rows, is read into plain host memory. Headers are parsed here, and bytes are read rather than
memory-mapped. Mapped pages may count as memory of the process for a long time, and a damaged file would end the process
with a bus error.

Format: https://huggingface.co/docs/safetensors, "Format": 8 bytes (little-endian) give the length of the header, the
header follows in JSON, then the bytes of the tensors without gaps.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from sparselora_jax.runtime.files import StorageError, unique_names

# The format's names of dtypes.
DTYPES = {
    'F64': np.dtype(np.float64),
    'F32': np.dtype(np.float32),
    'F16': np.dtype(np.float16),
    'BF16': np.dtype(ml_dtypes.bfloat16),
    'I64': np.dtype(np.int64),
    'I32': np.dtype(np.int32),
    'U8': np.dtype(np.uint8),
    'BOOL': np.dtype(np.bool_),
}
_LENGTH_BYTES = 8  # size of the number at the start of a file
_LONGEST_HEADER = 100_000_000  # bytes; the format's own limit


@dataclass(frozen=True)
class Entry:
    """Location of a tensor: bytes `start` to `start + size` of a file."""

    name: str
    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        """Return the number of bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def row_size(self) -> int:
        """Return the number of bytes of one row of the first axis."""
        # A scalar has no rows, and an empty tensor no bytes.
        return self.size // self.shape[0] if self.shape and self.shape[0] else 0


def read(entry: Entry, rows: tuple[int, int] | None = None) -> Shaped[np.ndarray, '...']:
    """Read a tensor, or some of its rows, into a fresh array.

    Args:
      entry: the tensor.
      rows: first row and the row after the last, on the first axis; None: the whole tensor.

    Raises:
      StorageError: the file has been shortened since its header was read.
    """
    start = entry.start
    shape = entry.shape
    if rows is not None:
        start += rows[0] * entry.row_size
        shape = (rows[1] - rows[0], *entry.shape[1:])
    count = math.prod(shape) * entry.dtype.itemsize
    # Read as bytes, since np.fromfile does not know bfloat16. If the file is too short, it returns fewer bytes without
    # an error.
    data = np.fromfile(entry.file, np.uint8, count, offset=start)
    if data.size != count:
        raise StorageError(f'{entry.file}: {entry.name} ends early ({data.size} of {count} bytes); download it again')
    return data.view(entry.dtype).reshape(shape)


def make_header(
    tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]], metadata: dict[str, str] | None = None
) -> tuple[bytes, dict[str, int]]:
    """Return the header bytes of a file with these tensors, and the offset of each tensor.

    Args:
      tensors: name -> (dtype, shape), in the order of the file.
      metadata: strings to keep in the header.

    Returns:
      (header, {name: byte of the file at which the tensor starts}).

    Raises:
      StorageError: the format does not support a dtype.
    """
    dtype_names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {'__metadata__': metadata} if metadata else {}
    offsets: dict[str, int] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        if dtype not in dtype_names:
            known = ', '.join(map(str, dtype_names))
            raise StorageError(f'{name} has dtype {dtype}; safetensors files hold {known}')
        offsets[name] = end
        size = math.prod(shape) * dtype.itemsize
        header[name] = {'dtype': dtype_names[dtype], 'shape': shape, 'data_offsets': [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    # Pad the JSON with spaces, so that the tensors begin at a multiple of 8 bytes.
    text += b' ' * (-len(text) % 8)
    first = _LENGTH_BYTES + len(text)
    starts = {name: first + offset for name, offset in offsets.items()}
    return len(text).to_bytes(_LENGTH_BYTES, 'little') + text, starts


def read_header(file: Path) -> list[Entry]:
    """Return the tensors of one file, in the order of their bytes.

    Raises:
      StorageError: the file is truncated, or not a safetensors file.
    """
    file_size = file.stat().st_size
    with file.open('rb') as stream:
        length = int.from_bytes(stream.read(_LENGTH_BYTES), 'little')
        # The first bytes of any file can be read as a length. Without the limit, a text file could make us allocate
        # gigabytes.
        if file_size < _LENGTH_BYTES or length > _LONGEST_HEADER:
            problem = f'not a safetensors file ({file_size} bytes; its header would be {length} bytes)'
            raise StorageError(f'{file}: {problem}')
        first = _LENGTH_BYTES + length
        if first > file_size:
            raise _truncated(file, f'its header alone takes {first}', file_size)
        text = stream.read(length)
    try:
        header = json.loads(text, object_pairs_hook=unique_names)
        header.pop('__metadata__', None)  # free-form strings, not a tensor
        entries = [_parse_entry(file, name, item, first) for name, item in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StorageError(f'{file}: not a safetensors file: its header does not parse ({error})') from None
    # An empty tensor starts where the next one does, so it has to be sorted before it.
    entries = sorted(entries, key=lambda entry: (entry.start, entry.size))
    end = _check_no_gaps(file, entries, first)
    if end > file_size:
        raise _truncated(file, f'its header promises {end}', file_size)
    # Some bytes belong to no tensor, so the header is from another file or was altered.
    if end < file_size:
        raise StorageError(f'{file}: {file_size} bytes, but its header promises {end}; download it again')
    return entries


def _truncated(file: Path, promise: str, file_size: int) -> StorageError:
    return StorageError(f'{file}: truncated: {file_size} bytes, but {promise}; download it again')


def _parse_entry(file: Path, name: str, item: dict, first: int) -> Entry:
    """Parse the entry of one tensor in a header.

    Args:
      file: the file of the header.
      name: the tensor's name.
      item: the tensor's value in the header.
      first: byte of the file at which the tensors begin; offsets count from there.

    Raises:
      ValueError: the dtype is unknown, or sizes contradict each other.
    """
    if item['dtype'] not in DTYPES:
        raise ValueError(f'{name} has dtype {item["dtype"]}; known are {", ".join(DTYPES)}')
    begin, end = item['data_offsets']
    shape = tuple(item['shape'])
    # JSON allows fractions and negative numbers here; two negative sizes have a positive product.
    if not all(isinstance(number, int) and number >= 0 for number in (begin, end, *shape)):
        raise ValueError(f'{name} has shape {shape} at {begin}:{end}')
    entry = Entry(name, file, DTYPES[item['dtype']], shape, first + begin)
    # A header gives the size twice, by shape and by offsets. If they disagree, other tensors' bytes could be read.
    if entry.size != end - begin:
        raise ValueError(f'{name} of shape {shape} takes {entry.size} bytes, not {end - begin}')
    return entry


def _check_no_gaps(file: Path, entries: Iterable[Entry], first: int) -> int:
    """Check that tensors follow each other without gaps, and return where the last one ends.

    Raises:
      StorageError: two tensors overlap, or there is a gap; an export could then overwrite a tensor.
    """
    end = first
    for entry in entries:
        if entry.start != end:
            raise StorageError(f'{file}: {entry.name} starts at byte {entry.start}, where {end} is due; damaged')
        end = entry.start + entry.size
    return end
