"""Provide what all scripts need: import paths, flags, models and recipes by name, and errors as one line."""

import importlib.util
import os
import signal
import sys
from types import FrameType


def _stop_at_once(number: int, frame: FrameType | None) -> None:
    """End the program with one line; while it still imports, there is nothing to save."""
    del number, frame
    os.write(2, b'stopped: nothing was begun\n')
    os._exit(130)


# An exception in the middle of an import may be swallowed, or be printed from wherever it was raised.
signal.signal(signal.SIGINT, _stop_at_once)

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

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import transformers
from absl import flags
from absl import logging as absl_logging
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

import sparselora_jax
from configs import files
from sparselora_jax import recipe
from sparselora_jax.checkpoints import embedded, load
from sparselora_jax.data import text_format
from sparselora_jax.models.config import FamilyConfig
from sparselora_jax.models.model import Model, check_language
from sparselora_jax.planning import published
from sparselora_jax.recipe import DTYPES, ConfigError
from sparselora_jax.restoration.train import Interrupted
from sparselora_jax.runtime import files as runtime_files
from sparselora_jax.runtime import os_errors, processes
from sparselora_jax.runtime.errors import SparseloraError
from sparselora_jax.sparse import sharding

CONFIG_HELP = 'Python file with a get_config, optionally with :ARGUMENTS; config.json of a run; or YAML with fields'

# Flags that absl takes in every script, although they are not among `flags.FLAGS`.
ABSL_FLAGS = ('flagfile', 'undefok')

KEPT = 'finished stages are kept; run the same command to continue'

# Arguments of `generate` for a model that has no text_format.json.
DECODING = {'num_beams': 1, 'max_new_tokens': 10, 'min_length': 0, 'length_penalty': 1.0, 'repetition_penalty': 1.0}


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
    default: str = 'configs/blip2_lang_only.py', workdir: str = 'runs/demo', *, kind: str = 'recipe'
) -> tuple[flags.FlagHolder, flags.FlagHolder]:
    """Define `--config`, `--workdir` and the flags of a run on several processes; return the first two.

    Args:
      default: config used if `--config` is not given.
      workdir: folder used if `--workdir` is not given.
      kind: what the config must be, a key of `files.KINDS`.
    """
    config = define_recipe(default, kind=kind)
    define_processes()
    return config, flags.DEFINE_string('workdir', workdir, 'folder for results, logs and checkpoints')


def define_processes() -> None:
    """Define the flags of a run on several processes."""
    flags.DEFINE_bool('distributed', False, 'run as one of several processes, which JAX finds from the environment')
    flags.DEFINE_string('coordinator', None, 'host:port of process 0, if the environment does not tell it')
    flags.DEFINE_integer('num_processes', None, 'number of processes, with --coordinator', lower_bound=1)
    flags.DEFINE_integer('process_id', None, 'index of this process, with --coordinator; 0 is the first', lower_bound=0)


def define_recipe(default: str | None, *, kind: str = 'recipe') -> flags.FlagHolder:
    """Define `--config` alone; end the script if the config or an overridden field does not exist.

    Args:
      default: config used if `--config` is not given; None: no config.
      kind: see `define_config`.
    """
    try:
        # Before absl reads the file of a `--flagfile`.
        _refuse_foreign(sys.argv[1:])
        name, others = split_config(sys.argv[1:], default)
        config = read_config(name, others, kind)
        if config is None:
            return flags.DEFINE_string('config', None, CONFIG_HELP)
        # ml_collections turns `--config.NAME=VALUE` into flags by the types of the fields. It is given the config
        # itself, because it only reads Python files.
        return config_flags.DEFINE_config_dict('config', config, CONFIG_HELP, sys_argv=[sys.argv[0], *others])
    except (SparseloraError, OSError) as error:
        _fail(error)
    except (flags.Error, ValueError, TypeError) as error:
        # A value of another type, or a field that is set after one of its own parts.
        _fail(ConfigError(_without_number(error)))


def _without_number(error: Exception) -> str:
    """Return the message of one of absl's errors, without the number of an operating system's error in it."""
    return re.sub(r'\[Errno \d+\] ', '', str(error))


