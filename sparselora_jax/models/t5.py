"""T5 (arXiv 1910.10683) and T5 1.1: an encoder and a decoder; RMSNorm, relative positions as a bias, no QK scaling.

`encode` and `decode` run a whole stack. `embed`, `block`, `finish` and `caches` belong to the decoder, and run it token
by token. `reading` returns the part of its blocks' `ctx` that comes from the encoder.
"""

import math
import sys
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from sparselora_jax.models import key_table, layers
from sparselora_jax.models.config import HfConfig
from sparselora_jax.models.key_table import Keys
from sparselora_jax.models.runners import Runner, scan_blocks, unstack
from sparselora_jax.models.towers import LANGUAGE_TOWERS, LanguageTower
from sparselora_jax.runtime.errors import UnsupportedModelError

is_encoder_decoder = True
overflows_in_float16 = ('language/encoder/', 'language/decoder/')

EMBED = 'shared.weight'  # the word embedding in files; these may also contain copies of it, or only a copy:
COPIES = ('encoder.embed_tokens.weight', 'decoder.embed_tokens.weight')


@dataclass(frozen=True)
class T5Config:
    """The sizes and variant of a T5.

    Attributes:
      vocab: vocabulary size.
      width: size of a hidden state.
      depth: number of decoder layers.
      encoder_depth: number of encoder layers.
      heads: number of attention heads.
      head_dim: size of a head, which may differ from width / heads.
      mlp_width: size of a hidden state within an MLP.
      activation: activation of the MLP, a name in `layers.ACTIVATIONS`.
      gated: the MLP has a gate (T5 1.1).
      norm_eps: epsilon of the norms.
      buckets: number of buckets of relative positions.
      max_distance: distances of this or more share a bucket.
      tied: the head is the word embedding.
      scale_head: hidden states are divided by sqrt(width) before the head.
    """

    vocab: int
    width: int
    depth: int
    encoder_depth: int
    heads: int
    head_dim: int
    mlp_width: int
    activation: str = 'gelu_new'
    gated: bool = True
    norm_eps: float = 1e-6
    buckets: int = 32
    max_distance: int = 128
    tied: bool = False
    scale_head: bool = False

    @property
    def longest(self) -> None:
        """Return None: a text may have any number of tokens, since positions are relative."""

    @property
    def tower(self) -> LanguageTower:
        """Return this module, which implements the tower."""
        return sys.modules[__name__]


class DecoderCache(NamedTuple):
    """The self-attention cache of a decoder layer, and its keys and values of the encoder's output."""

    self: layers.KVCache
    cross_k: Float[Array, 'batch heads encoded head_dim']
    cross_v: Float[Array, 'batch heads encoded head_dim']


def distance_buckets(buckets: int, max_distance: int) -> Int[np.ndarray, ' distances']:
    """Return the bucket of every distance 0..max_distance: exact for the first half, logarithmic for the second.

    The table is computed on the host, because an accelerator's logarithm may put a boundary distance into the other
    bucket.

    Args:
      buckets: number of buckets.
      max_distance: the largest distance.

    >>> distance_buckets(8, 16).tolist()
    [0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7, 7]
    """
    exact = buckets // 2
    distance = np.arange(max_distance + 1)
    # In fp32 and in this order, as in transformers, because truncation decides the bucket of a boundary distance.
    octaves = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    far = octaves / np.float32(math.log(max_distance / exact)) * np.float32(buckets - exact)
    far = np.minimum(exact + far.astype(np.int32), buckets - 1)
    return np.where(distance < exact, distance, far).astype(np.int32)


