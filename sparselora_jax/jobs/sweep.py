"""Grids of main jobs: each point with its own workdir, resumable; what points have in common is computed once.

A sweep's config (`configs/sweeps/*.py`) holds `name`, `base` (a recipe), `points`, `budget` (which of `budgets`: its
fields are set in the recipe, and `seeds` is how often each point runs) and `plot`. Fields of a point win over those of
the budget.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from sparselora_jax.checkpoints import embedded
from sparselora_jax.checkpoints import load as hf
from sparselora_jax.jobs import sweep_runs
from sparselora_jax.jobs.job import check_fit
from sparselora_jax.recipe import ConfigError, check_values, claim, override, refuse_other
from sparselora_jax.restoration.train import Interrupted
from sparselora_jax.runtime.errors import SparseloraError
from sparselora_jax.runtime.files import write_text
from sparselora_jax.runtime.progress import Progress

MODELS = ('dense', 'pruned', 'restored', 'control')
SHARED_BY = {'prune': {'pruned', 'restored'}, 'evaluate_pruned': {'pruned'}}  # stages, and the models that need them


class SweepError(SparseloraError, RuntimeError):
    """Points that failed; the others are finished."""


class Point(NamedTuple):
    """One point of a grid.

    Attributes:
      name: of its folder.
      labels: what it is, by the table's columns.
      fields: what differs from the base recipe, by dotted names.
      models: which models it evaluates, of `MODELS`.
      share: of the budget's restoration steps, which this point takes.
    """

    name: str
    labels: dict[str, Any]
    fields: Mapping[str, Any] = MappingProxyType({})
    models: tuple[str, ...] = ('pruned', 'restored')
    share: float = 1.0


class Run(NamedTuple):
    """A point with one seed: a main job."""

    point: Point
    seed: int
    config: ConfigDict

    @property
    def name(self) -> str:
        """Of its folder."""
        return f'{self.point.name}-seed{self.seed}'

    @property
    def shares(self) -> tuple[str, ...]:
        """The stages that it may share with other runs."""
        return tuple(stage for stage, models in SHARED_BY.items() if models & set(self.point.models))


def runs(config: Any) -> list[Run]:
    """The jobs of a sweep, in order, values checked; the dense model comes first.

    Raises:
      ConfigError, PatternError: a budget, a field or a value that cannot be; names the point.
    """
    if config.budget not in config.budgets:
        raise ConfigError(f'budget {config.budget!r}: expected one of {", ".join(config.budgets)}')
    budget = config.budgets[config.budget].to_dict()
    seeds = budget.pop('seeds')
    found = []
    for point in (Point('dense', {}, models=('dense',)), *config.points):
        if not point.models or set(point.models) - set(MODELS):
            raise ConfigError(f'point {point.name}: models {point.models}: expected some of {", ".join(MODELS)}')
        for seed in range(config.base.seed, config.base.seed + seeds):
            recipe = ConfigDict(config.base.to_dict())
            override(recipe, _flat(budget), of=f'budget {config.budget}')
            recipe.restore.steps = max(1, round(point.share * recipe.restore.steps))
            override(recipe, {**point.fields, 'seed': seed}, of=f'point {point.name}')
            try:
                check_values(recipe)
            except SparseloraError as error:
                raise type(error)(f'point {point.name}: {error}') from None
            found.append(Run(point, seed, recipe))
    names = [run.name for run in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f'{twice[0]}: two points of this name')
    return found


def _flat(fields: dict, prefix: str = '') -> dict[str, Any]:
    found = {}
    for name, value in fields.items():
        found |= _flat(value, f'{prefix}{name}.') if isinstance(value, dict) else {prefix + name: value}
    return found


def family_config(config: Any) -> Any:
    """The config of the model that a recipe names; no weights are read."""
    return embedded.load_config() if config.model == 'embedded' else hf.open_model(config.model, config.family)[0].cfg


def check(planned: list[Run]) -> None:
    """Names the first point that does not fit its model, before any work.

    Raises:
      PatternError, RuleError, and what opening a model raises.
    """
    shapes: dict[str, dict] = {}
    for run in planned:
        if (model := run.config.model) not in shapes:
            cfg = family_config(run.config)
            shapes[model] = cfg.family.shapes(cfg)
        try:
            check_fit(run.config, shapes[model])
        except SparseloraError as error:
            raise type(error)(f'point {run.point.name}: {error}') from None


def refuse_other_sweep(workdir: Path, config: Any) -> None:
    """Checks that a workdir is this sweep's, or nobody's yet.

    Raises:
      ConfigError: it holds another one.
    """
    kept = workdir / 'config.json'
    if kept.exists() and (name := json.loads(kept.read_text()).get('name', 'no sweep')) != config.name:
        raise ConfigError(f'{workdir} holds another run ({name!r}, not {config.name!r}); use another workdir')
    refuse_other(workdir, config)


def run(
    config: Any, workdir: str | Path, run_one: Callable[[Run, Path], None], *, after: Callable[[], None] = lambda: None
) -> None:
    """Runs what is not finished yet, one after the other.

    Args:
      run_one: does the work of one run in its folder: here (`sweep_runs.run_here`) or apart (`sweep_runs.run_apart`).
      after: called after each run.

    Raises:
      ConfigError, PatternError, RuleError: before anything runs.
      SweepError: runs failed; the others are finished, and a second call tries those that failed alone.
    """
    workdir, shared = Path(workdir), Path(workdir) / 'shared'
    refuse_other_sweep(workdir, config)
    planned = runs(config)
    left = [run for run in planned if not sweep_runs.finished(workdir / run.name)]
    if left:
        check(planned)
    claim(workdir, config)
    progress = Progress(config.name, len(planned), first=len(planned) - len(left), interval=0)
    failed = []
    for index, one in enumerate(left):
        folder = workdir / one.name
        folder.mkdir(exist_ok=True)
        (folder / sweep_runs.FAILED).unlink(missing_ok=True)
        sweep_runs.take(one.shares, one.config, folder, shared)
        note = ''
        try:
            run_one(one, folder)
        except Interrupted:
            sweep_runs.give(one.shares, one.config, folder, shared)
            raise
        except (SparseloraError, OSError) as error:
            write_text(folder / sweep_runs.FAILED, f'{error}\n')
            failed.append(one.name)
            note = f' failed: {error}'
        sweep_runs.give(one.shares, one.config, folder, shared)
        if not note:
            sweep_runs.remove_weights(folder)
        if not failed:  # what failed will need it again
            sweep_runs.forget([(run.shares, run.config) for run in left[index + 1 :]], shared)
        after()
        progress(len(planned) - len(left) + index + 1, one.name + note)
    if failed:
        share, names = f'{len(failed)} of {len(planned)}', ', '.join(failed)
        where = f'why: {sweep_runs.FAILED} and output.txt in their folders of {workdir}'
        raise SweepError(f'{share} runs failed: {names}; {where}; the same command tries them again')
