"""Any of the three trees as one safetensors file: no pickle, names are paths."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sparselora_jax.runtime import processes
from sparselora_jax.runtime.files import StorageError, whole
from sparselora_jax.sparse import rules
from sparselora_jax.sparse.packing import Stored, is_packed, stored
from sparselora_jax.sparse.weights import Adapted, Lora

DTYPES = {  # names of safetensors, https://huggingface.co/docs/safetensors, "Format"
    'F64': np.dtype(np.float64),
    'F32': np.dtype(np.float32),
    'F16': np.dtype(np.float16),
    'BF16': np.dtype(ml_dtypes.bfloat16),
    'I64': np.dtype(np.int64),
    'I32': np.dtype(np.int32),
    'U8': np.dtype(np.uint8),
    'BOOL': np.dtype(np.bool_),
}


def save_safetensors(path: str | Path, tree: dict, *, metadata: dict[str, str] | None = None) -> None:
    """Writes params (packed or not), masks or lora; the file appears whole or not at all.

    Of many processes, all of which must call it, the first writes, and all have the file then.

    Args:
      tree: an `Adapted` kernel must be a packed one, whose mask it has.
      metadata: strings kept in the header, e.g. the config that made the tree.

    Raises:
      StorageError: a leaf that is none of these.
    """
    arrays, scales, packed = {}, {}, {}
    for name, leaf in _leaves(tree):
        if isinstance(leaf, Lora):
            arrays[f'{name}/a'], arrays[f'{name}/b'], scales[name] = leaf.a, leaf.b, leaf.scale
        elif isinstance(leaf, Stored):
            packed[name] = stored.header_of(leaf)
            arrays |= {f'{name}/{part}': array for part, array in leaf.to_arrays().items()}
        elif hasattr(leaf, '__array__'):
            arrays[name] = leaf
        else:
            raise StorageError(f'{path}: {name} is a {type(leaf).__name__}, which safetensors files here do not hold')
    path, arrays = Path(path), {name: processes.on_first(array) for name, array in arrays.items()}
    header = (metadata or {}) | ({'lora_scales': json.dumps(scales)} if scales else {})
    header |= {'packed': json.dumps(packed)} if packed else {}
    if processes.first():
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as partial:
            save_file(arrays, partial, metadata=header)
    processes.wait(path.name)


def _leaves(tree: dict) -> Iterator[tuple[str, Any]]:
    """By path; a packed kernel and the factors beside it one after the other."""
    for name, leaf in rules.flatten(tree).items():
        if isinstance(leaf, Adapted) and is_packed(leaf.kernel) and leaf.gradient == 'exact':
            yield from ((name, leaf.kernel), (name, leaf.lora))
        else:
            yield name, leaf


def safetensors_header(
    tensors: dict[str, tuple[np.dtype, tuple[int, ...]]], metadata: dict[str, str] | None = None
) -> tuple[bytes, dict[str, int]]:
    """What a safetensors file of these tensors begins with, and the byte of the file at which each of them starts.

    Raises:
      StorageError: a dtype that the format does not know.
    """
    names, header, starts, end = {dtype: name for name, dtype in DTYPES.items()}, {}, {}, 0
    for name, (dtype, shape) in tensors.items():
        if dtype not in names:
            raise StorageError(f'{name} has dtype {dtype}; safetensors files hold {", ".join(map(str, names))}')
        starts[name], size = end, math.prod(shape) * dtype.itemsize
        header[name] = {'dtype': names[dtype], 'shape': shape, 'data_offsets': [end, end + size]}
        end += size
    text = json.dumps(({'__metadata__': metadata} if metadata else {}) | header).encode()
    text += b' ' * (-len(text) % 8)
    return len(text).to_bytes(8, 'little') + text, {name: 8 + len(text) + start for name, start in starts.items()}


@contextmanager
def layer_writer(path: str | Path, like: dict[str, Any]) -> Iterator[Callable[[str, int, Any], None]]:
    """A file of stacked arrays that is written a layer at a time, in any order; it appears whole or not at all.

    Of many processes, all of which must write, the first does.

    Args:
      like: path -> anything with the stacked array's `shape` and `dtype`.

    Yields:
      `write(path, layer, array)`.
    """
    tensors = {name: (np.dtype(leaf.dtype), leaf.shape) for name, leaf in like.items()}
    header, starts = safetensors_header(tensors)
    path = Path(path)
    if not processes.first():
        yield lambda name, layer, array: processes.on_host(array)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as partial, partial.open('wb') as file:
            file.write(header)
            file.truncate(len(header) + sum(math.prod(shape) * dtype.itemsize for dtype, shape in tensors.values()))

            def write(name, layer, array):
                data = np.ascontiguousarray(processes.on_host(array).astype(like[name].dtype, copy=False))
                data = data.reshape(-1).view(np.uint8)
                file.seek(starts[name] + layer * data.size)
                file.write(data)

            yield write
    processes.wait(path.name)


@contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    """A safetensors file.

    Raises:
      StorageError: it is missing, truncated or not safetensors.
    """
    path = Path(path)
    if not path.is_file():
        raise StorageError(f'{path}: no such file')
    try:
        with safe_open(path, framework='flax') as file:
            yield file
    except SafetensorError as error:
        raise StorageError(f'{path}: not a complete safetensors file ({error})') from None


def read_metadata(path: str | Path) -> dict[str, str]:
    """The strings in a file's header; nothing else is read.

    Raises:
      StorageError: see `load_safetensors`.
    """
    with _opened(path) as file:
        return dict(file.metadata() or {})


def load_safetensors(path: str | Path) -> tuple[dict, dict[str, str]]:
    """Reads a tree back, bit for bit.

    Returns:
      (tree, metadata).

    Raises:
      StorageError: the file is missing, truncated or not safetensors.
      PackingError: packed arrays that contradict their format; names the path.
    """
    with _opened(path) as file:
        flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a file is no dict)
        metadata = dict(file.metadata() or {})
    for name, scale in json.loads(metadata.pop('lora_scales', '{}')).items():
        flat[name] = Lora(flat.pop(f'{name}/a'), flat.pop(f'{name}/b'), scale)
    for name, said in json.loads(metadata.pop('packed', '{}')).items():
        parts = [part for part in sorted(stored.array_names()) if f'{name}/{part}' in flat]
        of_leaf = {part: flat.pop(f'{name}/{part}') for part in parts}
        kernel, factors = stored.from_file(f'{path}: {name}', said, of_leaf), flat.get(name)
        if factors is not None:
            (*layers, inputs, rank), b = factors.a.shape, factors.b.shape
            if kernel.shape != (*layers, inputs, b[-1]) or b != (*layers, rank, b[-1]):
                raise StorageError(f'{path}: {name}: factors {factors.a.shape} x {b} beside a kernel {kernel.shape}')
        flat[name] = kernel if factors is None else Adapted(kernel, None, factors)
    return rules.unflatten(flat), metadata


def check_shapes(path: str | Path, tree: dict, shapes: dict) -> None:
    """Raises `StorageError` unless `tree`, read from `path`, has exactly the arrays that `shapes` (of tuples) names."""
    have = {name: tuple(leaf.shape) for name, leaf in rules.flatten(tree).items()}
    want = rules.flatten(shapes)
    for name in sorted(have.keys() | want.keys()):
        if name not in have:
            raise StorageError(f'{path}: {name} is missing, its config asks for shape {want[name]}')
        if have[name] != want.get(name):
            asked = f'for {want[name]}' if name in want else 'for no such parameter'
            raise StorageError(f'{path}: {name} has shape {have[name]}, its config asks {asked}')
