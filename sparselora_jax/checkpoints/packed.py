"""Write and read a Hugging Face directory whose weights are packed: one file, `packed.safetensors`.

Config, tokenizer and processor are the model's. docs/formats.md says what the file holds. torch does not read it.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import jax
from jax.typing import DTypeLike

from sparselora_jax.checkpoints.checkpoint_files import INDEX, refuse_adapter
from sparselora_jax.checkpoints.export import copy_beside, files_beside, write_texts
from sparselora_jax.checkpoints.layout import HEAD, untied
from sparselora_jax.checkpoints.trees import check_shapes, load_safetensors, save_safetensors
from sparselora_jax.checkpoints.write_new import Pretrained, claim, write_beside
from sparselora_jax.models.model import Model
from sparselora_jax.sparse import packing, rules
from sparselora_jax.sparse.weights import Adapted, merge

FILE = 'packed.safetensors'


def export_packed(
    folder: str | Path,
    model: Model,
    params: dict,
    *,
    hf_config: Pretrained | None = None,
    processor: Pretrained | None = None,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write a directory that `load_model` reads.

    Args:
      folder: the directory to write.
      model: the model.
      params: as `sl.pack` makes them; or bound, packed kernels with their factors beside them (see `keep_factors`).
      hf_config: of a model that was read from no directory; see `write_new`.
      processor: of a model that was read from no directory; see `write_new`.
      texts: more files to write, by name.

    Raises:
      StorageError: the folder holds other weights, the params do not fit the model, or an adapter lies beside the
        weights of the source.
    """
    folder = Path(folder)
    check_shapes(folder, params, model.shapes())
    if model.source is not None:
        refuse_adapter(Path(model.source))  # which may have come after the model was loaded
    claim(folder, FILE)
    save_safetensors(folder / FILE, params)
    if model.source is None:
        write_beside(folder, hf_config, model, params, processor=processor, texts=texts)
        return
    source = Path(model.source)
    texts = texts or {}
    write_texts(folder, texts)
    # The index names shards that this directory does not have.
    others = [name for name in files_beside(source) if str(name) not in {*texts, INDEX}]
    copy_beside(folder, source, others)


def keep_factors(params: dict, lora: dict) -> dict:
    """Bind packed kernels to their factors, under their masks, so that nothing rounds them again; merge the others.

    Args:
      params: as `sl.pack` makes them.
      lora: the factors that were trained.
    """
    flat = rules.flatten(params)
    factors = rules.flatten(lora)
    # A packed kernel that is merged would have to be unpacked, and packed and rounded once more.
    bound = {path: Adapted(flat[path], None, own) for path, own in factors.items() if packing.is_packed(flat[path])}
    to_merge = rules.unflatten({path: own for path, own in factors.items() if path not in bound})
    merged = merge(params, None, to_merge)
    return rules.unflatten(rules.flatten(merged) | bound)


def load_packed(folder: Path, model: Model, *, dtype: DTypeLike | None = None) -> tuple[Model, dict]:
    """Read the packed file of a directory.

    Args:
      folder: of `export_packed`.
      model: as its config.json says; a head of its own is found in the file.
      dtype: of what is not packed; each array's own by default. Packed values keep theirs.

    Returns:
      (model, params).

    Raises:
      StorageError, PackingError: the file is damaged, contradicts its format, or does not fit the config.
    """
    tree, _ = load_safetensors(folder / FILE)
    flat = rules.flatten(tree)
    # A tied config beside a head of its own: the model was read from such files; see `layout.follow_head`.
    if HEAD in flat:
        model = replace(model, cfg=untied(model.cfg))
    check_shapes(folder / FILE, tree, model.shapes())
    if dtype is not None:
        flat = {path: leaf.astype(dtype) if isinstance(leaf, jax.Array) else leaf for path, leaf in flat.items()}
    return model, rules.unflatten(flat)
