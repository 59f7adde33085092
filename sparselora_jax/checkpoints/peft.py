"""Write LoRA factors as a PEFT adapter (https://huggingface.co/docs/peft), to load onto the torch model."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from safetensors.numpy import save_file

from sparselora_jax.checkpoints import layout
from sparselora_jax.checkpoints.layout import Place
from sparselora_jax.models.model import Model
from sparselora_jax.runtime.files import StorageError, read_json, whole, write_text
from sparselora_jax.sparse import rules
from sparselora_jax.sparse.weights import Lora

CONFIG = 'adapter_config.json'

_README = """---
library_name: peft
tags:
- lora
- sparse
- sparselora-jax
---

# LoRA factors, learned under a sparsity mask

The adapter belongs to the *pruned* model, whose directory `base_model_name_or_path` in adapter_config.json names. If it
names none, `launch/prune.py` with the `--config` and `--workdir` of the run writes that directory and names it here.

The adapter was learned as `(W + s * A * B) * mask`, where the mask is False wherever `W` was pruned to zero. PEFT knows
no masks. It computes `W + s * A * B`, so

- while it is attached, the adapter also acts where weights were pruned, which is not the model that was trained;
- `merge_and_unload()` fills the holes: nearly every zero of `W` becomes some other number, and the sparsity is lost.

Merge under the masks instead. In this library: `sparselora_jax.merge(params, masks, lora)`; the main job exports the
result. With torch, on the pruned model, whose zeros are its masks:

```python
holes = {name: weight == 0 for name, weight in model.named_parameters()}
merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
for name, weight in merged.named_parameters():
    weight.data[holes[name]] = 0
```

A fused weight (query, key and value as one) has one factor of three times the rank: A is stacked, B is block-diagonal.
"""


class Factors(NamedTuple):
    """The update of one torch module: `scale * b @ a`."""

    a: Float[np.ndarray, 'rank inputs']
    b: Float[np.ndarray, 'outputs rank']
    scale: float


def save_peft(folder: str | Path, model: Model, lora: dict, *, base: str | None = None) -> None:
    """Write `adapter_config.json`, `adapter_model.safetensors` and a README.md that explains how to merge.

    Args:
      folder: the directory to write.
      model: the model whose kernels were adapted.
      lora: factors of kernels; a kernel may be a slice of a fused weight.
      base: name or directory of the pruned model that the adapter is for; by default the adapter names none.

    Raises:
      StorageError: PEFT's linear layers cannot adapt one of the weights, or factors belong to no kernel of the model.
    """
    folder = Path(folder)
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, tuple[int, float]] = {}  # (rank, alpha) by module
    for module, factors in modules(model, lora):
        for letter, factor in (('A', factors.a), ('B', factors.b)):
            # Made contiguous, because safetensors writes raw memory and ignores strides.
            tensors[f'base_model.model.{module}.lora_{letter}.weight'] = np.ascontiguousarray(factor)
        # PEFT's scale is alpha / r.
        rank = factors.a.shape[0]
        ranks[module] = (rank, rank * factors.scale)
    # Nothing is written before all factors have been checked.
    folder.mkdir(parents=True, exist_ok=True)
    with whole(folder / 'adapter_model.safetensors') as partial:
        save_file(tensors, partial, metadata={'format': 'pt'})
    write_text(folder / 'README.md', _README)
    write_text(folder / CONFIG, json.dumps(_config(model, ranks, base), indent=2))


def name_base(folder: str | Path, base: str) -> None:
    """Name the pruned model of an adapter that was written before that model; without an adapter, do nothing.

    Args:
      folder: directory that `save_peft` wrote; it need not exist.
      base: name or directory of the pruned model.

    Raises:
      StorageError: the adapter's config is damaged.
    """
    file = Path(folder) / CONFIG
    if file.exists():
        config = read_json(file, 'put back a copy, or delete the folder')
        write_text(file, json.dumps(config | {'base_model_name_or_path': base}, indent=2))


def modules(model: Model, lora: dict) -> Iterator[tuple[str, Factors]]:
    """Yield the names of torch's modules and their factors in PEFT's layout, one layer at a time.

    Args:
      model: the model whose kernels were adapted.
      lora: factors of kernels.

    Raises:
      StorageError: see `save_peft`.
    """
    flat = rules.flatten(lora)
    places = layout.places(model.family, model.cfg)
    # Checked before anything is yielded, so that no partial adapter is written.
    known = {place.path for places_of_tensor in places.values() for place in places_of_tensor}
    unknown = sorted(flat.keys() - known)
    if unknown:
        raise StorageError(f'{unknown[0]}: LoRA factors of no kernel of this model')
    for name, places_of_tensor in places.items():
        adapted = [(place, flat[place.path]) for place in places_of_tensor if place.path in flat]
        if not adapted:
            continue
        # PEFT adapts a convolution with two convolutions; our factors belong to a matrix over flattened patches.
        path = adapted[0][0].path
        if layout.is_patches(path):
            raise StorageError(f'{path}: a convolution; leave it out of the LoRA rules to write an adapter')
        yield name.removesuffix('.weight'), _fuse(adapted)


def _fuse(adapted: list[tuple[Place, Lora]]) -> Factors:
    """Combine the updates of the slices of a tensor into one update; slices without factors stay unchanged."""
    first = adapted[0][1]
    outputs = first.b.shape[-1]
    rows = []
    columns = []
    for place, factors in adapted:
        a = factors.a if place.layer is None else factors.a[place.layer]
        b = factors.b if place.layer is None else factors.b[place.layer]
        # B is zero except for the outputs of the slice, so that each slice uses its own rows of A.
        block = np.zeros((place.of * outputs, b.shape[0]), np.float32)
        # There is one scale for all slices, so B absorbs the ratio of a slice's own scale to it.
        ratio = np.float32(factors.scale / first.scale)
        block[place.index * outputs : (place.index + 1) * outputs] = np.asarray(b, np.float32).T * ratio
        rows.append(np.asarray(a, np.float32).T)
        columns.append(block)
    return Factors(np.concatenate(rows), np.concatenate(columns, axis=1), first.scale)


def _config(model: Model, ranks: dict[str, tuple[int, float]], base: str | None) -> dict[str, Any]:
    """Return PEFT's config: the most common rank and alpha, and patterns for the other modules.

    Args:
      model: the model whose kernels were adapted.
      ranks: (rank, alpha) by module.
      base: see `save_peft`.
    """
    (rank, alpha), _ = Counter(ranks.values()).most_common(1)[0] if ranks else ((1, 1.0), 0)
    # PEFT's patterns are regexes that match the end of a name; a whole name matches only itself.
    escaped = {module.replace('.', r'\.'): rank_and_alpha for module, rank_and_alpha in ranks.items()}
    return {
        'peft_type': 'LORA',
        'task_type': 'CAUSAL_LM' if set(model.shapes()) == {'language'} else None,
        # PEFT loads the base with this name by itself, so it must be the pruned model.
        'base_model_name_or_path': base,
        'r': rank,
        'lora_alpha': alpha,
        'rank_pattern': {name: own_rank for name, (own_rank, _) in escaped.items() if own_rank != rank},
        'alpha_pattern': {name: own_alpha for name, (_, own_alpha) in escaped.items() if own_alpha != alpha},
        'target_modules': list(ranks),
        'lora_dropout': 0.0,
        'bias': 'none',
        'use_rslora': False,
        'inference_mode': True,
    }
