"""What the sweeps share: the recipe that a sweep's argument names, its budgets, and patterns by tower.

The argument, `--config=configs/sweeps/<name>.py:recipe=NAME,model=...,data=...`: a recipe of `configs/` (by default
`blip2_lang_only`, whose model is embedded), and the arguments of that recipe (`configs/arguments.py`).

Budgets (`--config.budget=tiny|hour|full`) set fields of the recipe, and how many seeds each point runs with. Their own
fields can be overridden: `--config.budgets.hour.restore.steps=50`.
"""

import importlib
import re

from ml_collections import ConfigDict


def base(arg: str | None) -> ConfigDict:
    """The recipe.

    Raises:
      ValueError: see `arguments.parse`, or a recipe that does not exist.
    """
    parts = arg.split(',') if arg else []
    name = next((part.removeprefix('recipe=') for part in parts if part.startswith('recipe=')), 'blip2_lang_only')
    rest = ','.join(part for part in parts if not part.startswith('recipe='))
    try:
        recipe = importlib.import_module(f'configs.{name}').get_config
    except (ImportError, AttributeError):
        raise ValueError(f'recipe {name!r}: expected a recipe of configs/, e.g. llava_both') from None
    return recipe(rest or None)


def config(name: str, arg: str | None, points: list, plot: dict, *, hour: dict, full: dict) -> ConfigDict:
    """A sweep's config.

    Args:
      points: `sweep.Point`s.
      plot: see `evaluation.plots.figure`.
      hour, full: budgets, as `budget` makes them.
    """
    tiny = budget(seeds=1, steps=2, batch=4, questions=10, samples=4, scored=4)
    budgets = ConfigDict({'tiny': tiny, 'hour': hour, 'full': full})
    found = ConfigDict({'name': name, 'budget': 'hour', 'budgets': budgets, 'base': base(arg), 'plot': plot})
    found.points = tuple(points)
    return found


def budget(*, seeds: int, steps: int, batch: int, questions: int, samples: int, scored: int = 8) -> dict:
    """How much a point may take; a tenth of the steps is warm-up, and only the end is a checkpoint.

    Args:
      scored: samples that ECoFLaP's scores are taken from; its zeroth order runs them twice for each kernel and layer.
    """
    restore = {'steps': steps, 'batch': batch, 'warmup': max(1, steps // 10), 'checkpoint_every': max(50, steps)}
    return {
        'seeds': seeds,
        'restore': restore,
        'evaluate': {'questions': questions, 'batch': min(50, questions)},
        'prune': {
            'samples': samples,
            'chunk': min(32, samples),
            'score_samples': scored,
            'score_batch': min(8, scored),
        },
    }


def patterns(towers: tuple[str, ...], **pruned: str) -> dict[str, str]:
    """Fields that prune these towers and leave the others dense.

    >>> patterns(('vision', 'language'), language='2:4')
    {'prune.pattern.vision': 'dense', 'prune.pattern.language': '2:4'}
    """
    return {f'prune.pattern.{tower}': pruned.get(tower, 'dense') for tower in towers}


def name(*labels: str) -> str:
    """Of a point's folder.

    >>> name('language only', '2:4'), name('both', '50 %')
    ('language-only-2-4', 'both-50')
    """
    return re.sub(r'[^a-z0-9]+', '-', ' '.join(labels).lower()).strip('-')
