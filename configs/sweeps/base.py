"""Measure how a smaller base or a teacher on disk affects accuracy, for a language tower restored at 2:4.

  python launch/sweep.py --config=configs/sweeps/base.py --workdir=runs/base

All points are pruned in the same way, and LoRA is merged in float32. `top-k KL` is a different loss from the KL over
the teacher's whole distribution (`losses.top_k_kl`). Two points train longer, to see whether more steps recover the
accuracy that int4 costs. `grid.py` describes the argument and the budgets.
"""

from ml_collections import ConfigDict

from configs.sweeps import grid
from sparselora_jax.jobs.sweep import Point
from sparselora_jax.recipe import BASES

TEACHERS = {'model': {}, 'top-k KL': {'restore.teacher': 'top_k'}, 'none': {'restore.kd': 0.0}}
LONG = 4  # the long points train for this many times the budget's steps


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the sweep; see `grid.py` for `arg`."""
    pruned = grid.patterns(tuple(grid.base(arg).prune.pattern), language='2:4')
    pairs = [(base, 'model') for base in BASES]
    pairs += [('dense', 'top-k KL'), ('dense', 'none'), ('packed_int4', 'top-k KL')]
    points = [
        Point(
            name=grid.name(base, teacher),
            labels={'base': base, 'teacher': teacher},
            fields=pruned | {'restore.base': base} | TEACHERS[teacher],
            models=('restored',),
        )
        for base, teacher in pairs
    ]
    # Longer training on int4, and on the dense base for comparison.
    points += [
        Point(
            name=grid.name(base, 'long'),
            labels={'base': base, 'teacher': f'model, {LONG} x the steps'},
            fields=pruned | {'restore.base': base},
            models=('restored',),
            share=LONG,
        )
        for base in ('dense', 'packed_int4')
    ]
    plot = {'kind': 'bars', 'x': 'base', 'series': 'teacher', 'title': 'Restoring on a smaller base'}
    hour = grid.budget(seeds=1, steps=60, batch=8, questions=500, samples=128)
    full = grid.budget(seeds=3, steps=300, batch=16, questions=2000, samples=128)
    return grid.config('base', arg, points, plot, hour=hour, full=full)
