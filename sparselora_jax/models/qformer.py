"""Q-Former of BLIP-2 (arXiv 2301.12597): learned queries through a BERT that reads the image every other layer.

The stacked unit is a *pair* of layers: the first attends to the image, the second does not.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparselora_jax.models import layers
from sparselora_jax.models.runners import scan_blocks


@dataclass(frozen=True)
class QFormerConfig:
    queries: int
    width: int
    pairs: int  # layers / 2
    heads: int
    mlp_width: int
    image_width: int
    norm_eps: float = 1e-12


def embed(w: dict, cfg: QFormerConfig, image: Float[Array, 'batch patches image_dim']) -> tuple[Array, dict]:
    """The learned queries, one copy an image; the image is context."""
    x = layers.layer_norm(w['norm'], w['queries'], cfg.norm_eps)
    return jnp.broadcast_to(x.astype(image.dtype), (image.shape[0], *x.shape[1:])), {'cross': image}


def _attention(w: dict, cfg: QFormerConfig, x: Array, source: Array) -> Array:
    q = layers.split_heads(layers.dense(w['q'], x), cfg.heads)
    k, v = (layers.split_heads(layers.dense(w[name], source), cfg.heads) for name in 'kv')
    return layers.layer_norm(w['norm'], x + layers.dense(w['o'], layers.attend(q, k, v)), cfg.norm_eps)


def _mlp(w: dict, cfg: QFormerConfig, x: Array) -> Array:
    h = jax.nn.gelu(layers.dense(w['fc1'], x), approximate=False)
    return layers.layer_norm(w['norm'], x + layers.dense(w['fc2'], h), cfg.norm_eps)


def block(w: dict, cfg: QFormerConfig, x: Float[Array, 'batch queries dim'], ctx: dict, cache: None):
    """A pair: self-attention, cross-attention to the image, MLP; then self-attention, MLP. Norms follow the sums."""
    first, second = w['first'], w['second']
    x = _attention(first['self'], cfg, x, x)
    x = _attention(first['cross'], cfg, x, ctx['cross'])
    x = _mlp(first['mlp'], cfg, x)
    x = _attention(second['self'], cfg, x, x)
    return _mlp(second['mlp'], cfg, x), cache


def finish(w: dict, cfg: QFormerConfig, x: Array) -> Array:
    """Nothing: every layer ends in its norm."""
    del w, cfg
    return x


def forward(w: dict, cfg: QFormerConfig, image: Float[Array, 'batch patches image_dim'], run=scan_blocks) -> Array:
    """Image tokens -> the queries' hidden states."""
    x, ctx = embed(w, cfg, image)
    x, _ = run('qformer', lambda w, x, ctx, cache: block(w, cfg, x, ctx, cache), w['blocks'], x, ctx)
    return finish(w, cfg, x)


def shapes(cfg: QFormerConfig) -> dict:
    """The shape of every parameter, as a params tree of tuples."""
    n, d, f = cfg.pairs, cfg.width, cfg.mlp_width
    norm = {'scale': (n, d), 'bias': (n, d)}

    def attention(source: int) -> dict:
        kernels = {name: {'kernel': (n, d, d), 'bias': (n, d)} for name in 'qo'}
        return kernels | {name: {'kernel': (n, source, d), 'bias': (n, d)} for name in 'kv'} | {'norm': norm}

    fc1, fc2 = {'kernel': (n, d, f), 'bias': (n, f)}, {'kernel': (n, f, d), 'bias': (n, d)}
    mlp = {'fc1': fc1, 'fc2': fc2, 'norm': norm}
    return {
        'queries': (1, cfg.queries, d),
        'norm': {'scale': (d,), 'bias': (d,)},
        'blocks': {
            'first': {'self': attention(d), 'cross': attention(cfg.image_width), 'mlp': mlp},
            'second': {'self': attention(d), 'mlp': mlp},
        },
    }
