"""Vision transformer (arXiv 2010.11929): patches, a class token, learned positions, pre-norm blocks, exact GELU."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparselora_jax.models import layers
from sparselora_jax.models.runners import scan_blocks


@dataclass(frozen=True)
class ViTConfig:
    image_size: int  # pixels a side
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    norm_eps: float = 1e-6

    @property
    def tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2 + 1


def embed(w: dict, cfg: ViTConfig, images: Float[Array, 'batch height width 3']) -> tuple[Array, dict]:
    """Patches -> tokens, with the class token first and positions added."""
    batch, height, width, channels = images.shape
    p = cfg.patch_size
    patches = images.reshape(batch, height // p, p, width // p, p, channels).swapaxes(2, 3)
    x = layers.dense(w['patch'], patches.reshape(batch, -1, p * p * channels))
    cls = jnp.broadcast_to(w['cls'].astype(x.dtype), (batch, 1, x.shape[-1]))
    return jnp.concatenate([cls, x], axis=1) + w['positions'].astype(x.dtype), {}


def block(w: dict, cfg: ViTConfig, x: Float[Array, 'batch tokens dim'], ctx: dict, cache: None) -> tuple[Array, None]:
    """Pre-norm self-attention and MLP."""
    h = layers.layer_norm(w['norm1'], x, cfg.norm_eps)
    q, k, v = (layers.split_heads(layers.dense(w['attn'][name], h), cfg.heads) for name in 'qkv')
    x = x + layers.dense(w['attn']['o'], layers.attend(q, k, v))
    h = layers.layer_norm(w['norm2'], x, cfg.norm_eps)
    h = jax.nn.gelu(layers.dense(w['mlp']['fc1'], h), approximate=False)
    return x + layers.dense(w['mlp']['fc2'], h), cache


def finish(w: dict, cfg: ViTConfig, x: Float[Array, 'batch tokens dim']) -> Float[Array, 'batch tokens dim']:
    """The final norm, over all tokens."""
    return layers.layer_norm(w['norm'], x, cfg.norm_eps)


def forward(w: dict, cfg: ViTConfig, images: Float[Array, 'batch height width 3'], run=scan_blocks) -> Array:
    """Images (normalised, channels last) -> hidden states of the class token and the patches."""
    x, ctx = embed(w, cfg, images)
    x, _ = run('vision', lambda w, x, ctx, cache: block(w, cfg, x, ctx, cache), w['blocks'], x, ctx)
    return finish(w, cfg, x)


def shapes(cfg: ViTConfig) -> dict:
    """The shape of every parameter, as a params tree of tuples."""
    d, n = cfg.width, cfg.depth
    norm = {'scale': (n, d), 'bias': (n, d)}
    return {
        'patch': {'kernel': (cfg.patch_size**2 * 3, d), 'bias': (d,)},
        'cls': (1, 1, d),
        'positions': (1, cfg.tokens, d),
        'blocks': {
            'norm1': norm,
            'attn': {name: {'kernel': (n, d, d), 'bias': (n, d)} for name in 'qkvo'},
            'norm2': norm,
            'mlp': {
                'fc1': {'kernel': (n, d, cfg.mlp_width), 'bias': (n, cfg.mlp_width)},
                'fc2': {'kernel': (n, cfg.mlp_width, d), 'bias': (n, d)},
            },
        },
        'norm': {'scale': (d,), 'bias': (d,)},
    }
