"""Compare what a recipe takes with what the machine has, before the first stage; describe a run without doing it."""

import contextlib
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from sparselora_jax.jobs.job import Job
from sparselora_jax.planning import disk, memory
from sparselora_jax.recipe import ConfigError, allocation_of, reconstruction
from sparselora_jax.runtime import machine
from sparselora_jax.sparse import rules

GIB = 2**30
# What lowers the memory of each stage.
REMEDIES = {
    'load': 'use more devices (mesh.fsdp), or dtype bfloat16',
    'prune': 'lower prune.samples or prune.chunk; stream=True, if not set, keeps one block in memory',
    'round': 'lower prune.samples or prune.chunk',
    'restore': 'lower restore.batch, raise restore.accumulate, or set restore.remat',
    'merge and export': 'use more devices (mesh.fsdp), or dtype bfloat16',
    'evaluate': 'lower evaluate.batch, evaluate.num_beams or evaluate.max_new_tokens',
    'tasks': 'lower evaluate.batch',
}
PRUNING_ALONE = ('prune',)  # what launch/prune.py runs
ALL_STAGES = tuple(memory.STAGES)


class Resources(NamedTuple):
    """What a run takes, and what the machine has, in bytes.

    Attributes:
      memory: of each stage on one device, by name.
      device_memory: memory of one device.
      disk: what the run writes, by name.
      free_disk: free bytes of the workdir's disk.
    """

    memory: dict[str, int]
    device_memory: int
    disk: dict[str, int]
    free_disk: int


def estimate(trees: memory.Recipe, workdir: Path, stages: tuple[str, ...] = ALL_STAGES) -> Resources:
    """Estimate what a run takes.

    Args:
      trees: trees of the recipe.
      workdir: folder of the run, which need not exist.
      stages: stages that it runs, keys of `memory.STAGES`.
    """
    totals = {name: memory.STAGES[name](trees) for name in stages}
    devices = math.prod(trees.config.mesh.values())
    return Resources(
        # A stage without terms is not part of this recipe.
        memory={name: stage.total for name, stage in totals.items() if stage.held},
        device_memory=machine.device_memory(devices),
        disk=disk.prune(trees) if stages == PRUNING_ALONE else disk.train(trees),
        free_disk=machine.free_disk(workdir),
    )


def check(resources: Resources, workdir: Path) -> None:
    """Check that a run fits into memory and on the disk.

    The estimate leaves out what the compiler adds, so a run that passes may still be too large.

    Args:
      resources: see `estimate`.
      workdir: folder of the run, for the error.

    Raises:
      ConfigError: it does not; names both numbers, and the fields to change.
    """
    for name, size in resources.memory.items():
        if size > resources.device_memory:
            raise ConfigError(
                f'{name}: takes at least {size / GIB:,.1f} GiB of memory, and a device has '
                f'{resources.device_memory / GIB:,.1f} GiB; {REMEDIES[name]}'
            )
    needed = sum(resources.disk.values())
    if needed > resources.free_disk:
        largest = max(resources.disk, key=resources.disk.get)
        raise ConfigError(
            f'{workdir}: the run writes about {needed / GIB:,.1f} GiB ({largest} '
            f'{resources.disk[largest] / GIB:,.1f}), and its disk has {resources.free_disk / GIB:,.1f} GiB free; make '
            'room, or use another workdir'
        )


def check_workdir(workdir: Path) -> None:
    """Check that the folder of a run can be made or written to, without writing.

    Args:
      workdir: the folder, which need not exist.

    Raises:
      ConfigError: it cannot; names the path that is in the way.
    """
    _check_folder('--workdir', workdir)


def _check_folder(option: str, folder: Path) -> None:
    """Check that the folder that an option names can be made or written to."""
    folder = folder.absolute()
    # `lexists`, because a symbolic link that leads nowhere is in the way too.
    existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise ConfigError(f'{option}={folder}: {existing} is no folder; use another one')
    if not os.access(existing, os.W_OK):
        raise ConfigError(f'{option}={folder}: {existing} cannot be written to; use another one')


