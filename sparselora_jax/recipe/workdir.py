"""Bind a workdir to one config."""

import json
import textwrap
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from sparselora_jax.recipe.config import ConfigError
from sparselora_jax.runtime.files import hold, read_json, write_text

CONFIG_FILE = 'config.json'  # in a workdir: the config with which its run started
CONFIG_REMEDY = 'put back a copy, or use another workdir'  # if that file is damaged
# Fields that change results only by rounding. A run may be resumed with other values.
NO_RESULT = ('mesh', 'profile')


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
    # Checked before the lock is made: a folder of something else stays as it is.
    refuse_other(workdir, config)
    hold(workdir)
    # Checked again with the lock held: another run may have started and ended since the first check.
    refuse_other(workdir, config)
    write_text(workdir / CONFIG_FILE, json.dumps(json.loads(config.to_json()), indent=1))
