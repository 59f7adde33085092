"""Prune vision and language of BLIP-2 FlanT5-XL by Wanda, then restore both (arXiv 2404.02424).

  python launch/train.py --config=configs/paper/blip2_flan_t5_xl.py:pattern=2:4,hardware=8gpu --workdir=runs/2-4

Files (docs/reproduce.md): `data/cc3m`, for restoration and calibration; and those of the benchmarks. The run has 390
steps of 64 pairs.

docs/reproduce.md has no score of the paper for this model.

Not compiled here; `launch/compile.py` with this recipe gives its memory, time and cost, as in docs/reproduce.md.
"""

from ml_collections import ConfigDict

from configs.paper import base


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the recipe; see `base.py` and `arguments.py` for `arg`."""
    return base.base_config(
        'Salesforce/blip2-flan-t5-xl',
        arg,
        family='blip-2',
        data=base.CC3M,
        captions='prefix',
        gpu_batch=32,
    )
