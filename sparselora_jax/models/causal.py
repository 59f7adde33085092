"""A decoder-only language model without a vision tower: LLaMA, Mistral, Gemma, OPT."""

from dataclasses import dataclass

from sparselora_jax.models import towers
from sparselora_jax.models.config import HfConfig, LanguageConfig
from sparselora_jax.models.family import Family, register_family
from sparselora_jax.models.key_table import Keys
from sparselora_jax.models.prompts import Prompt, embed_words
from sparselora_jax.models.runners import Runner, scan_blocks
from sparselora_jax.runtime.errors import UnsupportedModelError


@dataclass(frozen=True)
class CausalConfig:
    """The config of a language model, the only tower of this family."""

    language: LanguageConfig

    @property
    def family(self) -> Family:
        """Return the family of this config."""
        return FAMILY


class CausalFamily(Family):
    """Language models that read text only."""

    name = 'causal'
    renames = ((r'^(?=(decoder|layers|embed_tokens|norm)\.)', 'model.'),)  # names in files saved without the head
    ignored = (r'.*\.rotary_emb\.inv_freq',)

    def from_hf(self, hf: HfConfig) -> CausalConfig:
        """Convert a transformers config of a decoder-only language model.

        Args:
          hf: a transformers config, such as a `LlamaConfig`.

        Returns:
          Our config.

        Raises:
          UnsupportedModelError: a field's value is not supported; names the field.
        """
        # Set for models whose tokens attend in both directions, such as text embedding models.
        if getattr(hf, 'use_bidirectional_attention', None):
            raise UnsupportedModelError(
                f'use_bidirectional_attention of {hf.model_type}: only causal attention is known'
            )
        # The whole config of a causal model has the form of the text config in other families.
        return CausalConfig(towers.language_from_hf(hf))

    def prompt(self, w: dict, cfg: CausalConfig, batch: dict, run: Runner = scan_blocks) -> Prompt:
        """Return the embeddings of the prompt's tokens.

        Args:
          w: params, or the weights from `bind`.
          cfg: the family's config.
          batch: JAX arrays, see `models.model`.
          run: unused, since no tower runs before the language model.
        """
        del run
        return embed_words(w, cfg, batch)

    def shapes(self, cfg: CausalConfig) -> dict:
        """Return the shape of every parameter, as a params tree of tuples.

        Args:
          cfg: the family's config.
        """
        return {'language': cfg.language.tower.shapes(cfg.language)}

    def keys(self, cfg: CausalConfig) -> Keys:
        """Return the key table: our paths -> parameter names in transformers' `LlamaForCausalLM` and similar models.

        Args:
          cfg: the family's config.
        """
        # In transformers, the tower is under `model.`, and the head is beside it.
        return towers.language_keys(cfg.language, 'model.', '')


FAMILY = register_family(CausalFamily(), 'llama', 'mistral', 'gemma', 'opt')
