"""Every pruner and every allocation of sparsity over layers, vision and language alike: what each costs and keeps.

  python launch/sweep.py --config=configs/sweeps/methods.py --workdir=runs/methods

Allocations have no N:M. Global magnitude compares weights of the whole model, so its pruner is magnitude; without the
bound of 90 % it prunes layers of the vision encoder, whose weights are the smaller ones, away whole. The other
allocations go with Wanda, as their papers have it. Argument and budgets: `grid.py`.
"""

from ml_collections import ConfigDict

from configs.sweeps import grid
from sparselora_jax.jobs.sweep import Point

PATTERNS = {'50 %': '0.5', '2:4': '2:4', '70 %': '0.7'}
PRUNERS = {'random': 'random', 'magnitude': 'magnitude', 'Wanda': 'wanda', 'SparseGPT': 'sparsegpt', 'DSnoT': 'dsnot'}
WANDA = {'prune.method': 'wanda'}
MATRIX = {'prune.group.vision': 'matrix', 'prune.group.language': 'matrix'}
ALLOCATIONS = {
    'global magnitude': {'prune.method': 'magnitude', 'prune.allocation': 'global_magnitude', 'prune.highest': 0.9}
    | MATRIX,
    'OWL': WANDA | {'prune.allocation': 'owl'},
    'ECoFLaP, first order': WANDA | {'prune.allocation': 'ecoflap_first'},
    'ECoFLaP, zeroth order': WANDA | {'prune.allocation': 'ecoflap_zeroth'},
}


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: see `grid.py`."""
    towers, points = tuple(grid.base(arg).prune.pattern), []
    methods = {label: {'prune.method': name} for label, name in PRUNERS.items()}
    for label, pattern in PATTERNS.items():
        for method, fields in (methods if ':' in pattern else methods | ALLOCATIONS).items():
            fields = grid.patterns(towers, vision=pattern, language=pattern) | fields
            points.append(Point(grid.name(method, label), {'pattern': label, 'method': method}, fields))
    plot = {'kind': 'bars', 'x': 'pattern', 'series': 'method', 'title': 'Pruners and allocations'}
    hour = grid.budget(seeds=1, steps=40, batch=8, questions=300, samples=128)
    full = grid.budget(seeds=3, steps=200, batch=16, questions=2000, samples=128, scored=32)
    return grid.config('methods', arg, points, plot, hour=hour, full=full)
