"""OPT (arXiv 2205.01068): LayerNorm, learned positions, ReLU MLP; norms before or (OPT-350m) after."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Array, Bool, Float, Int

from sparselora_jax.models import layers
from sparselora_jax.models.runners import scan_blocks
from sparselora_jax.runtime.errors import UnsupportedModelError

OFFSET = 2  # the first two rows of the table of positions belong to no token that is read
NORM_EPS = 1e-5  # no field of the config says it


@dataclass(frozen=True)
class OptConfig:
    vocab: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    max_positions: int = 2048
    word_width: int = 0  # of the word embeddings, if not `width`: then they are projected, and hidden states back
    bias: bool = True
    pre_norm: bool = True  # False: a norm follows each residual sum
    final_norm: bool = True
    activation: str = 'relu'
    tied: bool = True  # the head is the word embedding

    def __post_init__(self):
        if not self.word_width:
            object.__setattr__(self, 'word_width', self.width)

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def longest(self) -> int:
        """Tokens that a text may have: every position has a row of a table."""
        return self.max_positions


def embed_tokens(w: dict, cfg: OptConfig, tokens: Int[Array, 'batch tokens']) -> Float[Array, 'batch tokens words']:
    """Word embeddings."""
    del cfg
    return w['embed'][tokens]


def embed(
    w: dict, cfg: OptConfig, x: Float[Array, 'batch tokens words'], view: layers.View
) -> tuple[Float[Array, 'batch tokens dim'], dict]:
    """Word embeddings -> the blocks' input, with positions, and what the blocks read."""
    if cfg.word_width != cfg.width:
        x = layers.dense(w['project_in'], x)
    return x + w['positions'][view.positions + OFFSET].astype(x.dtype), {'mask': view.mask}


def block(w: dict, cfg: OptConfig, x: Float[Array, 'batch tokens dim'], ctx: dict, cache: layers.KVCache | None):
    """Attention and MLP. With a cache, keys and values are written at its index first."""
    h = layers.layer_norm(w['norm1'], x, NORM_EPS) if cfg.pre_norm else x
    q, k, v = (layers.split_heads(layers.dense(w['attn'][name], h), cfg.heads) for name in 'qkv')
    if cache is not None:
        cache = layers.update_cache(cache, k, v)
        k, v = cache.k.astype(q.dtype), cache.v.astype(q.dtype)
    x = x + layers.dense(w['attn']['o'], layers.attend(q, k, v, ctx['mask']))
    if not cfg.pre_norm:
        x = layers.layer_norm(w['norm1'], x, NORM_EPS)
    h = layers.layer_norm(w['norm2'], x, NORM_EPS) if cfg.pre_norm else x
    h = layers.ACTIVATIONS[cfg.activation](layers.dense(w['mlp']['fc1'], h))
    x = x + layers.dense(w['mlp']['fc2'], h)
    return (x if cfg.pre_norm else layers.layer_norm(w['norm2'], x, NORM_EPS)), cache


def finish(w: dict, cfg: OptConfig, x: Float[Array, 'batch tokens dim']) -> Float[Array, 'batch tokens words']:
    """The final norm, then the projection back to the words' width, where the model has them."""
    if cfg.final_norm:
        x = layers.layer_norm(w['norm'], x, NORM_EPS)
    return x if cfg.word_width == cfg.width else layers.dense(w['project_out'], x)


def head(w: dict, cfg: OptConfig, hidden: Float[Array, '*batch words']) -> Float[Array, '*batch vocab']:
    """Logits, in fp32."""
    return layers.word_logits(w, hidden, tied=cfg.tied)


def forward(
    w: dict,
    cfg: OptConfig,
    x: Float[Array, 'batch tokens words'],
    valid: Bool[Array, 'batch tokens'],
    run=scan_blocks,
    *,
    prefix: Bool[Array, 'batch tokens'] | None = None,
) -> Float[Array, 'batch tokens words']:
    """Word embeddings -> what the head reads; tokens of `prefix` read each other both ways.

    Raises:
      BatchError: more tokens than there are positions.
    """
    layers.check_length(x.shape[1], cfg.longest)
    x, ctx = embed(w, cfg, x, layers.causal_view(valid, prefix))
    ctx['valid'] = valid
    x, _ = run('language', lambda w, x, ctx, cache: block(w, cfg, x, ctx, cache), w['blocks'], x, ctx)
    return finish(w, cfg, x)


