"""The main job's stages: evaluate, prune, restore, merge and verify, export.

A stage whose result lies in the workdir is skipped; evaluation goes on after its last answer, restoration after its
newest checkpoint.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sparselora_jax import pruning
from sparselora_jax.checkpoints import embedded, hf_configs, trees
from sparselora_jax.checkpoints import export as hf_export
from sparselora_jax.checkpoints import packed as hf_packed
from sparselora_jax.checkpoints import peft as peft_adapter
from sparselora_jax.data import text_format
from sparselora_jax.evaluation import vqa
from sparselora_jax.evaluation.density import block_count, layer_density, plain_lora_density, tower_sparsity
from sparselora_jax.evaluation.perplexity import perplexity
from sparselora_jax.jobs.job import KERNELS, MASKS, ROUNDED, TEACHER, Job
from sparselora_jax.pruning.allocate import total
from sparselora_jax.recipe import (
    ConfigError,
    lora_rules,
    pack_formats,
    prune_methods,
    prune_rules,
    reads_teacher,
    restore_program,
    rounded_rules,
)
from sparselora_jax.restoration import guard, teacher
from sparselora_jax.restoration.checkpoint import Checkpoints
from sparselora_jax.restoration.losses import answer_loss
from sparselora_jax.restoration.restore import Frozen, pruned_kernels
from sparselora_jax.restoration.train import fit, init_state
from sparselora_jax.runtime import processes
from sparselora_jax.runtime.files import StorageError
from sparselora_jax.runtime.progress import Progress
from sparselora_jax.sparse import packing, sharding
from sparselora_jax.sparse.dense import dense_kernel
from sparselora_jax.sparse.masks import check_masks, check_sparse
from sparselora_jax.sparse.rules import flatten
from sparselora_jax.sparse.weights import Adapted, init_lora, merge

TEXT = Path(__file__).parents[2] / 'assets' / 'heldout.txt'


def run(job: Job) -> None:
    """Every stage, in order."""
    evaluate_models(job, ('dense', 'pruned', 'restored'))
    export(job)
    floor(job)
    if job.config.restore.control:
        evaluate_models(job, ('control',))


def evaluate_models(job: Job, models: Sequence[str]) -> None:
    """The stages that lead to the evaluations of these models (dense, pruned, restored, control), and no others."""
    if 'dense' in models:
        evaluate(job, 'dense', lambda: job.params)
    if 'pruned' in models or 'restored' in models:
        prune(job)
    if 'pruned' in models:
        evaluate(job, 'pruned', lambda: pruned_params(job))
    if 'restored' in models:
        round_base(job)
        restore(job, 'restore', lambda: job.base)
        evaluate(job, 'restored', job.merged)
    if 'control' in models:
        restore(job, 'control', lambda: Frozen(job.params, None))
        evaluate(job, 'control', lambda: merge(job.params, None, job.trained('control')))


def pruned_params(job: Job) -> dict:
    """The pruned model as plain arrays with zeros in place."""
    return merge(job.frozen.params, job.frozen.masks)


def evaluate(job: Job, name: str, weights: Callable[[], dict]) -> dict:
    """Answers, accuracy per kind, and perplexity of a decoder-only language tower."""

    def compute():
        model, w = job.model, weights()
        knobs = job.config.evaluate
        indices = vqa.sample(knobs.questions, len(job.dataset.test.source), seed=job.config.seed)
        answers = vqa.evaluate(
            model,
            w,
            job.processor,
            job.text,
            job.dataset.test,
            indices,
            batch=knobs.batch,
            kept=job.workdir / f'answers_{name}.jsonl',
            progress=Progress(f'evaluate {name}', len(indices)),
            **job.text.decoding,
        )
        accuracy, scores = answers.accuracy(job.dataset.kind_of), {}
        if not model.encoder_decoder:
            held_out = np.asarray(job.processor.hf.tokenizer(TEXT.read_text())['input_ids'])
            scores['perplexity'] = perplexity(w['language'], model.cfg.language, held_out)
        job.log.scalars(f'evaluate_{name}', 0, accuracy | scores)
        return {'accuracy': accuracy, 'indices': indices} | scores | answers._asdict()

    return job.stage(f'evaluate_{name}', compute)


def floor(job: Job) -> dict:
    """What a model that never sees an image can reach on the same questions."""

    def compute():
        train, test = (split.read_texts() for split in (job.dataset.train, job.dataset.test))
        indices = vqa.sample(job.config.evaluate.questions, len(test), seed=job.config.seed)
        floor = vqa.blind_floor(train, [test[index] for index in indices])
        return {'accuracy': floor.accuracy(job.dataset.kind_of)}

    return job.stage('floor', compute)


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
            hf_export.export_model(job.workdir / 'pruned', model, job.pruned_on_disk())
        return {'tokens': result.tokens}

    return job.stage('prune', compute)


def _by_layer(name: str, params: dict) -> Callable[[str, int, int], None]:
    """What shows the progress of a walk over all blocks."""
    progress, done = Progress(name, block_count(params), interval=5), []

    def show(tower, layer, layers):
        done.append(layer)
        progress(len(done), f'{tower} layer {layer + 1} of {layers}')

    return show


def round_base(job: Job) -> None:
    """Chooses what a base in four bits holds: GPTQ, on the samples of pruning; writes `rounded.safetensors`."""
    rules, config = rounded_rules(job.config), job.config
    if not rules:
        return

    def compute():
        job.let_go()
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


def keep_teacher(job: Job) -> dict:
    """The dense model's likeliest tokens on every batch of restoration, in `teacher/`."""

    def compute():
        model, knobs = job.model, job.config.restore
        batches, progress = job.batches(knobs.batch, job.config.seed), Progress('teacher', knobs.steps)
        kept = {'steps': knobs.steps, 'k': knobs.top_k, 'temperature': knobs.temperature, 'progress': progress}
        return {'bytes': teacher.keep(job.workdir / TEACHER, model.answer_logits, job.params, batches, **kept)}

    return job.stage('teacher', compute)


