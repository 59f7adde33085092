"""Write params, masks or lora to one safetensors file, and read it back; the names of tensors are paths."""

import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array, PyTree
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sparselora_jax.checkpoints.safetensors_format import make_header
from sparselora_jax.runtime import processes
from sparselora_jax.runtime.files import StorageError, whole
from sparselora_jax.sparse import rules
from sparselora_jax.sparse.axes import KernelAxes
from sparselora_jax.sparse.packing import ReducedMatrix, Stored, is_packed, stored
from sparselora_jax.sparse.weights import Adapted, Lora

# The entry of a header with a checksum of each array, and of the other entries under ''.
CHECKSUMS = 'checksums'
# Words of 64 bits in a row, see `_checksum`. It is a prime, so that blocks of a disk that change places move to other
# columns.
_ROW = 1021

# Writes one layer: `write(path, layer, array)`.
WriteLayer = Callable[[str, int, Any], None]


def save_safetensors(path: str | Path, tree: PyTree, *, metadata: dict[str, str] | None = None) -> None:
    """Write params (packed or not), masks or lora; the file appears either complete or not at all.

    Every process of a run must call this. The first process writes, and all have the file afterwards.

    Args:
      path: the file.
      tree: params, masks or lora, as nested dicts with string keys. An `Adapted` kernel must be a packed one, which
        carries its mask. The state of an NNX model or an Equinox module is no nested dict: store it with the serialiser
        of its library, or store masks and lora, and merge them again (docs/concepts.md).
      metadata: strings kept in the header, e.g. the config that made the tree.

    Raises:
      StorageError: the tree is no nested dict, or a leaf has an unsupported type.
    """
    path = Path(path)
    arrays: dict[str, Any] = {}
    # Metadata in the header for leaves that consist of several arrays, by the leaf's path.
    scales: dict[str, float] = {}
    axes: dict[str, list[tuple[int, ...]]] = {}
    packed: dict[str, Any] = {}
    try:
        leaves = list(_leaves(tree))
    except rules.RuleError as error:
        remedy = 'store other trees with the serialiser of their library'
        raise StorageError(f'{path}: {error}; {remedy}') from None
    for name, leaf in leaves:
        if isinstance(leaf, Lora):
            arrays[f'{name}/a'] = leaf.a
            arrays[f'{name}/b'] = leaf.b
            scales[name] = leaf.scale
            # Only where they matter, so that files of ordinary factors are as other programs expect them.
            if leaf.axes is not None:
                axes[name] = [leaf.axes.layers, leaf.axes.inputs, leaf.axes.outputs]
        elif isinstance(leaf, ReducedMatrix):
            raise StorageError(f'{path}: {name} is packed with several axes, for memory only; save sl.unpack(params)')
        elif isinstance(leaf, Stored):
            packed[name] = stored.header_of(leaf)
            arrays |= {f'{name}/{part}': array for part, array in leaf.to_arrays().items()}
        elif hasattr(leaf, '__array__'):
            arrays[name] = leaf
        else:
            raise StorageError(f'{path}: {name} is a {type(leaf).__name__}, which safetensors files here do not hold')
    # Every process takes part in collecting an array, although only the first keeps it.
    arrays = {name: processes.on_first(array) for name, array in arrays.items()}
    header = dict(metadata or {})
    if scales:
        header['lora_scales'] = json.dumps(scales)
    if axes:
        header['lora_axes'] = json.dumps(axes)
    if packed:
        header['packed'] = json.dumps(packed)
    if processes.first():
        header[CHECKSUMS] = json.dumps(_checksums(arrays, header))
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as partial:
            save_file(arrays, partial, metadata=header)
            _sort_metadata(partial)
    processes.wait(path.name)  # otherwise another process could look for the file too early


def _sort_metadata(path: Path) -> None:
    """Sort the strings of a header, which safetensors writes in random order: equal trees give equal files."""
    with path.open('r+b') as file:
        size = int.from_bytes(file.read(8), 'little')
        header = json.loads(file.read(size))
        header['__metadata__'] = dict(sorted(header['__metadata__'].items()))
        data = json.dumps(header, separators=(',', ':'), ensure_ascii=False).encode()
        # The arrays begin at a fixed place, and the format allows spaces before them.
        if len(data) > size:
            raise StorageError(f'{path}: the header takes {len(data)} bytes, and safetensors wrote {size}')
        file.seek(8)
        file.write(data.ljust(size))


def _leaves(tree: PyTree) -> Iterator[tuple[str, Any]]:
    """Yield (path, leaf); a packed kernel and its factors are yielded one after the other, with the same path."""
    for name, leaf in rules.flatten(tree).items():
        # With another gradient the factors would mean other weights, and the file cannot store that.
        if isinstance(leaf, Adapted) and is_packed(leaf.kernel) and leaf.gradient == 'exact':
            yield name, leaf.kernel
            yield name, leaf.lora
        else:
            yield name, leaf


