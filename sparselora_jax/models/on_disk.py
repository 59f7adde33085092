"""Weights that stay in their checkpoint and are read a layer at a time: how a model larger than memory is pruned."""

from typing import Any

import jax
import jax.numpy as jnp

from sparselora_jax import rules
from sparselora_jax.models import streaming
from sparselora_jax.models.layout import HEAD, Piece
from sparselora_jax.models.model import Model


class OnDisk:
    """A stacked array of a checkpoint: `array[layer]` reads that layer. It has a shape, as arrays have; no values."""

    def __init__(self, path: str, shape: tuple[int, ...], dtype: Any, pieces: list[Piece]):
        """`pieces`: of this array, see `layout.pieces`."""
        self.path, self.shape, self.dtype, self.ndim = path, shape, jnp.dtype(dtype), len(shape)
        self._layers: dict[int, list[Piece]] = {}
        for piece in pieces:
            within = piece._replace(starts=piece.starts[1:], sizes=piece.sizes[1:])
            self._layers.setdefault(piece.starts[0], []).append(within)

    def __getitem__(self, layer: int) -> jax.Array:
        shapes = rules.unflatten({self.path: self.shape[1:]})
        return rules.flatten(streaming.read_params(shapes, self._layers[layer], self.dtype))[self.path]


def params_on_disk(model: Model, pieces: list[Piece], dtype: Any) -> dict:
    """A params tree whose blocks are `OnDisk`, and whose untied head, which no block needs, is missing.

    Args:
      pieces: of the whole model, as `hf.open_model` finds them.
      dtype: of what is read.
    """
    shapes, by_path = rules.flatten(model.shapes()), {}
    for piece in pieces:
        by_path.setdefault(piece.path, []).append(piece)
    stacked = {path for path in shapes if '/blocks/' in path}
    whole = {path: shape for path, shape in shapes.items() if path not in stacked and path != HEAD}
    read = [piece for path in whole for piece in by_path[path]]
    flat = rules.flatten(streaming.read_params(rules.unflatten(whole), read, dtype))
    return rules.unflatten(flat | {path: OnDisk(path, shapes[path], dtype, by_path[path]) for path in stacked})
