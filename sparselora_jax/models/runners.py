"""Runners: functions that execute a tower's stacked blocks, for training, generation and pruning.

A tower passes its block and the stacked weights to a runner, and has no loop of its own. So the same forward is scanned
in training, unrolled in decoding, and run layer by layer in pruning.
"""

import functools
import re
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from sparselora_jax.sparse.kernels import cpu
from sparselora_jax.sparse.packing import Packed24

# Hidden states; a forward may begin with arrays of NumPy.
Hidden = Float[Array | np.ndarray, '...']


@runtime_checkable
class Block(Protocol):
    """One block of a tower."""

    def __call__(self, w: dict, x: Hidden, ctx: dict, cache: PyTree) -> tuple[Float[Array, '...'], PyTree]:
        """Run one block.

        Args:
          w: the weights of one layer.
          x: hidden states, which the block changes.
          ctx: arrays that the block only reads: masks, position tables, an encoder's output. The leading axis of each
            is the batch or 1, so a runner may split a large batch into parts. `valid`, `[batch, rows]`, is False at
            pads, which pruning leaves out (`valid_rows`).
          cache: the layer's cached keys and values; None: no cache.

        Returns:
          Hidden states, and the cache with the new keys and values.
        """


@runtime_checkable
class Runner(Protocol):
    """A way to execute a stack of blocks.

    `scan_blocks`, `remat_blocks` and `unrolled_blocks` below, the pruner's walk (`pruning.walk`) and the runner that
    gathers sharded weights (`sparse.sharding`) are runners.
    """

    def __call__(
        self, tower: str, block: Block, weights: PyTree, x: Hidden, ctx: dict, cache: PyTree = None
    ) -> tuple[Any, PyTree]:
        """Run all blocks of a stack in order.

        Args:
          tower: the path of the stack, such as 'vision' or 'language/decoder'.
          block: runs one layer.
          weights: the stacked weights of all layers, `[layers, ...]` each.
          x: hidden states before the first block.
          ctx: see `Block`; the same for all layers.
          cache: the caches of all layers; None: no caches.

        Returns:
          Hidden states after the last block, and the caches.
        """


def scan_blocks(
    tower: str, block: Block, weights: dict, x: Hidden, ctx: dict, cache: PyTree = None
) -> tuple[Float[Array, '...'], PyTree]:
    """Trace one block and scan it over the layers.

    For the backward, it saves the output of each `linear` and recomputes the rest: norms, attention, gates.

    Args:
      tower: see `Runner`, as for the other arguments.
      block: runs one layer.
      weights: stacked weights.
      x: hidden states.
      ctx: arrays that blocks only read.
      cache: stacked caches, or None.

    Returns:
      Hidden states and stacked caches.
    """
    del tower
    return _scan(block, weights, x, ctx, cache, jax.checkpoint_policies.save_only_these_names('linear'))


def remat_blocks(
    tower: str, block: Block, weights: dict, x: Hidden, ctx: dict, cache: PyTree = None
) -> tuple[Float[Array, '...'], PyTree]:
    """Scan like `scan_blocks`, but save only each block's input for the backward: less memory, more computation.

    Args:
      tower: see `Runner`, as for the other arguments.
      block: runs one layer.
      weights: stacked weights.
      x: hidden states.
      ctx: arrays that blocks only read.
      cache: stacked caches, or None.

    Returns:
      Hidden states and stacked caches.
    """
    del tower
    return _scan(block, weights, x, ctx, cache, None)


