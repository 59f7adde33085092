"""The pieces every tower shares: norms, attention, rotary positions. Norms and softmax run in fp32."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparselora_jax.runtime.errors import BatchError, UnsupportedModelError
from sparselora_jax.sparse.linear import linear


class KVCache(NamedTuple):
    """Keys and values of the slots seen so far; `index` is the slot that the next token is written to."""

    k: Float[Array, 'batch kv_heads slots head_dim']
    v: Float[Array, 'batch kv_heads slots head_dim']
    index: Int[Array, '']


class View(NamedTuple):
    """Where the tokens of one run of blocks stand, and which slots each of them may read.

    Without a cache the slots are the tokens themselves. With one, a run may hold any tokens: the prompt, the next
    token, or the next token of every beam, since `mask` says who reads whom.
    """

    positions: Int[Array, 'batch tokens']
    slot_positions: Int[Array, 'batch slots']
    mask: Bool[Array, 'batch tokens slots']


def positions_of(valid: Bool[Array, 'batch slots']) -> Int[Array, 'batch slots']:
    """Positions that skip pads, wherever the pads are."""
    return jnp.maximum(jnp.cumsum(valid, axis=-1, dtype=jnp.int32) - 1, 0)


def causal_view(valid: Bool[Array, 'batch tokens'], prefix: Bool[Array, 'batch tokens'] | None = None) -> View:
    """Every token reads those before it and itself, pads left out; tokens of `prefix` read each other both ways."""
    slots = jnp.arange(valid.shape[1])
    mask = (slots <= slots[:, None])[None]
    if prefix is not None:
        mask = mask | (prefix[:, None, :] & prefix[:, :, None])
    positions = positions_of(valid)
    return View(positions, positions, mask & valid[:, None, :])


def check_length(tokens: int, longest: int | None) -> None:
    """Raises `BatchError` if there are more tokens, pads included, than a model reads; None: it reads any number."""
    if longest is not None and tokens > longest:
        raise BatchError(f'{tokens} tokens: {reads_at_most(longest)}; use a shorter text, or fewer pads')


def reads_at_most(longest: int) -> str:
    """What errors say of a text that is too long."""
    return f'the model reads at most {longest} (its table of positions, or window of attention)'


def layer_norm(w: dict, x: Float[Array, '*batch dim'], eps: float) -> Float[Array, '*batch dim']:
    """LayerNorm with scale and bias."""
    # The default, mean(x²) - mean(x)², loses all digits where the mean is far above the deviation.
    y = jax.nn.standardize(x.astype(jnp.float32), epsilon=eps, algorithm='stable')
    return (y * w['scale'].astype(jnp.float32) + w['bias'].astype(jnp.float32)).astype(x.dtype)


def rms_norm(w: dict, x: Float[Array, '*batch dim'], eps: float, *, offset: float = 0.0) -> Float[Array, '*batch dim']:
    """RMSNorm with scale `offset + w`."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * (offset + w['scale'].astype(jnp.float32))).astype(x.dtype)


def dense(w: dict, x: Float[Array, '*batch inputs']) -> Float[Array, '*batch outputs']:
    """`linear` over a `{'kernel', 'bias'?}` dict."""
    return linear(x, w['kernel'], w.get('bias'))


def split_heads(x: Float[Array, 'batch tokens dim'], heads: int) -> Float[Array, 'batch heads tokens head_dim']:
    """The last axis into heads, which come before the tokens."""
    return x.reshape(*x.shape[:-1], heads, -1).swapaxes(1, 2)


