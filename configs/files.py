"""Find and read the file that `--config` names: Python with a `get_config`, JSON (the config.json of a run) or YAML."""

import difflib
import json
import re
import runpy
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from ml_collections import ConfigDict

from sparselora_jax import recipe
from sparselora_jax.recipe import ConfigError
from sparselora_jax.runtime.os_errors import describe

ROOT = Path(__file__).parents[1]
# What a config is for: a field that only it has, and the script that runs it.
KINDS = {
    'sweep': ('points', 'launch/sweep.py'),
    'pretraining': ('facts', 'launch/pretrain.py'),
    'recipe': ('restore', 'launch/train.py'),
}


def find(name: str) -> Path:
    """Return the path of a config file.

    Args:
      name: a path from the current folder or from the repository, or the name of a file in `configs/`.

    Raises:
      ConfigError: there is no such file; names the nearest, and the folders that were searched.
    """
    candidates = [Path(name), ROOT / name, ROOT / f'{name}.py', ROOT / f'configs/{name}.py']
    candidates.append(ROOT / f'configs/sweeps/{name}.py')
    for path in candidates:
        # A pipe or a device is no file: it would be read for ever.
        if name and path.is_file():
            return path
    if name and Path(name).exists():
        raise ConfigError(f'{name}: not a file')
    # Sweeps are configs too, so all folders below configs/ are searched for the nearest name.
    others = [str(file.relative_to(ROOT)) for file in (ROOT / 'configs').glob('**/*.py')]
    nearest = difflib.get_close_matches(name, others, 1)
    hint = f'; did you mean {nearest[0]}?' if nearest else ''
    searched = '' if Path.cwd() == ROOT else f' (searched {Path.cwd()} and {ROOT})'
    raise ConfigError(f'{name}: no such config{hint}{searched}')


def names_config(argument: str) -> bool:
    """Return whether a command line's argument names a config file rather than a model.

    Args:
      argument: as the user wrote it.

    >>> [names_config(name) for name in ('llava_both:pattern=4:8', 'configs/none.py', 'llava-hf/llava-1.5-7b-hf')]
    [True, True, False]
    """
    path = argument.partition(':')[0]
    return Path(path).suffix in ('.py', '.json', '.yaml', '.yml') or path.removesuffix('.py') in recipes()


def recipes() -> list[str]:
    """Return the names of the recipes in configs/; its other files have no `get_config`."""
    return sorted(path.stem for path in (ROOT / 'configs').glob('*.py') if 'def get_config(' in path.read_text())


def read(name: str) -> ConfigDict:
    """Return the config that a file defines.

    Args:
      name: value of `--config`: see `find`, followed by a colon and an argument for a Python file.

    Raises:
      ConfigError: the file does not exist, cannot be read, or does not define a config.
    """
    # A colon in the path of an existing file does not begin an argument.
    path, colon, argument = (name, '', '') if Path(name).is_file() else name.partition(':')
    file = find(path)
    readers: dict[str, Callable[[str], Any]] = {'.json': json.loads, '.yaml': _read_yaml, '.yml': _read_yaml}
    if file.suffix == '.py':
        return _run(file, path, argument if colon else None)
    if file.suffix not in readers:
        raise ConfigError(f'{path}: expected a file that ends in .py, .json or .yaml')
    if colon:
        raise ConfigError(f'{name}: only a .py file takes an argument; set fields by --config.NAME=VALUE')
    try:
        fields = readers[file.suffix](file.read_text())
    except (ValueError, RecursionError) as error:
        # Also text that is not UTF-8, and JSON that is nested too deeply.
        raise ConfigError(f'{path}: not readable as {file.suffix[1:]} ({_one_line(error)})') from None
    if isinstance(fields, Mapping) and (kind := kind_of(fields)) in ('sweep', 'pretraining'):
        raise ConfigError(f'{path}: the config of a {kind}; repeat it with the .py file that defines it')
    try:
        return recipe.from_fields(fields)
    except ConfigError as error:
        raise ConfigError(f'{path}: {error}') from None
    except RecursionError:
        raise ConfigError(f'{path}: a group of fields contains itself') from None


