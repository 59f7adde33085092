"""Grids of main jobs: each point with its own workdir, resumable; what points have in common is computed once.

A sweep's config (`configs/sweeps/*.py`) holds `name`, `base` (a recipe), `points`, `budget` (which of `budgets`: its
fields are set in the recipe, and `seeds` is how often each point runs) and `plot`. Fields of a point win over those of
the budget.
"""

import json
import os
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from sparselora_jax import flops, inspection, memory, stages
from sparselora_jax.errors import SparseloraError
from sparselora_jax.job import Job, check_fit
from sparselora_jax.models import embedded, hf
from sparselora_jax.models.model import FAMILIES
from sparselora_jax.progress import Progress
from sparselora_jax.recipe import ConfigError, check_values, claim, override, refuse_other
from sparselora_jax.storage import write_text
from sparselora_jax.train import Interrupted

MODELS = ('dense', 'pruned', 'restored', 'control')
LAST = 'measured'  # the stage that ends a run
FAILED = 'failed.txt'  # in the folder of a run that failed: why
# Stages that runs may share, and what they leave; the stage's own result comes last, so that it is there or is not.
SHARED = {
    'prune': ('masks.safetensors', 'kernels.safetensors', 'zeros.json', 'prune.json'),
    'evaluate_pruned': ('evaluate_pruned.json',),
}


class SweepError(SparseloraError, RuntimeError):
    """Points that failed; the others are finished."""


class PointError(SparseloraError, RuntimeError):
    """Why one run failed: the last line of what it said."""


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
    fields: dict[str, Any] = {}
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
            override(recipe, point.fields | {'seed': seed}, of=f'point {point.name}')
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
    return embedded.load_config() if config.model == 'embedded' else hf.open_model(config.model)[0].cfg


def check(planned: list[Run]) -> None:
    """Names the first point that does not fit its model, before any work.

    Raises:
      PatternError, RuleError, and what opening a model raises.
    """
    shapes: dict[str, dict] = {}
    for run in planned:
        if (model := run.config.model) not in shapes:
            cfg = family_config(run.config)
            shapes[model] = FAMILIES[type(cfg)].shapes(cfg)
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
      run_one: does the work of one run in its folder, in a process of its own or here (`run_here`).
      after: called after each run.

    Raises:
      ConfigError, PatternError, RuleError: before anything runs.
      SweepError: runs failed; the others are finished, and a second call tries those that failed alone.
    """
    workdir = Path(workdir)
    refuse_other_sweep(workdir, config)
    planned = runs(config)
    left = [run for run in planned if not finished(workdir / run.name)]
    if left:
        check(planned)
    claim(workdir, config)
    progress = Progress(config.name, len(planned), first=len(planned) - len(left), interval=0)
    failed = []
    for index, one in enumerate(left):
        folder = workdir / one.name
        folder.mkdir(exist_ok=True)
        (folder / FAILED).unlink(missing_ok=True)
        _take(one, workdir)
        note = ''
        try:
            run_one(one, folder)
        except Interrupted:
            _give(one, workdir)
            raise
        except (SparseloraError, OSError) as error:
            write_text(folder / FAILED, f'{error}\n')
            failed.append(one.name)
            note = f' failed: {error}'
        _give(one, workdir)
        if not note:
            _remove_weights(folder)
        _forget(left[index + 1 :], workdir, failed)
        after()
        progress(len(planned) - len(left) + index + 1, one.name + note)
    if failed:
        raise SweepError(
            f'{len(failed)} of {len(planned)} runs failed: {", ".join(failed)}; see {FAILED} and output.txt in their '
            f'folders of {workdir}; the same command tries them again'
        )


def finished(folder: Path) -> bool:
    """Whether a run's last stage is done."""
    return (folder / f'{LAST}.json').exists()


def run_here(run: Run, folder: Path) -> None:
    """Does the work of one run in this process."""
    job, models = Job(run.config, folder), run.point.models
    stages.evaluate_models(job, models)
    if 'dense' in models:
        stages.floor(job)
    measure(job, models)


def measure(job: Job, models: tuple[str, ...]) -> dict:
    """The last stage: zeros, trained parameters, and FLOPs of a restoration step and of an answer."""

    def compute():
        cfg = job.model.cfg
        made = memory.recipe(cfg, job.config)
        trained = {'restored': 'restore', 'control': 'control'}.get(models[-1])
        found, kept = {}, {}
        if 'pruned' in models or 'restored' in models:
            pruned = job.merged() if 'restored' in models else stages.pruned_params(job)
            found = stages.count_zeros(job, pruned, job.trained('restore') if 'restored' in models else None)
            kept = {path: layers for tower in found['layer_density'].values() for path, layers in tower.items()}
        if trained:
            found['trained_parameters'] = inspection.count(job.trained(trained))
            masks = {} if trained == 'control' else made.masks
            found['step_flops'] = flops.train_step(cfg, job.config, made.params, masks, made.lora)
        dense, sparse = flops.answer(cfg, job.config.text, made.params, kept)
        return found | {'answer_flops': dense, 'answer_flops_sparse': sparse}

    return job.stage(LAST, compute)


def _key(stage: str, config: Any) -> str:
    """Of the fields that a shared stage depends on: neither LoRA nor restoration, but for what orders the data."""
    fields = json.loads(config.to_json())
    read = {name: fields[name] for name in fields if name not in ('lora', 'restore', 'evaluate')}
    read['shares'] = fields['restore']['shares']
    if stage != 'prune':
        read['evaluate'] = fields['evaluate']
    return f'{stage}-{sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()[:16]}'


def _link(files: tuple[str, ...], source: Path, target: Path) -> None:
    """Files under another name too, without a second copy where the disk can do that."""
    target.mkdir(parents=True, exist_ok=True)
    for name in files:
        if (source / name).exists() and not (target / name).exists():
            try:
                os.link(source / name, target / name)
            except OSError:
                shutil.copyfile(source / name, target / (name + '.partial'))
                (target / (name + '.partial')).replace(target / name)


def _take(run: Run, workdir: Path) -> None:
    """What an earlier run has done of this one."""
    for stage, files in SHARED.items():
        if (workdir / 'shared' / _key(stage, run.config) / files[-1]).exists():
            _link(files, workdir / 'shared' / _key(stage, run.config), workdir / run.name)


def _give(run: Run, workdir: Path) -> None:
    """What later runs need not do again."""
    for stage, files in SHARED.items():
        if (workdir / run.name / files[-1]).exists():
            _link(files, workdir / run.name, workdir / 'shared' / _key(stage, run.config))


def _forget(later: list[Run], workdir: Path, failed: list[str]) -> None:
    """Removes what no later run shares; a run that failed will need it again."""
    if failed:
        return
    needed = {_key(stage, run.config) for run in later for stage in SHARED}
    for folder in (workdir / 'shared').glob('*'):
        if folder.name not in needed:
            shutil.rmtree(folder)


def _remove_weights(folder: Path) -> None:
    """Masks, factors and checkpoints of a finished run: what it showed is in its json files."""
    for file in folder.glob('*.safetensors'):
        file.unlink()
    shutil.rmtree(folder / 'checkpoints', ignore_errors=True)
