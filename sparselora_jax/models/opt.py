"""OPT (arXiv 2205.01068): LayerNorm, learned positions, ReLU MLP; pre-norm, or post-norm in OPT-350m."""

import sys
from dataclasses import dataclass

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

OFFSET = 2  # the first two rows of the position table are not used by any valid token
NEWLINE = 50118
NORM_EPS = 1e-5  # torch's default, which no field of the config changes


@dataclass(frozen=True)
class OptConfig:
    """The sizes and variant of an OPT.

    Attributes:
      vocab: vocabulary size.
      width: size of a hidden state.
      depth: number of layers.
      heads: number of attention heads.
      mlp_width: size of a hidden state within an MLP.
      max_positions: maximum number of tokens in a text.
      word_width: size of a word embedding; 0: `width`. If it differs from `width`, word embeddings are projected to
        `width`, and hidden states back to `word_width`.
      bias: linear layers have biases.
      pre_norm: a norm comes before attention and MLP; False: a norm follows each residual sum.
      final_norm: there is a norm after the blocks.
      activation: activation of the MLP, a name in `layers.ACTIVATIONS`.
      tied: the head is the word embedding.
    """

    vocab: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    max_positions: int = 2048
    word_width: int = 0
    bias: bool = True
    pre_norm: bool = True
    final_norm: bool = True
    activation: str = 'relu'
    tied: bool = True

    def __post_init__(self):
        if not self.word_width:
            object.__setattr__(self, 'word_width', self.width)  # the dataclass is frozen

    @property
    def head_dim(self) -> int:
        """Return the size of a head."""
        return self.width // self.heads

    @property
    def longest(self) -> int:
        """Return the maximum number of tokens in a text, since every position needs a row in the table."""
        return self.max_positions

    @property
    def newline(self) -> int | None:
        """Return the token of a newline in the published tokenizer; None: this is the vocabulary of another one."""
        return NEWLINE if self.vocab > NEWLINE else None

    @property
    def tower(self) -> LanguageTower:
        """Return this module, which implements the tower."""
        return sys.modules[__name__]


def embed_tokens(w: dict, cfg: OptConfig, tokens: Int[Array, 'batch tokens']) -> Float[Array, 'batch tokens words']:
    """Return word embeddings.

    Args:
      w: params of the tower.
      cfg: its config.
      tokens: token ids.
    """
    del cfg
    return w['embed'][tokens]


def embed(
    w: dict, cfg: OptConfig, x: Float[Array, 'batch tokens words'], view: layers.View
) -> tuple[Float[Array, 'batch tokens dim'], dict]:
    """Return the blocks' input, with positions added, and their `ctx`, from word embeddings.

    Args:
      w: params of the tower.
      cfg: its config.
      x: word embeddings.
      view: positions of the tokens, and the slots that they may attend to.
    """
    if cfg.word_width != cfg.width:
        x = layers.dense(w['project_in'], x)
    # Positions are added to the projected words, so their table has the width of the hidden states.
    return x + w['positions'][view.positions + OFFSET].astype(x.dtype), {'mask': view.mask}


def block(
    w: dict, cfg: OptConfig, x: Float[Array, 'batch tokens dim'], ctx: dict, cache: layers.KVCache | None
) -> tuple[Float[Array, 'batch tokens dim'], layers.KVCache | None]:
    """Run attention and MLP; with a cache, first write keys and values to it.

    Args:
      w: weights of one layer.
      cfg: the tower's config.
      x: hidden states.
      ctx: the mask, see `embed`.
      cache: this layer's cache; None: tokens attend only to each other.

    Returns:
      The new `x` and the cache.
    """
    # The same two norms come before attention and MLP, or (OPT-350m) after the residual sums.
    h = layers.layer_norm(w['norm1'], x, NORM_EPS) if cfg.pre_norm else x
    # [batch, heads, tokens, head_dim]
    q, k, v = (layers.split_heads(layers.dense(w['attn'][name], h), cfg.heads) for name in 'qkv')
    if cache is not None:
        cache = layers.update_cache(cache, k, v)
        k = cache.k.astype(q.dtype)
        v = cache.v.astype(q.dtype)
    # With a cache, k and v contain all slots; the mask defines which slots each token attends to.
    x = x + layers.dense(w['attn']['o'], layers.attend(q, k, v, ctx['mask']))
    if not cfg.pre_norm:
        x = layers.layer_norm(w['norm1'], x, NORM_EPS)
    h = layers.layer_norm(w['norm2'], x, NORM_EPS) if cfg.pre_norm else x
    h = layers.ACTIVATIONS[cfg.activation](layers.dense(w['mlp']['fc1'], h))
    x = x + layers.dense(w['mlp']['fc2'], h)
    return (x if cfg.pre_norm else layers.layer_norm(w['norm2'], x, NORM_EPS)), cache


