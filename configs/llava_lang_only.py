"""Language-only pruning of LLaVA-1.5 at 2:4 by Wanda, restored by SparseLoRA (arXiv 2404.02424).

  python launch/train.py --config=configs/llava_lang_only.py:data=FOLDER --workdir=runs/llava_lang_only

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
    return hub_model.base('llava-hf/llava-1.5-7b-hf', 'llava')