def split_config(argv: Sequence[str], default: str | None = None) -> tuple[str | None, list[str]]:
    """Return the value of `--config`, and all other arguments.

    Args:
      argv: the command line without the script.
      default: returned if `--config` is not given.

    Raises:
      ConfigError: the flag has no value.
    """
    name = default
    others = []
    arguments = iter(argv)
    for argument in arguments:
        flag, equals, value = argument.partition('=')
        if flag not in ('--config', '-config'):
            others.append(argument)
            continue
        # The value may be an argument of its own.
        name = value if equals else next(arguments, '')
        if not name:
            raise ConfigError('--config has no value: expected a file, e.g. configs/blip2_both.py')
    return name, others


def find_overrides(arguments: Sequence[str]) -> dict[str, str]:
    """Return the fields that arguments override, each with the text of its value.

    Args:
      arguments: the command line without the script.
    """
    overrides = {}
    for index, argument in enumerate(arguments):
        # `--noconfig.profile` is how absl writes `--config.profile=False`.
        match = re.match(r'--?(?:no)?config\.([^=]+)(=?)(.*)', argument, re.DOTALL)
        if match:
            # The value may be an argument of its own.
            following = arguments[index + 1] if index + 1 < len(arguments) else ''
            overrides[match[1]] = match[3] if match[2] else following
    return overrides


def _add_options(config: ConfigDict, overrides: Mapping[str, str]) -> list[str]:
    """Give a recipe the options of a method or an allocation of the user's own that the command line sets.

    Returns:
      All options that the command line may set; none if it sets none, because nothing is then imported.
    """
    naming = ('prune.method', 'prune.initial', 'prune.allocation')
    known = recipe.field_names(config)
    unknown = [name for name in overrides if name.startswith('prune.') and name not in known]
    # A config that lacks a field is refused when its values are checked.
    if not unknown or not set(naming) <= set(known):
        return []
    # The command line may name the method too.
    named = config.copy_and_resolve_references()
    recipe.override(named, {field: overrides[field] for field in naming if field in overrides})
    options = recipe.option_fields(named)
    recipe.add_options(config, {name: default for name, default in options.items() if name in unknown})
    return list(options)


def read_config(name: str | None, others: Sequence[str], kind: str) -> ConfigDict | None:
    """Return the config that `--config` names, before its fields are overridden.

    ml_collections' error for an unknown field has only the last part of its name. So overrides are checked here.

    Args:
      name: see `files.read`; None: no config.
      others: all other arguments; those that override fields are checked.
      kind: see `define_config`.

    Raises:
      ConfigError: see `files.read`; the config is of another kind; or an overridden field does not exist.
    """
    overrides = find_overrides(others)
    if name is None:
        if overrides:
            raise ConfigError(f'--config.{next(iter(overrides))} needs a recipe: add --config=configs/NAME.py')
        return None
    config = files.read(name)
    files.check_kind(name, config, kind)
    options = _add_options(config, overrides) if kind == 'recipe' else []
    fields = recipe.field_names(config)
    for field in overrides:
        # The points, the plot and the name of a sweep are defined together, in its file.
        if kind == 'sweep' and field.partition('.')[0] not in ('base', 'budget', 'budgets'):
            raise ConfigError(f'--config.{field}: only base, budget and budgets of a sweep can be set; edit its file')
        if field not in fields:
            nearest = recipe.nearest(field, [*fields, *options])
            raise ConfigError(f'config has no field {field!r}; did you mean {nearest!r}?')
    return config


def define_dry_run() -> flags.FlagHolder:
    """Define `--dry_run`."""
    return flags.DEFINE_bool('dry_run', False, 'check everything, print what would run, and write nothing')


