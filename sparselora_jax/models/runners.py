"""Runners: how a tower's stacked blocks are executed. The seam that training, generation and pruning share.

A runner is `run(tower, block, weights, x, ctx, cache=None) -> (x, cache)`, where `weights` are the stacked weights
and `block(w, x, ctx, cache) -> (x, cache)` is one of them. `ctx` is what blocks only read; the leading axis of each of
its arrays is the batch (or 1).
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from sparselora_jax.sparse.kernels import cpu
from sparselora_jax.sparse.packing import Packed24

Block = Callable[[dict, Any, dict, Any], tuple[Any, Any]]


def scan_blocks(tower: str, block: Block, weights: dict, x: Any, ctx: dict, cache: Any = None) -> tuple[Any, Any]:
    """One traced block, scanned over the layers. The backward keeps each `linear`'s output and recomputes the rest."""
    return _scan(block, weights, x, ctx, cache, jax.checkpoint_policies.save_only_these_names('linear'))


def _scan(block: Block, weights: dict, x: Any, ctx: dict, cache: Any, policy: Any) -> tuple[Any, Any]:
    # A scan's body needs no barrier against CSE.
    @functools.partial(jax.checkpoint, prevent_cse=False, policy=policy)
    def one(w, index, x, ctx, cache):
        return block(_cut_out(w, index), x, ctx, cache)

    def body(x, layer):
        w, index, layer_cache = layer
        return one(w, index, x, ctx, layer_cache)

    layers = jax.tree.leaves(weights)[0].shape[0]
    return jax.lax.scan(body, x, (weights, jnp.arange(layers), cache))


def _cut_out(w: dict, index: Int[Array, '']) -> dict:
    """Return a block's weights; on a CPU, with packed kernels as arrays of their own."""
    # One function for all kernels: JAX traces it once for each shape.
    copy_on_cpu = functools.partial(cpu.copy_out_of_stack, layer=index)

    def cut(leaf):
        if not isinstance(leaf, Packed24):
            return leaf
        return jax.lax.platform_dependent(leaf, cpu=copy_on_cpu, default=lambda leaf: leaf)

    return jax.tree.map(cut, w, is_leaf=lambda leaf: isinstance(leaf, Packed24))


def remat_blocks(tower: str, block: Block, weights: dict, x: Any, ctx: dict, cache: Any = None) -> tuple[Any, Any]:
    """`scan_blocks` that keeps only each block's input for the backward."""
    return _scan(block, weights, x, ctx, cache, None)


def unrolled_blocks(
    tower: str, block: Block, weights: tuple[dict, ...], x: Any, ctx: dict, cache: tuple | None = None
) -> tuple[Any, Any]:
    """Blocks one after the other, each with its own weights and cache: nothing is sliced or stacked per token."""
    del tower
    caches = []
    for index, w in enumerate(weights):
        x, layer_cache = block(w, x, ctx, None if cache is None else cache[index])
        caches.append(layer_cache)
    return x, tuple(caches)


def unstack(tree: Any) -> tuple[Any, ...]:
    """A tree stacked along its leading axis -> one tree per layer."""
    layers = jax.tree.leaves(tree)[0].shape[0]
    return tuple(jax.tree.map(lambda leaf, i=i: leaf[i], tree) for i in range(layers))


def valid_rows(name: str, ctx: dict) -> Any:
    """Which rows of the input of kernel `name` (its path within a block) are no pads; None: all of them.

    `ctx['valid']` speaks of the block's own rows. Cross-attention's keys and values read others (`cross_valid`), and
    where a Q-Former reads text too, so do its cross-attention, `mlp` (`query_valid`) and `text_mlp` (`text_valid`).
    """
    if re.fullmatch(r'(.*/)?cross/[kv]/kernel', name):
        return ctx.get('cross_valid')
    for regex, mask in ((r'(.*/)?(cross/[qo]|mlp/.*)/kernel', 'query_valid'), (r'(.*/)?text_mlp/.*', 'text_valid')):
        if mask in ctx and re.fullmatch(regex, name):
            return ctx[mask]
    return ctx.get('valid')