def _run(file: Path, shown: str, argument: str | None) -> ConfigDict:
    """Return what `get_config` of a Python file returns, with all of the file's own errors as one line."""
    try:
        get_config = runpy.run_path(str(file)).get('get_config')
        if not callable(get_config):
            raise ConfigError('defines no get_config(), which returns the config')
        # A config of one's own need not take an argument.
        config = get_config() if argument is None else get_config(argument)
    except ValueError as error:
        # The message is written for the user (`configs/arguments.py`).
        raise ConfigError(f'{shown}: {_one_line(error)}') from None
    except OSError as error:
        raise ConfigError(f'{shown}{_line_of(error, file)}: {describe(error)}') from None
    except (Exception, SystemExit) as error:
        raise ConfigError(f'{shown}{_line_of(error, file)}: {type(error).__name__}: {_one_line(error)}') from None
    if not isinstance(config, ConfigDict):
        raise ConfigError(f'{shown}: get_config returns {type(config).__name__}, expected a ConfigDict')
    return config


def _one_line(error: BaseException) -> str:
    """Return the message of an error without line breaks."""
    return ' '.join(str(error).split())


def _line_of(error: BaseException, file: Path) -> str:
    """Return where in a file an error was raised, or '' if it was not raised there."""
    if isinstance(error, SyntaxError):
        return ''  # its message has the line
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    return f', line {lines[-1]}' if lines else ''


def kind_of(config: Mapping[str, Any] | ConfigDict) -> str | None:
    """Return what a config is for, a key of `KINDS`; None if it has none of their fields.

    Args:
      config: its fields.
    """
    return next((kind for kind, (field, _) in KINDS.items() if field in config), None)


def check_kind(name: str, config: ConfigDict, expected: str) -> None:
    """Check that a script can run a config.

    Args:
      name: value of `--config`, for the error.
      config: the config.
      expected: a key of `KINDS`.

    Raises:
      ConfigError: the config is of another kind; names the script that runs it.
    """
    kind = kind_of(config)
    if kind != expected and kind is not None:
        _, script = KINDS[kind]
        raise ConfigError(f'{name} is a {kind}, and this script needs a {expected}; run it with python {script}')
    if kind is None:
        field, _ = KINDS[expected]
        raise ConfigError(f'{name} is no {expected}: it has no field {field!r}')


class _CoreLoader(yaml.SafeLoader):
    """Read YAML by the types of YAML 1.2: in 1.1, `2:4` is the number 124, `1e-3` a text, and `no` means False."""

    yaml_implicit_resolvers: dict[str, list] = {}  # noqa: RUF012  PyYAML's own attribute


# A later entry is only tried if no earlier one matches: every whole number also looks like a float.
for _kind, _pattern, _first in (
    ('null', r'~|null|', ['~', 'n', '']),
    ('bool', 'true|false|True|False', [*'tfTF']),
    ('int', '[-+]?(0|[1-9][0-9]*)', [*'-+0123456789']),
    ('float', r'[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan', [*'-+.0123456789']),
):
    _CoreLoader.add_implicit_resolver(f'tag:yaml.org,2002:{_kind}', re.compile(rf'^(?:{_pattern})$'), _first)


def _read_yaml(text: str) -> Any:
    """Return the value of a YAML document.

    Raises:
      ValueError: it is no YAML; the message names the line.
    """
    try:
        # A subclass of SafeLoader builds plain values only, and never runs code.
        return yaml.load(text, _CoreLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, 'problem_mark', None)
        where = f'line {mark.line + 1}: ' if mark else ''
        raise ValueError(f'{where}{getattr(error, "problem", None) or error}') from None
