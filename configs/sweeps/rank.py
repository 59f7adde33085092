"""What the rank of LoRA buys: the language tower pruned and restored, ranks 1 to 32, the scale alpha / rank fixed.

  python launch/sweep.py --config=configs/sweeps/rank.py --workdir=runs/rank

Argument and budgets: `grid.py`.
"""

from ml_collections import ConfigDict

from configs.sweeps import grid
from sparselora_jax.jobs.sweep import Point

PATTERNS = {'2:4': '2:4', '70 %': '0.7'}
RANKS = (1, 2, 4, 8, 16, 32)
SCALE = 2.0


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: see `grid.py`."""
    towers, points = tuple(grid.base(arg).prune.pattern), []
    for label, pattern in PATTERNS.items():
        for rank in RANKS:
            ranks = {f'lora.rank.{tower}': rank if tower == 'language' else 0 for tower in towers}
            fields = grid.patterns(towers, language=pattern) | ranks | {'lora.alpha.language': SCALE * rank}
            points.append(Point(grid.name(f'rank {rank}', label), {'pattern': label, 'rank': rank}, fields))
    plot = {'kind': 'lines', 'x': 'rank', 'series': 'pattern', 'title': 'What the rank of LoRA buys'}
    hour = grid.budget(seeds=1, steps=60, batch=8, questions=300, samples=128)
    full = grid.budget(seeds=3, steps=300, batch=16, questions=2000, samples=128)
    return grid.config('rank', arg, points, plot, hour=hour, full=full)
