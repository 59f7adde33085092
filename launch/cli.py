"""What the scripts share: the repository on the path, flags, and errors as one line with an exit code."""

import os
import sys

# The repository first and this folder last, before anything else is imported: Python's own `inspect` is not ours.
sys.path.sort(key=lambda path: os.path.abspath(path) == os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
# Nothing here computes with torch, which transformers would import where it is installed: half the time until a script
# begins. That it is not there is no news then. transformers asks once; later on others must find no None in its place.
os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')
if 'torch' not in sys.modules:
    sys.modules['torch'] = None
    from transformers.utils import is_torch_available

    is_torch_available()
    del sys.modules['torch']

import difflib
import logging
import runpy
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from sparselora_jax.recipe import DTYPES, ConfigError, field_names
from sparselora_jax.restoration.train import Interrupted
from sparselora_jax.runtime import processes
from sparselora_jax.runtime.errors import SparseloraError

DECODING = {'num_beams': 1, 'max_new_tokens': 10, 'min_length': 0, 'length_penalty': 1.0}  # of generate


def define_config(default: str = 'configs/blip2_lang_only.py', workdir: str = 'runs/demo') -> tuple:
    """The flags `--config`, `--workdir`, and of many processes; a config that does not exist ends the script here."""
    config = define_recipe(default)
    flags.DEFINE_bool('distributed', False, 'one of many processes, which JAX finds by the environment')
    flags.DEFINE_string('coordinator', None, 'host:port of the first of many processes, which need no environment then')
    flags.DEFINE_integer('num_processes', None, 'with --coordinator', lower_bound=1)
    flags.DEFINE_integer('process_id', None, 'with --coordinator: 0 is the first', lower_bound=0)
    return config, flags.DEFINE_string('workdir', workdir, 'where results, logs and checkpoints go')


def define_recipe(default: str | None) -> Any:
    """The flag `--config` alone."""
    try:  # before the flag is defined, which reads the config and the overrides on the command line at once
        check_config(sys.argv[1:], default)
    except SparseloraError as error:
        _fail(error)
    return config_flags.DEFINE_config_file('config', default, 'a file of configs/, then :argument')


def define_model() -> None:
    """The flags of scripts that read a model and decode with it."""
    flags.DEFINE_string('model', None, 'a Hugging Face directory or hub id; by default the embedded dense model')
    flags.DEFINE_string('family', '', 'reads the model, as package.module:FAMILY; by default that of its model_type')
    flags.DEFINE_string(
        'prompt', None, "how a question is written, with {} in its place; by default the model's own way"
    )
    flags.DEFINE_integer('prompt_tokens', None, 'a prompt is padded to so many', lower_bound=1)
    flags.DEFINE_enum('dtype', 'float32', DTYPES, 'of the weights')
    own = "; by default what the model's text_format.json says"
    flags.DEFINE_integer('num_beams', None, f'1: greedy{own}, else 1', lower_bound=1)
    flags.DEFINE_integer('max_new_tokens', None, f'the longest answer{own}, else 10', lower_bound=1)
    flags.DEFINE_integer('min_length', None, f'tokens, those of the prompt included{own}, else 0', lower_bound=0)
    flags.DEFINE_float('length_penalty', None, f'beams: above 0 favours long answers{own}, else 1')


def load_model() -> tuple:
    """(model, params, processor, text format) of `--model`; flags go before what its text format says."""
    from sparselora_jax.checkpoints import embedded
    from sparselora_jax.checkpoints import load as hf
    from sparselora_jax.data import processing, text_format

    values = flags.FLAGS
    if values.model is None:
        model, params = embedded.load(dtype=values.dtype)
        processor, text = embedded.load_processor(model.cfg), text_format.TextFormat()
    else:
        model, params = hf.load_model(values.model, dtype=values.dtype, family=values.family)
        processor = processing.load_processor(model.source, model.family.processor)
        text = text_format.load(model.source, processor.spec.text)
    own = {name: getattr(values, name) for name in ('prompt', 'prompt_tokens')}
    decoding = {name: getattr(values, name) for name in DECODING}
    decoding = DECODING | text.decoding | {name: value for name, value in decoding.items() if value is not None}
    given = {name: value for name, value in own.items() if value is not None}
    return model, params, processor, replace(text, **given, decoding=decoding)


def find_model(argv: list[str], config: ConfigDict | None) -> tuple:
    """(name, Hugging Face's config or None, ours) of the model that argv names, else of the config's own.

    Raises:
      ConfigError: no model, or more than one; and what finding it raises.
    """
    from sparselora_jax.checkpoints import embedded
    from sparselora_jax.checkpoints import load as hf
    from sparselora_jax.planning import published

    if len(argv) > 1 or (not argv and config is None):
        script = Path(sys.argv[0]).name
        raise ConfigError(f'expected one model: python launch/{script} MODEL [--config=configs/NAME.py:ARGUMENT]')
    name = argv[0] if argv else config.model
    if name == 'embedded':
        return name, None, embedded.load_config()
    family = '' if config is None else config.family
    source = published.find_config(name, others=recipes(), family=family)
    if any(Path(name).glob('*.safetensors')):  # the files say whether the head is tied
        return name, source, hf.open_model(name, family)[0].cfg
    return name, source, published.model_config(source, family)


def family_recipe(cfg: Any) -> ConfigDict | None:
    """The `*_lang_only` recipe of a model's family; None: a language model alone has none."""
    path = Path(f'configs/{cfg.family.name}_lang_only.py')
    return read_config(str(path)) if path.is_file() else None


def recipes() -> list[str]:
    """The names of the files in configs/ that are recipes."""
    return sorted(path.stem for path in Path('configs').glob('*.py') if 'def get_config(' in path.read_text())


def find_recipe(name: str) -> str | None:
    """The path (and argument) of a config that is named by its path or by its name alone; None: it is no config's."""
    path, colon, argument = name.partition(':')
    if path.endswith('.py'):
        return name
    return f'configs/{path}.py{colon}{argument}' if Path(f'configs/{path}.py').is_file() else None


def read_config(path: str, argument: str | None = None) -> ConfigDict:
    """What a file of configs/ says."""
    return runpy.run_path(path)['get_config'](argument)


def check_config(argv: list[str], default: str | None) -> None:
    """Names a config file that is missing, and an override of a field that does not exist, with the nearest one."""
    values = {}
    for arg, after in zip(argv, [*argv[1:], ''], strict=False):
        if arg.startswith('--'):
            name, equals, value = arg.lstrip('-').partition('=')
            values[name] = value if equals else after
    if (chosen := values.get('config', default)) is None:
        if overrides := [name for name in values if name.startswith('config.')]:
            raise ConfigError(f'--{overrides[0]} without --config=...: which recipe is it a field of?')
        return
    path, _, argument = chosen.partition(':')
    if not Path(path).is_file():
        nearest = difflib.get_close_matches(path, [str(p) for p in Path('configs').glob('**/*.py')], 1)
        raise ConfigError(f'{path}: no such config' + (f'; did you mean {nearest[0]}?' if nearest else ''))
    try:
        config = read_config(path, argument or None)
    except (ValueError, KeyError, SyntaxError, ImportError, NameError, TypeError, AttributeError) as error:
        kind = '' if isinstance(error, ValueError) else f'{type(error).__name__}: '
        raise ConfigError(f'{path}: {kind}{error}') from None
    fields = field_names(config)
    for name in values:
        field = name.removeprefix('config.')
        if name.startswith('config.') and field not in fields:
            nearest = difflib.get_close_matches(field, fields, 1, cutoff=0.0)
            raise ConfigError(f'config has no field {field!r}; did you mean {nearest[0]!r}?')


def run(main: Callable[[list[str]], None]) -> None:
    """Runs `main(positional arguments)`; what a user can act on ends as one line, not as a traceback."""

    def guarded(argv):
        absl_logging.set_verbosity(absl_logging.ERROR)  # of the data libraries
        logging.getLogger('sparselora_jax').setLevel(logging.WARNING)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
        try:
            _connect()
            with processes.joint():
                main(argv[1:])
        except (SparseloraError, OSError) as error:
            _fail(error)
        except KeyboardInterrupt:
            _fail(Interrupted('finished stages are kept, the same command goes on'))

    app.run(guarded)


def _connect() -> None:
    """Joins the other processes, if flags say that there are any."""
    values = flags.FLAGS
    if getattr(values, 'distributed', False) or getattr(values, 'coordinator', None):
        processes.connect(values.coordinator, values.num_processes, values.process_id)


def _fail(error: Exception) -> None:
    if jax.distributed.is_initialized() and not isinstance(error, Interrupted):
        processes.leave(error)
    print(f'{"stopped" if isinstance(error, Interrupted) else "error"}: {error}', file=sys.stderr)
    sys.exit(130 if isinstance(error, Interrupted) else 1)
