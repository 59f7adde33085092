"""Write a model to a Hugging Face directory with the same layout as the one it was read from.

`export_model` copies the source directory and replaces only the bytes of changed tensors. So files, keys, dtypes and
shards stay the same. The embedded model was read from no directory; `embedded.save` writes it.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sparselora_jax.checkpoints import checkpoint_files, embedded, layout, safetensors_format, streaming
from sparselora_jax.checkpoints.checkpoint_files import CONFIG, Checkpoint
from sparselora_jax.checkpoints.layout import Piece
from sparselora_jax.checkpoints.on_disk import Stack
from sparselora_jax.checkpoints.trees import check_shapes
from sparselora_jax.checkpoints.writing import (
    Blocks,
    Leaf,
    as_bytes,
    copy_beside,
    copy_bytes,
    files_below,
    files_beside,
    placed,
    text_paths,
    write_pieces,
    write_texts,
)
from sparselora_jax.models.model import Model
from sparselora_jax.runtime.files import PARTIAL, StorageError
from sparselora_jax.sparse import rules


def export_model(
    folder: str | Path,
    model: Model,
    params: dict,
    *,
    changed: Iterable[str] | None = None,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write a copy of the model's source directory that differs only in the values of changed weights.

    The embedded model has no source directory: all its weights are written, in the dtypes of `params`, with its config
    and processor.

    Tensors of unchanged arrays are copied byte for byte, whatever the dtype of `params`. So are tensors that the model
    does not read. An interrupted export can be repeated into the same folder; until it is complete, the folder has no
    config.json.

    Args:
      folder: the directory to write.
      model: read from a directory, `model.source`, or the embedded model.
      params: merged plain arrays, or stacks that are read a layer at a time (`on_disk`). They are cast to the dtype of
        each tensor in its file.
      changed: the paths of the arrays that differ from the source. None: compare them. An array then counts as
        unchanged if it equals the source's array, cast to its dtype. If that dtype is narrower, the source is read
        again.
      texts: more files to write, by name.

    Raises:
      StorageError: the model is not the embedded one and has no source, or its source no longer fits it; the folder is
        the source, or holds other files; the model lacks a path of `changed`; a number is too large for its file's
        dtype.
      AssetError: the package of the embedded model's language model is not installed.
    """
    texts_by_path = text_paths(texts)
    if model.source is None:
        embedded.save(folder, model, params, texts=texts)
        return
    folder = Path(folder)
    source = checkpoint_files.open_checkpoint(model.source)
    # The source is opened again: its files may have changed since the model was read, and must still fit it.
    pieces = layout.pieces(model.family, model.cfg, source)
    check_shapes(folder, params, model.shapes())
    flat = rules.flatten(params)
    changed = _find_changed(flat, pieces) if changed is None else _check_paths(changed, flat)
    others = [name for name in files_beside(source.folder) if name not in texts_by_path]
    # Do not copy the index of shards that are not read: the export would lack those shards.
    others = [name for name in others if str(name) not in source.ignored]
    _claim(folder, source, {*others, *texts_by_path})
    for file in source.files:
        # Headers, unread tensors and unchanged tensors are copied from the old file, between the pieces that are
        # written.
        to_write = [piece for piece in pieces if piece.entry.file == file and piece.path in changed]
        with placed(folder / file.relative_to(source.folder)) as new, file.open('rb') as old:
            write_pieces(new, to_write, params, old)
            copy_bytes(old, new, file.stat().st_size - new.tell())
    write_texts(folder, texts_by_path)
    copy_beside(folder, source.folder, others)


