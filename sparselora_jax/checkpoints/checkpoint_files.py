"""Find the tensors of a Hugging Face directory: which files hold them, and where each of them lies.

What hides in a directory is named or refused, never guessed at: pickles, adapters, damaged files, and an index that
does not fit its shards.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sparselora_jax.checkpoints.safetensors_format import Entry, read_header, unique_names
from sparselora_jax.runtime.files import StorageError

# Names that transformers gives to the files of a directory.
CONFIG = 'config.json'
SINGLE = 'model.safetensors'
INDEX = 'model.safetensors.index.json'
ADAPTER = 'adapter_config.json'  # of PEFT
# Suffixes of formats whose reading runs code.
PICKLES = ('.bin', '.pt', '.pth', '.ckpt', '.pkl')
# Copies of the word embeddings. `save_pretrained` may leave one out of the shards that its index lists.
_TIED = ('lm_head.weight', 'embed_tokens.weight')


@dataclass(frozen=True)
class Checkpoint:
    """Every tensor of a directory, by name.

    Attributes:
      folder: the directory.
      files: the files that hold the tensors.
      entries: where each tensor lies, by its name.
      ignored: names of files that hold or name weights too, and are not read.
    """

    folder: Path
    files: tuple[Path, ...]
    entries: dict[str, Entry]
    ignored: tuple[str, ...] = ()


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Find the tensors of `model.safetensors`, or else of the shards of its index. No tensor is read.

    Where a directory has both, the single file counts, as in transformers (`_get_resolved_checkpoint_files`).

    Args:
      folder: a directory as `save_pretrained` writes it.

    Raises:
      StorageError: the directory, its config.json or its weights are missing, the weights are pickled, a file is
        truncated or damaged, the index does not fit the shards, or an adapter lies beside the weights.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise StorageError(f'{folder}: no such directory')
    # Before the config is looked for: a directory of an adapter alone has none, and deserves its own error.
    refuse_adapter(folder)
    if not (folder / CONFIG).is_file():
        raise StorageError(f'{folder}: no {CONFIG}; expected a model directory, as save_pretrained writes it')
    if (folder / SINGLE).is_file():
        files = (folder / SINGLE,)
        return Checkpoint(folder, files, _read_entries(files), _find_ignored(folder))
    if not (folder / INDEX).is_file():
        raise _no_weights(folder)
    index = _read_index(folder)
    # Each shard once, in the order of the index.
    files = tuple(folder / name for name in dict.fromkeys(index.values()))
    entries = _read_entries(files)
    _check_index(folder, index, entries)
    return Checkpoint(folder, files, entries)


def refuse_adapter(folder: Path) -> None:
    """Raise `StorageError` if a directory holds an adapter of PEFT.

    transformers adds such an adapter to the model's weights when it loads them. Without it we would prune another
    model than the user's, and an export would hold half of it.

    Args:
      folder: a directory.
    """
    if (folder / ADAPTER).is_file():
        raise StorageError(
            f'{folder}: {ADAPTER}: a PEFT adapter, which transformers adds to the weights and this library does not '
            'read. Merge it first: load the model without it, then '
            "peft.PeftModel.from_pretrained(model, ADAPTER).merge_and_unload().save_pretrained('MERGED'); an adapter "
            'that was trained under masks: sparselora_jax.merge. To use the weights alone, move the files of the '
            'adapter to another directory'
        )


def pickled(source: str | Path, problem: str, target: str) -> StorageError:
    """Return the error for weights that are not safetensors, with a command that converts them.

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


def _no_weights(folder: Path) -> StorageError:
    """Return the error for a directory without safetensors."""
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if not pickles:  # nothing was downloaded yet but the config
        return StorageError(f'{folder}: neither {SINGLE} nor {INDEX}; download the weights into it')
    return pickled(folder, f'the weights are pickled ({", ".join(pickles[:3])})', f'{folder}-safetensors')


def _find_ignored(folder: Path) -> tuple[str, ...]:
    """Return the names of the index and of the shards beside a single file.

    The index may be stale or damaged, so it is not read: every other safetensors file of the directory counts.
    """
    if not (folder / INDEX).is_file():
        return ()
    others = sorted(path.name for path in folder.glob('*.safetensors') if path.name != SINGLE)
    return (INDEX, *others)


def _read_entries(files: Iterable[Path]) -> dict[str, Entry]:
    """Return the tensors of several files by name.

    Raises:
      StorageError: a file is damaged, or two files hold tensors of one name.
    """
    entries: dict[str, Entry] = {}
    for file in files:
        for entry in read_header(file):
            # Which of the two counts would depend on the order of the shards.
            if entry.name in entries:
                raise StorageError(f'{file}: {entry.name} also lies in {entries[entry.name].file.name}; expected once')
            entries[entry.name] = entry
    return entries


def _check_index(folder: Path, index: dict[str, str], entries: dict[str, Entry]) -> None:
    """Raise `StorageError` if a tensor does not lie in the file that the index says."""
    for name, file in index.items():
        if name not in entries and name.endswith(_TIED):
            continue  # a model that needs it after all finds it missing when its tensors are placed
        if name not in entries or entries[name].file != folder / file:
            raise StorageError(f'{folder / INDEX}: {name} should lie in {file}, which has no such tensor')


def _read_index(folder: Path) -> dict[str, str]:
    """Return the file of each tensor by the tensor's name, as the index of a directory has them.

    Names alone are checked, not where links lead: the hub's own cache is a directory of links to files elsewhere.

    Raises:
      StorageError: the index does not parse, or names a file that is missing, outside the directory, or not
        safetensors.
    """
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(), object_pairs_hook=unique_names)['weight_map']
        names = set(index.values())  # a value that cannot be hashed raises TypeError: no index either
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(f'{path}: not an index of safetensors ({error}); download it again') from None
    for name in sorted(names, key=str):  # by their text: a damaged index may name numbers
        if not isinstance(name, str) or not name.endswith('.safetensors'):
            raise StorageError(f'{path}: it names {name!r}; expected the name of a .safetensors file')
        # Checked as text, on every system: an index may come from anywhere, and an export writes to these names too.
        parts = PurePosixPath(name)
        if parts.is_absolute() or '..' in parts.parts or '\\' in name or ':' in name:
            raise StorageError(f'{path}: it names {name!r}, outside the directory; do not use this checkpoint')
        if not (folder / name).is_file():
            missing = sorted(tensor for tensor, file in index.items() if file == name)
            raise StorageError(f'{path}: shard {name} ({len(missing)} tensors) is missing; download it into {folder}')
    if not names:
        raise StorageError(f'{path}: it names no tensor; download it again')
    return index
