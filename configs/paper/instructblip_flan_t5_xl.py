"""Prune vision and language of InstructBLIP FlanT5-XL by Wanda, then restore both (arXiv 2404.02424).

  python launch/train.py --config=configs/paper/instructblip_flan_t5_xl.py:pattern=2:4,hardware=8gpu --workdir=runs/2-4

Files (docs/reproduce.md): `data/cc3m`, for restoration and calibration; and those of the benchmarks. The run has 390
steps of 64 pairs.

Average score in the paper at 50 %, 2:4 and 4:8, Wanda alone -> restored: 65.9 -> 68.9, 55.7 -> 66.3, 61.5 -> 67.6.

Restoring on 16 TPU v5e takes at least 0.15 s a step and 0.30 dollars, and 3.5 of the 16 GiB of a chip (command in
docs/reproduce.md).
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
