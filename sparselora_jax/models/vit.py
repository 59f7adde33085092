"""Vision transformer (arXiv 2010.11929): patches, learned positions, pre-norm blocks.

EVA-CLIP's ViT-g, as BLIP-2 has it: class token, exact GELU, a final norm over all tokens. CLIP: a norm before the
blocks, no bias on the patches, quick GELU; LLaVA reads the input of its last layer, so that layer and the final norm
are no part of it here. SigLIP: no class token, tanh GELU.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from sparselora_jax.models import keys as names
from sparselora_jax.models import layers
from sparselora_jax.models.runners import scan_blocks
from sparselora_jax.runtime.errors import BatchError, UnsupportedModelError


@dataclass(frozen=True)
class ViTConfig:
    image_size: int  # pixels a side
    patch_size: int
    width: int
    depth: int  # layers that run, which may be fewer than the checkpoint has
    heads: int
    mlp_width: int
    norm_eps: float = 1e-6
    activation: str = 'gelu'
    class_token: bool = True
    patch_bias: bool = True
    qkv_bias: bool = True
    pre_norm: bool = False  # a norm before the blocks
    final_norm: bool = True
    drop_first: bool = False  # the first token, CLIP's class token, is not handed on
    fused_qkv: bool = True  # how checkpoints name the weights: as EVA-CLIP's, or as CLIP's and SigLIP's

    @property
    def grid(self) -> int:
        """Patches a side; pixels beyond the last whole patch are not read."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        return self.grid**2 + self.class_token

    @property
    def kept(self) -> int:
        """Tokens that are handed on."""
        return self.tokens - self.drop_first


def embed(w: dict, cfg: ViTConfig, images: Float[Array, 'batch 3 height width']) -> tuple[Array, dict]:
    """Patches -> tokens with positions added, the class token first if there is one.

    Raises:
      BatchError: the images are not of the config's size.
    """
    batch, channels, height, width = images.shape
    if (height, width) != (cfg.image_size, cfg.image_size):
        expected = f'{cfg.image_size}x{cfg.image_size}'
        raise BatchError(f'pixel_values are {height}x{width} pixels, the vision tower reads {expected}: resize them')
    grid, p = cfg.grid, cfg.patch_size
    pixels = images[:, :, : grid * p, : grid * p].reshape(batch, channels, grid, p, grid, p)
    patches = pixels.transpose(0, 2, 4, 3, 5, 1).reshape(batch, grid * grid, p * p * channels)
    x = layers.dense(w['patch'], patches)
    if cfg.class_token:
        first = jnp.broadcast_to(w['cls'].astype(x.dtype), (batch, 1, x.shape[-1]))
        x = jnp.concatenate([first, x], axis=1)
    x = x + w['positions'].astype(x.dtype)
    return layers.layer_norm(w['pre_norm'], x, cfg.norm_eps) if cfg.pre_norm else x, {}


def block(w: dict, cfg: ViTConfig, x: Float[Array, 'batch tokens dim'], ctx: dict, cache: None) -> tuple[Array, None]:
    """Pre-norm self-attention and MLP."""
    h = layers.layer_norm(w['norm1'], x, cfg.norm_eps)
    q, k, v = (layers.split_heads(layers.dense(w['attn'][name], h), cfg.heads) for name in 'qkv')
    x = x + layers.dense(w['attn']['o'], layers.attend(q, k, v))
    h = layers.layer_norm(w['norm2'], x, cfg.norm_eps)
    h = layers.ACTIVATIONS[cfg.activation](layers.dense(w['mlp']['fc1'], h))
    return x + layers.dense(w['mlp']['fc2'], h), cache


def finish(w: dict, cfg: ViTConfig, x: Float[Array, 'batch tokens dim']) -> Float[Array, 'batch kept dim']:
    """The final norm, over all tokens, and which of them are handed on."""
    x = x[:, 1:] if cfg.drop_first else x
    return layers.layer_norm(w['norm'], x, cfg.norm_eps) if cfg.final_norm else x


def forward(
    w: dict, cfg: ViTConfig, images: Float[Array, 'batch 3 height width'], run=scan_blocks
) -> Float[Array, 'batch kept dim']:
    """Normalised images -> hidden states of the tokens that are handed on."""
    x, ctx = embed(w, cfg, images)
    x, _ = run('vision', lambda w, x, ctx, cache: block(w, cfg, x, ctx, cache), w['blocks'], x, ctx)
    return finish(w, cfg, x)


