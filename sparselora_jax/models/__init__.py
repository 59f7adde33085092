"""Towers and families as pure functions. Importing the package registers the built-in ones."""

# One module per kind of model; each registers itself under its model types.
from sparselora_jax.models import blip2, blip2_retrieval, causal, llama, llava, opt, paligemma, t5, vit

__all__ = ['blip2', 'blip2_retrieval', 'causal', 'llama', 'llava', 'opt', 'paligemma', 't5', 'vit']