def finish(w: dict, cfg: OptConfig, x: Float[Array, 'batch tokens dim']) -> Float[Array, 'batch tokens words']:
    """Apply the final norm and the projection back to `word_width`, if the model has them.

    Args:
      w: params of the tower.
      cfg: its config.
      x: the last block's output.
    """
    if cfg.final_norm:
        x = layers.layer_norm(w['norm'], x, NORM_EPS)
    return x if cfg.word_width == cfg.width else layers.dense(w['project_out'], x)


def head(w: dict, cfg: OptConfig, hidden: Float[Array, '*batch words']) -> Float[Array, '*batch vocab']:
    """Return logits, in fp32.

    Args:
      w: params of the tower.
      cfg: its config.
      hidden: what `finish` returns.
    """
    return layers.word_logits(w, hidden, tied=cfg.tied)


def forward(
    w: dict,
    cfg: OptConfig,
    x: Float[Array, 'batch tokens words'],
    valid: Bool[Array, 'batch tokens'],
    run: Runner = scan_blocks,
    *,
    prefix: Bool[Array, 'batch tokens'] | None = None,
) -> Float[Array, 'batch tokens words']:
    """Return the input of the head, from word embeddings.

    Args:
      w: params of the tower, or its weights from `bind`.
      cfg: its config.
      x: word embeddings.
      valid: False marks a pad.
      run: executes the blocks.
      prefix: tokens that attend to each other in both directions; None: attention is causal.

    Raises:
      BatchError: there are more tokens than positions.
    """
    layers.check_length(x.shape[1], cfg.longest)
    x, ctx = embed(w, cfg, x, layers.causal_view(valid, prefix))
    ctx['valid'] = valid  # no block reads it, but calibration uses it to exclude pads
    x, _ = run('language', lambda w, x, ctx, cache: block(w, cfg, x, ctx, cache), w['blocks'], x, ctx)
    return finish(w, cfg, x)


def caches(cfg: OptConfig, batch: int, slots: int, dtype: DTypeLike) -> tuple[layers.KVCache, ...]:
    """Return empty key/value caches of every layer.

    Args:
      cfg: the tower's config.
      batch: number of rows.
      slots: maximum number of tokens in a row.
      dtype: dtype of keys and values.
    """
    return layers.empty_caches(
        cfg.depth, batch=batch, kv_heads=cfg.heads, slots=slots, head_dim=cfg.head_dim, dtype=dtype
    )


def shapes(cfg: OptConfig) -> dict:
    """Return the shape of every parameter, as a params tree of tuples.

    Args:
      cfg: the tower's config.
    """
    depth = cfg.depth
    width = cfg.width

    def dense(inputs: int, outputs: int) -> dict:
        layer = {'kernel': (depth, inputs, outputs)}
        return layer | {'bias': (depth, outputs)} if cfg.bias else layer

    tree = {
        'embed': (cfg.vocab, cfg.word_width),
        'positions': (cfg.max_positions + OFFSET, width),
        'blocks': {
            'norm1': {'scale': (depth, width), 'bias': (depth, width)},
            'attn': {name: dense(width, width) for name in 'qkvo'},
            'norm2': {'scale': (depth, width), 'bias': (depth, width)},
            'mlp': {'fc1': dense(width, cfg.mlp_width), 'fc2': dense(cfg.mlp_width, width)},
        },
    }
    if cfg.final_norm:
        tree['norm'] = {'scale': (width,), 'bias': (width,)}
    if cfg.word_width != width:
        tree['project_in'] = {'kernel': (cfg.word_width, width)}
        tree['project_out'] = {'kernel': (width, cfg.word_width)}
    if not cfg.tied:
        tree['head'] = {'kernel': (cfg.word_width, cfg.vocab)}
    return tree


