"""What restoring is worth, and what of it: nothing, DSnoT, and ways of training, at equal steps; language only.

  python launch/sweep.py --config=configs/sweeps/restore.py --workdir=runs/restore

The column `density if LoRA is merged` says what merging the same factors outside the mask would do. The dense control
has the same LoRA budget. Learning rates are the best of those tried at 70 % with another seed (7), 30 steps of 8 and
200 questions: LoRA 1e-3 63.5 %, 2e-3 76.0 %; whole kernels 1e-4 79.0 %, 3e-4 71.5 %, 1e-3 86.5 %. Argument and
budgets: `grid.py`.
"""

from ml_collections import ConfigDict

from configs.sweeps import grid
from sparselora_jax.jobs.sweep import Point

PATTERNS = {'2:4': '2:4', '70 %': '0.7'}
LORA = {'restore.peak': 2e-3}
PRUNED = {'none': {}, 'DSnoT': {'prune.method': 'dsnot'}}
TRAINED = {
    'LoRA cut by the mask': LORA | {'restore.gradient': 'plain'},
    'SparseLoRA without KD': LORA | {'restore.kd': 0.0},
    'SparseLoRA': LORA,
    'straight-through': LORA | {'restore.gradient': 'straight_through'},
    'masked full fine-tuning': {'restore.trained': 'weights', 'restore.peak': 1e-3},
}


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: see `grid.py`."""
    towers, points = tuple(grid.base(arg).prune.pattern), []
    for label, pattern in PATTERNS.items():
        for ways, models in ((PRUNED, ('pruned',)), (TRAINED, ('restored',))):
            for way, fields in ways.items():
                fields = grid.patterns(towers, language=pattern) | fields
                points.append(Point(grid.name(way, label), {'pattern': label, 'restored by': way}, fields, models))
    points.append(Point('control', {'restored by': 'LoRA on the dense model'}, LORA, models=('control',)))
    plot = {'kind': 'bars', 'x': 'pattern', 'series': 'restored by', 'title': 'Ways of restoring, at equal steps'}
    hour = grid.budget(seeds=3, steps=30, batch=8, questions=200, samples=64)
    full = grid.budget(seeds=3, steps=200, batch=16, questions=2000, samples=128)
    return grid.config('restore', arg, points, plot, hour=hour, full=full)
