"""Turn a config into arguments of the library; the configs themselves are in `configs/`."""

import dataclasses
import json
import math
import re
import textwrap
from collections.abc import Callable, Collection
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

import optax
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, PyTree
from ml_collections import ConfigDict

from sparselora_jax import pruning
from sparselora_jax.data.dataset import Loader
from sparselora_jax.data.loaders import find_loader
from sparselora_jax.data.text_format import TextFormat
from sparselora_jax.evaluation.metric import METRICS, Metric
from sparselora_jax.models.model import Model
from sparselora_jax.models.runners import remat_blocks, scan_blocks
from sparselora_jax.pruning.method import check_method
from sparselora_jax.restoration import guard
from sparselora_jax.restoration.losses import KL_REDUCTIONS
from sparselora_jax.restoration.restore import TRAINED, Frozen, make_train_step, paper_optimizer
from sparselora_jax.restoration.train import State
from sparselora_jax.runtime.errors import DataError, SparseloraError
from sparselora_jax.runtime.files import hold, read_json, write_text
from sparselora_jax.runtime.registry import Registry, UnknownNameError
from sparselora_jax.sparse import sharding
from sparselora_jax.sparse.packing import FORMATS, PackingError, find_format, format_for
from sparselora_jax.sparse.patterns import Pattern, PatternError, parse_pattern
from sparselora_jax.sparse.rules import block_rule, kernels, name_in_block
from sparselora_jax.sparse.weights import GRADIENTS, LoraSpec

# Values of `restore.base`, the format of pruned kernels in restoration: dense arrays; the first packed format that
# supports a tower's pattern, with or without rounding to four bits; or one named format for all towers.
DENSE = 'dense'
BY_PATTERN = {'packed': False, 'packed_int4': True}  # whether values are rounded to four bits
BASES = (DENSE, *BY_PATTERN, *(name for name in FORMATS if not FORMATS.find(name).brings_mask))
TEACHERS = ('model', 'top_k')
DTYPES = ('float32', 'bfloat16', 'float16')
CONFIG_FILE = 'config.json'  # in a workdir: the config with which its run started
CONFIG_REMEDY = 'put back a copy, or use another workdir'  # if that file is damaged
# Fields that change results only by rounding. A run may be resumed with other values.
NO_RESULT = ('mesh', 'profile')
# Fields of `config.evaluate` that are not arguments of `generate`.
NO_DECODING = ('questions', 'batch', 'metric')


class ConfigError(SparseloraError, ValueError):
    """An invalid config, or one that differs from the config the workdir was started with."""


@dataclass(frozen=True)
class LegalValues:
    """The legal values of one field, regardless of other fields and of the model.

    Attributes:
      field: dotted name, for example `restore.steps`.
      expected: the legal values, for the error message.
      is_legal: function that returns whether a value is legal.
    """

    field: str
    expected: str
    is_legal: Callable[[Any], bool]


def one_of(field: str, values: Collection[str]) -> LegalValues:
    """Return the rule that a field must have one of the given values.

    Args:
      field: dotted name.
      values: the legal values.
    """
    return LegalValues(field, f'one of {", ".join(values)}', lambda value: value in values)


def at_least_one(field: str) -> LegalValues:
    """Return the rule that a field must be 1 or more.

    Args:
      field: dotted name.
    """
    return LegalValues(field, '1 or more', lambda value: value >= 1)


