"""Read a `Model`, its params and its processor: from a Hugging Face directory, from the hub, or from the package."""

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from sparselora_jax.checkpoints import checkpoint_files, embedded, layout, packed, streaming
from sparselora_jax.checkpoints.checkpoint_files import Checkpoint
from sparselora_jax.data import model_config, processing
from sparselora_jax.data.model_config import SPECIAL_TOKENS
from sparselora_jax.models.family import FAMILIES, Family, config_of, find_family
from sparselora_jax.models.model import Generation, Model
from sparselora_jax.runtime import processes
from sparselora_jax.runtime.errors import UnsupportedModelError
from sparselora_jax.runtime.files import StorageError
from sparselora_jax.sparse import sharding
from sparselora_jax.sparse.dense import check_floating

# Files of a hub repository to download: models, tokenizers and processors, but no pickles (*.bin).
_DOWNLOADED = ['*.json', '*.safetensors', '*.model', '*.txt', '*.jinja']
# Subfolders hold the same weights in other formats, and `consolidated*` is a copy of the weights in one file.
_NOT_DOWNLOADED = ['*/*', 'consolidated*']


def load_model(
    dir_or_hub_id: str | Path, *, dtype: DTypeLike | None = None, mesh: Mesh | None = None, family: str = ''
) -> tuple[Model, dict]:
    """Read a model and its params.

    Args:
      dir_or_hub_id: a directory as `save_pretrained` writes it, or the id of a repository such as
        `Salesforce/blip2-opt-2.7b`, which is downloaded (or found in the cache). The kernels of a packed export
        (`checkpoints.packed`) stay packed. 'embedded' names the small model of the demo; write
        './embedded' for a directory of that name.
      dtype: dtype of the params; each tensor's own by default, and float32 for the embedded model. A T5 overflows in
        float16, so choose float32 or bfloat16 if its files are in float16.
      mesh: see `sharding.make_mesh`; the params are split over it by `sharding.RULES`.
      family: a family to read it by, as `package.module:FAMILY`; '' for the one registered for its `model_type`. If it
        is a registered `model_type`, models of other families are refused.

    Returns:
      (model, params).

    Raises:
      StorageError, PackingError: files are missing, damaged, pickled, or do not fit their config.
      UnsupportedModelError: the kind of model, or a field of its config, is not supported; or a T5 is in float16.
      AssetError: the package of the embedded model's language model is not installed.
      MeshError: `mesh` is no mesh.
    """
    sharding.check_mesh(mesh)
    check_floating(dtype, UnsupportedModelError)
    if dir_or_hub_id == embedded.NAME:
        _refuse_family(family)
        model, params = embedded.load(dtype=jnp.float32 if dtype is None else dtype)
        return model, params if mesh is None else sharding.shard(params, mesh)
    folder = find_directory(dir_or_hub_id)
    if (folder / packed.FILE).is_file():
        checkpoint_files.refuse_adapter(folder)  # the other branch does so where it opens the files
        if mesh is not None:
            raise StorageError(f'{folder}: packed weights lie on one device; load them without a mesh')
        hf = read_config(folder, family)
        known_family = find_family(hf.model_type, family, hf.architectures)
        model = Model(config_of(known_family, hf), read_generation(folder, hf, known_family), str(folder))
        return packed.load_packed(folder, model, dtype=dtype)
    model, pieces = open_model(folder, family)
    return model, streaming.read_params(model.shapes(), pieces, dtype, mesh)


