"""Provide what all scripts need: import paths, flags, models and recipes by name, and errors as one line."""

import importlib.util
import os
import sys

# Python puts the folder of a script first on `sys.path`. This folder has an `inspect.py`, which would hide the standard
# library's `inspect` from every package that imports it. So the folder is moved to the end, where scripts still find
# this file. The repository comes first, for `sparselora_jax` and `configs`.
LAUNCH = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [os.path.dirname(LAUNCH), *(path for path in sys.path if os.path.abspath(path) != LAUNCH), LAUNCH]

# One package of the plain install, and one of the extra `train`.
for package in ('jax', 'ml_collections'):
    if importlib.util.find_spec(package) is None:
        sys.exit(
            f'error: {package} is not installed for {sys.executable}; run `make .venv/installed` and use '
            ".venv/bin/python, or install into your own environment: pip install '.[train]'"
        )

# If torch is installed, transformers imports it. That takes half of a script's start-up time, and no script uses torch.
# None in `sys.modules` makes the import fail. transformers checks for torch once and remembers the answer. Then the
# None is removed, because other packages look in `sys.modules` themselves and would fail on it.
os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')
if 'torch' not in sys.modules:
    sys.modules['torch'] = None
    from transformers.utils import is_torch_available

    is_torch_available()
    del sys.modules['torch']

import argparse
import difflib
import logging
import re
import runpy
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import transformers
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from sparselora_jax.checkpoints import embedded, load
from sparselora_jax.data import text_format
from sparselora_jax.models.config import FamilyConfig
from sparselora_jax.models.model import Model
from sparselora_jax.planning import published
from sparselora_jax.recipe import DTYPES, ConfigError, field_names
from sparselora_jax.restoration.train import Interrupted
from sparselora_jax.runtime import processes
from sparselora_jax.runtime.errors import SparseloraError

# Arguments of `generate` for a model that has no text_format.json.
DECODING = {'num_beams': 1, 'max_new_tokens': 10, 'min_length': 0, 'length_penalty': 1.0}

# Exceptions that a config file raises if the user made a mistake in it, or passed a wrong argument.
CONFIG_ERRORS = (ValueError, KeyError, SyntaxError, ImportError, NameError, TypeError, AttributeError)


class LoadedModel(NamedTuple):
    """The model of `--model`, ready to answer questions."""

    model: Model
    params: dict
    processor: Any
    text: text_format.TextFormat


class ModelConfig(NamedTuple):
    """A model that is known by its config alone.

    Attributes:
      name: as the user gave it.
      hf: transformers' config; None for the embedded model, which has none.
      cfg: our config of its family.
    """

    name: str
    hf: transformers.PretrainedConfig | None
    cfg: Any


def define_config(
    default: str = 'configs/blip2_lang_only.py', workdir: str = 'runs/demo'
) -> tuple[flags.FlagHolder, flags.FlagHolder]:
    """Define `--config`, `--workdir` and the flags of a run on several processes; return the first two.

    Args:
      default: recipe used if `--config` is not given.
      workdir: folder used if `--workdir` is not given.
    """
    config = define_recipe(default)
    flags.DEFINE_bool('distributed', False, 'run as one of several processes, which JAX finds from the environment')
    flags.DEFINE_string('coordinator', None, 'host:port of process 0, if the environment does not tell it')
    flags.DEFINE_integer('num_processes', None, 'number of processes, with --coordinator', lower_bound=1)
    flags.DEFINE_integer('process_id', None, 'index of this process, with --coordinator; 0 is the first', lower_bound=0)
    return config, flags.DEFINE_string('workdir', workdir, 'folder for results, logs and checkpoints')


def define_recipe(default: str | None) -> flags.FlagHolder:
    """Define `--config` alone; end the script if the recipe or an overridden field does not exist.

    Args:
      default: recipe used if `--config` is not given; None: no recipe.
    """
    # Checked first: ml_collections reads the config and the overrides as soon as the flag is defined.
    try:
        check_config(sys.argv[1:], default)
    except SparseloraError as error:
        _fail(error)
    return config_flags.DEFINE_config_file('config', default, 'recipe: a file in configs/, optionally with :ARGUMENTS')


