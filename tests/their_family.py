"""A family as somebody else would write it: LLaVA's towers, joined by a projector of one layer."""

from dataclasses import dataclass, replace

import transformers

from sparselora_jax.data.processor_spec import ImagePlace, ProcessorSpec
from sparselora_jax.data.text_format import TextFormat
from sparselora_jax.models import key_table, layers, llava, towers
from sparselora_jax.models.config import LanguageConfig, VisionConfig
from sparselora_jax.models.family import ImageFamily

MODEL_TYPE = 'their_llava'


class TheirLlavaHfConfig(transformers.LlavaConfig):
    model_type = MODEL_TYPE


transformers.AutoConfig.register(MODEL_TYPE, TheirLlavaHfConfig)


@dataclass(frozen=True)
class TheirLlavaConfig:
    vision: VisionConfig
    language: LanguageConfig
    image_token: int

    @property
    def image_tokens(self):
        return self.vision.output_tokens

    @property
    def family(self):
        return FAMILY


class TheirLlavaFamily(ImageFamily):
    """One linear layer between CLIP and LLaMA."""

    name = 'their_llava'
    renames = llava.RENAMES
    ignored = llava.FAMILY.ignored
    processor = ProcessorSpec(
        class_name='LlavaProcessor',
        text=TextFormat('<image>\nQ: {} A:', prompt_tokens=40, answer_tokens=8),
        count_image_tokens=llava.count_image_tokens,
        image_place=ImagePlace.IN_TEXT,
    )

    def from_hf(self, hf):
        return TheirLlavaConfig(
            vision=towers.vision_from_hf(hf.vision_config, layer=-2, drop_first=True),
            language=replace(towers.language_from_hf(hf.text_config), tied=hf.tie_word_embeddings),
            image_token=hf.image_token_id,
        )

    def soft_words(self, w, cfg, batch, run):
        image = cfg.vision.tower.forward(w['vision'], cfg.vision, batch['pixel_values'], run)
        return layers.dense(w['projector'], image)

    def shapes(self, cfg):
        return {
            'vision': cfg.vision.tower.shapes(cfg.vision),
            'projector': {'kernel': (cfg.vision.width, cfg.language.width), 'bias': (cfg.language.width,)},
            'language': cfg.language.tower.shapes(cfg.language),
        }

    def keys(self, cfg):
        table = key_table.nested(cfg.vision.tower.keys(cfg.vision), 'vision/', 'model.vision_tower.')
        table |= key_table.dense('projector', 'model.multi_modal_projector.linear')
        return table | towers.language_keys(cfg.language, 'model.language_model.', '')


FAMILY = TheirLlavaFamily()
