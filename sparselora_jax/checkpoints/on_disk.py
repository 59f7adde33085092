"""Weights that stay in their checkpoint and are read a layer at a time: how a model larger than memory is pruned, and
becomes the smaller base that it is restored on.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparselora_jax.checkpoints import checkpoint_files, streaming
from sparselora_jax.checkpoints.checkpoint_files import Entry
from sparselora_jax.checkpoints.layout import Piece
from sparselora_jax.models.model import Model
from sparselora_jax.runtime.progress import Progress
from sparselora_jax.sparse import packing, rules
from sparselora_jax.sparse.weights import effective_weight


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
    """A stacked kernel with its zeros, from a file of masks and, where kept weights changed, one of kernels."""

    def __init__(self, dense: OnDisk | jax.Array, mask: Entry, kernel: Entry | None):
        """`mask`, `kernel`: where the stacked arrays lie."""
        self.dense, self.mask, self.kernel = dense, mask, kernel
        self.shape, self.dtype, self.ndim = dense.shape, dense.dtype, dense.ndim

    def __getitem__(self, layer: int) -> jax.Array:
        kernel = self.dense[layer] if self.kernel is None else checkpoint_files.read(self.kernel, (layer, layer + 1))[0]
        return effective_weight(jnp.asarray(kernel), self.mask_of(layer))

    def mask_of(self, layer: int) -> jax.Array:
        """Where that layer keeps weights."""
        return jnp.asarray(checkpoint_files.read(self.mask, (layer, layer + 1))[0])


def pruned_on_disk(params: dict, masks: Path, *kernels: Path) -> dict:
    """`params_on_disk` with the kernels that were pruned in the places of the dense ones.

    Args:
      masks, kernels: files of `storage.layer_writer`. Those of kernels need not exist; of two that hold the same, the
        last counts.
    """
    flat, edited = rules.flatten(params), {}
    for file in filter(Path.exists, kernels):
        edited |= {entry.name: entry for entry in checkpoint_files.read_header(file)}
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


def reduce_on_disk(params: dict, base: str | Sequence[tuple[str, str]]) -> tuple[dict, dict | None]:
    """Store pruned kernels in fewer bytes a layer at a time, in host memory: a device holds one pruned layer at most.

    Args:
      params: of `pruned_on_disk`.
      base: see `packing.reduce_kernels`.

    Raises:
      PackingError: see `packing.pack`.
    """
    flat, masks = rules.flatten(params), {}
    pruned = {path: leaf for path, leaf in flat.items() if isinstance(leaf, Pruned)}
    formats = dict.fromkeys(pruned, base) if isinstance(base, str) else rules.match(base, pruned)
    progress, done = Progress('base', len(pruned), interval=5), 0
    for path, leaf in flat.items():
        if path in pruned:
            layers = [_reduce_layer(path, leaf, layer, formats[path]) for layer in range(leaf.shape[0])]
            progress(done := done + 1, path)
            flat[path] = packing.stack([kernel for kernel, _ in layers])
            if layers[0][1] is not None:
                masks[path] = packing.stack([mask for _, mask in layers])
        elif isinstance(leaf, OnDisk):
            flat[path] = np.stack([leaf[layer] for layer in range(leaf.shape[0])])
    return rules.unflatten(flat), rules.unflatten(masks) if masks else None


def _reduce_layer(path: str, leaf: Pruned, layer: int, form: str) -> tuple[Any, Any]:
    """(kernel, mask) of one layer, on the host, so that nothing of it stays on the device."""
    trees = ({path: leaf[layer]}, {path: leaf.mask_of(layer)})
    try:
        params, masks = packing.reduce_kernels(*map(rules.unflatten, trees), form)
    except packing.PackingError as error:
        raise packing.PackingError(f'layer {layer} of {error}') from None
    found = rules.flatten(params)[path], None if masks is None else rules.flatten(masks)[path]
    return jax.tree.map(np.asarray, found)
