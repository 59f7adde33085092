"""Weights that stay in their checkpoint and are read a layer at a time: how a model larger than memory is pruned."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from sparselora_jax import rules
from sparselora_jax.models import checkpoint_files, streaming
from sparselora_jax.models.checkpoint_files import Entry
from sparselora_jax.models.layout import Piece
from sparselora_jax.models.model import Model
from sparselora_jax.weights import effective_weight


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


class Pruned:
    """An `OnDisk` kernel with its zeros, from a file of masks and, where kept weights changed, one of kernels."""

    def __init__(self, dense: OnDisk, mask: Entry, kernel: Entry | None):
        """`mask`, `kernel`: where the stacked arrays lie."""
        self.dense, self.mask, self.kernel = dense, mask, kernel
        self.shape, self.dtype, self.ndim = dense.shape, dense.dtype, dense.ndim

    def __getitem__(self, layer: int) -> jax.Array:
        rows = (layer, layer + 1)
        mask = jnp.asarray(checkpoint_files.read(self.mask, rows)[0])
        kernel = self.dense[layer] if self.kernel is None else checkpoint_files.read(self.kernel, rows)[0]
        return effective_weight(jnp.asarray(kernel), mask)


def pruned_on_disk(params: dict, masks: Path, kernels: Path) -> dict:
    """`params_on_disk` with the kernels that were pruned in the places of the dense ones.

    Args:
      masks, kernels: files of `storage.layer_writer`; the second need not exist.
    """
    flat = rules.flatten(params)
    edited = {entry.name: entry for entry in checkpoint_files.read_header(kernels)} if kernels.exists() else {}
    for entry in checkpoint_files.read_header(masks):
        flat[entry.name] = Pruned(flat[entry.name], entry, edited.get(entry.name))
    return rules.unflatten(flat)


def params_on_disk(model: Model, pieces: list[Piece], dtype: Any) -> dict:
    """A params tree whose blocks are `OnDisk`.

    Args:
      pieces: of the whole model, as `hf.open_model` finds them.
      dtype: of what is read.
    """
    shapes, by_path = rules.flatten(model.shapes()), {}
    for piece in pieces:
        by_path.setdefault(piece.path, []).append(piece)
    whole = {path: shape for path, shape in shapes.items() if '/blocks/' not in path}
    read = [piece for path in whole for piece in by_path[path]]
    loaded = rules.flatten(streaming.read_params(rules.unflatten(whole), read, dtype))
    flat = {
        path: loaded[path] if path in whole else OnDisk(path, shape, dtype, by_path[path])
        for path, shape in shapes.items()
    }
    return rules.unflatten(flat)
