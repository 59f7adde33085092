"""Prune the vision tower of LLaVA-1.5 at 2:4 by Wanda, then restore it with SparseLoRA (arXiv 2404.02424).

  python launch/train.py --config=configs/llava_vision_only.py:data=FOLDER --workdir=runs/llava_vision_only

Everything else is as in `llava_lang_only.py`: LoRA is trained in every tower.
"""

from ml_collections import ConfigDict

from configs import llava_lang_only


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the recipe; see `arguments.py` for `arg`."""
    return llava_lang_only.get_config(arg, pruned=('vision',))
