"""Compare ways to split a sparsity budget between vision and language, for sums of 100 % and 120 %.

  python launch/sweep.py --config=configs/sweeps/split.py --workdir=runs/split

This is the paper's second experiment (arXiv 2404.02424): 10:90 to 90:10, and 30:90 to 90:30. `grid.py` describes the
argument and the budgets.
"""

from ml_collections import ConfigDict

from configs.sweeps import grid
from sparselora_jax.jobs.sweep import Point

# For each sum of the two sparsities, the sparsities of vision to try, in percent.
BUDGETS = {100: range(10, 91, 10), 120: range(30, 91, 10)}


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the sweep; see `grid.py` for `arg`."""
    towers = tuple(grid.base(arg).prune.pattern)
    points = []
    for total, shares in BUDGETS.items():
        for vision in shares:
            language = total - vision
            point = Point(
                name=f'{vision}-{language}',
                labels={'budget': f'{total} %', 'vision : language': f'{vision}:{language}', 'vision, %': vision},
                fields=grid.patterns(towers, vision=str(vision / 100), language=str(language / 100)),
            )
            points.append(point)
    plot = {'kind': 'lines', 'x': 'vision, %', 'series': 'budget', 'title': 'Splitting a budget of sparsity'}
    hour = grid.budget(seeds=1, steps=60, batch=8, questions=500, samples=128)
    full = grid.budget(seeds=3, steps=300, batch=16, questions=2000, samples=128)
    return grid.config('split', arg, points, plot, hour=hour, full=full)
