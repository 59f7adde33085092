"""Prune vision and language of BLIP-2 OPT-2.7B by Wanda, then restore both (arXiv 2404.02424).

  python launch/train.py --config=configs/paper/blip2_opt_2_7b.py:pattern=2:4,hardware=8gpu --workdir=runs/2-4

Files (docs/reproduce.md): `data/coco` and `data/vg`, for restoration and calibration; and those of the benchmarks.
The run has 390 steps of 64 pairs.

docs/reproduce.md has no score of the paper for this model.

The public code has no script that restores OPT: the data are those of its YAML file for OPT, and all other values are
those of the other models.

Not compiled here; `launch/compile.py` with this recipe gives its memory, time and cost, as in docs/reproduce.md.
"""

from ml_collections import ConfigDict

from configs.paper import base


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the recipe; see `base.py` and `arguments.py` for `arg`."""
    return base.base_config(
        'Salesforce/blip2-opt-2.7b',
        arg,
        family='blip-2',
        data=f'{base.COCO},{base.VISUAL_GENOME}',
        captions='prefix',
        gpu_batch=32,
    )