def check_export(folder: str | Path, model: Model, params: dict, *, changed: Iterable[str] | None = None) -> None:
    """Read a written directory back, and compare it with what should have been written.

    Args:
      folder: directory that `export_model` or `write_new` wrote.
      model: the model that was written.
      params: the params that were written.
      changed: as for `export_model`.

    Raises:
      StorageError: the directory is incomplete; or a changed number differs from that of `params`, cast to the file's
        dtype; or an unchanged number differs from the source's.
    """
    flat = rules.flatten(params)
    pieces = layout.pieces(model.family, model.cfg, checkpoint_files.open_checkpoint(folder))
    originals = {}
    if model.source is None:  # written by `write_new`, which writes every array
        changed = flat.keys()
    else:
        source = checkpoint_files.open_checkpoint(model.source)
        originals = source.entries
        source_pieces = layout.pieces(model.family, model.cfg, source)
        changed = _find_changed(flat, source_pieces) if changed is None else _check_paths(changed, flat)
    blocks = Blocks(flat)
    for piece in pieces:
        written = safetensors_format.read(piece.entry, piece.rows)
        if piece.path in changed:
            expected = blocks.read(piece)
        else:
            expected = safetensors_format.read(originals[piece.entry.name], piece.rows)
        if not np.array_equal(as_bytes(written), as_bytes(expected)):
            name = f'{piece.entry.name} ({piece.path})'
            raise StorageError(f'{piece.entry.file}: {name}, read back, is not what was written; export it again')


def _check_paths(paths: Iterable[str], flat: dict[str, Leaf]) -> set[str]:
    """Return the paths as a set.

    Raises:
      StorageError: the params lack a path.
    """
    paths = set(paths)
    unknown = sorted(paths - flat.keys())
    if unknown:
        raise StorageError(f'{unknown[0]}: named as changed, but the model has no such parameter')
    return paths


def _find_changed(flat: dict[str, Leaf], pieces: Iterable[Piece]) -> set[str]:
    """Return the paths of the arrays to write: those that differ from the source, cast to the array's dtype.

    An array whose dtype holds every number of its file is always written, without a comparison: if unchanged, it gives
      the same bytes.
    """
    changed: set[str] = set()
    for piece in pieces:
        # One piece that differs is enough, so usually only the first piece of a pruned kernel is compared.
        if piece.path in changed:
            continue
        array = flat[piece.path]
        # A stack on disk returns the file's own numbers where nothing changed them.
        if isinstance(array, Stack) or _holds(array.dtype, piece.entry.dtype) or _differs(array, piece):
            changed.add(piece.path)
    return changed


def _holds(dtype: np.dtype, file_dtype: np.dtype) -> bool:
    """Return whether an array's dtype can represent every number of a file's dtype."""
    with jax.numpy_dtype_promotion('standard'):
        return jnp.promote_types(dtype, file_dtype) == dtype


def _differs(array: jax.Array | np.ndarray, piece: Piece) -> bool:
    """Return whether a block of an array differs from the source's block, cast as loading casts it."""
    # Cast on the device, as `streaming` does: NumPy may treat the smallest numbers differently.
    original = jnp.asarray(safetensors_format.read(piece.entry, piece.rows)).astype(array.dtype)
    block = streaming.read_block(array, piece, array.dtype)
    return not np.array_equal(as_bytes(block), as_bytes(np.asarray(original)))


def _claim(folder: Path, source: Checkpoint, others: Iterable[Path]) -> None:
    """Create the folder, which may only hold files from an earlier export of the same source.

    Raises:
      StorageError: the folder is the source, or holds other files.
    """
    # Resolve links, so that a link to the source is refused too: its files would be overwritten while they are read.
    if folder.resolve() == source.folder.resolve():
        raise StorageError(f'{folder}: is the directory the model was read from; export into another')
    own = {path.relative_to(source.folder) for path in source.files} | set(others)
    # An export that was killed leaves the partial files that it wrote.
    own |= {name.with_name(name.name + PARTIAL) for name in own}
    foreign = [str(name) for name in files_below(folder) if name not in own]
    if foreign:
        raise StorageError(f'{folder}: holds files of something else ({", ".join(foreign[:3])}); choose an empty one')
    folder.mkdir(parents=True, exist_ok=True)
    # The config is written last: a folder without a config does not count as a model.
    (folder / CONFIG).unlink(missing_ok=True)
