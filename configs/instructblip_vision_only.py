"""Prune the vision tower of InstructBLIP at 2:4 by Wanda, then restore it with SparseLoRA (arXiv 2404.02424).

  python launch/train.py --config=configs/instructblip_vision_only.py:data=FOLDER --workdir=runs/instructblip

Everything else is as in `instructblip_lang_only.py`: LoRA is trained in every tower.
"""

from ml_collections import ConfigDict

from configs import instructblip_lang_only


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the recipe; see `arguments.py` for `arg`."""
    return instructblip_lang_only.get_config(arg, pruned=('vision',))
