"""The layers that all towers share: norms, attention, rotary positions. Norms and softmax run in fp32."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from sparselora_jax.runtime.errors import BatchError, UnsupportedModelError
from sparselora_jax.sparse.linear import linear


class KVCache(NamedTuple):
    """Keys and values of the slots filled so far; the next token is written to slot `index`."""

    k: Float[Array, 'batch kv_heads slots head_dim']
    v: Float[Array, 'batch kv_heads slots head_dim']
    index: Int[Array, '']


class View(NamedTuple):
    """The positions of the tokens of one pass, and the slots that each token may attend to.

    Without a cache, the slots are the tokens themselves. With a cache, the tokens of a pass may be the prompt, the next
    token, or the next token of every beam: `mask` defines which slots each one attends to.
    """

    positions: Int[Array, 'batch tokens']
    slot_positions: Int[Array, 'batch slots']
    mask: Bool[Array, 'batch tokens slots']


def positions_of(valid: Bool[Array, 'batch slots']) -> Int[Array, 'batch slots']:
    """Return positions that skip pads, wherever the pads are.

    Args:
      valid: False marks a pad.
    """
    # A pad gets the position of the token before it. No token attends to a pad, so any non-negative position will do.
    return jnp.maximum(jnp.cumsum(valid, axis=-1, dtype=jnp.int32) - 1, 0)


def causal_view(valid: Bool[Array, 'batch tokens'], prefix: Bool[Array, 'batch tokens'] | None = None) -> View:
    """Return the causal view: each token attends to itself and the tokens before it, except pads.

    Args:
      valid: False marks a pad.
      prefix: tokens that attend to each other in both directions; None: there are none.
    """
    slots = jnp.arange(valid.shape[1])
    mask = (slots <= slots[:, None])[None]  # [1, tokens, slots]
    if prefix is not None:
        # Both tokens must be in the prefix: the answer attends to the prompt, but the prompt does not attend to it.
        mask = mask | (prefix[:, None, :] & prefix[:, :, None])
    positions = positions_of(valid)
    # Pads are masked as keys. They need no mask as queries, since no code uses their results.
    return View(positions, positions, mask & valid[:, None, :])


def check_length(tokens: int, longest: int | None) -> None:
    """Check that a text is not too long for a model.

    Args:
      tokens: number of tokens of the text, including pads.
      longest: maximum number of tokens; None: no maximum.

    Raises:
      BatchError: there are more tokens.
    """
    if longest is not None and tokens > longest:
        raise BatchError(f'{tokens} tokens: {reads_at_most(longest)}; use a shorter text, or fewer pads')


def reads_at_most(longest: int) -> str:
    """Return the words in which errors state a model's length limit.

    Args:
      longest: maximum number of tokens.
    """
    return f'the model reads at most {longest} (its table of positions, or window of attention)'


def layer_norm(w: dict, x: Float[Array, '*batch dim'], eps: float) -> Float[Array, '*batch dim']:
    """Apply LayerNorm with scale and bias (arXiv 1607.06450).

    Args:
      w: `scale` and `bias`.
      x: the input, normalised along its last axis.
      eps: added to the variance.
    """
    # The default, mean(x²) - mean(x)², loses all digits if the mean is far larger than the deviation.
    y = jax.nn.standardize(x.astype(jnp.float32), epsilon=eps, algorithm='stable')
    return (y * w['scale'].astype(jnp.float32) + w['bias'].astype(jnp.float32)).astype(x.dtype)


def rms_norm(w: dict, x: Float[Array, '*batch dim'], eps: float, *, offset: float = 0.0) -> Float[Array, '*batch dim']:
    """Apply RMSNorm with scale `offset + w` (arXiv 1910.07467).

    Args:
      w: `scale`.
      x: the input, normalised along its last axis.
      eps: added to the mean square.
      offset: added to the scale; Gemma's is 1.
    """
    # LLaMA's code rounds before scaling, Gemma's after. One formula in fp32 throughout serves both.
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * (offset + w['scale'].astype(jnp.float32))).astype(x.dtype)


def dense(w: dict, x: Float[Array, '*batch inputs']) -> Float[Array, '*batch outputs']:
    """Apply a linear layer.

    Args:
      w: `kernel`, of any kind that `linear` supports, and optionally `bias`.
      x: the input; its last axis is contracted.
    """
    return linear(x, w['kernel'], w.get('bias'))


def split_heads(x: Float[Array, 'batch tokens dim'], heads: int) -> Float[Array, 'batch heads tokens head_dim']:
    """Split the last axis into heads, and put them before the tokens.

    Args:
      x: queries, keys or values.
      heads: number of heads.
    """
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
    """Return dot-product attention with grouped key/value heads (arXiv 2305.13245).

    Args:
      q: queries.
      k: keys; each head serves heads / kv_heads query heads.
      v: values.
      mask: True where a query may attend to a key; None: everywhere.
      bias: added to the scaled products (T5's relative positions).
      scale: factor of the products; default: 1 / sqrt(head_dim).
    """
    batch, heads, queries, head_dim = q.shape
    kv_heads = k.shape[1]
    # The queries of a group become rows of one matrix: [heads / kv_heads * queries]. So these are plain batched matmuls
    # over [batch, kv_heads]. With a separate axis for the group, XLA would transpose their operands.
    q = q.reshape(batch, kv_heads, -1, head_dim)
    logits = jnp.matmul(q, k.swapaxes(2, 3), preferred_element_type=jnp.float32)
    # Split the group again for bias and mask: [batch, kv_heads, heads / kv_heads, queries, keys].
    logits = logits.reshape(batch, kv_heads, -1, queries, k.shape[2])
    logits = logits * (head_dim**-0.5 if scale is None else scale)
    if bias is not None:
        logits = logits + bias.astype(jnp.float32).reshape(bias.shape[0], kv_heads, -1, *bias.shape[2:])
    if mask is not None:
        # The smallest finite number, not -inf, because with -inf a row of only pads would become NaN.
        logits = jnp.where(mask[:, None, None], logits, jnp.finfo(jnp.float32).min)
    # Softmax runs in fp32. Only its result is rounded, for the matrix unit.
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    mixed = jnp.matmul(weights.reshape(batch, kv_heads, -1, k.shape[2]), v)
    # [batch, heads, queries, head_dim] -> [batch, queries, heads * head_dim]
    return mixed.reshape(batch, heads, queries, head_dim).swapaxes(1, 2).reshape(batch, queries, -1)


def rope_table(
    positions: Int[Array, 'batch tokens'], frequencies: Float[Array, ' half']
) -> tuple[Float[Array, 'batch tokens half'], Float[Array, 'batch tokens half']]:
    """Return cosines and sines of rotary positions (RoFormer, arXiv 2104.09864, section 3.2), in fp32.

    Args:
      positions: positions of the tokens.
      frequencies: radians per position, one for each pair of a head's elements.
    """
    # In fp32 for all weight dtypes, because bf16 cannot represent all positions above 256.
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, 'batch heads tokens head_dim'],
    table: tuple[Float[Array, 'batch tokens half'], Float[Array, 'batch tokens half']],
) -> Float[Array, 'batch heads tokens head_dim']:
    """Apply rotary positions.

    Args:
      x: queries or keys.
      table: see `rope_table`.
    """
    cos, sin = (t[:, None].astype(jnp.float32) for t in table)  # an axis for the heads
    # Hugging Face's LLaMA pairs the first half with the second; the paper pairs neighbours.
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x.dtype)


def empty_caches(
    layers: int, *, batch: int, kv_heads: int, slots: int, head_dim: int, dtype: DTypeLike
) -> tuple[KVCache, ...]:
    """Return an empty cache for each layer.

    Args:
      layers: number of caches.
      batch: number of rows.
      kv_heads: number of heads of keys and values.
      slots: maximum number of tokens in a row.
      head_dim: size of a head.
      dtype: dtype of keys and values.
    """
    # Unwritten slots are zero and always masked. All layers share one array until they write to it.
    empty = jnp.zeros((batch, kv_heads, slots, head_dim), dtype)
    return tuple(KVCache(empty, empty, jnp.zeros((), jnp.int32)) for _ in range(layers))


def update_cache(
    cache: KVCache, k: Float[Array, 'batch kv_heads tokens head_dim'], v: Float[Array, 'batch kv_heads tokens head_dim']
) -> KVCache:
    """Write new keys and values at `cache.index`, and advance it.

    Args:
      cache: the cache of one layer.
      k: keys of the new tokens.
      v: values of the new tokens.

    Returns:
      The updated cache.
    """
    # The index is traced, so all decoding steps use one program. If a loop carries the cache, XLA writes in place.
    write = jax.lax.dynamic_update_slice_in_dim
    tokens = k.shape[2]
    return KVCache(
        write(cache.k, k.astype(cache.k.dtype), cache.index, axis=2),
        write(cache.v, v.astype(cache.v.dtype), cache.index, axis=2),
        cache.index + jnp.asarray(tokens, cache.index.dtype),
    )


ACTIVATIONS = {  # by the names that Hugging Face's configs use
    'gelu': lambda x: jax.nn.gelu(x, approximate=False),
    # Two names of the same approximation: 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x³))).
    'gelu_new': lambda x: jax.nn.gelu(x, approximate=True),
    'gelu_pytorch_tanh': lambda x: jax.nn.gelu(x, approximate=True),
    'quick_gelu': lambda x: x * jax.nn.sigmoid(1.702 * x),
    'relu': jax.nn.relu,
    'silu': jax.nn.silu,
}


def known_activation(name: str, owner: str) -> str:
    """Check that an activation is one of `ACTIVATIONS`, and return its name.

    Args:
      name: the name in a Hugging Face config.
      owner: the part of a model that uses it, for the error message.

    Raises:
      UnsupportedModelError: there is no such activation.
    """
    if name not in ACTIVATIONS:
        raise UnsupportedModelError(f'activation {name!r} of {owner}: expected one of {", ".join(ACTIVATIONS)}')
    return name


def word_logits(w: dict, hidden: Float[Array, '*batch words'], *, tied: bool) -> Float[Array, '*batch vocab']:
    """Return logits in fp32.

    Args:
      w: params of a language tower.
      hidden: the input of its head.
      tied: the head is the word embedding.
    """
    if not tied:
        return linear(hidden, w['head']['kernel']).astype(jnp.float32)
    # The embedding is [vocab, dim]. Contracting its second axis avoids a transposed copy of the largest matrix.
    return jnp.einsum('...d,vd->...v', hidden, w['embed'].astype(hidden.dtype), preferred_element_type=jnp.float32)


def scatter_images(
    words: Float[Array, 'batch tokens dim'],
    soft: Float[Array, 'batch soft dim'],
    is_image: Bool[Array, 'batch tokens'],
) -> Float[Array, 'batch tokens dim']:
    """Return word embeddings in which an image's soft words replace its placeholder tokens, in order.

    Args:
      words: word embeddings.
      soft: soft words of one image per row.
      is_image: True where the token is a placeholder.
    """
    # The n-th placeholder of a row gets the n-th soft word. Gathering instead of scattering keeps shapes static.
    index = jnp.maximum(jnp.cumsum(is_image, axis=1, dtype=jnp.int32) - 1, 0)
    placed = jnp.take_along_axis(soft.astype(words.dtype), index[..., None], axis=1)
    return jnp.where(is_image[..., None], placed, words)
