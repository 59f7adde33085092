"""Run grids of main jobs: each point has its own workdir and can be resumed; shared stages are computed once.

A sweep's config (`configs/sweeps/*.py`) holds `name`, `base` (a recipe), `points`, `budget` (a key of `budgets`: its
fields override the recipe, and `seeds` is the number of runs per point) and `plot`. Fields of a point override those of
the budget.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from sparselora_jax.checkpoints import embedded
from sparselora_jax.checkpoints.load import open_model
from sparselora_jax.jobs import names, sweep_runs
from sparselora_jax.jobs.job import Job, check_fit
from sparselora_jax.recipe import (
    CONFIG_FILE,
    CONFIG_REMEDY,
    ConfigError,
    absolute_paths,
    check_family,
    check_fields,
    check_values,
    claim,
    override,
    refuse_other,
)
from sparselora_jax.restoration.train import Interrupted
from sparselora_jax.runtime.errors import SparseloraError
from sparselora_jax.runtime.files import read_json, write_text
from sparselora_jax.runtime.progress import Progress

# Stages that runs may share, and the models that need them.
SHARED_BY = {
    names.PRUNE: {'pruned', 'restored'},
    names.evaluation_stage('pruned'): {'pruned'},
    names.task_stage('pruned'): {'pruned'},
}


class SweepError(SparseloraError, RuntimeError):
    """Some runs failed; the others are finished."""


class Point(NamedTuple):
    """One point of a grid.

    Attributes:
      name: prefix of the names of its folders, one for each seed.
      labels: column of the table -> the label of this point.
      fields: dotted name -> value of the recipe's fields that differ from the base recipe.
      models: the models that it evaluates, some of `names.ALL_MODELS`.
      share: share of the budget's restoration steps that this point uses.
    """

    name: str
    labels: dict[str, Any]
    # A plain dict, because config.json holds the points, and JSON has no read-only mapping. Nothing modifies it in
    # place.
    fields: dict[str, Any] = {}  # noqa: RUF012
    models: tuple[str, ...] = ('pruned', 'restored')
    share: float = 1.0


class Run(NamedTuple):
    """A main job: one point with one seed.

    Attributes:
      point: the point.
      seed: seed of the recipe.
      config: the recipe.
    """

    point: Point
    seed: int
    config: ConfigDict

    @property
    def name(self) -> str:
        """Return the name of the run's folder."""
        return f'{self.point.name}-seed{self.seed}'

    @property
    def shared_stages(self) -> tuple[str, ...]:
        """Return the stages that this run may share with other runs."""
        return tuple(stage for stage, models in SHARED_BY.items() if models & set(self.point.models))


def runs(config: ConfigDict) -> list[Run]:
    """Return the jobs of a sweep in order, with checked values; the dense model comes first.

    Args:
      config: a sweep.

    Raises:
      ConfigError, PatternError: a budget, field or value is illegal; the message names the point.
    """
    if config.budget not in config.budgets:
        raise ConfigError(f'budget {config.budget!r}: expected one of {", ".join(config.budgets)}')
    budget = config.budgets[config.budget].to_dict()
    seeds = budget.pop('seeds')
    if seeds < 1:
        raise ConfigError(f'budgets.{config.budget}.seeds {seeds}: expected 1 or more')
    planned = []
    # Every sweep has the dense model as a point, because all models are compared with it; it is evaluated once.
    for point in (Point('dense', {}, models=('dense',)), *config.points):
        if not point.models or set(point.models) - set(names.ALL_MODELS):
            expected = ', '.join(names.ALL_MODELS)
            raise ConfigError(f'point {point.name}: models {point.models}: expected some of {expected}')
        for seed in range(config.base.seed, config.base.seed + seeds):
            # A copy for each run: the base recipe and the other runs must not see the overrides.
            recipe = ConfigDict(config.base.to_dict())
            override(recipe, _dotted(budget), owner=f'budget {config.budget}')
            # A share of an illegal number of steps would be rounded up to one step.
            with _naming(point):
                check_fields(recipe)
            # Set before the point's own fields, which override its share.
            recipe.restore.steps = max(1, round(point.share * recipe.restore.steps))
            override(recipe, {**point.fields, 'seed': seed}, owner=f'point {point.name}')
            with _naming(point):
                check_values(recipe)
            planned.append(Run(point, seed, absolute_paths(recipe)))
    _check_distinct(planned)
    return planned


def _check_distinct(planned: list[Run]) -> None:
    """Check that no two runs have the same name, or do the same work under two names.

    Raises:
      ConfigError: two do; names them.
    """
    names_seen = set()
    work_seen: dict[str, Run] = {}
    for run in planned:
        if run.name in names_seen:
            raise ConfigError(f'{run.name}: two points of this name')
        names_seen.add(run.name)
        # A budget with few steps leaves nothing to tell apart points that train for shares of them.
        work = json.dumps([json.loads(run.config.to_json()), run.point.models, run.point.labels])
        other = work_seen.setdefault(work, run)
        if other is not run:
            raise ConfigError(
                f'points {other.point.name} and {run.point.name}: the same recipe, with {run.config.restore.steps} '
                'steps of restoration; use a budget with more steps'
            )


@contextlib.contextmanager
def _naming(point: Point) -> Iterator[None]:
    """Add the name of a point to the messages of errors."""
    try:
        yield
    except SparseloraError as error:
        # The same type, because callers and tests distinguish pattern errors from config errors.
        raise type(error)(f'point {point.name}: {error}') from None


