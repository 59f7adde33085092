"""The order of all stages of a run, and the stages that prune; the other stages have their own files.

A stage whose result is in the workdir is skipped. Evaluation resumes after its last answer, restoration after its
newest checkpoint.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import jax
import numpy as np

from sparselora_jax import pruning
from sparselora_jax.checkpoints import trees
from sparselora_jax.evaluation.density import block_count
from sparselora_jax.jobs.evaluate import evaluate, floor, score_on_tasks
from sparselora_jax.jobs.export import export
from sparselora_jax.jobs.job import Job
from sparselora_jax.jobs.names import ALL_MODELS, CONTROL, KERNELS, MASKS, MODELS, ROUNDED, TRAINING
from sparselora_jax.jobs.restore import restore
from sparselora_jax.pruning.allocate import run_allocation
from sparselora_jax.recipe import (
    allocation_of,
    calibration_samples,
    edited_kernels,
    prune_methods,
    prune_rules,
    reconstruction,
    rounded_format,
    rounded_rules,
)
from sparselora_jax.restoration.losses import answer_loss
from sparselora_jax.restoration.restore import Frozen
from sparselora_jax.runtime.progress import Progress
from sparselora_jax.sparse.rules import flatten
from sparselora_jax.sparse.weights import merge


def run(job: Job) -> None:
    """Run every stage, in order.

    Args:
      job: the run.
    """
    evaluate_models(job, MODELS)
    export(job)
    floor(job)
    # The control comes last: no other stage needs it, and it costs as much as restoration.
    if job.config.restore.control:
        evaluate_models(job, (CONTROL,))


def evaluate_models(job: Job, models: Sequence[str]) -> None:
    """Run only the stages that are needed to evaluate some models.

    Args:
      job: the run.
      models: some of `names.ALL_MODELS`.
    """
    unknown = set(models) - set(ALL_MODELS)
    if unknown:
        raise ValueError(f'models {sorted(unknown)}: expected some of {", ".join(ALL_MODELS)}')
    # Weights are passed as functions, so that a stage that is already done loads none.
    if 'dense' in models:
        _evaluate(job, 'dense', lambda: job.params)
    # Two models need pruning, so it is not part of either evaluation.
    if 'pruned' in models or 'restored' in models:
        prune(job)
    if 'pruned' in models:
        _evaluate(job, 'pruned', job.pruned)
    if 'restored' in models:
        round_base(job)
        restore(job, TRAINING['restored'], lambda: job.base)
        _evaluate(job, 'restored', job.merged)
    if CONTROL in models:
        restore(job, TRAINING[CONTROL], lambda: Frozen(job.params, None))
        # Without masks: LoRA is merged into the dense weights as usual.
        _evaluate(job, CONTROL, lambda: merge(job.params, None, job.trained(TRAINING[CONTROL])))


def _evaluate(job: Job, name: str, load_weights: Callable[[], dict]) -> None:
    """Score a model on the questions of the recipe's data, and on its tasks."""
    evaluate(job, name, load_weights)
    score_on_tasks(job, name, load_weights)


def score_pruned_on_tasks(job: Job) -> None:
    """Score the dense and the pruned model on the tasks of the recipe, for a run that only prunes.

    Args:
      job: the run, which is pruned.
    """
    score_on_tasks(job, 'dense', lambda: job.params)
    score_on_tasks(job, 'pruned', job.pruned)


def _calibration(job: Job) -> list[dict]:
    """Return the samples that pruning is calibrated on, as one batch."""
    return [job.calibration_batches(calibration_samples(job.config))[0]]