def relative_bias(
    table: Float[Array, 'buckets heads'],
    positions: Int[Array, 'batch tokens'],
    slot_positions: Int[Array, 'batch slots'],
    *,
    max_distance: int,
    bidirectional: bool,
) -> Float[Array, 'batch heads tokens slots']:
    """Return the attention bias for the distance from a token to a slot (arXiv 1910.10683, section 2.1).

    Args:
      table: a learned bias for each bucket of distances and each head.
      positions: positions of the queries.
      slot_positions: positions of the keys.
      max_distance: distances of this or more share a bucket.
      bidirectional: whether half the buckets are for later slots; if not, later slots have distance 0.
    """
    # [batch, tokens, slots]; positive: the slot comes later.
    offset = slot_positions[:, None, :] - positions[:, :, None]
    buckets = table.shape[0] // 2 if bidirectional else table.shape[0]
    distance = jnp.abs(offset) if bidirectional else jnp.maximum(-offset, 0)
    # Distances beyond the table share its last bucket.
    bucket = jnp.asarray(distance_buckets(buckets, max_distance))[jnp.minimum(distance, max_distance)]
    if bidirectional:  # the second half of the table is for later slots
        bucket = jnp.where(offset > 0, bucket + buckets, bucket)
    return jnp.moveaxis(table[bucket], -1, 1)  # heads come after the batch, as in the logits


def embed_tokens(w: dict, cfg: T5Config, tokens: Int[Array, 'batch tokens']) -> Float[Array, 'batch tokens dim']:
    """Return word embeddings; encoder and decoder share them.

    Args:
      w: params of the tower.
      cfg: its config.
      tokens: token ids.
    """
    del cfg
    return w['embed'][tokens]


def _norm(w: dict, cfg: T5Config, x: Float[Array, '*batch dim']) -> Float[Array, '*batch dim']:
    return layers.rms_norm(w, x, cfg.norm_eps)


def _heads(w: dict, cfg: T5Config, x: Float[Array, 'batch tokens dim']) -> Float[Array, 'batch heads tokens head_dim']:
    return layers.split_heads(layers.dense(w, x), cfg.heads)


def _mlp(w: dict, cfg: T5Config, x: Float[Array, '*batch dim']) -> Float[Array, '*batch dim']:
    activation = layers.ACTIVATIONS[cfg.activation]
    if not cfg.gated:
        return layers.dense(w['fc2'], activation(layers.dense(w['fc1'], x)))
    # T5 1.1: the gate of GLU Variants Improve Transformer (arXiv 2002.05202).
    return layers.dense(w['down'], activation(layers.dense(w['gate'], x)) * layers.dense(w['up'], x))


def encoder_block(
    w: dict, cfg: T5Config, x: Float[Array, 'batch tokens dim'], ctx: dict, cache: None
) -> tuple[Float[Array, 'batch tokens dim'], None]:
    """Run pre-norm attention and MLP of the encoder.

    Args:
      w: weights of one layer.
      cfg: the tower's config.
      x: hidden states.
      ctx: mask, and bias of relative positions.
      cache: None, since this tower does not decode token by token.

    Returns:
      The new `x` and the cache.
    """
    h = _norm(w['norm1'], cfg, x)
    q, k, v = (_heads(w['attn'][name], cfg, h) for name in 'qkv')
    # Scale 1, because T5's initialisation replaces the division by sqrt(head_dim).
    x = x + layers.dense(w['attn']['o'], layers.attend(q, k, v, ctx['mask'], bias=ctx['bias'], scale=1.0))
    return x + _mlp(w['mlp'], cfg, _norm(w['norm2'], cfg, x)), cache


def encode(
    w: dict,
    cfg: T5Config,
    x: Float[Array, 'batch tokens dim'],
    valid: Bool[Array, 'batch tokens'],
    run: Runner = scan_blocks,
) -> Float[Array, 'batch tokens dim']:
    """Return the encoder's output after its final norm, from word embeddings.

    Pads take up positions, as in transformers.

    Args:
      w: params of the tower, or its weights from `bind`.
      cfg: its config.
      x: word embeddings.
      valid: False marks a pad.
      run: executes the blocks.
    """
    w = w['encoder']
    positions = jnp.arange(x.shape[1])[None]
    # All layers use the first layer's table, so the bias is computed once.
    bias = relative_bias(w['relative'], positions, positions, max_distance=cfg.max_distance, bidirectional=True)
    ctx = {'mask': valid[:, None], 'bias': bias, 'valid': valid}
    x, _ = run('language/encoder', lambda w, x, ctx, c: encoder_block(w, cfg, x, ctx, c), w['blocks'], x, ctx)
    return _norm(w['norm'], cfg, x)


