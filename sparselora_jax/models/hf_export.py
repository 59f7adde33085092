"""A model -> a Hugging Face directory.

`export_model` writes the directory that a model was read from once more, with our numbers in the places of its own:
same files, keys, dtypes and shards, because nothing but the tensors' bytes is replaced. `write_new` is for a model that
was read from no such directory. Both stream, and a file appears whole or not at all.
"""

import copy
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from sparselora_jax import rules
from sparselora_jax.models import checkpoint_files, layout, streaming
from sparselora_jax.models.checkpoint_files import CONFIG, SINGLE, Checkpoint, Entry
from sparselora_jax.models.layout import Piece
from sparselora_jax.models.model import Model
from sparselora_jax.storage import StorageError, check_shapes

# Files that hold weights: those that are ours to write, and others, which would hold the model as it was before.
_WEIGHTS = ('.safetensors', *checkpoint_files.PICKLES, '.h5', '.msgpack', '.onnx', '.gguf', '.ot')


def export_model(folder: str | Path, model: Model, params: dict, *, source: str | Path | None = None) -> None:
    """Writes a directory that differs from the model's own in the values of its weights alone.

    Tensors that the model does not read are copied. An interrupted export can be repeated into the same folder; until
    it has ended, the folder has no config.json.

    Args:
      params: plain arrays, merged; cast to the dtype that each tensor has in its file.
      source: the directory to follow; `model.source` by default.

    Raises:
      StorageError: there is no source, or it no longer fits the model; the folder is the source, or holds other files;
        a number is too large for its file's dtype.
    """
    source = source or model.source
    if source is None:
        raise StorageError('the model was read from no Hugging Face directory: pass source, or use write_new')
    folder, checkpoint = Path(folder), checkpoint_files.open_checkpoint(source)
    pieces = layout.pieces(model.family, model.cfg, checkpoint)
    check_shapes(folder, params, model.shapes())
    others = [path for path in _files(checkpoint.folder) if path.suffix not in _WEIGHTS]
    _claim(folder, checkpoint, others)
    for file in checkpoint.files:
        with _placed(folder / file.relative_to(checkpoint.folder)) as new, file.open('rb') as old:
            _write(new, [piece for piece in pieces if piece.entry.file == file], params, old)
            _copy(old, new, file.stat().st_size - new.tell())
    for name in sorted(others, key=lambda name: name == Path(CONFIG)):  # the config last: the directory is whole then
        with _placed(folder / name) as new, (checkpoint.folder / name).open('rb') as old:
            shutil.copyfileobj(old, new)


def write_new(folder: str | Path, hf_config: Any, model: Model, params: dict, *, processor: Any = None) -> None:
    """Writes the directory of a model that was read from none: one file, each tensor in its array's dtype.

    Args:
      hf_config: transformers' config of the same model (see `models.hf_configs`).
      processor: a tokenizer or processor, written beside it.

    Raises:
      StorageError: the folder holds another model's weights, or the params do not fit the model.
    """
    from transformers import GenerationConfig

    folder, hf_config = Path(folder), copy.deepcopy(hf_config)
    check_shapes(folder, params, model.shapes())
    if foreign := [str(name) for name in _files(folder) if name.suffix in _WEIGHTS and name != Path(SINGLE)]:
        raise StorageError(f'{folder}: holds other weights ({", ".join(foreign[:3])}); choose an empty directory')
    folder.mkdir(parents=True, exist_ok=True)
    header, entries = _new_header(folder / SINGLE, model, params)
    checkpoint = Checkpoint(folder, (folder / SINGLE,), entries)
    with _placed(folder / SINGLE) as new:
        new.write(header)
        _write(new, layout.pieces(model.family, model.cfg, checkpoint), params)
    tokens = model.generation
    GenerationConfig(
        eos_token_id=list(tokens.eos) if len(tokens.eos) > 1 else (*tokens.eos, None)[0],
        pad_token_id=tokens.pad,
        bos_token_id=tokens.bos,
        decoder_start_token_id=tokens.start,
        **dict(tokens.options),
    ).save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    hf_config.dtype = jnp.dtype(rules.flatten(params)[layout.EMBED].dtype).name
    hf_config.save_pretrained(folder)


