"""One config in one workdir: what the stages read, loaded when first needed, and where they leave their results.

`config` is what `configs/*.py` return, or anything with the same attributes.
"""

import functools
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from sparselora_jax import pruning
from sparselora_jax.checkpoints import embedded, on_disk, streaming, trees
from sparselora_jax.checkpoints import load as hf
from sparselora_jax.data import easy_vqa, folder, pipeline, processing
from sparselora_jax.data.dataset import Dataset
from sparselora_jax.data.text_format import TextFormat
from sparselora_jax.models.model import Model, abstract_params
from sparselora_jax.pruning import targets
from sparselora_jax.recipe import (
    ConfigError,
    base_formats,
    check_allocation,
    check_batches,
    check_values,
    claim,
    lora_rules,
    prune_methods,
    prune_rules,
    refuse_other,
    runs_teacher,
    text_format,
)
from sparselora_jax.restoration import teacher
from sparselora_jax.restoration.restore import Frozen, merge_trained
from sparselora_jax.runtime import files, processes
from sparselora_jax.runtime.progress import Log, peak_memory
from sparselora_jax.sparse import rules, sharding
from sparselora_jax.sparse.masks import check_sparse
from sparselora_jax.sparse.weights import init_lora, with_kernels

TEACHER = 'teacher'  # a folder, see teacher.py
MASKS, KERNELS = 'masks.safetensors', 'kernels.safetensors'  # what pruning leaves; the second if kept weights changed
ROUNDED = 'rounded.safetensors'  # kernels whose values four bits hold, see `stages.round_base`
QUESTIONS = 'questions.json'


def check_fit(config: Any, shapes: dict) -> None:
    """Names what of a config does not fit a model of these shapes.

    Raises:
      PatternError, RuleError: see `prune_tree` and `init_lora`.
    """
    like = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), shapes, is_leaf=lambda shape: isinstance(shape, tuple)
    )
    patterns = pruning.patterns_of(like, prune_rules(config))
    targets.pattern_zeros(rules.flatten(like), patterns, targets.methods_of(like, prune_methods(config)))
    check_allocation(config, like)
    jax.eval_shape(lambda key: init_lora(key, like, lora_rules(config)), jax.random.key(0))


