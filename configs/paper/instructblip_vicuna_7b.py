"""Prune vision and language of InstructBLIP Vicuna-7B by Wanda, then restore both; see `base.py`.

  python launch/train.py --config=configs/paper/instructblip_vicuna_7b.py:pattern=2:4,hardware=8gpu --workdir=runs/2-4

Restored on `data/coco` and `data/cc3m`, calibrated on `data/coco` and `data/vg`: 781 steps of 32 pairs.
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
