"""A Hugging Face directory, or a repository of its hub -> a `Model` and its params."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from sparselora_jax.checkpoints import checkpoint_files, layout, streaming
from sparselora_jax.checkpoints import packed as hf_packed
from sparselora_jax.models.family import Family, find_family
from sparselora_jax.models.model import Generation, Model
from sparselora_jax.runtime.errors import UnsupportedModelError
from sparselora_jax.runtime.files import StorageError

# Of a hub's repository: what models, tokenizers and processors are made of; no pickles (*.bin), nothing deeper.
_PATTERNS, _NOT = ['*.json', '*.safetensors', '*.model', '*.txt', '*.jinja'], ['*/*', 'consolidated*']


def load_model(
    dir_or_hub_id: str | Path, *, dtype: Any = None, mesh: Mesh | None = None, family: str = ''
) -> tuple[Model, dict]:
    """Reads a model.

    Args:
      dir_or_hub_id: a directory as `save_pretrained` writes it, or the id of a repository such as
        `Salesforce/blip2-opt-2.7b`, which is downloaded (or found in the cache). Of a packed export
        (`models.hf_packed`), the kernels stay packed.
      dtype: of the params; each tensor's own by default. A T5 overflows in float16: float32 or bfloat16, then, if its
        files are in float16.
      mesh: see `sharding.make_mesh`; the params are split over it by `sharding.RULES`.
      family: a family to read it by, as `package.module:FAMILY`; '' for the one registered for its `model_type`.

    Raises:
      StorageError, PackingError: files are missing, damaged, pickled, or do not fit their config.
      UnsupportedModelError: a kind of model, or a field of its config, that is not known here; a T5 in float16.
    """
    folder = find_directory(dir_or_hub_id)
    if (folder / hf_packed.FILE).is_file():
        if mesh is not None:
            raise StorageError(f'{folder}: packed weights lie on one device; load them without a mesh')
        hf = read_config(folder, family)
        known_family = find_family(hf.model_type, family)
        model = Model(known_family.from_hf(hf), read_generation(folder, hf, known_family), str(folder))
        return hf_packed.load_packed(folder, model, dtype=dtype)
    model, pieces = open_model(folder, family)
    return model, streaming.read_params(model.shapes(), pieces, dtype, mesh)


def open_model(dir_or_hub_id: str | Path, family: str = '') -> tuple[Model, list[layout.Piece]]:
    """A model and where each of its weights lies, everything checked; no weight is read (but a doubtful head).

    Raises:
      StorageError, UnsupportedModelError: see `load_model`.
    """
    folder = find_directory(dir_or_hub_id)
    checkpoint = checkpoint_files.open_checkpoint(folder)
    hf = read_config(folder, family)
    known_family = find_family(hf.model_type, family)
    cfg = layout.follow_head(known_family, known_family.from_hf(hf), checkpoint)
    model = Model(cfg, read_generation(folder, hf, known_family), str(folder))
    return model, layout.pieces(known_family, cfg, checkpoint)


def find_directory(dir_or_hub_id: str | Path) -> Path:
    """The directory itself, or that of a hub repository's files in the local cache, downloaded if need be.

    Raises:
      StorageError: it is neither, or the files are not here and cannot be downloaded, or hold no safetensors.
    """
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    name = str(dir_or_hub_id)
    if Path(name).exists():
        return Path(name)
    try:
        huggingface_hub.utils.validate_repo_id(name)
        known = name.count('/') == 1 and isinstance(dir_or_hub_id, str)
    except HFValidationError:
        known = False
    if not known:
        raise StorageError(f'{name}: no such directory, nor the id of a hub repository (owner/name)')
    try:
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=_PATTERNS, ignore_patterns=_NOT))
    except Exception as error:  # HTTP and connection errors, wrong ids, no such entry in the cache: of many classes
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise StorageError(
            f'{name}: no such directory, and the hub did not give it ({reason[0]}). Where there is a connection, run: '
            f'hf download {name}   and give its directory, or carry that over'
        ) from None
    if not any(folder.glob('*.safetensors')):
        problem = 'the repository has no safetensors, and its other weights, if any, are pickled'
        raise checkpoint_files.pickled(name, problem, f'{name.split("/")[1]}-safetensors')
    return folder


def read_config(folder: Path, family: str = '') -> Any:
    """The transformers config of a directory; no code of the directory's own is run.

    Raises:
      StorageError: config.json is not one.
      UnsupportedModelError: its kind is not known here.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    path = folder / checkpoint_files.CONFIG
    try:
        raw = json.loads(path.read_text())
        kind = raw.get('model_type')
    except (ValueError, AttributeError) as error:
        raise StorageError(f'{path}: not a model config ({error}); download it again') from None
    try:
        find_family(kind, family)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f'{path}: {error}') from None
    if raw.get('quantization_config'):
        raise UnsupportedModelError(
            f'{path}: quantised weights (quantization_config) cannot be pruned; use the original ones'
        )
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, OSError, StrictDataclassError) as error:
        raise StorageError(f'{path}: transformers does not read it ({error})') from None


def read_generation(folder: Path, hf: Any, family: Family) -> Generation:
    """Special tokens and defaults of decoding.

    Where the language model generates by itself (`Family.reads_generation_config`), it was built from `text_config`:
    its defaults hold, and the directory's generation_config.json is not looked at.

    Raises:
      StorageError: generation_config.json is not one.
    """
    from transformers import GenerationConfig

    own, path = family.reads_generation_config, folder / 'generation_config.json'
    if own and path.is_file():
        try:
            defaults = GenerationConfig.from_pretrained(folder)
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise StorageError(f'{path}: not defaults of decoding ({error}); download it again') from None
    else:
        defaults = GenerationConfig.from_model_config(hf if own else hf.text_config)
    eos = defaults.eos_token_id
    eos = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    pad = defaults.pad_token_id
    return Generation(
        eos=eos,
        pad=pad if pad is not None else eos[0] if eos else 0,  # as transformers does
        start=defaults.decoder_start_token_id,
        bos=defaults.bos_token_id,
        options=tuple(sorted(_options(defaults.to_diff_dict()))),
    )


def _options(changed: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """What a generation config says that is not a default, a token, nor about what is returned."""
    for name, value in changed.items():
        skip = name.endswith('_token_id') or name.startswith(('_', 'output_', 'return_')) or value is None
        if not skip and name not in ('transformers_version', 'use_cache') and not isinstance(value, dict):
            yield name, _hashable(value)


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list) else value
