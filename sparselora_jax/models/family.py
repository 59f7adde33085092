"""Families: how towers are composed into one kind of model, and everything else that differs between kinds.

A family is an object of the protocol `Family`, registered in its own file under transformers' `model_type`:

    class MyFamily(ImageFamily):
        name = 'my_family'
        ...

    FAMILY = register_family(MyFamily(), 'my_model_type')

Its config is a frozen dataclass that holds the towers' configs and names its family by `cfg.family`, so a model knows
its family without a second table. A family that is registered nowhere is named as `package.module:FAMILY`.
"""

import abc
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparselora_jax.data.processor_spec import PROCESSORS, ProcessorSpec
from sparselora_jax.models import prompts
from sparselora_jax.models.config import FamilyConfig, HfConfig, ImageConfig
from sparselora_jax.models.key_table import Keys
from sparselora_jax.models.prompts import Prompt
from sparselora_jax.models.runners import Runner, scan_blocks
from sparselora_jax.runtime.errors import UnsupportedModelError
from sparselora_jax.runtime.registry import Registry


@runtime_checkable
class Family(Protocol):
    """A kind of model: its towers, its shapes, the names in its files, its prompt.

    A subclass states what has no default here. `ImageFamily` does so for models of images and text.

    Attributes:
      name: of its recipes in `configs/`, such as 'llava'.
      tower_names: its towers in the order in which they run; each is a field of its config and of its params.
      renames: (regex, replacement) pairs that turn the names of older files into today's, applied in order.
      ignored: regexes of tensors that a file may hold and no parameter reads; the key table goes before them.
      processor: how the processor of its directories works; None: it has none.
      reads_generation_config: generation follows the directory's generation_config.json. False: the language model
        generates by itself, from embeddings, as it was built from `text_config`. Then pads are not told by their id.
      is_prompted_by_image: an image without any text is a prompt: its soft words, then the BOS token.
    """

    name: str
    tower_names: tuple[str, ...] = ('language',)
    renames: Sequence[tuple[str, str]] = ()
    ignored: Sequence[str] = ()
    processor: ProcessorSpec | None = None
    reads_generation_config: bool = True
    is_prompted_by_image: bool = False

    @abc.abstractmethod
    def from_hf(self, hf: HfConfig) -> FamilyConfig:
        """Convert a config of transformers.

        Args:
          hf: the transformers config of a whole model.

        Returns:
          The family's config.

        Raises:
          UnsupportedModelError: a field's value is not supported; names the field.
        """

    @abc.abstractmethod
    def prompt(self, w: dict, cfg: FamilyConfig, batch: dict, run: Runner = scan_blocks) -> Prompt:
        """Return what the language tower reads.

        Args:
          w: params, or the weights from `bind`.
          cfg: the family's config.
          batch: JAX arrays, see `models.model`; `attention_mask` is among them.
          run: executes the blocks of the towers before the language model.

        Raises:
          BatchError: the batch does not fit the model.
        """

    @abc.abstractmethod
    def shapes(self, cfg: FamilyConfig) -> dict:
        """Return the shape of every parameter, as a params tree of tuples.

        Args:
          cfg: the family's config.
        """

    @abc.abstractmethod
    def keys(self, cfg: FamilyConfig) -> Keys:
        """Return our paths with the names that transformers' model class gives its parameters today.

        Args:
          cfg: the family's config.
        """

    def vocabularies(self, cfg: FamilyConfig) -> dict[str, int]:
        """Return which arrays of a batch hold tokens, with the sizes of their vocabularies.

        Args:
          cfg: the family's config.
        """
        return {'input_ids': cfg.language.vocab, 'decoder_input_ids': cfg.language.vocab}

    def batch_like(
        self, cfg: FamilyConfig, size: int, *, prompt_tokens: int, answer_tokens: int
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the shapes of a training batch, as `data.processing` lays it out.

        Args:
          cfg: the family's config.
          size: number of rows.
          prompt_tokens: number of text tokens that each prompt is padded to.
          answer_tokens: number of tokens that each answer is padded to.
        """
        # `input_ids` hold the image's placeholders, the prompt and, for a decoder, the answer.
        tokens = prompt_tokens
        arrays = {'answer': jax.ShapeDtypeStruct((size, answer_tokens), jnp.bool_)}
        if 'vision' in self.tower_names:
            pixels = (size, 3, cfg.vision.image_size, cfg.vision.image_size)
            arrays['pixel_values'] = jax.ShapeDtypeStruct(pixels, jnp.float32)
            tokens += cfg.image_tokens
        # All other arrays are int32 [size, length].
        lengths = {'targets': answer_tokens}
        if cfg.language.tower.is_encoder_decoder:
            lengths['decoder_input_ids'] = answer_tokens  # the start token, and the answer but for its last token
        else:
            tokens += answer_tokens - 1  # a decoder reads the answer behind the prompt, but for its last token
        lengths |= dict.fromkeys(('input_ids', 'attention_mask'), tokens)
        if self.processor is not None and self.processor.has_token_types:
            lengths['token_type_ids'] = tokens
        if self.processor is not None and self.processor.has_instruction:
            lengths |= dict.fromkeys(('qformer_input_ids', 'qformer_attention_mask'), prompt_tokens)
        return arrays | {name: jax.ShapeDtypeStruct((size, length), jnp.int32) for name, length in lengths.items()}

    def unread(self, hf: HfConfig, cfg: FamilyConfig) -> dict[str, int]:
        """Return how many parameters a published file holds that nothing here reads, by what they are.

        Args:
          hf: the transformers config of a whole model.
          cfg: the family's config that was made from it.
        """
        if 'vision' not in self.tower_names:
            return {}
        return cfg.vision.tower.unread(hf.vision_config, cfg.vision)


class ImageFamily(Family):
    """A family of a vision tower, a bridge and a language tower; it states the bridge by `soft_words`."""

    tower_names = ('vision', 'language')

    @abc.abstractmethod
    def soft_words(
        self, w: dict, cfg: ImageConfig, batch: dict, run: Runner = scan_blocks
    ) -> Float[Array, 'batch soft dim']:
        """Return an image in the language model's embedding space, as many vectors as it has image tokens.

        Args:
          w: params, or the weights from `bind`.
          cfg: the family's config.
          batch: JAX arrays, see `models.model`; `pixel_values` are in the dtype of the language model.
          run: executes the towers' blocks.
        """

    def prompt(self, w: dict, cfg: ImageConfig, batch: dict, run: Runner = scan_blocks) -> Prompt:
        """Return the language tower's words, with the soft words in the places of the image tokens.

        Args:
          w: params, or the weights from `bind`.
          cfg: the family's config.
          batch: JAX arrays, see `models.model`.
          run: executes the towers' blocks.

        Raises:
          BatchError: see `prompts.embed_words_and_image`.
        """
        return prompts.embed_words_and_image(w, cfg, batch, lambda batch: self.soft_words(w, cfg, batch, run))


FAMILIES: Registry[Family] = Registry('family')


def register_family(family: Family, *model_types: str) -> Family:
    """Make a family known, and its processor with it.

    Args:
      family: the object; one may serve several model types.
      model_types: transformers' names of its models.

    Returns:
      The family.

    Raises:
      ValueError: a model type is registered already.
    """
    # The processor goes to a registry of its own, since `data/` stands below and knows no families.
    for model_type in model_types:
        FAMILIES.register(model_type, family)
        if family.processor is not None:
            PROCESSORS.register(model_type, family.processor)
    return family


def find_family(model_type: str, name: str = '') -> Family:
    """Return the family of a model.

    Args:
      model_type: transformers' name of the kind of model.
      name: a family to use instead: a registered model type, or `package.module:FAMILY`; '' for the model's own.

    Returns:
      The family.

    Raises:
      UnknownNameError: `name` cannot be found.
      UnsupportedModelError: no family is registered for this model type, or `name` is no family.
    """
    if not name:
        if model_type not in FAMILIES:
            known = ', '.join(sorted(FAMILIES))
            raise UnsupportedModelError(
                f'model_type {model_type!r}: expected one of {known}, or a family of your own as package.module:FAMILY'
            )
        return FAMILIES.find(model_type)
    family = FAMILIES.find(name)
    # An import by name may return any object; say so here, not where a method is first missed.
    if not isinstance(family, Family):
        raise UnsupportedModelError(f'{name} is a {type(family).__name__}: expected an object of the protocol Family')
    return family