def embed(
    w: dict, cfg: T5Config, x: Float[Array, 'batch tokens dim'], view: layers.View
) -> tuple[Float[Array, 'batch tokens dim'], dict]:
    """Return the input of the decoder's blocks and their `ctx`, without the encoder's part (see `reading`).

    Args:
      w: params of the tower.
      cfg: its config.
      x: word embeddings.
      view: positions of the tokens, and the slots that they may attend to.
    """
    bias = relative_bias(
        w['decoder']['relative'],
        view.positions,
        view.slot_positions,
        max_distance=cfg.max_distance,
        bidirectional=False,
    )
    return x, {'mask': view.mask, 'bias': bias}


def reading(
    encoded_valid: Bool[Array, 'batch encoded'], encoded: Float[Array, 'batch encoded dim'] | None = None
) -> dict:
    """Return the encoder's part of the `ctx` of the decoder's blocks.

    Args:
      encoded_valid: False marks a pad of the encoder's input.
      encoded: the encoder's output; None: its keys and values are in the caches.
    """
    ctx = {'cross_valid': encoded_valid}
    return ctx if encoded is None else ctx | {'cross': encoded}


def block(
    w: dict, cfg: T5Config, x: Float[Array, 'batch tokens dim'], ctx: dict, cache: DecoderCache | None
) -> tuple[Float[Array, 'batch tokens dim'], DecoderCache | None]:
    """Run pre-norm attention, cross-attention and MLP of the decoder; a cache replaces the encoder's output.

    Args:
      w: weights of one layer.
      cfg: the tower's config.
      x: hidden states.
      ctx: see `embed` and `reading`.
      cache: this layer's cache; None: tokens attend only to each other.

    Returns:
      The new `x` and the cache.
    """
    h = _norm(w['norm1'], cfg, x)
    q, k, v = (_heads(w['attn'][name], cfg, h) for name in 'qkv')
    # Self-attention: a token attends to the answer up to itself.
    if cache is not None:
        seen = layers.update_cache(cache.self, k, v)
        cache = cache._replace(self=seen)
        k = seen.k.astype(q.dtype)
        v = seen.v.astype(q.dtype)
    x = x + layers.dense(w['attn']['o'], layers.attend(q, k, v, ctx['mask'], bias=ctx['bias'], scale=1.0))
    # Cross-attention: keys and values of the encoder's output are computed here, or cached while decoding.
    q = _heads(w['cross']['q'], cfg, _norm(w['norm2'], cfg, x))
    if cache is None:
        k, v = (_heads(w['cross'][name], cfg, ctx['cross']) for name in 'kv')
    else:
        k = cache.cross_k.astype(q.dtype)
        v = cache.cross_v.astype(q.dtype)
    # No bias, since prompt tokens have no distance to answer tokens.
    x = x + layers.dense(w['cross']['o'], layers.attend(q, k, v, ctx['cross_valid'][:, None], scale=1.0))
    return x + _mlp(w['mlp'], cfg, _norm(w['norm3'], cfg, x)), cache


def finish(w: dict, cfg: T5Config, x: Float[Array, 'batch tokens dim']) -> Float[Array, 'batch tokens dim']:
    """Apply the decoder's final norm.

    Args:
      w: params of the tower.
      cfg: its config.
      x: the last block's output.
    """
    return _norm(w['decoder']['norm'], cfg, x)


