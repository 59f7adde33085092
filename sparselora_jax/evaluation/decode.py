"""Decode with a key/value cache that is written in place.

A batch item has one row of the cache, whatever the number of beams. Its prompt is read once and cached once. Each step
appends the next tokens of all its beams. A mask built from the beams' ancestry says which slots a beam reads. So no
cache is gathered or copied, only the small tables of `search`. The weights are split into layers once per call.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PyTree

from sparselora_jax.evaluation import search
from sparselora_jax.models import layers
from sparselora_jax.models.model import Model
from sparselora_jax.models.runners import scan_blocks, unrolled_blocks, unstack
from sparselora_jax.sparse import sharding
from sparselora_jax.sparse.dense import dense_kernel
from sparselora_jax.sparse.kernels import cpu
from sparselora_jax.sparse.packing import Bitmask, Packed24, is_reduced
from sparselora_jax.sparse.rules import flatten, is_in_block, unflatten
from sparselora_jax.sparse.weights import Adapted, Masked, effective_weight


@functools.partial(jax.jit, static_argnames=('model', 'beams', 'mesh'))
def decode(
    model: Model, weights: dict, batch: dict, settings: search.Settings, *, beams: int, mesh: Mesh | None = None
) -> tuple[Int[Array, 'batch new'], Int[Array, '']]:
    """Return the best continuation of each prompt.

    Args:
      model: the model.
      weights: its params, or the result of `bind`.
      batch: complete arrays of `models.model`, masks included (see `generate`).
      settings: settings of the search; the size of its arrays is the maximum number of new tokens.
      beams: number of beams; 1 is greedy search.
      mesh: mesh of the weights; None: one device.

    Returns:
      New tokens, padded, and the number of columns that the longest continuation fills. Both are replicated on all
      devices.
    """
    batch = sharding.split_rows(batch, mesh, sharding.DECODED)
    language = model.language
    cfg = model.cfg.language
    # Fold the weights outside the blocks here. The layers of the blocks are folded one by one below.
    flat = flatten(weights['language'])
    folded = {path: leaf if is_in_block(path) else _fold(leaf) for path, leaf in flat.items()}
    weights = weights | {'language': unflatten(folded)}
    w = weights['language']
    new = settings.finished_divisors.shape[0]
    start = _start_decoder(model, weights, batch) if model.is_encoder_decoder else _start(model, weights, batch)

    def run(
        runner: Callable, blocks: PyTree, x: Array, view: layers.View, caches: PyTree
    ) -> tuple[Float[Array, 'batch tokens dim'], PyTree]:
        """Run embedded tokens through the blocks."""
        x, ctx = language.embed(w, cfg, x.astype(start.x.dtype), view)

        def block(w, x, ctx, cache):
            return language.block(_unpack_late(w, x, mesh), cfg, x, ctx, cache)

        return runner('language', block, blocks, x, ctx | start.ctx, caches)

    def logits(x: Float[Array, 'batch tokens dim']) -> Float[Array, 'batch tokens vocab']:
        return language.head(w, cfg, language.finish(w, cfg, x))

    blocks = jax.tree.map(_fold, unstack(start.blocks), is_leaf=_is_no_array)
    if _all_unpacked(start.blocks, blocks):
        # The prompt reads the unpacked blocks too. From the stack, every bitmask would be unpacked a second time.
        x, caches = run(unrolled_blocks, blocks, start.x, start.view, start.caches)
    else:
        # Scan one traced block over the prompt. Unrolling all blocks would double the compilation time.
        stacked = jax.tree.map(lambda *of_layers: jnp.stack(of_layers), *start.caches)
        x, caches = run(scan_blocks, start.blocks, start.x, start.view, stacked)
        caches = unstack(caches)
    # Only the last token of the prompt predicts a new one. The head is the largest matrix, so apply it to that token
    # only.
    first_logits = logits(x[:, -1:])
    rows, _, vocab = first_logits.shape
    first_logits = jnp.broadcast_to(first_logits, (rows, beams, vocab))  # all beams start from the same prompt
    read = None if settings.repetition_penalty is None else _tokens_of_prompt(model, batch, vocab)
    state = search.step(
        settings, search.start(settings, rows, beams), jnp.zeros((), jnp.int32), first_logits, read=read, mesh=mesh
    )

    def advance(carry):
        """Generate one token for every beam."""
        index, caches, state = carry
        # The newest token of each beam, which `search.step` has just chosen, has no cache slot yet.
        tokens = jax.lax.dynamic_index_in_dim(state.tokens, index - 1, axis=2, keepdims=False)
        view = _beam_view(start.view.positions, start.valid, state.ancestry, index)
        x, caches = run(unrolled_blocks, blocks, language.embed_tokens(w, cfg, tokens), view, caches)
        return index + 1, caches, search.step(settings, state, index, logits(x), read=read, mesh=mesh)

    # Without a barrier XLA moves the operation that makes a cache (T5's cross-attention: a transpose) into the loop
    # that reads the cache, and repeats it for every token.
    caches = jax.lax.optimization_barrier(_add_slots(caches, beams * new))
    caches = sharding.split_rows(caches, mesh, sharding.CACHE)
    carry = (jnp.ones((), jnp.int32), caches, state)
    _, _, state = jax.lax.while_loop(lambda carry: carry[2].is_unfinished, advance, carry)
    # Finished beams are sorted, best first.
    best = state.finished[:, 0], jnp.max(state.lengths[:, 0])
    return sharding.split_rows(best, mesh, PartitionSpec())


def _tokens_of_prompt(model: Model, batch: dict, vocab: int) -> Bool[Array, 'batch vocab']:
    """Return which tokens each prompt has; as in transformers, only pads before all words do not count."""
    prefix = 'decoder_' if model.is_encoder_decoder else ''
    tokens = batch[f'{prefix}input_ids']
    mask = batch[f'{prefix}attention_mask']
    first_word = jnp.argmax(mask != 0, axis=1, keepdims=True)
    # An image token may be outside the vocabulary; like a pad, it is dropped.
    tokens = jnp.where(jnp.arange(tokens.shape[1]) < first_word, vocab, tokens)
    rows = jnp.arange(tokens.shape[0])[:, None]
    return jnp.zeros((tokens.shape[0], vocab), bool).at[rows, tokens].set(True, mode='drop')


def cache_shapes(model: Model, weights: dict, batch: dict, *, slots: int) -> PyTree:
    """Return the shapes of the key/value caches of `decode`; nothing is computed.

    Args:
      model: the model.
      weights: params, or their shapes.
      batch: as for `decode`, or its shapes.
      slots: number of tokens that the caches have room for after the prompt: beams times new tokens.
    """

    def caches(weights: dict, batch: dict) -> PyTree:
        start = _start_decoder(model, weights, batch) if model.is_encoder_decoder else _start(model, weights, batch)
        return _add_slots(start.caches, slots)

    return jax.eval_shape(caches, weights, batch)


class _Start(NamedTuple):
    """The inputs and the caches with which generation starts.

    Attributes:
      x: embeddings of the prompt (of an encoder-decoder: of the decoder's prompt).
      valid: False where the prompt has a pad.
      view: positions of the prompt's tokens, and the mask of which token reads which.
      blocks: stacked weights of the blocks that generate.
      caches: empty key/value caches, one per layer.
      ctx: further input of every token: the encoder's output.
    """

    x: Float[Array, 'batch prompt dim']
    valid: Bool[Array, 'batch prompt']
    view: layers.View
    blocks: dict
    caches: tuple
    ctx: dict


def _start(model: Model, weights: dict, batch: dict) -> _Start:
    """Prepare a decoder-only language tower."""
    prompt = model.prompt(weights, batch)
    view = layers.causal_view(prompt.valid, prompt.prefix)
    # transformers gives pads the position 0. A pad may be the last token, whose position the next one continues.
    view = view._replace(positions=jnp.where(prompt.valid, view.positions, 0))
    caches = model.language.caches(model.cfg.language, *prompt.valid.shape, prompt.x.dtype)
    return _Start(prompt.x, prompt.valid, view, weights['language']['blocks'], caches, {})


def _start_decoder(model: Model, weights: dict, batch: dict) -> _Start:
    """Run the encoder of an encoder-decoder, and prepare its decoder."""
    prompt = model.prompt(weights, batch)
    language = model.language
    cfg = model.cfg.language
    w = weights['language']
    encoded = language.encode(w, cfg, prompt.x, prompt.valid)
    valid = batch['decoder_attention_mask'].astype(bool)
    positions = jnp.arange(valid.shape[1])[None]  # a decoder counts its pads, unlike `layers.causal_view`
    view = layers.causal_view(valid)._replace(positions=positions, slot_positions=positions)
    caches = language.caches(w, cfg, encoded, valid.shape[1], encoded.dtype)
    x = language.embed_tokens(w, cfg, batch['decoder_input_ids']).astype(encoded.dtype)
    return _Start(x, valid, view, w['decoder']['blocks'], caches, language.reading(prompt.valid))


def _beam_view(
    positions: Int[Array, '#batch prompt'],
    valid: Bool[Array, 'batch prompt'],
    ancestry: Int[Array, 'batch beams new'],
    index: Int[Array, ''],
) -> layers.View:
    """Return the view of the beams' newest tokens: they read the prompt and the slots that their ancestors wrote.

    Args:
      positions: positions of the prompt's tokens.
      valid: False where the prompt has a pad.
      ancestry: see `search.Search`.
      index: number of tokens generated so far.
    """
    rows, beams, new = ancestry.shape
    # Slots after the prompt are ordered by token, then by beam. A beam reads slot (n, b) if beam b wrote its n-th
    # token. Slots not written yet have ancestry -1, which matches no beam.
    generated_mask = (ancestry[..., None] == jnp.arange(beams)).reshape(rows, beams, new * beams)
    prompt_mask = jnp.broadcast_to(valid[:, None], (rows, beams, valid.shape[1]))
    token_positions = jnp.broadcast_to(positions[:, -1:] + index, (positions.shape[0], beams))
    generated_positions = positions[:, -1:] + 1 + jnp.repeat(jnp.arange(new), beams)
    slot_positions = jnp.concatenate([positions, generated_positions], axis=1)
    return layers.View(token_positions, slot_positions, jnp.concatenate([prompt_mask, generated_mask], axis=2))


def _add_slots(caches: PyTree, slots: int) -> PyTree:
    """Return key/value caches with room for `slots` more tokens, and all other leaves unchanged."""
    padding = ((0, 0), (0, 0), (0, slots), (0, 0))

    def add(leaf):
        if not _is_cache(leaf):
            return leaf
        return leaf._replace(k=jnp.pad(leaf.k, padding), v=jnp.pad(leaf.v, padding))

    return jax.tree.map(add, caches, is_leaf=_is_cache)


def _is_cache(leaf: PyTree) -> bool:
    return isinstance(leaf, layers.KVCache)


def _is_no_array(kernel: PyTree) -> bool:
    """Return whether a kernel is bound, packed or quantised."""
    return isinstance(kernel, Masked | Adapted) or is_reduced(kernel)


def _fold(leaf: PyTree) -> PyTree:
    """Return a kernel in the form that is cheapest to read for every token.

    A bound kernel becomes a plain array; otherwise it would be combined again for every token. A bitmask becomes one
    too, because it is slow to unpack. Other packed and quantised kernels stay: they are unpacked for every token to
    save memory.
    """
    is_bound = isinstance(leaf, Masked | Adapted)
    kernel = leaf.kernel if is_bound else leaf
    if is_reduced(kernel) and not isinstance(kernel, Bitmask):
        return leaf
    if is_bound:
        return effective_weight(kernel, leaf.mask, getattr(leaf, 'lora', None))
    return dense_kernel(kernel)


def _all_unpacked(stacked: dict, blocks: tuple[dict, ...]) -> bool:
    """Return whether there were bitmasks, and all kernels are now plain arrays."""
    before = jax.tree.leaves(stacked, is_leaf=_is_no_array)
    after = jax.tree.leaves(blocks, is_leaf=_is_no_array)
    return any(isinstance(leaf, Bitmask) for leaf in before) and not any(_is_no_array(leaf) for leaf in after)


def _unpack_late(w: dict, x: Array, mesh: Mesh | None) -> dict:
    """Return a block's weights with an artificial dependency of packed kernels on the block's input `x`.

    Otherwise XLA would move the unpacking out of the loop over tokens, because it is loop-invariant. Memory would then
    hold the dense kernels, or each bit of a position as a byte.
    """

    def tie_to_input(leaf):
        return jax.lax.optimization_barrier((leaf, x))[0] if _is_no_array(leaf) else leaf

    def unpack_after_input(leaf):
        if not isinstance(leaf, Packed24):
            return leaf
        return jax.lax.platform_dependent(leaf, x, cpu=cpu.unpack_after, default=lambda leaf, x: leaf)

    w = jax.tree.map(tie_to_input, w, is_leaf=_is_no_array)
    if mesh is not None:
        # On a mesh `x` is sharded, and a dependency on its values would require communication.
        return w
    return jax.tree.map(unpack_after_input, w, is_leaf=lambda leaf: isinstance(leaf, Packed24))
