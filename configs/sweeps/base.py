"""What a smaller base, and a teacher on disk, cost: language at 2:4, restored on each base and from each teacher.

  python launch/sweep.py --config=configs/sweeps/base.py --workdir=runs/base

Pruning is the same everywhere; factors are merged in high precision. `top-k KL` is another loss than the teacher's
whole distribution (`losses.top_k_kl`). What int4 takes is also tried to be won back by more steps. Argument and
budgets: `grid.py`.
"""

from ml_collections import ConfigDict

from configs.sweeps import grid
from sparselora_jax.jobs.sweep import Point
from sparselora_jax.recipe import BASES

TEACHERS = {'model': {}, 'top-k KL': {'restore.teacher': 'top_k'}, 'none': {'restore.kd': 0.0}}
LONG = 4  # times the steps


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: see `grid.py`."""
    pruned = grid.patterns(tuple(grid.base(arg).prune.pattern), language='2:4')
    grids = [(base, 'model') for base in BASES]
    grids += [('dense', 'top-k KL'), ('dense', 'none'), ('packed_int4', 'top-k KL')]
    points = [
        Point(
            grid.name(base, teacher),
            {'base': base, 'teacher': teacher},
            pruned | {'restore.base': base} | TEACHERS[teacher],
            ('restored',),
        )
        for base, teacher in grids
    ]
    points += [
        Point(
            grid.name(base, 'long'),
            {'base': base, 'teacher': f'model, {LONG} x the steps'},
            pruned | {'restore.base': base},
            ('restored',),
            share=LONG,
        )
        for base in ('dense', 'packed_int4')
    ]
    plot = {'kind': 'bars', 'x': 'base', 'series': 'teacher', 'title': 'Restoring on a smaller base'}
    hour = grid.budget(seeds=1, steps=60, batch=8, questions=500, samples=128)
    full = grid.budget(seeds=3, steps=300, batch=16, questions=2000, samples=128)
    return grid.config('base', arg, points, plot, hour=hour, full=full)
