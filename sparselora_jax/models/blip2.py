"""BLIP-2 (arXiv 2301.12597): vision transformer -> Q-Former -> projection -> soft words of a language model.

InstructBLIP (arXiv 2305.06500) is the same, except that its Q-Former reads the instruction too.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from jaxtyping import Array, Float

from sparselora_jax.data.processor_spec import ImagePlace, ProcessorSpec
from sparselora_jax.data.task_format import TaskFormat, TaskKind, clean_question
from sparselora_jax.data.text_format import TextFormat
from sparselora_jax.models import key_table, layers, qformer, towers
from sparselora_jax.models.config import HfConfig, LanguageConfig, VisionConfig
from sparselora_jax.models.family import Family, ImageFamily, register_family
from sparselora_jax.models.key_table import Keys
from sparselora_jax.models.runners import Runner, scan_blocks
from sparselora_jax.runtime.errors import UnsupportedModelError

if TYPE_CHECKING:
    import transformers


PROMPTS = {
    'answer': 'Question: {} Short answer:',
    'choice': 'Question: {}\nAnswer with the letter of the right choice. Short answer:',
}


@dataclass(frozen=True)
class Blip2Config:
    """The towers of BLIP-2 or InstructBLIP; their widths give the projection's shape.

    Attributes:
      vision: the vision tower.
      qformer: the Q-Former; if it has a vocabulary, it reads text, and the model is an InstructBLIP.
      language: the language model.
      image_token: the placeholder token of one soft word; 16 is an unused special token of SmolLM2.
    """

    vision: VisionConfig
    qformer: qformer.QFormerConfig
    language: LanguageConfig
    image_token: int = 16

    @property
    def image_tokens(self) -> int:
        """Return the number of soft words of an image."""
        return self.qformer.queries

    @property
    def family(self) -> Family:
        """Return the family of this config."""
        # Both have the same structure. They differ in processor, recipe and the Q-Former's input.
        return INSTRUCTBLIP if self.qformer.vocab else BLIP2


def bridge(
    w: dict, cfg: Blip2Config, image: Float[Array, 'batch patches dim'], batch: dict, run: Runner = scan_blocks
) -> Float[Array, 'batch queries words']:
    """Convert vision features to soft words, by the Q-Former and the projection.

    Args:
      w: params, or the weights from `bind`.
      cfg: the family's config.
      image: the vision tower's output.
      batch: contains the instruction, for an InstructBLIP.
      run: executes the Q-Former's blocks.
    """
    queries = qformer.forward(w['qformer'], cfg.qformer, image, batch, run)
    return layers.dense(w['projection'], queries)


def bridge_shapes(cfg: Blip2Config) -> dict:
    """Return the shapes of everything except the language model.

    Args:
      cfg: the family's config.
    """
    return {
        'vision': cfg.vision.tower.shapes(cfg.vision),
        'qformer': qformer.shapes(cfg.qformer),
        'projection': {'kernel': (cfg.qformer.width, cfg.language.width), 'bias': (cfg.language.width,)},
    }


def count_image_tokens(hf: 'transformers.PretrainedConfig') -> int:
    """Return the number of soft words of an image: the Q-Former's queries.

    Args:
      hf: a transformers `Blip2Config` or `InstructBlipConfig`.
    """
    return hf.num_query_tokens


def complete_processor(processor: 'transformers.ProcessorMixin', hf: 'transformers.PretrainedConfig') -> None:
    """Fill in settings that are missing in old directories, saved when the model itself added the image tokens.

    Args:
      processor: a transformers `Blip2Processor` or `InstructBlipProcessor`, which is changed.
      hf: the transformers config of the directory.
    """
    # The processor writes the image tokens into the prompt, so it must know how many there are.
    if processor.num_query_tokens is None:
        processor.num_query_tokens = hf.num_query_tokens


class Blip2Family(ImageFamily):
    """BLIP-2: a Q-Former between the vision tower and the language model."""

    name = 'blip2'
    tower_names = ('vision', 'qformer', 'language')
    ignored = (
        r'.*\.position_ids',
        r'.*\.rotary_emb\.inv_freq',
        # T5's cross-attention has no relative positions, but old files contain a table for them.
        r'language_model\.decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight',
    )
    processor = ProcessorSpec(
        class_name='Blip2Processor',
        text=TextFormat(prompt_tokens=32, answer_tokens=8),
        count_image_tokens=count_image_tokens,
        image_place=ImagePlace.BEFORE_PADS,
        reads_generation_config=False,
        complete=complete_processor,
    )
    # Its language model generates from embeddings, with the defaults of `text_config`.
    reads_generation_config = False
    is_prompted_by_image = True

    def from_hf(self, hf: HfConfig) -> Blip2Config:
        """Convert a transformers `Blip2Config` or `InstructBlipConfig`.

        Args:
          hf: the transformers config.

        Returns:
          Our config.

        Raises:
          UnsupportedModelError: a field's value is not supported; names the field.
        """
        # Old configs have no image token: the model put soft words before the prompt, without placeholders.
        if hf.image_token_id is None:
            raise UnsupportedModelError(
                f'{hf.model_type} without image_token_index: set it in config.json to the id of the image token'
            )
        return Blip2Config(
            vision=towers.vision_from_hf(hf.vision_config),
            qformer=qformer.from_hf(hf.qformer_config, hf.num_query_tokens),
            language=towers.language_from_hf(hf.text_config),
            image_token=hf.image_token_id,
        )

    def soft_words(
        self, w: dict, cfg: Blip2Config, batch: dict, run: Runner = scan_blocks
    ) -> Float[Array, 'batch queries dim']:
        """Return the soft words of an image (and its instruction), in the language model's embedding space.

        Args:
          w: params, or the weights from `bind`.
          cfg: the family's config.
          batch: JAX arrays, see `models.model`.
          run: executes the towers' blocks.
        """
        image = cfg.vision.tower.forward(w['vision'], cfg.vision, batch['pixel_values'], run)
        return bridge(w, cfg, image, batch, run)

    def task_format(self, cfg: Blip2Config, kind: TaskKind) -> TaskFormat:
        """Return BLIP-2's prompt for short answers, or none for captions; five beams, as in the paper's scripts.

        Args:
          cfg: the family's config.
          kind: kind of task.
        """
        if kind == 'caption':
            return TaskFormat(TextFormat('{}', prompt_tokens=8, decoding=self._caption_decoding(cfg)))
        template = PROMPTS.get(kind, PROMPTS['answer'])
        text = TextFormat(template, prompt_tokens=32, answer_tokens=8, decoding=self._answer_decoding(cfg))
        return TaskFormat(text, clean=clean_question)

    def _answer_decoding(self, cfg: Blip2Config) -> dict[str, Any]:
        """Return the arguments of `generate` for short answers."""
        decoding: dict[str, Any] = {'num_beams': 5, 'max_new_tokens': 10}
        if cfg.language.tower.is_encoder_decoder:
            return decoding | {'length_penalty': -1.0}
        # The paper's code never passes its length penalty to these models, whose default is 0.
        decoding['length_penalty'] = 0.0
        # Only OPT goes on after its answer, in a new line.
        newline = getattr(cfg.language, 'newline', None)
        if newline is not None:
            decoding['eos_token_id'] = newline
        return decoding

    def _caption_decoding(self, cfg: Blip2Config) -> dict[str, Any]:
        """Return the arguments of `generate` for captions."""
        decoding: dict[str, Any] = {'num_beams': 5, 'length_penalty': 1.0}
        if cfg.language.tower.is_encoder_decoder:
            return decoding | {'max_new_tokens': 30, 'min_length': 8}
        # Lengths of 30 and 8 count the first token, which stands for the embeddings of the prompt.
        return decoding | {'max_new_tokens': 29, 'min_new_tokens': 7}

    def shapes(self, cfg: Blip2Config) -> dict:
        """Return the shape of every parameter, as a params tree of tuples.

        Args:
          cfg: the family's config.
        """
        return bridge_shapes(cfg) | {'language': cfg.language.tower.shapes(cfg.language)}

    def keys(self, cfg: Blip2Config) -> Keys:
        """Return the key table: our paths -> parameter names in transformers' BLIP-2 or InstructBLIP model.

        Args:
          cfg: the family's config.
        """
        table = key_table.nested(cfg.vision.tower.keys(cfg.vision), 'vision/', 'vision_model.')
        # No prefix, since the queries and the Q-Former are both members of the whole model.
        table |= key_table.nested(qformer.keys(cfg.qformer), 'qformer/', '')
        table |= key_table.dense('projection', 'language_projection')
        return table | towers.language_keys(cfg.language, 'language_model.model.', 'language_model.')


class InstructBlipFamily(Blip2Family):
    """InstructBLIP: the Q-Former reads the instruction and the image."""

    name = 'instructblip'
    processor = replace(
        Blip2Family.processor,
        class_name='InstructBlipProcessor',
        text=TextFormat('{}', prompt_tokens=32, answer_tokens=8),
        has_instruction=True,
    )

    def task_format(self, cfg: Blip2Config, kind: TaskKind) -> TaskFormat:
        """Return the prompts of the paper's scripts, with a penalty on repeated tokens.

        Args:
          cfg: the family's config.
          kind: kind of task.
        """
        asked = super().task_format(cfg, kind)
        decoding = asked.text.decoding | {'repetition_penalty': 1.5}
        if cfg.language.tower.is_encoder_decoder:
            return replace(asked, text=replace(asked.text, decoding=decoding))
        if kind != 'caption':
            # A length of 10 counts the first token, see `_caption_decoding`.
            return replace(asked, text=replace(asked.text, decoding=decoding | {'max_new_tokens': 9}))
        decoding |= {'max_new_tokens': 79, 'min_new_tokens': 9}
        return replace(asked, text=replace(asked.text, decoding=decoding), instruction='A short image caption.')

    def vocabularies(self, cfg: Blip2Config) -> dict[str, int]:
        """Return the batch arrays that contain tokens, with their vocabulary sizes.

        Args:
          cfg: the family's config.
        """
        return super().vocabularies(cfg) | {'qformer_input_ids': cfg.qformer.vocab}


# Two objects with the same structure, because a family is looked up by model type before its config is read.
BLIP2 = register_family(Blip2Family(), 'blip-2')
INSTRUCTBLIP = register_family(InstructBlipFamily(), 'instructblip')