def caches(cfg: OptConfig, batch: int, slots: int, dtype: Any) -> tuple[layers.KVCache, ...]:
    """Empty key/value caches of every layer."""
    size = {'batch': batch, 'slots': slots, 'kv_heads': cfg.heads, 'head_dim': cfg.head_dim}
    return layers.empty_caches(cfg.depth, dtype=dtype, **size)


def shapes(cfg: OptConfig) -> dict:
    """The shape of every parameter, as a params tree of tuples."""
    n, d, f = cfg.depth, cfg.width, cfg.mlp_width

    def dense(inputs: int, outputs: int) -> dict:
        return {'kernel': (n, inputs, outputs)} | ({'bias': (n, outputs)} if cfg.bias else {})

    tree = {
        'embed': (cfg.vocab, cfg.word_width),
        'positions': (cfg.max_positions + OFFSET, d),
        'blocks': {
            'norm1': {'scale': (n, d), 'bias': (n, d)},
            'attn': {name: dense(d, d) for name in 'qkvo'},
            'norm2': {'scale': (n, d), 'bias': (n, d)},
            'mlp': {'fc1': dense(d, f), 'fc2': dense(f, d)},
        },
    }
    if cfg.final_norm:
        tree['norm'] = {'scale': (d,), 'bias': (d,)}
    if cfg.word_width != d:
        tree |= {'project_in': {'kernel': (cfg.word_width, d)}, 'project_out': {'kernel': (d, cfg.word_width)}}
    return tree if cfg.tied else tree | {'head': {'kernel': (cfg.word_width, cfg.vocab)}}


def keys(cfg: OptConfig) -> dict[str, str]:
    """Our path -> Hugging Face's name in `OPTDecoder`; `{i}` is the layer."""
    names = {'embed': 'embed_tokens.weight', 'positions': 'embed_positions.weight'}
    if cfg.word_width != cfg.width:
        names |= {f'project_{way}/kernel': f'project_{way}.weight' for way in ('in', 'out')}
    norms = {'blocks/norm1': 'layers.{i}.self_attn_layer_norm', 'blocks/norm2': 'layers.{i}.final_layer_norm'}
    norms |= {'norm': 'final_layer_norm'} if cfg.final_norm else {}
    for ours, theirs in norms.items():
        names |= {f'{ours}/scale': f'{theirs}.weight', f'{ours}/bias': f'{theirs}.bias'}
    linears = {f'attn/{name}': f'self_attn.{name}_proj' for name in 'qkv'}
    linears |= {'attn/o': 'self_attn.out_proj', 'mlp/fc1': 'fc1', 'mlp/fc2': 'fc2'}
    for ours, theirs in linears.items():
        names[f'blocks/{ours}/kernel'] = f'layers.{{i}}.{theirs}.weight'
        if cfg.bias:
            names[f'blocks/{ours}/bias'] = f'layers.{{i}}.{theirs}.bias'
    return names


def from_hf(hf: Any) -> OptConfig:
    """The config of a transformers `OPTConfig`.

    Raises:
      UnsupportedModelError: names the field whose value is not supported.
    """
    if not hf.layer_norm_elementwise_affine:
        raise UnsupportedModelError(
            'layer_norm_elementwise_affine False of opt: only norms with scale and bias are known'
        )
    if hf.activation_function not in layers.ACTIVATIONS:
        raise UnsupportedModelError(f'activation_function {hf.activation_function!r} of opt is not known')
    return OptConfig(
        vocab=hf.vocab_size,
        tied=hf.tie_word_embeddings,
        width=hf.hidden_size,
        depth=hf.num_hidden_layers,
        heads=hf.num_attention_heads,
        mlp_width=hf.ffn_dim,
        max_positions=hf.max_position_embeddings,
        word_width=hf.word_embed_proj_dim,
        bias=hf.enable_bias,
        pre_norm=hf.do_layer_norm_before,
        final_norm=hf.do_layer_norm_before and not hf._remove_final_layer_norm,
        activation=hf.activation_function,
    )
