"""What a config says, as the library's own arguments; the configs themselves lie in `configs/`."""

import dataclasses
import difflib
import json
import math
import textwrap
from dataclasses import MISSING
from pathlib import Path
from typing import Any

from jax.sharding import AbstractMesh, Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict

from sparselora_jax import pruning
from sparselora_jax.data.easy_vqa import KINDS
from sparselora_jax.data.text_format import TextFormat
from sparselora_jax.models.model import Model
from sparselora_jax.models.runners import remat_blocks, scan_blocks
from sparselora_jax.pruning.method import check_method
from sparselora_jax.restoration import guard
from sparselora_jax.restoration.losses import KL_REDUCTIONS
from sparselora_jax.restoration.restore import TRAINED, make_train_step, paper_optimizer
from sparselora_jax.runtime.errors import DataError, SparseloraError
from sparselora_jax.runtime.files import hold, write_text
from sparselora_jax.runtime.registry import Registry, UnknownNameError
from sparselora_jax.sparse import sharding
from sparselora_jax.sparse.masks import Pattern, PatternError, parse_pattern
from sparselora_jax.sparse.packing import FOUR_BITS
from sparselora_jax.sparse.weights import GRADIENTS, LoraSpec

BASES = ('dense', 'packed', 'packed_int4', *FOUR_BITS)  # what restoration holds pruned kernels as
TEACHERS = ('model', 'top_k')
DTYPES = ('float32', 'bfloat16', 'float16')
TWO_OF_FOUR = parse_pattern('2:4')
NO_RESULT = ('mesh', 'profile')  # fields that change none beyond rounding: a run goes on whatever they say
BLOCKS = '(.*/)?blocks/'  # below a tower's name: T5 has an encoder's and a decoder's


class ConfigError(SparseloraError, ValueError):
    """A config that asks for what does not exist, or that is not the workdir's own."""


def check_values(config: Any) -> None:
    """Names what cannot work whatever the model, before anything is loaded.

    Raises:
      ConfigError, PatternError: the field, its value and what is expected.
    """
    for part in (config.prune.group, config.lora.rank, config.lora.alpha, config.lora.targets):
        if odd := set(part) ^ set(towers(config)):
            raise ConfigError(
                f'tower {sorted(odd)[0]!r}: named in one of prune.pattern, prune.group, lora.*, not in all'
            )
    prune_methods(config)
    prune_rules(config)
    _check_allocation(config)
    restore = config.restore
    fields = {'gradient': GRADIENTS, 'kl_reduction': KL_REDUCTIONS, 'trained': TRAINED}
    fields |= {'base': BASES, 'teacher': TEACHERS, 'on_bad_step': guard.POLICIES}
    for field, values in fields.items():
        if restore[field] not in values:
            raise ConfigError(f'restore.{field} {restore[field]!r}: expected one of {", ".join(values)}')
    if restore.spike != 0 and not restore.spike > 1:
        raise ConfigError(f'restore.spike {restore.spike}: expected more than 1 (times the usual loss), or 0')
    if not 0 <= config.prune.threshold < float('inf'):
        raise ConfigError(f'prune.threshold {config.prune.threshold}: expected 0 or more, per token')
    if restore.trained == 'weights':
        if all(parse_pattern(pattern).dense for pattern in config.prune.pattern.values()):
            raise ConfigError("restore.trained 'weights' trains pruned kernels: prune.pattern leaves every tower dense")
        if restore.base != 'dense':
            raise ConfigError(f"restore.base {restore.base!r} is frozen under LoRA; set restore.trained to 'lora'")
        if restore.control:
            raise ConfigError("restore.control: a LoRA budget on the dense model; set restore.trained to 'lora'")
    counts = {
        'prune': ('chunk', 'block', 'cycles', 'score_samples', 'score_batch'),
        'evaluate': ('questions', 'batch', 'max_new_tokens', 'num_beams'),
    }
    counts |= {'restore': ('steps', 'batch', 'checkpoint_every', 'top_k'), 'text': ('prompt_tokens', 'answer_tokens')}
    for part, fields in counts.items():
        for field in fields:
            if config[part][field] < 1:
                raise ConfigError(f'{part}.{field} {config[part][field]}: expected 1 or more')
    for tower in towers(config):
        if config.lora.rank[tower] < 0:
            raise ConfigError(f'lora.rank.{tower} {config.lora.rank[tower]}: expected 0 (leave it alone) or more')
    if config.dtype not in DTYPES:
        raise ConfigError(f'dtype {config.dtype!r}: expected one of {", ".join(DTYPES)}')
    try:
        text_format(config)
    except DataError as error:
        raise ConfigError(f'text.{error}') from None
    if config.evaluate.max_new_tokens < (longest := config.text.answer_tokens - 1):
        raise ConfigError(
            f'evaluate.max_new_tokens {config.evaluate.max_new_tokens}: answers of up to {longest} tokens '
            '(text.answer_tokens and the end) could not be right'
        )
    if config.stream and config.model == 'embedded':
        raise ConfigError('stream True: the embedded model is not read from disk; name a directory, :model=DIRECTORY')
    shares, kinds = restore.shares, KINDS if config.data == 'easy_vqa' else ()
    if shares and (len(shares) != len(kinds) or min(shares) < 0 or not sum(shares)):
        expected = f'a share of each kind: {", ".join(kinds)}' if kinds else 'none, () (only easy_vqa has kinds)'
        raise ConfigError(f'restore.shares {shares}: expected {expected}')
    if restore.accumulate < 1 or restore.batch % restore.accumulate:
        raise ConfigError(f'restore.accumulate {restore.accumulate}: does not divide restore.batch, {restore.batch}')