def decode(
    w: dict,
    cfg: T5Config,
    tokens: Int[Array, 'batch tokens'],
    valid: Bool[Array, 'batch tokens'],
    encoded: Float[Array, 'batch encoded dim'],
    encoded_valid: Bool[Array, 'batch encoded'],
    run: Runner = scan_blocks,
) -> Float[Array, 'batch tokens dim']:
    """Return the decoder's hidden states after its final norm.

    Pads take up positions, as in transformers.

    Args:
      w: params of the tower, or its weights from `bind`.
      cfg: its config.
      tokens: token ids.
      valid: False marks a pad.
      encoded: the encoder's output.
      encoded_valid: False marks a pad of the encoder's input.
      run: executes the blocks.
    """
    positions = jnp.arange(tokens.shape[1])[None]
    # The causal mask is as usual. Only the positions differ, because `causal_view` would skip pads.
    view = layers.causal_view(valid)._replace(positions=positions, slot_positions=positions)
    x, ctx = embed(w, cfg, embed_tokens(w, cfg, tokens).astype(encoded.dtype), view)
    ctx |= {'valid': valid} | reading(encoded_valid, encoded)
    blocks = w['decoder']['blocks']
    x, _ = run('language/decoder', lambda w, x, ctx, cache: block(w, cfg, x, ctx, cache), blocks, x, ctx)
    return finish(w, cfg, x)


def head(w: dict, cfg: T5Config, hidden: Float[Array, '*batch dim']) -> Float[Array, '*batch vocab']:
    """Return logits, in fp32.

    Args:
      w: params of the tower.
      cfg: its config.
      hidden: what `finish` returns.
    """
    if cfg.scale_head:  # T5 1.0 shares the embedding with the head, but at another scale
        hidden = hidden * jnp.asarray(cfg.width**-0.5, hidden.dtype)
    return layers.word_logits(w, hidden, tied=cfg.tied)


def caches(
    w: dict, cfg: T5Config, encoded: Float[Array, 'batch encoded dim'], slots: int, dtype: DTypeLike
) -> tuple[DecoderCache, ...]:
    """Return the cache of every decoder layer, with no tokens yet but with the keys and values of the encoder's output.

    Args:
      w: params of the tower.
      cfg: its config.
      encoded: the encoder's output.
      slots: maximum number of tokens in a row.
      dtype: dtype of keys and values.
    """
    empty = layers.empty_caches(
        cfg.depth, batch=encoded.shape[0], kv_heads=cfg.heads, slots=slots, head_dim=cfg.head_dim, dtype=dtype
    )
    # One layer at a time, which works for any kind of kernel. A scan would stack the results of all layers.
    cross = unstack(w['decoder']['blocks']['cross'])
    cross_kv = ((_heads(layer[name], cfg, encoded).astype(dtype) for name in 'kv') for layer in cross)
    return tuple(DecoderCache(cache, *kv) for cache, kv in zip(empty, cross_kv, strict=True))


def shapes(cfg: T5Config) -> dict:
    """Return the shape of every parameter, as a params tree of tuples.

    Args:
      cfg: the tower's config.
    """
    width = cfg.width
    inner = cfg.heads * cfg.head_dim
    attention = {'q': (width, inner), 'k': (width, inner), 'v': (width, inner), 'o': (inner, width)}
    mlp = {'fc1': (width, cfg.mlp_width), 'fc2': (cfg.mlp_width, width)}
    if cfg.gated:
        mlp = {'gate': (width, cfg.mlp_width), 'up': (width, cfg.mlp_width), 'down': (cfg.mlp_width, width)}

    def stack(depth: int, groups: dict[str, dict[str, tuple[int, int]]]) -> dict:
        blocks = {}
        for index, (group, kernels) in enumerate(groups.items()):
            blocks[group] = {name: {'kernel': (depth, *size)} for name, size in kernels.items()}
            blocks[f'norm{index + 1}'] = {'scale': (depth, width)}  # each group comes after a norm
        return {'blocks': blocks, 'relative': (cfg.buckets, cfg.heads), 'norm': {'scale': (width,)}}

    tree = {
        'embed': (cfg.vocab, width),
        'encoder': stack(cfg.encoder_depth, {'attn': attention, 'mlp': mlp}),
        'decoder': stack(cfg.depth, {'attn': attention, 'cross': attention, 'mlp': mlp}),
    }
    return tree if cfg.tied else tree | {'head': {'kernel': (width, cfg.vocab)}}


