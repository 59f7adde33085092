"""LLaVA-1.5 (arXiv 2310.03744): CLIP's penultimate layer -> two-layer MLP -> soft words of LLaMA."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from jaxtyping import Array, Float

from sparselora_jax.data.processor_spec import ImagePlace, ProcessorSpec
from sparselora_jax.data.task_format import TaskFormat, TaskKind
from sparselora_jax.data.text_format import TextFormat
from sparselora_jax.models import key_table, layers, towers
from sparselora_jax.models.config import HfConfig, LanguageConfig, VisionConfig
from sparselora_jax.models.family import Family, ImageFamily, register_family
from sparselora_jax.models.key_table import Keys
from sparselora_jax.models.runners import Runner, scan_blocks
from sparselora_jax.runtime.errors import UnsupportedModelError

if TYPE_CHECKING:
    import transformers

# Files use three layouts. Transformers saved the first before 4.52, and saves it by default since
# (`language_model.model.`, `vision_tower.`). The second has `model.` before everything except the head. The third has
# `vision_model.` in the names of the vision tower, as in version 4.
RENAMES = (
    (r'^language_model\.lm_head\.', 'lm_head.'),
    (r'^(model\.)?language_model\.(model\.)?', 'model.language_model.'),
    (r'^(model\.)?vision_tower\.(vision_model\.)?', 'model.vision_tower.'),
    (r'^(model\.)?multi_modal_projector\.', 'model.multi_modal_projector.'),
)


# The conversation in which LLaVA-1.5 was trained.
SYSTEM = (
    'A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, '
    "and polite answers to the user's questions."
)
ENDINGS = {
    'answer': 'Answer the question using a single word or phrase.',
    'choice': "Answer with the option's letter from the given choices directly.",
}


@dataclass(frozen=True)
class LlavaConfig:
    """LLaVA's towers and its projector.

    Attributes:
      vision: the vision tower.
      language: the language model.
      image_token: the placeholder token of one soft word.
      activation: activation between the projector's two layers.
      projector_bias: the projector's layers have biases.
    """

    vision: VisionConfig
    language: LanguageConfig
    image_token: int
    activation: str = 'gelu'
    projector_bias: bool = True

    @property
    def image_tokens(self) -> int:
        """Return the number of soft words of an image."""
        return self.vision.output_tokens

    @property
    def family(self) -> Family:
        """Return the family of this config."""
        return FAMILY


def count_image_tokens(hf: 'transformers.PretrainedConfig') -> int:
    """Return the number of soft words of an image: its patches and, with the strategy 'full', CLIP's class token.

    Args:
      hf: a transformers `LlavaConfig`.
    """
    patches = (hf.vision_config.image_size // hf.vision_config.patch_size) ** 2
    return patches + (1 if hf.vision_feature_select_strategy == 'full' else 0)


def complete_processor(processor: 'transformers.ProcessorMixin', hf: 'transformers.PretrainedConfig') -> None:
    """Fill in settings that are missing in old directories, saved when the model itself added the image tokens.

    Args:
      processor: a transformers `LlavaProcessor`, which is changed.
      hf: the transformers config of the directory.
    """
    if processor.patch_size is None:
        processor.patch_size = hf.vision_config.patch_size
        processor.num_additional_image_tokens = 1  # CLIP's class token
        processor.vision_feature_select_strategy = hf.vision_feature_select_strategy


class LlavaFamily(ImageFamily):
    """LLaVA: the projector is a two-layer MLP."""

    name = 'llava'
    renames = RENAMES
    ignored = (
        r'.*\.position_ids',
        r'.*\.rotary_emb\.inv_freq',
        # The layers after the one whose output is used. Names in the key table take precedence over these.
        r'model\.vision_tower\.encoder\.layers\..*',
        r'model\.vision_tower\.(post_layernorm|head)\..*',
    )
    processor = ProcessorSpec(
        class_name='LlavaProcessor',
        text=TextFormat('USER: <image>\n{} ASSISTANT:', prompt_tokens=64, answer_tokens=8),
        count_image_tokens=count_image_tokens,
        image_place=ImagePlace.IN_TEXT,
        complete=complete_processor,
    )

    def from_hf(self, hf: HfConfig) -> LlavaConfig:
        """Convert a transformers `LlavaConfig`.

        Args:
          hf: the transformers config.

        Returns:
          Our config.

        Raises:
          UnsupportedModelError: a field's value is not supported; names the field.
        """
        # LLaVA-1.5: layer -2, without the class token.
        layer = hf.vision_feature_layer
        strategy = hf.vision_feature_select_strategy
        if not isinstance(layer, int):  # later models concatenate several layers
            raise UnsupportedModelError(f'vision_feature_layer {layer} of {hf.model_type}: expected one integer')
        if strategy not in ('default', 'full'):
            raise UnsupportedModelError(
                f"vision_feature_select_strategy {strategy!r} of {hf.model_type}: expected 'default' or 'full'"
            )
        return LlavaConfig(
            vision=towers.vision_from_hf(hf.vision_config, layer=layer, drop_first=strategy == 'default'),
            # `tie_word_embeddings` counts in the whole model's config, not in the text config.
            language=replace(towers.language_from_hf(hf.text_config), tied=hf.tie_word_embeddings),
            image_token=hf.image_token_id,
            activation=layers.known_activation(hf.projector_hidden_act, 'the projector'),
            projector_bias=hf.multimodal_projector_bias,
        )

    def soft_words(
        self, w: dict, cfg: LlavaConfig, batch: dict, run: Runner = scan_blocks
    ) -> Float[Array, 'batch soft dim']:
        """Return the soft words of an image: its patches after the MLP.

        Args:
          w: params, or the weights from `bind`.
          cfg: the family's config.
          batch: JAX arrays, see `models.model`.
          run: executes the vision tower's blocks.
        """
        image = cfg.vision.tower.forward(w['vision'], cfg.vision, batch['pixel_values'], run)
        hidden = layers.ACTIVATIONS[cfg.activation](layers.dense(w['projector']['fc1'], image))
        return layers.dense(w['projector']['fc2'], hidden)

    def task_format(self, cfg: LlavaConfig, kind: TaskKind) -> TaskFormat:
        """Return LLaVA-1.5's conversation, with its own line for short answers or for letters; greedy decoding.

        Args:
          cfg: the family's config.
          kind: kind of task.
        """
        del cfg
        ending = '' if kind == 'caption' else f'\n{ENDINGS.get(kind, ENDINGS["answer"])}'
        # LLaVA's own evaluation allows 128 tokens; an answer that ends earlier is the same.
        decoding = {'num_beams': 1, 'max_new_tokens': 64 if kind == 'caption' else 16}
        text = TextFormat(
            f'{SYSTEM} USER: <image>\n{{}}{ending} ASSISTANT:', prompt_tokens=96, answer_tokens=8, decoding=decoding
        )
        return TaskFormat(
            text,
            instruction='Provide a one-sentence caption for the provided image.',
            # LLaVA's own evaluation on TextVQA, and lmms-eval's for LLaVA.
            read_words='Reference OCR token: {}',
        )

    def shapes(self, cfg: LlavaConfig) -> dict:
        """Return the shape of every parameter, as a params tree of tuples.

        Args:
          cfg: the family's config.
        """
        width = cfg.language.width
        fc1 = {'kernel': (cfg.vision.width, width)}
        fc2 = {'kernel': (width, width)}
        if cfg.projector_bias:
            fc1['bias'] = fc2['bias'] = (width,)
        return {
            'vision': cfg.vision.tower.shapes(cfg.vision),
            'projector': {'fc1': fc1, 'fc2': fc2},
            'language': cfg.language.tower.shapes(cfg.language),
        }

    def keys(self, cfg: LlavaConfig) -> Keys:
        """Return the key table: our paths -> parameter names in transformers' `LlavaForConditionalGeneration`.

        Args:
          cfg: the family's config.
        """
        # These are the names of transformers 5; `renames` converts those of older files.
        table = key_table.nested(cfg.vision.tower.keys(cfg.vision), 'vision/', 'model.vision_tower.')
        for ours, theirs in {'fc1': 'linear_1', 'fc2': 'linear_2'}.items():
            module = f'model.multi_modal_projector.{theirs}'
            table |= key_table.dense(f'projector/{ours}', module, bias=cfg.projector_bias)
        return table | towers.language_keys(cfg.language, 'model.language_model.', '')


FAMILY = register_family(LlavaFamily(), 'llava')
