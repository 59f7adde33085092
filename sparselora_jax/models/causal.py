"""A decoder-only language model alone: LLaMA, Mistral, Gemma, OPT."""

from dataclasses import dataclass
from typing import Any

from sparselora_jax.models import keys as names
from sparselora_jax.models import towers
from sparselora_jax.models.runners import scan_blocks
from sparselora_jax.runtime.errors import UnsupportedModelError

RENAMES = [(r'^(?=(decoder|layers|embed_tokens|norm)\.)', 'model.')]  # files of the model without its head
IGNORED = [r'.*\.rotary_emb\.inv_freq']


@dataclass(frozen=True)
class CausalConfig:
    language: Any


def prompt(w: dict, cfg: CausalConfig, batch: dict, run=scan_blocks) -> towers.Prompt:
    """The language model's input: its words."""
    del run
    words = towers.embed_tokens(w['language'], cfg.language, batch['input_ids'])
    return towers.Prompt(words, batch['attention_mask'].astype(bool))


def shapes(cfg: CausalConfig) -> dict:
    """The shape of every parameter, as a params tree of tuples."""
    return {'language': towers.shapes(cfg.language)}


def keys(cfg: CausalConfig) -> names.Keys:
    """Our path -> transformers' name in `LlamaForCausalLM` and its like."""
    return towers.keys(cfg.language, 'model.', '')


def from_hf(hf: Any) -> CausalConfig:
    """The config of a transformers config of a decoder-only language model.

    Raises:
      UnsupportedModelError: names the field whose value is not supported.
    """
    if getattr(hf, 'use_bidirectional_attention', None):
        raise UnsupportedModelError(f'use_bidirectional_attention of {hf.model_type}: only causal attention is known')
    return CausalConfig(towers.from_hf(hf))
