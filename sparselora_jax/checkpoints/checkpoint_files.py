"""Find the tensors of a Hugging Face directory: which files hold them, and at which bytes.

Problems in a directory are reported as errors, never worked around: pickles, adapters, damaged files, and an index that
does not fit its shards.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sparselora_jax.checkpoints.safetensors_format import Entry, read_header
from sparselora_jax.data.model_config import CONFIG, REMEDY
from sparselora_jax.runtime.files import StorageError, read_json

# Names that transformers gives to the files of a directory.
SINGLE = 'model.safetensors'
INDEX = 'model.safetensors.index.json'
ADAPTER = 'adapter_config.json'  # of PEFT
# Suffixes of formats that run code when they are read.
PICKLES = ('.bin', '.pt', '.pth', '.ckpt', '.pkl')
# Suffixes of configs, tokenizers, chat templates and processors.
_SETTINGS = ('.json', '.model', '.txt', '.jinja')
# Copies of the word embeddings. `save_pretrained` may list one in the index without storing it in the shards.
_TIED = ('lm_head.weight', 'embed_tokens.weight')


@dataclass(frozen=True)
class Checkpoint:
    """Every tensor of a directory, by name.

    Attributes:
      folder: the directory.
      files: the files that hold the tensors.
      entries: where each tensor lies, by its name.
      ignored: names of files that also hold or list weights, but are not read.
    """

    folder: Path
    files: tuple[Path, ...]
    entries: dict[str, Entry]
    ignored: tuple[str, ...] = ()


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Find the tensors of `model.safetensors`, or else of the shards of its index. No tensor is read.

    If a directory has both, the single file is used, as in transformers (`_get_resolved_checkpoint_files`).

    Args:
      folder: a directory as `save_pretrained` writes it.

    Raises:
      StorageError: the directory, its config.json or its weights are missing, the weights are pickled, a file is
        truncated or damaged, the index does not fit the shards, or an adapter lies beside the weights.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise StorageError(f'{folder}: no such directory')
    # Checked before the config: a directory with only an adapter has no config, but needs its own error.
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


def settings_files(folder: Path) -> list[Path]:
    """List the files beside the weights that change results: configs, tokenizer and processor, relative to the folder.

    Args:
      folder: a model directory.
    """
    names = (path.relative_to(folder) for path in folder.rglob('*') if path.suffix in _SETTINGS and path.is_file())
    # The index is left out: it matters only through the shards that are read.
    return sorted(name for name in names if str(name) != INDEX and not any(part.startswith('.') for part in name.parts))


def refuse_adapter(folder: Path) -> None:
    """Raise `StorageError` if a directory holds an adapter of PEFT.

    transformers adds such an adapter to the model's weights when it loads them. If we ignored the adapter, we would
    prune a different model, and an export would lack part of it.

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
    # The command needs torch. It unpickles the file, so running it is the user's decision.
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
            # Otherwise the order of the shards would decide which of the two is used.
            if entry.name in entries:
                raise StorageError(f'{file}: {entry.name} also lies in {entries[entry.name].file.name}; expected once')
            entries[entry.name] = entry
    return entries


def _check_index(folder: Path, index: dict[str, str], entries: dict[str, Entry]) -> None:
    """Raise `StorageError` if a tensor does not lie in the file that the index names."""
    for name, file in index.items():
        if name not in entries and name.endswith(_TIED):
            continue  # if the model needs it, the error comes when its tensors are placed
        if name not in entries or entries[name].file != folder / file:
            raise StorageError(f'{folder / INDEX}: {name} should lie in {file}, which has no such tensor')


def _read_index(folder: Path) -> dict[str, str]:
    """Return {name of tensor: name of file} from the index of a directory.

    Only names are checked, not the targets of links: the hub's own cache is a directory of links to other files.

    Raises:
      StorageError: the index does not parse, or names a file that is missing, outside the directory, or not
        safetensors.
    """
    path = folder / INDEX
    index = read_json(path, REMEDY, has_unique_names=True).get('weight_map')
    if not isinstance(index, dict):
        raise StorageError(f'{path}: weight_map {index!r}: expected the file of each tensor; {REMEDY}')
    for name in index.values():  # a damaged index may contain anything
        if not isinstance(name, str) or not name.endswith('.safetensors'):
            raise StorageError(f'{path}: it names {name!r}; expected the name of a .safetensors file')
    for name in sorted(set(index.values())):
        # Checked as text, on every system: an index may come from an untrusted source, and an export writes to these
        # names.
        parts = PurePosixPath(name)
        if parts.is_absolute() or '..' in parts.parts or '\\' in name or ':' in name:
            raise StorageError(f'{path}: it names {name!r}, outside the directory; do not use this checkpoint')
        if not (folder / name).is_file():
            missing = sorted(tensor for tensor, file in index.items() if file == name)
            raise StorageError(f'{path}: shard {name} ({len(missing)} tensors) is missing; download it into {folder}')
    if not index:
        raise StorageError(f'{path}: it names no tensor; download it again')
    return index
