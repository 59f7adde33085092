"""Prune vision and language of InstructBLIP Vicuna-13B by Wanda, then restore both; see `base.py`.

  python launch/train.py --config=configs/paper/instructblip_vicuna_13b.py:pattern=2:4,hardware=8gpu --workdir=runs/2-4

Restored on `data/coco` and `data/cc3m`, calibrated on `data/coco` and `data/vg`: 3,125 steps of 8 pairs.
"""

from ml_collections import ConfigDict

from configs.paper import base


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the recipe; see `base.py` and `arguments.py` for `arg`."""
    return base.base_config(
        'Salesforce/instructblip-vicuna-13b',
        arg,
        family='instructblip',
        data=f'{base.COCO},{base.CC3M}',
        captions='instruct',
        gpu_batch=4,
        calibration=f'{base.COCO},{base.VISUAL_GENOME}',
    )
