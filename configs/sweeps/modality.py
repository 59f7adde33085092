"""Compare which modality to prune: language only, vision only or both, at five patterns, pruned and restored.

  python launch/sweep.py --config=configs/sweeps/modality.py --workdir=runs/modality

This is the paper's first experiment (arXiv 2404.02424). `grid.py` describes the argument and the budgets.
"""

from ml_collections import ConfigDict

from configs.sweeps import grid
from sparselora_jax.jobs.sweep import Point

PATTERNS = {'50 %': '0.5', '4:8': '4:8', '2:4': '2:4', '60 %': '0.6', '70 %': '0.7'}
MODALITIES = {'both': ('vision', 'language'), 'language only': ('language',), 'vision only': ('vision',)}


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the sweep; see `grid.py` for `arg`."""
    towers = tuple(grid.base(arg).prune.pattern)
    points = [
        Point(
            name=grid.name(modality, label),
            labels={'pruned': modality, 'pattern': label},
            fields=grid.patterns(towers, **dict.fromkeys(pruned, pattern)),
        )
        for label, pattern in PATTERNS.items()
        for modality, pruned in MODALITIES.items()
    ]
    plot = {'kind': 'bars', 'x': 'pattern', 'series': 'pruned', 'title': 'Which modality to prune'}
    hour = grid.budget(seeds=1, steps=60, batch=8, questions=500, samples=128)
    full = grid.budget(seeds=3, steps=300, batch=16, questions=2000, samples=128)
    return grid.config('modality', arg, points, plot, hour=hour, full=full)
