"""Prune the language tower of PaliGemma at 2:4 by Wanda, then restore it with SparseLoRA (arXiv 2404.02424).

  python launch/train.py --config=configs/paligemma_lang_only.py:data=FOLDER --workdir=runs/paligemma_lang_only

FOLDER holds images and a `data.jsonl`. For another model of the family, use `:model=DIRECTORY,data=FOLDER`. The recipe
has not been run on published weights.

The file's name says which tower is pruned. LoRA is trained in all towers, also vision. `--config.lora.rank.vision=0`
leaves the vision tower unchanged. `base.py` lists every field of a recipe.
"""

from collections.abc import Sequence

from ml_collections import ConfigDict

from configs import arguments, hub_model


def get_config(arg: str | None = None, pruned: Sequence[str] = ('language',)) -> ConfigDict:
    """Return the recipe.

    Args:
      arg: the text after the colon of `--config=FILE:...`; see `arguments.py`.
      pruned: the towers that get the pattern; `paligemma_vision_only.py` and `paligemma_both.py` name others.
    """
    config = hub_model.base_config('google/paligemma-3b-pt-224', family='paligemma')
    return arguments.apply(config, arg, pruned=pruned)
