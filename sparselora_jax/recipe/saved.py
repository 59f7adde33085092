"""Build a recipe from plain fields, such as the `config.json` of a run or a YAML file."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from sparselora_jax.recipe.config import ConfigError, value_of
from sparselora_jax.recipe.fields import FIELDS, Field, check_names, check_value, default_config, is_number
from sparselora_jax.recipe.methods import option_fields


def from_fields(fields: object) -> ConfigDict:
    """Return a recipe: the given fields, and the defaults of all others.

    Fields with a value for each tower are merged with the defaults. If all of them are given, as in the config.json of
    a run, their towers replace the default ones.

    Args:
      fields: names and values, as JSON and YAML hold them; groups of fields are nested.

    Raises:
      ConfigError: a field does not exist (suggests the nearest), or its value is illegal.
    """
    if not isinstance(fields, Mapping):
        raise ConfigError(f'expected fields with values, found {type(fields).__name__}')
    given = _flatten(fields)
    config = default_config()
    by_tower = [field for field in FIELDS if field.is_by_tower]
    if all(any(name.startswith(f'{field.name}.') for name in given) for field in by_tower):
        for field in by_tower:
            _set(config, field.name, ConfigDict())
    known = {field.name: field for field in FIELDS}
    options = {}
    for name, value in given.items():
        parent, _, last = name.rpartition('.')
        if name in known:
            converted = _convert(value, known[name].default)
            _check(known[name], name, converted)
            _set(config, name, converted)
        elif parent in known and known[parent].is_by_tower:
            converted = _convert(value, next(iter(known[parent].default.values())))
            check_value(name, converted, known[parent].legal)
            value_of(config, parent)[last] = converted
        else:
            options[name] = value
    # Other names can only be options of a method or an allocation of the user's own.
    defaults = option_fields(config)
    check_names(options, defaults)
    for name, value in options.items():
        if any(other.startswith(f'{name}.') for other in known):
            raise ConfigError(f'{name} {value!r}: expected fields')
        _set(config, name, _convert(value, defaults.get(name)))
    return config


def _check(field: Field, name: str, value: Any) -> None:
    """Check the value of a field that has one value, not one for each tower."""
    if field.is_by_tower:
        raise ConfigError(f'{name} {value!r}: expected a value for each tower')
    check_value(name, value, field.legal)


def _set(config: ConfigDict, name: str, value: Any) -> None:
    """Set a field by its dotted name."""
    parent, _, last = name.rpartition('.')
    part = value_of(config, parent) if parent else config
    part[last] = value


def _flatten(fields: Mapping[object, Any], prefix: str = '') -> dict[str, Any]:
    """Return the values of nested fields by dotted name."""
    flat = {}
    for name, value in fields.items():
        # A key of YAML may be a number, and a dot in a key would be read as a group.
        if not isinstance(name, str) or '.' in name:
            raise ConfigError(f'{prefix}{name!r}: expected the name of a field; write groups of fields nested')
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f'{prefix}{name}.')
        else:
            flat[prefix + name] = value
    return flat


def _convert(value: Any, default: Any) -> Any:
    """Return a value in the type of the default, where JSON or YAML has no such type or writes it differently."""
    if isinstance(default, tuple) and isinstance(value, list):
        return tuple(value)
    if isinstance(default, float) and is_number(value):
        return float(value)
    # A sparsity is a text, because N:M is one: 0.5 means '0.5'.
    if isinstance(default, str) and is_number(value):
        return str(value)
    return value
