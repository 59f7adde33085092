"""Prune vision and language of BLIP-2 OPT-6.7B by Wanda, then restore both; see `base.py`.

  python launch/train.py --config=configs/paper/blip2_opt_6_7b.py:pattern=2:4,hardware=8gpu --workdir=runs/2-4

Restored and calibrated on `data/coco` and `data/vg`: 390 steps of 64 pairs.

The public code has no script that restores OPT: the data are those of its YAML file, and all other values are those of
the other models.
"""

from ml_collections import ConfigDict

from configs.paper import base


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the recipe; see `base.py` and `arguments.py` for `arg`."""
    return base.base_config(
        'Salesforce/blip2-opt-6.7b',
        arg,
        family='blip-2',
        data=f'{base.COCO},{base.VISUAL_GENOME}',
        captions='prefix',
        gpu_batch=32,
    )