class Job:
    """A config, its workdir, and what is expensive to load."""

    def __init__(self, config: Any, workdir: str | Path):
        """Nothing is loaded or written yet.

        Raises:
          ConfigError: the workdir holds the run of another config (names the fields), or a field's value cannot work.
        """
        self.config, self.workdir = config, Path(workdir)
        check_values(config)
        refuse_other(self.workdir, config)

    def stage(self, name: str, compute: Callable[[], dict]) -> dict:
        """The result of a stage: read from `<name>.json`, or computed and written there with its time and memory."""
        file = self.workdir / f'{name}.json'
        if not processes.agreed(file.exists):
            self.check()
            processes.agreed(lambda: self._begin(name))
            started = time.monotonic()
            result = compute() | {'seconds': time.monotonic() - started, 'peak_memory_bytes': peak_memory()}
            processes.agreed(lambda: files.write_text(file, json.dumps(result)))
        return processes.agreed(lambda: json.loads(file.read_text()))

    def _begin(self, name: str) -> None:
        claim(self.workdir, self.config)
        files.write_text(self.workdir / QUESTIONS, self.questions)
        print(f'-- {name}', flush=True)

    def check(self) -> None:
        """Names what does not fit the model, before any long work.

        Raises:
          PatternError, RuleError: see `prune_tree` and `init_lora`.
          MeshError, DataError: devices that cannot form the mesh; data that cannot be read.
          ConfigError: `restore.top_k` is not below the vocabulary; or the workdir was evaluated on other questions, and
            answers are compared one by one.
        """
        check_fit(self.config, self.model.shapes())
        vocab, restore = self.model.cfg.language.vocab, self.config.restore
        if restore.teacher == 'top_k' and restore.top_k >= vocab:
            raise ConfigError(f'restore.top_k {restore.top_k}: expected fewer than the vocabulary, {vocab}')
        _ = self.mesh
        check_batches(self.config)
        kept, questions = self.workdir / QUESTIONS, self.questions
        if kept.exists() and kept.read_text() != questions:
            raise ConfigError(
                f'{self.workdir}: the test questions of {self.config.data} are not those that this run began with; '
                'use another workdir, or put them back'
            )

    @functools.cached_property
    def questions(self) -> str:
        """What tells the test questions from others."""
        texts = self.dataset.test.read_texts()
        digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
        return json.dumps({'count': len(texts), 'sha256': digest})

    @functools.cached_property
    def log(self) -> Log:
        """Scalars, in the workdir."""
        return Log(self.workdir)

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh | None:
        """The mesh that the config asks for; None: one device. Says which kernels it does not split."""
        axes = self.config.mesh.to_dict()
        if set(axes.values()) == {1} and jax.process_count() == 1:
            return None
        mesh = sharding.make_mesh(**axes)
        lines, batch = sharding.undivided(abstract_params(self.model.cfg), mesh), self.config.evaluate.batch
        if batch % mesh.shape['data']:
            lines.append(
                f'data={mesh.shape["data"]} does not divide evaluate.batch, {batch}: every device answers all questions'
            )
        for line in lines if processes.first() else ():
            print(f'mesh: {line}', flush=True)
        return mesh

    def shard(self, tree: dict) -> dict:
        """Params, masks or lora on the mesh."""
        return jax.device_put(tree) if self.mesh is None else sharding.shard(tree, self.mesh)

    @functools.cached_property
    def _opened(self) -> tuple[Model, Any]:
        """(model, params) of the embedded model; of another one (model, where its weights lie)."""
        if self.config.model == 'embedded':
            return embedded.load(dtype=self.dtype)
        return hf.open_model(self.config.model, self.config.family)

    @property
    def dtype(self) -> Any:
        """Of the base weights."""
        return jnp.dtype(self.config.dtype)

    @property
    def model(self) -> Model:
        """The model, without its weights."""
        return self._opened[0]

    @functools.cached_property
    def params(self) -> dict:
        """The dense weights."""
        model, found = self._opened
        if self.config.model == 'embedded':
            return self.shard(found)
        return streaming.read_params(model.shapes(), found, self.dtype, self.mesh)

    def params_on_disk(self) -> dict:
        """The dense weights, their blocks to be read when they are needed (the embedded model's are in memory)."""
        model, found = self._opened
        return found if self.config.model == 'embedded' else on_disk.params_on_disk(model, found, self.dtype)

    def pruned_on_disk(self) -> dict:
        """The pruned model, its kernels to be read a layer at a time: as `stages.round_base` left them, if it did."""
        kernels = (self.workdir / name for name in (KERNELS, ROUNDED))
        return on_disk.pruned_on_disk(self.params_on_disk(), self.workdir / MASKS, *kernels)

    def let_go(self) -> None:
        """Of the dense weights, unless the teacher is to run; they are read again when they are asked for."""
        for name in ('frozen',) if runs_teacher(self.config) else ('frozen', 'params'):
            self.__dict__.pop(name, None)

    @functools.cached_property
    def processor(self) -> Any:
        """Images and text -> what the model reads, and tokens -> text."""
        if self.config.model == 'embedded':
            return embedded.load_processor(self.model.cfg)
        return processing.load_processor(self.model.source, self.model.family.processor)

    @functools.cached_property
    def text(self) -> TextFormat:
        """How questions become tokens."""
        return text_format(self.config)

    @functools.cached_property
    def dataset(self) -> Dataset:
        """What is trained on and evaluated with."""
        if self.config.data == 'easy_vqa':
            return processes.first_then_others(lambda: easy_vqa.load(self.config.data_dir))  # which writes its files
        return folder.load(self.config.data, pipeline.misfit(self.processor, self.text))

    def batches(self, batch: int, seed: int, *, taught: bool = False) -> Any:
        """Training batches by step; of many processes each reads the rows of its own devices.

        Args:
          taught: with what the stage `teacher` has kept of the teacher's logits.
        """
        train, shares = self.dataset.train, self.config.restore.shares
        groups = pipeline.groups_by_kind(train, self.dataset) if shares else [range(len(train.source))]
        transform = pipeline.vqa_transform(self.processor, self.text)
        rows = None if self.mesh is None else sharding.local_rows(self.mesh, batch)
        knobs = {'batch': batch, 'seed': seed, 'groups': groups, 'shares': shares or (1,), 'rows': rows}
        drawn = pipeline.batches(train.source, transform, **knobs)
        if taught:
            kept = self.workdir / TEACHER
            drawn = drawn.map_with_index(lambda step, batch: batch | {'teacher': teacher.read(kept, step, rows)})
        return drawn if self.mesh is None else drawn.map(lambda local: sharding.shard_batch(local, self.mesh))

    @property
    def masks(self) -> dict:
        """What pruning has kept: those of `frozen` while it is held; a packed base does not need them beside it."""
        if 'frozen' in self.__dict__:
            return self.frozen.masks
        return self.shard(trees.load_safetensors(self.workdir / MASKS)[0])

    @functools.cached_property
    def frozen(self) -> Frozen:
        """Params, masks and, if it runs, the teacher: it shares W unless kept weights changed."""
        if not (self.workdir / KERNELS).exists():
            return Frozen(self.params, self.masks)
        edited = self.shard(trees.load_safetensors(self.workdir / KERNELS)[0])
        return Frozen(with_kernels(self.params, edited), self.masks, self.params if runs_teacher(self.config) else None)

    @functools.cached_property
    def base(self) -> Frozen:
        """Params, masks and teacher as LoRA is trained on them: `frozen`, or its pruned kernels in fewer bytes.

        Those are made a layer at a time, of what is read from disk, after the dense weights were let go.
        """
        formats = base_formats(self.config)
        if formats is None:
            return self.frozen
        self.let_go()
        params, masks = on_disk.reduce_on_disk(self.pruned_on_disk(), formats)
        dense = self.params if runs_teacher(self.config) else None
        return Frozen(self.shard(params), None if masks is None else self.shard(masks), dense)

    def trained(self, name: str) -> dict:
        """What the stage `name` has trained: LoRA factors, or kernels."""
        return trees.load_safetensors(self.workdir / f'{name}.safetensors')[0]

    def merged(self) -> dict:
        """The restored model as plain arrays with exact zeros, checked."""
        kind = self.config.restore.trained
        params = merge_trained(self.base, self.trained('restore'), kind, dtype=self.dtype)
        check_sparse(params, self.masks)
        return params
