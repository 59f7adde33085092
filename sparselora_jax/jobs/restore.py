"""The stages that train: the teacher's logits, and LoRA or kernels under the masks."""

import time
from collections.abc import Callable

import jax
import numpy as np

from sparselora_jax.checkpoints import trees
from sparselora_jax.jobs import names
from sparselora_jax.jobs.job import Job
from sparselora_jax.recipe import lora_rules, reads_teacher, restore_program
from sparselora_jax.restoration import guard, teacher
from sparselora_jax.restoration.restore import Frozen, pruned_kernels
from sparselora_jax.restoration.saved_state import Checkpoints
from sparselora_jax.restoration.train import fit, init_state
from sparselora_jax.runtime.progress import Progress
from sparselora_jax.sparse import sharding
from sparselora_jax.sparse.weights import init_lora


def keep_teacher(job: Job) -> dict:
    """Write the dense model's most likely tokens for every batch of restoration into `teacher/`.

    Args:
      job: the run.

    Returns:
      `bytes` on disk.
    """

    def compute():
        options = job.config.restore
        size = teacher.keep(
            job.stored.writes(names.TEACHER),
            job.model.answer_logits,
            job.params,
            job.batches(options.batch, job.config.seed),
            steps=options.steps,
            k=options.top_k,
            temperature=options.temperature,
            owner=job.stored.owner,
            progress=Progress('teacher', options.steps),
        )
        return {'bytes': size}

    return job.stage(names.TEACHER, compute)


def restore(job: Job, name: str, load_frozen: Callable[[], Frozen]) -> dict:
    """Train LoRA under the masks, or the pruned kernels themselves; write the result into `<name>.safetensors`.

    Args:
      job: the run.
      name: name of the stage, one of the values of `names.TRAINING`.
      load_frozen: function that returns the trees that are not trained; called only if the stage is not done.

    Returns:
      `step_s`, the median seconds of a step, and `steps_s`, the seconds of all steps, including those before an
      interruption.
    """
    # A separate stage before training, so that training does not need the dense model in memory.
    is_taught = reads_teacher(job.config)
    if is_taught:
        keep_teacher(job)

    def compute():
        options = job.config.restore
        frozen = load_frozen()
        if options.trained == 'weights':
            # Copies, since the state is donated to each step but `frozen` must stay intact.
            first = pruned_kernels(frozen.params, frozen.masks)
        else:
            first = init_lora(jax.random.key(job.config.seed), frozen.params, lora_rules(job.config))
        step, tx = restore_program(job.model, job.config, job.mesh)
        checkpoints = Checkpoints(job.workdir / names.CHECKPOINTS / name)
        # A resumed run counts from its newest checkpoint; otherwise the rate and the ETA would be wrong.
        saved_steps = checkpoints.steps() or [0]
        progress = Progress(name, options.steps, first=saved_steps[-1])
        state = init_state(job.shard(first), tx)
        del first  # the state has a copy, so trained kernels would be in memory twice
        if job.mesh is not None:
            # Replicate the counters too; otherwise a checkpoint would restore them on one device.
            state = sharding.everywhere(state, job.mesh)
        batches = job.batches(options.batch, job.config.seed, with_teacher=is_taught)
        # A step's time is the time between two logs, so it includes reading the next batch and saving checkpoints.
        last_time = time.monotonic()

        def log_step(index, metrics):
            nonlocal last_time
            now = time.monotonic()
            job.log.scalars(name, index, metrics | {'seconds': now - last_time})
            last_time = now
            skipped = ', left out' if metrics.get('skipped') else ''
            progress(index, f'loss {metrics["loss"]:.4f}{skipped}')

        state = fit(
            step,
            state,
            frozen,
            batches,
            steps=options.steps,
            checkpoints=checkpoints,
            every=options.checkpoint_every,
            # Only an optimizer that skips bad steps can tolerate several of them.
            patience=guard.PATIENCE if options.on_bad_step == 'skip' else 1,
            log=log_step,
            profile=job.workdir if job.config.profile else None,
        )
        trees.save_safetensors(job.stored.writes(names.trained_file(name)), state.trained)
        # From the log, because an interrupted run also has steps of earlier processes.
        seconds = [value for _, value in job.log.curve(name, 'seconds')]
        return {'step_s': float(np.median(seconds)), 'steps_s': float(np.sum(seconds))}

    return job.stage(name, compute)
