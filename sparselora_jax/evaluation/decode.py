"""Decoding with a key/value cache that is written in place.

A batch item is one row of the cache whatever the number of beams: its prompt is read and kept once, every step appends
the next tokens of all its beams, and a mask made of their ancestry says which of the slots a beam reads. So nothing is
ever gathered or copied but the small tables of `search`, and the weights are cut into layers once per call.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from sparselora_jax.evaluation import search
from sparselora_jax.models import layers
from sparselora_jax.models.model import Model
from sparselora_jax.models.runners import scan_blocks, unrolled_blocks, unstack
from sparselora_jax.sparse import rules as rules_lib
from sparselora_jax.sparse import sharding
from sparselora_jax.sparse.dense import dense_kernel
from sparselora_jax.sparse.packing import Bitmask, Packed24, is_reduced
from sparselora_jax.sparse.weights import Adapted, Masked, effective_weight


@functools.partial(jax.jit, static_argnames=('model', 'beams', 'mesh'))
def decode(
    model: Model, weights: dict, batch: dict, rules: search.Rules, *, beams: int, mesh: Mesh | None = None
) -> tuple[Int[Array, 'batch new'], Int[Array, '']]:
    """The best continuation of each prompt, and how many columns the longest one fills; whole on every device.

    Args:
      mesh: where the weights lie; None: on one device.
    """
    batch = sharding.split_rows(batch, mesh, sharding.DECODED)
    language, cfg = model.language, model.cfg.language
    flat = rules_lib.flatten(weights['language'])  # of blocks each layer is folded by itself, below
    language_weights = {path: leaf if 'blocks/' in path else _fold(leaf) for path, leaf in flat.items()}
    weights = weights | {'language': rules_lib.unflatten(language_weights)}
    w, new = weights['language'], rules.weight.shape[0]
    begun = (_begin_decoder if model.is_encoder_decoder else _begin)(model, weights, batch)

    def run(runner, blocks, x, view, caches):
        x, ctx = language.embed(w, cfg, x.astype(begun.x.dtype), view)

        def block(w, x, ctx, cache):
            return language.block(_unpacked_here(w, x, mesh), cfg, x, ctx, cache)

        return runner('language', block, blocks, x, ctx | begun.ctx, caches)

    def logits(x):
        return language.head(w, cfg, language.finish(w, cfg, x))

    blocks = jax.tree.map(_fold, unstack(begun.blocks), is_leaf=_is_no_array)
    if _all_folded(begun.blocks, blocks):  # read as they are, instead of being unpacked once more
        x, caches = run(unrolled_blocks, blocks, begun.x, begun.view, begun.caches)
    else:  # by one traced block: of all blocks it would compile twice as long
        caches = jax.tree.map(lambda *of_layers: jnp.stack(of_layers), *begun.caches)
        x, caches = run(scan_blocks, begun.blocks, begun.x, begun.view, caches)
        caches = unstack(caches)
    first = logits(x[:, -1:])
    rows, _, vocab = first.shape
    first = jnp.broadcast_to(first, (rows, beams, vocab))
    state = search.step(rules, search.start(rules, rows, beams), jnp.zeros((), jnp.int32), first, mesh)

    def advance(carry):
        index, caches, state = carry
        tokens = jax.lax.dynamic_index_in_dim(state.tokens, index - 1, axis=2, keepdims=False)
        view = _view(begun.view.positions, begun.valid, state.ancestry, index)
        x, caches = run(unrolled_blocks, blocks, language.embed_tokens(w, cfg, tokens), view, caches)
        return index + 1, caches, search.step(rules, state, index, logits(x), mesh)

    # A barrier, or XLA moves what made a cache (T5's cross-attention: a transpose) into the loop that reads it.
    caches = jax.lax.optimization_barrier(_grow(caches, beams * new))
    caches = sharding.split_rows(caches, mesh, sharding.CACHE)
    carry = (jnp.ones((), jnp.int32), caches, state)
    _, _, state = jax.lax.while_loop(lambda carry: carry[2].unfinished, advance, carry)
    found = state.finished[:, 0], jnp.max(state.lengths[:, 0])
    return sharding.split_rows(found, mesh, PartitionSpec())


class _Begun(NamedTuple):
    """What is generated from: the first tokens, where they stand, and what every later token reads besides them."""

    x: Float[Array, 'batch prompt dim']
    valid: Bool[Array, 'batch prompt']
    view: layers.View
    blocks: dict
    caches: tuple
    ctx: dict


def _begin(model: Model, weights: dict, batch: dict) -> _Begun:
    prompt, cfg = model.prompt(weights, batch), model.cfg.language
    view = layers.causal_view(prompt.valid, prompt.prefix)
    # transformers puts pads at 0: that of a last one decides where the next token stands.
    view = view._replace(positions=jnp.where(prompt.valid, view.positions, 0))
    caches = model.language.caches(cfg, *prompt.valid.shape, prompt.x.dtype)
    return _Begun(prompt.x, prompt.valid, view, weights['language']['blocks'], caches, {})


def _begin_decoder(model: Model, weights: dict, batch: dict) -> _Begun:
    prompt, language, cfg, w = model.prompt(weights, batch), model.language, model.cfg.language, weights['language']
    encoded = language.encode(w, cfg, prompt.x, prompt.valid)
    valid = batch['decoder_attention_mask'].astype(bool)
    positions = jnp.arange(valid.shape[1])[None]
    view = layers.causal_view(valid)._replace(positions=positions, slot_positions=positions)
    caches = language.caches(w, cfg, encoded, valid.shape[1], encoded.dtype)
    x = language.embed_tokens(w, cfg, batch['decoder_input_ids']).astype(encoded.dtype)
    return _Begun(x, valid, view, w['decoder']['blocks'], caches, language.reading(prompt.valid))


def _view(
    positions: Int[Array, '#batch prompt'],
    valid: Bool[Array, 'batch prompt'],
    ancestry: Int[Array, 'batch beams new'],
    index: Int[Array, ''],
) -> layers.View:
    """What the beams' tokens number `index - 1` read: the prompt, and the slots that their ancestors wrote."""
    rows, beams, new = ancestry.shape
    own = (ancestry[..., None] == jnp.arange(beams)).reshape(rows, beams, new * beams)
    prompt = jnp.broadcast_to(valid[:, None], (rows, beams, valid.shape[1]))
    here = jnp.broadcast_to(positions[:, -1:] + index, (positions.shape[0], beams))
    written = positions[:, -1:] + 1 + jnp.repeat(jnp.arange(new), beams)
    return layers.View(here, jnp.concatenate([positions, written], axis=1), jnp.concatenate([prompt, own], axis=2))


