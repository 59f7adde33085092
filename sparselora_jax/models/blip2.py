"""BLIP-2 (arXiv 2301.12597): vision transformer -> Q-Former -> projection -> prefix of a language model.

A batch is a dict: `image` [batch, height, width, 3] (normalised), `tokens` [batch, text] left-padded, `valid` (True for
tokens that are no pads). The language model sees [queries | text].
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sparselora_jax.models import layers, llama, qformer, vit
from sparselora_jax.models.runners import scan_blocks
from sparselora_jax.storage import StorageError


@dataclass(frozen=True)
class Blip2Config:
    vision: vit.ViTConfig
    qformer: qformer.QFormerConfig
    language: llama.LlamaConfig


def to_json(cfg: Blip2Config) -> str:
    """The config as text, kept in the header of a model's file."""
    return json.dumps(dataclasses.asdict(cfg))


def from_json(text: str) -> Blip2Config:
    """The inverse of `to_json`."""
    parts = json.loads(text)
    return Blip2Config(
        vision=vit.ViTConfig(**parts['vision']),
        qformer=qformer.QFormerConfig(**parts['qformer']),
        language=llama.LlamaConfig(**parts['language']),
    )


def from_header(path: str | Path, metadata: dict[str, str]) -> Blip2Config:
    """The config in the header of a model's file.

    Raises:
      StorageError: names the file, which holds none.
    """
    try:
        return from_json(metadata['config'])
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise StorageError(f'{path}: the header holds no config of a BLIP-2 model ({error!r})') from None


def prefix(w: dict, cfg: Blip2Config, images: Array, run=scan_blocks) -> Float[Array, 'batch queries dim']:
    """Images -> soft words in the language model's embedding space."""
    return bridge(w, cfg, vit.forward(w['vision'], cfg.vision, images, run), run)


def bridge(w: dict, cfg: Blip2Config, image: Float[Array, 'batch patches dim'], run=scan_blocks) -> Array:
    """Vision features -> soft words: the Q-Former and the projection."""
    return layers.dense(w['projection'], qformer.forward(w['qformer'], cfg.qformer, image, run))


def embed(w: dict, cfg: Blip2Config, batch: dict, run=scan_blocks) -> tuple[Array, Bool[Array, 'batch slots']]:
    """The language model's input [queries | text] and which of its slots are no pads."""
    words = llama.embed_tokens(w['language'], batch['tokens'])
    soft = prefix(w, cfg, batch['image'].astype(words.dtype), run)
    valid = jnp.concatenate([jnp.ones(soft.shape[:2], bool), batch['valid']], axis=1)
    return jnp.concatenate([soft, words], axis=1), valid


def forward(w: dict, cfg: Blip2Config, batch: dict, run=scan_blocks) -> Float[Array, 'batch text dim']:
    """Hidden states of the text positions, before the head."""
    x, valid = embed(w, cfg, batch, run)
    return llama.forward(w['language'], cfg.language, x, valid, run)[:, cfg.qformer.queries :]


def head(w: dict, hidden: Float[Array, '*batch dim']) -> Float[Array, '*batch vocab']:
    """Logits of the language model, in fp32."""
    return llama.head(w['language'], hidden)


def answer_logits(w: dict, cfg: Blip2Config, batch: dict, run=scan_blocks) -> Float[Array, 'batch answer vocab']:
    """Logits that predict `batch['targets']`: the last positions alone, since the head is the largest matrix."""
    return head(w, forward(w, cfg, batch, run)[:, -batch['targets'].shape[1] :])


def bridge_shapes(cfg: Blip2Config) -> dict:
    """Shapes of everything but the language model."""
    return {
        'vision': vit.shapes(cfg.vision),
        'qformer': qformer.shapes(cfg.qformer),
        'projection': {'kernel': (cfg.qformer.width, cfg.language.width), 'bias': (cfg.language.width,)},
    }


def shapes(cfg: Blip2Config) -> dict:
    """The shape of every parameter, as a params tree of tuples."""
    return bridge_shapes(cfg) | {'language': llama.shapes(cfg.language)}


def init(key: Array, shapes: dict, *, std: float = 0.02, dtype=jnp.float32) -> dict:
    """Random parameters of the given shapes: kernels scaled by 1/sqrt(in), scales one, biases zero, tables `std`."""
    leaves, treedef = jax.tree.flatten_with_path(shapes, is_leaf=lambda s: isinstance(s, tuple))

    def leaf(index: int, name: str, shape: tuple[int, ...]) -> Array:
        if name in ('scale', 'bias'):
            return jnp.full(shape, float(name == 'scale'), dtype)
        scale = shape[-2] ** -0.5 if name == 'kernel' else std
        return scale * jax.random.truncated_normal(jax.random.fold_in(key, index), -2.0, 2.0, shape, dtype)

    return treedef.unflatten([leaf(i, path[-1].key, shape) for i, (path, shape) in enumerate(leaves)])
