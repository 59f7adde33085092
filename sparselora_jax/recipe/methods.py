"""Build the pruning methods and the allocation that a recipe names, with their options from `config.prune`."""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import MISSING
from typing import Any

from jaxtyping import PyTree
from ml_collections import ConfigDict

from sparselora_jax import pruning
from sparselora_jax.pruning.method import check_method
from sparselora_jax.recipe.config import ConfigError, towers, value_of
from sparselora_jax.recipe.kernel_rules import prune_rules
from sparselora_jax.runtime.errors import calling
from sparselora_jax.runtime.registry import Registry, UnknownNameError
from sparselora_jax.sparse.patterns import PatternError, parse_pattern
from sparselora_jax.sparse.rules import first_match


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


def option_fields(config: ConfigDict) -> dict[str, Any]:
    """Return the options of the methods and the allocation that a recipe names, as fields of the recipe.

    Args:
      config: a recipe.

    Returns:
      Dotted name -> default, or None for an option without a simple one.

    Raises:
      ConfigError: a method or the allocation is unknown.
    """
    kinds = [
        _named_class(pruning.METHODS, 'prune.method', config.prune.method),
        _named_class(pruning.METHODS, 'prune.initial', config.prune.initial),
        _named_class(pruning.ALLOCATIONS, 'prune.allocation', config.prune.allocation),
    ]
    options = {}
    for kind in kinds:
        for field in dataclasses.fields(kind):
            # The recipe has its own seed.
            if field.init and field.name != 'seed':
                is_simple = isinstance(field.default, bool | int | float | str | tuple)
                options[f'prune.{field.name}'] = field.default if is_simple else None
    return options


def add_options(config: ConfigDict, options: Mapping[str, Any]) -> None:
    """Give a recipe fields for options, in place, so that they can be set like its other fields.

    Args:
      config: a recipe.
      options: dotted name -> default, see `option_fields`.

    Raises:
      ConfigError: an option has no default, so its type is not known.
    """
    for name, default in options.items():
        if default is None:
            raise ConfigError(
                f'{name}: its default is no number, text, True, False or tuple, so the type of a value is not known; '
                'set it in a recipe of your own'
            )
        config.prune[name.removeprefix('prune.')] = default


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
      ConfigError: an option has neither a field in `config.prune` nor a default, or the class fails.
    """
    with calling(f'{field} {kind.__name__}', ConfigError):
        options = _options(kind, config, group)
    for option in dataclasses.fields(kind):
        has_default = option.default is not MISSING or option.default_factory is not MISSING
        if option.init and option.name not in options and not has_default:
            raise ConfigError(
                f'{field} {kind.__name__}: its option {option.name} has no default, and config.prune has no field of '
                'this name'
            )
    with calling(f'{field} {kind.__name__}', ConfigError):
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


def check_allocation_fields(config: ConfigDict) -> None:
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


def check_allocation(config: ConfigDict, params: PyTree) -> None:
    """Check that the allocation is possible, whatever the scores.

    Args:
      config: the recipe.
      params: anything with the shapes of a params tree.

    Raises:
      PatternError: there are no zeros to allocate, or more than `prune.highest` allows; or OWL's sparsities may leave
        (0, 1).
      AllocationError: its check fails.
    """
    allocation = allocation_of(config)
    if not allocation.moves_zeros:
        return
    uniform = pruning.uniform_zeros(params, prune_rules(config), method=prune_methods(config))
    try:
        with calling(f'check of {type(allocation).__name__}', pruning.AllocationError):
            allocation.check(uniform, pruning.kernel_sizes(params, uniform))
    except PatternError as error:
        raise PatternError(f'prune.allocation {config.prune.allocation!r}: {error}') from None


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


def reconstruction(config: ConfigDict) -> pruning.Reconstruct | None:
    """Return the options of block-wise reconstruction in `config.prune.reconstruct`; None: it is off.

    Args:
      config: the recipe.
    """
    options = config.prune.reconstruct
    return pruning.Reconstruct(**options) if options.passes else None


def edited_kernels(config: ConfigDict, paths: Iterable[str]) -> list[str]:
    """Return the paths of the kernels whose kept weights pruning changes, by the method or by reconstruction.

    Args:
      config: the recipe.
      paths: paths of pruned kernels.
    """
    methods = prune_methods(config)
    reconstructs = reconstruction(config) is not None
    return [path for path in paths if reconstructs or first_match(methods, path).edits_kept_weights]


def _starts_from_another(kind: type) -> bool:
    """Return whether a method changes the mask of an initial method."""
    return any(field.name == 'initial' for field in dataclasses.fields(kind))


def _method(kind: type, config: ConfigDict, group: str, field: str = 'prune.method') -> pruning.Method:
    """Build a method for a comparison group, and check that it has all members of `Method`."""
    method = _from_config(kind, config, field, group)
    try:
        check_method(method)
    except pruning.MethodError as error:
        raise ConfigError(f'{field} {value_of(config, field)!r}: {error}') from None
    return method