def load_processor(dir_or_hub_id: str | Path, *, family: str = '') -> processing.Processor:
    """Read the processor of a model, which turns images and texts into batches, and tokens into texts.

    Args:
      dir_or_hub_id: see `load_model`.
      family: see `load_model`.

    Returns:
      The processor.

    Raises:
      StorageError, UnsupportedModelError, AssetError: see `load_model`.
      DataError: see `processing.load_processor`.
    """
    if dir_or_hub_id == embedded.NAME:
        _refuse_family(family)
        return embedded.load_processor(embedded.load_config())
    folder = find_directory(dir_or_hub_id)
    # Without a family, the directory's own `model_type` decides; `processing` reads it.
    if not family:
        return processing.load_processor(folder)
    hf = read_config(folder, family)
    return processing.load_processor(folder, find_family(hf.model_type, family, hf.architectures).processor)


def _refuse_family(family: str) -> None:
    """Raise `UnsupportedModelError` if the embedded model is to be read by another family than its own."""
    own = embedded.load_config().family
    if family and (family not in FAMILIES or FAMILIES.find(family) is not own):
        raise UnsupportedModelError(f'family {family!r}: the embedded model is a {own.name}; give no family')


def open_model(dir_or_hub_id: str | Path, family: str = '') -> tuple[Model, list[layout.Piece]]:
    """Find and check a model and the location of each weight; no weight is read, except a head that may be untied.

    Args:
      dir_or_hub_id: see `load_model`.
      family: see `load_model`.

    Returns:
      (model, pieces), see `layout.pieces`.

    Raises:
      StorageError, UnsupportedModelError: see `load_model`.
    """
    folder = find_directory(dir_or_hub_id)
    checkpoint = checkpoint_files.open_checkpoint(folder)
    _tell_ignored(checkpoint)  # not where the checkpoint is opened, since an export opens its source again
    hf = read_config(folder, family)
    known_family = find_family(hf.model_type, family, hf.architectures)
    cfg = layout.follow_head(known_family, config_of(known_family, hf), checkpoint)
    model = Model(cfg, read_generation(folder, hf, known_family), str(folder))
    return model, layout.pieces(known_family, cfg, checkpoint)


def _tell_ignored(checkpoint: Checkpoint) -> None:
    """Print a line if the directory has weights that are not read."""
    if checkpoint.ignored and processes.first():
        names = ', '.join(checkpoint.ignored[:3])
        more = f' and {len(checkpoint.ignored) - 3} more' if len(checkpoint.ignored) > 3 else ''
        print(
            f'{checkpoint.folder}: reads {checkpoint_files.SINGLE}, as transformers does, and ignores {names}{more}; '
            'remove what you do not want',
            file=sys.stderr,
            flush=True,
        )


def find_directory(dir_or_hub_id: str | Path) -> Path:
    """Return the directory, or the cache directory of a hub repository's files, downloading them if needed.

    Args:
      dir_or_hub_id: see `load_model`.

    Raises:
      StorageError: it is neither; the files are not cached and cannot be downloaded; or there are no safetensors.
    """
    # Imported here, like transformers below, so that only callers who need the package wait for the import.
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    name = str(dir_or_hub_id)
    if Path(name).exists():
        return Path(name)
    try:
        validate_repo_id(name)
        # The hub also has ids without an owner, but a single word is more likely a mistyped directory.
        is_hub_id = name.count('/') == 1 and isinstance(dir_or_hub_id, str)
    except HFValidationError:
        is_hub_id = False
    if not is_hub_id:
        raise StorageError(f'{name}: no such directory, nor the id of a hub repository (owner/name)')
    try:
        download = huggingface_hub.snapshot_download(name, allow_patterns=_DOWNLOADED, ignore_patterns=_NOT_DOWNLOADED)
    except Exception as error:  # the hub raises many classes: HTTP and connection errors, wrong ids, no cache entry
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        # The number of an operating system's error helps nobody.
        shown = re.sub(r'\[Errno -?\d+\] ', '', reason[0])
        raise StorageError(
            f'{name}: no such directory, and the hub did not give it ({shown}). Where there is a connection, run: '
            f'hf download {name}   then pass its directory; to an offline machine, copy that directory first'
        ) from None
    folder = Path(download)
    # Only configs were downloaded, since pickles are excluded. The error says how to convert them.
    if not any(folder.glob('*.safetensors')):
        problem = 'the repository has no safetensors, and its other weights, if any, are pickled'
        raise checkpoint_files.pickled(name, problem, f'{name.split("/")[1]}-safetensors')
    return folder