def _scan(
    block: Block, weights: dict, x: Hidden, ctx: dict, cache: PyTree, policy: Callable[..., bool] | None
) -> tuple[Float[Array, '...'], PyTree]:
    # `prevent_cse=False`, because a scan already prevents XLA from merging the recomputation with the forward.
    @functools.partial(jax.checkpoint, prevent_cse=False, policy=policy)
    def run_layer(w, index, x, ctx, cache):
        return block(_cut_out(w, index), x, ctx, cache)

    # `index` gives `_cut_out` the layer index as a traced value, which XLA cannot constant-fold.
    def body(x, layer):
        w, index, layer_cache = layer
        return run_layer(w, index, x, ctx, layer_cache)

    # The scan slices weights and caches along their leading axis. This works for all kinds of kernels, since packed and
    # masked kernels are pytrees of stacked arrays. A cache of None has no leaves, so every layer gets None.
    layers = jax.tree.leaves(weights)[0].shape[0]
    return jax.lax.scan(body, x, (weights, jnp.arange(layers), cache))


def _cut_out(w: dict, index: Int[Array, '']) -> dict:
    """Return a block's weights; on a CPU, copy packed kernels to separate arrays."""
    # One function for all kernels, so that JAX traces it once per shape.
    copy_on_cpu = functools.partial(cpu.copy_out_of_stack, layer=index)

    def cut(leaf):
        if not isinstance(leaf, Packed24):
            return leaf
        return jax.lax.platform_dependent(leaf, cpu=copy_on_cpu, default=lambda leaf: leaf)

    return jax.tree.map(cut, w, is_leaf=lambda leaf: isinstance(leaf, Packed24))


def unrolled_blocks(
    tower: str,
    block: Block,
    weights: tuple[dict, ...],
    x: Hidden,
    ctx: dict,
    cache: tuple | None = None,
) -> tuple[Float[Array, '...'], tuple]:
    """Run blocks in a Python loop, each with its own weights and cache.

    Decoding uses this runner, because it neither slices stacks nor stacks again for every token.

    Args:
      tower: see `Runner`, as for the other arguments.
      block: runs one layer.
      weights: the weights of each layer, see `unstack`.
      x: hidden states.
      ctx: arrays that blocks only read.
      cache: the cache of each layer, or None.

    Returns:
      Hidden states and the caches of all layers.
    """
    del tower
    # The program contains every block, so it compiles more slowly than a scan, but runs faster per token.
    caches = []
    for index, w in enumerate(weights):
        x, layer_cache = block(w, x, ctx, None if cache is None else cache[index])
        caches.append(layer_cache)
    return x, tuple(caches)


def unstack(tree: PyTree) -> tuple[PyTree, ...]:
    """Split a tree of stacked arrays into one tree per layer.

    Args:
      tree: arrays `[layers, ...]`.

    Returns:
      Trees of arrays `[...]`.
    """
    layers = jax.tree.leaves(tree)[0].shape[0]
    return tuple(jax.tree.map(lambda leaf, i=i: leaf[i], tree) for i in range(layers))


def valid_rows(name: str, ctx: dict) -> Bool[Array, '*devices batch rows'] | None:
    """Return which rows of a kernel's input are not pads.

    `ctx['valid']` describes the block's own rows. Keys and values of cross-attention read other rows (`cross_valid`).
    In a Q-Former that reads text too, cross-attention and `mlp` read only the queries (`query_valid`), and `text_mlp`
    reads only the text (`text_valid`).

    Args:
      name: the kernel's path within a block.
      ctx: the block's `ctx`, see `Block`; its arrays may have an axis of devices in front.

    Returns:
      A mask over the rows; None: all of them count.
    """
    # An image has no pads, so a Q-Former's `ctx` has no `cross_valid`, and all rows count.
    if re.fullmatch(r'(.*/)?cross/[kv]/kernel', name):
        return ctx.get('cross_valid')
    # The first matching path decides. A Q-Former without text has none of these masks, and its `mlp` reads the block's
    # own rows.
    masks_by_path = ((r'(.*/)?(cross/[qo]|mlp/.*)/kernel', 'query_valid'), (r'(.*/)?text_mlp/.*', 'text_valid'))
    for regex, mask in masks_by_path:
        if mask in ctx and re.fullmatch(regex, name):
            return ctx[mask]
    return ctx.get('valid')
