"""Compare ways of restoring the pruned language tower: none, DSnoT, and ways of training with equal steps.

  python launch/sweep.py --config=configs/sweeps/restore.py --workdir=runs/restore

The column `density if LoRA is merged` is the density after merging the same factors without the mask. The control
trains the same LoRA budget on the dense model.

Each learning rate is the best of those tried at 70 %, with another seed (7), 30 steps of batch 8 and 200 questions. For
LoRA, 1e-3 gave 63.5 % and 2e-3 76.0 %. For whole kernels, 1e-4 gave 79.0 %, 3e-4 71.5 % and 1e-3 86.5 %. `grid.py`
describes the argument and the budgets.
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
    """Return the sweep; see `grid.py` for `arg`."""
    towers = tuple(grid.base(arg).prune.pattern)
    points = []
    for label, pattern in PATTERNS.items():
        # Ways without training are evaluated after pruning, the others after restoration.
        for ways, models in ((PRUNED, ('pruned',)), (TRAINED, ('restored',))):
            points += [
                Point(
                    name=grid.name(way, label),
                    labels={'pattern': label, 'restored by': way},
                    fields=grid.patterns(towers, language=pattern) | fields,
                    models=models,
                )
                for way, fields in ways.items()
            ]
    points.append(Point('control', {'restored by': 'LoRA on the dense model'}, LORA, models=('control',)))
    plot = {'kind': 'bars', 'x': 'pattern', 'series': 'restored by', 'title': 'Ways of restoring, at equal steps'}
    hour = grid.budget(seeds=3, steps=30, batch=8, questions=200, samples=64)
    full = grid.budget(seeds=3, steps=200, batch=16, questions=2000, samples=128)
    return grid.config('restore', arg, points, plot, hour=hour, full=full)
