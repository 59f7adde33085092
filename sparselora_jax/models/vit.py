"""Vision transformer (arXiv 2010.11929): patches, learned positions, pre-norm blocks.

EVA-CLIP's ViT-g, as in BLIP-2: class token, exact GELU, a final norm over all tokens. CLIP: a norm before the blocks,
no bias on the patches, quick GELU. LLaVA uses the input of CLIP's last layer, so that layer and the final norm are
omitted here. SigLIP: no class token, tanh GELU.
"""

import math
import sys
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparselora_jax.models import key_table, layers
from sparselora_jax.models.config import HfConfig
from sparselora_jax.models.key_table import Keys
from sparselora_jax.models.runners import Runner, scan_blocks
from sparselora_jax.models.towers import VISION_TOWERS, VisionTower
from sparselora_jax.runtime.errors import BatchError, UnsupportedModelError
from sparselora_jax.sparse.rules import flatten


@dataclass(frozen=True)
class ViTConfig:
    """The sizes and variant of a vision transformer.

    Attributes:
      image_size: side of an image, in pixels.
      patch_size: side of a patch, in pixels.
      width: size of a hidden state.
      depth: number of layers that run; the checkpoint may have more.
      heads: number of attention heads.
      mlp_width: size of a hidden state within an MLP.
      norm_eps: epsilon of the norms.
      activation: activation of the MLPs, a name in `layers.ACTIVATIONS`.
      class_token: there is a learned token before the patches.
      patch_bias: the projection of patches has a bias.
      qkv_bias: queries, keys and values have biases.
      pre_norm: there is a norm before the blocks.
      final_norm: there is a norm after the blocks.
      drop_first: the first token, CLIP's class token, is dropped from the output.
      fused_qkv: checkpoints use EVA-CLIP's names, with one matrix for q, k and v; False: CLIP's names.
    """

    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    norm_eps: float = 1e-6
    activation: str = 'gelu'
    class_token: bool = True
    patch_bias: bool = True
    qkv_bias: bool = True
    pre_norm: bool = False
    final_norm: bool = True
    drop_first: bool = False
    fused_qkv: bool = True

    @property
    def grid(self) -> int:
        """Return the number of patches per side; pixels beyond the last whole patch are ignored."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Return the number of hidden states within the blocks."""
        return self.grid**2 + self.class_token

    @property
    def output_tokens(self) -> int:
        """Return the number of hidden states in the output."""
        return self.tokens - self.drop_first

    @property
    def tower(self) -> VisionTower:
        """Return this module, which implements the tower."""
        return sys.modules[__name__]


def embed(
    w: dict, cfg: ViTConfig, images: Float[Array, 'batch 3 height width']
) -> tuple[Float[Array, 'batch tokens dim'], dict]:
    """Return patches as tokens with positions added, after the class token if there is one.

    Args:
      w: params of the tower.
      cfg: its config.
      images: normalised pixels.

    Returns:
      The blocks' input, and an empty `ctx`.

    Raises:
      BatchError: the images are not of the config's size.
    """
    batch, channels, height, width = images.shape
    if (height, width) != (cfg.image_size, cfg.image_size):
        expected = f'{cfg.image_size}x{cfg.image_size}'
        raise BatchError(f'pixel_values are {height}x{width} pixels, the vision tower reads {expected}: resize them')
    grid = cfg.grid
    p = cfg.patch_size
    # A convolution whose stride is its kernel size is one matmul over patches. Each patch is a row of p * p * 3
    # values in the order (row, column, channel), as in `checkpoints.layout` for the convolution's weights.
    pixels = images[:, :, : grid * p, : grid * p].reshape(batch, channels, grid, p, grid, p)
    patches = pixels.transpose(0, 2, 4, 3, 5, 1).reshape(batch, grid * grid, p * p * channels)
    x = layers.dense(w['patch'], patches)  # [batch, grid * grid, dim]
    if cfg.class_token:
        # The class token has position 0, so it is added before positions are.
        first = jnp.broadcast_to(w['cls'].astype(x.dtype), (batch, 1, x.shape[-1]))
        x = jnp.concatenate([first, x], axis=1)
    x = x + w['positions'].astype(x.dtype)
    return layers.layer_norm(w['pre_norm'], x, cfg.norm_eps) if cfg.pre_norm else x, {}