def restore(job: Job, name: str, frozen: Callable[[], Frozen]) -> dict:
    """Trains LoRA under the masks, or the pruned kernels themselves; writes `<name>.safetensors`."""
    taught = reads_teacher(job.config)
    if taught:
        keep_teacher(job)

    def compute():
        model, knobs, base = job.model, job.config.restore, frozen()
        if knobs.trained == 'weights':
            first = pruned_kernels(base.params, base.masks)
        else:
            first = init_lora(jax.random.key(job.config.seed), base.params, lora_rules(job.config))
        step, tx = restore_program(model, job.config, job.mesh)
        checkpoints = Checkpoints(job.workdir / 'checkpoints' / name)
        progress = Progress(name, knobs.steps, first=(checkpoints.steps() or [0])[-1])
        last = [time.monotonic()]

        def note(index, metrics):
            now = time.monotonic()
            job.log.scalars(name, index, metrics | {'seconds': now - last[0]})
            last[0] = now
            left_out = ', left out' if metrics.get('skipped') else ''
            progress(index, f'loss {metrics["loss"]:.4f}{left_out}')

        batches = job.batches(knobs.batch, job.config.seed, taught=taught)
        state = init_state(job.shard(first), tx)
        del first  # the state holds a copy; pruned kernels would be in memory twice
        if job.mesh is not None:  # its counters too, or a checkpoint would bring them back to one device
            state = sharding.everywhere(state, job.mesh)
        last[0] = time.monotonic()
        patience = guard.PATIENCE if knobs.on_bad_step == 'skip' else 1
        loop = {'every': knobs.checkpoint_every, 'patience': patience, 'log': note}
        loop |= {'profile': job.workdir if job.config.profile else None}
        state = fit(step, state, base, batches, steps=knobs.steps, checkpoints=checkpoints, **loop)
        trees.save_safetensors(job.workdir / f'{name}.safetensors', state.trained)
        seconds = [value for _, value in job.log.curve(name, 'seconds')]
        return {'step_s': float(np.median(seconds)), 'steps_s': float(np.sum(seconds))}

    return job.stage(name, compute)


def export(job: Job) -> dict:
    """Writes `exported/`, a Hugging Face directory of the merged model, and `adapter/`, LoRA alone; reads back."""

    def compute():
        source, merged = job.model.source, job.merged()
        counted = count_zeros(job, merged, job.trained('restore'))
        dense = _size(source) if source else sum(leaf.nbytes for leaf in jax.tree.leaves(job.params))
        if jax.process_count() > 1:
            merged = jax.tree.map(processes.on_first, merged)
        exported = processes.agreed(lambda: _write_export(job, merged))
        return counted | {'bytes': {'dense': dense, 'exported': exported}}

    return job.stage('export', compute)


