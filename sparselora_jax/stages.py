"""The main job's stages: evaluate, prune, restore, merge and verify, export.

A stage whose result lies in the workdir is skipped; evaluation goes on after its last answer, restoration after its
newest checkpoint.
"""

import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from sparselora_jax import export as export_lib
from sparselora_jax import pruning, storage
from sparselora_jax.checkpoint import Checkpoints
from sparselora_jax.data import pipeline
from sparselora_jax.evaluation import vqa
from sparselora_jax.evaluation.density import layer_density, plain_lora_density, tower_sparsity
from sparselora_jax.evaluation.perplexity import perplexity
from sparselora_jax.job import Job
from sparselora_jax.models import blip2
from sparselora_jax.models.runners import remat_blocks, scan_blocks
from sparselora_jax.progress import Progress
from sparselora_jax.recipe import TOWERS, lora_rules, prune_methods, prune_rules
from sparselora_jax.restore import Frozen, make_train_step, paper_optimizer
from sparselora_jax.sparsity import check_masks, check_sparse
from sparselora_jax.train import fit, init_state
from sparselora_jax.weights import init_lora, merge

TEXT = Path(__file__).parents[1] / 'assets' / 'heldout.txt'


def run(job: Job) -> None:
    """Every stage, in order."""
    evaluate(job, 'dense', lambda: job.model[1])
    prune(job)
    evaluate(job, 'pruned', lambda: merge(job.frozen.params, job.frozen.masks))
    restore(job, 'restore', lambda: job.frozen)
    evaluate(job, 'restored', job.merged)
    export(job)
    floor(job)
    if job.config.restore.control:
        restore(job, 'control', lambda: Frozen(job.model[1], None))
        evaluate(job, 'control', lambda: merge(job.model[1], None, job.trained('control')))


def evaluate(job: Job, name: str, weights: Callable[[], dict]) -> dict:
    """Answers, accuracy per kind and perplexity of a model."""

    def compute():
        cfg, w = job.model[0], weights()
        knobs, source = job.config.evaluate, job.builder.as_data_source('test')
        indices = vqa.sample(knobs.questions, len(source), seed=job.config.seed)
        answers = vqa.evaluate(
            w,
            cfg,
            source,
            indices,
            job.tokenizer,
            job.text,
            batch=knobs.batch,
            max_new_tokens=knobs.max_new_tokens,
            kept=job.workdir / f'answers_{name}.jsonl',
            progress=Progress(f'evaluate {name}', len(indices)),
        )
        accuracy = answers.accuracy()
        held_out = np.asarray(job.tokenizer(TEXT.read_text())['input_ids'])
        scores = {'perplexity': perplexity(w['language'], cfg.language, held_out)}
        job.log.scalars(f'evaluate_{name}', 0, accuracy | scores)
        return {'accuracy': accuracy, 'indices': indices} | scores | answers._asdict()

    return job.stage(f'evaluate_{name}', compute)


def floor(job: Job) -> dict:
    """What a model that never sees an image can reach on the same questions."""

    def compute():
        train, test = (pipeline.read_texts(job.builder, split) for split in ('train', 'test'))
        indices = vqa.sample(job.config.evaluate.questions, len(test), seed=job.config.seed)
        return {'accuracy': vqa.blind_floor(train, [test[index] for index in indices]).accuracy()}

    return job.stage('floor', compute)