def _grow(caches: Any, slots: int) -> Any:
    """Key/value caches with room for `slots` more tokens; other leaves as they are."""
    room = ((0, 0), (0, 0), (0, slots), (0, 0))

    def grow(leaf):
        return leaf._replace(k=jnp.pad(leaf.k, room), v=jnp.pad(leaf.v, room)) if _is_cache(leaf) else leaf

    return jax.tree.map(grow, caches, is_leaf=_is_cache)


def _is_cache(leaf: Any) -> bool:
    return isinstance(leaf, layers.KVCache)


def _is_no_array(kernel: Any) -> bool:
    return isinstance(kernel, Masked | Adapted) or is_reduced(kernel)


def _fold(leaf: Any) -> Any:
    """A plain kernel: what is bound to one would be combined again for every token, and so would a bitmask.

    Packed and quantised kernels are: that is what it takes to hold them in fewer bytes.
    """
    bound = isinstance(leaf, Masked | Adapted)
    kernel = leaf.kernel if bound else leaf
    if is_reduced(kernel) and not isinstance(kernel, Bitmask):
        return leaf
    return effective_weight(kernel, leaf.mask, getattr(leaf, 'lora', None)) if bound else dense_kernel(kernel)


def _all_folded(stacked: dict, blocks: tuple[dict, ...]) -> bool:
    """Whether there were bitmasks, and nothing is left that is unpacked where it is read."""
    before, after = (jax.tree.leaves(tree, is_leaf=_is_no_array) for tree in (stacked, blocks))
    return any(isinstance(leaf, Bitmask) for leaf in before) and not any(_is_no_array(leaf) for leaf in after)


def _unpacked_here(w: dict, x: Array, mesh: Mesh | None) -> dict:
    """A block whose packed kernels seem to depend on what it reads.

    Else XLA unpacks them outside of the loop over tokens: it would hold the dense kernels, or every bit of a position
    as a byte.
    """

    def here(leaf):
        return jax.lax.optimization_barrier((leaf, x))[0] if _is_no_array(leaf) else leaf

    def later(leaf):
        if not isinstance(leaf, Packed24):
            return leaf
        return jax.lax.platform_dependent(leaf, x, cpu=_unpacked_after, default=lambda leaf, x: leaf)

    w = jax.tree.map(here, w, is_leaf=_is_no_array)
    # On a mesh x lies on several devices, which would have to tell each other.
    return w if mesh else jax.tree.map(later, w, is_leaf=lambda leaf: isinstance(leaf, Packed24))


def _unpacked_after(packed: Packed24, x: Array) -> Packed24:
    """The same, for XLA for CPUs: it drops barriers before it orders operations, and would unpack all blocks side by
    side, into memory for each. No number is above infinity, but that it does not know.
    """
    nothing = (x.reshape(-1)[0] > jnp.inf).astype(packed.positions.dtype)
    return dataclasses.replace(packed, positions=packed.positions | nothing)
