"""Bind a workdir to one config."""

import json
import os
import shlex
import textwrap
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from sparselora_jax.recipe.config import ConfigError
from sparselora_jax.recipe.fields import FIELDS
from sparselora_jax.runtime.files import hold, read_json, write_text

CONFIG_FILE = 'config.json'  # in a workdir: the config with which its run started
CONFIG_REMEDY = 'put back a copy, or use another workdir'  # if that file is damaged
# Fields that change results at most by rounding. A run may be resumed with other values.
NO_RESULT = ('mesh', 'profile', 'data_dir')
SHOWN = 5  # most differences that a message names


def absolute_paths(config: ConfigDict) -> ConfigDict:
    """Return a copy of a config in which every path is absolute, so that it means the same in every folder.

    Args:
      config: a recipe, a sweep or a pretraining.
    """
    absolute = config.copy_and_resolve_references()
    _make_absolute(absolute)
    return absolute


def _make_absolute(config: ConfigDict | dict[str, Any]) -> None:
    """Make the paths of a config absolute, in place; those of a sweep are the ones of its base recipe."""
    for field in FIELDS:
        if field.absolute is None:
            continue
        *parents, name = field.name.split('.')
        part = config
        for parent in parents:
            # A sweep has the fields of a recipe in its base only.
            part = part.get(parent, {})
        value = part.get(name)
        if isinstance(value, str):
            part[name] = field.absolute(value)
    base = config.get('base')
    if isinstance(base, ConfigDict | dict):
        _make_absolute(base)


def _differences(ours: dict, theirs: dict, prefix: str = '') -> list[str]:
    """Return a phrase for each field that differs between two configs, except fields that do not change results."""
    differences = []
    for name in sorted((ours.keys() | theirs.keys()) - set(NO_RESULT)):
        # A missing field counts as None: configs of older versions have fewer fields.
        our_value = ours.get(name)
        their_value = theirs.get(name)
        if isinstance(our_value, dict) and isinstance(their_value, dict):
            differences += _differences(our_value, their_value, f'{prefix}{name}.')
        elif our_value != their_value and not _is_same_path(our_value, their_value):
            differences.append(
                f'{prefix}{name} is {_shorten(our_value)} here and {_shorten(their_value)} in the workdir'
            )
    return differences


def _is_same_path(ours: Any, theirs: Any) -> bool:
    """Return whether two values are absolute paths of the same file or folder, perhaps through links."""
    if not isinstance(ours, str) or not isinstance(theirs, str):
        return False
    return os.path.isabs(ours) and os.path.isabs(theirs) and os.path.realpath(ours) == os.path.realpath(theirs)


def _shorten(value: Any) -> str:
    # Some values are long: the points of a sweep are lists of hundreds of words. The end of a path says most.
    if isinstance(value, str) and os.path.isabs(value):
        return repr(value)
    return textwrap.shorten(repr(value), 60, placeholder=' ...')


def stored_fields(workdir: Path, config: ConfigDict) -> dict[str, Any]:
    """Return the fields of the config with which the run of a workdir began, as `config.json` holds them.

    Args:
      workdir: the folder of a run.
      config: config of the run, if it has not begun.

    Raises:
      StorageError: the config in the workdir is damaged.
    """
    file = workdir / CONFIG_FILE
    return read_json(file, CONFIG_REMEDY) if file.exists() else _fields(config)


def _fields(config: ConfigDict) -> dict[str, Any]:
    """Return the fields of a config as `config.json` holds them."""
    # Convert through JSON, so that tuples compare equal to the lists in the file.
    fields = json.loads(config.to_json())
    _make_absolute(fields)
    return fields


def refuse_other(workdir: Path, config: ConfigDict) -> None:
    """Check that a workdir holds the run of this config, or no run yet.

    The mesh may differ: results that were saved on one mesh can be read on any other.

    Args:
      workdir: the folder of a run.
      config: config of the run that is about to start or resume.

    Raises:
      ConfigError: the workdir holds the run of another config; the message names the fields that differ, and how to
        continue that run.
      StorageError: the config in the workdir is damaged.
    """
    file = workdir / CONFIG_FILE
    if not file.exists():
        return
    theirs = read_json(file, CONFIG_REMEDY)
    # Version 0.1.0 stored paths as they were typed.
    _make_absolute(theirs)
    differences = _differences(_fields(config), theirs)
    if not differences:
        return
    more = f'; and {len(differences) - SHOWN} more' if len(differences) > SHOWN else ''
    # Only the config of a recipe can be read again; a sweep and a pretraining are Python files.
    is_recipe = 'restore' in theirs and 'restore' in config
    going_on = f'with --config={shlex.quote(str(file))}' if is_recipe else 'with its own command'
    raise ConfigError(
        f'{workdir} holds the run of another config ({"; ".join(differences[:SHOWN])}{more}); '
        f'continue it {going_on}, or use another workdir'
    )


def claim(workdir: Path, config: ConfigDict) -> None:
    """Write the config into the workdir, and lock the workdir until this process ends.

    Args:
      workdir: the folder of a run.
      config: config of the run.

    Raises:
      StorageError: another run uses the workdir.
      ConfigError: see `refuse_other`; the files in the workdir stay as they are.
    """
    # Checked before the lock is made: a folder of something else stays as it is.
    refuse_other(workdir, config)
    hold(workdir)
    # Checked again with the lock held: another run may have started and ended since the first check.
    refuse_other(workdir, config)
    write_text(workdir / CONFIG_FILE, json.dumps(_fields(config), indent=1))
