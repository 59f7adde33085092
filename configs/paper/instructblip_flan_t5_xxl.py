"""Prune vision and language of InstructBLIP FlanT5-XXL by Wanda, then restore both (arXiv 2404.02424).

  python launch/train.py --config=configs/paper/instructblip_flan_t5_xxl.py:pattern=2:4,hardware=8gpu --workdir=runs/2-4

Files (docs/reproduce.md): `data/cc3m`, for restoration and calibration; and those of the benchmarks. The run has
1,562 steps of 16 pairs.

docs/reproduce.md has no score of the paper for this model.

Not compiled here; `launch/compile.py` with this recipe gives its memory, time and cost, as in docs/reproduce.md.
"""

from ml_collections import ConfigDict

from configs.paper import base


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the recipe; see `base.py` and `arguments.py` for `arg`."""
    return base.base_config(
        'Salesforce/instructblip-flan-t5-xxl',
        arg,
        family='instructblip',
        data=base.CC3M,
        captions='instruct',
        gpu_batch=8,
    )