# Checked from top to bottom; the first violation is reported. Fields whose legal values depend on other fields or on
# the tower are checked by the functions below `check_values`.
LEGAL_VALUES = (
    one_of('dtype', DTYPES),
    one_of('restore.gradient', GRADIENTS),
    one_of('restore.kl_reduction', KL_REDUCTIONS),
    one_of('restore.trained', TRAINED),
    one_of('restore.teacher', TEACHERS),
    one_of('restore.on_bad_step', guard.POLICIES),
    # 0 turns the check off. With a limit of 1 or less, ordinary steps would count as spikes.
    LegalValues('restore.spike', 'more than 1 (times the usual loss), or 0', lambda value: value == 0 or value > 1),
    # With an infinite threshold DSnoT would change no output.
    LegalValues('prune.threshold', '0 or more, per token', lambda value: 0 <= value < math.inf),
    # Sizes and counts.
    at_least_one('prune.chunk'),
    at_least_one('prune.block'),
    at_least_one('prune.cycles'),
    at_least_one('prune.score_samples'),
    at_least_one('prune.score_batch'),
    at_least_one('evaluate.questions'),
    at_least_one('evaluate.batch'),
    at_least_one('evaluate.max_new_tokens'),
    at_least_one('evaluate.num_beams'),
    at_least_one('restore.steps'),
    at_least_one('restore.batch'),
    at_least_one('restore.checkpoint_every'),
    at_least_one('restore.top_k'),
    at_least_one('text.prompt_tokens'),
    at_least_one('text.answer_tokens'),
)


def check_values(config: ConfigDict) -> None:
    """Check everything that can be checked without the model and the data.

    Args:
      config: a recipe.

    Raises:
      ConfigError, PatternError: a value is illegal; the message names the field, its value and what is expected.
    """
    # Towers are checked first: the later checks look up fields by the names of towers.
    _check_towers(config)
    # Called only for their errors; their results are computed again where they are used.
    prune_methods(config)
    prune_rules(config)
    _check_allocation(config)
    for legal in LEGAL_VALUES:
        value = _value(config, legal.field)
        if not legal.is_legal(value):
            raise ConfigError(f'{legal.field} {value!r}: expected {legal.expected}')
    _check_base(config)
    _check_lora(config)
    _check_trained_weights(config)
    _check_text(config)
    _check_shares(config)
    metric(config)  # also only for its error
    if config.stream and config.model == 'embedded':
        raise ConfigError('stream True: the embedded model is not read from disk; name a directory, :model=DIRECTORY')
    restore = config.restore
    if restore.accumulate < 1 or restore.batch % restore.accumulate:
        raise ConfigError(f'restore.accumulate {restore.accumulate}: does not divide restore.batch, {restore.batch}')


def _check_base(config: ConfigDict) -> None:
    """Check that `restore.base` is one of `BASES`, or an external format that takes every tower's pattern."""
    base = config.restore.base
    if base in BASES:
        return
    if ':' not in base:
        raise ConfigError(f'restore.base {base!r}: expected one of {", ".join(BASES)}, or package.module:Name')
    try:
        form = find_format(base)
    except PackingError as error:
        raise ConfigError(f'restore.base: {error}') from None
    for tower, text in config.prune.pattern.items():
        pattern = parse_pattern(text)
        if not pattern.dense and not form.takes(pattern):
            raise ConfigError(f'restore.base {base!r} cannot hold prune.pattern.{tower} {text!r}')


def _value(config: ConfigDict, field: str) -> Any:
    """Return the value of a field by its dotted name."""
    for name in field.split('.'):
        config = config[name]
    return config


def _check_towers(config: ConfigDict) -> None:
    """Check that all fields that have a value per tower name the same towers."""
    for by_tower in (config.prune.group, config.lora.rank, config.lora.alpha, config.lora.targets):
        # A tower that is missing from one field would raise a KeyError much later.
        not_in_both = set(by_tower) ^ set(towers(config))
        if not_in_both:
            raise ConfigError(
                f'tower {min(not_in_both)!r}: named in some of prune.pattern, prune.group, lora.*, but not in all'
            )


def _check_lora(config: ConfigDict) -> None:
    """Check ranks and regexes of every tower."""
    for tower in towers(config):
        rank = config.lora.rank[tower]
        if rank < 0:
            raise ConfigError(f'lora.rank.{tower} {rank}: expected 0 (leave it alone) or more')
        targets = config.lora.targets[tower]
        try:
            # Compiled inside a group, as in `lora_rules`: '(?i)q' compiles alone, but not inside a group.
            re.compile(f'(?:{targets})')
        except re.error as error:
            raise ConfigError(f'lora.targets.{tower} {targets!r}: expected a regular expression ({error})') from None