def keys(cfg: T5Config) -> Keys:
    """Return the key table: our paths -> parameter names in transformers' `T5ForConditionalGeneration`.

    Args:
      cfg: the tower's config.
    """
    table: Keys = {'embed': EMBED}
    if not cfg.tied:  # included here, since `key_prefix` is the prefix of the whole model
        table['head/kernel'] = 'lm_head.weight'
    attention = {name: name for name in 'qkvo'}
    mlp = {'gate': 'wi_0', 'up': 'wi_1', 'down': 'wo'} if cfg.gated else {'fc1': 'wi', 'fc2': 'wo'}
    # The order matters, since transformers numbers the parts of a layer.
    encoder = {'attn': ('SelfAttention', attention), 'mlp': ('DenseReluDense', mlp)}
    decoder = {
        'attn': ('SelfAttention', attention),
        'cross': ('EncDecAttention', attention),
        'mlp': ('DenseReluDense', mlp),
    }
    for stack, parts in {'encoder': encoder, 'decoder': decoder}.items():
        # The first layer contains the table of relative positions that all layers use.
        table[f'{stack}/relative'] = f'{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight'
        table |= key_table.norm(f'{stack}/norm', f'{stack}.final_layer_norm', bias=False)
        for index, (part, (module, kernels)) in enumerate(parts.items()):
            layer = key_table.norm(f'norm{index + 1}', 'layer_norm', bias=False)
            for ours, theirs in kernels.items():
                layer |= key_table.dense(f'{part}/{ours}', f'{module}.{theirs}', bias=False)
            table |= key_table.nested(layer, f'{stack}/blocks/', f'{stack}.block.{{i}}.layer.{index}.')
    return table


def key_prefix(model: str, head: str) -> str:
    """Return the prefix of the names from `keys` in a whole model, where embedding and stacks are beside the head.

    Args:
      model: the prefix of transformers' model without its head.
      head: the prefix of the head's name.
    """
    del model
    return head


def embed_copies(own: str) -> list[str]:
    """Return the names of copies of the word embedding that a file may contain, in torch's order.

    Args:
      own: the name of the word embedding.
    """
    prefix = own.removesuffix(EMBED)
    return [prefix + name for name in COPIES]


def likely_tied(cfg: T5Config) -> bool:
    """Return whether the head of published files is the word embedding.

    Transformers 5 says so for every T5. But T5 1.1 has a separate head, and does not scale its input.

    Args:
      cfg: the tower's config.
    """
    return cfg.tied and cfg.scale_head


def from_hf(hf: HfConfig) -> T5Config:
    """Convert a transformers `T5Config`.

    Since transformers 5 the config says for every T5 that its head is tied. A checkpoint whose `lm_head.weight` differs
    from its `shared.weight` still needs `tied=False`.

    Args:
      hf: the transformers config.

    Returns:
      Our config.

    Raises:
      UnsupportedModelError: a field's value is not supported; names the field.
    """
    if hf.dense_act_fn not in layers.ACTIVATIONS:
        raise UnsupportedModelError(f'feed_forward_proj {hf.feed_forward_proj!r} of {hf.model_type} is not known')
    return T5Config(
        vocab=hf.vocab_size,
        width=hf.d_model,
        depth=hf.num_decoder_layers,  # transformers fills this in if a file has only `num_layers`
        encoder_depth=hf.num_layers,
        heads=hf.num_heads,
        head_dim=hf.d_kv,
        mlp_width=hf.d_ff,
        activation=hf.dense_act_fn,
        gated=hf.is_gated_act,
        norm_eps=hf.layer_norm_epsilon,
        buckets=hf.relative_attention_num_buckets,
        max_distance=hf.relative_attention_max_distance,
        tied=hf.tie_word_embeddings,
        scale_head=hf.scale_decoder_outputs,
    )


# A module of functions satisfies the protocol of a tower (PEP 544).
LANGUAGE_TOWERS.register('t5', sys.modules[__name__])
