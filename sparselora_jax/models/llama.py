"""LLaMA (arXiv 2302.13971): RMSNorm, rotary positions, grouped key/value heads, SwiGLU, tied or untied head."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparselora_jax.linear import linear
from sparselora_jax.models import layers
from sparselora_jax.models.runners import scan_blocks


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

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


def embed_tokens(w: dict, tokens: Int[Array, 'batch tokens']) -> Float[Array, 'batch tokens dim']:
    """Word embeddings."""
    return w['embed'][tokens]


def positions_of(valid: Bool[Array, 'batch slots']) -> Int[Array, 'batch slots']:
    """Positions that skip pads, wherever the pads are."""
    return jnp.maximum(jnp.cumsum(valid, axis=-1, dtype=jnp.int32) - 1, 0)


def embed(
    cfg: LlamaConfig, x: Float[Array, 'batch tokens dim'], valid: Bool[Array, 'batch tokens']
) -> tuple[Array, dict]:
    """Embedded tokens -> the blocks' input; without a cache, slots are the tokens themselves."""
    rope = layers.rope_table(positions_of(valid), cfg.head_dim, cfg.rope_base)
    return x, {'valid': valid, 'key_valid': valid, 'rope': rope}


def block(w: dict, cfg: LlamaConfig, x: Float[Array, 'batch tokens dim'], ctx: dict, cache: layers.KVCache | None):
    """Pre-norm causal attention and SwiGLU. With a cache, keys and values are written at its index first."""
    h = layers.rms_norm(w['norm1'], x, cfg.norm_eps)
    q = layers.split_heads(layers.dense(w['attn']['q'], h), cfg.heads)
    k, v = (layers.split_heads(layers.dense(w['attn'][name], h), cfg.kv_heads) for name in 'kv')
    q, k = layers.rotate(q, ctx['rope']), layers.rotate(k, ctx['rope'])
    first = jnp.zeros((), jnp.int32)
    if cache is not None:
        first, cache = cache.index, layers.update_cache(cache, k, v)
        k, v = cache.k.astype(q.dtype), cache.v.astype(q.dtype)
    causal = jnp.arange(k.shape[1]) <= (first + jnp.arange(q.shape[1]))[:, None]
    attention = layers.attend(q, k, v, causal[None] & ctx['key_valid'][:, None, :])
    x = x + layers.dense(w['attn']['o'], attention)
    h = layers.rms_norm(w['norm2'], x, cfg.norm_eps)
    h = jax.nn.silu(layers.dense(w['mlp']['gate'], h)) * layers.dense(w['mlp']['up'], h)
    return x + layers.dense(w['mlp']['down'], h), cache


def finish(w: dict, cfg: LlamaConfig, x: Float[Array, 'batch tokens dim']) -> Float[Array, 'batch tokens dim']:
    """The final norm."""
    return layers.rms_norm(w['norm'], x, cfg.norm_eps)


def head(w: dict, hidden: Float[Array, '*batch dim']) -> Float[Array, '*batch vocab']:
    """Logits, in fp32; tied to the embedding unless the tree has a head of its own."""
    if 'head' in w:
        return linear(hidden, w['head']['kernel']).astype(jnp.float32)
    return jnp.einsum('...d,vd->...v', hidden, w['embed'].astype(hidden.dtype), preferred_element_type=jnp.float32)


def forward(
    w: dict, cfg: LlamaConfig, x: Float[Array, 'batch tokens dim'], valid: Bool[Array, 'batch tokens'], run=scan_blocks
) -> Float[Array, 'batch tokens dim']:
    """Embedded tokens -> hidden states after the final norm."""
    x, ctx = embed(cfg, x, valid)
    x, _ = run('language', lambda w, x, ctx, cache: block(w, cfg, x, ctx, cache), w['blocks'], x, ctx)
    return finish(w, cfg, x)


def shapes(cfg: LlamaConfig, tied: bool = True) -> dict:
    """The shape of every parameter, as a params tree of tuples."""
    n, d, kv, f = cfg.depth, cfg.width, cfg.kv_heads * cfg.head_dim, cfg.mlp_width
    tree = {
        'embed': (cfg.vocab, d),
        'blocks': {
            'norm1': {'scale': (n, d)},
            'attn': {
                'q': {'kernel': (n, d, d)},
                'k': {'kernel': (n, d, kv)},
                'v': {'kernel': (n, d, kv)},
                'o': {'kernel': (n, d, d)},
            },
            'norm2': {'scale': (n, d)},
            'mlp': {'gate': {'kernel': (n, d, f)}, 'up': {'kernel': (n, d, f)}, 'down': {'kernel': (n, f, d)}},
        },
        'norm': {'scale': (d,)},
    }
    return tree if tied else tree | {'head': {'kernel': (d, cfg.vocab)}}
