"""Towers and families as pure functions. Importing the package registers the built-in ones."""

# One module a kind; each registers itself under the model types that it knows.
from sparselora_jax.models import blip2, causal, llama, llava, opt, paligemma, t5, vit

__all__ = ['blip2', 'causal', 'llama', 'llava', 'opt', 'paligemma', 't5', 'vit']
