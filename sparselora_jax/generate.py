"""Greedy generation with a key/value cache."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparselora_jax.models import layers, llama
from sparselora_jax.models.runners import unrolled_blocks, unstack


@functools.partial(jax.jit, static_argnames=('cfg', 'max_new_tokens', 'eos'))
def greedy(
    w: dict,
    cfg: llama.LlamaConfig,
    x: Float[Array, 'batch slots dim'],
    valid: Bool[Array, 'batch slots'],
    *,
    max_new_tokens: int,
    eos: int,
) -> Int[Array, 'batch new']:
    """The most likely continuation, token by token; stops when every row has ended, then fills with `eos`.

    Args:
      w: weights of the language model (any kind of kernel).
      x: embedded prompt, e.g. `[queries | text]`; pads anywhere but at the end.
      valid: True for slots that are no pads; the last slot must be valid.
      max_new_tokens: an upper bound; compiled once per shape and bound.

    Returns:
      Token ids `[batch, max_new_tokens]`.
    """
    batch, prompt, _ = x.shape
    slots = prompt + max_new_tokens
    positions = llama.positions_of(valid)
    slot_valid = jnp.concatenate([valid, jnp.ones((batch, max_new_tokens), bool)], axis=1)
    blocks = unstack(w['blocks'])
    empty = jnp.zeros((batch, slots, cfg.kv_heads, cfg.head_dim), x.dtype)
    caches = tuple(layers.KVCache(empty, empty, jnp.zeros((), jnp.int32)) for _ in blocks)

    def advance(x, positions, caches):
        ctx = {'key_valid': slot_valid, 'rope': layers.rope_table(positions, cfg.head_dim, cfg.rope_base)}

        def block(w, x, ctx, cache):
            return llama.block(w, cfg, x, ctx, cache)

        x, caches = unrolled_blocks('language', block, blocks, x, ctx, caches)
        logits = llama.head(w, llama.finish(w, cfg, x[:, -1:]))
        return jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32), caches

    token, caches = advance(x, positions, caches)
    output = jnp.full((batch, max_new_tokens), eos, jnp.int32).at[:, 0].set(token)

    def unfinished(state):
        step, token, *_ = state
        return (step < max_new_tokens) & jnp.any(token != eos)

    def decode(state):
        step, token, caches, output = state
        ended = token == eos
        position = positions[:, -1:] + step
        token, caches = advance(llama.embed_tokens(w, token[:, None]).astype(x.dtype), position, caches)
        token = jnp.where(ended, eos, token)
        return step + 1, token, caches, output.at[:, step].set(token)

    state = (jnp.ones((), jnp.int32), token, caches, output)
    return jax.lax.while_loop(unfinished, decode, state)[-1]