def _check_trained_weights(config: ConfigDict) -> None:
    """Check that no field requires LoRA if the pruned kernels themselves are trained."""
    restore = config.restore
    if restore.trained != 'weights':
        return
    if all(parse_pattern(pattern).dense for pattern in config.prune.pattern.values()):
        raise ConfigError("restore.trained 'weights' trains pruned kernels: prune.pattern leaves every tower dense")
    if restore.base != 'dense':
        raise ConfigError(f"restore.base {restore.base!r} is frozen under LoRA; set restore.trained to 'lora'")
    if restore.control:
        raise ConfigError("restore.control trains LoRA on the dense model; set restore.trained to 'lora'")


def _check_text(config: ConfigDict) -> None:
    """Check the prompt's template, and that generated answers can be as long as the longest answer."""
    try:
        text_format(config)
    except DataError as error:
        # The message begins with the field: "prompt 'Question:': expected {} once".
        raise ConfigError(f'text.{error}') from None
    # The last token of an answer is the end of text, which a right answer need not contain.
    longest_answer = config.text.answer_tokens - 1
    if config.evaluate.max_new_tokens < longest_answer:
        raise ConfigError(
            f'evaluate.max_new_tokens {config.evaluate.max_new_tokens}: answers of up to {longest_answer} tokens '
            '(text.answer_tokens without the end) would be cut off'
        )


def _check_shares(config: ConfigDict) -> None:
    """Check that `restore.shares` has a share for each kind of answer in the data set."""
    shares = config.restore.shares
    # The loader is always looked up, so that an unknown data set is an error even without shares.
    kinds = data_loader(config).kinds
    if not shares:
        return
    if not kinds:
        raise ConfigError(
            f'restore.shares {shares}: expected (), because the kinds of answers of {config.data!r} are not known'
        )
    if len(shares) != len(kinds) or min(shares) < 0 or sum(shares) == 0:
        raise ConfigError(f'restore.shares {shares}: expected a share of each kind: {", ".join(kinds)}')


def data_loader(config: ConfigDict) -> Loader:
    """Return the loader of the data set that a recipe names.

    Args:
      config: a recipe.

    Raises:
      ConfigError: `data` is `package.module:Name`, and that loader does not exist.
    """
    try:
        return find_loader(config.data)
    except UnknownNameError as error:
        raise ConfigError(f'data: {error}') from None


def metric(config: ConfigDict) -> Metric:
    """Return the metric that a recipe names.

    Args:
      config: a recipe.

    Raises:
      ConfigError: `evaluate.metric` is not the name of a metric.
    """
    name = config.evaluate.metric
    try:
        chosen = METRICS.find(name)
    except UnknownNameError as error:
        raise ConfigError(f'evaluate.metric: {error}') from None
    # A class has the attributes of its instances, but calling it returns an instance instead of a score.
    if isinstance(chosen, type) or not isinstance(chosen, Metric):
        raise ConfigError(f'evaluate.metric: metric {name!r}: expected an object with a `title` that can be called')
    return chosen


def check_batches(config: ConfigDict) -> None:
    """Check that the mesh divides the batches.

    Args:
      config: a recipe.

    Raises:
      ConfigError: it does not; the message names the field, and the nearest mesh with as many devices that divides all.
    """
    mesh = config.mesh
    rows = mesh.data * mesh.fsdp  # both axes split a batch
    counts = {
        'restore.batch / restore.accumulate': config.restore.batch // config.restore.accumulate,
        'prune.samples': config.prune.samples,
    }
    # Some allocations compute the loss on their own batches.
    if allocation_of(config).uses_score_batches:
        counts['prune.score_batch'] = config.prune.score_batch
    for field, count in counts.items():
        if count % rows == 0:
            continue
        # The same number of devices, but fewer along the axes that split batches.
        best_rows = math.gcd(rows, *counts.values())
        fsdp = math.gcd(mesh.fsdp, best_rows)
        better = f'data={best_rows // fsdp}, fsdp={fsdp}, tensor={mesh.tensor * rows // best_rows}'
        raise ConfigError(
            f'{field} is {count}: mesh.data * mesh.fsdp = {rows} does not divide it; {better} divides all, or ask '
            f'for a multiple of {rows}'
        )