@contextmanager
def layer_writer(path: str | Path, like: Mapping[str, Any]) -> Iterator[WriteLayer]:
    """Write a file of stacked arrays a layer at a time, in any order; it appears complete or not at all.

    Every process of a run must write every layer. The first process writes the file.

    Args:
      path: the file.
      like: path -> anything with the `shape` and `dtype` of the stacked array.

    Yields:
      `write(path, layer, array)`.
    """
    path = Path(path)
    tensors = {name: (np.dtype(leaf.dtype), leaf.shape) for name, leaf in like.items()}
    header, starts = make_header(tensors)
    file_size = len(header) + sum(math.prod(shape) * dtype.itemsize for dtype, shape in tensors.values())
    if not processes.first():
        # Copying an array to the host is a collective, so the other processes take part and drop the result.
        yield lambda name, layer, array: processes.on_host(array)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as partial, partial.open('wb') as file:
            file.write(header)
            # The file gets its full length at once, so layers may come in any order, and a full disk is noticed early.
            file.truncate(file_size)

            def write(name: str, layer: int, array: Any) -> None:
                host_array = processes.on_host(array).astype(like[name].dtype, copy=False)
                data = np.ascontiguousarray(host_array).reshape(-1).view(np.uint8)
                file.seek(starts[name] + layer * data.size)
                file.write(data)

            yield write
    processes.wait(path.name)


@contextmanager
def _open_safetensors(path: str | Path) -> Iterator[safe_open]:
    """Open a safetensors file.

    Raises:
      StorageError: the file is missing, truncated or not safetensors.
    """
    path = Path(path)
    if not path.is_file():
        raise StorageError(f'{path}: no such file')
    try:
        # 'flax' rather than 'numpy': NumPy alone has no bfloat16.
        with safe_open(path, framework='flax') as file:
            yield file
    except SafetensorError as error:
        raise StorageError(f'{path}: not a complete safetensors file ({error})') from None


def read_metadata(path: str | Path) -> dict[str, str]:
    """Return the strings in a file's header; nothing else is read.

    Args:
      path: the file.

    Raises:
      StorageError: see `load_safetensors`.
    """
    with _open_safetensors(path) as file:
        return dict(file.metadata() or {})


def load_safetensors(path: str | Path) -> tuple[dict, dict[str, str]]:
    """Read a tree back, bit for bit.

    Args:
      path: a file of `save_safetensors` or `layer_writer`.

    Returns:
      (tree, metadata).

    Raises:
      StorageError: the file is missing, truncated, not safetensors, or not what was written.
      PackingError: packed arrays contradict their format; the message names the path.
    """
    with _open_safetensors(path) as file:
        # `safe_open` has `keys` but is not a mapping: it cannot be iterated.
        flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = dict(file.metadata() or {})
    if CHECKSUMS in metadata:  # `layer_writer` writes none
        _check_checksums(path, flat, metadata)
    axes = _parse_entry(path, metadata, 'lora_axes')
    for name, scale in _parse_entry(path, metadata, 'lora_scales').items():
        a = flat.pop(f'{name}/a', None)
        b = flat.pop(f'{name}/b', None)
        flat[name] = _take_factors(f'{path}: {name}', a, b, scale, axes.get(name))
    # After the factors, because a packed kernel and its factors have the same path.
    for name, said in _parse_entry(path, metadata, 'packed').items():
        parts = [part for part in sorted(stored.array_names()) if f'{name}/{part}' in flat]
        arrays = {part: flat.pop(f'{name}/{part}') for part in parts}
        kernel = stored.from_file(f'{path}: {name}', said, arrays)
        factors = flat.get(name)
        flat[name] = kernel if factors is None else _adapt_packed(f'{path}: {name}', kernel, factors)
    _check_paths(path, flat)
    return rules.unflatten(flat), metadata


def _checksums(arrays: Mapping[str, Any], header: Mapping[str, str]) -> dict[str, int]:
    """Return the checksums of arrays and of the other entries of a header, see `CHECKSUMS`."""
    entries = zlib.crc32(json.dumps(sorted(header.items())).encode())
    return {'': entries} | {name: _checksum(array) for name, array in arrays.items()}


def _checksum(array: Any) -> int:
    """Return the checksum of an array: of its dtype, its shape and its bytes.

    A CRC of all bytes would take a sixth of the time of loading. So the array is cut into rows of 64-bit words, and the
    rows are summed, at the speed of memory; the CRC is that of the sums. A flipped bit always changes a sum, and damage
    within one row too.
    """
    host_array = np.ascontiguousarray(np.asarray(array))
    data = host_array.reshape(-1).view(np.uint8)
    row_bytes = 8 * _ROW
    whole_rows = data.size // row_bytes * row_bytes
    sums = data[:whole_rows].view(np.uint64).reshape(-1, _ROW).sum(axis=0, dtype=np.uint64)
    checksum = zlib.crc32(f'{host_array.dtype} {array.shape}'.encode())
    checksum = zlib.crc32(sums, checksum)
    return zlib.crc32(data[whole_rows:], checksum)


