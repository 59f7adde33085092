"""T5 (arXiv 1910.10683) and T5 1.1: an encoder and a decoder; RMSNorm, relative positions as a bias, no QK scaling.

`encode` and `decode` run a stack whole. `embed`, `block`, `finish` and `caches` are the decoder's, to run it token by
token; `reading` adds the encoder's output to what its blocks read.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparselora_jax.models import layers
from sparselora_jax.models.relative import relative_bias
from sparselora_jax.models.runners import scan_blocks, unstack
from sparselora_jax.runtime.errors import UnsupportedModelError

EMBED = 'shared.weight'  # the word embeddings in checkpoints, which may hold copies, or one of these alone:
COPIES = ('encoder.embed_tokens.weight', 'decoder.embed_tokens.weight')


@dataclass(frozen=True)
class T5Config:
    vocab: int
    width: int
    depth: int  # of the decoder
    encoder_depth: int
    heads: int
    head_dim: int  # need not be width / heads
    mlp_width: int
    activation: str = 'gelu_new'
    gated: bool = True
    norm_eps: float = 1e-6
    buckets: int = 32  # of relative positions
    max_distance: int = 128  # positions as far as this or farther share a bucket
    tied: bool = False  # the head is the word embedding
    scale_head: bool = False  # hidden states are divided by sqrt(width) before the head

    @property
    def longest(self) -> None:
        """Tokens that a text may have: as many as it likes, since positions are relative."""


class DecoderCache(NamedTuple):
    """A decoder layer's slots seen so far, and its keys and values of the encoder's output."""

    self: layers.KVCache
    cross_k: Float[Array, 'batch heads encoded head_dim']
    cross_v: Float[Array, 'batch heads encoded head_dim']


def embed_tokens(w: dict, cfg: T5Config, tokens: Int[Array, 'batch tokens']) -> Float[Array, 'batch tokens dim']:
    """Word embeddings; encoder and decoder share them."""
    del cfg
    return w['embed'][tokens]


def _norm(w: dict, cfg: T5Config, x: Array) -> Array:
    return layers.rms_norm(w, x, cfg.norm_eps)


def _heads(w: dict, cfg: T5Config, x: Array) -> Array:
    return layers.split_heads(layers.dense(w, x), cfg.heads)


def _mlp(w: dict, cfg: T5Config, x: Array) -> Array:
    activation = layers.ACTIVATIONS[cfg.activation]
    if not cfg.gated:
        return layers.dense(w['fc2'], activation(layers.dense(w['fc1'], x)))
    return layers.dense(w['down'], activation(layers.dense(w['gate'], x)) * layers.dense(w['up'], x))


def encoder_block(w: dict, cfg: T5Config, x: Float[Array, 'batch tokens dim'], ctx: dict, cache: None):
    """Pre-norm attention and MLP of the encoder."""
    h = _norm(w['norm1'], cfg, x)
    q, k, v = (_heads(w['attn'][name], cfg, h) for name in 'qkv')
    x = x + layers.dense(w['attn']['o'], layers.attend(q, k, v, ctx['mask'], bias=ctx['bias'], scale=1.0))
    return x + _mlp(w['mlp'], cfg, _norm(w['norm2'], cfg, x)), cache


def encode(
    w: dict, cfg: T5Config, x: Float[Array, 'batch tokens dim'], valid: Bool[Array, 'batch tokens'], run=scan_blocks
) -> Float[Array, 'batch tokens dim']:
    """Word embeddings -> the encoder's output, normed. Pads count as positions, as they do in transformers."""
    w, positions = w['encoder'], jnp.arange(x.shape[1])[None]
    bias = relative_bias(w['relative'], positions, positions, max_distance=cfg.max_distance, bidirectional=True)
    ctx = {'mask': valid[:, None], 'bias': bias, 'valid': valid}
    x, _ = run('language/encoder', lambda w, x, ctx, c: encoder_block(w, cfg, x, ctx, c), w['blocks'], x, ctx)
    return _norm(w['norm'], cfg, x)


