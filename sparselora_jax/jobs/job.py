"""One run of a recipe in a workdir: loads what the stages read on first use, and stores their results."""

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from sparselora_jax import pruning
from sparselora_jax.checkpoints import embedded, on_disk, streaming, trees
from sparselora_jax.checkpoints.layout import Piece
from sparselora_jax.checkpoints.load import open_model
from sparselora_jax.data import pipeline, processing
from sparselora_jax.data.augment import crop_and_flip
from sparselora_jax.data.checked import load_dataset
from sparselora_jax.data.dataset import DataRequest, Dataset, Mixture, Split
from sparselora_jax.data.text_format import TextFormat
from sparselora_jax.evaluation.generate import check_new_tokens, check_options
from sparselora_jax.evaluation.tasks import LoadedTask
from sparselora_jax.jobs import environment, evaluate_tasks, inputs, names
from sparselora_jax.jobs.evaluate_tasks import PreparedTask, TaskRequest
from sparselora_jax.jobs.inputs import Inputs
from sparselora_jax.jobs.log import Log
from sparselora_jax.jobs.stored import Stored, owner_of
from sparselora_jax.models.model import Model, abstract_params
from sparselora_jax.pruning import targets
from sparselora_jax.recipe import (
    ConfigError,
    absolute_paths,
    base_formats,
    calibration_mixture,
    calibration_samples,
    check_allocation,
    check_batches,
    check_family,
    check_ranks,
    check_targets,
    check_values,
    claim,
    data_loader,
    lora_rules,
    mixture,
    prune_methods,
    prune_rules,
    refuse_other,
    runs_teacher,
    task_names,
    text_format,
    value_of,
)
from sparselora_jax.restoration import teacher
from sparselora_jax.restoration.restore import Frozen, merge_trained
from sparselora_jax.runtime import processes
from sparselora_jax.runtime.errors import DataError
from sparselora_jax.runtime.progress import peak_memory
from sparselora_jax.sparse import sharding
from sparselora_jax.sparse.masks import check_sparse
from sparselora_jax.sparse.rules import flatten, with_leaves
from sparselora_jax.sparse.weights import init_lora, merge


def check_fit(config: ConfigDict, shapes: dict) -> None:
    """Check that a recipe fits a model, from the shapes of its weights alone.

    Args:
      config: a recipe.
      shapes: params tree with a shape in place of each array.

    Raises:
      PatternError, RuleError: see `prune_tree` and `init_lora`.
      MethodError: the pruning method chooses no mask.
      ConfigError: see `check_targets` and `check_ranks`.
    """
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), shapes, is_leaf=lambda shape: isinstance(shape, tuple)
    )
    patterns = pruning.patterns_of(params, prune_rules(config))
    methods = targets.methods_of(params, prune_methods(config))
    targets.pattern_zeros(flatten(params), patterns, methods)
    for path in patterns:
        if not methods[path].chooses_mask:
            name = type(methods[path]).__name__
            raise pruning.MethodError(
                f'{path}: {name} says chooses_mask = False, so it cannot prune; name another method'
            )
    check_allocation(config, params)
    check_targets(config, params)
    check_ranks(config, params)
    # Nothing is computed: the factors are built from shapes, so that errors come before any weight is read.
    jax.eval_shape(lambda key: init_lora(key, params, lora_rules(config)), jax.random.key(0))


