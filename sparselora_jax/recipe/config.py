"""Read and change the fields of a config by their dotted names."""

from typing import Any

from ml_collections import ConfigDict

from sparselora_jax.runtime.errors import SparseloraError


class ConfigError(SparseloraError, ValueError):
    """An invalid config, or one that differs from the config the workdir was started with."""


def value_of(config: ConfigDict, field: str) -> Any:
    """Return the value of a field.

    Args:
      config: a recipe, or any config.
      field: dotted name.
    """
    for name in field.split('.'):
        config = config[name]
    return config


def towers(config: ConfigDict) -> tuple[str, ...]:
    """Return the names of the towers that the config has values for.

    Args:
      config: a recipe.
    """
    return tuple(config.prune.pattern)


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
        # ml_collections turns True into 1.0.
        if isinstance(value, bool) and isinstance(value_of(config, name), float):
            raise ConfigError(f'{owner}: {name} cannot be {value!r}: expected a number')
        try:
            config.update_from_flattened_dict({name: value})
        except (TypeError, ValueError, OverflowError) as error:
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