def check_batches(config: Any) -> None:
    """Names batches that the mesh cannot split.

    Raises:
      ConfigError: the field, what does not divide it, and the nearest mesh of as many devices that splits all.
    """
    mesh, restore, prune = config.mesh, config.restore, config.prune
    rows, counts = mesh.data * mesh.fsdp, {'restore.batch / restore.accumulate': restore.batch // restore.accumulate}
    counts['prune.samples'] = prune.samples
    if allocation_of(config).uses_score_batches:
        counts['prune.score_batch'] = prune.score_batch
    for field, count in counts.items():
        if count % rows:
            fits = math.gcd(rows, *counts.values())
            fsdp = math.gcd(mesh.fsdp, fits)
            better = f'data={fits // fsdp}, fsdp={fsdp}, tensor={mesh.tensor * rows // fits}'
            raise ConfigError(
                f'{field} is {count}: mesh.data * mesh.fsdp = {rows} does not divide it; {better} divides all, or ask '
                f'for a multiple of {rows}'
            )


def _options(kind: type, config: ConfigDict, group: str = 'output') -> dict[str, Any]:
    """Return the options of a pruning method or an allocation that the config says, by the names of its fields.

    Args:
      kind: a dataclass, see `pruning.Method` and `pruning.Allocation`.
      config: the recipe.
      group: the comparison group that the config asks for.
    """
    options = {}
    for field in dataclasses.fields(kind):
        if field.name == 'group':
            options['group'] = kind.groups[group]
        elif field.name == 'seed':
            options['seed'] = config.seed
        elif field.name == 'initial':
            initial = pruning.METHODS.find(config.prune.initial)
            options['initial'] = initial(**_options(initial, config, group))
        elif field.name in config.prune:
            options[field.name] = config.prune[field.name]
    return options


def _named_class(names: Registry[type], field: str, name: str) -> type:
    """Return the dataclass that a field of the config names.

    Args:
      names: registered classes.
      field: for errors: `prune.method`.
      name: a registered name, or `package.module:Name`.

    Raises:
      ConfigError: there is none, or it is no dataclass.
    """
    try:
        kind = names.find(name)
    except UnknownNameError as error:
        message = str(error).removeprefix(f'{names.kind} ')
        raise ConfigError(f'{field} {message}') from None
    if not isinstance(kind, type) or not dataclasses.is_dataclass(kind):
        raise ConfigError(f'{field} {name!r}: expected a dataclass, see docs/extending.md; it is {kind!r}')
    return kind


def _from_config(kind: type, config: ConfigDict, field: str, group: str = 'output') -> Any:
    """Return a method or an allocation with the options that the config says.

    Args:
      kind: its class.
      config: the recipe.
      field: the field of the config that names it, for errors.
      group: see `_options`.

    Raises:
      ConfigError: an option that has neither a field in `config.prune` nor a default.
    """
    options = _options(kind, config, group)
    for option in dataclasses.fields(kind):
        has_default = option.default is not MISSING or option.default_factory is not MISSING
        if option.init and option.name not in options and not has_default:
            raise ConfigError(
                f'{field} {kind.__name__}: its option {option.name} has no default, and config.prune has no field of '
                'this name'
            )
    return kind(**options)


def allocation_of(config: ConfigDict) -> pruning.Allocation:
    """Return the allocation that `prune.allocation` names, with its options from `config.prune`.

    Args:
      config: the recipe.

    Raises:
      ConfigError: an unknown allocation, or an option that cannot work.
    """
    name = config.prune.allocation
    kind = _named_class(pruning.ALLOCATIONS, 'prune.allocation', name)
    try:
        allocation = _from_config(kind, config, 'prune.allocation')
    except pruning.AllocationError as error:
        raise ConfigError(f'prune.{error}') from None
    if not isinstance(allocation, pruning.Allocation):
        raise ConfigError(f'prune.allocation {name!r}: expected a subclass of sparselora_jax.pruning.Allocation')
    return allocation


def _check_allocation(config: ConfigDict) -> None:
    """Check the allocation and its options against the other fields.

    Raises:
      ConfigError: an unknown allocation, an option that cannot work, or one that cannot run from disk.
      PatternError: an N:M pattern, which leaves nothing to allocate.
    """
    allocation = allocation_of(config)
    name = config.prune.allocation
    if allocation.moves_zeros:
        for tower in towers(config):
            if parse_pattern(config.prune.pattern[tower]).structured:
                raise PatternError(
                    f'prune.pattern.{tower} {config.prune.pattern[tower]!r} with prune.allocation {name!r}: '
                    "N:M leaves nothing to allocate; expected a sparsity such as 0.5, or 'uniform'"
                )
    if config.stream and allocation.needs_model_in_memory:
        from_disk = [
            other for other in pruning.ALLOCATIONS if not pruning.ALLOCATIONS.find(other).needs_model_in_memory
        ]
        raise ConfigError(
            f'stream with prune.allocation {name!r}, whose scores need the model in memory; with it, use one of '
            f'{", ".join(from_disk)}'
        )


def towers(config: Any) -> tuple[str, ...]:
    """The towers that the config speaks of."""
    return tuple(config.prune.pattern)


def prune_methods(config: ConfigDict) -> list[tuple[str, pruning.Method]]:
    """Return (regex, method) of each tower's blocks, by the name in `config.prune` and the tower's comparison group.

    The options of a method are filled in by the names of its fields, see `pruning.Method`.

    Args:
      config: the recipe.

    Raises:
      ConfigError: an unknown method, initial method or group, or an option without a value.
    """
    prune = config.prune
    initial = _named_class(pruning.METHODS, 'prune.initial', prune.initial)
    if _starts_from_another(initial):
        others = [name for name in pruning.METHODS if not _starts_from_another(pruning.METHODS.find(name))]
        raise ConfigError(f'prune.initial {prune.initial!r}: expected one of {", ".join(others)}')
    kind = _named_class(pruning.METHODS, 'prune.method', prune.method)
    groups = getattr(kind, 'groups', pruning.Method.groups)
    for tower in towers(config):
        if prune.group[tower] not in groups:
            expected = ' or '.join(map(repr, groups))
            raise ConfigError(f'prune.group.{tower} {prune.group[tower]!r}: expected {expected}')
    methods = []
    # The rules have one more: the last is for kernels outside of blocks.
    for tower, (regex, pattern) in zip(towers(config), prune_rules(config), strict=False):
        method = _method(kind, config, prune.group[tower])
        # A method without the option `group` has one group only; the job checks counts in the config's.
        has_group = (method.group == 'output') == (prune.group[tower] == 'output')
        if not (pattern.structured or pattern.dense or has_group):
            raise ConfigError(
                f'prune.group.{tower} {prune.group[tower]!r}: method {prune.method!r} compares the weights of each '
                f'{method.group} only'
            )
        methods.append((regex, method))
    return [*methods, ('.*', _method(kind, config, 'output'))]


def _starts_from_another(kind: type) -> bool:
    """Return whether a method changes the mask of an initial one."""
    return any(field.name == 'initial' for field in dataclasses.fields(kind))


def _method(kind: type, config: ConfigDict, group: str) -> pruning.Method:
    """Return a method for a comparison group, and check that it says all that a method must say."""
    method = _from_config(kind, config, 'prune.method', group)
    try:
        check_method(method)
    except pruning.MethodError as error:
        raise ConfigError(f'prune.method {config.prune.method!r}: {error}') from None
    return method


def prune_rules(config: Any) -> list[tuple[str, Pattern]]:
    """(regex, pattern) of each tower's blocks; everything else stays dense.

    Raises:
      PatternError: a pattern that does not parse.
    """
    rules = []
    for tower in towers(config):
        try:
            rules.append((f'{tower}/{BLOCKS}.*', parse_pattern(config.prune.pattern[tower])))
        except PatternError as error:
            raise PatternError(f'prune.pattern.{tower}: {error}') from None
    return [*rules, ('.*', Pattern())]


def rounded_rules(config: Any) -> list[tuple[str, Pattern]]:
    """(regex, pattern) of what `restore.base` holds in four bits, everything else dense; empty: nothing is."""
    base, rules = config.restore.base, prune_rules(config)
    if base == 'packed_int4':
        rules = [(regex, pattern if pattern == TWO_OF_FOUR else Pattern()) for regex, pattern in rules]
    elif base not in FOUR_BITS:
        return []
    return rules if any(not pattern.dense for _, pattern in rules) else []


def pack_formats(config: Any, *, four_bits: bool) -> list[tuple[str, str]]:
    """(regex, format of `packing.pack`) of each pruned tower: 2:4 as `packed24`, other patterns as `bitmask`.

    Args:
      four_bits: the values of 2:4 kernels as int4.
    """
    two_of_four = 'packed24_int4' if four_bits else 'packed24'
    patterns = {tower: parse_pattern(config.prune.pattern[tower]) for tower in towers(config)}
    return [
        (f'{tower}/.*', two_of_four if pattern == TWO_OF_FOUR else 'bitmask')
        for tower, pattern in patterns.items()
        if not pattern.dense
    ]


def base_formats(config: Any) -> str | list[tuple[str, str]] | None:
    """What `restore.reduce_base` makes of pruned kernels; None: they stay dense arrays."""
    base = config.restore.base
    if base == 'dense':
        return None
    return base if base in FOUR_BITS else pack_formats(config, four_bits=base == 'packed_int4')


def runs_teacher(config: Any) -> bool:
    """Whether restoration runs the dense model beside the student."""
    return bool(config.restore.kd) and config.restore.teacher == 'model'


def reads_teacher(config: Any) -> bool:
    """Whether restoration reads what an earlier stage kept of the dense model's logits."""
    return bool(config.restore.kd) and config.restore.teacher == 'top_k'


def lora_rules(config: Any) -> list[tuple[str, LoraSpec | None]]:
    """(regex, LoraSpec) of each tower's blocks; everything else is left alone."""
    lora = config.lora
    specs = {tower: LoraSpec(rank, lora.alpha[tower]) if rank else None for tower, rank in lora.rank.items()}
    return [(f'{tower}/{BLOCKS}{lora.targets[tower]}', specs[tower]) for tower in towers(config)] + [('.*', None)]


def check_allocation(config: ConfigDict, params: PyTree) -> None:
    """Check that an allocation is possible whatever the scores.

    Args:
      config: the recipe.
      params: anything with the shapes of a params tree.

    Raises:
      PatternError: no zeros to allocate, more than `prune.highest` allows, or ratios of OWL that may leave (0, 1).
    """
    allocation = allocation_of(config)
    if not allocation.moves_zeros:
        return
    uniform = pruning.uniform_zeros(params, prune_rules(config), method=prune_methods(config))
    try:
        allocation.check(uniform, pruning.kernel_sizes(params, uniform))
    except PatternError as error:
        raise PatternError(f'prune.allocation {config.prune.allocation!r}: {error}') from None


def field_names(config: Any, prefix: str = '') -> list[str]:
    """The dotted names of all fields, those of parts included: `restore`, `restore.steps`."""
    found = []
    for name, value in config.items():
        found.append(prefix + name)
        if isinstance(value, ConfigDict):
            found += field_names(value, f'{prefix}{name}.')
    return found


def override(config: ConfigDict, fields: dict[str, Any], *, of: str = 'config') -> None:
    """Sets fields by their dotted names.

    Args:
      of: whose fields they are, for the error.

    Raises:
      ConfigError: a field that does not exist, with the nearest one, or a value of another type.
    """
    known = field_names(config)
    for name, value in fields.items():
        if name not in known:
            nearest = difflib.get_close_matches(name, known, 1, cutoff=0.0)
            raise ConfigError(f'{of} has no field {name!r}; did you mean {nearest[0]!r}?')
        try:
            config.update_from_flattened_dict({name: value})
        except (TypeError, ValueError) as error:
            raise ConfigError(f'{of}: {name} cannot be {value!r} ({error})') from None


def text_format(config: Any) -> TextFormat:
    """How questions become tokens, and how answers are generated."""
    return TextFormat(**config.text.to_dict(), decoding=decoding(config))


def decoding(config: Any) -> dict[str, Any]:
    """Arguments of `generate`."""
    return {name: value for name, value in config.evaluate.to_dict().items() if name not in ('questions', 'batch')}


def _differences(ours: dict, theirs: dict, prefix: str = '') -> list[str]:
    found = []
    for name in sorted((ours.keys() | theirs.keys()) - set(NO_RESULT)):
        a, b = ours.get(name), theirs.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f'{prefix}{name}.')
        elif a != b:
            here, there = (textwrap.shorten(repr(value), 60, placeholder=' ...') for value in (a, b))
            found.append(f'{prefix}{name} is {here} here and {there} there')
    return found