def _options(kind: type, config: ConfigDict, group: str = 'output') -> dict[str, Any]:
    """Return the options that the config gives for a pruning method or an allocation, by field name.

    Args:
      kind: a dataclass, see `pruning.Method` and `pruning.Allocation`.
      config: the recipe.
      group: the comparison group from the config.
    """
    options = {}
    for field in dataclasses.fields(kind):
        if not field.init:
            continue
        if field.name == 'group':
            options['group'] = getattr(kind, 'groups', pruning.Method.groups)[group]
        elif field.name == 'seed':
            options['seed'] = config.seed
        elif field.name == 'initial':
            initial = _named_class(pruning.METHODS, 'prune.initial', config.prune.initial)
            options['initial'] = _method(initial, config, group, 'prune.initial')
        elif field.name in config.prune:
            options[field.name] = config.prune[field.name]
    return options


def _named_class(names: Registry[type], field: str, name: str) -> type:
    """Return the dataclass that a field of the config names.

    Args:
      names: registered classes.
      field: name of the field, such as `prune.method`, for errors.
      name: a registered name, or `package.module:Name`.

    Raises:
      ConfigError: the name is unknown, or the object is not a dataclass.
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
    """Build a method or an allocation with the options from the config.

    Args:
      kind: class of the method or the allocation.
      config: the recipe.
      field: the field of the config that names it, for errors.
      group: see `_options`.

    Raises:
      ConfigError: an option has neither a field in `config.prune` nor a default.
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
      ConfigError: the allocation is unknown, or an option is invalid.
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
      ConfigError: the allocation is unknown, an option is invalid, or the allocation cannot run from disk.
      PatternError: a pattern is N:M, which leaves nothing to allocate.
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


def towers(config: ConfigDict) -> tuple[str, ...]:
    """Return the names of the towers that the config has values for.

    Args:
      config: a recipe.
    """
    return tuple(config.prune.pattern)