def shapes(cfg: ViTConfig) -> dict:
    """The shape of every parameter, as a params tree of tuples."""
    d, n, f = cfg.width, cfg.depth, cfg.mlp_width

    def dense(inputs: int, outputs: int, bias: bool = True) -> dict:
        return {'kernel': (n, inputs, outputs)} | ({'bias': (n, outputs)} if bias else {})

    norm, norms = {'scale': (d,), 'bias': (d,)}, {'scale': (n, d), 'bias': (n, d)}
    tree = {
        'patch': {'kernel': (cfg.patch_size**2 * 3, d)} | ({'bias': (d,)} if cfg.patch_bias else {}),
        'positions': (1, cfg.tokens, d),
        'blocks': {
            'norm1': norms,
            'attn': {name: dense(d, d, cfg.qkv_bias) for name in 'qkv'} | {'o': dense(d, d)},
            'norm2': norms,
            'mlp': {'fc1': dense(d, f), 'fc2': dense(f, d)},
        },
    }
    present = {'cls': cfg.class_token, 'pre_norm': cfg.pre_norm, 'norm': cfg.final_norm}
    optional = {'cls': (1, 1, d), 'pre_norm': norm, 'norm': norm}
    return tree | {name: shape for name, shape in optional.items() if present[name]}


def keys(cfg: ViTConfig) -> names.Keys:
    """Our path -> transformers' name in `Blip2VisionModel`, `CLIPVisionModel` or `SiglipVisionModel`."""
    positions = 'embeddings.position_embedding'
    table = names.dense('patch', 'embeddings.patch_embedding', bias=cfg.patch_bias)
    table |= {'positions': positions if cfg.fused_qkv else f'{positions}.weight'}
    table |= {'cls': 'embeddings.class_embedding'} if cfg.class_token else {}
    table |= names.norm('pre_norm', 'pre_layrnorm') if cfg.pre_norm else {}  # the name's spelling is transformers' own
    table |= names.norm('norm', 'post_layernorm') if cfg.final_norm else {}
    block = names.norm('norm1', 'layer_norm1') | names.norm('norm2', 'layer_norm2')
    block |= names.dense('mlp/fc1', 'mlp.fc1') | names.dense('mlp/fc2', 'mlp.fc2')
    block |= names.dense('attn/o', 'self_attn.projection' if cfg.fused_qkv else 'self_attn.out_proj')
    for index, name in enumerate('qkv'):
        theirs = 'self_attn.qkv' if cfg.fused_qkv else f'self_attn.{name}_proj'
        linear = names.dense(f'attn/{name}', theirs, bias=cfg.qkv_bias)
        block |= {path: names.Part(key, index, 3) for path, key in linear.items()} if cfg.fused_qkv else linear
    return table | names.nested(block, 'blocks/', 'encoder.layers.{i}.')


def from_hf(hf: Any, *, layer: int | None = None, drop_first: bool = False) -> ViTConfig:
    """The config of a transformers vision config of BLIP-2, InstructBLIP, CLIP or SigLIP.

    Args:
      layer: which of torch's `hidden_states` is handed on (0 is the blocks' input, -1 the last block's output, without
        the final norm); None: the tower's own output.
      drop_first: see `ViTConfig`.

    Raises:
      UnsupportedModelError: names the field whose value is not supported.
    """
    eva = hf.model_type in ('blip_2_vision_model', 'instructblip_vision_model')
    clip, siglip = hf.model_type == 'clip_vision_model', hf.model_type == 'siglip_vision_model'
    if not (eva or clip or siglip):
        raise UnsupportedModelError(
            f'vision model {hf.model_type!r}: expected that of BLIP-2, InstructBLIP, CLIP or SigLIP'
        )
    for field in ('image_size', 'patch_size'):
        if not isinstance(getattr(hf, field), int):
            raise UnsupportedModelError(
                f'{field} {getattr(hf, field)} of {hf.model_type}: expected one integer, a square'
            )
    if getattr(hf, 'num_channels', 3) != 3:
        raise UnsupportedModelError(f'num_channels {hf.num_channels} of {hf.model_type}: expected 3')
    depth = hf.num_hidden_layers
    if layer is not None:
        depth = layer if layer >= 0 else depth + 1 + layer
        if not 1 <= depth <= hf.num_hidden_layers:
            raise UnsupportedModelError(
                f'hidden state {layer} of {hf.num_hidden_layers} vision layers: no layer puts it out'
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
        class_token=not siglip,
        patch_bias=not clip,
        qkv_bias=hf.qkv_bias if eva else True,
        pre_norm=clip,
        final_norm=layer is None and not clip,  # CLIP's own output is not normed: only its class token is
        drop_first=drop_first,
        fused_qkv=eva,
    )