def define_model() -> None:
    """Define the flags of scripts that load a model and decode with it."""
    own = "default: the model's text_format.json, otherwise"
    flags.DEFINE_string('model', None, 'a Hugging Face directory or hub id; default: the embedded dense model')
    flags.DEFINE_string('family', '', 'family of the model, as package.module:FAMILY; default: by its model_type')
    flags.DEFINE_string('prompt', None, f'prompt template, with {{}} for the question; {own} that of its family')
    flags.DEFINE_integer(
        'prompt_tokens', None, f'number of tokens each prompt is padded to; {own} that of its family', lower_bound=1
    )
    flags.DEFINE_enum('dtype', 'float32', DTYPES, 'type of the weights')
    flags.DEFINE_integer('num_beams', None, f'beams (1 = greedy); {own} 1', lower_bound=1)
    flags.DEFINE_integer('max_new_tokens', None, f'maximum number of tokens in an answer; {own} 10', lower_bound=1)
    flags.DEFINE_integer('min_length', None, f'minimum number of tokens, prompt included; {own} 0', lower_bound=0)
    flags.DEFINE_float('length_penalty', None, f'for beams; a value above 0 favours long answers; {own} 1')


def load_model() -> LoadedModel:
    """Load the model of `--model`; given flags override its text format."""
    # Imported here, because transformers' processors take seconds to import. An error in the image or the question is
    # reported before that.
    from sparselora_jax.data import processing

    values = flags.FLAGS
    if values.model is None:
        model, params = embedded.load(dtype=values.dtype)
        processor = embedded.load_processor(model.cfg)
        text = text_format.TextFormat()
    else:
        model, params = load.load_model(values.model, dtype=values.dtype, family=values.family)
        processor = processing.load_processor(model.source, model.family.processor)
        text = text_format.load(model.source, processor.spec.text)
    if values.prompt is not None:
        text = replace(text, prompt=values.prompt)
    if values.prompt_tokens is not None:
        text = replace(text, prompt_tokens=values.prompt_tokens)
    given = {name: values[name].value for name in DECODING if values[name].value is not None}
    return LoadedModel(model, params, processor, replace(text, decoding=DECODING | text.decoding | given))


def find_model(argv: Sequence[str], config: ConfigDict | None) -> ModelConfig:
    """Return the model that the arguments name, otherwise that of the recipe, without reading weights.

    Args:
      argv: positional arguments: a model, or nothing.
      config: the recipe; None: no recipe.

    Raises:
      ConfigError: no model, or more than one.
      StorageError, UnsupportedModelError: see `published.find_config`.
    """
    if len(argv) > 1 or (not argv and config is None):
        script = Path(sys.argv[0]).name
        raise ConfigError(f'expected one model: python launch/{script} MODEL [--config=configs/NAME.py:ARGUMENT]')
    name = argv[0] if argv else config.model
    if name == 'embedded':
        return ModelConfig(name, None, embedded.load_config())
    family = '' if config is None else config.family
    hf = published.find_config(name, others=recipes(), family=family)
    # Only the weight files tell whether a T5's head is tied. Without them, `model_config` assumes that it is.
    if any(Path(name).glob('*.safetensors')):
        model, _ = load.open_model(name, family)
        return ModelConfig(name, hf, model.cfg)
    return ModelConfig(name, hf, published.model_config(hf, family))


def family_recipe(cfg: FamilyConfig) -> ConfigDict | None:
    """Return the `*_lang_only` recipe of a model's family, or None for a language model alone, which has no recipe.

    Args:
      cfg: our config of the model.
    """
    path = Path(f'configs/{cfg.family.name}_lang_only.py')
    return read_config(str(path)) if path.is_file() else None


def recipes() -> list[str]:
    """Return the names of the recipes in configs/; its other files have no `get_config`."""
    return sorted(path.stem for path in Path('configs').glob('*.py') if 'def get_config(' in path.read_text())


