"""Prune vision and language of InstructBLIP Vicuna-7B by Wanda, then restore both (arXiv 2404.02424).

  python launch/train.py --config=configs/paper/instructblip_vicuna_7b.py:pattern=2:4,hardware=8gpu --workdir=runs/2-4

Files (docs/reproduce.md): `data/coco` and `data/cc3m` for restoration, `data/coco` and `data/vg` for calibration; and
those of the benchmarks. The run has 781 steps of 32 pairs.

Average score in the paper at 50 %, 2:4 and 4:8, Wanda alone -> restored: 66.1 -> 69.6, 52.8 -> 65.9, 59.5 -> 67.5.

Restoring on 16 TPU v5e takes at least 0.29 s a step and 1.20 dollars, and 4.5 of the 16 GiB of a chip (command in
docs/reproduce.md).
"""

from ml_collections import ConfigDict

from configs.paper import base


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the recipe; see `base.py` and `arguments.py` for `arg`."""
    return base.base_config(
        'Salesforce/instructblip-vicuna-7b',
        arg,
        family='instructblip',
        data=f'{base.COCO},{base.CC3M}',
        captions='instruct',
        gpu_batch=16,
        calibration=f'{base.COCO},{base.VISUAL_GENOME}',
    )
