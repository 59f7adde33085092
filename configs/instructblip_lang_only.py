"""Language-only pruning of InstructBLIP at 2:4 by Wanda, restored by SparseLoRA (arXiv 2404.02424).

  python launch/train.py --config=configs/instructblip_lang_only.py:data=FOLDER --workdir=runs/instructblip_lang_only

FOLDER holds images and a `data.jsonl`; another model of the family: `:model=DIRECTORY,data=FOLDER`.
Fields: `blip2_lang_only.py`; what differs: `base` below, `hub_model.py`. Not yet run on published weights.
"""

from ml_collections import ConfigDict

from configs import arguments, hub_model


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: see `configs/arguments.py`."""
    return arguments.apply(base(), arg, pruned=('language',))


def base() -> ConfigDict:
    """Every field, language only."""
    return hub_model.base('Salesforce/instructblip-flan-t5-xl', 'instructblip')
