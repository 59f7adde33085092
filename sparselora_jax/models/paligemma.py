"""PaliGemma (arXiv 2407.07726): SigLIP -> linear layer -> soft words of Gemma, with full attention in the prompt."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from jaxtyping import Array, Float

from sparselora_jax.data.processor_spec import ImagePlace, ProcessorSpec
from sparselora_jax.data.task_format import TaskFormat, TaskKind
from sparselora_jax.data.text_format import TextFormat
from sparselora_jax.models import key_table, layers, llava, towers
from sparselora_jax.models.config import HfConfig, LanguageConfig, VisionConfig
from sparselora_jax.models.family import Family, ImageFamily, register_family
from sparselora_jax.models.key_table import Keys
from sparselora_jax.models.prompts import Prompt
from sparselora_jax.models.runners import Runner, scan_blocks
from sparselora_jax.runtime.errors import BatchError

if TYPE_CHECKING:
    import transformers


@dataclass(frozen=True)
class PaliGemmaConfig:
    """PaliGemma's towers; their widths give the projector's shape.

    Attributes:
      vision: the vision tower.
      language: the language model.
      image_token: the placeholder token of one soft word.
    """

    vision: VisionConfig
    language: LanguageConfig
    image_token: int

    @property
    def image_tokens(self) -> int:
        """Return the number of soft words of an image."""
        return self.vision.output_tokens

    @property
    def family(self) -> Family:
        """Return the family of this config."""
        return FAMILY


def count_image_tokens(hf: 'transformers.PretrainedConfig') -> int:
    """Return the number of soft words of an image: its patches.

    Args:
      hf: a transformers `PaliGemmaConfig`.
    """
    return (hf.vision_config.image_size // hf.vision_config.patch_size) ** 2


class PaliGemmaFamily(ImageFamily):
    """PaliGemma: a linear projector, and a prompt whose tokens attend to each other in both directions."""

    name = 'paligemma'
    renames = llava.RENAMES  # transformers uses the same module names for both
    ignored = (r'.*\.position_ids', r'.*\.rotary_emb\.inv_freq', r'model\.vision_tower\.head\..*')
    processor = ProcessorSpec(
        class_name='PaliGemmaProcessor',
        text=TextFormat('answer en {}', prompt_tokens=32, answer_tokens=8),
        count_image_tokens=count_image_tokens,
        image_place=ImagePlace.BEFORE_TEXT,
        prompt_template='{bos}{text}\n',
        has_token_types=True,
    )

    def from_hf(self, hf: HfConfig) -> PaliGemmaConfig:
        """Convert a transformers `PaliGemmaConfig`.

        Args:
          hf: the transformers config.

        Returns:
          Our config.

        Raises:
          UnsupportedModelError: a field's value is not supported; names the field.
        """
        # The config's projection size is not used. It must equal the language model's width, or the file's shapes fail.
        return PaliGemmaConfig(
            vision=towers.vision_from_hf(hf.vision_config),
            # `tie_word_embeddings` counts in the whole model's config, not in the text config.
            language=replace(towers.language_from_hf(hf.text_config), tied=hf.tie_word_embeddings),
            image_token=hf.image_token_id,
        )

    def task_format(self, cfg: PaliGemmaConfig, kind: TaskKind) -> TaskFormat:
        """Return the prefixes that PaliGemma was trained with (arXiv 2407.07726), and big_vision's decoding.

        Args:
          cfg: the family's config.
          kind: kind of task.
        """
        del cfg
        is_caption = kind == 'caption'
        decoding = {'num_beams': 2 if is_caption else 1, 'max_new_tokens': 32}
        text = replace(self.processor.text, prompt='{}' if is_caption else 'answer en {}', decoding=decoding)
        return TaskFormat(text, instruction='caption en')

    def soft_words(
        self, w: dict, cfg: PaliGemmaConfig, batch: dict, run: Runner = scan_blocks
    ) -> Float[Array, 'batch soft dim']:
        """Return the soft words of an image; unlike word embeddings, they are not scaled.

        Args:
          w: params, or the weights from `bind`.
          cfg: the family's config.
          batch: JAX arrays, see `models.model`.
          run: executes the vision tower's blocks.
        """
        image = cfg.vision.tower.forward(w['vision'], cfg.vision, batch['pixel_values'], run)
        return layers.dense(w['projector'], image)

    def prompt(self, w: dict, cfg: PaliGemmaConfig, batch: dict, run: Runner = scan_blocks) -> Prompt:
        """Return the language tower's input; tokens with `token_type_ids` 0 attend to each other in both directions.

        Args:
          w: params, or the weights from `bind`.
          cfg: the family's config.
          batch: JAX arrays, see `models.model`.
          run: executes the towers' blocks.

        Raises:
          BatchError: there are no `token_type_ids`; also see `prompts.embed_words_and_image`.
        """
        if 'token_type_ids' not in batch:
            raise BatchError('no token_type_ids: pass those that the processor returns, 0 for the image and the prompt')
        # Image, prompt and pads have type 0, the answer has type 1. Pads are always masked.
        prompt = super().prompt(w, cfg, batch, run)
        return prompt._replace(prefix=batch['token_type_ids'] == 0)

    def shapes(self, cfg: PaliGemmaConfig) -> dict:
        """Return the shape of every parameter, as a params tree of tuples.

        Args:
          cfg: the family's config.
        """
        return {
            'vision': cfg.vision.tower.shapes(cfg.vision),
            'projector': {'kernel': (cfg.vision.width, cfg.language.width), 'bias': (cfg.language.width,)},
            'language': cfg.language.tower.shapes(cfg.language),
        }

    def keys(self, cfg: PaliGemmaConfig) -> Keys:
        """Return the key table: our paths -> parameter names in transformers' `PaliGemmaForConditionalGeneration`.

        Args:
          cfg: the family's config.
        """
        table = key_table.nested(cfg.vision.tower.keys(cfg.vision), 'vision/', 'model.vision_tower.')
        table |= key_table.dense('projector', 'model.multi_modal_projector.linear')
        return table | towers.language_keys(cfg.language, 'model.language_model.', '')


FAMILY = register_family(PaliGemmaFamily(), 'paligemma')