def find_recipe(name: str) -> str | None:
    """Return the value for `--config` of a recipe that is named by its path or its stem.

    Args:
      name: e.g. `configs/llava_both.py:pattern=4:8` or `llava_both:pattern=4:8`.

    Returns:
      The path, followed by the arguments if there are any; None if no recipe has that name.
    """
    path, colon, argument = name.partition(':')
    if path.endswith('.py'):
        return name
    return f'configs/{path}.py{colon}{argument}' if Path(f'configs/{path}.py').is_file() else None


def read_config(path: str, argument: str | None = None) -> ConfigDict:
    """Return the config that a file defines.

    Args:
      path: the file.
      argument: passed to its `get_config`.
    """
    return runpy.run_path(path)['get_config'](argument)


def check_config(argv: Sequence[str], default: str | None) -> None:
    """Check that the config file and the overridden fields exist.

    ml_collections notices a missing file only when a field is read. For an unknown field, its error has only the last
    part of the name. So both are checked here, before ml_collections parses the same arguments.

    Args:
      argv: the command line without the script.
      default: config file used if `--config` is not given; None: no config.

    Raises:
      ConfigError: the file or a field does not exist (the message suggests the nearest name), or the file raises an
        error.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument('-config', '--config', nargs='?', default=default)
    known, others = parser.parse_known_args(argv)
    # `--noconfig.profile` is how absl writes `--config.profile=False`.
    overrides = [match[1] for arg in others if (match := re.match(r'--?(?:no)?config\.([^=]+)', arg))]
    if known.config is None:
        if overrides:
            raise ConfigError(f'--config.{overrides[0]} needs a recipe: add --config=configs/NAME.py')
        return
    path, _, argument = known.config.partition(':')
    # Sweeps are configs too, so all folders below configs/ are searched for the nearest name.
    if not Path(path).is_file():
        nearest = difflib.get_close_matches(path, [str(file) for file in Path('configs').glob('**/*.py')], 1)
        hint = f'; did you mean {nearest[0]}?' if nearest else ''
        raise ConfigError(f'{path}: no such config{hint}')
    try:
        config = read_config(path, argument or None)
    except CONFIG_ERRORS as error:
        # The message of a ValueError is written for the user (`configs/arguments.py`). Other messages need the type.
        kind = '' if isinstance(error, ValueError) else f'{type(error).__name__}: '
        raise ConfigError(f'{path}: {kind}{error}') from None
    fields = field_names(config)
    for field in overrides:
        if field not in fields:
            # No cutoff: with so few names, even a distant nearest name is a useful hint.
            nearest = difflib.get_close_matches(field, fields, 1, cutoff=0.0)
            raise ConfigError(f'config has no field {field!r}; did you mean {nearest[0]!r}?')


def run(main: Callable[[list[str]], None]) -> NoReturn:
    """Run a script; print an error that the user can act on as one line, not as a traceback.

    Args:
      main: takes the positional arguments.
    """

    def guarded(argv: list[str]) -> None:
        # The data libraries log every file that they open.
        absl_logging.set_verbosity(absl_logging.ERROR)
        logging.getLogger('sparselora_jax').setLevel(logging.WARNING)
        # A scheduler's SIGTERM ends a run like Ctrl-C: finished stages are kept.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            _connect()
            # If another process is lost, the error says so.
            with processes.joint():
                main(argv[1:])
        except (SparseloraError, OSError) as error:
            _fail(error)
        except KeyboardInterrupt:
            _fail(Interrupted('finished stages are kept; run the same command to continue'))

    app.run(guarded)


def _connect() -> None:
    """Connect to the other processes if the flags say that there are any."""
    # Not every script defines these flags.
    values = flags.FLAGS
    if getattr(values, 'distributed', False) or getattr(values, 'coordinator', None):
        processes.connect(values.coordinator, values.num_processes, values.process_id)


def _fail(error: Exception) -> NoReturn:
    """Print one line and end with code 1, or with 130 (the shell's code for Ctrl-C) after an interruption."""
    interrupted = isinstance(error, Interrupted)
    # After an error, JAX would wait for the other processes, which wait for this one. An interruption reaches all of
    # them, so they end too.
    if jax.distributed.is_initialized() and not interrupted:
        processes.leave(error)
    print(f'{"stopped" if interrupted else "error"}: {error}', file=sys.stderr)
    sys.exit(130 if interrupted else 1)
