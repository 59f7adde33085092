"""One run of a sweep: a main job in a folder of its own, and what it shares with others."""

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from sparselora_jax.jobs import stages
from sparselora_jax.jobs.job import TEACHER, Job
from sparselora_jax.planning import flops, inspection, memory
from sparselora_jax.recipe import NO_RESULT
from sparselora_jax.restoration.train import Interrupted
from sparselora_jax.runtime.errors import SparseloraError
from sparselora_jax.runtime.files import whole

LAST = 'measured'  # the stage that ends a run
FAILED = 'failed.txt'  # in the folder of a run that failed: why
# Stages that runs may share, and what they leave; the stage's own result comes last, so that it is there or is not.
SHARED = {
    'prune': ('masks.safetensors', 'kernels.safetensors', 'zeros.json', 'prune.json'),
    'evaluate_pruned': ('evaluate_pruned.json',),
}


class PointError(SparseloraError, RuntimeError):
    """Why one run failed: the last line of what it said."""


def finished(folder: Path) -> bool:
    """Whether a run's last stage is done."""
    return (folder / f'{LAST}.json').exists()


def run_here(config: Any, folder: Path, models: tuple[str, ...]) -> None:
    """Does the work of one run in this process.

    Args:
      models: which it evaluates: dense, pruned, restored, control.
    """
    job = Job(config, folder)
    stages.evaluate_models(job, models)
    if 'dense' in models:
        stages.floor(job)
    measure(job, models)


def run_apart(command: Sequence[str], folder: Path) -> None:
    """Does it in a process of its own, so that its peak memory and its end are its own; all it says is kept.

    Args:
      command: what does the work; programs that it compiles are kept for the runs beside it.

    Raises:
      PointError: it failed; its last line. Interrupted: it was stopped, and saved.
    """
    compiled = {
        'JAX_COMPILATION_CACHE_DIR': str((folder.parent / 'compiled').absolute()),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.2',
    }
    output = folder / 'output.txt'
    with output.open('ab') as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | compiled)
        try:
            code = process.wait()
        except KeyboardInterrupt:  # it is told too, and saves what it has
            process.terminate()
            process.wait()
            code = 130
    if code == 130:
        raise Interrupted(f'{folder.name} was stopped; the same command goes on')
    if code:
        said = output.read_text(errors='replace').strip().splitlines()[-1:] if code > 0 else []
        raise PointError(said[0].removeprefix('error: ') if said else f'killed by signal {-code}')


def measure(job: Job, models: tuple[str, ...]) -> dict:
    """The last stage: zeros, trained parameters, and FLOPs of a restoration step and of an answer."""

    def compute():
        cfg = job.model.cfg
        made = memory.recipe(cfg, job.config)
        stage_of = {'restored': 'restore', 'control': 'control'}
        trained = next((stage_of[model] for model in models if model in stage_of), None)
        found, kept = {}, {}
        if 'pruned' in models or 'restored' in models:
            pruned = job.merged() if 'restored' in models else stages.pruned_params(job)
            found = stages.count_zeros(job, pruned, job.trained('restore') if 'restored' in models else None)
            kept = {path: layers for tower in found['layer_density'].values() for path, layers in tower.items()}
        if trained:
            found['trained_parameters'] = inspection.count(job.trained(trained))
            found['step_flops'] = flops.train_step(made._replace(masks={}) if trained == 'control' else made)
        dense, sparse = flops.answer(cfg, job.config.text, made.params, kept)
        return found | {'answer_flops': dense, 'answer_flops_sparse': sparse}

    return job.stage(LAST, compute)


def _key(stage: str, config: Any) -> str:
    """Of the fields that a shared stage depends on: neither LoRA nor restoration, but for what orders the data."""
    fields = json.loads(config.to_json())
    read = {name: fields[name] for name in fields if name not in ('lora', 'restore', 'evaluate', *NO_RESULT)}
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
                with whole(target / name) as partial:
                    shutil.copyfile(source / name, partial)


def take(shared_stages: Sequence[str], config: Any, folder: Path, shared: Path) -> None:
    """What an earlier run has done of this one."""
    for stage in shared_stages:
        if (shared / _key(stage, config) / SHARED[stage][-1]).exists():
            _link(SHARED[stage], shared / _key(stage, config), folder)


def give(shared_stages: Sequence[str], config: Any, folder: Path, shared: Path) -> None:
    """What later runs need not do again."""
    for stage in shared_stages:
        if (folder / SHARED[stage][-1]).exists():
            _link(SHARED[stage], folder, shared / _key(stage, config))


def forget(later: Sequence[tuple[Sequence[str], Any]], shared: Path) -> None:
    """Removes what none of these (stages that a run shares, its config) need."""
    needed = {_key(stage, config) for shared_stages, config in later for stage in shared_stages}
    for folder in shared.glob('*'):
        if folder.name not in needed:
            shutil.rmtree(folder)


def remove_weights(folder: Path) -> None:
    """Masks, factors and checkpoints of a finished run: what it showed is in its json files."""
    for file in folder.glob('*.safetensors'):
        file.unlink()
    for name in ('checkpoints', TEACHER):
        shutil.rmtree(folder / name, ignore_errors=True)
