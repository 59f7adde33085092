"""PaliGemma (arXiv 2407.07726): SigLIP -> a linear layer -> soft words of Gemma, whose prompt is read both ways."""

from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Array, Float

from sparselora_jax.models import keys as names
from sparselora_jax.models import layers, llava, towers, vit
from sparselora_jax.models.runners import scan_blocks
from sparselora_jax.runtime.errors import BatchError

RENAMES = llava.RENAMES
IGNORED = [r'.*\.position_ids', r'.*\.rotary_emb\.inv_freq', r'model\.vision_tower\.head\..*']


@dataclass(frozen=True)
class PaliGemmaConfig:
    vision: vit.ViTConfig
    language: Any
    image_token: int

    @property
    def image_tokens(self) -> int:
        """Soft words of an image."""
        return self.vision.kept


def soft_words(w: dict, cfg: PaliGemmaConfig, batch: dict, run=scan_blocks) -> Float[Array, 'batch patches dim']:
    """Images -> soft words in the language model's embedding space; unlike its words, they are not scaled."""
    return layers.dense(w['projector'], vit.forward(w['vision'], cfg.vision, batch['pixel_values'], run))


def prompt(w: dict, cfg: PaliGemmaConfig, batch: dict, run=scan_blocks) -> towers.Prompt:
    """The language model's input. `token_type_ids` are 0 where tokens read each other both ways.

    Raises:
      BatchError: there are none; and see `towers.prompt`.
    """
    if 'token_type_ids' not in batch:
        raise BatchError('no token_type_ids: pass those that the processor returns, 0 for the image and the prompt')
    made = towers.prompt(w, cfg, batch, lambda batch: soft_words(w, cfg, batch, run))
    return made._replace(prefix=batch['token_type_ids'] == 0)


def shapes(cfg: PaliGemmaConfig) -> dict:
    """The shape of every parameter, as a params tree of tuples."""
    return {
        'vision': vit.shapes(cfg.vision),
        'projector': {'kernel': (cfg.vision.width, cfg.language.width), 'bias': (cfg.language.width,)},
        'language': towers.shapes(cfg.language),
    }


def keys(cfg: PaliGemmaConfig) -> names.Keys:
    """Our path -> transformers' name in `PaliGemmaForConditionalGeneration`."""
    table = names.nested(vit.keys(cfg.vision), 'vision/', 'model.vision_tower.')
    table |= names.dense('projector', 'model.multi_modal_projector.linear')
    return table | towers.keys(cfg.language, 'model.language_model.', '')


def from_hf(hf: Any) -> PaliGemmaConfig:
    """The config of a transformers `PaliGemmaConfig`.

    Raises:
      UnsupportedModelError: names the field whose value is not supported.
    """
    return PaliGemmaConfig(
        vision=vit.from_hf(hf.vision_config),
        # The whole model's field ties the head, not the text config's.
        language=replace(towers.from_hf(hf.text_config), tied=hf.tie_word_embeddings),
        image_token=hf.image_token_id,
    )