def block(
    w: dict, cfg: ViTConfig, x: Float[Array, 'batch tokens dim'], ctx: dict, cache: None
) -> tuple[Float[Array, 'batch tokens dim'], None]:
    """Run pre-norm self-attention and MLP.

    Args:
      w: weights of one layer.
      cfg: the tower's config.
      x: hidden states.
      ctx: empty, since all tokens attend to each other.
      cache: None, since this tower does not decode token by token.

    Returns:
      The new `x` and the cache.
    """
    # No mask and no cache, since an image has no pads and all its tokens are available at once.
    h = layers.layer_norm(w['norm1'], x, cfg.norm_eps)
    q, k, v = (layers.split_heads(layers.dense(w['attn'][name], h), cfg.heads) for name in 'qkv')
    x = x + layers.dense(w['attn']['o'], layers.attend(q, k, v))
    h = layers.layer_norm(w['norm2'], x, cfg.norm_eps)
    h = layers.ACTIVATIONS[cfg.activation](layers.dense(w['mlp']['fc1'], h))
    return x + layers.dense(w['mlp']['fc2'], h), cache


def finish(w: dict, cfg: ViTConfig, x: Float[Array, 'batch tokens dim']) -> Float[Array, 'batch outputs dim']:
    """Return the output tokens, after the final norm if there is one.

    Args:
      w: params of the tower.
      cfg: its config.
      x: the last block's output.
    """
    # Dropped before the norm, which saves work. The result is the same, since the norm acts on each token separately.
    x = x[:, 1:] if cfg.drop_first else x
    return layers.layer_norm(w['norm'], x, cfg.norm_eps) if cfg.final_norm else x


def forward(
    w: dict, cfg: ViTConfig, images: Float[Array, 'batch 3 height width'], run: Runner = scan_blocks
) -> Float[Array, 'batch outputs dim']:
    """Return the hidden states of the output tokens.

    Args:
      w: params of the tower, or its weights from `bind`.
      cfg: its config.
      images: normalised pixels.
      run: executes the blocks.

    Raises:
      BatchError: the images are not of the config's size.
    """
    x, ctx = embed(w, cfg, images)
    x, _ = run('vision', lambda w, x, ctx, cache: block(w, cfg, x, ctx, cache), w['blocks'], x, ctx)
    return finish(w, cfg, x)


def shapes(cfg: ViTConfig) -> dict:
    """Return the shape of every parameter, as a params tree of tuples.

    Args:
      cfg: the tower's config.
    """
    width = cfg.width
    depth = cfg.depth

    def dense(inputs: int, outputs: int, bias: bool = True) -> dict:
        layer = {'kernel': (depth, inputs, outputs)}
        return layer | {'bias': (depth, outputs)} if bias else layer

    # Only the shapes within blocks start with the layer axis.
    norm = {'scale': (width,), 'bias': (width,)}
    block_norm = {'scale': (depth, width), 'bias': (depth, width)}
    tree = {
        'patch': {'kernel': (cfg.patch_size**2 * 3, width)},
        'positions': (1, cfg.tokens, width),
        'blocks': {
            'norm1': block_norm,
            'attn': {name: dense(width, width, cfg.qkv_bias) for name in 'qkv'} | {'o': dense(width, width)},
            'norm2': block_norm,
            'mlp': {'fc1': dense(width, cfg.mlp_width), 'fc2': dense(cfg.mlp_width, width)},
        },
    }
    if cfg.patch_bias:
        tree['patch']['bias'] = (width,)
    if cfg.class_token:
        tree['cls'] = (1, 1, width)
    if cfg.pre_norm:
        tree['pre_norm'] = norm
    if cfg.final_norm:
        tree['norm'] = norm
    return tree