def _dotted(fields: dict, prefix: str = '') -> dict[str, Any]:
    """Return the values of a nested dict by dotted names."""
    flat = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            flat |= _dotted(value, f'{prefix}{name}.')
        else:
            flat[prefix + name] = value
    return flat


def family_config(config: ConfigDict) -> Any:
    """Return the config of the model that a recipe names, without reading weights.

    Args:
      config: a recipe.
    """
    if config.model == embedded.NAME:
        embedded.files()  # raises if they are not installed
        return embedded.load_config()
    model, _ = open_model(config.model, config.family)
    return model.cfg


def check(planned: list[Run], workdir: Path) -> None:
    """Check that all points fit their models, and that their models and data can be read, before any work.

    Args:
      planned: the runs of the sweep.
      workdir: its folder.

    Raises:
      PatternError, RuleError: a point does not fit its model.
      DataError: the data of a point are missing or unusable.
      SparseloraError: a model cannot be opened. All messages name the point.
    """
    cfgs: dict[tuple[str, str], Any] = {}  # by model, so that each model is opened once
    for run in planned:
        model = (run.config.model, run.config.family)
        with _naming(run.point):
            if model not in cfgs:
                cfgs[model] = family_config(run.config)
            cfg = cfgs[model]
            check_family(run.config, cfg)
            check_fit(run.config, cfg.family.shapes(cfg))
    checked: set[tuple[str, ...]] = set()
    for run in planned:
        config = run.config
        # Which records a model can use depends on the lengths of texts too.
        texts = (config.text.to_json(), config.mixture.to_json())
        samples = (config.prune.data, config.prune.order, str(config.prune.samples))
        data = (config.data, config.data_dir, config.model, config.family, *texts, *samples)
        data += (config.evaluate.tasks, config.evaluate.data_root)
        if data not in checked:
            with _naming(run.point):
                Job(config, workdir / run.name).check_data()
            checked.add(data)


def refuse_other_sweep(workdir: Path, config: ConfigDict) -> None:
    """Check that a workdir holds this sweep, or is still empty.

    Args:
      workdir: the folder of a sweep.
      config: the sweep that is about to start or resume.

    Raises:
      ConfigError: the workdir holds another sweep, or a run that is not a sweep.
    """
    file = workdir / CONFIG_FILE
    if file.exists():
        # Compare the name first, since it says more than a list of all fields that differ.
        name = read_json(file, CONFIG_REMEDY).get('name', 'no sweep')
        if name != config.name:
            raise ConfigError(f'{workdir} holds another run ({name!r}, not {config.name!r}); use another workdir')
    refuse_other(workdir, config)


def run(
    config: ConfigDict,
    workdir: str | Path,
    run_one: Callable[[Run, Path], None],
    *,
    after: Callable[[], None] = lambda: None,
) -> None:
    """Run all unfinished runs, one after the other.

    Args:
      config: a sweep.
      workdir: its folder.
      run_one: function that does one run in its folder, in this process (`sweep_runs.run_here`) or in a separate one
        (`sweep_runs.run_apart`).
      after: called after each run.

    Raises:
      ConfigError, PatternError, RuleError: a point is illegal; raised before anything runs.
      SweepError: some runs failed; the others are finished, and a second call runs only the failed ones.
      Interrupted: a run was stopped, and has saved its state.
    """
    workdir = Path(workdir)
    shared = workdir / 'shared'
    refuse_other_sweep(workdir, config)
    planned = runs(config)
    unfinished = [run for run in planned if not sweep_runs.is_finished(workdir / run.name)]
    # All points are checked before the first run. A finished sweep only writes its table again.
    if unfinished:
        check(planned, workdir)
    claim(workdir, config)
    done = len(planned) - len(unfinished)
    progress = Progress(config.name, len(planned), first=done, interval=0)
    failed = []
    for index, current in enumerate(unfinished):
        error = _run_one(current, workdir / current.name, shared, run_one)
        if error:
            failed.append(current.name)
        if not failed:
            # Only if no run has failed, because a failed run will need the shared results again.
            later = unfinished[index + 1 :]
            sweep_runs.remove_unneeded([(run.shared_stages, run.config) for run in later], shared)
        after()
        progress(done + index + 1, f'{current.name} failed: {error}' if error else current.name)
    if failed:
        raise SweepError(
            f'{len(failed)} of {len(planned)} runs failed: {", ".join(failed)}; why: {names.FAILED} and {names.OUTPUT} '
            f'in their folders of {workdir}; the same command tries them again'
        )


def _run_one(run: Run, folder: Path, shared: Path, run_one: Callable[[Run, Path], None]) -> str:
    """Do one run, and return why it failed, or '' if it succeeded."""
    folder.mkdir(exist_ok=True)
    failed_file = folder / names.FAILED
    failed_file.unlink(missing_ok=True)
    sweep_runs.take_shared(run.shared_stages, run.config, folder, shared)
    try:
        run_one(run, folder)
    except Interrupted:
        raise  # not a failure: the whole sweep stops
    except (SparseloraError, OSError) as error:
        write_text(failed_file, f'{error}\n')
        return str(error) or type(error).__name__
    finally:
        # Also for a run that failed or was stopped, because its finished stages are valid.
        sweep_runs.give_shared(run.shared_stages, run.config, folder, shared)
    # The weights of a failed run stay, so that it can be resumed.
    sweep_runs.remove_weights(folder)
    return ''
