"""Read and merge weights one layer at a time, most of them from disk.

A model larger than memory is pruned this way, and then reduced to the smaller base that restoration uses. An export
reads the same kernels in the precision of their files.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Bool, Shaped

from sparselora_jax.checkpoints import layout, safetensors_format, streaming
from sparselora_jax.checkpoints.checkpoint_files import open_checkpoint
from sparselora_jax.checkpoints.layout import Piece
from sparselora_jax.checkpoints.safetensors_format import Entry
from sparselora_jax.models.model import Model
from sparselora_jax.runtime.progress import Progress
from sparselora_jax.sparse import packing, rules
from sparselora_jax.sparse.dense import dense_mask
from sparselora_jax.sparse.weights import Lora, effective_weight, merge

HostArray = Shaped[np.ndarray, '...']


class OnDisk:
    """A stacked array of a checkpoint: `array[layer]` reads that layer; the object itself has a shape but no values."""

    def __init__(self, path: str, shape: tuple[int, ...], dtype: DTypeLike, pieces: Sequence[Piece]):
        """Store the location of each layer.

        Args:
          path: path of the array.
          shape: shape of the stack.
          dtype: dtype of `array[layer]`.
          pieces: every piece of this array, see `layout.pieces`.
        """
        self.path = path
        self.shape = shape
        self.dtype = jnp.dtype(dtype)
        self.ndim = len(shape)
        # The pieces of each layer, with block indices relative to that layer.
        self._layers: defaultdict[int, list[Piece]] = defaultdict(list)
        for piece in pieces:
            in_layer = piece._replace(starts=piece.starts[1:], sizes=piece.sizes[1:])
            self._layers[piece.starts[0]].append(in_layer)

    def __getitem__(self, layer: int) -> jax.Array:
        # Convert on the device, as `load_model` does, so that a layer equals that of the loaded stack bit for bit.
        shapes = rules.unflatten({self.path: self.shape[1:]})
        return rules.flatten(streaming.read_params(shapes, self._layers[layer], self.dtype))[self.path]

    def in_file_dtype(self, layer: int) -> HostArray:
        """Read one layer on the host, bit for bit as in its file."""
        return streaming.read_host_array(self.shape[1:], self._layers[layer])


class Pruned:
    """A stacked pruned kernel, read from a file of masks and, if kept weights changed, from a file of kernels."""

    def __init__(self, dense: OnDisk | jax.Array, mask: Entry, kernel: Entry | None):
        """Store the location of each layer.

        Args:
          dense: the kernel before it was pruned.
          mask: location of the stacked mask.
          kernel: location of the stacked kernel with changed kept weights; None: they did not change.
        """
        self.dense = dense
        self.mask = mask
        self.kernel = kernel
        self.shape = dense.shape
        self.dtype = dense.dtype
        self.ndim = dense.ndim

    def __getitem__(self, layer: int) -> jax.Array:
        kernel = self.dense[layer] if self.kernel is None else _read_layer(self.kernel, layer)
        return effective_weight(jnp.asarray(kernel), self.mask_of(layer))

    def mask_of(self, layer: int) -> Bool[jax.Array, 'inputs outputs']:
        """Read the mask of one layer."""
        return jnp.asarray(_read_layer(self.mask, layer))

    def in_file_dtype(self, layer: int) -> HostArray:
        """Read one layer on the host: kept weights bit for bit as in their file, the others zero."""
        if self.kernel is not None:
            kernel = _read_layer(self.kernel, layer)
        elif isinstance(self.dense, OnDisk):
            kernel = self.dense.in_file_dtype(layer)
        else:
            kernel = np.asarray(self.dense[layer])
        # Use NumPy on the host: a device would cast fp64, and may flush the smallest numbers to zero.
        return np.where(_read_layer(self.mask, layer), kernel, np.zeros((), kernel.dtype))


class Reduced:
    """A stacked pruned kernel in fewer bytes, in memory, converted to float32 one layer at a time."""

    def __init__(self, kernel: Any, mask: Any | None):
        """Store the kernel and its mask.

        Args:
          kernel: a stacked packed or four-bit kernel.
          mask: its mask; None: a packed kernel that stores its own.
        """
        self.kernel = kernel
        self.mask = mask
        self.shape = kernel.shape
        self.dtype = np.dtype(np.float32)
        self.ndim = len(kernel.shape)

    def __getitem__(self, layer: int) -> jax.Array:
        kernel = _layer_of(self.kernel, layer)
        mask = dense_mask(_layer_of(self.mask, layer), kernel)
        return effective_weight(kernel, mask, dtype=jnp.float32)

    def mask_of(self, layer: int) -> Bool[jax.Array, 'inputs outputs']:
        """Return the mask of one layer."""
        # A packed kernel stores its own mask; otherwise the kernel is not read.
        kernel = _layer_of(self.kernel, layer) if self.mask is None else None
        return dense_mask(_layer_of(self.mask, layer), kernel)

    def in_file_dtype(self, layer: int) -> HostArray:
        """Return one layer in float32, which holds every rounded value; the code that writes a file casts it."""
        return np.asarray(self[layer])


def _layer_of(tree: Any, layer: int) -> Any:
    """Return one layer of a stacked kernel or mask; None stays None."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf[layer]), tree)