def keys(cfg: OptConfig) -> Keys:
    """Return the key table: our paths -> parameter names in transformers' `OPTDecoder`.

    Args:
      cfg: the tower's config.
    """
    # OPT uses the same name for the MLP's norm in each layer and for the final norm.
    layer = key_table.norm('norm1', 'self_attn_layer_norm') | key_table.norm('norm2', 'final_layer_norm')
    for name in 'qkv':
        layer |= key_table.dense(f'attn/{name}', f'self_attn.{name}_proj', bias=cfg.bias)
    layer |= key_table.dense('attn/o', 'self_attn.out_proj', bias=cfg.bias)
    for name in ('fc1', 'fc2'):
        layer |= key_table.dense(f'mlp/{name}', name, bias=cfg.bias)
    table: Keys = {'embed': 'embed_tokens.weight', 'positions': 'embed_positions.weight'}
    if cfg.word_width != cfg.width:
        for way in ('in', 'out'):
            table |= key_table.dense(f'project_{way}', f'project_{way}', bias=False)
    if cfg.final_norm:
        table |= key_table.norm('norm', 'final_layer_norm')
    return table | key_table.nested(layer, 'blocks/', 'layers.{i}.')


def key_prefix(model: str, head: str) -> str:
    """Return the prefix of the names from `keys` in a whole model.

    Args:
      model: the prefix of transformers' model without its head.
      head: the prefix of the head's name.
    """
    del head
    return f'{model}decoder.'


def embed_copies(own: str) -> list[str]:
    """Return no names, since files hold no copies of the word embedding.

    Args:
      own: the name of the word embedding.
    """
    del own
    return []


def likely_tied(cfg: OptConfig) -> bool:
    """Return whether the head of published files is the word embedding, as their config says.

    Args:
      cfg: the tower's config.
    """
    return cfg.tied


def from_hf(hf: HfConfig) -> OptConfig:
    """Convert a transformers `OPTConfig`.

    Args:
      hf: the transformers config.

    Returns:
      Our config.

    Raises:
      UnsupportedModelError: a field's value is not supported; names the field.
    """
    if not hf.layer_norm_elementwise_affine:
        raise UnsupportedModelError(
            f'layer_norm_elementwise_affine False of {hf.model_type}: only norms with scale and bias are known'
        )
    if hf.activation_function not in layers.ACTIVATIONS:
        raise UnsupportedModelError(f'activation_function {hf.activation_function!r} of {hf.model_type} is not known')
    return OptConfig(
        vocab=hf.vocab_size,
        tied=hf.tie_word_embeddings,
        width=hf.hidden_size,
        depth=hf.num_hidden_layers,
        heads=hf.num_attention_heads,
        mlp_width=hf.ffn_dim,
        max_positions=hf.max_position_embeddings,
        word_width=hf.word_embed_proj_dim,  # 512 in OPT-350m, whose `width` is 1024
        bias=hf.enable_bias,
        pre_norm=hf.do_layer_norm_before,
        # OPT-350m is post-norm and has no final norm. Files fine-tuned before transformers 4.20.1 lack the norm too,
        # and set the second field.
        final_norm=hf.do_layer_norm_before and not hf._remove_final_layer_norm,
        activation=hf.activation_function,
    )


# A module of functions satisfies the protocol of a tower (PEP 544).
LANGUAGE_TOWERS.register('opt', sys.modules[__name__])
