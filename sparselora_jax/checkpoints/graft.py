"""Put the vision tower of one model into another one: the procedure behind the paper's scores of Flickr30k.

The paper's code scores no pruned model on retrieval. It takes the pruned vision tower of a BLIP-2 or InstructBLIP,
whose images have 224 pixels, and puts it into BLIP-2's retrieval model, which reads 364 and stays dense otherwise. The
positions are interpolated, and the norm after the tower stays that of the retrieval model (in LAVIS it is not a part of
the tower). So only the sparsity of the vision tower moves that score.
"""

import dataclasses
from pathlib import Path

from jax.typing import DTypeLike

from sparselora_jax.checkpoints import load, packed, streaming
from sparselora_jax.models import vit
from sparselora_jax.models.model import Model
from sparselora_jax.runtime.errors import UnsupportedModelError
from sparselora_jax.sparse import rules

VISION = 'vision'
POSITIONS = 'positions'
# Fields of a tower's config that may differ: the size of images, and the names in its files.
_OWN_FIELDS = ('image_size', 'fused_qkv')
NORM = 'norm'


def load_tower(dir_or_hub_id: str | Path, tower: str, *, dtype: DTypeLike | None = None) -> tuple[Model, dict]:
    """Read one tower of a model; the weights of the others are not read.

    Args:
      dir_or_hub_id: see `load.load_model`.
      tower: its name, such as 'vision'.
      dtype: see `load.load_model`.

    Returns:
      (the model, the params of the tower).

    Raises:
      StorageError, UnsupportedModelError: see `load.load_model`; or the model has no such tower.
    """
    folder = load.find_directory(dir_or_hub_id)
    # All kernels of a packed directory are in one file.
    if (folder / packed.FILE).is_file():
        model, params = load.load_model(folder, dtype=dtype)
        _check_tower(folder, model, tower)
        return model, params[tower]
    model, pieces = load.open_model(folder)
    _check_tower(folder, model, tower)
    own = [piece for piece in pieces if piece.path.startswith(f'{tower}/')]
    shapes = {tower: model.shapes()[tower]}
    return model, streaming.read_params(shapes, own, dtype)[tower]


def _check_tower(folder: Path, model: Model, tower: str) -> None:
    """Raise `UnsupportedModelError` if a model has no such tower."""
    if tower not in model.family.tower_names:
        raise UnsupportedModelError(f'{folder}: {model.family.name} models have no {tower} tower')


def with_vision_from(model: Model, params: dict, dir_or_hub_id: str | Path, *, dtype: DTypeLike | None = None) -> dict:
    """Return params in which the vision tower is that of another model, with its positions interpolated.

    Args:
      model: a model with a vision tower.
      params: its params.
      dir_or_hub_id: the other model, such as a pruned BLIP-2.
      dtype: dtype of the tower.

    Returns:
      The params; the norm after the tower's blocks stays that of the model.

    Raises:
      StorageError: see `load_tower`.
      UnsupportedModelError: see `load_tower`; or the towers differ in more than the size of their images.
    """
    other, tower = load_tower(dir_or_hub_id, VISION, dtype=dtype)
    _check_same_tower(model, other, dir_or_hub_id)
    positions = vit.resize_positions(tower[POSITIONS], other.cfg.vision, model.cfg.vision)
    kept = {NORM: params[VISION][NORM]} if NORM in params[VISION] else {}
    return params | {VISION: tower | {POSITIONS: positions} | kept}


def _check_same_tower(model: Model, other: Model, dir_or_hub_id: str | Path) -> None:
    """Raise `UnsupportedModelError` if the vision towers of two models differ in more than the size of their images."""
    name = model.source or model.family.name
    remedy = 'give a model with the same vision tower, such as a BLIP-2 or InstructBLIP'
    own = rules.flatten(model.shapes()[VISION])
    theirs = rules.flatten(other.shapes()[VISION])
    # Their number depends on the size of images.
    for shapes in (own, theirs):
        shapes.pop(POSITIONS, None)
    for path in sorted(own.keys() | theirs.keys()):
        if own.get(path) != theirs.get(path):
            raise UnsupportedModelError(
                f'{dir_or_hub_id}: its {VISION}/{path} has the shape {theirs.get(path)}, and that of '
                f'{name} {own.get(path)}: {remedy}'
            )
    # Weights of the same shapes may be for other heads, norms or activations.
    for field in dataclasses.fields(model.cfg.vision):
        their_value = getattr(other.cfg.vision, field.name, None)
        own_value = getattr(model.cfg.vision, field.name)
        if field.name not in _OWN_FIELDS and their_value != own_value:
            raise UnsupportedModelError(
                f'{dir_or_hub_id}: its vision tower has {field.name} {their_value!r}, and that of {name} '
                f'{own_value!r}: {remedy}'
            )