def keys(cfg: ViTConfig) -> Keys:
    """Return the key table: our paths -> parameter names in transformers' vision model.

    That is `Blip2VisionModel`, `CLIPVisionModel` or `SiglipVisionModel`.

    Args:
      cfg: the tower's config.
    """
    table = key_table.dense('patch', 'embeddings.patch_embedding', bias=cfg.patch_bias)
    # EVA-CLIP's positions are a parameter. The others have an embedding module, whose table is called `weight`.
    table['positions'] = 'embeddings.position_embedding' if cfg.fused_qkv else 'embeddings.position_embedding.weight'
    if cfg.class_token:
        table['cls'] = 'embeddings.class_embedding'
    if cfg.pre_norm:
        table |= key_table.norm('pre_norm', 'pre_layrnorm')  # this spelling is the one in transformers
    if cfg.final_norm:
        table |= key_table.norm('norm', 'post_layernorm')
    layer = key_table.norm('norm1', 'layer_norm1') | key_table.norm('norm2', 'layer_norm2')
    layer |= key_table.dense('mlp/fc1', 'mlp.fc1') | key_table.dense('mlp/fc2', 'mlp.fc2')
    layer |= key_table.dense('attn/o', 'self_attn.projection' if cfg.fused_qkv else 'self_attn.out_proj')
    for index, name in enumerate('qkv'):
        if cfg.fused_qkv:
            # These are three kernels here, pruned and adapted separately. In files they are equal slices of one matrix.
            fused = key_table.dense(f'attn/{name}', 'self_attn.qkv', bias=cfg.qkv_bias)
            layer |= {path: key_table.Part(key, index, 3) for path, key in fused.items()}
        else:
            layer |= key_table.dense(f'attn/{name}', f'self_attn.{name}_proj', bias=cfg.qkv_bias)
    return table | key_table.nested(layer, 'blocks/', 'encoder.layers.{i}.')


# Of cubic convolution (Keys 1981, equation 4); torch's value, while jax.image has -0.5.
_CUBIC = -0.75


def resize_positions(
    positions: Float[Array, '1 tokens dim'], cfg: ViTConfig, new_cfg: ViTConfig
) -> Float[Array, '1 new_tokens dim']:
    """Return the positions of a tower for images of another size, by bicubic interpolation over the grid of patches.

    As LAVIS does it with torch's `interpolate`: pixels beyond the border are those of the border, and the class token's
    position stays.

    Args:
      positions: the positions of the tower.
      cfg: its config.
      new_cfg: the config with the other size of images.
    """
    if cfg.grid == new_cfg.grid:
        return positions
    first = int(cfg.class_token)
    grid = positions[0, first:].astype(jnp.float32).reshape(cfg.grid, cfg.grid, -1)
    weights = jnp.asarray(_cubic_weights(cfg.grid, new_cfg.grid), jnp.float32)
    # One axis after the other, since the interpolation is separable.
    grid = jnp.einsum('yr,xc,rcd->yxd', weights, weights, grid, precision='highest')
    patches = grid.reshape(1, new_cfg.grid**2, -1).astype(positions.dtype)
    return jnp.concatenate([positions[:, :first], patches], axis=1)


def _cubic_weights(inputs: int, outputs: int) -> Float[np.ndarray, 'outputs inputs']:
    """Return the weight of each input in each output of a cubic interpolation."""
    centres = (np.arange(outputs) + 0.5) * inputs / outputs - 0.5
    nearest = np.floor(centres).astype(int)
    weights = np.zeros((outputs, inputs))
    for offset in (-1, 0, 1, 2):
        distance = np.abs(centres - (nearest + offset))
        near = ((_CUBIC + 2) * distance - (_CUBIC + 3)) * distance**2 + 1
        far = ((_CUBIC * distance - 5 * _CUBIC) * distance + 8 * _CUBIC) * distance - 4 * _CUBIC
        # Beyond the border there is no input; the one at the border takes the weight.
        place = np.clip(nearest + offset, 0, inputs - 1)
        np.add.at(weights, (np.arange(outputs), place), np.where(distance <= 1, near, far))
    return weights


@dataclass(frozen=True)
class _Variant:
    """The settings, besides sizes, that differ between kinds of vision transformers."""

    class_token: bool
    patch_bias: bool
    pre_norm: bool
    final_norm: bool
    fused_qkv: bool
    has_head: bool  # files contain a pooling head, which no family uses