def embed(
    w: dict, cfg: T5Config, x: Float[Array, 'batch tokens dim'], view: layers.View
) -> tuple[Float[Array, 'batch tokens dim'], dict]:
    """Word embeddings -> the decoder's blocks' input and what they read of each other; `reading` adds the encoder."""
    kind = {'max_distance': cfg.max_distance, 'bidirectional': False}
    bias = relative_bias(w['decoder']['relative'], view.positions, view.slot_positions, **kind)
    return x, {'mask': view.mask, 'bias': bias}


def reading(
    encoded_valid: Bool[Array, 'batch encoded'], encoded: Float[Array, 'batch encoded dim'] | None = None
) -> dict:
    """What the decoder's blocks read of the encoder, for their `ctx`. With a cache `encoded` is not needed."""
    return {'cross_valid': encoded_valid} | ({} if encoded is None else {'cross': encoded})


def block(w: dict, cfg: T5Config, x: Float[Array, 'batch tokens dim'], ctx: dict, cache: DecoderCache | None):
    """Pre-norm attention, cross-attention and MLP of the decoder. With a cache, the encoder is read from it."""
    h = _norm(w['norm1'], cfg, x)
    q, k, v = (_heads(w['attn'][name], cfg, h) for name in 'qkv')
    if cache is not None:
        seen = layers.update_cache(cache.self, k, v)
        cache, k, v = cache._replace(self=seen), seen.k.astype(q.dtype), seen.v.astype(q.dtype)
    x = x + layers.dense(w['attn']['o'], layers.attend(q, k, v, ctx['mask'], bias=ctx['bias'], scale=1.0))
    q = _heads(w['cross']['q'], cfg, _norm(w['norm2'], cfg, x))
    if cache is None:
        k, v = (_heads(w['cross'][name], cfg, ctx['cross']) for name in 'kv')
    else:
        k, v = cache.cross_k.astype(q.dtype), cache.cross_v.astype(q.dtype)
    x = x + layers.dense(w['cross']['o'], layers.attend(q, k, v, ctx['cross_valid'][:, None], scale=1.0))
    return x + _mlp(w['mlp'], cfg, _norm(w['norm3'], cfg, x)), cache


def finish(w: dict, cfg: T5Config, x: Float[Array, 'batch tokens dim']) -> Float[Array, 'batch tokens dim']:
    """The decoder's final norm."""
    return _norm(w['decoder']['norm'], cfg, x)


def decode(
    w: dict,
    cfg: T5Config,
    tokens: Int[Array, 'batch tokens'],
    valid: Bool[Array, 'batch tokens'],
    encoded: Float[Array, 'batch encoded dim'],
    encoded_valid: Bool[Array, 'batch encoded'],
    run=scan_blocks,
) -> Float[Array, 'batch tokens dim']:
    """The decoder's hidden states after its final norm. Pads count as positions, as they do in transformers."""
    positions = jnp.arange(tokens.shape[1])[None]
    view = layers.causal_view(valid)._replace(positions=positions, slot_positions=positions)
    x, ctx = embed(w, cfg, embed_tokens(w, cfg, tokens).astype(encoded.dtype), view)
    ctx |= {'valid': valid} | reading(encoded_valid, encoded)
    blocks = w['decoder']['blocks']
    x, _ = run('language/decoder', lambda w, x, ctx, cache: block(w, cfg, x, ctx, cache), blocks, x, ctx)
    return finish(w, cfg, x)


def head(w: dict, cfg: T5Config, hidden: Float[Array, '*batch dim']) -> Float[Array, '*batch vocab']:
    """Logits, in fp32."""
    if cfg.scale_head:
        hidden = hidden * jnp.asarray(cfg.width**-0.5, hidden.dtype)
    return layers.word_logits(w, hidden, tied=cfg.tied)


