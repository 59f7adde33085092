"""The main job: evaluate, prune, restore, merge, verify, export. Each stage leaves a file in the workdir and is skipped
when it is there; restoration resumes from its newest checkpoint.

`config` is what `configs/*.py` return, or anything with the same attributes.
"""

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sparselora_jax import export, pruning, storage
from sparselora_jax.checkpoint import Checkpoints
from sparselora_jax.data import easy_vqa, pipeline
from sparselora_jax.evaluation import vqa
from sparselora_jax.evaluation.density import layer_density, plain_lora_density, tower_sparsity
from sparselora_jax.evaluation.perplexity import perplexity
from sparselora_jax.models import blip2, embedded
from sparselora_jax.progress import Log, Progress, peak_memory
from sparselora_jax.recipe import TOWERS, ConfigError, claim, lora_rules, make_method, prune_rules
from sparselora_jax.restore import Frozen, make_train_step, paper_optimizer
from sparselora_jax.sparsity import check_masks, check_sparse
from sparselora_jax.train import fit, init_state
from sparselora_jax.weights import init_lora, merge

TEXT = Path(__file__).parents[1] / 'assets' / 'heldout.txt'


class Job:
    """One config in one workdir. What is expensive to load is loaded when a stage first needs it."""

    def __init__(self, config: Any, workdir: str | Path):
        """Claims the workdir for this config.

        Raises:
          ConfigError: the workdir holds the run of another config (names the fields), or the model is unknown.
        """
        self.config, self.workdir = config, Path(workdir)
        if config.model != 'embedded':
            raise ConfigError(f"model {config.model!r}: only 'embedded' can be loaded today (see the README's table)")
        make_method(config)
        claim(self.workdir, config)
        self.log = Log(self.workdir)

    @functools.cached_property
    def model(self) -> tuple[blip2.Blip2Config, dict]:
        """(cfg, params) of the dense model."""
        return embedded.load()

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The language model's tokenizer."""
        return embedded.load_tokenizer()

    @functools.cached_property
    def text(self) -> pipeline.TextFormat:
        """How questions become tokens."""
        return pipeline.TextFormat()

    @functools.cached_property
    def builder(self) -> Any:
        """The data set, prepared."""
        return easy_vqa.prepare(self.config.data_dir)

    def batches(self, batch: int, seed: int) -> Any:
        """Training batches by step."""
        source = self.builder.as_data_source('train')
        groups = pipeline.groups_by_kind(pipeline.read_texts(self.builder, 'train'))
        transform = pipeline.vqa_transform(self.tokenizer, self.text)
        shares = self.config.restore.shares
        return pipeline.batches(source, transform, batch=batch, seed=seed, groups=groups, shares=shares)

    def stage(self, name: str, compute: Callable[[], dict]) -> dict:
        """The result of a stage: read from `<name>.json`, or computed and written there with its time and memory."""
        file = self.workdir / f'{name}.json'
        if not file.exists():
            print(f'-- {name}', flush=True)
            started = time.monotonic()
            result = compute() | {'seconds': time.monotonic() - started, 'peak_memory_bytes': peak_memory()}
            partial = file.with_suffix('.partial')
            partial.write_text(json.dumps(result))
            partial.replace(file)
        return json.loads(file.read_text())

    def run(self) -> None:
        """Every stage, in order."""
        self.evaluate('dense', lambda: self.model[1])
        self.prune()
        self.evaluate('pruned', lambda: merge(self.frozen.params, self.frozen.masks))
        self.restore('restore', lambda: self.frozen)
        self.evaluate('restored', self.merged)
        self.export()
        self.floor()
        if self.config.restore.control:
            self.restore('control', lambda: Frozen(self.model[1], None))
            self.evaluate('control', lambda: merge(self.model[1], None, self.trained('control')))

    def evaluate(self, name: str, weights: Callable[[], dict]) -> dict:
        """Answers, accuracy per kind and perplexity of a model."""

        def compute():
            cfg, w = self.model[0], weights()
            source = self.builder.as_data_source('test')
            indices = vqa.sample(self.config.evaluate.questions, len(source), seed=self.config.seed)
            progress = Progress(f'evaluate {name}', len(indices))
            batch = self.config.evaluate.batch
            answers = vqa.evaluate(w, cfg, source, indices, self.tokenizer, self.text, batch=batch, progress=progress)
            tokens = np.asarray(self.tokenizer(TEXT.read_text())['input_ids'])
            ppl = perplexity(w['language'], cfg.language, tokens)
            accuracy = answers.accuracy()
            self.log.scalars(f'evaluate_{name}', 0, accuracy | {'perplexity': ppl})
            return {'accuracy': accuracy, 'perplexity': ppl, 'indices': indices} | answers._asdict()

        return self.stage(f'evaluate_{name}', compute)

    def floor(self) -> dict:
        """What a model that never sees an image can reach on the same questions."""

        def compute():
            train, test = (pipeline.read_texts(self.builder, split) for split in ('train', 'test'))
            indices = vqa.sample(self.config.evaluate.questions, len(test), seed=self.config.seed)
            return {'accuracy': vqa.blind_floor(train, [test[index] for index in indices]).accuracy()}

        return self.stage('floor', compute)

    def prune(self) -> dict:
        """Calibrates and prunes; writes `masks.safetensors`, and `pruned.safetensors` if kept weights changed."""

        def compute():
            cfg, params = self.model
            rules, samples = prune_rules(self.config), self.config.prune.samples
            calibration = self.batches(samples, self.config.seed + 1)[0] if samples > 0 else None

            def forward(w, batch, run):
                return blip2.forward(w, cfg, batch, run)

            progress = Progress('prune', sum((cfg.vision.depth, cfg.qformer.pairs, cfg.language.depth)), interval=5)
            done = []

            def tick(tower, layer, layers):
                done.append(layer)
                progress(len(done), f'{tower} layer {layer + 1} of {layers}')

            result = pruning.prune(
                forward,
                params,
                [] if calibration is None else [calibration],
                rules,
                method=make_method(self.config),
                chunk=self.config.prune.chunk,
                progress=tick,
            )
            check_masks(result.masks, [rule for rule in rules if rule[1] != 'dense'])
            check_sparse(result.params, result.masks)
            storage.save_safetensors(self.workdir / 'masks.safetensors', result.masks)
            if self.config.prune.method == 'sparsegpt':
                storage.save_safetensors(self.workdir / 'pruned.safetensors', result.params)
            return {'tokens': result.tokens}

        return self.stage('prune', compute)

    @functools.cached_property
    def frozen(self) -> Frozen:
        """Params, masks and teacher, as restoration reads them: the teacher shares W unless kept weights changed."""
        _, params = self.model
        masks, _ = storage.load_safetensors(self.workdir / 'masks.safetensors')
        edited = self.workdir / 'pruned.safetensors'
        if edited.exists():
            return Frozen(storage.load_safetensors(edited)[0], masks, teacher=params)
        return Frozen(params, masks)

    def restore(self, name: str, frozen: Callable[[], Frozen]) -> dict:
        """Trains LoRA under the masks; writes `<name>.safetensors`."""

        def compute():
            cfg, knobs = self.model[0], self.config.restore
            base = frozen()
            lora = init_lora(jax.random.key(self.config.seed), base.params, lora_rules(self.config))
            schedule = {key: knobs[key] for key in ('peak', 'warmup', 'start', 'end', 'weight_decay', 'clip')}
            tx = paper_optimizer(knobs.steps, **schedule)
            step = make_train_step(
                lambda w, batch: blip2.answer_logits(w, cfg, batch),
                tx,
                kd=knobs.kd,
                temperature=knobs.temperature,
                kl_reduction=knobs.kl_reduction,
                gradient=knobs.gradient,
                accumulate=knobs.accumulate,
            )
            checkpoints = Checkpoints(self.workdir / 'checkpoints' / name)
            progress = Progress(name, knobs.steps, first=(checkpoints.steps() or [0])[-1])
            last = [time.monotonic()]

            def note(index, metrics):
                now = time.monotonic()
                self.log.scalars(name, index, metrics | {'seconds': now - last[0]})
                last[0] = now
                progress(index, f'loss {metrics["loss"]:.4f}')

            batches, state = self.batches(knobs.batch, self.config.seed), init_state(lora, tx)
            last[0] = time.monotonic()
            every = knobs.checkpoint_every
            state = fit(step, state, base, batches, steps=knobs.steps, checkpoints=checkpoints, every=every, log=note)
            storage.save_safetensors(self.workdir / f'{name}.safetensors', state.trained)
            seconds = [value for _, value in self.log.curve(name, 'seconds')]
            return {'step_s': float(np.median(seconds)), 'steps_s': float(np.sum(seconds))}

        return self.stage(name, compute)

    def trained(self, name: str) -> dict:
        """The LoRA factors that the stage `name` has trained."""
        return storage.load_safetensors(self.workdir / f'{name}.safetensors')[0]

    def merged(self) -> dict:
        """The restored model as plain arrays with exact zeros, checked."""
        params = merge(self.frozen.params, self.frozen.masks, self.trained('restore'))
        check_sparse(params, self.frozen.masks)
        return params

    def export(self) -> dict:
        """Writes `exported/`: the Hugging Face directory of the language tower, and the whole model; reads it back."""

        def compute():
            cfg, merged = self.model[0], self.merged()
            folder = self.workdir / 'exported'
            export.save_llama(folder / 'language', cfg.language, merged['language'], self.tokenizer)
            export.save_model(folder / 'model.safetensors', cfg, merged)
            _, read = export.load_model(folder / 'model.safetensors')
            if not jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), merged, read)):
                raise storage.StorageError(f'{folder}/model.safetensors: read back, it is not what was written')
            frozen = self.frozen
            return {
                'sparsity': {t: tower_sparsity(read, t, self.config.prune.pattern[t]) for t in TOWERS},
                'layer_density': {tower: layer_density(read, tower) for tower in TOWERS},
                'lora_merged_density': plain_lora_density(frozen.params, frozen.masks, self.trained('restore')),
                'bytes': {
                    'dense': sum(leaf.nbytes for leaf in jax.tree.leaves(self.model[1])),
                    'exported': (folder / 'model.safetensors').stat().st_size,
                },
            }

        return self.stage('export', compute)
