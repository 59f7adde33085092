"""A Hugging Face directory whose weights are packed: one file, `packed.safetensors`, in the place of the others.

Config, tokenizer and processor are the model's; docs/formats.md says what the file holds. torch does not read it.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from sparselora_jax.checkpoints import new as hf_new
from sparselora_jax.checkpoints.checkpoint_files import INDEX
from sparselora_jax.checkpoints.export import WEIGHTS, copy_beside, files_below, write_texts
from sparselora_jax.checkpoints.layout import HEAD, untied
from sparselora_jax.checkpoints.trees import check_shapes, load_safetensors, save_safetensors
from sparselora_jax.models.model import Model
from sparselora_jax.sparse import packing, rules
from sparselora_jax.sparse.weights import Adapted, merge

FILE = 'packed.safetensors'


def export_packed(
    folder: str | Path,
    model: Model,
    params: dict,
    *,
    hf_config: Any = None,
    processor: Any = None,
    texts: dict[str, str] | None = None,
) -> None:
    """Writes a directory that `load_model` reads.

    Args:
      params: as `sl.pack` makes them; or bound, packed kernels with their factors beside them (see `keep_factors`).
      hf_config, processor: of a model that was read from no directory; see `hf_new.write_new`.
      texts: more files to write, by name.

    Raises:
      StorageError: the folder holds other weights, or the params do not fit the model.
    """
    folder = Path(folder)
    check_shapes(folder, params, model.shapes())
    hf_new.claim(folder, FILE)
    save_safetensors(folder / FILE, params)
    if model.source is None:
        hf_new.write_beside(folder, hf_config, model, params, processor=processor, texts=texts)
        return
    source, texts = Path(model.source), texts or {}
    write_texts(folder, texts)
    others = [name for name in files_below(source) if name.suffix not in WEIGHTS and str(name) not in {*texts, INDEX}]
    copy_beside(folder, source, others)


def keep_factors(params: dict, lora: dict) -> dict:
    """Packed kernels bound to their factors, under their masks, which nothing rounds again; other kernels merged.

    Args:
      params: as `sl.pack` makes them.
    """
    flat, factors = rules.flatten(params), rules.flatten(lora)
    beside = {path: Adapted(flat[path], None, of) for path, of in factors.items() if packing.is_packed(flat[path])}
    merged = merge(params, None, rules.unflatten({path: of for path, of in factors.items() if path not in beside}))
    return rules.unflatten(rules.flatten(merged) | beside)


def load_packed(folder: Path, model: Model, *, dtype: Any = None) -> tuple[Model, dict]:
    """Reads the file of a directory.

    Args:
      model: as its config.json says; a head of its own is found in the file.
      dtype: of what is not packed; each array's own by default. Packed values keep theirs.

    Raises:
      StorageError, PackingError: the file is damaged, contradicts its format, or does not fit the config.
    """
    tree, _ = load_safetensors(folder / FILE)
    flat = rules.flatten(tree)
    if HEAD in flat:
        model = replace(model, cfg=untied(model.cfg))
    check_shapes(folder / FILE, tree, model.shapes())
    if dtype is not None:
        flat = {path: leaf.astype(dtype) if isinstance(leaf, jax.Array) else leaf for path, leaf in flat.items()}
    return model, rules.unflatten(flat)
