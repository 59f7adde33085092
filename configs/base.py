"""Return every field of a recipe with its default; to write a recipe, copy `blip2_lang_only.py`.

A recipe calls `base_config()`, changes some fields, and lets `arguments.apply` set the patterns. On the command line,
set a field with `--config.NAME=VALUE`, e.g. `--config.restore.steps=300`. `sparselora_jax/recipe/fields.py` lists all
fields with default, legal values and meaning. `--help_config` of a script prints this list. Values are checked before
any work begins.
"""

from ml_collections import ConfigDict

from sparselora_jax import recipe


def base_config() -> ConfigDict:
    """Return every field with its default: the embedded model on easy-VQA, its language tower pruned at 2:4."""
    return recipe.default_config()
