"""Which module runs a language tower, by the class of its config; and what a tower is given to read."""

from types import ModuleType
from typing import Any, NamedTuple

from jaxtyping import Array, Bool, Float

from sparselora_jax.models import llama, opt, t5


class Prompt(NamedTuple):
    """A language tower's input.

    `prefix`: tokens that read each other both ways (PaliGemma's prompt); None: attention is causal.
    """

    x: Float[Array, 'batch tokens dim']
    valid: Bool[Array, 'batch tokens']
    prefix: Bool[Array, 'batch tokens'] | None = None


LANGUAGE: dict[type, ModuleType] = {llama.LlamaConfig: llama, opt.OptConfig: opt, t5.T5Config: t5}


def language(cfg: Any) -> ModuleType:
    """The module of a language tower's config."""
    return LANGUAGE[type(cfg)]


def embed_tokens(w: dict, cfg: Any, tokens: Any) -> Float[Array, 'batch tokens dim']:
    """Word embeddings of whatever language tower it is."""
    return language(cfg).embed_tokens(w, cfg, tokens)


def shapes(cfg: Any) -> dict:
    """The shape of every parameter of a language tower."""
    return language(cfg).shapes(cfg)
