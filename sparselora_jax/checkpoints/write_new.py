"""Write a Hugging Face directory for a model that was not read from one."""

import copy
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import jax.numpy as jnp

from sparselora_jax.checkpoints import layout
from sparselora_jax.checkpoints.checkpoint_files import CONFIG, SINGLE, Checkpoint
from sparselora_jax.checkpoints.safetensors_format import Entry, make_header
from sparselora_jax.checkpoints.trees import check_shapes
from sparselora_jax.checkpoints.writing import WEIGHTS, copy_beside, files_below, placed, write_pieces, write_texts
from sparselora_jax.models.model import Generation, Model
from sparselora_jax.runtime.files import StorageError
from sparselora_jax.sparse import rules


@runtime_checkable
class Pretrained(Protocol):
    """An object of transformers that writes its own files: a config, a tokenizer or a processor."""

    def save_pretrained(self, save_directory: str, **options: object) -> object:
        """Write the files."""


def write_new(
    folder: str | Path,
    hf_config: Pretrained,
    model: Model,
    params: dict,
    *,
    processor: Pretrained | None = None,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write the directory of a model that was not read from one: one file, each tensor in its array's dtype.

    Args:
      folder: the directory to write.
      hf_config: transformers' config of the same model (see `hf_configs`).
      model: the model.
      params: plain arrays.
      processor: a tokenizer or processor, written beside the weights.
      texts: more files to write, by name.

    Raises:
      StorageError: the folder holds another model's weights, or the params do not fit the model.
    """
    folder = Path(folder)
    check_shapes(folder, params, model.shapes())  # before anything is removed from the folder
    claim(folder, SINGLE)
    header, entries = _new_header(folder / SINGLE, model, params)
    # Describe the finished directory, so that `layout.pieces` can list its pieces as for any directory.
    checkpoint = Checkpoint(folder, (folder / SINGLE,), entries)
    with placed(folder / SINGLE) as new:
        new.write(header)
        write_pieces(new, layout.pieces(model.family, model.cfg, checkpoint), params)
    write_beside(folder, hf_config, model, params, processor=processor, texts=texts)


def claim(folder: Path, own: str) -> None:
    """Create a folder in which one file will hold the weights.

    Args:
      folder: the directory.
      own: name of that file.

    Raises:
      StorageError: the folder holds other weights.
    """
    foreign = [str(name) for name in files_below(folder) if name.suffix in WEIGHTS and name != Path(own)]
    if foreign:
        raise StorageError(f'{folder}: holds other weights ({", ".join(foreign[:3])}); choose an empty directory')
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)  # written last: until then the directory is incomplete


def write_beside(
    folder: Path,
    hf_config: Pretrained,
    model: Model,
    params: dict,
    *,
    processor: Pretrained | None,
    texts: Mapping[str, str] | None,
) -> None:
    """Write the files beside the weights, the config last.

    Args:
      folder: the directory.
      hf_config: see `write_new`.
      model: see `write_new`.
      params: see `write_new`; the dtype of the language tower's word embeddings becomes the config's, or that of the
        first array where there is none.
      processor: see `write_new`.
      texts: see `write_new`.
    """
    hf_config = copy.deepcopy(hf_config)  # the caller's config stays unchanged
    flat = rules.flatten(params)
    # A retrieval model has no language tower, and so no word embeddings of one.
    representative = flat[layout.EMBED] if layout.EMBED in flat else next(iter(flat.values()))
    hf_config.dtype = jnp.dtype(representative.dtype).name
    write_texts(folder, texts or {})
    # transformers would write into existing files; from a temporary directory each file is moved when complete.
    with tempfile.TemporaryDirectory() as apart:
        for part in (_generation_config(model.generation), processor, hf_config):
            if part is not None:
                part.save_pretrained(apart)
        copy_beside(folder, Path(apart), files_below(Path(apart)))


def _generation_config(generation: Generation) -> Pretrained:
    """Return transformers' config of the special tokens and the defaults of decoding."""
    from transformers import GenerationConfig

    eos = list(generation.eos)
    return GenerationConfig(
        eos_token_id=eos if len(eos) > 1 else (*eos, None)[0],  # a list of several, one number, or None
        pad_token_id=generation.pad,
        bos_token_id=generation.bos,
        decoder_start_token_id=generation.start,
        **dict(generation.options),
    )


def _new_header(file: Path, model: Model, params: dict) -> tuple[bytes, dict[str, Entry]]:
    """Return the header of a file with all tensors of a model, and the location of each tensor."""
    flat = rules.flatten(params)
    # Slices of a fused tensor have the same dtype and shape, so the first place represents all.
    tensors = {}
    for name, (place, *_) in layout.places(model.family, model.cfg).items():
        tensors[name] = (jnp.dtype(flat[place.path].dtype), _new_shape(place))
    header, starts = make_header(tensors, {'format': 'pt'})  # transformers rejects files without a format
    entries = {name: Entry(name, file, dtype, shape, starts[name]) for name, (dtype, shape) in tensors.items()}
    return header, entries


def _new_shape(place: layout.Place) -> tuple[int, ...]:
    """Return the shape of a tensor in a checkpoint."""
    shape = place.layer_shape
    if layout.is_patches(place.path):
        # A convolution over square patches of three colours: [side * side * 3, out] -> [out, 3, side, side].
        pixels, *outputs = shape
        side = math.isqrt(pixels // 3)
        return (*outputs, 3, side, side)
    rows, *rest = shape[::-1] if rules.named_kernel(place.path) else shape
    return (place.of * rows, *rest)  # slices follow each other along the first axis