def prune(job: Job) -> dict:
    """Calibrates and prunes; writes `masks.safetensors`, and `pruned.safetensors` if kept weights changed."""

    def compute():
        config, (cfg, params) = job.config, job.model
        calibration = [job.batches(config.prune.samples, config.seed + 1)[0]] if config.prune.samples > 0 else []
        progress = Progress('prune', sum((cfg.vision.depth, cfg.qformer.pairs, cfg.language.depth)), interval=5)
        done = []

        def tick(tower, layer, layers):
            done.append(layer)
            progress(len(done), f'{tower} layer {layer + 1} of {layers}')

        result = pruning.prune(
            lambda w, batch, run: blip2.forward(w, cfg, batch, run),
            params,
            calibration,
            prune_rules(config),
            method=prune_methods(config),
            chunk=config.prune.chunk,
            progress=tick,
        )
        for tower, masks in result.masks.items():
            blocks = [(f'{tower}/blocks/.*', config.prune.pattern[tower])]
            check_masks({tower: masks}, blocks, group=config.prune.group[tower])
        check_sparse(result.params, result.masks)
        if config.prune.method == 'sparsegpt':
            storage.save_safetensors(job.workdir / 'pruned.safetensors', result.params)
        storage.save_safetensors(job.workdir / 'masks.safetensors', result.masks)
        return {'tokens': result.tokens}

    return job.stage('prune', compute)


def restore(job: Job, name: str, frozen: Callable[[], Frozen]) -> dict:
    """Trains LoRA under the masks; writes `<name>.safetensors`."""

    def compute():
        cfg, knobs, base = job.model[0], job.config.restore, frozen()
        lora = init_lora(jax.random.key(job.config.seed), base.params, lora_rules(job.config))
        schedule = {key: knobs[key] for key in ('peak', 'warmup', 'start', 'end', 'weight_decay', 'clip')}
        tx = paper_optimizer(knobs.steps, **schedule)
        loss = {key: knobs[key] for key in ('kd', 'temperature', 'kl_reduction', 'gradient', 'accumulate')}
        run = remat_blocks if knobs.remat else scan_blocks
        step = make_train_step(lambda w, batch: blip2.answer_logits(w, cfg, batch, run), tx, **loss)
        checkpoints = Checkpoints(job.workdir / 'checkpoints' / name)
        progress = Progress(name, knobs.steps, first=(checkpoints.steps() or [0])[-1])
        last = [time.monotonic()]

        def note(index, metrics):
            now = time.monotonic()
            job.log.scalars(name, index, metrics | {'seconds': now - last[0]})
            last[0] = now
            progress(index, f'loss {metrics["loss"]:.4f}')

        batches, state = job.batches(knobs.batch, job.config.seed), init_state(lora, tx)
        last[0] = time.monotonic()
        every = knobs.checkpoint_every
        state = fit(step, state, base, batches, steps=knobs.steps, checkpoints=checkpoints, every=every, log=note)
        storage.save_safetensors(job.workdir / f'{name}.safetensors', state.trained)
        seconds = [value for _, value in job.log.curve(name, 'seconds')]
        return {'step_s': float(np.median(seconds)), 'steps_s': float(np.sum(seconds))}

    return job.stage(name, compute)


def export(job: Job) -> dict:
    """Writes `exported/`: the Hugging Face directory of the language tower, and the whole model; reads it back."""

    def compute():
        cfg, merged = job.model[0], job.merged()
        folder = job.workdir / 'exported'
        export_lib.save_llama(folder / 'language', cfg.language, merged['language'], job.tokenizer)
        export_lib.check_llama(folder / 'language', merged['language'])
        export_lib.save_model(folder / 'model.safetensors', cfg, merged, job.text)
        _, read = export_lib.load_model(folder / 'model.safetensors')
        if not jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), merged, read)):
            raise storage.StorageError(f'{folder}/model.safetensors: read back, it is not what was written')
        frozen, pattern, group = job.frozen, job.config.prune.pattern, job.config.prune.group
        return {
            'sparsity': {t: tower_sparsity(read, t, pattern[t], group=group[t]) for t in TOWERS},
            'layer_density': {tower: layer_density(read, tower) for tower in TOWERS},
            'lora_merged_density': plain_lora_density(frozen.params, frozen.masks, job.trained('restore')),
            'bytes': {
                'dense': sum(leaf.nbytes for leaf in jax.tree.leaves(job.model[1])),
                'exported': (folder / 'model.safetensors').stat().st_size,
            },
        }

    return job.stage('export', compute)