def _write_export(job: Job, merged: dict) -> int:
    """Bytes of the weights."""
    folder, texts = job.workdir / 'exported', {text_format.FILE: text_format.dump(job.text)}
    if job.model.source is None:
        embedded.save(folder, job.model, merged, texts=texts)
    else:
        hf_export.export_model(folder, job.model, merged, texts=texts)
    if job.config.restore.trained == 'lora' and job.config.restore.base in ('dense', 'packed'):
        # The weights that it was trained on, unless they were rounded: in a directory of their own only where they
        # were pruned from disk.
        base = str(job.workdir / 'pruned') if job.config.stream else None
        peft_adapter.save_peft(job.workdir / 'adapter', job.model, job.trained('restore'), base=base)
    hf_export.check_export(folder, job.model, merged)
    return _size(folder)


PACKED = ('packed', 'packed_int4', 'packed_lora')


def export_packed(job: Job, kind: str = 'packed') -> dict:
    """Writes a folder of this name: the restored model without its zeros; reads back.

    Args:
      kind: `packed`: merged, 2:4 towers as `packed24`, others as `bitmask`; `packed_int4`: merged in high precision,
        then the values of 2:4 kernels rounded to four bits again; `packed_lora`: pruned kernels as restoration held
        them (`restore.base`), with LoRA beside them, under their masks.

    Raises:
      ConfigError: `packed_lora` of a base that is not packed.
    """
    if kind == 'packed_lora' and not job.config.restore.base.startswith('packed'):
        raise ConfigError(
            f'--format=packed_lora keeps what LoRA was trained on, and restore.base is {job.config.restore.base!r}: '
            'expected packed or packed_int4'
        )

    def compute():
        model, merged, folder = job.model, job.merged(), job.workdir / kind
        if kind == 'packed_lora':
            packed = hf_packed.keep_factors(job.base.params, job.trained('restore'))
        else:
            formats = pack_formats(job.config, four_bits=kind == 'packed_int4')
            packed = packing.pack(merged, job.masks, formats)
        texts = {text_format.FILE: text_format.dump(job.text)}
        own = {} if model.source else {'hf_config': hf_configs.blip2_config(model.cfg, model.generation)}
        own |= {} if model.source else {'processor': job.processor.hf}
        hf_packed.export_packed(folder, model, packed, texts=texts, **own)
        _, read = hf_packed.load_packed(folder, model)
        if not jax.tree.all(jax.tree.map(jnp.array_equal, read, packed)):
            raise StorageError(f'{folder}: what was read back is not what was written; export it again')
        kernels, before = flatten(read), flatten(merged)
        errors = {path: _relative_error(kernels[path], before[path]) for path in flatten(job.masks)}
        dense = sum(before[path].nbytes for path in errors)
        held = sum(leaf.nbytes for path in errors for leaf in jax.tree.leaves(kernels[path]))
        return {
            'bytes': _size(folder),
            'bytes_of_dense_kernels': held / dense,
            'largest_relative_error': max(errors.values()),
        }

    return job.stage(kind, compute)


def _relative_error(packed: Any, kernel: Array) -> float:
    """Of what is read in a kernel's place, in the Frobenius norm."""
    if isinstance(packed, Adapted):
        packed = merge({'kernel': packed.kernel}, None, {'kernel': packed.lora}, dtype=kernel.dtype)['kernel']
    error = jnp.linalg.norm(dense_kernel(packed, jnp.float32) - kernel.astype(jnp.float32))
    return float(error / jnp.linalg.norm(kernel.astype(jnp.float32)))


def _size(folder: str | Path) -> int:
    """Bytes of a directory's weights."""
    return sum(file.stat().st_size for file in Path(folder).glob('*.safetensors'))


def count_zeros(job: Job, params: dict, trained: dict | None) -> dict:
    """The zeros of a pruned or restored model, per tower and layer; and its density, had LoRA been merged as usual.

    Args:
      trained: what restoring it has trained; None: nothing.
    """
    pattern, group = job.config.prune.pattern, job.config.prune.group
    zeros = allocate(job)
    found = {
        'sparsity': {t: tower_sparsity(params, t, pattern[t], group=group[t], zeros=zeros) for t in pattern},
        'layer_density': {tower: layer_density(params, tower) for tower in pattern},
    }
    if trained is not None and job.config.restore.trained == 'lora':
        found['lora_merged_density'] = plain_lora_density(job.base.params, job.masks, trained)
    return found
