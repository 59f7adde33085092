"""The stages that write the pruned and the restored model for other programs, and check the written files."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sparselora_jax.checkpoints import hf_configs, on_disk, safetensors_format
from sparselora_jax.checkpoints.checkpoint_files import ADAPTER as ADAPTER_CONFIG
from sparselora_jax.checkpoints.checkpoint_files import CONFIG
from sparselora_jax.checkpoints.export import check_export, export_model
from sparselora_jax.checkpoints.packed import export_packed as write_packed
from sparselora_jax.checkpoints.packed import keep_factors, load_packed
from sparselora_jax.checkpoints.peft import name_base, save_peft
from sparselora_jax.data import text_format
from sparselora_jax.evaluation.density import layer_density, plain_lora_density, tower_sparsity
from sparselora_jax.jobs import model_card, names
from sparselora_jax.jobs.job import Job
from sparselora_jax.models.model import abstract_params
from sparselora_jax.pruning import patterns_of
from sparselora_jax.recipe import ConfigError, pack_formats, rounded_rules, stores_masks
from sparselora_jax.runtime import processes
from sparselora_jax.runtime.files import StorageError
from sparselora_jax.sparse import packing
from sparselora_jax.sparse.dense import dense_kernel
from sparselora_jax.sparse.masks import PatternError
from sparselora_jax.sparse.packing import Bitmask, Packed24
from sparselora_jax.sparse.rules import flatten
from sparselora_jax.sparse.weights import Adapted, merge


def export_pruned(job: Job) -> dict:
    """Write and check `pruned/`, a Hugging Face directory of the pruned model; an adapter in the workdir then names it.

    Weights are read and written a layer at a time, so the model need not fit into memory. The main job does not run
    this stage: most runs need the restored model alone, and this directory is as large.

    Args:
      job: the run, whose stage `prune` is done.

    Returns:
      `sparsity` of each tower, counted in the written files, and `bytes` of the weights before and after.
    """

    def compute():
        zeros = job.allocated_zeros()  # outside `agreed`, since it is an agreement itself
        return processes.agreed(lambda: _write_pruned(job, zeros))

    return job.stage(names.EXPORT_PRUNED, compute)


def _write_pruned(job: Job, zeros: dict[str, np.ndarray] | None) -> dict:
    """Write and check the directory of `export_pruned`, and return its result.

    Args:
      job: the run.
      zeros: see `Job.allocated_zeros`.
    """
    folder = job.stored.writes(names.PRUNED_MODEL)
    masks = job.stored.output(names.PRUNE, names.MASKS)
    dense = job.params_on_disk()
    pruned = on_disk.pruned_on_disk(dense, masks, job.stored.output(names.PRUNE, names.KERNELS))
    # The card needs the number of zeros, so they are counted before anything is written.
    sparsity = _tower_sparsity(job, pruned, zeros)
    source = job.model.source
    # The embedded model has no Hugging Face directory, so the bytes of its arrays are counted instead.
    dense_bytes = _weight_bytes(source) if source else sum(leaf.nbytes for leaf in jax.tree.leaves(dense))
    changed = {entry.name for entry in safetensors_format.read_header(masks)}
    export_model(folder, job.model, pruned, changed=changed, texts=_texts(job, names.PRUNED_MODEL, sparsity))
    # Reads the directory back and compares it with what should be there, bit for bit; so the counts hold for it too.
    check_export(folder, job.model, pruned, changed=changed)
    # Checked before it is changed, so that its new digest is not that of a damaged file.
    adapter = job.stored.output(names.EXPORT, f'{names.ADAPTER}/{ADAPTER_CONFIG}').parent
    name_base(adapter, str(folder.resolve()))
    job.stored.renew(names.EXPORT, f'{names.ADAPTER}/{ADAPTER_CONFIG}')
    return {'sparsity': sparsity, 'bytes': {'dense': dense_bytes, 'pruned': _weight_bytes(folder)}}


def _texts(job: Job, folder: str, sparsity: dict[str, dict]) -> dict[str, str]:
    """Return the texts of an exported directory: its text format and its model card."""
    return {
        text_format.FILE: text_format.dump(job.text),
        model_card.FILE: model_card.write_card(job, folder, sparsity),
    }


def export(job: Job) -> dict:
    """Write and check `exported/`, a Hugging Face directory of the merged model, and write `adapter/`, LoRA alone.

    Args:
      job: the run.

    Returns:
      The zeros of the model, see `count_zeros`, and `bytes` of the weights before and after.
    """

    def compute():
        merged = job.merged()
        # Counted before the arrays are gathered in the first process, while every process has its part of them.
        zeros = count_zeros(job, merged, job.trained(names.TRAINING['restored']))
        source = job.model.source
        # The embedded model has no Hugging Face directory, so the bytes of its arrays are counted instead.
        dense = _weight_bytes(source) if source else sum(leaf.nbytes for leaf in jax.tree.leaves(job.params))
        if jax.process_count() > 1:
            # Only the first process writes, so it gathers the arrays, of which each process has a part.
            merged = jax.tree.map(processes.on_first, merged)
        rounded = _rounded_kernels(job) if source else {}
        exported = processes.agreed(lambda: _write_export(job, merged, rounded, zeros['sparsity']))
        return zeros | {'bytes': {'dense': dense, 'exported': exported}}

    return job.stage(names.EXPORT, compute)


def _rounded_kernels(job: Job) -> dict[str, on_disk.Reduced]:
    """Return the kernels of a four-bit base, by path; empty if the base is not rounded.

    With several processes every process must call this, and the first gets the whole kernels.
    """
    rules = rounded_rules(job.config)
    if not rules:
        return {}
    base = job.base
    kernels = flatten(base.params)
    masks = flatten(base.masks or {})
    rounded = {}
    for path in patterns_of(abstract_params(job.model.cfg), rules):
        kernel = kernels[path]
        mask = masks.get(path)
        if jax.process_count() > 1:
            kernel, mask = jax.tree.map(processes.on_first, (kernel, mask))
        if processes.first():
            rounded[path] = on_disk.Reduced(kernel, mask)
    return rounded


def _write_export(job: Job, merged: dict, rounded: dict[str, on_disk.Reduced], sparsity: dict[str, dict]) -> int:
    """Write and check the directories of `export`, and return the bytes of the exported weights.

    Args:
      job: the run.
      merged: the restored model.
      rounded: kernels of a four-bit base, by path.
      sparsity: counts of each tower, for the model card.
    """
    folder = job.stored.writes(names.EXPORTED_MODEL)
    changed = None  # of the embedded model, all weights are written
    if job.model.source is not None:
        merged, changed = _merge_from_source(job, merged, rounded)
    export_model(folder, job.model, merged, changed=changed, texts=_texts(job, names.EXPORTED_MODEL, sparsity))
    restore = job.config.restore
    # An adapter is only useful with the weights it was trained on, so the base must not have been rounded.
    if restore.trained == 'lora' and not rounded_rules(job.config):
        # Otherwise `export_pruned` names the directory once it is written.
        pruned = job.workdir / names.PRUNED_MODEL
        base = str(pruned.resolve()) if (pruned / CONFIG).exists() else None
        save_peft(job.stored.writes(names.ADAPTER), job.model, job.trained(names.TRAINING['restored']), base=base)
    # Reads the directory back and compares it with what is in memory, bit for bit.
    check_export(folder, job.model, merged, changed=changed)
    return _weight_bytes(folder)


def _merge_from_source(job: Job, merged: dict, rounded: dict[str, on_disk.Reduced]) -> tuple[dict, set[str]]:
    """Return the params to export, computed from the precision of the source's files, and the paths that differ."""
    masks = job.stored.output(names.PRUNE, names.MASKS)
    trained = job.trained(names.TRAINING['restored'])
    changed = flatten(trained).keys() | {entry.name for entry in safetensors_format.read_header(masks)}
    if job.config.restore.trained == 'weights':
        stage = names.TRAINING['restored']
        kernels = job.stored.output(stage, names.trained_file(stage))
        return on_disk.merge_from_source(job.model, merged, {}, masks, kernels), changed
    kernels = job.stored.output(names.PRUNE, names.KERNELS)
    return on_disk.merge_from_source(job.model, merged, trained, masks, kernels, rounded=rounded), changed


