"""A model without its weights: the forward that all families share after images have become soft words.

A batch is a dict of arrays with the names of the transformers processors: `pixel_values` [batch, 3, height, width],
`input_ids` (including image placeholders) and `attention_mask` (0 marks a pad, at any position). InstructBLIP also
needs `qformer_input_ids` and `qformer_attention_mask`, PaliGemma `token_type_ids` (0 marks image and prompt), and
encoder-decoders `decoder_input_ids`.
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from sparselora_jax.models import prompts
from sparselora_jax.models.config import FamilyConfig, HfConfig
from sparselora_jax.models.family import Family, config_of, find_family, no_language
from sparselora_jax.models.runners import Runner, scan_blocks
from sparselora_jax.models.towers import LanguageTower
from sparselora_jax.runtime.errors import UnsupportedModelError
from sparselora_jax.sparse.rules import flatten, unflatten


def from_hf(hf: HfConfig, family: str = '') -> FamilyConfig:
    """Convert a transformers config.

    Args:
      hf: the transformers config of a whole model.
      family: another family to use, see `family.find_family`; '' for the model's own.

    Returns:
      The family's config.

    Raises:
      UnsupportedModelError: no family supports the model; or see `family.config_of`.
    """
    return config_of(find_family(hf.model_type, family, getattr(hf, 'architectures', None)), hf)


@dataclass(frozen=True)
class Generation:
    """The facts about a model that decoding needs: its special tokens, and the defaults from its directory.

    Attributes:
      eos: tokens that end a text.
      pad: token that pads texts that end early.
      start: the first token of an encoder-decoder's answers; None: the model is not an encoder-decoder.
      bos: the prompt of an image without text; None: the model always needs a prompt.
      options: (name, value) pairs of generation_config.json, such as num_beams and max_length.
    """

    eos: tuple[int, ...]
    pad: int
    start: int | None = None
    bos: int | None = None
    options: tuple[tuple[str, Any], ...] = ()  # not a dict, so that a model is hashable


@dataclass(frozen=True)
class Model:
    """A model without its weights, hashable so that it can be a static argument of a jitted function.

    Attributes:
      cfg: its family's config, e.g. `blip2.Blip2Config`, which contains the towers' configs.
      generation: see `Generation`.
      source: the Hugging Face directory it was read from; None for the embedded model.
    """

    cfg: FamilyConfig
    generation: Generation
    # Not compared, so that models with the same config from different directories share compiled programs.
    source: str | None = field(default=None, compare=False)

    @property
    def family(self) -> Family:
        """Return the model's family."""
        return self.cfg.family

    @property
    def language(self) -> LanguageTower:
        """Return the model's language tower.

        Raises:
          UnsupportedModelError: the model has none.
        """
        check_language(self.cfg)
        return self.cfg.language.tower

    @property
    def is_encoder_decoder(self) -> bool:
        """Return whether answers are decoded separately from the prompt, from `decoder_input_ids`."""
        return self.language.is_encoder_decoder

    def prompt(self, weights: dict, batch: dict, run: Runner = scan_blocks) -> prompts.Prompt:
        """Return the language tower's input.

        Args:
          weights: params, or the weights from `bind`.
          batch: see the module docstring; arrays of NumPy or JAX.
          run: executes the towers' blocks.

        Raises:
          BatchError: the batch does not fit the model; outside jit, where values are known, see also
            `prompts.check_ids`.
        """
        prompts.check_ids(self.cfg, batch)
        batch = _to_jax(batch)
        batch.setdefault('attention_mask', jnp.ones_like(batch['input_ids']))
        return self.family.prompt(weights, self.cfg, batch, run)

    def is_image(self, batch: dict) -> Bool[Array, 'batch tokens'] | None:
        """Return which tokens of `input_ids` stand for an image; None: the model takes no images.

        Args:
          batch: see the module docstring.
        """
        image_token = getattr(self.cfg, 'image_token', None)
        return None if image_token is None else jnp.asarray(batch['input_ids']) == image_token

    def hidden(self, weights: dict, batch: dict, run: Runner = scan_blocks) -> Float[Array, 'batch tokens dim']:
        """Return the hidden states before the head, of every token (for an encoder-decoder, of the decoder's tokens).

        Those of a retrieval model are of the queries that have read image and text (`RetrievalFamily.hidden`).

        Args:
          weights: params, or the weights from `bind`.
          batch: see the module docstring; arrays of NumPy or JAX.
          run: executes the towers' blocks.

        Raises:
          BatchError: see `prompt`.
        """
        batch = _to_jax(batch)
        if not self.family.has_language:
            prompts.check_ids(self.cfg, batch)
            return self.family.hidden(weights, self.cfg, batch, run)
        prompt = self.prompt(weights, batch, run)
        w = weights['language']
        cfg = self.cfg.language
        if not self.is_encoder_decoder:
            return self.language.forward(w, cfg, prompt.x, prompt.valid, run, prefix=prompt.prefix)
        encoded = self.language.encode(w, cfg, prompt.x, prompt.valid, run)
        tokens = batch.get('decoder_input_ids')
        if tokens is None:  # predict the answer's first token from the start token alone
            tokens = jnp.full((prompt.x.shape[0], 1), self.generation.start, jnp.int32)
        # Training batches have no such mask, because an answer's pads come last and no earlier token attends to them.
        valid = batch.get('decoder_attention_mask', jnp.ones_like(tokens)).astype(bool)
        return self.language.decode(w, cfg, tokens, valid, encoded, prompt.valid, run)

    def head(self, weights: dict, hidden: Float[Array, '*batch dim']) -> Float[Array, '*batch vocab']:
        """Return logits of hidden states, in fp32.

        Args:
          weights: params, or the weights from `bind`.
          hidden: the result of `hidden`, or any slice of it.
        """
        return self.language.head(weights['language'], self.cfg.language, hidden)

    def logits(self, weights: dict, batch: dict, run: Runner = scan_blocks) -> Float[Array, 'batch tokens vocab']:
        """Return logits of every token of `input_ids` (or `decoder_input_ids`), in fp32.

        Args:
          weights: params, or the weights from `bind`.
          batch: see the module docstring; arrays of NumPy or JAX.
          run: executes the towers' blocks.

        Raises:
          BatchError: see `prompt`.
        """
        return self.head(weights, self.hidden(weights, batch, run))

    def answer_logits(
        self, weights: dict, batch: dict, run: Runner = scan_blocks
    ) -> Float[Array, 'batch answer vocab']:
        """Return the logits that predict `batch['targets']`.

        The head is the largest matrix of many models, so it is applied to the last positions only.

        Args:
          weights: params, or the weights from `bind`.
          batch: see the module docstring; `targets` [batch, answer] determine the number of positions.
          run: executes the towers' blocks.

        Raises:
          BatchError: see `prompt`.
        """
        # `data.processing` puts these positions last, both for decoder-only models and for encoder-decoders.
        answer_tokens = batch['targets'].shape[1]
        return self.head(weights, self.hidden(weights, batch, run)[:, -answer_tokens:])

    def shapes(self) -> dict:
        """Return the shape of every parameter, as a params tree of tuples."""
        return self.family.shapes(self.cfg)


def _to_jax(batch: dict) -> dict[str, Array]:
    return {name: jnp.asarray(array) for name, array in batch.items()}


def check_language(cfg: FamilyConfig) -> None:
    """Check that a model generates text.

    Args:
      cfg: its family's config.

    Raises:
      UnsupportedModelError: it has no language tower.
    """
    if cfg.language is None:
        raise UnsupportedModelError(no_language(cfg.family))


def abstract_model(cfg: FamilyConfig) -> Model:
    """Return a model for tracing and counting by shapes, with arbitrary special tokens.

    Args:
      cfg: a family's config.
    """
    return Model(cfg, Generation(eos=(0,), pad=0, start=0))


def abstract_params(cfg: FamilyConfig, dtype: DTypeLike = 'float32') -> dict:
    """Return a params tree whose leaves are `jax.ShapeDtypeStruct`.

    Args:
      cfg: a family's config.
      dtype: dtype of every parameter.
    """
    shapes = flatten(cfg.family.shapes(cfg))
    return unflatten({path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in shapes.items()})