# EVA-CLIP's ViT-g, which BLIP-2 and InstructBLIP use.
_EVA = _Variant(class_token=True, patch_bias=True, pre_norm=False, final_norm=True, fused_qkv=True, has_head=False)
# CLIP's output has no final norm: in CLIP that norm applies only to the class token.
_CLIP = _Variant(class_token=True, patch_bias=False, pre_norm=True, final_norm=False, fused_qkv=False, has_head=False)
# SigLIP pools by a head instead of a class token.
_SIGLIP = _Variant(class_token=False, patch_bias=True, pre_norm=False, final_norm=True, fused_qkv=False, has_head=True)
_VARIANTS = {
    'blip_2_vision_model': _EVA,
    'instructblip_vision_model': _EVA,
    'clip_vision_model': _CLIP,
    'siglip_vision_model': _SIGLIP,
}


def from_hf(hf: HfConfig, *, layer: int | None = None, drop_first: bool = False) -> ViTConfig:
    """Convert a transformers vision config of BLIP-2, InstructBLIP, CLIP or SigLIP.

    Args:
      hf: the transformers config.
      layer: index of torch's `hidden_states` to output (0 is the blocks' input, -1 the last block's output, without
        the final norm); None: the tower's own output.
      drop_first: see `ViTConfig`.

    Returns:
      Our config.

    Raises:
      UnsupportedModelError: a field's value is not supported; names the field.
    """
    if hf.model_type not in _VARIANTS:
        raise UnsupportedModelError(f'vision model {hf.model_type!r}: expected one of {", ".join(_VARIANTS)}')
    variant = _VARIANTS[hf.model_type]
    for field in ('image_size', 'patch_size'):
        if not isinstance(getattr(hf, field), int):
            raise UnsupportedModelError(
                f'{field} {getattr(hf, field)} of {hf.model_type}: expected one integer (a square)'
            )
    if getattr(hf, 'num_channels', 3) != 3:
        raise UnsupportedModelError(f'num_channels {hf.num_channels} of {hf.model_type}: expected 3')
    depth = hf.num_hidden_layers
    if layer is not None:
        # Layers after the chosen hidden state do not run. Negative indices count from the end of the depth + 1 states.
        depth = layer if layer >= 0 else depth + 1 + layer
        if not 1 <= depth <= hf.num_hidden_layers:
            raise UnsupportedModelError(
                f'hidden state {layer} of {hf.num_hidden_layers} vision layers: it is not the output of a layer'
            )
    return ViTConfig(
        image_size=hf.image_size,
        patch_size=hf.patch_size,
        width=hf.hidden_size,
        depth=depth,
        heads=hf.num_attention_heads,
        mlp_width=hf.intermediate_size,
        norm_eps=hf.layer_norm_eps,
        activation=layers.known_activation(hf.hidden_act, hf.model_type),
        class_token=variant.class_token,
        patch_bias=variant.patch_bias,
        qkv_bias=getattr(hf, 'qkv_bias', True),  # only EVA-CLIP has this field
        pre_norm=variant.pre_norm,
        final_norm=variant.final_norm and layer is None,  # torch's `hidden_states` are taken before the norm
        drop_first=drop_first,
        fused_qkv=variant.fused_qkv,
    )


def unread(hf: HfConfig, cfg: ViTConfig) -> dict[str, int]:
    """Return the numbers of parameters in a published file that this config does not use, by description.

    Args:
      hf: the transformers config of the vision tower.
      cfg: our config, converted from `hf`.
    """
    whole = replace(from_hf(hf), final_norm=True)  # everything in a file except a head
    counts = {}
    skipped = whole.depth - cfg.depth
    if skipped:
        shorter = replace(whole, depth=cfg.depth)
        counts[f'last {skipped} of {whole.depth} vision layers'] = _count(whole) - _count(shorter)
    if not cfg.final_norm:
        counts['vision/norm'] = 2 * whole.width  # scale and bias
    if _VARIANTS[hf.model_type].has_head and getattr(hf, 'vision_use_head', True):
        # SigLIP's pooling head has attention with a learned probe, a norm and an MLP.
        attention = 4 * whole.width * (whole.width + 1)
        mlp = whole.width * (2 * whole.mlp_width + 1) + whole.mlp_width
        probe_and_norm = 3 * whole.width
        counts['vision/head'] = attention + mlp + probe_and_norm
    return counts


def _count(cfg: ViTConfig) -> int:
    return sum(math.prod(shape) for shape in flatten(shapes(cfg)).values())


# A module of functions satisfies the protocol of a tower (PEP 544).
for _model_type in _VARIANTS:
    VISION_TOWERS.register(_model_type, sys.modules[__name__])