def export_packed(job: Job, kind: str = 'packed') -> dict:
    """Write the restored model without its zeros into a folder named `kind`, and check it.

    Args:
      job: the run.
      kind: `packed`: the merged model, with 2:4 towers as `packed24` and others as `bitmask`. `packed_int4`: the model
        merged in high precision, then the values of 2:4 kernels rounded to four bits again. `packed_lora`: pruned
        kernels in the format of restoration (`restore.base`), with separate LoRA factors under their masks.

    Returns:
      `bytes` of the weights; `bytes_of_dense_kernels`, the bytes of packed kernels relative to those of dense ones; and
      `largest_relative_error` of a kernel.

    Raises:
      ConfigError: the kind is `packed_lora` and the base does not store its masks.
      StorageError: the files do not hold what was written.
    """
    base = job.config.restore.base
    if kind == 'packed_lora' and not stores_masks(job.config):
        raise ConfigError(
            f'--format=packed_lora keeps what LoRA was trained on, and restore.base is {base!r}: '
            'expected packed, packed_int4, or a format that stores masks'
        )

    def compute():
        model = job.model
        merged = job.merged()
        folder = job.stored.writes(kind)
        if kind == 'packed_lora':
            packed = keep_factors(job.base.params, job.trained(names.TRAINING['restored']))
        else:
            packed = packing.pack(merged, job.masks, pack_formats(job.config, four_bits=kind == 'packed_int4'))
        # The embedded model has no directory from which to copy the config and the processor.
        is_embedded = model.source is None
        write_packed(
            folder,
            model,
            packed,
            texts=_texts(job, kind, _tower_sparsity(job, merged, job.allocated_zeros())),
            hf_config=hf_configs.blip2_config(model.cfg, model.generation) if is_embedded else None,
            processor=job.processor.hf if is_embedded else None,
        )
        _, written = load_packed(folder, model)
        if not jax.tree.all(jax.tree.map(jnp.array_equal, written, packed)):
            raise StorageError(f'{folder}: the files differ from what was to be written; export it again')
        # Errors are measured on the files that were read back, because others will load those.
        packed_kernels = flatten(written)
        kernels = flatten(merged)
        errors = {path: _relative_error(packed_kernels[path], kernels[path]) for path in flatten(job.masks)}
        dense_bytes = sum(kernels[path].nbytes for path in errors)
        packed_bytes = sum(leaf.nbytes for path in errors for leaf in jax.tree.leaves(packed_kernels[path]))
        return {
            'bytes': _weight_bytes(folder),
            'bytes_of_dense_kernels': packed_bytes / dense_bytes,
            'largest_relative_error': max(errors.values()),
        }

    return job.stage(kind, compute)


