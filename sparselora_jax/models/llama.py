"""LLaMA (arXiv 2302.13971): RMSNorm, rotary positions, grouped key/value heads, SwiGLU, tied or untied head.

Gemma (arXiv 2403.08295) is the same with GeGLU, norms that scale by 1 + w, and word embeddings times sqrt(width).
"""

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparselora_jax.models import layers
from sparselora_jax.models.runners import scan_blocks
from sparselora_jax.runtime.errors import UnsupportedModelError


@dataclass(frozen=True)
class Llama3Rope:
    """How LLaMA 3.1 stretches low rotary frequencies."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class LlamaConfig:
    vocab: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    mlp_width: int
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    max_positions: int = 2048
    head_dim: int = 0  # 0: width / heads
    tied: bool = True  # the head is the word embedding
    attention_bias: bool = False
    mlp_bias: bool = False
    activation: str = 'silu'
    rope_linear: float = 1.0  # positions are divided by it
    rope_llama3: Llama3Rope | None = None
    norm_offset: float = 0.0  # Gemma: 1, norms scale by 1 + w
    embed_scale: float = 1.0  # Gemma: sqrt(width)
    window: int | None = None  # Mistral: tokens that attention looks back on, the token itself included; None: all

    @property
    def longest(self) -> int | None:
        """Tokens that a text may have: attention is full, which a window equals up to its length."""
        return self.window

    def __post_init__(self):
        if not self.head_dim:
            object.__setattr__(self, 'head_dim', self.width // self.heads)


def rope_frequencies(cfg: LlamaConfig) -> Float[Array, ' half']:
    """Rotary frequencies, stretched as the config says."""
    frequencies = cfg.rope_base ** (-jnp.arange(0, cfg.head_dim, 2, dtype=jnp.float32) / cfg.head_dim)
    frequencies = frequencies / cfg.rope_linear
    if (stretch := cfg.rope_llama3) is None:
        return frequencies
    # Wavelengths beyond the trained context are stretched, short ones stay, those between are interpolated.
    wavelengths = 2 * math.pi / frequencies
    span = stretch.high_freq_factor - stretch.low_freq_factor
    keep = jnp.clip((stretch.original_max_positions / wavelengths - stretch.low_freq_factor) / span, 0.0, 1.0)
    return (1 - keep) * frequencies / stretch.factor + keep * frequencies


def embed_tokens(w: dict, cfg: LlamaConfig, tokens: Int[Array, 'batch tokens']) -> Float[Array, 'batch tokens dim']:
    """Word embeddings."""
    words = w['embed'][tokens]
    return words if cfg.embed_scale == 1.0 else words * jnp.asarray(cfg.embed_scale, words.dtype)


def embed(
    w: dict, cfg: LlamaConfig, x: Float[Array, 'batch tokens dim'], view: layers.View
) -> tuple[Float[Array, 'batch tokens dim'], dict]:
    """Word embeddings -> the blocks' input and what they read."""
    del w
    return x, {'rope': layers.rope_table(view.positions, rope_frequencies(cfg)), 'mask': view.mask}


def _norm(w: dict, cfg: LlamaConfig, x: Array) -> Array:
    return layers.rms_norm(w, x, cfg.norm_eps, offset=cfg.norm_offset)


def block(w: dict, cfg: LlamaConfig, x: Float[Array, 'batch tokens dim'], ctx: dict, cache: layers.KVCache | None):
    """Pre-norm attention and gated MLP. With a cache, keys and values are written at its index first."""
    h = _norm(w['norm1'], cfg, x)
    q = layers.split_heads(layers.dense(w['attn']['q'], h), cfg.heads)
    k, v = (layers.split_heads(layers.dense(w['attn'][name], h), cfg.kv_heads) for name in 'kv')
    q, k = layers.rotate(q, ctx['rope']), layers.rotate(k, ctx['rope'])
    if cache is not None:
        cache = layers.update_cache(cache, k, v)
        k, v = cache.k.astype(q.dtype), cache.v.astype(q.dtype)
    x = x + layers.dense(w['attn']['o'], layers.attend(q, k, v, ctx['mask']))
    h = _norm(w['norm2'], cfg, x)
    h = layers.ACTIVATIONS[cfg.activation](layers.dense(w['mlp']['gate'], h)) * layers.dense(w['mlp']['up'], h)
    return x + layers.dense(w['mlp']['down'], h), cache


def finish(w: dict, cfg: LlamaConfig, x: Float[Array, 'batch tokens dim']) -> Float[Array, 'batch tokens dim']:
    """The final norm."""
    return _norm(w['norm'], cfg, x)


def head(w: dict, cfg: LlamaConfig, hidden: Float[Array, '*batch dim']) -> Float[Array, '*batch vocab']:
    """Logits, in fp32."""
    return layers.word_logits(w, hidden, tied=cfg.tied)


