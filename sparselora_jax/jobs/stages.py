"""The stages of a run in their order, and the stages that prune; the others have files of their own.

A stage whose result lies in the workdir is skipped; evaluation goes on after its last answer, restoration after its
newest checkpoint.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import jax
import numpy as np

from sparselora_jax import pruning
from sparselora_jax.checkpoints import trees
from sparselora_jax.checkpoints.export import export_model
from sparselora_jax.evaluation.density import block_count
from sparselora_jax.jobs.evaluate import evaluate, floor
from sparselora_jax.jobs.export import export
from sparselora_jax.jobs.job import Job
from sparselora_jax.jobs.names import ALL_MODELS, CONTROL, KERNELS, MASKS, MODELS, ROUNDED, TRAINING
from sparselora_jax.jobs.restore import restore
from sparselora_jax.pruning.allocate import total
from sparselora_jax.recipe import prune_methods, prune_rules, rounded_rules
from sparselora_jax.restoration.losses import answer_loss
from sparselora_jax.restoration.restore import Frozen
from sparselora_jax.runtime.progress import Progress
from sparselora_jax.sparse import packing
from sparselora_jax.sparse.masks import check_masks, check_sparse
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
    # The control goes last: the other stages do not need it, and it costs as much as restoration.
    if job.config.restore.control:
        evaluate_models(job, (CONTROL,))


def evaluate_models(job: Job, models: Sequence[str]) -> None:
    """Run the stages that lead to the evaluations of some models, and no others.

    Args:
      job: the run.
      models: some of `names.ALL_MODELS`.
    """
    unknown = set(models) - set(ALL_MODELS)
    if unknown:
        raise ValueError(f'models {sorted(unknown)}: expected some of {", ".join(ALL_MODELS)}')
    # Weights are given as functions: a stage that is done already loads none.
    if 'dense' in models:
        evaluate(job, 'dense', lambda: job.params)
    # Pruning is needed by two models, so it is no part of either.
    if 'pruned' in models or 'restored' in models:
        prune(job)
    if 'pruned' in models:
        evaluate(job, 'pruned', job.pruned)
    if 'restored' in models:
        round_base(job)
        restore(job, TRAINING['restored'], lambda: job.base)
        evaluate(job, 'restored', job.merged)
    if CONTROL in models:
        restore(job, TRAINING[CONTROL], lambda: Frozen(job.params, None))
        # Without masks: LoRA is merged into the dense weights as usual.
        evaluate(job, CONTROL, lambda: merge(job.params, None, job.trained(TRAINING[CONTROL])))


def _calibration(job: Job) -> list[dict]:
    samples = job.config.prune.samples
    return [job.batches(samples, job.config.seed + 1)[0]] if samples > 0 else []


def allocate(job: Job) -> dict[str, np.ndarray] | None:
    """Zeros of each layer's kernel, kept in `zeros.json`; None: each layer has what its pattern says.

    ECoFLaP's scores are of the cross-entropy on answers of training batches, OWL's shares of the samples that prune.
    """
    if job.config.prune.allocation == 'uniform':
        return None

    def compute():
        config, model, knobs = job.config, job.model, job.config.prune
        params = job.params_on_disk() if config.stream else job.params
        uniform = pruning.uniform_zeros(params, prune_rules(config), method=prune_methods(config))
        sizes, paths = pruning.kernel_sizes(params, uniform), tuple(uniform)

        def loss(w, batch, run):
            return answer_loss(model.answer_logits(w, batch, run), batch['targets'], batch['answer'])

        if knobs.allocation == 'global_magnitude':
            found = pruning.global_magnitude_zeros(params, uniform, highest=knobs.highest)
        elif knobs.allocation == 'owl':
            shares = pruning.outlier_shares(
                model.hidden, params, _calibration(job), paths, threshold=knobs.outlier, chunk=knobs.chunk
            )
            found = pruning.owl_zeros(shares, uniform, sizes, spread=knobs.spread)
        else:
            drawn = job.batches(knobs.score_batch, config.seed + 1)
            batches = [drawn[index] for index in range(knobs.score_samples // knobs.score_batch)]
            if knobs.allocation == 'ecoflap_first':
                scores = pruning.first_order_scores(loss, params, batches, paths)
            else:
                progress = Progress('score', sum(zeros.size for zeros in uniform.values()), interval=5)
                key, eps = jax.random.key(config.seed), knobs.noise
                scores = pruning.zeroth_order_scores(loss, params, batches, paths, key=key, eps=eps, progress=progress)
            found = pruning.allocate(scores, sizes, total(uniform), highest=knobs.highest)
        return {'zeros': {path: zeros.tolist() for path, zeros in found.items()}}

    return {path: np.array(of_layers) for path, of_layers in job.stage('zeros', compute)['zeros'].items()}


def prune(job: Job) -> dict:
    """Calibrates and prunes; writes `masks.safetensors`, and `kernels.safetensors` if kept weights changed.

    With `config.stream`, blocks are read from disk when their turn comes, and what was pruned is written at once; the
    pruned model then lies in `pruned/`, a Hugging Face directory.
    """
    zeros = allocate(job)

    def compute():
        config, model = job.config, job.model
        params = job.params_on_disk() if config.stream else job.params
        calibration = _calibration(job)
        rules, methods = prune_rules(config), prune_methods(config)
        flat, patterns = flatten(params), pruning.patterns_of(params, rules)
        masks_like = {path: jax.ShapeDtypeStruct(flat[path].shape, bool) for path in patterns}
        kernels_like = {path: flat[path] for path in patterns} if config.prune.method == 'sparsegpt' else {}
        with ExitStack() as files:
            write_mask = files.enter_context(trees.layer_writer(job.workdir / MASKS, masks_like))
            if kernels_like:
                write_kernel = files.enter_context(trees.layer_writer(job.workdir / KERNELS, kernels_like))

            def keep(path, layer, kernel, mask):
                tower = path.split('/')[0]
                promised = {path: np.asarray(zeros[path][layer])} if zeros else None
                check_masks({path: mask}, [('.*', patterns[path])], group=config.prune.group[tower], zeros=promised)
                check_sparse({path: kernel}, {path: mask})
                write_mask(path, layer, mask)
                if kernels_like:
                    write_kernel(path, layer, kernel)

            knobs = {'method': methods, 'zeros': zeros, 'keep': keep, 'progress': _by_layer('prune', params)}
            result = pruning.prune(model.hidden, params, calibration, rules, chunk=config.prune.chunk, **knobs)
        if config.stream:
            export_model(job.workdir / 'pruned', model, job.pruned_on_disk())
        return {'tokens': result.tokens}

    return job.stage('prune', compute)


def _by_layer(name: str, params: dict) -> Callable[[str, int, int], None]:
    """Return a function that shows the progress of a walk over all blocks: called with tower, layer and layers."""
    # Layers are counted here: a walk says which layer of which tower is done, not how many in all.
    progress = Progress(name, block_count(params), interval=5)
    done = 0

    def show(tower, layer, layers):
        nonlocal done
        done += 1
        progress(done, f'{tower} layer {layer + 1} of {layers}')

    return show


def round_base(job: Job) -> None:
    """Chooses what a base in four bits holds: GPTQ, on the samples of pruning; writes `rounded.safetensors`."""
    rules, config = rounded_rules(job.config), job.config
    if not rules:
        return

    def compute():
        job.release_dense()
        params = job.pruned_on_disk()
        flat = flatten(params)
        like = {path: flat[path] for path in pruning.patterns_of(params, rules)}
        with trees.layer_writer(job.workdir / ROUNDED, like) as write:
            base = config.restore.base
            held = base if base in packing.FOUR_BITS else 'packed24_int4'
            knobs = {'method': pruning.GPTQ(config.prune.damp, held), 'chunk': config.prune.chunk}
            knobs |= {'keep': lambda path, layer, kernel, mask: write(path, layer, kernel)}
            knobs |= {'progress': _by_layer('round', params)}
            result = pruning.prune(job.model.hidden, params, _calibration(job), rules, **knobs)
        return {'tokens': result.tokens}

    job.stage('round', compute)