def dry_run(config: ConfigDict, workdir: str, stages: tuple[str, ...]) -> None:
    """Check a run as far as that is possible without doing it, and print what it would do.

    Args:
      config: the recipe.
      workdir: folder of the run, which is not made.
      stages: stages that it runs, keys of `planning.memory.STAGES`.
    """
    # Imported here, because scripts without jobs do not need it.
    from sparselora_jax.jobs import resources
    from sparselora_jax.jobs.job import Job

    # The workdir is compared with the recipe as it is, before its folder of data is replaced.
    job = Job(config, workdir)
    with resources.without_data_dir([job.config]):
        taken = resources.check_job(job, stages)
        runtime_files.refuse_held(job.workdir)
        job.stored.check(reads=False)
        done = job.stored.results()
        description = resources.describe(job, taken)
    if processes.first():
        print(description)
        if done:
            print(f'done: {", ".join(done)}')
        print('dry run: everything was checked, and nothing was written')


def define_model() -> None:
    """Define the flags of scripts that load a model and decode with it."""
    own = "default: the model's text_format.json, otherwise"
    flags.DEFINE_string('model', embedded.NAME, "a Hugging Face directory or hub id; embedded: the demo's, dense")
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
    flags.DEFINE_float(
        'repetition_penalty', None, f'above 1, tokens that were there before are less likely; {own} 1', lower_bound=1e-6
    )


def load_model(*, generates: bool = True, mesh: Mesh | None = None) -> LoadedModel:
    """Load the model of `--model`; given flags override its text format.

    Args:
      generates: the script generates text, so the model needs a language tower.
      mesh: devices that the model is split over; None: one device.

    Raises:
      UnsupportedModelError: it has none.
    """
    # Imported here, because transformers' processors take seconds to import. An error in the image or the question is
    # reported before that.
    from sparselora_jax.data import processing

    values = flags.FLAGS
    if values.model == embedded.NAME:
        model, params = load.load_model(embedded.NAME, dtype=values.dtype, mesh=mesh)
        processor = embedded.load_processor(model.cfg)
        text = text_format.TextFormat()
    else:
        model, params = load.load_model(values.model, dtype=values.dtype, mesh=mesh, family=values.family)
        if generates:
            check_language(model.cfg)
        processor = processing.load_processor(model.source, model.family.processor)
        text = text_format.load(model.source, processor.spec.text)
    if values.prompt is not None:
        text = replace(text, prompt=values.prompt)
    if values.prompt_tokens is not None:
        text = replace(text, prompt_tokens=values.prompt_tokens)
    given = {name: values[name].value for name in DECODING if values[name].value is not None}
    return LoadedModel(model, params, processor, replace(text, decoding=DECODING | text.decoding | given))


def check_memory(loaded: LoadedModel, rows: int) -> None:
    """Check that the search for answers fits into memory.

    Args:
      loaded: the model.
      rows: number of questions that are answered at a time.

    Raises:
      OutOfMemoryError: it does not; names both numbers, and the flags to change.
    """
    # Imported here, because other scripts do not need it.
    from sparselora_jax.planning import memory
    from sparselora_jax.runtime import machine

    decoding = loaded.text.decoding
    mesh = sharding.mesh_of(loaded.params)
    split = 1 if mesh is None else mesh.shape['data']  # decoding splits rows along data alone
    parts = memory.search(
        loaded.model.cfg,
        loaded.params,
        # Rows that cannot be split evenly are all read by every device.
        memory.prompts_like(loaded.model.cfg, loaded.text, rows if rows % split else rows // split),
        beams=decoding['num_beams'],
        new_tokens=decoding['max_new_tokens'],
    )
    # Of weights that are split, each device holds a share.
    weights = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(loaded.params))
    needed = sum(parts.values()) + weights
    available = machine.device_memory(1 if mesh is None else mesh.size)
    if needed > available:
        raise OutOfMemoryError(
            f'answering takes at least {needed / 2**30:,.1f} GiB of memory, and a device has '
            f'{available / 2**30:,.1f} GiB; lower --num_beams, --max_new_tokens or --batch'
        )


def print_header(*details: str) -> None:
    """Print a line about the run on stderr, in the first process: version, device, dtype, model.

    Args:
      details: further things to say.
    """
    if not processes.first():
        return
    values = flags.FLAGS
    device = jax.devices()[0]
    parts = [f'sparselora-jax {sparselora_jax.__version__}', f'device {device.device_kind}', values.dtype]
    # stdout is reserved for the result.
    print(', '.join([*parts, f'model {values.model}', *details]), file=sys.stderr)


