"""Families of models: how towers form a model, and everything else that differs between families.

A family is an object that implements the protocol `Family`. Its own file registers it under transformers' `model_type`:

    class MyFamily(ImageFamily):
        name = 'my_family'
        ...

    FAMILY = register_family(MyFamily(), 'my_model_type')

Its config is a frozen dataclass that contains the towers' configs. `cfg.family` returns the family, so no second table
is needed. An unregistered family can be named as `package.module:FAMILY`.

Soft words are the vectors that represent an image in the language model's embedding space. Each replaces the embedding
of one image token.
"""

import abc
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparselora_jax.data.processor_spec import PROCESSORS, ProcessorSpec, kind_of_model
from sparselora_jax.data.task_format import TaskFormat, TaskKind
from sparselora_jax.models import prompts
from sparselora_jax.models.config import FamilyConfig, HfConfig, ImageConfig
from sparselora_jax.models.key_table import Keys
from sparselora_jax.models.prompts import Prompt
from sparselora_jax.models.runners import Runner, scan_blocks
from sparselora_jax.runtime.errors import UnsupportedModelError, calling
from sparselora_jax.runtime.registry import Registry


@runtime_checkable
class Family(Protocol):
    """A family of models: its towers, its shapes, the names in its files, its prompt.

    A subclass defines what has no default here. `ImageFamily` is the base class for models of images and text.

    Attributes:
      name: name in its recipes in `configs/`, such as 'llava'.
      tower_names: its towers in execution order; each is a field of its config and of its params.
      renames: (regex, replacement) pairs that convert the names in older files to current ones, applied in order.
      ignored: regexes of tensors in a file that no parameter uses; the key table takes precedence.
      processor: description of its processor; None: it has none.
      reads_generation_config: generation uses the directory's generation_config.json. False: the language model
        generates from embeddings, with the defaults of `text_config`. Pads are then not recognised by their id.
      is_prompted_by_image: an image without text is a valid prompt: its soft words, then the BOS token.
    """

    name: str
    tower_names: tuple[str, ...] = ('language',)
    renames: Sequence[tuple[str, str]] = ()
    ignored: Sequence[str] = ()
    processor: ProcessorSpec | None = None
    reads_generation_config: bool = True
    is_prompted_by_image: bool = False

    @property
    def has_language(self) -> bool:
        """Return whether its models generate text, by a language tower."""
        return 'language' in self.tower_names

    @abc.abstractmethod
    def from_hf(self, hf: HfConfig) -> FamilyConfig:
        """Convert a transformers config.

        Args:
          hf: the transformers config of a whole model.

        Returns:
          The family's config.

        Raises:
          UnsupportedModelError: a field's value is not supported; names the field.
        """

    @abc.abstractmethod
    def prompt(self, w: dict, cfg: FamilyConfig, batch: dict, run: Runner = scan_blocks) -> Prompt:
        """Return the language tower's input.

        Args:
          w: params, or the weights from `bind`.
          cfg: the family's config.
          batch: JAX arrays, including `attention_mask`; see `models.model`.
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
        """Return the key table: our paths -> current parameter names of transformers' model class.

        Args:
          cfg: the family's config.
        """

    def vocabularies(self, cfg: FamilyConfig) -> dict[str, int]:
        """Return the batch arrays that contain tokens, with their vocabulary sizes.

        Args:
          cfg: the family's config.
        """
        return {'input_ids': cfg.language.vocab, 'decoder_input_ids': cfg.language.vocab}

    def batch_like(
        self, cfg: FamilyConfig, size: int, *, prompt_tokens: int, answer_tokens: int
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the shapes of a training batch in the layout of `data.processing`.

        Args:
          cfg: the family's config.
          size: number of rows.
          prompt_tokens: number of text tokens that each prompt is padded to.
          answer_tokens: number of tokens that each answer is padded to.
        """
        # `input_ids` contain the image's placeholders, the prompt and, for a decoder-only model, the answer.
        tokens = prompt_tokens
        arrays = {'answer': jax.ShapeDtypeStruct((size, answer_tokens), jnp.bool_)}
        if 'vision' in self.tower_names:
            pixels = (size, 3, cfg.vision.image_size, cfg.vision.image_size)
            arrays['pixel_values'] = jax.ShapeDtypeStruct(pixels, jnp.float32)
            tokens += cfg.image_tokens
        # All other arrays are int32 [size, length].
        lengths = {'targets': answer_tokens}
        if cfg.language.tower.is_encoder_decoder:
            lengths['decoder_input_ids'] = answer_tokens  # the start token, and the answer without its last token
        else:
            tokens += answer_tokens - 1  # the answer without its last token follows the prompt
        lengths |= dict.fromkeys(('input_ids', 'attention_mask'), tokens)
        if self.processor is not None and self.processor.has_token_types:
            lengths['token_type_ids'] = tokens
        if self.processor is not None and self.processor.has_instruction:
            lengths |= dict.fromkeys(('qformer_input_ids', 'qformer_attention_mask'), prompt_tokens)
        return arrays | {name: jax.ShapeDtypeStruct((size, length), jnp.int32) for name, length in lengths.items()}

    def task_format(self, cfg: FamilyConfig, kind: TaskKind) -> TaskFormat:
        """Return how models of this family are asked in a kind of task.

        The default is the family's prompt for questions, and its bare prompt with a short instruction for captions.

        Args:
          cfg: the family's config.
          kind: kind of task.

        Raises:
          UnsupportedModelError: the family reads no images.
        """
        del cfg
        if self.processor is None:
            raise UnsupportedModelError(f'{self.name} models read no images, so they have no task of images')
        decoding = {'num_beams': 1, 'max_new_tokens': 64 if kind == 'caption' else 16}
        return TaskFormat(replace(self.processor.text, decoding=decoding), instruction='Describe the image briefly.')

    def unread(self, hf: HfConfig, cfg: FamilyConfig) -> dict[str, int]:
        """Return the numbers of parameters in a published file that no code here reads, by description.

        Args:
          hf: the transformers config of a whole model.
          cfg: the family's config, converted from `hf`.
        """
        if 'vision' not in self.tower_names:
            return {}
        return cfg.vision.tower.unread(hf.vision_config, cfg.vision)