def attend(
    q: Float[Array, 'batch heads queries head_dim'],
    k: Float[Array, 'batch kv_heads keys head_dim'],
    v: Float[Array, 'batch kv_heads keys head_dim'],
    mask: Bool[Array, '#batch #queries keys'] | None = None,
    *,
    bias: Float[Array, '#batch heads queries keys'] | None = None,
    scale: float | None = None,
) -> Float[Array, 'batch queries dim']:
    """Dot-product attention with grouped key/value heads; True in `mask` = may attend.

    Args:
      bias: added to the scaled products (T5's relative positions).
      scale: of the products; 1 / sqrt(head_dim) by default.
    """
    batch, heads, queries, head_dim = q.shape
    kv_heads = k.shape[1]
    # Plain batched matmuls over [batch, kv_heads]: with the group as an axis of its own XLA transposes what they read.
    q = q.reshape(batch, kv_heads, -1, head_dim)
    logits = jnp.matmul(q, k.swapaxes(2, 3), preferred_element_type=jnp.float32)
    logits = logits.reshape(batch, kv_heads, -1, queries, k.shape[2])
    logits = logits * (head_dim**-0.5 if scale is None else scale)
    if bias is not None:
        logits = logits + bias.astype(jnp.float32).reshape(bias.shape[0], kv_heads, -1, *bias.shape[2:])
    if mask is not None:
        logits = jnp.where(mask[:, None, None], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    mixed = jnp.matmul(weights.reshape(batch, kv_heads, -1, k.shape[2]), v)
    return mixed.reshape(batch, heads, queries, head_dim).swapaxes(1, 2).reshape(batch, queries, -1)


def rope_table(
    positions: Int[Array, 'batch tokens'], frequencies: Float[Array, ' half']
) -> tuple[Float[Array, 'batch tokens half'], Float[Array, 'batch tokens half']]:
    """Cosines and sines of rotary positions (RoFormer, arXiv 2104.09864), in fp32."""
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, 'batch heads tokens head_dim'],
    table: tuple[Float[Array, 'batch tokens half'], Float[Array, 'batch tokens half']],
) -> Float[Array, 'batch heads tokens head_dim']:
    """Applies rotary positions; halves are split as in Hugging Face's LLaMA (first half, second half)."""
    cos, sin = (t[:, None].astype(jnp.float32) for t in table)
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x.dtype)


def empty_caches(
    layers: int, *, batch: int, kv_heads: int, slots: int, head_dim: int, dtype: Any
) -> tuple[KVCache, ...]:
    """One empty cache a layer."""
    empty = jnp.zeros((batch, kv_heads, slots, head_dim), dtype)
    return tuple(KVCache(empty, empty, jnp.zeros((), jnp.int32)) for _ in range(layers))


def update_cache(cache: KVCache, k: Any, v: Any) -> KVCache:
    """Writes new keys and values at `cache.index` and advances it."""
    write = jax.lax.dynamic_update_slice_in_dim
    tokens = k.shape[2]
    return KVCache(
        write(cache.k, k.astype(cache.k.dtype), cache.index, axis=2),
        write(cache.v, v.astype(cache.v.dtype), cache.index, axis=2),
        cache.index + jnp.asarray(tokens, cache.index.dtype),
    )


ACTIVATIONS = {  # by the names that Hugging Face's configs use
    'gelu': lambda x: jax.nn.gelu(x, approximate=False),
    'gelu_new': lambda x: jax.nn.gelu(x, approximate=True),
    'gelu_pytorch_tanh': lambda x: jax.nn.gelu(x, approximate=True),
    'quick_gelu': lambda x: x * jax.nn.sigmoid(1.702 * x),
    'relu': jax.nn.relu,
    'silu': jax.nn.silu,
}


def known_activation(name: str, owner: str) -> str:
    """`name`, if it is one of `ACTIVATIONS`.

    Raises:
      UnsupportedModelError: it is not; the error names `owner`, the part of a model that asks for it.
    """
    if name not in ACTIVATIONS:
        raise UnsupportedModelError(f'activation {name!r} of {owner}: expected one of {", ".join(ACTIVATIONS)}')
    return name


def word_logits(w: dict, hidden: Float[Array, '*batch words'], *, tied: bool) -> Float[Array, '*batch vocab']:
    """Logits in fp32, by the head or, `tied`, by the word embeddings."""
    if not tied:
        return linear(hidden, w['head']['kernel']).astype(jnp.float32)
    return jnp.einsum('...d,vd->...v', hidden, w['embed'].astype(hidden.dtype), preferred_element_type=jnp.float32)


def scatter_images(
    words: Float[Array, 'batch tokens dim'], soft: Float[Array, 'batch soft dim'], here: Bool[Array, 'batch tokens']
) -> Float[Array, 'batch tokens dim']:
    """Word embeddings with an image's soft words, in order, in the places of its placeholder tokens."""
    index = jnp.maximum(jnp.cumsum(here, axis=1, dtype=jnp.int32) - 1, 0)
    placed = jnp.take_along_axis(soft.astype(words.dtype), index[..., None], axis=1)
    return jnp.where(here[..., None], placed, words)