def _relative_error(packed: Packed24 | Bitmask | Adapted | Array, kernel: Array) -> float:
    """Return the relative error of a packed kernel, in the Frobenius norm."""
    # Factors of a packed kernel are merged first, because it is compared with the restored kernel.
    if isinstance(packed, Adapted):
        packed = merge({'kernel': packed.kernel}, None, {'kernel': packed.lora}, dtype=kernel.dtype)['kernel']
    error = jnp.linalg.norm(dense_kernel(packed, jnp.float32) - kernel.astype(jnp.float32))
    return float(error / jnp.linalg.norm(kernel.astype(jnp.float32)))


def _weight_bytes(folder: str | Path) -> int:
    """Return the bytes of a directory's weights."""
    return sum(file.stat().st_size for file in Path(folder).glob('*.safetensors'))


def count_zeros(job: Job, params: dict, trained: dict | None) -> dict:
    """Count the zeros of a pruned or restored model.

    Args:
      job: the run.
      params: the model as plain arrays.
      trained: the tree that restoration trained; None: nothing was trained.

    Returns:
      `sparsity` of each tower, `layer_density` of each kernel by tower and, if LoRA was trained,
      `lora_merged_density`: the density that the pruned kernels would have if LoRA were merged without the masks.
    """
    counts = {
        'sparsity': _tower_sparsity(job, params, job.allocated_zeros()),
        'layer_density': {tower: layer_density(params, tower) for tower in job.config.prune.pattern},
    }
    if trained is not None and job.config.restore.trained == 'lora':
        counts['lora_merged_density'] = plain_lora_density(job.base.params, job.masks, trained)
    return counts


def _tower_sparsity(job: Job, params: dict, zeros: dict[str, np.ndarray] | None) -> dict[str, dict]:
    """Return the counts of each tower, see `tower_sparsity`.

    Args:
      job: the run.
      params: the model as plain arrays, or with kernels that are read a layer at a time.
      zeros: see `Job.allocated_zeros`; the zeros that an allocation moved between layers replace those of the pattern.
    """
    patterns = job.config.prune.pattern
    groups = job.config.prune.group
    return {
        tower: tower_sparsity(params, tower, patterns[tower], group=groups[tower], zeros=zeros) for tower in patterns
    }


def refuse_violations(folder: Path, sparsity: dict[str, dict]) -> None:
    """End a run whose finished model breaks a pattern that its recipe promises.

    Args:
      folder: the workdir, for the message.
      sparsity: counts of each tower, see `count_zeros`.

    Raises:
      PatternError: a tower has a group of weights with a wrong number of zeros.
    """
    broken = [
        f'{counts["violations"]} groups of the {tower} tower break pattern {counts["pattern"]}'
        for tower, counts in sparsity.items()
        if counts['violations']
    ]
    if broken:
        raise PatternError(
            f'{folder}: {"; ".join(broken)}. Do not use the exported model; prune again in another workdir'
        )
