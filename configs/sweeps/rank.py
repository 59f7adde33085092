"""Measure how the rank of LoRA affects accuracy: language restored at ranks 1 to 32, with alpha / rank fixed.

  python launch/sweep.py --config=configs/sweeps/rank.py --workdir=runs/rank

`grid.py` describes the argument and the budgets.
"""

from ml_collections import ConfigDict

from configs.sweeps import grid
from sparselora_jax.jobs.sweep import Point

PATTERNS = {'2:4': '2:4', '70 %': '0.7'}
RANKS = (1, 2, 4, 8, 16, 32)
SCALE = 2.0  # alpha / rank


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the sweep; see `grid.py` for `arg`."""
    towers = tuple(grid.base(arg).prune.pattern)
    points = []
    for label, pattern in PATTERNS.items():
        for rank in RANKS:
            # Only the pruned tower has LoRA, so that points differ in its rank alone.
            lora = {f'lora.rank.{tower}': 0 for tower in towers}
            lora |= {'lora.rank.language': rank, 'lora.alpha.language': SCALE * rank}
            point = Point(
                name=grid.name(f'rank {rank}', label),
                labels={'pattern': label, 'rank': rank},
                fields=grid.patterns(towers, language=pattern) | lora,
            )
            points.append(point)
    plot = {'kind': 'lines', 'x': 'rank', 'series': 'pattern', 'title': 'What the rank of LoRA buys'}
    hour = grid.budget(seeds=1, steps=60, batch=8, questions=300, samples=128)
    full = grid.budget(seeds=3, steps=300, batch=16, questions=2000, samples=128)
    return grid.config('rank', arg, points, plot, hour=hour, full=full)