class Merged:
    """A stacked kernel with LoRA factors, merged in float32 one layer at a time."""

    def __init__(self, kernel: OnDisk | Pruned | Reduced, lora: Lora):
        """Store the kernel and the factors.

        Args:
          kernel: the kernel without its factors.
          lora: the stacked factors.
        """
        self.kernel = kernel
        self.lora = lora  # small: all layers stay in memory
        self.shape = kernel.shape
        self.dtype = np.dtype(np.float32)
        self.ndim = kernel.ndim

    def __getitem__(self, layer: int) -> jax.Array:
        factors = jax.tree.map(lambda leaf: leaf[layer], self.lora)
        mask = self.kernel.mask_of(layer) if isinstance(self.kernel, Pruned | Reduced) else None
        return _merge_float32(self.kernel.in_file_dtype(layer), mask, factors)

    def in_file_dtype(self, layer: int) -> HostArray:
        """Merge one layer in float32; the code that writes a file casts it."""
        return np.asarray(self[layer])


Stack = OnDisk | Pruned | Reduced | Merged


def pruned_on_disk(params: dict, masks: Path, *kernels: Path) -> dict:
    """Replace the dense kernels of `params_on_disk` by the pruned ones.

    Args:
      params: result of `params_on_disk`.
      masks: a file written by `trees.layer_writer`.
      kernels: files written by `trees.layer_writer`, which need not exist. If two hold the same kernel, the last one is
        used.
    """
    flat = rules.flatten(params)
    edited = _read_headers(filter(Path.exists, kernels))
    for path, mask in _read_headers([masks]).items():
        flat[path] = Pruned(flat[path], mask, edited.get(path))
    return rules.unflatten(flat)


def params_on_disk(model: Model, pieces: Sequence[Piece], dtype: DTypeLike) -> dict:
    """Return a params tree whose blocks are `OnDisk`; the few arrays outside the blocks are read.

    Args:
      model: the model.
      pieces: all pieces of the model, from `load.open_model`.
      dtype: dtype of the arrays.
    """
    shapes = rules.flatten(model.shapes())
    pieces_of = _group_by_path(pieces)
    # Every pass reads embeddings, norms and projections, so they stay in memory.
    outside = {path: shape for path, shape in shapes.items() if not rules.is_in_block(path)}
    outside_pieces = [piece for path in outside for piece in pieces_of[path]]
    loaded = rules.flatten(streaming.read_params(rules.unflatten(outside), outside_pieces, dtype))
    flat = {
        path: loaded[path] if path in outside else OnDisk(path, shape, dtype, pieces_of[path])
        for path, shape in shapes.items()
    }
    return rules.unflatten(flat)


def merge_from_source(
    model: Model,
    merged: dict,
    lora: dict,
    masks: Path,
    *kernels: Path,
    rounded: Mapping[str, Reduced] | None = None,
) -> dict:
    """Return merged params in which changed kernels are merged from the source's files, in the files' precision.

    A model may be pruned and restored in another dtype than that of its files, such as bfloat16 for files in float32.
    An export of `merged` would round every changed kernel to that dtype. This function takes W from the source's file
    (or from the file of edited kernels) instead. A changed kernel is `where(mask, W + scale * a @ b, 0)`, summed in
    float32 and cast to the file's dtype. It differs from the trained weight by the rounding of the training dtype.

    If the file has the dtype of `merged`, the array of `merged` is used, which equals the trained weight bit for bit.

    Args:
      model: read from a directory.
      merged: plain arrays.
      lora: the trained factors; empty if there are none.
      masks: a file written by `trees.layer_writer`.
      kernels: files of kernels whose kept weights changed; they need not exist. If two hold the same kernel, the last
        one is used.
      rounded: kernels that were rounded before LoRA was trained on them, by path. Their W is the rounded one, which the
        source does not have.

    Returns:
      A tree of the same shapes, for `export.export_model`. Some kernels have the type `Stack` and are read only when
      they are written.

    Raises:
      StorageError: the source's files are missing or damaged.
    """
    checkpoint = open_checkpoint(model.source)
    pieces_of = _group_by_path(layout.pieces(model.family, model.cfg, checkpoint))
    flat = rules.flatten(merged)
    factors = rules.flatten(lora)
    mask_entries = _read_headers([masks])
    edited = _read_headers(filter(Path.exists, kernels))
    for path in mask_entries.keys() | factors.keys():
        pieces = pieces_of[path]
        # Use `merged`, which equals the trained weights bit for bit; a merge one layer at a time may round differently.
        if all(piece.entry.dtype == flat[path].dtype for piece in pieces):
            continue
        if flat[path].ndim == 2:  # a kernel outside the blocks: pruning masks only stacks
            kernel = streaming.read_host_array(flat[path].shape, pieces)
            flat[path] = np.asarray(_merge_float32(kernel, None, factors[path]))
            continue
        stack = OnDisk(path, flat[path].shape, pieces[0].entry.dtype, pieces)
        if rounded and path in rounded:
            stack = rounded[path]
        elif path in mask_entries:
            stack = Pruned(stack, mask_entries[path], edited.get(path))
        flat[path] = Merged(stack, factors[path]) if path in factors else stack
    return rules.unflatten(flat)


