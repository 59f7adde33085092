"""The Hugging Face directory of a model that was read from none."""

import copy
import math
import tempfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from sparselora_jax.checkpoints import layout
from sparselora_jax.checkpoints.checkpoint_files import CONFIG, SINGLE, Checkpoint, Entry
from sparselora_jax.checkpoints.export import WEIGHTS, copy_beside, files_below, placed, write_pieces, write_texts
from sparselora_jax.checkpoints.trees import check_shapes, safetensors_header
from sparselora_jax.models.model import Model
from sparselora_jax.runtime.files import StorageError
from sparselora_jax.sparse import rules


def write_new(
    folder: str | Path,
    hf_config: Any,
    model: Model,
    params: dict,
    *,
    processor: Any = None,
    texts: dict[str, str] | None = None,
) -> None:
    """Writes the directory of a model that was read from none: one file, each tensor in its array's dtype.

    Args:
      hf_config: transformers' config of the same model (see `models.hf_configs`).
      processor: a tokenizer or processor, written beside it.
      texts: more files to write, by name.

    Raises:
      StorageError: the folder holds another model's weights, or the params do not fit the model.
    """
    folder = Path(folder)
    check_shapes(folder, params, model.shapes())
    claim(folder, SINGLE)
    header, entries = _new_header(folder / SINGLE, model, params)
    checkpoint = Checkpoint(folder, (folder / SINGLE,), entries)
    with placed(folder / SINGLE) as new:
        new.write(header)
        write_pieces(new, layout.pieces(model.family, model.cfg, checkpoint), params)
    write_beside(folder, hf_config, model, params, processor=processor, texts=texts)


def claim(folder: Path, own: str) -> None:
    """Makes a folder in which the file `own` is to hold the weights.

    Raises:
      StorageError: it holds others.
    """
    if foreign := [str(name) for name in files_below(folder) if name.suffix in WEIGHTS and name != Path(own)]:
        raise StorageError(f'{folder}: holds other weights ({", ".join(foreign[:3])}); choose an empty directory')
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)  # written last: until then the directory is not whole


def write_beside(
    folder: Path, hf_config: Any, model: Model, params: dict, *, processor: Any, texts: dict[str, str] | None
) -> None:
    """Writes what lies beside the weights, the config last; see `write_new`."""
    from transformers import GenerationConfig

    hf_config = copy.deepcopy(hf_config)
    hf_config.dtype = jnp.dtype(rules.flatten(params)[layout.EMBED].dtype).name
    tokens = model.generation
    generation = GenerationConfig(
        eos_token_id=list(tokens.eos) if len(tokens.eos) > 1 else (*tokens.eos, None)[0],
        pad_token_id=tokens.pad,
        bos_token_id=tokens.bos,
        decoder_start_token_id=tokens.start,
        **dict(tokens.options),
    )
    write_texts(folder, texts or {})
    with tempfile.TemporaryDirectory() as apart:  # transformers would write into the files as they are
        for part in (generation, processor, hf_config):
            if part is not None:
                part.save_pretrained(apart)
        copy_beside(folder, Path(apart), files_below(Path(apart)))


def _new_header(file: Path, model: Model, params: dict) -> tuple[bytes, dict[str, Entry]]:
    """The header of a file of all of a model's tensors, and where each of them will lie."""
    flat, places = rules.flatten(params), layout.places(model.family, model.cfg)
    tensors = {name: (jnp.dtype(flat[place.path].dtype), _new_shape(place)) for name, (place, *_) in places.items()}
    header, starts = safetensors_header(tensors, {'format': 'pt'})
    return header, {name: Entry(name, file, *tensors[name], starts[name]) for name in tensors}


def _new_shape(place: layout.Place) -> tuple[int, ...]:
    """The shape of a tensor in a checkpoint; patches are convolutions over square patches of three colours."""
    rows, *rest = place.layer_shape
    if layout.is_patches(place.path):
        side = math.isqrt(rows // 3)
        return (*rest, 3, side, side)
    rows, *rest = place.layer_shape[::-1] if rules.named_kernel(place.path) else place.layer_shape
    return (place.of * rows, *rest)
