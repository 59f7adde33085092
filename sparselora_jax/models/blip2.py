"""BLIP-2 (arXiv 2301.12597): vision transformer -> Q-Former -> projection -> soft words of a language model.

InstructBLIP (arXiv 2305.06500) is the same, but for a Q-Former that reads the instruction too.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from sparselora_jax.models import layers, qformer, towers, vit
from sparselora_jax.models.runners import scan_blocks


@dataclass(frozen=True)
class Blip2Config:
    vision: vit.ViTConfig
    qformer: qformer.QFormerConfig
    language: Any  # LlamaConfig, OptConfig or T5Config
    image_token: int = 16  # stands for one soft word; 16 is one of SmolLM2's special tokens that no text here uses


def soft_words(w: dict, cfg: Blip2Config, batch: dict, run=scan_blocks) -> Float[Array, 'batch queries dim']:
    """Images (and instructions) -> soft words in the language model's embedding space."""
    return bridge(w, cfg, vit.forward(w['vision'], cfg.vision, batch['pixel_values'], run), batch, run)


def bridge(w: dict, cfg: Blip2Config, image: Float[Array, 'batch patches dim'], batch: dict, run=scan_blocks) -> Array:
    """Vision features -> soft words: the Q-Former and the projection."""
    queries = qformer.forward(w['qformer'], cfg.qformer, image, batch, run)
    return layers.dense(w['projection'], queries)


def prompt(w: dict, cfg: Blip2Config, batch: dict, run=scan_blocks) -> towers.Prompt:
    """The language model's input: words, with the soft words in the places of the image tokens."""
    words = towers.embed_tokens(w['language'], cfg.language, batch['input_ids'])
    soft = soft_words(w, cfg, batch | {'pixel_values': batch['pixel_values'].astype(words.dtype)}, run)
    x = layers.scatter_images(words, soft, batch['input_ids'] == cfg.image_token)
    return towers.Prompt(x, batch['attention_mask'].astype(bool))


def bridge_shapes(cfg: Blip2Config) -> dict:
    """Shapes of everything but the language model."""
    return {
        'vision': vit.shapes(cfg.vision),
        'qformer': qformer.shapes(cfg.qformer),
        'projection': {'kernel': (cfg.qformer.width, cfg.language.width), 'bias': (cfg.language.width,)},
    }


def shapes(cfg: Blip2Config) -> dict:
    """The shape of every parameter, as a params tree of tuples."""
    return bridge_shapes(cfg) | {'language': towers.shapes(cfg.language)}
