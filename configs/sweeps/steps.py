"""Measure how the number of restoration steps affects accuracy, from a sixteenth of the budget's steps to all.

  python launch/sweep.py --config=configs/sweeps/steps.py --workdir=runs/steps

Every point has a complete schedule, with warm-up and decay, for its number of steps. Only the language tower is pruned.
`grid.py` describes the argument and the budgets.
"""

from ml_collections import ConfigDict

from configs.sweeps import grid
from sparselora_jax.jobs.sweep import Point

PATTERNS = {'2:4': '2:4', '70 %': '0.7'}
PARTS = (16, 8, 4, 2, 1)  # a point trains for 1 / part of the budget's steps


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the sweep; see `grid.py` for `arg`."""
    towers = tuple(grid.base(arg).prune.pattern)
    points = [
        Point(
            name=grid.name(f'one {part}th', label),
            labels={'pattern': label},
            fields=grid.patterns(towers, language=pattern),
            share=1 / part,
        )
        for label, pattern in PATTERNS.items()
        for part in PARTS
    ]
    plot = {'kind': 'lines', 'x': 'steps', 'series': 'pattern', 'title': 'What the steps of restoration buy'}
    hour = grid.budget(seeds=1, steps=128, batch=8, questions=300, samples=128)
    full = grid.budget(seeds=3, steps=800, batch=16, questions=2000, samples=128)
    # With fewer steps than the largest part, several points would train for one step.
    return grid.config('steps', arg, points, plot, hour=hour, full=full, tiny_steps=max(PARTS))
