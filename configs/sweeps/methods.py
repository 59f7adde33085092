"""Compare pruning methods and allocations over layers, with the same pattern for vision and language.

  python launch/sweep.py --config=configs/sweeps/methods.py --workdir=runs/methods

N:M patterns leave nothing to allocate, so allocations are only compared at 50 and 70 %. Global magnitude compares
weights of the whole model, so its method is magnitude. The vision encoder has smaller weights, and global magnitude
without a bound of 90 % would remove whole layers of it. The other allocations use Wanda, as their papers do. `grid.py`
describes the argument and the budgets.
"""

from ml_collections import ConfigDict

from configs.sweeps import grid
from sparselora_jax.jobs.sweep import Point

PATTERNS = {'50 %': '0.5', '2:4': '2:4', '70 %': '0.7'}
PRUNERS = {
    'random': 'random',
    'magnitude': 'magnitude',
    'Wanda': 'wanda',
    'SparseGPT': 'sparsegpt',
    'DSnoT': 'dsnot',
    'RIA': 'ria',
    'ADMM': 'admm',
}
# Reconstruction follows any method, so it is a row of its own at every pattern.
RECONSTRUCTED = {'Wanda, reconstructed': {'prune.method': 'wanda', 'prune.reconstruct.passes': 4}}
WANDA = {'prune.method': 'wanda'}
MATRIX = {'prune.group.vision': 'matrix', 'prune.group.language': 'matrix'}
ALLOCATIONS = {
    'global magnitude': {'prune.method': 'magnitude', 'prune.allocation': 'global_magnitude', 'prune.highest': 0.9}
    | MATRIX,
    'DAS': WANDA | {'prune.allocation': 'das'},
    'OWL': WANDA | {'prune.allocation': 'owl'},
    'ECoFLaP, first order': WANDA | {'prune.allocation': 'ecoflap_first'},
    'ECoFLaP, zeroth order': WANDA | {'prune.allocation': 'ecoflap_zeroth'},
}


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the sweep; see `grid.py` for `arg`."""
    towers = tuple(grid.base(arg).prune.pattern)
    pruners = {label: {'prune.method': name} for label, name in PRUNERS.items()} | RECONSTRUCTED
    points = []
    for label, pattern in PATTERNS.items():
        structured = ':' in pattern
        ways = pruners if structured else pruners | ALLOCATIONS
        patterns = grid.patterns(towers, vision=pattern, language=pattern)
        points += [
            Point(
                name=grid.name(way, label),
                labels={'pattern': label, 'method': way},
                fields=patterns | fields,
            )
            for way, fields in ways.items()
        ]
    plot = {'kind': 'bars', 'x': 'pattern', 'series': 'method', 'title': 'Pruners and allocations'}
    hour = grid.budget(seeds=1, steps=40, batch=8, questions=300, samples=128)
    full = grid.budget(seeds=3, steps=200, batch=16, questions=2000, samples=128, scored=32)
    return grid.config('methods', arg, points, plot, hour=hour, full=full)
