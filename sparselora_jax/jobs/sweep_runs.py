"""Do one run of a sweep: a main job in its own folder, with stages that it shares with other runs."""

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from ml_collections import ConfigDict

from sparselora_jax.jobs import names, stages
from sparselora_jax.jobs.export import count_zeros, refuse_violations
from sparselora_jax.jobs.job import Job
from sparselora_jax.jobs.stored import Stored, owner_of
from sparselora_jax.planning import flops, inspection, memory
from sparselora_jax.recipe import NO_RESULT
from sparselora_jax.restoration.train import Interrupted
from sparselora_jax.runtime.errors import SparseloraError

# What runs may share, and the stages that this consists of, in order; the last stage is done only if the others are.
SHARED_STAGES = {
    names.PRUNE: (names.ZEROS, names.PRUNE),
    names.evaluation_stage('pruned'): (names.evaluation_stage('pruned'),),
    # A stage that no run has done is not shared.
    names.task_stage('pruned'): (names.task_stage('pruned'),),
}
STOPPED = 130  # exit code of cli.py for a process that saved its state after a signal


class PointError(SparseloraError, RuntimeError):
    """A run failed; the message is the last line that it printed."""


def is_finished(folder: Path) -> bool:
    """Return whether the last stage of a run is done.

    Args:
      folder: folder of the run.
    """
    return (folder / names.result_file(names.MEASURE)).exists()


def run_here(config: ConfigDict, folder: Path, models: tuple[str, ...]) -> None:
    """Do the work of one run in this process.

    Args:
      config: a recipe.
      folder: folder of the run.
      models: the models to evaluate, some of `names.ALL_MODELS`.
    """
    job = Job(config, folder)
    # No export and no report, since a sweep compares only scores and costs.
    stages.evaluate_models(job, models)
    if 'dense' in models:
        stages.floor(job)
    measure(job, models)  # last: its result marks the run as finished


def run_apart(command: Sequence[str], folder: Path) -> None:
    """Do the work of one run in a separate process, which prints into `output.txt`.

    So the peak memory is that of this run alone, and a crash does not end the sweep.

    Args:
      command: command that does the run.
      folder: folder of the run. Programs that the process compiles are stored beside it, for the other runs.

    Raises:
      PointError: the process failed.
      Interrupted: the process was stopped, and has saved its state.
    """
    compiled = {
        'JAX_COMPILATION_CACHE_DIR': str((folder.parent / 'compiled').absolute()),
        # JAX's default is 1 s, which would leave out most programs of a small model.
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.2',
    }
    output = folder / names.OUTPUT
    with output.open('ab') as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | compiled)
        try:
            code = process.wait()
        except KeyboardInterrupt:
            # Ctrl-C in a terminal also reaches the child process, but a signal sent to this process does not.
            process.terminate()
            process.wait()
            code = STOPPED
    if code == STOPPED:
        raise Interrupted(f'{folder.name} was stopped; the same command goes on')
    if code < 0:
        raise PointError(f'killed by signal {-code}')
    if code > 0:
        # launch/cli.py ends with one line about the error; the last line of a traceback is the most informative.
        lines = output.read_text(errors='replace').strip().splitlines()
        raise PointError(lines[-1].removeprefix('error: ') if lines else f'ended with code {code} and no output')


def measure(job: Job, models: tuple[str, ...]) -> dict:
    """Run the last stage: count zeros, trained parameters, and FLOPs of a restoration step and of an answer.

    Args:
      job: the run.
      models: which models it evaluated.
    """

    def compute():
        cfg = job.model.cfg
        # Counting FLOPs needs shapes only, no weights.
        estimate = memory.recipe(cfg, job.config)
        counts = {}
        densities = {}
        if 'restored' in models:
            counts = count_zeros(job, job.merged(), job.trained(names.TRAINING['restored']))
        elif 'pruned' in models:
            counts = count_zeros(job, job.pruned(), None)
        # Raised before the result is written, so that the run counts as failed.
        refuse_violations(folder=job.workdir, sparsity=counts.get('sparsity', {}))
        for tower_densities in counts.get('layer_density', {}).values():
            densities |= tower_densities
        trained_models = [model for model in models if model in names.TRAINING]
        if trained_models:
            model = trained_models[0]
            counts['trained_parameters'] = inspection.count(job.trained(names.TRAINING[model]))
            # The control is trained without masks.
            counts['step_flops'] = flops.train_step(estimate._replace(masks={}) if model == 'control' else estimate)
        dense, sparse = flops.answer(cfg, job.config.text, estimate.params, densities)
        return counts | {'answer_flops': dense, 'answer_flops_sparse': sparse}

    return job.stage(names.MEASURE, compute)


def _key(stage: str, config: ConfigDict) -> str:
    """Return a key of a shared stage: its name, and the fields that its result depends on."""
    fields = json.loads(config.to_json())
    # LoRA and restoration do not affect pruning, except for the shares, which decide the order of the data.
    relevant = {
        name: value for name, value in fields.items() if name not in ('lora', 'restore', 'evaluate', *NO_RESULT)
    }
    relevant['shares'] = fields['restore']['shares']
    if stage != names.PRUNE:
        relevant['evaluate'] = fields['evaluate']
    digest = sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()
    return f'{stage}-{digest[:16]}'


def take_shared(shared_stages: Sequence[str], config: ConfigDict, folder: Path, shared: Path) -> None:
    """Link the shared results of earlier runs into the folder of this run.

    Args:
      shared_stages: stages that this run may share, keys of `SHARED_STAGES`.
      config: the recipe of this run.
      folder: folder of this run.
      shared: folder of all shared results.
    """
    own = Stored(folder, owner_of(folder, config))
    for stage in shared_stages:
        _adopt(stage, own, _shared_files(stage, config, shared))


def give_shared(shared_stages: Sequence[str], config: ConfigDict, folder: Path, shared: Path) -> None:
    """Link the results of this run's stages into the folder of shared results.

    Args:
      shared_stages: stages that this run may share, keys of `SHARED_STAGES`.
      config: the recipe of this run.
      folder: folder of this run.
      shared: folder of all shared results.
    """
    own = Stored(folder, owner_of(folder, config))
    for stage in shared_stages:
        _adopt(stage, _shared_files(stage, config, shared), own)


def _shared_files(stage: str, config: ConfigDict, shared: Path) -> Stored:
    """Return the files of a shared stage, whose owner is its key."""
    key = _key(stage, config)
    return Stored(shared / key, key)


def _adopt(stage: str, taker: Stored, giver: Stored) -> None:
    """Take the stages of a key of `SHARED_STAGES` if the last is done."""
    if (giver.workdir / names.result_file(stage)).exists():
        for part in SHARED_STAGES[stage]:
            taker.adopt(part, giver)


def remove_unneeded(later_runs: Sequence[tuple[Sequence[str], ConfigDict]], shared: Path) -> None:
    """Remove the shared results that no later run needs.

    Args:
      later_runs: (stages that it may share, recipe) of each run that is not done.
      shared: folder of all shared results.
    """
    needed = {_key(stage, config) for shared_stages, config in later_runs for stage in shared_stages}
    # Results are hard links, so runs that have used them keep their own.
    for folder in shared.glob('*'):
        if folder.name not in needed:
            shutil.rmtree(folder)


def remove_weights(folder: Path) -> None:
    """Remove masks, factors and checkpoints of a finished run, whose results are in JSON files.

    Args:
      folder: folder of the run.
    """
    for file in folder.glob('*.safetensors'):
        file.unlink()
    for name in (names.CHECKPOINTS, names.TEACHER):
        shutil.rmtree(folder / name, ignore_errors=True)