def _merge_float32(kernel: HostArray, mask: jax.Array | None, lora: Lora) -> jax.Array:
    """Merge the kernel of one layer in float32."""
    # Cast on the host: a device may flush the smallest numbers of float16 to zero.
    params = {'kernel': jnp.asarray(kernel.astype(np.float32))}
    masks = None if mask is None else {'kernel': mask}
    return merge(params, masks, {'kernel': lora})['kernel']


def _group_by_path(pieces: Iterable[Piece]) -> dict[str, list[Piece]]:
    groups: defaultdict[str, list[Piece]] = defaultdict(list)
    for piece in pieces:
        groups[piece.path].append(piece)
    return dict(groups)


def _read_headers(files: Iterable[Path]) -> dict[str, Entry]:
    """Return the tensors of several files by name; if two have the same name, the last one is used."""
    return {entry.name: entry for file in files for entry in safetensors_format.read_header(file)}


def _read_layer(entry: Entry, layer: int) -> HostArray:
    return safetensors_format.read(entry, (layer, layer + 1))[0]


def reduce_on_disk(params: dict, base: str | Sequence[tuple[str, str]]) -> tuple[dict, dict | None]:
    """Reduce pruned kernels to fewer bytes in host memory, one layer at a time; a device holds at most one layer.

    Args:
      params: result of `pruned_on_disk`.
      base: see `packing.reduce_kernels`.

    Returns:
      (params, masks); masks is None if packed kernels contain their own.

    Raises:
      PackingError: see `packing.pack`; the message names path and layer.
    """
    flat = rules.flatten(params)
    masks: dict[str, packing.PackedMask] = {}
    pruned = {path: leaf for path, leaf in flat.items() if isinstance(leaf, Pruned)}
    formats = dict.fromkeys(pruned, base) if isinstance(base, str) else rules.match(base, pruned)
    progress = Progress('base', len(pruned), interval=5)
    done = 0
    for path, leaf in flat.items():
        if path in pruned:
            # All layers of one kernel are on the host at once, each already reduced.
            layers = [_reduce_layer(path, leaf, layer, formats[path]) for layer in range(leaf.shape[0])]
            done += 1
            progress(done, path)
            flat[path] = packing.stack([kernel for kernel, _ in layers])
            if layers[0][1] is not None:  # packed kernels contain their masks
                masks[path] = packing.stack([mask for _, mask in layers])
        elif isinstance(leaf, OnDisk):  # an array that stays dense, read whole: restoration needs it in memory
            flat[path] = np.stack([leaf[layer] for layer in range(leaf.shape[0])])
    return rules.unflatten(flat), rules.unflatten(masks) if masks else None


def _reduce_layer(path: str, leaf: Pruned, layer: int, base: str) -> tuple[Any, packing.PackedMask | None]:
    """Reduce one layer, and return (kernel, mask) on the host, so that nothing stays on the device."""
    kernels = rules.unflatten({path: leaf[layer]})
    masks = rules.unflatten({path: leaf.mask_of(layer)})
    try:
        kernels, masks = packing.reduce_kernels(kernels, masks, base)
    except packing.PackingError as error:
        raise packing.PackingError(f'layer {layer} of {error}') from None
    kernel = rules.flatten(kernels)[path]
    mask = None if masks is None else rules.flatten(masks)[path]
    return jax.tree.map(np.asarray, (kernel, mask))
