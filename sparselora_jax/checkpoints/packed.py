"""Write and read a Hugging Face directory whose weights are packed into one file, `packed.safetensors`.

Config, tokenizer and processor are those of the model. docs/formats.md describes the file. torch cannot read it.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sparselora_jax.checkpoints.checkpoint_files import INDEX, refuse_adapter
from sparselora_jax.checkpoints.layout import HEAD, untied
from sparselora_jax.checkpoints.trees import (
    CHECKSUMS,
    check_shapes,
    load_safetensors,
    read_metadata,
    save_safetensors,
)
from sparselora_jax.checkpoints.write_new import Pretrained, claim, write_beside
from sparselora_jax.checkpoints.writing import copy_beside, files_beside, write_texts
from sparselora_jax.models.model import Model
from sparselora_jax.runtime.files import StorageError
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
      params: the result of `sl.pack`, or of `keep_factors`, which binds packed kernels to their factors.
      hf_config: only for a model that was not read from a directory; see `write_new`.
      processor: only for a model that was not read from a directory; see `write_new`.
      texts: more files to write, by name.

    Raises:
      StorageError: the folder holds other weights, the params do not fit the model, or an adapter lies beside the
        weights of the source.
    """
    folder = Path(folder)
    check_shapes(folder, params, model.shapes())
    if model.source is not None:
        refuse_adapter(Path(model.source))  # an adapter may have been added after the model was loaded
    claim(folder, FILE)
    save_safetensors(folder / FILE, params)
    if model.source is None:
        write_beside(folder, hf_config, model, params, processor=processor, texts=texts)
        return
    source = Path(model.source)
    texts = texts or {}
    write_texts(folder, texts)
    # The index is not copied, since it names shards that this directory does not have.
    others = [name for name in files_beside(source) if str(name) not in {*texts, INDEX}]
    copy_beside(folder, source, others)


def keep_factors(params: dict, lora: dict) -> dict:
    """Bind packed kernels to their factors, under their masks, so that they are not rounded again; merge the others.

    Args:
      params: the result of `sl.pack`.
      lora: the trained factors.
    """
    flat = rules.flatten(params)
    factors = rules.flatten(lora)
    # To merge a packed kernel, it would have to be unpacked, packed and rounded again.
    bound = {path: Adapted(flat[path], None, own) for path, own in factors.items() if packing.is_packed(flat[path])}
    to_merge = rules.unflatten({path: own for path, own in factors.items() if path not in bound})
    merged = merge(params, None, to_merge)
    return rules.unflatten(rules.flatten(merged) | bound)


def load_packed(folder: Path, model: Model, *, dtype: DTypeLike | None = None) -> tuple[Model, dict]:
    """Read the packed file of a directory.

    Args:
      folder: directory that `export_packed` wrote.
      model: the model of config.json; an untied head is recognised from the file.
      dtype: dtype of arrays that are not packed; each array's own by default. Packed values keep theirs.

    Returns:
      (model, params).

    Raises:
      StorageError, PackingError: the file is damaged, contradicts its format, or does not fit the config.
    """
    # A damaged value may still be a legal one, so only checksums find it.
    if CHECKSUMS not in read_metadata(folder / FILE):
        raise StorageError(f'{folder / FILE}: its header has no checksums; export it again')
    tree, _ = load_safetensors(folder / FILE)
    flat = rules.flatten(tree)
    # The config may say tied although the file has its own head, as for T5 1.1; see `layout.follow_head`.
    if HEAD in flat:
        model = replace(model, cfg=untied(model.cfg))
    check_shapes(folder / FILE, tree, model.shapes())
    for path, leaf in flat.items():
        for array in jax.tree.leaves(leaf):
            if jnp.issubdtype(array.dtype, jnp.floating) and not jnp.isfinite(array).all():
                raise StorageError(f'{folder / FILE}: {path} has NaN or infinite numbers; export it again')
    if dtype is not None:
        flat = {path: leaf.astype(dtype) if isinstance(leaf, jax.Array) else leaf for path, leaf in flat.items()}
    return model, rules.unflatten(flat)
