"""What every family shares once its images have become soft words: hidden states, logits, the answer's logits.

A batch is a dict of arrays under the names of the transformers processors: `pixel_values` [batch, 3, height, width],
`input_ids` (image placeholders included), `attention_mask` (0: a pad, wherever it lies), for InstructBLIP
`qformer_input_ids` and `qformer_attention_mask`, for PaliGemma `token_type_ids` (0: image and prompt), for
encoder-decoders `decoder_input_ids`.
"""

from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparselora_jax.models import blip2, causal, llava, paligemma, towers
from sparselora_jax.models.runners import scan_blocks
from sparselora_jax.runtime.errors import UnsupportedModelError
from sparselora_jax.sparse import rules

FAMILIES: dict[type, ModuleType] = {
    blip2.Blip2Config: blip2,
    causal.CausalConfig: causal,
    llava.LlavaConfig: llava,
    paligemma.PaliGemmaConfig: paligemma,
}
FAMILY_OF: dict[str, ModuleType] = {  # by transformers' model_type
    'blip-2': blip2,
    'instructblip': blip2,
    'llava': llava,
    'paligemma': paligemma,
    'llama': causal,
    'mistral': causal,
    'gemma': causal,
    'opt': causal,
}


def from_hf(hf: Any) -> Any:
    """The family's config from transformers' config.

    Raises:
      UnsupportedModelError: no family knows the model, or a field's value.
    """
    if hf.model_type not in FAMILY_OF:
        raise UnsupportedModelError(f'model_type {hf.model_type!r}: expected one of {", ".join(FAMILY_OF)}')
    return FAMILY_OF[hf.model_type].from_hf(hf)


def abstract_params(cfg: Any, dtype: Any = 'float32') -> dict:
    """A params tree of `jax.ShapeDtypeStruct`s, from a family's config."""
    flat = rules.flatten(FAMILIES[type(cfg)].shapes(cfg))
    return rules.unflatten({path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in flat.items()})


def _arrays(batch: dict) -> dict:
    return {name: jnp.asarray(array) for name, array in batch.items()}


@dataclass(frozen=True)
class Generation:
    """What decoding needs to know of a model: its special tokens, and the defaults that its directory names."""

    eos: tuple[int, ...]
    pad: int
    start: int | None = None  # of an encoder-decoder's decoder
    bos: int | None = None  # the prompt of an image without one
    options: tuple[tuple[str, Any], ...] = ()  # num_beams, max_length, ... of generation_config.json


@dataclass(frozen=True)
class Model:
    """A model without its weights: hashable, so that a jitted function may take it as a static argument.

    Attributes:
      cfg: of its family, e.g. `blip2.Blip2Config`; the towers' configs lie in it.
      generation: see `Generation`.
      source: the Hugging Face directory it was read from; None for the embedded model.
    """

    cfg: Any
    generation: Generation
    source: str | None = field(default=None, compare=False)

    @property
    def family(self) -> ModuleType:
        """The module that composes its towers."""
        return FAMILIES[type(self.cfg)]

    @property
    def language(self) -> ModuleType:
        """The module of its language tower."""
        return towers.language(self.cfg.language)

    @property
    def encoder_decoder(self) -> bool:
        """Whether its language tower is one: then `decoder_input_ids` are what is predicted from."""
        return hasattr(self.language, 'encode')

    def prompt(self, weights: dict, batch: dict, run=scan_blocks) -> towers.Prompt:
        """What the language tower reads.

        Raises:
          BatchError: the batch does not fit the model; where values are known (not under jit), see also
            `towers.check_ids`.
        """
        towers.check_ids(self.cfg, batch)
        batch = _arrays(batch)
        batch.setdefault('attention_mask', jnp.ones_like(batch['input_ids']))
        return self.family.prompt(weights, self.cfg, batch, run)

    def hidden(self, weights: dict, batch: dict, run=scan_blocks) -> Float[Array, 'batch tokens dim']:
        """Hidden states before the head: of every token, or of the decoder's tokens.

        `run`: the runner (see `models.runners`).
        """
        batch = _arrays(batch)
        prompt, w, cfg = self.prompt(weights, batch, run), weights['language'], self.cfg.language
        if not self.encoder_decoder:
            return self.language.forward(w, cfg, prompt.x, prompt.valid, run, prefix=prompt.prefix)
        encoded = self.language.encode(w, cfg, prompt.x, prompt.valid, run)
        tokens = batch.get('decoder_input_ids')
        if tokens is None:
            tokens = jnp.full((prompt.x.shape[0], 1), self.generation.start, jnp.int32)
        valid = batch.get('decoder_attention_mask', jnp.ones_like(tokens)).astype(bool)
        return self.language.decode(w, cfg, tokens, valid, encoded, prompt.valid, run)

    def head(self, weights: dict, hidden: Float[Array, '*batch dim']) -> Float[Array, '*batch vocab']:
        """Logits of hidden states, in fp32."""
        return self.language.head(weights['language'], self.cfg.language, hidden)

    def logits(self, weights: dict, batch: dict, run=scan_blocks) -> Float[Array, 'batch tokens vocab']:
        """Logits of every token of `input_ids`, or of `decoder_input_ids`, in fp32.

        Args:
          weights: params, or what `bind` made of them.
          batch: see the module's text; NumPy arrays.
        """
        return self.head(weights, self.hidden(weights, batch, run))

    def answer_logits(self, weights: dict, batch: dict, run=scan_blocks) -> Float[Array, 'batch answer vocab']:
        """Logits that predict `batch['targets']`: the last positions alone, since the head is the largest matrix."""
        return self.head(weights, self.hidden(weights, batch, run)[:, -batch['targets'].shape[1] :])

    def shapes(self) -> dict:
        """The shape of every parameter, as a params tree of tuples."""
        return self.family.shapes(self.cfg)