def _score_batches(job: Job, samples: int, batch: int) -> list[dict]:
    """Return the batches of calibration samples on which an allocation scores layers."""
    drawn = job.calibration_batches(batch)
    return [drawn[index] for index in range(samples // batch)]


def allocate(job: Job) -> dict[str, np.ndarray] | None:
    """Compute the zeros of each layer's kernel into `zeros.json`, or return None if patterns alone decide them.

    An allocation may use the cross-entropy of answers in training batches, and the calibration samples of pruning.

    Args:
      job: the run, whose recipe names the allocation.
    """
    allocation = allocation_of(job.config)
    if not allocation.moves_zeros:
        return None

    def compute():
        config = job.config
        model = job.model
        params = job.params_on_disk() if config.stream else job.params
        uniform = pruning.uniform_zeros(params, prune_rules(config), method=prune_methods(config))

        def loss(w, batch, run):
            return answer_loss(model.answer_logits(w, batch, run), batch['targets'], batch['answer'])

        inputs = pruning.AllocationInputs(
            params=params,
            uniform=uniform,
            sizes=pruning.kernel_sizes(params, uniform),
            forward=model.hidden,
            loss=loss,
            calibration=lambda: _calibration(job),
            score_batches=lambda samples, batch: _score_batches(job, samples, batch),
            is_image=model.is_image,
            key=jax.random.key(config.seed),
            progress=lambda name, count: Progress(name, count, interval=5),
        )
        zeros = run_allocation(allocation, inputs)
        return {'zeros': {path: of_layers.tolist() for path, of_layers in zeros.items()}}

    return {path: np.array(of_layers) for path, of_layers in job.stage('zeros', compute)['zeros'].items()}


def prune(job: Job) -> dict:
    """Calibrate and prune; write `masks.safetensors`, and `kernels.safetensors` if kept weights change.

    With `config.stream`, each block is read from disk just before it is pruned, and each pruned layer is written at
    once.

    Args:
      job: the run, whose recipe names the method.
    """
    zeros = allocate(job)

    def compute():
        config = job.config
        model = job.model
        params = job.params_on_disk() if config.stream else job.params
        calibration = _calibration(job)
        rules = prune_rules(config)
        flat = flatten(params)
        patterns = pruning.patterns_of(params, rules)
        mask_shapes = {path: jax.ShapeDtypeStruct(flat[path].shape, bool) for path in patterns}
        # Unchanged kept weights are not stored, since they can be read from the dense model.
        edited = {path: flat[path] for path in edited_kernels(config, patterns)}
        with ExitStack() as files:
            write_mask = files.enter_context(trees.layer_writer(job.stored.writes(MASKS), mask_shapes))
            if edited:
                write_kernel = files.enter_context(trees.layer_writer(job.stored.writes(KERNELS), edited))

            def keep(path, layer, kernel, mask):
                write_mask(path, layer, mask)
                if path in edited:
                    write_kernel(path, layer, kernel)

            result = pruning.prune(
                model.hidden,
                params,
                calibration,
                rules,
                method=prune_methods(config),
                zeros=zeros,
                sequential=config.prune.sequential,
                chunk=config.prune.chunk,
                offload=config.prune.offload,
                reconstruct=reconstruction(config),
                keep=keep,
                progress=_by_layer('prune', params),
            )
        return {'tokens': result.tokens}

    return job.stage('prune', compute)


def _by_layer(name: str, params: dict) -> Callable[[str, int, int], None]:
    """Return a function of (tower, layer, layers) that shows the progress of a walk over all blocks."""
    # Count layers here: a walk reports the layer within its tower, not the total.
    progress = Progress(name, block_count(params), interval=5)
    done = 0

    def show(tower, layer, layers):
        nonlocal done
        done += 1
        progress(done, f'{tower} layer {layer + 1} of {layers}')

    return show


def round_base(job: Job) -> None:
    """Round a four-bit base by GPTQ on the calibration samples of pruning; write `rounded.safetensors`.

    Args:
      job: the run; nothing happens unless its recipe stores pruned kernels in four bits.
    """
    config = job.config
    rules = rounded_rules(config)
    if not rules:
        return

    def compute():
        job.release_dense()
        params = job.pruned_on_disk()
        flat = flatten(params)
        rounded = {path: flat[path] for path in pruning.patterns_of(params, rules)}
        method = pruning.GPTQ(config.prune.damp, rounded_format(config))
        with trees.layer_writer(job.stored.writes(ROUNDED), rounded) as write:
            result = pruning.prune(
                job.model.hidden,
                params,
                _calibration(job),
                rules,
                method=method,
                sequential=config.prune.sequential,
                chunk=config.prune.chunk,
                offload=config.prune.offload,
                keep=lambda path, layer, kernel, mask: write(path, layer, kernel),
                progress=_by_layer('round', params),
            )
        return {'tokens': result.tokens}

    job.stage('round', compute)
