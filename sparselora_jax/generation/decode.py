"""Decoding with a key/value cache that is written in place.

A batch item is one row of the cache whatever the number of beams: its prompt is read and kept once, every step appends
the next tokens of all its beams, and a mask made of their ancestry says which of the slots a beam reads. So nothing is
ever gathered or copied but the small tables of `search`, and the weights are cut into layers once per call.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from sparselora_jax.generation import search
from sparselora_jax.models import layers
from sparselora_jax.models.model import Model
from sparselora_jax.models.runners import unrolled_blocks, unstack
from sparselora_jax.weights import Adapted, Masked, effective_weight


@functools.partial(jax.jit, static_argnames=('model', 'settings'))
def decode(
    model: Model, settings: search.Settings, weights: dict, batch: dict
) -> tuple[Int[Array, 'batch new'], Int[Array, '']]:
    """The best continuation of each prompt, and how many of its columns the longest one fills."""
    language, cfg = model.language, model.cfg.language
    w = jax.tree.map(_fold, weights['language'], is_leaf=_is_bound)
    blocks = unstack(w['blocks'])

    def run(x, view, caches):
        x, ctx = language.embed(w, cfg, x, view)

        def block(w, x, ctx, cache):
            return language.block(w, cfg, x, ctx, cache)

        return unrolled_blocks('language', block, blocks, x, ctx, caches)

    def logits(x):
        return language.head(w, cfg, language.finish(w, cfg, x))

    prompt = model.prompt(weights, batch)
    x, valid = prompt.x, prompt.valid
    rows, length = valid.shape
    view = layers.causal_view(valid, prompt.prefix)
    # transformers puts pads at 0: that of a last one decides where the next token stands.
    positions = jnp.where(valid, view.positions, 0)
    x, caches = run(x, view._replace(positions=positions), language.caches(cfg, rows, length, x.dtype))
    caches = _grow(caches, settings.beams * settings.new)
    first = jnp.broadcast_to(logits(x[:, -1:]), (rows, settings.beams, cfg.vocab))
    state = search.step(settings, search.start(settings, rows), jnp.zeros((), jnp.int32), first)

    def advance(carry):
        index, caches, state = carry
        tokens = jax.lax.dynamic_index_in_dim(state.tokens, index - 1, axis=2, keepdims=False)
        view = _view(positions, valid, state.ancestry, index)
        x, caches = run(language.embed_tokens(w, cfg, tokens).astype(prompt.x.dtype), view, caches)
        return index + 1, caches, search.step(settings, state, index, logits(x))

    carry = (jnp.ones((), jnp.int32), caches, state)
    _, _, state = jax.lax.while_loop(lambda carry: carry[2].unfinished, advance, carry)
    return state.finished[:, 0], jnp.max(state.lengths[:, 0])


def _view(
    positions: Int[Array, 'batch prompt'],
    valid: Bool[Array, 'batch prompt'],
    ancestry: Int[Array, 'batch beams new'],
    index: Int[Array, ''],
) -> layers.View:
    """What the beams' tokens number `index - 1` read: the prompt, and the slots that their ancestors wrote."""
    rows, beams, new = ancestry.shape
    own = (ancestry[..., None] == jnp.arange(beams)).reshape(rows, beams, new * beams)
    prompt = jnp.broadcast_to(valid[:, None], (rows, beams, valid.shape[1]))
    here = jnp.broadcast_to(positions[:, -1:] + index, (rows, beams))
    written = positions[:, -1:] + 1 + jnp.repeat(jnp.arange(new), beams)
    return layers.View(here, jnp.concatenate([positions, written], axis=1), jnp.concatenate([prompt, own], axis=2))


def _grow(caches: Any, slots: int) -> Any:
    """Caches with room for `slots` more tokens."""

    def grow(cache):
        room = ((0, 0), (0, 0), (0, slots), (0, 0))
        return cache._replace(k=jnp.pad(cache.k, room), v=jnp.pad(cache.v, room))

    return jax.tree.map(grow, caches, is_leaf=lambda leaf: isinstance(leaf, layers.KVCache))


def _is_bound(leaf: Any) -> bool:
    return isinstance(leaf, Masked | Adapted)


def _fold(leaf: Any) -> Any:
    """A plain kernel: what is bound to one would be combined again for every token."""
    return effective_weight(leaf.kernel, leaf.mask, getattr(leaf, 'lora', None)) if _is_bound(leaf) else leaf
