"""Language-only pruning of PaliGemma at 2:4 by Wanda, restored by SparseLoRA (arXiv 2404.02424).

  python launch/train.py --config=configs/paligemma_lang_only.py:data=FOLDER --workdir=runs/paligemma_lang_only

FOLDER holds images and a `data.jsonl`; another model of the family: `:model=DIRECTORY,data=FOLDER`.
Fields that are not set here are as in `blip2_lang_only.py`. Not yet run on published weights.
"""

from ml_collections import ConfigDict

from configs import arguments, blip2_lang_only


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: see `configs/arguments.py`."""
    return arguments.apply(base(), arg, pruned=('language',))


def base() -> ConfigDict:
    """The fields of `blip2_lang_only`, with what PaliGemma differs in."""
    config = blip2_lang_only.base()
    config.model = 'google/paligemma-3b-pt-224'
    config.data = 'data'
    config.text = ConfigDict(dict(prompt='answer en {}', prompt_tokens=32, answer_tokens=8))
    config.restore.shares = ()
    config.evaluate.num_beams = 5
    config.evaluate.length_penalty = -1.0
    for part in (config.prune.pattern, config.prune.group, config.lora.rank, config.lora.alpha, config.lora.targets):
        del part['qformer']  # there is none
    return config