def forward(
    w: dict,
    cfg: LlamaConfig,
    x: Float[Array, 'batch tokens dim'],
    valid: Bool[Array, 'batch tokens'],
    run=scan_blocks,
    *,
    prefix: Bool[Array, 'batch tokens'] | None = None,
) -> Float[Array, 'batch tokens dim']:
    """Word embeddings -> hidden states after the final norm; tokens of `prefix` read each other both ways.

    Raises:
      BatchError: more tokens than the window of attention.
    """
    layers.check_length(x.shape[1], cfg.longest)
    x, ctx = embed(w, cfg, x, layers.causal_view(valid, prefix))
    ctx['valid'] = valid
    x, _ = run('language', lambda w, x, ctx, cache: block(w, cfg, x, ctx, cache), w['blocks'], x, ctx)
    return finish(w, cfg, x)


def caches(cfg: LlamaConfig, batch: int, slots: int, dtype: Any) -> tuple[layers.KVCache, ...]:
    """Empty key/value caches of every layer."""
    size = {'batch': batch, 'slots': slots, 'kv_heads': cfg.kv_heads, 'head_dim': cfg.head_dim}
    return layers.empty_caches(cfg.depth, dtype=dtype, **size)


def shapes(cfg: LlamaConfig) -> dict:
    """The shape of every parameter, as a params tree of tuples."""
    n, d, f = cfg.depth, cfg.width, cfg.mlp_width
    inner, kv = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim

    def dense(inputs: int, outputs: int, bias: bool) -> dict:
        return {'kernel': (n, inputs, outputs)} | ({'bias': (n, outputs)} if bias else {})

    tree = {
        'embed': (cfg.vocab, d),
        'blocks': {
            'norm1': {'scale': (n, d)},
            'attn': {
                'q': dense(d, inner, cfg.attention_bias),
                'k': dense(d, kv, cfg.attention_bias),
                'v': dense(d, kv, cfg.attention_bias),
                'o': dense(inner, d, cfg.attention_bias),
            },
            'norm2': {'scale': (n, d)},
            'mlp': {
                'gate': dense(d, f, cfg.mlp_bias),
                'up': dense(d, f, cfg.mlp_bias),
                'down': dense(f, d, cfg.mlp_bias),
            },
        },
        'norm': {'scale': (d,)},
    }
    return tree if cfg.tied else tree | {'head': {'kernel': (d, cfg.vocab)}}


def keys(cfg: LlamaConfig) -> dict[str, str]:
    """Our path -> Hugging Face's name in `LlamaModel`; `{i}` is the layer."""
    linears = {f'attn/{name}': f'self_attn.{name}_proj' for name in 'qkvo'}
    linears |= {f'mlp/{name}': f'mlp.{name}_proj' for name in ('gate', 'up', 'down')}
    biased = {'attn': cfg.attention_bias, 'mlp': cfg.mlp_bias}
    names = {'embed': 'embed_tokens.weight', 'norm/scale': 'norm.weight'}
    names |= {'blocks/norm1/scale': 'layers.{i}.input_layernorm.weight'}
    names |= {'blocks/norm2/scale': 'layers.{i}.post_attention_layernorm.weight'}
    for ours, theirs in linears.items():
        names[f'blocks/{ours}/kernel'] = f'layers.{{i}}.{theirs}.weight'
        if biased[ours.split('/')[0]]:
            names[f'blocks/{ours}/bias'] = f'layers.{{i}}.{theirs}.bias'
    return names


def from_hf(hf: Any) -> LlamaConfig:
    """The config of a transformers `LlamaConfig`, `MistralConfig` or `GemmaConfig`.

    Raises:
      UnsupportedModelError: names the field whose value is not supported.
    """
    rope = dict(hf.rope_parameters)
    kind = rope.get('rope_type', 'default')
    if kind not in ('default', 'linear', 'llama3'):
        raise UnsupportedModelError(f"rope_type {kind!r} of {hf.model_type}: expected 'default', 'linear' or 'llama3'")
    if hf.hidden_act not in layers.ACTIVATIONS:
        raise UnsupportedModelError(f'hidden_act {hf.hidden_act!r} of {hf.model_type} is not known')
    names = {'factor', 'low_freq_factor', 'high_freq_factor'}
    llama3 = {name: float(rope[name]) for name in names} if kind == 'llama3' else None
    gemma = hf.model_type == 'gemma'
    return LlamaConfig(
        vocab=hf.vocab_size,
        width=hf.hidden_size,
        depth=hf.num_hidden_layers,
        heads=hf.num_attention_heads,
        kv_heads=hf.num_key_value_heads or hf.num_attention_heads,
        mlp_width=hf.intermediate_size,
        rope_base=float(rope['rope_theta']),
        norm_eps=hf.rms_norm_eps,
        max_positions=hf.max_position_embeddings,
        head_dim=getattr(hf, 'head_dim', None) or 0,
        tied=hf.tie_word_embeddings,
        attention_bias=getattr(hf, 'attention_bias', False),
        mlp_bias=getattr(hf, 'mlp_bias', False),
        # Gemma's first configs say 'gelu' and mean its tanh form: transformers' GemmaConfig has already corrected it.
        activation=hf.hidden_act,
        rope_linear=float(rope['factor']) if kind == 'linear' else 1.0,
        rope_llama3=llama3 and Llama3Rope(original_max_positions=rope['original_max_position_embeddings'], **llama3),
        norm_offset=1.0 if gemma else 0.0,
        embed_scale=hf.hidden_size**0.5 if gemma else 1.0,
        window=getattr(hf, 'sliding_window', None),
    )