def _check_checksums(path: str | Path, arrays: Mapping[str, Any], metadata: dict[str, str]) -> None:
    """Remove the checksums from the strings of a header, and compare them with what was read.

    Raises:
      StorageError: an array or an entry is not what was written.
    """
    written = _parse_entry(path, metadata, CHECKSUMS)
    now = _checksums(arrays, metadata)
    for name in sorted(written.keys() | now.keys()):
        if written.get(name) != now.get(name):
            part = name or 'its header'
            raise StorageError(f'{path}: {part} is not what was written (its checksum differs); put back a copy')


def _parse_entry(path: str | Path, metadata: dict[str, str], entry: str) -> dict[str, Any]:
    """Remove an entry of JSON from the strings of a header, and return it; {} if there is none.

    Raises:
      StorageError: it is not a JSON object.
    """
    text = metadata.pop(entry, '{}')
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise StorageError(f'{path}: the entry {entry} of its header is not a JSON object; the file is damaged')
    return values


def _take_factors(name: str, a: Array | None, b: Array | None, scale: object, axes: object) -> Lora:
    """Return the LoRA factors of a kernel from a file.

    Raises:
      StorageError: a factor or the scale is missing, or they contradict each other or the roles of axes.
    """
    if a is None or b is None or isinstance(scale, bool) or not isinstance(scale, int | float):
        raise StorageError(f'{name}: expected factors a and b and a number as their scale; the file is damaged')
    # A is [*layers, in, rank] and B [*layers, rank, out].
    is_pair = a.ndim >= 2 and b.ndim >= 2 and b.shape[:-1] == (*a.shape[:-2], a.shape[-1])
    if not is_pair or not math.isfinite(scale):
        raise StorageError(f'{name}: factors {a.shape} x {b.shape} with scale {scale} do not fit; the file is damaged')
    return Lora(a, b, scale, None if axes is None else _read_axes(name, axes, a.ndim - 2))


def _read_axes(name: str, axes: object, num_layers: int) -> KernelAxes:
    """Return the roles of a kernel's axes from a file: lists of the axes of layers, inputs and outputs.

    Raises:
      StorageError: they are no roles, or the factors have another number of layer axes.
    """
    is_triple = isinstance(axes, list) and len(axes) == 3 and all(isinstance(role, list) for role in axes)
    order = [axis for role in axes for axis in role] if is_triple else []
    # `type`, since JSON's true is an integer in Python too.
    is_whole = all(type(axis) is int for axis in order) and sorted(order) == list(range(len(order)))
    if not order or not is_whole or len(axes[0]) != num_layers:
        raise StorageError(f'{name}: {axes!r} are no roles of its axes; the file is damaged')
    layers, inputs, outputs = map(tuple, axes)
    return KernelAxes(layers, inputs, outputs)


def _check_paths(path: str | Path, flat: Mapping[str, Any]) -> None:
    """Check that no array has the name of a folder of others.

    Raises:
      StorageError: one has.
    """
    for name in flat:
        parts = name.split('/')
        for length in range(1, len(parts)):
            above = '/'.join(parts[:length])
            if above in flat:
                raise StorageError(f'{path}: {above} and {name} cannot both be arrays; the file is damaged')


def _adapt_packed(name: str, kernel: Any, factors: Lora) -> Adapted:
    """Return a packed kernel bound to its factors from the file.

    Raises:
      StorageError: shapes contradict each other.
    """
    *layers, inputs, rank = factors.a.shape
    b = factors.b.shape
    outputs = b[-1]
    if kernel.shape != (*layers, inputs, outputs) or b != (*layers, rank, outputs):
        raise StorageError(f'{name}: factors {factors.a.shape} x {b} beside a kernel {kernel.shape}')
    return Adapted(kernel, None, factors)


def check_shapes(path: str | Path, tree: dict, shapes: dict) -> None:
    """Raise `StorageError` unless a tree has exactly the arrays of `shapes`.

    Args:
      path: the file or directory to name in the error.
      tree: arrays, or anything with a shape.
      shapes: a tree of tuples.
    """
    have = {name: tuple(leaf.shape) for name, leaf in rules.flatten(tree).items()}
    want = rules.flatten(shapes)
    # Missing and surplus arrays in one sorted order, so that the error names the first problem by path.
    for name in sorted(have.keys() | want.keys()):
        if name not in have:
            raise StorageError(f'{path}: {name} is missing, its config asks for shape {want[name]}')
        if have[name] != want.get(name):
            asked = f'for {want[name]}' if name in want else 'for no such parameter'
            raise StorageError(f'{path}: {name} has shape {have[name]}, its config asks {asked}')
