"""The pieces every tower shares: norms, attention, rotary positions. Norms and softmax run in fp32."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparselora_jax.linear import linear


class KVCache(NamedTuple):
    """Keys and values of the slots seen so far; `index` is the slot that the next token is written to."""

    k: Float[Array, 'batch slots kv_heads head_dim']
    v: Float[Array, 'batch slots kv_heads head_dim']
    index: Int[Array, '']


def layer_norm(w: dict, x: Float[Array, '*batch dim'], eps: float) -> Float[Array, '*batch dim']:
    """LayerNorm with scale and bias."""
    y = jax.nn.standardize(x.astype(jnp.float32), epsilon=eps)
    return (y * w['scale'].astype(jnp.float32) + w['bias'].astype(jnp.float32)).astype(x.dtype)


def rms_norm(w: dict, x: Float[Array, '*batch dim'], eps: float) -> Float[Array, '*batch dim']:
    """RMSNorm with scale."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * w['scale'].astype(jnp.float32)).astype(x.dtype)


def dense(w: dict, x: Float[Array, '*batch inputs']) -> Float[Array, '*batch outputs']:
    """`linear` over a `{'kernel', 'bias'?}` dict."""
    return linear(x, w['kernel'], w.get('bias'))


def split_heads(x: Float[Array, 'batch tokens dim'], heads: int) -> Float[Array, 'batch tokens heads head_dim']:
    """The last axis into heads."""
    return x.reshape(*x.shape[:-1], heads, -1)


def attend(
    q: Float[Array, 'batch queries heads head_dim'],
    k: Float[Array, 'batch keys kv_heads head_dim'],
    v: Float[Array, 'batch keys kv_heads head_dim'],
    mask: Bool[Array, 'batch queries keys'] | None = None,
) -> Float[Array, 'batch queries dim']:
    """Scaled dot-product attention with grouped key/value heads; True in `mask` = may attend."""
    batch, queries, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    q = q.reshape(batch, queries, kv_heads, heads // kv_heads, head_dim)
    logits = jnp.einsum('bqkgd,bskd->bkgqs', q, k, preferred_element_type=jnp.float32) * head_dim**-0.5
    if mask is not None:
        logits = jnp.where(mask[:, None, None], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum('bkgqs,bskd->bqkgd', weights, v).reshape(batch, queries, heads * head_dim)


def rope_table(
    positions: Int[Array, 'batch tokens'], head_dim: int, base: float
) -> tuple[Float[Array, 'batch tokens half'], Float[Array, 'batch tokens half']]:
    """Cosines and sines of rotary positions (RoFormer, arXiv 2104.09864), in fp32."""
    frequencies = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, 'batch tokens heads head_dim'],
    table: tuple[Float[Array, 'batch tokens half'], Float[Array, 'batch tokens half']],
) -> Float[Array, 'batch tokens heads head_dim']:
    """Applies rotary positions; halves are split as in Hugging Face's LLaMA (first half, second half)."""
    cos, sin = (t[:, :, None].astype(jnp.float32) for t in table)
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x.dtype)


def update_cache(cache: KVCache, k: Any, v: Any) -> KVCache:
    """Writes new keys and values at `cache.index` and advances it."""
    write = jax.lax.dynamic_update_slice_in_dim
    tokens = k.shape[1]
    return KVCache(
        write(cache.k, k.astype(cache.k.dtype), cache.index, axis=1),
        write(cache.v, v.astype(cache.v.dtype), cache.index, axis=1),
        cache.index + jnp.asarray(tokens, cache.index.dtype),
    )