def find_model(argv: Sequence[str], config: ConfigDict | None) -> ModelConfig:
    """Return the model that the arguments name, otherwise that of the recipe, without reading weights.

    Args:
      argv: positional arguments: a model, or nothing.
      config: the recipe; None: no recipe.

    Raises:
      ConfigError: no model.
      StorageError, UnsupportedModelError: see `published.find_config`.
    """
    if not argv and config is None:
        script = Path(sys.argv[0]).name
        raise ConfigError(f'expected a model: python launch/{script} MODEL [--config=configs/NAME.py:ARGUMENT]')
    name = argv[0] if argv else config.model
    if name == embedded.NAME:
        return ModelConfig(name, None, embedded.load_config())
    family = '' if config is None else config.family
    hf = published.find_config(name, others=files.recipes(), family=family)
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
    name = f'{cfg.family.name}_lang_only'
    return files.read(name) if name in files.recipes() else None


def no_recipe(cfg: FamilyConfig) -> str:
    """Return that a model's family has no recipe, and what to do.

    Args:
      cfg: our config of the model.
    """
    family = 'a language model alone' if set(cfg.family.tower_names) == {'language'} else f'{cfg.family.name} models'
    return f'no recipe for {family}; pass one with --config=...'


def run(main: Callable[[list[str]], None], positional: str = '') -> NoReturn:
    """Run a script; print an error that the user can act on as one line, not as a traceback.

    Args:
      main: takes the positional arguments.
      positional: names of the positional arguments, e.g. `IMAGE QUESTION`; '': there are none.
    """
    # From here on there may be something to save, so Ctrl-C is an exception again.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # The data libraries log every file that they open.
    absl_logging.set_verbosity(absl_logging.ERROR)
    logging.getLogger('sparselora_jax').setLevel(logging.WARNING)
    # A scheduler's SIGTERM ends a run like Ctrl-C: finished stages are kept.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    has_begun = False
    try:
        _answer_questions(sys.argv[1:], main.__globals__['__doc__'], positional)
        arguments = _parse(positional)
        _connect()
        _warn_of_hardware()
        # If another process is lost, the error says so.
        has_begun = True
        with processes.joint():
            main(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        _leave_unread(stops_job=has_begun and _leaves_stages())
    except (SparseloraError, OSError) as error:
        _fail(error)
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and 'RESOURCE_EXHAUSTED' not in str(error):
            raise  # a fault of the program, whose traceback is needed
        first_line = str(error).splitlines()[0] if str(error) else 'MemoryError'
        _fail(OutOfMemoryError(f'out of memory ({first_line}); use smaller batches, fewer samples or fewer beams'))
    except KeyboardInterrupt:
        _fail(Interrupted(KEPT if _leaves_stages() else 'by a signal'))
    sys.exit(0)


def _leaves_stages() -> bool:
    """Return whether the script runs a job, whose finished stages stay in its workdir."""
    return 'workdir' in flags.FLAGS and not ('dry_run' in flags.FLAGS and flags.FLAGS['dry_run'].value)


def _leave_unread(*, stops_job: bool) -> NoReturn:
    """End the script because the program that read its output has ended, as `head` does.

    Args:
      stops_job: a job ends here, and the user must know that it has work left. A list may end without a word.
    """
    # Python would write the rest at its end, and complain that it cannot.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if stops_job:
        _fail(Interrupted(f'the program that read the output has ended; {KEPT}'))
    sys.exit(128 + signal.SIGPIPE)  # as the shell says it of programs that the signal ends


class OutOfMemoryError(SparseloraError, MemoryError):
    """The machine or a device has less memory than a script asks for."""


def _answer_questions(argv: Sequence[str], description: str, positional: str) -> None:
    """End the script after printing what `--help`, `--help_config` or `--version` asks for."""
    if '--version' in argv:
        print(f'sparselora-jax {sparselora_jax.__version__} (jax {jax.__version__})')
    elif '--help_config' in argv and 'config' in flags.FLAGS:
        print(recipe.fields_text())
    elif {'--help', '-h', '-help'} & set(argv):
        print(help_text(description, positional))
    else:
        return
    # While a closed pipe can still be caught.
    sys.stdout.flush()
    sys.exit(0)


def help_text(description: str, positional: str) -> str:
    """Return the page of `--help`: the script's docstring, and its own flags with their defaults.

    Args:
      description: docstring of the script.
      positional: see `run`.
    """
    usage = f'usage: python launch/{Path(sys.argv[0]).name} {positional}'.rstrip() + ' [--flag=value ...]'
    by_module = flags.FLAGS.flags_by_module_dict()
    # Libraries define flags too; only those of the script and of this file are of use here.
    own = [flag for module in (__name__, sys.argv[0]) for flag in by_module.get(module, [])]
    lines = [description.strip(), '', usage, '', 'flags:']
    if 'config' in flags.FLAGS:
        lines += [f'  --config=FILE: {CONFIG_HELP}', '  --config.NAME=VALUE: set a field of the config']
        lines.append('  --help_config: list every field of a recipe with its meaning and its legal values')
    lines += [_flag_text(flag) for flag in own if flag.name.partition('.')[0] != 'config']
    return '\n'.join([*lines, '  --version: print the version', '  --help: print this page'])


def _flag_text(flag: flags.Flag) -> str:
    """Return the line of a flag in the help: its name, its values, its meaning and its default."""
    if flag.boolean:
        return f'  --[no]{flag.name}: {flag.help} (default: {flag.default})'
    values = getattr(flag.parser, 'enum_values', None)
    shown = '|'.join(values) if values else flag.flag_type().upper()
    # The help of a flag without a fixed default says what is used instead.
    default = '' if flag.default in (None, '') else f' (default: {flag.default})'
    meaning = flag.help.removeprefix(f'<{shown}>: ')  # absl adds the values of an enum
    return f'  --{flag.name}={shown}: {meaning}{default}'


def _parse(positional: str) -> list[str]:
    """Parse the flags, and return the positional arguments.

    Raises:
      UsageError: a flag is unknown or has an illegal value, or there are too many arguments.
    """
    others = sys.argv[1:]
    _refuse_bytes(others)
    _refuse_foreign(others)
    # `define_recipe` has read `--config` itself. A script that does not call it has no such flag.
    if 'config' in flags.FLAGS:
        _, others = split_config(others)
    try:
        _, *arguments = flags.FLAGS([sys.argv[0], *others])
    except (flags.Error, ValueError) as error:
        # absl raises a ValueError for a value of `--noFLAG`.
        raise UsageError(_without_number(error)) from None
    _refuse_infinite()
    if 'workdir' in flags.FLAGS and not flags.FLAGS.workdir.strip():
        raise UsageError("--workdir is empty: expected a folder; '.' is the current one")
    expected = positional.split()
    if len(arguments) <= len(expected):
        return arguments
    unknown = arguments[len(expected)]
    script = Path(sys.argv[0]).name
    hint = f'see python launch/{script} --help'
    if 'config' in flags.FLAGS and unknown.partition(':')[0].endswith(('.py', '.json', '.yaml', '.yml')):
        hint = f'did you mean --config={unknown}?'
    elif unknown.partition('=')[0] in flags.FLAGS:
        hint = f'did you mean --{unknown}?'
    raise UsageError(f'unknown argument {unknown!r}: {hint}')


def _refuse_foreign(arguments: Sequence[str]) -> None:
    """Check that no argument is a flag of a library, such as absl's `--flagfile`, which no help page lists.

    Raises:
      UsageError: an argument is one.
    """
    by_module = flags.FLAGS.flags_by_module_dict()
    own = {flag.name for module in (__name__, sys.argv[0]) for flag in by_module.get(module, [])}
    for argument in arguments:
        match = re.match(r'--?(?:no)?([a-z_]+)(?:=|$)', argument)
        # absl itself refuses a name that no flag has, and names the nearest one.
        if match and (match[1] in ABSL_FLAGS or match[1] in flags.FLAGS) and match[1] not in own | {'config'}:
            script = Path(sys.argv[0]).name
            raise UsageError(f'unknown flag --{match[1]}: see python launch/{script} --help')


def _refuse_bytes(arguments: Sequence[str]) -> None:
    """Check that all arguments are text, since they are written into logs, reports and model cards.

    Raises:
      UsageError: an argument has bytes that are no UTF-8, which Python replaces by surrogates.
    """
    for argument in arguments:
        if not argument.isascii() and any('\ud800' <= character <= '\udfff' for character in argument):
            raise UsageError(f'{argument!a}: expected text in UTF-8; rename the file or folder')


def _refuse_infinite() -> None:
    """Check the flags that are numbers.

    Raises:
      UsageError: one is infinite or not a number, which absl accepts.
    """
    for module in (__name__, sys.argv[0]):
        for flag in flags.FLAGS.flags_by_module_dict().get(module, []):
            if isinstance(flag.value, float) and not math.isfinite(flag.value):
                raise UsageError(f'--{flag.name}={flag.value}: expected a finite number')


class UsageError(SparseloraError, ValueError):
    """A flag or an argument that a script does not take."""


def _connect() -> None:
    """Connect to the other processes if the flags say that there are any.

    Raises:
      UsageError: the flags contradict each other.
      ProcessError: see `processes.connect`.
    """
    # Not every script defines these flags.
    if 'distributed' not in flags.FLAGS:
        return
    values = flags.FLAGS
    address = values.coordinator
    if address is None:
        for flag in ('num_processes', 'process_id'):
            if values[flag].value is not None:
                raise UsageError(f'--{flag} needs --coordinator=HOST:PORT, the address of process 0')
    elif not re.fullmatch(r'\S+:\d{1,5}', address) or not 0 < int(address.rpartition(':')[2]) < 2**16:
        raise UsageError(f'--coordinator={address}: expected HOST:PORT, e.g. 10.0.0.2:1234')
    if None not in (values.num_processes, values.process_id) and values.process_id >= values.num_processes:
        raise UsageError(f'--process_id={values.process_id}: expected less than --num_processes={values.num_processes}')
    if values.distributed or address:
        processes.connect(address, values.num_processes, values.process_id)


def _warn_of_hardware() -> None:
    """Print a line if the recipe is for other hardware than this machine has."""
    # Only scripts that compute have this flag; others describe hardware that is elsewhere.
    if 'distributed' not in flags.FLAGS:
        return
    name, _ = split_config(sys.argv[1:], '')
    asked = re.search(r'[:,]hardware=([^,]+)', name)
    if asked and asked[1] != 'cpu' and jax.default_backend() == 'cpu':
        print(f'note: hardware={asked[1]}, but JAX finds only a CPU here; its preset is hardware=cpu', file=sys.stderr)


def _fail(error: Exception) -> NoReturn:
    """Print one line and end with code 1, or with 130 (the shell's code for Ctrl-C) after an interruption."""
    interrupted = isinstance(error, Interrupted)
    # After an error, JAX would wait for the other processes, which wait for this one. An interruption reaches all of
    # them, so they end too.
    if jax.distributed.is_initialized() and not interrupted:
        processes.leave(error)
    text = _with_option(error) if isinstance(error, OSError) else ' '.join(str(error).split())
    print(f'{"stopped" if interrupted else "error"}: {text}', file=sys.stderr)
    sys.exit(130 if interrupted else 1)


def _with_option(error: OSError) -> str:
    """Return the text of an operating system's error, with the option that named its path."""
    text = os_errors.describe(error)
    paths = [path for path in (error.filename, error.filename2) if isinstance(path, str | Path)]
    options = {f'--{name}': name for name in ('workdir', 'model', 'data', 'data_dir') if name in flags.FLAGS}
    values = {option: flags.FLAGS[name].value for option, name in options.items()}
    if 'config' in flags.FLAGS and isinstance(flags.FLAGS['config'].value, ConfigDict):
        config = flags.FLAGS['config'].value
        values |= {f'--config.{name}': config.get(name) for name in ('model', 'data', 'data_dir')}
    for option, value in values.items():
        if isinstance(value, str) and any(Path(path).is_relative_to(value) for path in paths):
            return f'{option}={value}: {text}'
    return text