def refuse_other(workdir: Path, config: Any) -> None:
    """Checks that a workdir is this config's, or nobody's yet.

    The mesh may be another: what was saved on one is read on any.

    Raises:
      ConfigError: it holds the run of another config; names the fields that differ.
    """
    kept, ours = workdir / 'config.json', json.loads(config.to_json())
    theirs = json.loads(kept.read_text()) if kept.exists() else ours
    if found := _differences(ours, theirs):
        raise ConfigError(f'{workdir} holds the run of another config ({"; ".join(found)}); use another workdir')


def claim(workdir: Path, config: Any) -> None:
    """Makes the workdir this config's, and keeps other processes out of it until this one ends.

    Raises:
      StorageError: another run is in it. ConfigError: see `refuse_other`. What it holds stays then.
    """
    hold(workdir)
    refuse_other(workdir, config)  # another run may have come and gone since it was looked at
    write_text(workdir / 'config.json', json.dumps(json.loads(config.to_json()), indent=1))


def restore_program(model: Model, config: Any, mesh: Mesh | AbstractMesh | None) -> tuple[Any, Any]:
    """(the jitted step of restoration, its optimizer), as a recipe asks for them.

    Args:
      mesh: where its arguments will lie; None: on one device.
    """
    knobs = config.restore
    schedule = ('peak', 'warmup', 'start', 'end', 'weight_decay', 'clip')
    tx = paper_optimizer(knobs.steps, **{name: knobs[name] for name in schedule})
    if knobs.on_bad_step == 'skip' or knobs.spike:
        tx = guard.skip_bad_steps(tx, spike=knobs.spike or None)
    run = remat_blocks if knobs.remat else scan_blocks
    loss = ('kd', 'temperature', 'kl_reduction', 'gradient', 'accumulate', 'trained')
    loss = {name: knobs[name] for name in loss}
    if mesh is None:
        return make_train_step(lambda w, batch: model.answer_logits(w, batch, run), tx, **loss), tx

    def forward(weights, batch):
        weights = sharding.gather_outside_blocks(weights, mesh)
        return model.answer_logits(weights, batch, sharding.gathering(run, mesh))

    return make_train_step(forward, tx, **loss, parts=sharding.row_parts(mesh)), tx