class Job:
    """A recipe, its workdir, and everything that is expensive to load.

    Most loaded objects stay in memory. Three sets of weights are large, so their lifetime is explicit:

      params  the dense weights, from their first use until `release_dense`
      frozen  the same weights with the kernels that pruning changed, masks and teacher; also until `release_dense`
      base    the weights that LoRA is trained on: `frozen`, unless the recipe stores pruned kernels in fewer bytes

    Attributes:
      config: the recipe, with absolute paths.
      workdir: the folder of all results.
      stored: the files in it, under their digests.
    """

    def __init__(self, config: ConfigDict, workdir: str | Path):
        """Check the values of the recipe; nothing is loaded or written yet.

        Args:
          config: a recipe.
          workdir: a folder, which need not exist.

        Raises:
          ConfigError: the workdir holds the run of another config (the message names the fields), or a value is
            illegal.
        """
        check_values(config)
        refuse_other(Path(workdir), config)
        self.config = absolute_paths(config)
        self.workdir = Path(workdir)
        self.stored = Stored(self.workdir, owner_of(self.workdir, config))
        # None: not in memory. See the docstring of the class.
        self._params: dict | None = None
        self._frozen: Frozen | None = None
        self._reduced_base: Frozen | None = None
        self._told: set[str] = set()  # lines that are printed once
        self._has_header = False
        self._is_stored_checked = False

    # Stages.

    def stage(self, name: str, compute: Callable[[], dict]) -> dict:
        """Return the result of a stage: read it from its file, or compute and write it, with its time and memory.

        Args:
          name: name of the stage; the file is `<name>.json`.
          compute: function that does the work and returns a result that JSON can hold.

        Raises:
          StorageError: the stage is done, and a file that it has written is missing or damaged.
        """
        if name not in names.STAGES:
            raise ValueError(f'stage {name!r}: expected one of {", ".join(names.STAGES)}')
        self._print_header()
        # The first process reads and writes for all processes: the others may not see its disk.
        processes.agreed(self._check_stored)
        if not processes.agreed((self.workdir / names.result_file(name)).exists):
            # Every process checks, since each loads the model; only the first writes.
            self.check()
            processes.agreed(lambda: self._begin(name))
            started = time.monotonic()
            result = compute() | {'seconds': time.monotonic() - started, 'peak_memory_bytes': peak_memory()}
            processes.agreed(lambda: self.stored.write_result(name, result))
        return processes.agreed(lambda: self.read_result(name))

    def read_result(self, stage: str) -> dict | None:
        """Read the result of a stage from the disk of this process, or return None if the stage is not done.

        Processes do not communicate here, so the first may call this alone, as it does for the report.

        Args:
          stage: name of the stage.

        Raises:
          StorageError: the file is damaged.
        """
        return self.stored.result(stage)

    def _check_stored(self) -> None:
        """Check, once, the files of all stages that are done: by size and time, and by content where these differ."""
        if not self._is_stored_checked:
            self.stored.check(reads=False)
        self._is_stored_checked = True

    def _begin(self, stage: str) -> None:
        """Claim the workdir for this config and these inputs, and print which stage begins."""
        # Long work follows, so that even bits that have flipped on the disk are looked for.
        self.stored.check(reads=True)
        claim(self.workdir, self.config)
        self._inputs.store(self.stored)
        environment.record(self.stored, environment.describe(self.config))
        self.stored.begin()
        print(f'-- {stage}', flush=True)

    def _print_header(self) -> None:
        """Print the versions and devices of this run, once, before its first stage."""
        if not self._has_header and processes.first():
            print(environment.header(environment.describe(self.config)), flush=True)
        self._has_header = True

    def check(self) -> None:
        """Check that the recipe fits the model, the devices and the data, before any long work.

        Raises:
          PatternError, RuleError: see `prune_tree` and `init_lora`.
          MeshError, DataError: the devices cannot form the mesh; the data cannot be read.
          ConfigError: `restore.top_k` is not below the vocabulary; or the files of the model or the records are not
            those that the run in the workdir began with.
          StorageError: the digests of the workdir are damaged.
        """
        check_family(self.config, self.model.cfg)
        check_fit(self.config, self.model.shapes())
        vocab = self.model.cfg.language.vocab
        restore = self.config.restore
        if restore.teacher == 'top_k' and restore.top_k >= vocab:
            raise ConfigError(f'restore.top_k {restore.top_k}: expected fewer than the vocabulary, {vocab}')
        check_options(self.model)
        self._check_answers()
        _ = self.mesh  # raises if the devices cannot form it
        check_batches(self.config)
        # The data are read here for the first time, after the quicker checks, so that unreadable data leave no workdir
        # behind.
        self.check_data()
        # Only the first process reads the files of the model again, and only those that look changed.
        processes.agreed(self._check_inputs)

    def check_data(self) -> None:
        """Check that the data can be read, and that the model can use them.

        Raises:
          DataError: they cannot; the message names the data set, and the record if it is one.
        """
        if len(self.dataset.test.source) == 0:
            raise DataError(f'{self.config.data}: there is no test question, so nothing can be evaluated')
        # The loss of an empty answer is zero, so training would run and change nothing.
        answers = [answer for _, answer in self.dataset.train.read_texts()]
        if answers and not any(answer.strip() for answer in answers):
            raise DataError(f'{self.config.data}: the answers of all {len(answers)} training records are empty')
        # Pruning comes after the evaluation of the dense model, which takes long.
        if self.calibration is not None and len(self.calibration.source) == 0:
            raise DataError(f'{self.config.prune.data or self.config.data}: there is no calibration sample')
        if self.config.model != embedded.NAME and self._unknown_token:  # the embedded model has its own tokenizer
            raise DataError(self._unknown_token)
        _ = self.tasks  # raises if their files are missing, or the model cannot read a prompt

    def _check_answers(self) -> None:
        """Check that the model can read a prompt with the longest answer that evaluation generates."""
        text = self.config.text
        cfg = self.model.cfg
        # An answer of one token adds no column to the prompt.
        batch = cfg.family.batch_like(cfg, 1, prompt_tokens=text.prompt_tokens, answer_tokens=1)
        prompt_length = 1 if self.model.is_encoder_decoder else batch['input_ids'].shape[1]
        check_new_tokens(self.model, prompt_length, self.config.evaluate.max_new_tokens)

    @functools.cached_property
    def _unknown_token(self) -> str:
        """Return which training record has a token that the model does not know, or ''."""
        # Tokenizing all records takes long, and most tokenizers have no such token.
        if not self.processor.has_unknown_tokens:
            return ''
        for index, (question, answer) in enumerate(self.dataset.train.read_texts()):
            if reason := self._misfit(question, answer):
                return f'{self.config.data}, {self.dataset.train.name_record(index)}: {reason}'
        return ''

    def _check_inputs(self) -> None:
        """Check that the run still has the inputs with which it began, if it has begun."""
        begun = inputs.load(self.stored)
        if begun is not None:
            inputs.refuse_changed(
                begun,
                self._inputs,
                workdir=self.workdir,
                model=self.config.model,
                data=self.config.data,
                dataset=self.dataset,
                calibration=self.calibration,
            )

    @functools.cached_property
    def _inputs(self) -> Inputs:
        """Return the digests of the model's files and of the records, which take seconds to compute."""
        known = inputs.load(self.stored)
        items = evaluate_tasks.digest_items(self._loaded_tasks)
        return inputs.take(self._model_files(), self.dataset, items, known, calibration=self.calibration)

    def _model_files(self) -> dict[str, Path]:
        """Return the files that decide what the model computes, by name."""
        if self.config.model == embedded.NAME:
            return {file.name: file for file in embedded.files()}
        return inputs.model_files(*self._opened)

    @functools.cached_property
    def log(self) -> Log:
        """Return the log of scalars in the workdir."""
        return Log(self.workdir)

    # Devices.

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh | None:
        """Return the mesh of the recipe, or None for one device; print which kernels it does not split."""
        axes = self.config.mesh.to_dict()
        # Several processes need a mesh even with one device each.
        if set(axes.values()) == {1} and jax.process_count() == 1:
            return None
        mesh = sharding.make_mesh(**axes)
        lines = sharding.undivided(abstract_params(self.model.cfg), mesh)
        batch = self.config.evaluate.batch
        if batch % mesh.shape['data']:
            lines.append(
                f'data={mesh.shape["data"]} does not divide evaluate.batch, {batch}: every device answers all questions'
            )
        if processes.first():
            for line in lines:
                print(f'mesh: {line}', flush=True)
        return mesh

    def shard(self, tree: dict) -> dict:
        """Return a tree with its arrays on the mesh, or on the device.

        Args:
          tree: params, masks or lora.
        """
        return jax.device_put(tree) if self.mesh is None else sharding.shard(tree, self.mesh)

    # The model.

    @functools.cached_property
    def _opened(self) -> tuple[Model, dict | list[Piece]]:
        """Return the model, with its params if it is the embedded one, otherwise with where its weights are on disk."""
        if self.config.model == embedded.NAME:
            return embedded.load(dtype=self.dtype)
        return open_model(self.config.model, self.config.family)

    @property
    def dtype(self) -> np.dtype:
        """Return the dtype of the base weights."""
        return jnp.dtype(self.config.dtype)

    @property
    def model(self) -> Model:
        """Return the model, without its weights."""
        model, _ = self._opened
        return model

    @functools.cached_property
    def processor(self) -> processing.Processor:
        """Return the processor, which turns images and text into model inputs, and tokens into text."""
        if self.config.model == embedded.NAME:
            return embedded.load_processor(self.model.cfg)
        return processing.load_processor(self.model.source, self.model.family.processor)

    @functools.cached_property
    def text(self) -> TextFormat:
        """Return the format that turns questions into tokens."""
        return text_format(self.config)

    # The data.

    @functools.cached_property
    def dataset(self) -> Dataset:
        """Return the data for pruning, training and evaluation."""
        return self._load_data('data', mixture(self.config))

    @functools.cached_property
    def calibration(self) -> Split | None:
        """Return the records of calibration; None: they are drawn from the training records."""
        prune = self.config.prune
        if not prune.data and prune.order == 'shuffled':
            return None
        return self._load_data('prune.data' if prune.data else 'data', calibration_mixture(self.config)).train

    def _load_data(self, field: str, drawn: Mixture) -> Dataset:
        """Return the data that a field of the recipe names."""
        config = self.config
        # `_misfit` is a method of this job, so that loaders do not depend on models.
        request = DataRequest(value_of(config, field), Path(config.data_dir), self._misfit, drawn, config.seed)
        return load_dataset(data_loader(config, field), request)

    def _misfit(self, question: str, answer: str) -> str:
        """Return why the model cannot take a record, '' if it can."""
        # The processor is only read if a loader calls this, since reading it takes seconds.
        return pipeline.misfit(self.processor, self.text)(question, answer)

    def batches(self, batch: int, seed: int, *, with_teacher: bool = False) -> grain.MapDataset:
        """Return training batches by step; each process reads only the rows of its own devices.

        Args:
          batch: number of rows over all processes.
          seed: seed of the order of records.
          with_teacher: add the logits of the teacher that the stage `teacher` wrote.
        """
        self._tell_repeated(batch)
        batches = self._batches_of(
            self.dataset.train, batch, seed, groups=self._groups, shares=self.config.restore.shares or (1,)
        )
        # Indexed by step, like the teacher's files, so that batch and logits match at whatever step a run is resumed.
        if with_teacher:
            folder = self.workdir / names.TEACHER
            rows = self._rows(batch)
            batches = batches.map_with_index(
                lambda step, arrays: arrays | {'teacher': teacher.read(folder, step, rows)}
            )
        return self._on_mesh(batches)

    def calibration_batches(self, batch: int) -> grain.MapDataset:
        """Return batches of calibration samples; the first batch holds each sample once if they are enough.

        Args:
          batch: number of rows over all processes.
        """
        seed = self.config.seed + 1
        if self.calibration is None:
            return self.batches(batch, seed)
        count = len(self.calibration.source)
        if self.config.prune.order == 'first':
            count = min(count, calibration_samples(self.config))
        return self._on_mesh(self._batches_of(self.calibration, batch, seed, groups=[range(count)], shares=(1,)))

    def _on_mesh(self, batches: grain.MapDataset) -> grain.MapDataset:
        """Return batches whose rows, those of this process, are put on the mesh; as they are if there is none."""
        mesh = self.mesh
        return batches if mesh is None else batches.map(lambda local: sharding.shard_batch(local, mesh))

    def _batches_of(
        self,
        split: Split,
        batch: int,
        seed: int,
        *,
        groups: Sequence[Sequence[int]],
        shares: Sequence[int | float],
    ) -> grain.MapDataset:
        """Return the rows of this process of batches of a split, by step; see `pipeline.batches`."""
        return pipeline.batches(
            split.source,
            pipeline.vqa_transform(self.processor, self.text),
            batch=batch,
            seed=seed,
            groups=groups,
            shares=shares,
            rows=self._rows(batch),
            augment_image=crop_and_flip if self.config.mixture.augment else None,
            draw_texts=split.draw_texts,
        )

    def _rows(self, batch: int) -> Sequence[int] | None:
        """Return the rows of a batch that this process reads; None: all of them."""
        return None if self.mesh is None else sharding.local_rows(self.mesh, batch)

    @functools.cached_property
    def _groups(self) -> list[Sequence[int]]:
        """Return the indices of the training records, by kind of answer if the recipe has shares."""
        train = self.dataset.train
        if self.config.restore.shares:
            return pipeline.groups_by_kind(train, self.dataset)
        # Without shares all records form one group, and kinds of answers are as frequent as in the data.
        return [range(len(train.source))]

    def repeated_records(self, batch: int) -> list[str]:
        """Return a line for each kind of answer of which a batch needs more records than there are.

        Args:
          batch: number of rows over all processes.
        """
        shares = self.config.restore.shares or (1,)
        kinds = self.dataset.kinds if len(self._groups) > 1 else ('',)
        lines = []
        for kind, group, share in zip(kinds, self._groups, shares, strict=True):
            rows = round(batch * share / sum(shares))
            size = len(group)
            if rows > size:
                of_kind = kind and f' of kind {kind}'
                lines.append(f'{rows} training samples are drawn from {size} records{of_kind}: records repeat')
        return lines

    def repeated_samples(self) -> list[str]:
        """Return a line if calibration needs more records than there are, as `repeated_records` does for a batch."""
        samples = self.config.prune.samples
        if self.calibration is None:
            return self.repeated_records(samples)
        size = len(self.calibration.source)
        if samples <= size:
            return []
        return [f'{samples} calibration samples are drawn from {size} records: records repeat']

    def _tell_repeated(self, batch: int) -> None:
        """Print a line, once, if a batch needs more records than there are."""
        for line in self.repeated_records(batch):
            if line not in self._told and processes.first():
                print(line, flush=True)
            self._told.add(line)

    # The tasks.

    @property
    def task_request(self) -> TaskRequest:
        """Return which tasks the recipe scores the models on; none if it names none."""
        options = self.config.evaluate
        return TaskRequest(
            tasks=task_names(self.config),
            data_root=Path(options.data_root) if options.data_root else None,
            batch=options.batch,
            limit=options.limit or None,
        )

    @functools.cached_property
    def _loaded_tasks(self) -> dict[str, LoadedTask]:
        """Return the tasks with all of their items."""
        return evaluate_tasks.load_tasks(self.task_request)

    @functools.cached_property
    def tasks(self) -> dict[str, PreparedTask]:
        """Return the tasks with their prompts, which are checked: they fit the model."""
        # Without tasks, the processor need not be read.
        if not self._loaded_tasks:
            return {}
        return evaluate_tasks.prepare(self.task_request, self._loaded_tasks, self.model, self.processor)

    # The weights.

    @property
    def params(self) -> dict:
        """Return the dense weights; they stay in memory until `release_dense`."""
        if self._params is None:
            model, weights = self._opened
            if self.config.model == embedded.NAME:
                self._params = self.shard(weights)
            else:
                self._params = streaming.read_params(model.shapes(), weights, self.dtype, self.mesh)
        return self._params

    @property
    def frozen(self) -> Frozen:
        """Return params, masks and teacher as pruning left them; they stay in memory until `release_dense`.

        The teacher runs only if the recipe asks for it. It shares its weights with the student, unless pruning changed
        kept weights.
        """
        if self._frozen is None:
            # This file exists only if the method changed kept weights.
            edited_file = self.stored.output(names.PRUNE, names.KERNELS)
            if edited_file.exists():
                edited = self.shard(trees.load_safetensors(edited_file)[0])
                dense = self.params if runs_teacher(self.config) else None
                self._frozen = Frozen(with_leaves(self.params, flatten(edited)), self.masks, dense)
            else:
                self._frozen = Frozen(self.params, self.masks)
        return self._frozen

    @property
    def masks(self) -> dict:
        """Return the pruning masks: those of `frozen` if it is in memory, otherwise read from the workdir.

        They are not kept in memory otherwise: a packed base carries its own masks.
        """
        if self._frozen is not None:
            return self._frozen.masks
        return self.shard(trees.load_safetensors(self.stored.output(names.PRUNE, names.MASKS))[0])

    @property
    def base(self) -> Frozen:
        """Return params, masks and teacher as LoRA is trained on them: `frozen`, or its kernels in fewer bytes.

        Reduced kernels are built from the files a layer at a time, after the dense weights are released.
        """
        formats = base_formats(self.config)
        if formats is None:
            return self.frozen
        if self._reduced_base is None:
            self.release_dense()
            params, masks = on_disk.reduce_on_disk(self.pruned_on_disk(), formats)
            # Read last, and only for the teacher, so that the base is built without the dense weights in memory.
            dense = self.params if runs_teacher(self.config) else None
            self._reduced_base = Frozen(self.shard(params), None if masks is None else self.shard(masks), dense)
        return self._reduced_base

    @property
    def has_dense_weights(self) -> bool:
        """Return whether the dense weights are in memory."""
        return self._params is not None or self._frozen is not None

    def release_dense(self) -> None:
        """Release the dense weights, unless the teacher runs on them; they are read again on the next use."""
        # The masks of `frozen` go too; they are read again from the workdir.
        self._frozen = None
        if not runs_teacher(self.config):
            self._params = None

    def params_on_disk(self) -> dict:
        """Return the dense weights, whose blocks are read on use (those of the embedded model are in memory)."""
        model, weights = self._opened
        if self.config.model == embedded.NAME:
            return weights
        return on_disk.params_on_disk(model, weights, self.dtype)

    def pruned_on_disk(self) -> dict:
        """Return the pruned model, whose kernels are read a layer at a time, with rounded values if they exist."""
        return on_disk.pruned_on_disk(
            self.params_on_disk(),
            self.stored.output(names.PRUNE, names.MASKS),
            self.stored.output(names.PRUNE, names.KERNELS),
            self.stored.output(names.ROUND, names.ROUNDED),
        )

    def pruned(self) -> dict:
        """Return the pruned model as plain arrays with zeros in place."""
        return merge(self.frozen.params, self.frozen.masks)

    def trained(self, stage: str) -> dict:
        """Return the tree that a stage has trained: LoRA factors, or kernels.

        Args:
          stage: `restore` or `control`.
        """
        return trees.load_safetensors(self.stored.output(stage, names.trained_file(stage)))[0]

    def merged(self) -> dict:
        """Return the restored model as plain arrays with exact zeros, checked.

        Raises:
          PatternError: a weight is not zero where the mask is False.
        """
        # Load the base first: in an empty workdir the error should be about missing masks.
        base = self.base
        trained = self.trained(names.TRAINING['restored'])
        params = merge_trained(base, trained, self.config.restore.trained, dtype=self.dtype)
        # Check the contract of a merge on the arrays that are evaluated and exported.
        check_sparse(params, self.masks)
        return params

    def allocated_zeros(self) -> dict[str, np.ndarray] | None:
        """Return the zeros of each layer's kernels from the stage `zeros`, or None if the recipe has no such stage."""
        result = processes.agreed(lambda: self.read_result(names.ZEROS))
        if result is None:
            return None
        return {path: np.array(zeros_of_layers) for path, zeros_of_layers in result['zeros'].items()}