@contextlib.contextmanager
def without_data_dir(configs: Sequence[ConfigDict]) -> Iterator[None]:
    """Let loaders write into a folder that is removed, if a recipe's own has no data yet.

    Args:
      configs: recipes; their `data_dir` is changed.

    Raises:
      ConfigError: a loader has written something, and a real run could not write it.
    """
    with tempfile.TemporaryDirectory() as scratch:
        replaced = []
        for config in configs:
            folder = Path(config.data_dir)
            if not folder.is_dir() or not any(folder.iterdir()):
                replaced.append(folder)
                config.data_dir = scratch
        yield
        if any(Path(scratch).iterdir()):
            for folder in dict.fromkeys(replaced):
                _check_folder('--config.data_dir', folder)


def check_job(job: Job, stages: tuple[str, ...] = ALL_STAGES) -> Resources:
    """Check everything that can be checked before the first stage, and return what the run takes.

    Nothing is written, except for the prepared easy-VQA data.

    Args:
      job: the run.
      stages: stages that it runs, keys of `memory.STAGES`.

    Raises:
      ConfigError: see `check` and `Job.check`; or an allocation is scored on more samples than there are;
        or nothing would be trained.
    """
    check_workdir(job.workdir)
    job.check()
    config = job.config
    records = len(job.dataset.train.source)
    if allocation_of(config).uses_score_batches and config.prune.score_samples > records:
        raise ConfigError(
            f'prune.score_samples {config.prune.score_samples}: expected at most the training records, {records}'
        )
    restores = 'restore' in stages and config.restore.trained == 'lora'
    if restores and not any(config.lora.rank.values()):
        raise ConfigError(
            'lora.rank is 0 in every tower, so restoration would train nothing; raise one, or run launch/prune.py'
        )
    trees = memory.recipe(job.model.cfg, config)
    resources = estimate(trees, job.workdir, stages)
    resources = resources._replace(memory=resources.memory | _memory_of_tasks(job, trees))
    check(resources, job.workdir)
    return resources


def _memory_of_tasks(job: Job, trees: memory.Recipe) -> dict[str, int]:
    """Return the memory that the largest task takes, as the stage `tasks`; {} without tasks.

    Prompts and decoding of tasks are those of the family, so they take another amount than the recipe's own questions.
    """
    totals = []
    for prepared in job.tasks.values():
        text = prepared.asked.text
        beams = text.decoding.get('num_beams', 1)
        stage = memory.answer(trees, text, beams=beams, new_tokens=text.decoding['max_new_tokens'])
        totals.append(stage.total)
    return {'tasks': max(totals)} if totals else {}


def describe(job: Job, resources: Resources) -> str:
    """Return what a run would do, in a few lines.

    Args:
      job: the run.
      resources: see `check_job`.
    """
    config = job.config
    trees = memory.recipe(job.model.cfg, config)
    mesh = ', '.join(f'{axis}={size}' for axis, size in config.mesh.items())
    options = reconstruction(config)
    training = f', {options.passes} passes of reconstruction' if options else ''
    lines = [
        f'model: {config.model} ({job.model.family.name}), {config.dtype}, mesh {mesh}',
        f'data: {config.data}, {len(job.dataset.train.source):,} training and {len(job.dataset.test.source):,} test '
        'records',
        f'prune: {_towers(trees.masks)} by {config.prune.method}, {config.prune.samples} samples{training}',
    ]
    lines += job.repeated_samples()
    if 'restore' in resources.memory:
        restore = config.restore
        trained = 'the pruned kernels' if restore.trained == 'weights' else f'LoRA in {_towers(trees.lora)}'
        lines.append(f'restore: {trained}, {restore.steps} steps of {restore.batch}')
        lines += job.repeated_records(restore.batch)
        questions = min(config.evaluate.questions, len(job.dataset.test.source))
        lines.append(f'evaluate: {questions} questions, {config.evaluate.num_beams} beams')
    for name, prepared in job.tasks.items():
        lines.append(f'task: {name}, {len(prepared.items):,} items')
    lines += [f'memory, {name}: {size / GIB:.2f} GiB' for name, size in resources.memory.items()]
    lines.append(f'memory of a device: {resources.device_memory / GIB:.2f} GiB')
    needed = sum(resources.disk.values())
    lines.append(f'disk: about {needed / GIB:.2f} GiB in {job.workdir}, {resources.free_disk / GIB:.2f} GiB are free')
    return '\n'.join(lines)


def _towers(tree: dict) -> str:
    """Return the names of the towers that a tree has leaves in."""
    return ', '.join(sorted({path.partition('/')[0] for path in rules.flatten(tree)})) or 'no tower'
