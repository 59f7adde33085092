"""LoRA factors alone as a PEFT adapter (https://huggingface.co/docs/peft), which `peft` loads onto torch's model."""

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
from sparselora_jax.runtime.files import StorageError, whole, write_text
from sparselora_jax.sparse import rules
from sparselora_jax.sparse.weights import Lora

_README = """# LoRA factors, learned under a sparsity mask

The adapter belongs to the *pruned* model: its weights were learned as `(W + s * A * B) * mask`, where the mask is False
wherever `W` was pruned to zero. PEFT knows no masks. It computes `W + s * A * B`, so

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
    """Writes `adapter_config.json`, `adapter_model.safetensors` and a README.md that says how to merge.

    Args:
      lora: factors of kernels; one may be of a slice of a fused weight.
      base: name or directory of the pruned model that the adapter is for; by default none is named.

    Raises:
      StorageError: factors of something that PEFT's linear layers cannot adapt, or of no kernel of the model.
    """
    folder, tensors, ranks = Path(folder), {}, {}
    for module, factors in modules(model, lora):
        for letter, factor in (('A', factors.a), ('B', factors.b)):  # safetensors writes memory as it lies: no strides
            tensors[f'base_model.model.{module}.lora_{letter}.weight'] = np.ascontiguousarray(factor)
        ranks[module] = (factors.a.shape[0], factors.a.shape[0] * factors.scale)
    folder.mkdir(parents=True, exist_ok=True)
    with whole(folder / 'adapter_model.safetensors') as partial:
        save_file(tensors, partial, metadata={'format': 'pt'})
    write_text(folder / 'README.md', _README)
    write_text(folder / 'adapter_config.json', json.dumps(_config(model, ranks, base), indent=2))


def modules(model: Model, lora: dict) -> Iterator[tuple[str, Factors]]:
    """Torch's module names, in PEFT's layout, one layer at a time.

    Raises:
      StorageError: see `save_peft`.
    """
    flat = rules.flatten(lora)
    places = layout.places(model.family, model.cfg)
    if unknown := flat.keys() - {place.path for several in places.values() for place in several}:
        raise StorageError(f'{sorted(unknown)[0]}: LoRA factors of no kernel of this model')
    for name, several in places.items():
        found = [(place, flat[place.path]) for place in several if place.path in flat]
        if found and layout.is_patches(found[0][0].path):
            raise StorageError(f'{found[0][0].path}: a convolution; leave it out of the LoRA rules to write an adapter')
        if found:
            yield name.removesuffix('.weight'), _fused(found)


def _fused(found: list[tuple[Place, Lora]]) -> Factors:
    """One update of a whole tensor from those of its slices; slices without one stay as they are."""
    place, first = found[0]
    outputs = first.b.shape[-1]
    rows, columns = [], []
    for place, factors in found:
        a, b = (x if place.layer is None else x[place.layer] for x in (factors.a, factors.b))
        block = np.zeros((place.of * outputs, b.shape[0]), np.float32)
        # One scale serves them all, so what a slice's own differs by is taken into B.
        block[place.index * outputs : (place.index + 1) * outputs] = np.asarray(b, np.float32).T * np.float32(
            factors.scale / first.scale
        )
        rows.append(np.asarray(a, np.float32).T)
        columns.append(block)
    return Factors(np.concatenate(rows), np.concatenate(columns, axis=1), first.scale)


def _config(model: Model, ranks: dict[str, tuple[int, float]], base: str | None) -> dict[str, Any]:
    """Rank and alpha of most modules, and patterns (regexes over whole names) for the others."""
    (rank, alpha), _ = Counter(ranks.values()).most_common(1)[0] if ranks else ((1, 1.0), 0)
    escaped = {module.replace('.', r'\.'): both for module, both in ranks.items()}
    return {
        'peft_type': 'LORA',
        'task_type': 'CAUSAL_LM' if set(model.shapes()) == {'language'} else None,
        'base_model_name_or_path': base,
        'r': rank,
        'lora_alpha': alpha,
        'rank_pattern': {name: r for name, (r, _) in escaped.items() if r != rank},
        'alpha_pattern': {name: a for name, (_, a) in escaped.items() if a != alpha},
        'target_modules': list(ranks),
        'lora_dropout': 0.0,
        'bias': 'none',
        'use_rslora': False,
        'inference_mode': True,
    }
