"""Vision and language pruning of PaliGemma at 2:4 by Wanda, restored by SparseLoRA (arXiv 2404.02424).

  python launch/train.py --config=configs/paligemma_both.py:data=FOLDER --workdir=runs/paligemma_both

FOLDER holds images and a `data.jsonl`; another model of the family: `:model=DIRECTORY,data=FOLDER`.
Everything else is as in `paligemma_lang_only.py`. Not yet run on published weights.
"""

from ml_collections import ConfigDict

from configs import arguments, paligemma_lang_only


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: see `configs/arguments.py`."""
    return arguments.apply(paligemma_lang_only.base(), arg, pruned=('vision', 'language'))