def check_export(folder: str | Path, model: Model, params: dict) -> None:
    """Reads a written directory back.

    Raises:
      StorageError: it is not whole, or a number in it is not that of `params`, cast to the file's dtype.
    """
    flat = rules.flatten(params)
    for piece in layout.pieces(model.family, model.cfg, checkpoint_files.open_checkpoint(folder)):
        read = checkpoint_files.read(piece.entry, piece.rows)
        if not np.array_equal(_bytes(read), _bytes(_block(flat, piece))):
            name = f'{piece.entry.name} ({piece.path})'
            raise StorageError(f'{piece.entry.file}: {name}, read back, is not what was written; export it again')


def _files(folder: Path) -> list[Path]:
    """Every file below a directory, relative to it; what lies in hidden directories (.cache, .git) is left out."""
    names = sorted(path.relative_to(folder) for path in folder.rglob('*') if path.is_file())
    return [name for name in names if not any(part.startswith('.') for part in name.parts[:-1])]


def _claim(folder: Path, checkpoint: Checkpoint, others: Iterable[Path]) -> None:
    """Makes the folder, which may hold nothing but what an earlier export of the same source has left."""
    if folder.resolve() == checkpoint.folder.resolve():
        raise StorageError(f'{folder}: is the directory the model was read from; export into another')
    own = {path.relative_to(checkpoint.folder) for path in checkpoint.files} | set(others)
    own |= {_partial(name) for name in own}
    if foreign := [str(name) for name in _files(folder) if name not in own]:
        raise StorageError(f'{folder}: holds files of something else ({", ".join(foreign[:3])}); choose an empty one')
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    return path.with_name(path.name + '.partial')


@contextmanager
def _placed(path: Path) -> Iterator[BinaryIO]:
    """A new file, which takes its place once all of it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _partial(path).open('wb') as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    _partial(path).replace(path)


def _write(new: BinaryIO, pieces: list[Piece], params: dict, old: BinaryIO | None = None) -> None:
    """Writes the pieces of one file, in order, each at its place; what lies between them comes from `old`."""
    flat = rules.flatten(params)
    for piece in pieces:
        start = piece.entry.start + piece.rows[0] * piece.entry.row_size
        if old is not None:
            _copy(old, new, start - new.tell())
        data = _bytes(_block(flat, piece))
        new.write(data)
        if old is not None:
            old.seek(data.size, os.SEEK_CUR)


def _copy(old: BinaryIO, new: BinaryIO, count: int) -> None:
    while count:
        data = old.read(min(count, layout.PIECE))
        new.write(data)
        count -= len(data)


def _block(flat: dict[str, Any], piece: Piece) -> Shaped[np.ndarray, '...']:
    """What a piece of a file is to hold."""
    block = streaming.read_block(flat[piece.path], piece)
    if piece.entry.dtype == np.float16 and not np.isfinite(block).all():
        raise StorageError(f'{piece.path}: numbers too large for float16, the dtype of {piece.entry.name} in its file')
    return block


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _new_header(file: Path, model: Model, params: dict) -> tuple[bytes, dict[str, Entry]]:
    """The header of a file of all of a model's tensors, and where each of them will lie."""
    flat, header, sizes = rules.flatten(params), {}, {}
    names, end = {str(dtype): name for name, dtype in checkpoint_files.DTYPES.items()}, 0
    for name, (place, *_) in layout.places(model.family, model.cfg).items():
        dtype, shape = jnp.dtype(flat[place.path].dtype), _new_shape(place)
        size = math.prod(shape) * dtype.itemsize
        header[name] = {'dtype': names[dtype.name], 'shape': shape, 'data_offsets': [end, end + size]}
        sizes[name] = Entry(name, file, dtype, shape, end)
        end += size
    text = json.dumps({'__metadata__': {'format': 'pt'}} | header).encode()
    text += b' ' * (-len(text) % 8)
    entries = {n: Entry(n, file, e.dtype, e.shape, 8 + len(text) + e.start) for n, e in sizes.items()}
    return len(text).to_bytes(8, 'little') + text, entries


def _new_shape(place: layout.Place) -> tuple[int, ...]:
    """The shape of a tensor in a checkpoint; patches are convolutions over square patches of three colours."""
    rows, *rest = place.layer_shape
    if place.path.endswith('patch/kernel'):
        side = math.isqrt(rows // 3)
        return (*rest, 3, side, side)
    rows, *rest = place.layer_shape[::-1] if layout.is_kernel(place.path) else place.layer_shape
    return (place.of * rows, *rest)