def caches(
    w: dict, cfg: T5Config, encoded: Float[Array, 'batch encoded dim'], slots: int, dtype: Any
) -> tuple[DecoderCache, ...]:
    """The caches of every decoder layer: no slot seen yet, the encoder's output projected once."""
    size = {'batch': encoded.shape[0], 'slots': slots, 'kv_heads': cfg.heads, 'head_dim': cfg.head_dim}
    empty = layers.empty_caches(cfg.depth, dtype=dtype, **size)
    cross = unstack(w['decoder']['blocks']['cross'])
    read = ((_heads(layer[name], cfg, encoded).astype(dtype) for name in 'kv') for layer in cross)
    return tuple(DecoderCache(cache, *kv) for cache, kv in zip(empty, read, strict=True))


def shapes(cfg: T5Config) -> dict:
    """The shape of every parameter, as a params tree of tuples."""
    d, f, inner = cfg.width, cfg.mlp_width, cfg.heads * cfg.head_dim

    def blocks(n: int, norms: int, *attentions: str) -> dict:
        kernels = {'q': (d, inner), 'k': (d, inner), 'v': (d, inner), 'o': (inner, d)}
        mlp = {'gate': (d, f), 'up': (d, f), 'down': (f, d)} if cfg.gated else {'fc1': (d, f), 'fc2': (f, d)}
        groups = dict.fromkeys(attentions, kernels) | {'mlp': mlp}
        tree = {group: {name: {'kernel': (n, *size)} for name, size in of.items()} for group, of in groups.items()}
        return tree | {f'norm{i + 1}': {'scale': (n, d)} for i in range(norms)}

    ends = {'relative': (cfg.buckets, cfg.heads), 'norm': {'scale': (d,)}}
    tree = {
        'embed': (cfg.vocab, d),
        'encoder': {'blocks': blocks(cfg.encoder_depth, 2, 'attn')} | ends,
        'decoder': {'blocks': blocks(cfg.depth, 3, 'attn', 'cross')} | ends,
    }
    return tree if cfg.tied else tree | {'head': {'kernel': (d, cfg.vocab)}}


def keys(cfg: T5Config) -> dict[str, str]:
    """Our path -> Hugging Face's name in `T5ForConditionalGeneration`; `{i}` is the layer."""
    mlp = {'gate': 'wi_0', 'up': 'wi_1', 'down': 'wo'} if cfg.gated else {'fc1': 'wi', 'fc2': 'wo'}
    names = {'embed': EMBED} | ({} if cfg.tied else {'head/kernel': 'lm_head.weight'})
    for stack in ('encoder', 'decoder'):
        parts = ['attn', 'mlp'] if stack == 'encoder' else ['attn', 'cross', 'mlp']
        names[f'{stack}/relative'] = f'{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight'
        names[f'{stack}/norm/scale'] = f'{stack}.final_layer_norm.weight'
        for i, part in enumerate(parts):
            ours, theirs = f'{stack}/blocks', f'{stack}.block.{{i}}.layer.{i}'
            module = {'attn': 'SelfAttention', 'cross': 'EncDecAttention', 'mlp': 'DenseReluDense'}[part]
            names[f'{ours}/norm{i + 1}/scale'] = f'{theirs}.layer_norm.weight'
            for name, their in (mlp if part == 'mlp' else {name: name for name in 'qkvo'}).items():
                names[f'{ours}/{part}/{name}/kernel'] = f'{theirs}.{module}.{their}.weight'
    return names


def from_hf(hf: Any) -> T5Config:
    """The config of a transformers `T5Config`.

    Since transformers 5 the config says of every T5 that its head is tied: a checkpoint whose `lm_head.weight` is not
    its `shared.weight` needs `tied=False` all the same.

    Raises:
      UnsupportedModelError: names the field whose value is not supported.
    """
    if hf.dense_act_fn not in layers.ACTIVATIONS:
        raise UnsupportedModelError(f'feed_forward_proj {hf.feed_forward_proj!r} of t5 is not known')
    return T5Config(
        vocab=hf.vocab_size,
        width=hf.d_model,
        depth=hf.num_decoder_layers,
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