class ImageFamily(Family):
    """A family with a vision tower, a bridge and a language tower; `soft_words` implements the bridge."""

    tower_names = ('vision', 'language')

    @abc.abstractmethod
    def soft_words(
        self, w: dict, cfg: ImageConfig, batch: dict, run: Runner = scan_blocks
    ) -> Float[Array, 'batch soft dim']:
        """Return the soft words of each image, one for each image token.

        Args:
          w: params, or the weights from `bind`.
          cfg: the family's config.
          batch: JAX arrays, see `models.model`; `pixel_values` are in the dtype of the language model.
          run: executes the towers' blocks.
        """

    def prompt(self, w: dict, cfg: ImageConfig, batch: dict, run: Runner = scan_blocks) -> Prompt:
        """Return word embeddings in which soft words replace the image tokens.

        Args:
          w: params, or the weights from `bind`.
          cfg: the family's config.
          batch: JAX arrays, see `models.model`.
          run: executes the towers' blocks.

        Raises:
          BatchError: see `prompts.embed_words_and_image`.
        """
        return prompts.embed_words_and_image(w, cfg, batch, lambda batch: self.soft_words(w, cfg, batch, run))


class RetrievalFamily(Family):
    """A family whose models compare images with texts, and generate no text: there is no language tower.

    Images and texts are first compared by embeddings, which each has by itself. That is cheap, so a search compares all
    of them. The best candidates are then compared by a pass that reads image and text together.
    """

    @abc.abstractmethod
    def image_features(
        self, w: dict, cfg: FamilyConfig, images: Float[Array, 'batch 3 height width'], run: Runner = scan_blocks
    ) -> Float[Array, 'batch patches dim']:
        """Return what both comparisons read of an image."""

    @abc.abstractmethod
    def image_embeddings(
        self, w: dict, cfg: FamilyConfig, features: Float[Array, 'batch patches dim'], run: Runner = scan_blocks
    ) -> Float[Array, 'batch queries embedding']:
        """Return the embeddings of each image, of length 1; the one nearest to a text counts."""

    @abc.abstractmethod
    def text_embeddings(
        self,
        w: dict,
        cfg: FamilyConfig,
        tokens: Int[Array, 'batch tokens'],
        valid: Bool[Array, 'batch tokens'],
        run: Runner = scan_blocks,
    ) -> Float[Array, 'batch embedding']:
        """Return the embedding of each text, of length 1."""

    @abc.abstractmethod
    def match_logits(
        self,
        w: dict,
        cfg: FamilyConfig,
        features: Float[Array, '#batch patches dim'],
        tokens: Int[Array, 'batch tokens'],
        valid: Bool[Array, 'batch tokens'],
        run: Runner = scan_blocks,
    ) -> Float[Array, 'batch 2']:
        """Return the logits of "no match" and "match" of each text with its image, or with the one that all share."""

    @abc.abstractmethod
    def hidden(
        self, w: dict, cfg: FamilyConfig, batch: dict, run: Runner = scan_blocks
    ) -> Float[Array, 'batch queries dim']:
        """Return the input of the matching head; this pass calibrates the kernels of all towers."""

    def prompt(self, w: dict, cfg: FamilyConfig, batch: dict, run: Runner = scan_blocks) -> Prompt:
        """Refuse: there is no language tower that could read a prompt.

        Args:
          w: params, or the weights from `bind`.
          cfg: the family's config.
          batch: JAX arrays.
          run: executes the towers' blocks.

        Raises:
          UnsupportedModelError: always.
        """
        raise UnsupportedModelError(no_language(self))

    def check_kind(self, kind: TaskKind) -> None:
        """Check that a task is one of retrieval.

        Args:
          kind: kind of task.

        Raises:
          UnsupportedModelError: it is not.
        """
        if kind != 'retrieval':
            raise UnsupportedModelError(no_language(self))


