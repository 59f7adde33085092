"""BLIP-2 (arXiv 2301.12597): vision transformer -> Q-Former -> projection -> soft words of a language model.

InstructBLIP (arXiv 2305.06500) is the same, but for a Q-Former that reads the instruction too.
"""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Array, Float

from sparselora_jax.models import keys as names
from sparselora_jax.models import layers, qformer, towers, vit
from sparselora_jax.models.runners import scan_blocks
from sparselora_jax.runtime.errors import UnsupportedModelError

RENAMES: list[tuple[str, str]] = []  # published names are the modules' own
IGNORED = [
    r'.*\.position_ids',
    r'.*\.rotary_emb\.inv_freq',
    r'language_model\.decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight',
]


@dataclass(frozen=True)
class Blip2Config:
    vision: vit.ViTConfig
    qformer: qformer.QFormerConfig
    language: Any  # LlamaConfig, OptConfig or T5Config
    image_token: int = 16  # stands for one soft word; 16 is one of SmolLM2's special tokens that no text here uses

    @property
    def image_tokens(self) -> int:
        """Soft words of an image."""
        return self.qformer.queries


def soft_words(w: dict, cfg: Blip2Config, batch: dict, run=scan_blocks) -> Float[Array, 'batch queries dim']:
    """Images (and instructions) -> soft words in the language model's embedding space."""
    return bridge(w, cfg, vit.forward(w['vision'], cfg.vision, batch['pixel_values'], run), batch, run)


def bridge(w: dict, cfg: Blip2Config, image: Float[Array, 'batch patches dim'], batch: dict, run=scan_blocks) -> Array:
    """Vision features -> soft words: the Q-Former and the projection."""
    queries = qformer.forward(w['qformer'], cfg.qformer, image, batch, run)
    return layers.dense(w['projection'], queries)


def prompt(w: dict, cfg: Blip2Config, batch: dict, run=scan_blocks) -> towers.Prompt:
    """The language model's input: words, with the soft words in the places of the image tokens."""
    return towers.prompt(w, cfg, batch, lambda batch: soft_words(w, cfg, batch, run))


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


def keys(cfg: Blip2Config) -> names.Keys:
    """Our path -> transformers' name in `Blip2ForConditionalGeneration` or InstructBLIP's."""
    table = names.nested(vit.keys(cfg.vision), 'vision/', 'vision_model.')
    table |= names.nested(qformer.keys(cfg.qformer), 'qformer/', '')
    table |= names.dense('projection', 'language_projection')
    return table | towers.keys(cfg.language, 'language_model.model.', 'language_model.')


def from_hf(hf: Any) -> Blip2Config:
    """The config of a transformers `Blip2Config` or `InstructBlipConfig`.

    Raises:
      UnsupportedModelError: names the field whose value is not supported.
    """
    if hf.image_token_id is None:
        raise UnsupportedModelError(
            f'{hf.model_type} without image_token_index: say in config.json which token is an image'
        )
    return Blip2Config(
        vision=vit.from_hf(hf.vision_config),
        qformer=qformer.from_hf(hf.qformer_config, hf.num_query_tokens),
        language=towers.from_hf(hf.text_config),
        image_token=hf.image_token_id,
    )
