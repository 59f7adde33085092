"""LLaMA (arXiv 2302.13971): RMSNorm, rotary positions, grouped key/value heads, SwiGLU, tied or untied head.

Gemma (arXiv 2403.08295) is the same with GeGLU, norms that scale by 1 + w, and word embeddings times sqrt(width).
Mistral (arXiv 2310.06825) is the same with a window of attention.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from sparselora_jax.models import key_table, layers
from sparselora_jax.models.config import HfConfig
from sparselora_jax.models.key_table import Keys
from sparselora_jax.models.runners import Runner, scan_blocks
from sparselora_jax.models.towers import LANGUAGE_TOWERS, LanguageTower
from sparselora_jax.runtime.errors import UnsupportedModelError

is_encoder_decoder = False
overflows_in_float16 = ()


@dataclass(frozen=True)
class Llama3Rope:
    """How LLaMA 3.1 stretches low rotary frequencies; the fields are those of transformers."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class LlamaConfig:
    """The sizes and variant of a LLaMA.

    Attributes:
      vocab: vocabulary size.
      width: size of a hidden state.
      depth: number of layers.
      heads: number of query heads.
      kv_heads: number of key/value heads; each serves heads / kv_heads query heads.
      mlp_width: size of a hidden state within an MLP.
      rope_base: base of the rotary frequencies.
      norm_eps: epsilon of the norms.
      max_positions: number of tokens in the longest training text.
      head_dim: size of a head; 0: width / heads.
      tied: the head is the word embedding.
      attention_bias: the attention's layers have biases.
      mlp_bias: the MLP's layers have biases.
      activation: activation of the MLP's gate, a name in `layers.ACTIVATIONS`.
      rope_linear: positions are divided by this.
      rope_llama3: how low frequencies are stretched; None: they are not.
      norm_offset: norms scale by `norm_offset + w`; Gemma's is 1.
      embed_scale: word embeddings are multiplied by this; Gemma's is sqrt(width).
      window: number of last tokens that a token attends to, including itself (Mistral); None: all of them.
    """

    vocab: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    mlp_width: int
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    max_positions: int = 2048
    head_dim: int = 0
    tied: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False
    activation: str = 'silu'
    rope_linear: float = 1.0
    rope_llama3: Llama3Rope | None = None
    norm_offset: float = 0.0
    embed_scale: float = 1.0
    window: int | None = None

    @property
    def longest(self) -> int | None:
        """Return the maximum number of tokens, which is the window, since this module computes full attention."""
        return self.window

    @property
    def tower(self) -> LanguageTower:
        """Return this module, which implements the tower."""
        return sys.modules[__name__]

    def __post_init__(self):
        if not self.head_dim:
            object.__setattr__(self, 'head_dim', self.width // self.heads)  # the dataclass is frozen


def rope_frequencies(cfg: LlamaConfig) -> Float[Array, ' half']:
    """Return the rotary frequencies, stretched as configured.

    Args:
      cfg: the tower's config.
    """
    # RoFormer, section 3.2.2: base ** (-2 i / head_dim) for each pair i of a head's elements.
    frequencies = cfg.rope_base ** (-jnp.arange(0, cfg.head_dim, 2, dtype=jnp.float32) / cfg.head_dim)
    frequencies = frequencies / cfg.rope_linear
    if (stretch := cfg.rope_llama3) is None:
        return frequencies
    # Wavelengths beyond the training context are stretched, short ones are kept, others are interpolated.
    wavelengths = 2 * math.pi / frequencies
    span = stretch.high_freq_factor - stretch.low_freq_factor
    keep = jnp.clip((stretch.original_max_positions / wavelengths - stretch.low_freq_factor) / span, 0.0, 1.0)
    return (1 - keep) * frequencies / stretch.factor + keep * frequencies


def embed_tokens(w: dict, cfg: LlamaConfig, tokens: Int[Array, 'batch tokens']) -> Float[Array, 'batch tokens dim']:
    """Return word embeddings.

    Args:
      w: params of the tower.
      cfg: its config.
      tokens: token ids.
    """
    words = w['embed'][tokens]
    # The factor is rounded to the weights' dtype before the product, as in transformers.
    return words if cfg.embed_scale == 1.0 else words * jnp.asarray(cfg.embed_scale, words.dtype)


def embed(
    w: dict, cfg: LlamaConfig, x: Float[Array, 'batch tokens dim'], view: layers.View
) -> tuple[Float[Array, 'batch tokens dim'], dict]:
    """Return the blocks' input and their `ctx`, from word embeddings.

    Args:
      w: params of the tower.
      cfg: its config.
      x: word embeddings.
      view: positions of the tokens, and the slots that they may attend to.
    """
    del w
    # One table of rotations serves all layers.
    return x, {'rope': layers.rope_table(view.positions, rope_frequencies(cfg)), 'mask': view.mask}


def _norm(w: dict, cfg: LlamaConfig, x: Float[Array, '*batch dim']) -> Float[Array, '*batch dim']:
    return layers.rms_norm(w, x, cfg.norm_eps, offset=cfg.norm_offset)


def block(
    w: dict, cfg: LlamaConfig, x: Float[Array, 'batch tokens dim'], ctx: dict, cache: layers.KVCache | None
) -> tuple[Float[Array, 'batch tokens dim'], layers.KVCache | None]:
    """Run pre-norm attention and the gated MLP; with a cache, first write keys and values to it.

    Args:
      w: weights of one layer.
      cfg: the tower's config.
      x: hidden states.
      ctx: rotary table and mask, see `embed`.
      cache: this layer's cache; None: tokens attend only to each other.

    Returns:
      The new `x` and the cache.
    """
    h = _norm(w['norm1'], cfg, x)
    # [batch, heads, tokens, head_dim]; keys and values have `kv_heads` heads.
    q = layers.split_heads(layers.dense(w['attn']['q'], h), cfg.heads)
    k, v = (layers.split_heads(layers.dense(w['attn'][name], h), cfg.kv_heads) for name in 'kv')
    q = layers.rotate(q, ctx['rope'])
    k = layers.rotate(k, ctx['rope'])
    if cache is not None:
        # The cache stores rotated keys: positions never change, so keys are rotated only once.
        cache = layers.update_cache(cache, k, v)
        k = cache.k.astype(q.dtype)
        v = cache.v.astype(q.dtype)
    # From here on, k and v contain all slots; the mask defines which slots each token attends to.
    x = x + layers.dense(w['attn']['o'], layers.attend(q, k, v, ctx['mask']))
    h = _norm(w['norm2'], cfg, x)
    h = layers.ACTIVATIONS[cfg.activation](layers.dense(w['mlp']['gate'], h)) * layers.dense(w['mlp']['up'], h)
    return x + layers.dense(w['mlp']['down'], h), cache


def finish(w: dict, cfg: LlamaConfig, x: Float[Array, 'batch tokens dim']) -> Float[Array, 'batch tokens dim']:
    """Apply the final norm.

    Args:
      w: params of the tower.
      cfg: its config.
      x: the last block's output.
    """
    return _norm(w['norm'], cfg, x)


def head(w: dict, cfg: LlamaConfig, hidden: Float[Array, '*batch dim']) -> Float[Array, '*batch vocab']:
    """Return logits, in fp32.

    Args:
      w: params of the tower.
      cfg: its config.
      hidden: what `finish` returns.
    """
    return layers.word_logits(w, hidden, tied=cfg.tied)


def forward(
    w: dict,
    cfg: LlamaConfig,
    x: Float[Array, 'batch tokens dim'],
    valid: Bool[Array, 'batch tokens'],
    run: Runner = scan_blocks,
    *,
    prefix: Bool[Array, 'batch tokens'] | None = None,
) -> Float[Array, 'batch tokens dim']:
    """Return hidden states after the final norm, from word embeddings.

    Args:
      w: params of the tower, or its weights from `bind`.
      cfg: its config.
      x: word embeddings.
      valid: False marks a pad.
      run: executes the blocks.
      prefix: tokens that attend to each other in both directions; None: attention is causal.

    Raises:
      BatchError: there are more tokens than the attention window.
    """
    layers.check_length(x.shape[1], cfg.longest)
    x, ctx = embed(w, cfg, x, layers.causal_view(valid, prefix))
    ctx['valid'] = valid  # no block reads it, but calibration uses it to exclude pads
    x, _ = run('language', lambda w, x, ctx, cache: block(w, cfg, x, ctx, cache), w['blocks'], x, ctx)
    return finish(w, cfg, x)


def caches(cfg: LlamaConfig, batch: int, slots: int, dtype: DTypeLike) -> tuple[layers.KVCache, ...]:
    """Return empty key/value caches of every layer.

    Args:
      cfg: the tower's config.
      batch: number of rows.
      slots: maximum number of tokens in a row.
      dtype: dtype of keys and values.
    """
    return layers.empty_caches(
        cfg.depth, batch=batch, kv_heads=cfg.kv_heads, slots=slots, head_dim=cfg.head_dim, dtype=dtype
    )


def shapes(cfg: LlamaConfig) -> dict:
    """Return the shape of every parameter, as a params tree of tuples.

    Args:
      cfg: the tower's config.
    """
    depth = cfg.depth
    width = cfg.width
    # The head size is a separate field, so attention may be wider or narrower than the hidden states.
    q_width = cfg.heads * cfg.head_dim
    kv_width = cfg.kv_heads * cfg.head_dim

    def dense(inputs: int, outputs: int, bias: bool) -> dict:
        layer = {'kernel': (depth, inputs, outputs)}
        return layer | {'bias': (depth, outputs)} if bias else layer

    # The embedding is [vocab, width] and not a kernel, so rules for kernels do not apply to it.
    tree = {
        'embed': (cfg.vocab, width),
        'blocks': {
            'norm1': {'scale': (depth, width)},
            'attn': {
                'q': dense(width, q_width, cfg.attention_bias),
                'k': dense(width, kv_width, cfg.attention_bias),
                'v': dense(width, kv_width, cfg.attention_bias),
                'o': dense(q_width, width, cfg.attention_bias),
            },
            'norm2': {'scale': (depth, width)},
            'mlp': {
                'gate': dense(width, cfg.mlp_width, cfg.mlp_bias),
                'up': dense(width, cfg.mlp_width, cfg.mlp_bias),
                'down': dense(cfg.mlp_width, width, cfg.mlp_bias),
            },
        },
        'norm': {'scale': (width,)},
    }
    return tree if cfg.tied else tree | {'head': {'kernel': (width, cfg.vocab)}}


def keys(cfg: LlamaConfig) -> Keys:
    """Return the key table: our paths -> parameter names in transformers' `LlamaModel`.

    Args:
      cfg: the tower's config.
    """
    layer = key_table.norm('norm1', 'input_layernorm', bias=False)
    layer |= key_table.norm('norm2', 'post_attention_layernorm', bias=False)
    for name in 'qkvo':
        layer |= key_table.dense(f'attn/{name}', f'self_attn.{name}_proj', bias=cfg.attention_bias)
    for name in ('gate', 'up', 'down'):
        layer |= key_table.dense(f'mlp/{name}', f'mlp.{name}_proj', bias=cfg.mlp_bias)
    table: Keys = {'embed': 'embed_tokens.weight', 'norm/scale': 'norm.weight'}
    return table | key_table.nested(layer, 'blocks/', 'layers.{i}.')


def key_prefix(model: str, head: str) -> str:
    """Return the prefix of the names from `keys` in a whole model.

    Args:
      model: the prefix of transformers' model without its head.
      head: the prefix of the head's name.
    """
    del head
    return model


def embed_copies(own: str) -> list[str]:
    """Return no names, since files hold no copies of the word embedding.

    Args:
      own: the name of the word embedding.
    """
    del own
    return []


def likely_tied(cfg: LlamaConfig) -> bool:
    """Return whether the head of published files is the word embedding, as their config says.

    Args:
      cfg: the tower's config.
    """
    return cfg.tied


def from_hf(hf: HfConfig) -> LlamaConfig:
    """Convert a transformers `LlamaConfig`, `MistralConfig` or `GemmaConfig`.

    Args:
      hf: the transformers config.

    Returns:
      Our config.

    Raises:
      UnsupportedModelError: a field's value is not supported; names the field.
    """
    rope = dict(hf.rope_parameters)  # transformers 5 merges `rope_theta` and `rope_scaling` of older files here
    kind = rope.get('rope_type', 'default')
    if kind not in ('default', 'linear', 'llama3'):
        raise UnsupportedModelError(f"rope_type {kind!r} of {hf.model_type}: expected 'default', 'linear' or 'llama3'")
    if hf.hidden_act not in layers.ACTIVATIONS:
        raise UnsupportedModelError(f'hidden_act {hf.hidden_act!r} of {hf.model_type} is not known')
    is_gemma = hf.model_type == 'gemma'  # transformers sets Gemma's norm offset and scale in code
    return LlamaConfig(
        vocab=hf.vocab_size,
        width=hf.hidden_size,
        depth=hf.num_hidden_layers,
        heads=hf.num_attention_heads,
        # Without this field, every query head has its own keys and values.
        kv_heads=hf.num_key_value_heads or hf.num_attention_heads,
        mlp_width=hf.intermediate_size,
        rope_base=float(rope['rope_theta']),
        norm_eps=hf.rms_norm_eps,
        max_positions=hf.max_position_embeddings,
        head_dim=getattr(hf, 'head_dim', None) or 0,  # old LLaMA configs lack the field
        tied=hf.tie_word_embeddings,
        attention_bias=getattr(hf, 'attention_bias', False),
        mlp_bias=getattr(hf, 'mlp_bias', False),
        # Gemma's first configs say 'gelu' but mean its tanh form. transformers' GemmaConfig has already corrected this.
        activation=hf.hidden_act,
        rope_linear=float(rope['factor']) if kind == 'linear' else 1.0,
        rope_llama3=_llama3_rope(rope) if kind == 'llama3' else None,
        norm_offset=1.0 if is_gemma else 0.0,
        embed_scale=hf.hidden_size**0.5 if is_gemma else 1.0,
        window=getattr(hf, 'sliding_window', None),
    )


def _llama3_rope(rope: Mapping[str, str | float]) -> Llama3Rope:
    return Llama3Rope(
        factor=float(rope['factor']),
        low_freq_factor=float(rope['low_freq_factor']),
        high_freq_factor=float(rope['high_freq_factor']),
        original_max_positions=rope['original_max_position_embeddings'],
    )


# A module of functions satisfies the protocol of a tower (PEP 544).
for _model_type in ('llama', 'mistral', 'gemma'):
    LANGUAGE_TOWERS.register(_model_type, sys.modules[__name__])
