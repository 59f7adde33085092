"""Prune vision and language of InstructBLIP FlanT5-XL by Wanda, then restore both; see `base.py`.

  python launch/train.py --config=configs/paper/instructblip_flan_t5_xl.py:pattern=2:4,hardware=8gpu --workdir=runs/2-4

Restored and calibrated on `data/cc3m`: 390 steps of 64 pairs.
"""

from ml_collections import ConfigDict

from configs.paper import base


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the recipe; see `base.py` and `arguments.py` for `arg`."""
    return base.base_config(
        'Salesforce/instructblip-flan-t5-xl',
        arg,
        family='instructblip',
        data=base.CC3M,
        captions='instruct',
        gpu_batch=32,
    )