def read_config(folder: Path, family: str = '') -> Any:
    """Return the transformers config of a directory, without running code from the directory.

    Args:
      folder: the directory.
      family: see `load_model`.

    Raises:
      StorageError: config.json is not a model config, or a value is impossible.
      UnsupportedModelError: the kind of model is not supported, or its weights are quantised.
    """
    path = folder / checkpoint_files.CONFIG
    fields = model_config.read_fields(folder)
    try:
        find_family(fields['model_type'], family, fields.get('architectures'))
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f'{path}: {error}') from None
    # Such tensors are in the quantiser's own format, with separate scales.
    if fields.get('quantization_config'):
        raise UnsupportedModelError(
            f'{path}: quantised weights (quantization_config) cannot be pruned; use the original ones'
        )
    return model_config.parse(folder)


def read_generation(folder: Path, hf: Any, family: Family) -> Generation:
    """Return the special tokens and the defaults of decoding.

    If `Family.reads_generation_config` is False, transformers' `generate` runs on the language model alone, which is
    built from `text_config`. Then the defaults of that config apply, and the directory's generation_config.json is not
    read.

    Args:
      folder: the directory.
      hf: transformers config of the directory.
      family: the family of the model.

    Raises:
      StorageError: generation_config.json is not a valid generation config.
    """
    from transformers import GenerationConfig

    own, path = family.reads_generation_config, folder / 'generation_config.json'
    if own and path.is_file():
        try:
            defaults = GenerationConfig.from_pretrained(folder)
        except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
            raise StorageError(f'{path}: not defaults of decoding ({error}); download it again') from None
    else:
        # Without the file, transformers builds the defaults from the model's config in the same way.
        defaults = GenerationConfig.from_model_config(hf if own else hf.text_config)
    # transformers does not check that special tokens are numbers.
    for name in SPECIAL_TOKENS:
        ids = getattr(defaults, name)
        several = ids if isinstance(ids, list) else [ids]
        if not all(isinstance(token, int | None) for token in several):
            raise StorageError(f'{path}: {name} {ids!r}: expected the number of a token, or a list of them')
    eos = _token_ids(defaults.eos_token_id)
    pad = defaults.pad_token_id
    if pad is None or pad < 0:
        pad = eos[0] if eos else 0  # as transformers does
    return Generation(
        eos=eos,
        pad=pad,
        start=defaults.decoder_start_token_id,
        bos=defaults.bos_token_id,
        options=tuple(sorted(_options(defaults.to_diff_dict()))),
    )


def _token_ids(ids: int | list[int] | None) -> tuple[int, ...]:
    """Return token ids as a tuple; a config may have none, one or several."""
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list) else (ids,)


def _options(changed: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the options of a generation config that are not defaults, tokens, or options about the output."""
    for name, value in changed.items():
        is_token = name in SPECIAL_TOKENS
        is_about_outputs = name.startswith(('_', 'output_', 'return_'))
        is_about_files = name in ('transformers_version', 'use_cache')
        # The remaining options may change the generated tokens; decoding refuses those it does not support.
        if is_token or is_about_outputs or is_about_files or value is None:
            continue
        yield name, _hashable(value)


def _hashable(value: Any) -> Any:
    """Replace lists and dicts by tuples: a `Model` is a static argument of jitted functions, so it must be hashable."""
    if hasattr(value, 'to_dict'):  # transformers makes objects of some options, such as the watermark's
        value = value.to_dict()
    if isinstance(value, dict):
        return tuple((name, _hashable(item)) for name, item in sorted(value.items()))
    return tuple(map(_hashable, value)) if isinstance(value, list) else value