def no_language(family: Family) -> str:
    """Return why a model of this family generates no text, and what to do.

    Args:
      family: a family without a language tower.
    """
    return (
        f'{family.name} models compare images with texts and generate no text: score them on tasks of retrieval, or '
        'give a model with a language tower'
    )


FAMILIES: Registry[Family] = Registry('family')


def register_family(family: Family, *model_types: str) -> Family:
    """Register a family and its processor.

    Args:
      family: the family; it may serve several model types.
      model_types: the `model_type` values of its models in transformers; `model_type/architecture` for a class of
        transformers that shares its `model_type` with models of another family.

    Returns:
      The family.

    Raises:
      ValueError: a model type is registered already.
    """
    # The processor has a separate registry, since `data/` is a lower layer and cannot import families.
    for model_type in model_types:
        FAMILIES.register(model_type, family)
        if family.processor is not None:
            PROCESSORS.register(model_type, family.processor)
    return family


def find_family(model_type: str, name: str = '', architectures: object = None) -> Family:
    """Return the family of a model.

    Args:
      model_type: the model's `model_type` in transformers.
      name: the family that the caller expects, as a registered model type; or another family to use, as
        `package.module:FAMILY`; '' for the model's own.
      architectures: the `architectures` of the model's config, see `kind_of_model`.

    Returns:
      The family.

    Raises:
      UnknownNameError: `name` cannot be found.
      UnsupportedModelError: no family is registered for this model type, the model is of another family than the
        expected one, or `name` is not a family.
    """
    if not name or name in FAMILIES:
        kind = kind_of_model(FAMILIES, model_type, architectures)
        if kind not in FAMILIES:
            # Without those that are told apart by an architecture: the model type is what is unknown.
            known = ', '.join(sorted(key for key in FAMILIES if '/' not in key))
            raise UnsupportedModelError(
                f'model_type {model_type!r}: expected one of {known}, or a family of your own as package.module:FAMILY'
            )
        own = FAMILIES.find(kind)
        if problem := other_family(own, name):
            raise UnsupportedModelError(f'model_type {kind!r} is {problem}')
        return own
    family = FAMILIES.find(name)
    # An import by name may return any object. Raise here, not where a missing method is first used.
    if isinstance(family, type) or not isinstance(family, Family):
        raise UnsupportedModelError(f'{name} is a {type(family).__name__}: expected an object of the protocol Family')
    return family


def other_family(own: Family, expected: str) -> str:
    """Return why a model is not of the expected family, and what to do; '' if it is of that family.

    Two families may have the same towers, so their names are compared.

    Args:
      own: the model's family.
      expected: a registered model type; any other name asks for no registered family.
    """
    if expected not in FAMILIES or FAMILIES.find(expected) is own:
        return ''
    return f'of the family {own.name}, not {FAMILIES.find(expected).name}: {use_recipe_of(own)}'


def use_recipe_of(family: Family) -> str:
    """Return the end of an error message that tells which recipe to use.

    Args:
      family: the family of the model.
    """
    # A recipe lays out images and texts by the family's processor, and trains the language tower's answers.
    has_recipes = family.processor is not None and family.has_language
    recipes = f'such as configs/{family.name}_lang_only.py' if has_recipes else f'and {family.name} models have none'
    return f'use a recipe of the same family, {recipes}'


def config_of(family: Family, hf: HfConfig) -> FamilyConfig:
    """Return a family's config of a model, and check that it leads back to the family.

    Args:
      family: the family.
      hf: the transformers config of a whole model.

    Raises:
      UnsupportedModelError: a field's value is not supported; `from_hf` fails; or the config is that of another family.
    """
    kind = type(family).__name__
    with calling(f'from_hf of family {kind}', UnsupportedModelError):
        cfg = family.from_hf(hf)
    # A model finds its family by its config. So an inherited config would run the parent's code without a word.
    if getattr(cfg, 'family', None) is not family:
        raise UnsupportedModelError(
            f'from_hf of family {kind} returned a {type(cfg).__name__}, which does not lead back to the family: return '
            'a config class of your own, whose property `family` returns your family (docs/extending.md)'
        )
    return cfg