def prune_methods(config: ConfigDict) -> list[tuple[str, pruning.Method]]:
    """Return (regex, method) for each tower's blocks: the method of `config.prune` with the tower's comparison group.

    The options of a method come from config fields with the same names, see `pruning.Method`.

    Args:
      config: the recipe.

    Raises:
      ConfigError: a method, an initial method or a group is unknown, or an option has no value.
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
    # There is one more rule than towers: the last is for kernels outside the blocks.
    for tower, (regex, pattern) in zip(towers(config), prune_rules(config), strict=False):
        method = _method(kind, config, prune.group[tower])
        # A method without the option `group` has a fixed group, which must match the config: the job checks counts by
        # it.
        has_group = (method.group == 'output') == (prune.group[tower] == 'output')
        if not (pattern.structured or pattern.dense or has_group):
            raise ConfigError(
                f'prune.group.{tower} {prune.group[tower]!r}: method {prune.method!r} compares the weights of each '
                f'{method.group} only'
            )
        methods.append((regex, method))
    return [*methods, ('.*', _method(kind, config, 'output'))]


def _starts_from_another(kind: type) -> bool:
    """Return whether a method changes the mask of an initial method."""
    return any(field.name == 'initial' for field in dataclasses.fields(kind))


def _method(kind: type, config: ConfigDict, group: str, field: str = 'prune.method') -> pruning.Method:
    """Build a method for a comparison group, and check that it has all members of `Method`."""
    method = _from_config(kind, config, field, group)
    try:
        check_method(method)
    except pruning.MethodError as error:
        raise ConfigError(f'{field} {_value(config, field)!r}: {error}') from None
    return method


def prune_rules(config: ConfigDict) -> list[tuple[str, Pattern]]:
    """Return (regex, pattern) for each tower's blocks; everything else stays dense.

    Args:
      config: a recipe.

    Raises:
      PatternError: a pattern does not parse.
    """
    patterns = []
    for tower in towers(config):
        try:
            pattern = parse_pattern(config.prune.pattern[tower])
        except PatternError as error:
            raise PatternError(f'prune.pattern.{tower}: {error}') from None
        patterns.append((block_rule(tower), pattern))
    return [*patterns, ('.*', Pattern())]


def rounded_rules(config: ConfigDict) -> list[tuple[str, Pattern]]:
    """Return (regex, pattern) for the kernels that `restore.base` rounds; everything else is dense.

    Args:
      config: the recipe.

    Returns:
      Ordered rules; empty if nothing is rounded.
    """
    rounded = [
        (regex, pattern if form is not None and find_format(form).levels is not None else Pattern())
        for regex, pattern, form in _base_rules(config)
    ]
    return rounded if any(not pattern.dense for _, pattern in rounded) else []


def rounded_format(config: ConfigDict) -> str:
    """Return the name of the format to whose values the kernels of `rounded_rules` are rounded.

    Args:
      config: a recipe whose `restore.base` rounds some kernels.
    """
    names = (form for _, _, form in _base_rules(config) if form is not None)
    return next(name for name in names if find_format(name).levels is not None)


def pack_formats(config: ConfigDict, *, four_bits: bool) -> list[tuple[str, str]]:
    """Return (regex, format of `packing.pack`) for each pruned tower: the first format that supports its pattern.

    Args:
      config: the recipe.
      four_bits: use formats that round values to four bits, if there is one for the pattern.
    """
    patterns = {tower: parse_pattern(config.prune.pattern[tower]) for tower in towers(config)}
    return [
        (f'{tower}/.*', format_for(pattern, four_bits=four_bits))
        for tower, pattern in patterns.items()
        if not pattern.dense
    ]


def base_formats(config: ConfigDict) -> str | list[tuple[str, str]] | None:
    """Return the formats of pruned kernels in restoration, see `packing.reduce_kernels`.

    Args:
      config: the recipe.

    Returns:
      The name of one format, or rules (regex, name); None: kernels stay dense arrays.
    """
    base = config.restore.base
    if base == DENSE:
        return None
    return pack_formats(config, four_bits=BY_PATTERN[base]) if base in BY_PATTERN else base


def _base_rules(config: ConfigDict) -> list[tuple[str, Pattern, str | None]]:
    """Return (regex, pattern, format) for each tower, by `restore.base`; format None is a dense array."""
    base = config.restore.base
    rules = []
    for regex, pattern in prune_rules(config):
        form = base
        if pattern.dense or base == DENSE:
            form = None
        elif base in BY_PATTERN:
            form = format_for(pattern, four_bits=BY_PATTERN[base])
        rules.append((regex, pattern, form))
    return rules


def runs_teacher(config: ConfigDict) -> bool:
    """Return whether restoration runs the dense model beside the student.

    Args:
      config: a recipe.
    """
    return bool(config.restore.kd) and config.restore.teacher == 'model'


def reads_teacher(config: ConfigDict) -> bool:
    """Return whether restoration reads the dense model's logits from files of an earlier stage.

    Args:
      config: a recipe.
    """
    return bool(config.restore.kd) and config.restore.teacher == 'top_k'


def split_alternatives(regex: str) -> list[str]:
    """Split a regex at each `|` that stands outside brackets.

    Args:
      regex: a valid regular expression.

    >>> split_alternatives('attn/(q|k)/kernel|mlp/up/kernel')
    ['attn/(q|k)/kernel', 'mlp/up/kernel']
    """
    alternatives = ['']
    depth = 0  # of open groups
    # Tokens: an escaped character, a set of characters (in which a first `]` is literal), or any other character.
    for token in re.findall(r'\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|.', regex, re.DOTALL):
        if token == '(':
            depth += 1
        elif token == ')':
            depth -= 1
        if token == '|' and depth == 0:
            alternatives.append('')
        else:
            alternatives[-1] += token
    return alternatives


def lora_rules(config: ConfigDict) -> list[tuple[str, LoraSpec | None]]:
    """Return (regex, LoraSpec) for each tower's blocks; everything else gets no LoRA.

    Args:
      config: a recipe.
    """
    lora = config.lora
    specs = []
    for tower in towers(config):
        rank = lora.rank[tower]
        # Rank 0 means no LoRA in a tower. The tower keeps its rule, so that no other tower's rule matches its kernels.
        spec = LoraSpec(rank, lora.alpha[tower]) if rank else None
        specs.append((block_rule(tower, lora.targets[tower]), spec))
    return [*specs, ('.*', None)]


def check_targets(config: ConfigDict, params: dict) -> None:
    """Check that every alternative of `lora.targets` matches a kernel; a misspelt one would be ignored silently.

    Args:
      config: a recipe.
      params: params, or anything with their shapes.

    Raises:
      ConfigError: an alternative matches no kernel; the message lists the existing kernels.
    """
    paths = kernels(params)
    for tower in towers(config):
        for alternative in split_alternatives(config.lora.targets[tower]):
            if any(re.fullmatch(block_rule(tower, alternative), path) for path in paths):
                continue
            # Listed without the tower and the blocks, as users write them in the field.
            in_blocks = (path for path in paths if re.fullmatch(block_rule(tower), path))
            rests = sorted({name_in_block(path) for path in in_blocks})
            raise ConfigError(
                f'lora.targets.{tower}: {alternative!r} matches no kernel of the blocks; they are {", ".join(rests)}'
            )


def check_allocation(config: ConfigDict, params: PyTree) -> None:
    """Check that the allocation is possible, whatever the scores.

    Args:
      config: the recipe.
      params: anything with the shapes of a params tree.

    Raises:
      PatternError: there are no zeros to allocate, or more than `prune.highest` allows; or OWL's sparsities may leave
        (0, 1).
    """
    allocation = allocation_of(config)
    if not allocation.moves_zeros:
        return
    uniform = pruning.uniform_zeros(params, prune_rules(config), method=prune_methods(config))
    try:
        allocation.check(uniform, pruning.kernel_sizes(params, uniform))
    except PatternError as error:
        raise PatternError(f'prune.allocation {config.prune.allocation!r}: {error}') from None


def field_names(config: ConfigDict, prefix: str = '') -> list[str]:
    """Return the dotted names of all fields, including their parents: `restore`, `restore.steps`, ...

    Args:
      config: a recipe, or a part of one.
      prefix: put before each name.
    """
    names = []
    for name, value in config.items():
        names.append(prefix + name)
        if isinstance(value, ConfigDict):
            names += field_names(value, f'{prefix}{name}.')
    return names


def override(config: ConfigDict, fields: dict[str, Any], *, owner: str = 'config') -> None:
    """Set fields by their dotted names.

    Args:
      config: changed in place.
      fields: dotted name -> new value.
      owner: name of the config, for the error.

    Raises:
      ConfigError: a field does not exist (the message suggests the nearest one), or a value has another type.
    """
    for name, value in fields.items():
        # Without this check ml_collections would add an unknown field, even to a locked config.
        _check_field_exists(config, name, owner)
        try:
            config.update_from_flattened_dict({name: value})
        except (TypeError, ValueError) as error:
            raise ConfigError(f'{owner}: {name} cannot be {value!r} ({error})') from None


def _check_field_exists(config: ConfigDict, name: str, owner: str) -> None:
    """Raise `ConfigError` if the config has no field of this dotted name."""
    part = config
    parents = []
    for key in name.split('.'):
        if not isinstance(part, ConfigDict):
            raise ConfigError(f'{owner} has no field {name!r}; {".".join(parents)} has no fields')
        try:
            part = part[key]
        except KeyError as error:
            # ml_collections says "'stepz'", and on a second line 'Did you mean "steps" ...' if a name is near.
            _, _, suggestion = error.args[0].partition('\n')
            if suggestion:
                hint = suggestion[0].lower() + suggestion[1:]
            else:
                # No similar name, so all names are listed.
                hint = f'{".".join(parents) or "it"} has {", ".join(sorted(part))}'
            raise ConfigError(f'{owner} has no field {name!r}; {hint}') from None
        parents.append(key)


def text_format(config: ConfigDict) -> TextFormat:
    """Return how questions become tokens, and how answers are generated.

    Args:
      config: a recipe.

    Raises:
      DataError: the prompt's template does not have exactly one place for the question.
    """
    return TextFormat(**config.text.to_dict(), decoding=decoding(config))


def decoding(config: ConfigDict) -> dict[str, Any]:
    """Return the arguments of `generate`.

    Args:
      config: a recipe.
    """
    return {name: value for name, value in config.evaluate.to_dict().items() if name not in NO_DECODING}


def _differences(ours: dict, theirs: dict, prefix: str = '') -> list[str]:
    """Return a phrase for each field that differs between two configs, except fields that do not change results."""
    differences = []
    for name in sorted((ours.keys() | theirs.keys()) - set(NO_RESULT)):
        # A missing field counts as None: configs of older versions have fewer fields.
        our_value = ours.get(name)
        their_value = theirs.get(name)
        if isinstance(our_value, dict) and isinstance(their_value, dict):
            differences += _differences(our_value, their_value, f'{prefix}{name}.')
        elif our_value != their_value:
            differences.append(
                f'{prefix}{name} is {_shorten(our_value)} here and {_shorten(their_value)} in the workdir'
            )
    return differences


def _shorten(value: Any) -> str:
    # Some values are long: the points of a sweep are lists of hundreds of words.
    return textwrap.shorten(repr(value), 60, placeholder=' ...')


def refuse_other(workdir: Path, config: ConfigDict) -> None:
    """Check that a workdir holds the run of this config, or no run yet.

    The mesh may differ: results that were saved on one mesh can be read on any other.

    Args:
      workdir: the folder of a run.
      config: config of the run that is about to start or resume.

    Raises:
      ConfigError: the workdir holds the run of another config; the message names the fields that differ.
      StorageError: the config in the workdir is damaged.
    """
    file = workdir / CONFIG_FILE
    if not file.exists():
        return
    # Convert through JSON, so that tuples compare equal to the lists in the file.
    theirs = read_json(file, CONFIG_REMEDY)
    differences = _differences(json.loads(config.to_json()), theirs)
    if differences:
        raise ConfigError(f'{workdir} holds the run of another config ({"; ".join(differences)}); use another workdir')


def claim(workdir: Path, config: ConfigDict) -> None:
    """Write the config into the workdir, and lock the workdir until this process ends.

    Args:
      workdir: the folder of a run.
      config: config of the run.

    Raises:
      StorageError: another run uses the workdir.
      ConfigError: see `refuse_other`; the files in the workdir stay as they are.
    """
    hold(workdir)
    # Checked again with the lock held: another run may have started and ended since the first check.
    refuse_other(workdir, config)
    write_text(workdir / CONFIG_FILE, json.dumps(json.loads(config.to_json()), indent=1))


def restore_program(
    model: Model, config: ConfigDict, mesh: Mesh | AbstractMesh | None
) -> tuple[Callable[[State, Frozen, dict], tuple[State, dict[str, Array]]], optax.GradientTransformation]:
    """Return the jitted step of restoration and its optimizer for a recipe.

    Args:
      model: the model that is restored.
      config: a recipe.
      mesh: the mesh on which the arguments of the step will lie; None: one device.
    """
    restore = config.restore
    tx = paper_optimizer(
        restore.steps,
        peak=restore.peak,
        warmup=restore.warmup,
        start=restore.start,
        end=restore.end,
        weight_decay=restore.weight_decay,
        clip=restore.clip,
    )
    # Only the wrapper can recognise a spike, whether the step is then skipped or the run ends.
    if restore.on_bad_step == 'skip' or restore.spike:
        tx = guard.skip_bad_steps(tx, spike=restore.spike or None)
    runner = remat_blocks if restore.remat else scan_blocks
    if mesh is not None:
        runner = sharding.gathering(runner, mesh)

    def forward(weights, batch):
        if mesh is not None:
            # The runner gathers the weights of the blocks, a layer at a time.
            weights = sharding.gather_outside_blocks(weights, mesh)
        return model.answer_logits(weights, batch, runner)

    step = make_train_step(
        forward,
        tx,
        kd=restore.kd,
        temperature=restore.temperature,
        kl_reduction=restore.kl_reduction,
        gradient=restore.gradient,
        accumulate=restore.accumulate,
        trained=restore.trained,
        parts=sharding.row_parts(mesh),
    )
    return step, tx
