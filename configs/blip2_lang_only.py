"""Prune the language tower of BLIP-2 at 2:4 by Wanda, then restore it with SparseLoRA (arXiv 2404.02424).

  python launch/train.py --config=configs/blip2_lang_only.py --workdir=runs/demo

The file's name says which tower is pruned. LoRA is trained in all towers, also vision and Q-Former, as in the paper.
`--config.lora.rank.vision=0` leaves the vision tower unchanged.

The model is the embedded one: SmolLM2-135M-Instruct and a bridge trained on easy-VQA. `base.py` lists every field of a
recipe. Override a field with e.g. `--config.restore.steps=300`.

Cost: 10 minutes on 2 slow CPU cores (restoration 4.8), 2.7 GiB of memory. Accuracy on 1,000 test questions: dense
99.4 %, pruned 51.2 %, restored 99.6 %; perplexity of the language tower 38, 424, 448. `--config.restore.control=True`
trains the same LoRA budget on the dense model too.
"""

from collections.abc import Sequence

from ml_collections import ConfigDict

from configs import arguments
from configs.base import base_config


def get_config(arg: str | None = None, pruned: Sequence[str] = ('language',)) -> ConfigDict:
    """Return the recipe.

    Args:
      arg: the text after the colon of `--config=FILE:...`; see `arguments.py`.
      pruned: the towers that get the pattern; `blip2_vision_only.py` and `blip2_both.py` name others.
    """
    config = base_config()
    # Some of these values are the defaults. They are repeated because the accuracy above depends on them.
    config.model = 'embedded'
    config.family = 'blip-2'
    config.data = 'easy_vqa'
    config.prune.method = 'wanda'
    config.prune.samples = 128
    config.lora.rank = ConfigDict({'vision': 4, 'qformer': 2, 'language': 8})
    # Far shorter than the paper's run (one epoch of 25k pairs at batch 32), so its peak learning rate is higher.
    config.restore.steps = 100
    config.restore.batch = 8
    config.restore.peak = 1e-3
    config.evaluate.questions = 1000
    return arguments.apply(config, arg, pruned=pruned)
