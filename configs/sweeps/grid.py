"""Provide what all sweeps need: the base recipe, the budgets, and the fields of a pattern per tower.

The argument of a sweep is `--config=configs/sweeps/NAME.py:recipe=NAME,model=...,data=...`. It names a recipe of
`configs/` (default: `blip2_lang_only`, with the embedded model). The other arguments are those of the recipe
(`configs/arguments.py`).

A budget (`--config.budget=tiny|hour|full`) sets fields of the recipe and the number of seeds that each point runs with.
Override a field of a budget with e.g. `--config.budgets.hour.restore.steps=50`.
"""

import importlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from sparselora_jax.jobs.sweep import Point


def base(arg: str | None) -> ConfigDict:
    """Return the recipe that a sweep's argument names.

    Raises:
      ValueError: see `arguments.parse`; or the recipe does not exist.
    """
    parts = arg.split(',') if arg else []
    name = next((part.removeprefix('recipe=') for part in parts if part.startswith('recipe=')), 'blip2_lang_only')
    rest = ','.join(part for part in parts if not part.startswith('recipe='))
    try:
        get_config = importlib.import_module(f'configs.{name}').get_config
    except (ImportError, AttributeError):
        raise ValueError(f'recipe {name!r}: expected a recipe of configs/, e.g. llava_both') from None
    return get_config(rest or None)


def config(
    name: str,
    arg: str | None,
    points: Sequence[Point],
    plot: Mapping[str, str],
    *,
    hour: Mapping[str, Any],
    full: Mapping[str, Any],
    tiny_steps: int = 2,
) -> ConfigDict:
    """Return a sweep's config.

    Args:
      name: name of the sweep and of its result files.
      arg: argument of the sweep; see the module's docstring.
      points: the points of the grid, each with its own fields.
      plot: see `jobs.plots.figure`.
      hour: the budget `hour`, as returned by `budget`.
      full: the budget `full`, as returned by `budget`.
      tiny_steps: number of restoration steps of the budget `tiny`.
    """
    # The budget `tiny` is for tests. It only shows that every point runs; its results mean nothing.
    tiny = budget(seeds=1, steps=tiny_steps, batch=4, questions=10, samples=4, scored=4)
    sweep = ConfigDict()
    sweep.name = name
    sweep.budget = 'hour'
    sweep.budgets = ConfigDict({'tiny': tiny, 'hour': hour, 'full': full})
    sweep.base = base(arg)
    sweep.plot = ConfigDict(plot)
    sweep.points = tuple(points)
    return sweep


def budget(*, seeds: int, steps: int, batch: int, questions: int, samples: int, scored: int = 8) -> dict[str, Any]:
    """Return the fields of a budget; a tenth of the steps is warm-up, and only the last step has a checkpoint.

    Args:
      seeds: number of seeds, and so of runs of each point.
      steps: number of restoration steps.
      batch: number of samples in a restoration step.
      questions: number of test questions.
      samples: number of calibration samples.
      scored: number of samples for ECoFLaP's scores; its zeroth order runs them twice for each kernel and layer.
    """
    return {
        'seeds': seeds,
        'restore': {
            'steps': steps,
            'batch': batch,
            'warmup': max(1, steps // 10),
            'checkpoint_every': max(50, steps),
        },
        'evaluate': {'questions': questions, 'batch': min(50, questions)},
        'prune': {
            'samples': samples,
            'chunk': min(32, samples),
            'score_samples': scored,
            'score_batch': min(8, scored),
        },
    }


def patterns(towers: tuple[str, ...], **pruned: str) -> dict[str, str]:
    """Return the fields that prune some towers and leave the others dense.

    Args:
      towers: all towers of the recipe.
      pruned: the pattern of each pruned tower.

    >>> patterns(('vision', 'language'), language='2:4')
    {'prune.pattern.vision': 'dense', 'prune.pattern.language': '2:4'}
    """
    return {f'prune.pattern.{tower}': pruned.get(tower, 'dense') for tower in towers}


def name(*labels: str) -> str:
    """Return a point's name, which also names its folder.

    >>> name('language only', '2:4'), name('both', '50 %')
    ('language-only-2-4', 'both-50')
    """
    return re.sub(r'[^a-z0-9]+', '-', ' '.join(labels).lower()).strip('-')
