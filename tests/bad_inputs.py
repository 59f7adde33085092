"""Inputs that no script can use, and what each does to a small workspace: `model/`, `data/`, `run/` and `recipe.json`.

`model/` is a tiny BLIP-2 directory, `data/` a folder of twelve questions, and `run/` a finished run of `recipe.json` on
them. A case changes them, then runs a script in the workspace. `tests/test_bad_inputs.py` runs all cases.
"""

import io
import itertools
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from PIL import Image
from safetensors.numpy import load_file, save_file

from configs import demo_pretrain
from sparselora_jax.jobs import names
from sparselora_jax.recipe import FIELDS, field_names, value_of
from sparselora_jax.recipe.fields import Field
from sparselora_jax.runtime import digests

RECIPE = '--config=recipe.json'
OUT = '--workdir=out'
QUESTION = 'is it red?'


class Case(NamedTuple):
    """One bad input.

    Attributes:
      kind: what is bad: a field, a flag, a model directory, ...
      name: what is bad about it; unique with the kind and the script.
      script: file in launch/.
      arguments: command line.
      change: changes the workspace before the script runs.
      is_late: the input is only read when a stage has begun, so the workdir may be claimed.
    """

    kind: str
    name: str
    script: str
    arguments: tuple[str, ...]
    change: Callable[[Path], Any] = lambda folder: None
    is_late: bool = False

    @property
    def id(self) -> str:
        """Return the name of the test."""
        return f'{self.kind}-{self.script.removesuffix(".py")}-{self.name}'

    @property
    def reads_run(self) -> bool:
        """Return whether the finished run is part of the workspace, which takes most of the time to copy."""
        return any('run' in argument for argument in self.arguments)


# Changes of the workspace.


def write(name: str, content: str | bytes) -> Callable[[Path], None]:
    """Return a change that replaces a file."""

    def change(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def remove(name: str) -> Callable[[Path], None]:
    """Return a change that removes a file or a folder."""

    def change(folder: Path) -> None:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()

    return change


def cut(name: str) -> Callable[[Path], None]:
    """Return a change that leaves the first half of a file."""

    def change(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    return change


def empty(name: str) -> Callable[[Path], None]:
    """Return a change that leaves an empty file."""
    return write(name, '')


def both(first: Callable[[Path], Any], second: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Return one change after another."""

    def change(folder: Path) -> None:
        first(folder)
        second(folder)

    return change


def flip(name: str) -> Callable[[Path], None]:
    """Return a change of one bit near the end of a file."""

    def change(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[-7] ^= 1
        (folder / name).write_bytes(data)

    return change


def of_another_run(name: str) -> Callable[[Path], None]:
    """Return a change of a stamped JSON file into that of another run."""

    def change(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        del values[digests.STAMP]
        (folder / name).write_text(digests.stamp(values, 'another run'))

    return change


def same_size_image(name: str) -> Callable[[Path], None]:
    """Return a change of one image into another of the same size and time."""

    def change(folder: Path) -> None:
        file = folder / name
        status = file.stat()
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))

    return change


def make_folder(name: str) -> Callable[[Path], None]:
    """Return a change that puts an empty folder in the place of a file or a folder."""

    def change(folder: Path) -> None:
        if (folder / name).exists():
            remove(name)(folder)
        (folder / name).mkdir()

    return change


def pipe(name: str) -> Callable[[Path], None]:
    """Return a change that puts a named pipe, which nobody writes to, in the place of a file."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


def circle(name: str) -> Callable[[Path], None]:
    """Return a change that puts a symbolic link to itself in the place of a file or a folder."""

    def change(folder: Path) -> None:
        if (folder / name).exists():
            remove(name)(folder)
        (folder / name).symlink_to(Path(name).name)

    return change


def fields(name: str, **values: Any) -> Callable[[Path], None]:
    """Return a change of fields of a JSON file; a value of `...` removes the field, and a dict changes its fields."""

    def update(old: dict, new: dict) -> None:
        for key, value in new.items():
            if value is ...:
                old.pop(key)
            elif isinstance(value, dict) and isinstance(old.get(key), dict):
                update(old[key], value)
            else:
                old[key] = value

    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        update(content, values)
        (folder / name).write_text(json.dumps(content))

    return change


def tensors(alter: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    """Return a change of the weights of the model."""

    def change(folder: Path) -> None:
        file = folder / 'model/model.safetensors'
        weights = load_file(file)
        alter(weights)
        save_file(weights, file, {'format': 'pt'})

    return change


def lines(alter: Callable[[list[str]], list[str]]) -> Callable[[Path], None]:
    """Return a change of the lines of the data."""

    def change(folder: Path) -> None:
        file = folder / 'data/data.jsonl'
        file.write_text('\n'.join(alter(file.read_text().splitlines())), errors='surrogatepass')

    return change


def each_line(**values: Any) -> Callable[[Path], None]:
    """Return a change of fields of every line of the data."""
    return lines(lambda old: [json.dumps(json.loads(line) | values) for line in old])


# Fields of a recipe: all of them, from their table.

# Values on a command line, by the type of the field, that no field of this type may take.
WRONG_WORDS = {
    int: ('-1', 'nan', '1.5', 'many', '', '2147483648', '1e400', 'None'),
    float: ('nan', 'inf', '-inf', 'many', '', '1e39', '1e-60', 'None'),
    bool: ('maybe', '2', ''),
    str: (),
    tuple: ('many', '(nan,)', '(-1,1,1)', '(1', "('a',)"),
}
# Values that some fields of a type may take; a case for each field whose rule refuses it.
DOUBTFUL_WORDS = {
    int: ('0',),
    float: ('-1.0', '0.0', '2.0'),
    bool: (),
    str: ('', ' ', 'no_such'),
    tuple: (),
}
# Values of JSON that no field of a type may take.
WRONG_VALUES = {
    int: (None, 'many', 1.5, True, [1], {'a': 1}, 10**30, float('nan')),
    float: (None, 'many', True, [1.0], {'a': 1}, 10**400, float('nan'), float('inf')),
    bool: (None, 'yes', 1, [True], {'a': 1}),
    str: (None, True, ['a'], {'a': 1}, 'a\0b', '\ud800'),
    tuple: (None, 'many', 3, True, {'a': 1}, ['a'], [float('nan')], [-1]),
}
# Texts that are checked by what they name.
WRONG_TEXTS = {
    'model': ('no/such/directory', 'data', 'recipe.json'),
    'family': ('no_such_module:FAMILY', 'json:loads', 'llava'),
    'data': (
        'no/such/folder',
        'model',
        'recipe.json',
        'no_such_module:Name',
        'json:loads',
        'data,no/such',
        'data::no',
        'data,,data',
    ),
    'prune.data': ('no/such/folder', 'model', 'recipe.json', 'no_such_module:Name', 'json:loads'),
    'prune.order': ('last',),
    'mixture.captions': ('suffix',),
    'mixture.weights': ('(1,)', '(1,2)'),
    'data_dir': (),
    'text.prompt': ('no braces', '{} {}', r'<image>\n{}'),
    'prune.method': ('wandas', 'no_such_module:Name', 'json:loads', 'json:no_such'),
    'prune.pattern': ('half', '5:4', '0:4', '1.5', '-0.5', '2:4:8', '2:7'),
    'prune.group': ('row',),
    'prune.allocation': ('even', 'no_such_module:Name', 'json:loads'),
    'prune.initial': ('dsnot', 'wandas'),
    'lora.targets': ('(', 'no_such_kernel'),
    'restore.base': ('int3', 'no_such_module:Name', 'json:loads'),
    'evaluate.metric': ('bleu', 'no_such_module:Name', 'json:no_such'),
    # Without a folder of files, a name of a benchmark is wrong too.
    'evaluate.tasks': ('gqa', 'gqaa', 'no_such_module:Name', 'json:loads', ','),
    'evaluate.data_root': (),
}


def each_default(field: Field) -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and the default of a field, for one of its towers if it has a value for each."""
    if field.is_by_tower:
        yield f'{field.name}.language', field.default['language']
    else:
        yield field.name, field.default


def converted(word: str, default: Any) -> Any:
    """Return a word of a command line in the type of a field's default."""
    return word if isinstance(default, str) else type(default)(word)


SCRIPTS_OF_RECIPES = ('train.py', 'prune.py', 'export.py', 'inspect.py', 'compile.py')


def recipe_command(script: str, config: str, *others: str) -> tuple[str, ...]:
    """Return the arguments of a script that takes a recipe."""
    return (config, *others) if script == 'inspect.py' else (config, OUT, *others)


def field_words() -> Iterator[Case]:
    """Yield overridden fields."""
    scripts = itertools.cycle(SCRIPTS_OF_RECIPES)
    for field in FIELDS:
        for name, default in each_default(field):
            words = [*WRONG_WORDS[type(default)]]
            words += [
                word for word in DOUBTFUL_WORDS[type(default)] if not field.legal.accepts(converted(word, default))
            ]
            for word in words:
                script = next(scripts)
                yield Case('field', f'{name}={word}', script, recipe_command(script, RECIPE, f'--config.{name}={word}'))
            # Shape checks need the model, which `compile.py` reads from its own argument.
            for word in WRONG_TEXTS.get(field.name, ()):
                for script in ('train.py', 'prune.py'):
                    yield Case('field', f'{name}={word}', script, (RECIPE, OUT, f'--config.{name}={word}'))


def nested(name: str, value: Any) -> dict[str, Any]:
    """Return a value below nested groups, by its dotted name."""
    for part in reversed(name.split('.')):
        value = {part: value}
    return value


def field_values() -> Iterator[Case]:
    """Yield fields of a JSON file."""
    scripts = itertools.cycle(SCRIPTS_OF_RECIPES)
    for field in FIELDS:
        for name, default in each_default(field):
            values = [(name, value) for value in WRONG_VALUES[type(default)]]
            if field.is_by_tower:
                values += [(field.name, value) for value in (None, 3, 'a', [], {}, {'ears': default})]
            for changed, value in values:
                script = next(scripts)
                shown = repr(value)[:20]
                change = fields('recipe.json', **nested(changed, value))
                # Merging would keep the fields of the dict that is replaced.
                if isinstance(value, dict):
                    change = replace_field('recipe.json', changed, value)
                yield Case('json-field', f'{changed}={shown}', script, recipe_command(script, RECIPE), change)


def replace_field(file: str, name: str, value: Any) -> Callable[[Path], None]:
    """Return a change that replaces one field of a JSON file, whatever it held."""

    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        part = content
        *parents, last = name.split('.')
        for parent in parents:
            part = part[parent]
        part[last] = value
        (folder / file).write_text(json.dumps(content))

    return change


def combinations() -> Iterator[Case]:
    """Yield fields that are legal alone and not together, or not with this model, these data or this machine."""
    for words in (
        'mesh.data=64',
        'mesh.tensor=3',
        'mesh.fsdp=3',
        'restore.accumulate=3',
        'restore.shares=(2,1,1)',
        'restore.top_k=328',
        'restore.trained=weights restore.base=packed restore.teacher=model',
        'restore.trained=weights prune.pattern.language=2:4 lora.dropout=0.1',
        'restore.trained=weights restore.control=True prune.pattern.language=dense prune.pattern.vision=dense',
        'text.answer_tokens=99',
        'text.prompt_tokens=1',
        'text.prompt_tokens=100000',
        'prune.samples=0',
        'prune.pattern.language=2:7',
        # The recipe allocates by OWL, which needs unstructured patterns.
        'prune.pattern.language=2:4',
        'prune.pattern.language=2:4 prune.pattern.vision=2:4 prune.block=3 prune.allocation=uniform',
        'prune.method=dsnot prune.initial=dsnot',
        'lora.rank.language=100000',
        'lora.rank.language=0 lora.rank.vision=0 lora.rank.qformer=0',
        'lora.targets.language=attn/z/.* ',
        'evaluate.num_beams=100000',
        'evaluate.max_new_tokens=100000',
        'evaluate.max_new_tokens=1',
        'prune.samples=100000000 prune.chunk=100000000',
        'restore.batch=100000000',
        'evaluate.batch=100000000',
        'restore.teacher=top_k restore.steps=2000000000',
        'model=embedded stream=True',
    ):
        overrides = [f'--config.{word}' for word in words.split()]
        yield Case('together', words, 'train.py', (RECIPE, OUT, *overrides))
    for word in ('restore.stepz=3', 'lora.rank.ears=3', 'restore=3', 'prune.pattern=2:4', 'restore.steps.x=3', '=3'):
        for script in SCRIPTS_OF_RECIPES:
            yield Case('unknown-field', word, script, recipe_command(script, RECIPE, f'--config.{word}'))


# Files of configs.

BASE = 'from configs.base import base_config\n'
CONFIG_FILES = {
    'syntax.py': 'def get_config(',
    'encoding.py': b'\xff\xfe',
    'null.py': b'x = 3\0',
    'none.py': 'def get_config(arg=None): return None',
    'dict.py': 'def get_config(arg=None): return {"seed": 3}',
    'divides.py': 'def get_config(arg=None):\n  return 1 / 0',
    'opens.py': 'def get_config(arg=None): open("absent.txt")',
    'exits.py': 'raise SystemExit(0)',
    'exits_inside.py': 'import sys\ndef get_config(arg=None): sys.exit()',
    'imports.py': 'import no_such_module',
    'recurses.py': 'def get_config(arg=None): return get_config()',
    'empty.py': '',
    'number.py': 'get_config = 3',
    'arguments.py': f'{BASE}def get_config(a, b): return base_config()',
    'unknown.py': f'{BASE}def get_config():\n  c = base_config()\n  c.restore.step = 3\n  return c',
    'missing.py': f'{BASE}def get_config():\n  c = base_config()\n  del c.restore.clip\n  return c',
    'no_group.py': f'{BASE}def get_config():\n  c = base_config()\n  del c.restore\n  return c',
    'wrong_type.py': f'{BASE}def get_config():\n  c = base_config()\n  c.seed = "x"\n  return c',
    'object.py': f'{BASE}def get_config():\n  c = base_config()\n  c.restore.extra = object()\n  return c',
    'empty_dict.py': 'from ml_collections import ConfigDict\ndef get_config(): return ConfigDict()',
    'cut.json': '{"seed": 3',
    'empty.json': '',
    'list.json': '[1]',
    'null.json': 'null',
    'deep.json': '[' * 100_000,
    'nan.json': '{"restore": {"peak": NaN}}',
    'unknown.json': '{"restore": {"stepz": 3}}',
    'dotted.json': '{"restore.steps": 3}',
    'latin.json': b'{"data": "\xe9"}',
    'twice.json': '{"restore": 3, "restore": {"steps": 0}}',
    'long_number.json': f'{{"seed": {"9" * 5000}}}',
    'cut.yaml': 'restore: [1',
    'code.yaml': '!!python/object/apply:os.system ["true"]',
    'circle.yaml': 'a: &a {b: *a}',
    'number.yaml': '3: 4',
    'two.yaml': 'seed: 3\n---\nseed: 4',
    'tab.yaml': 'restore:\n\tsteps: 3',
    'date.yaml': 'seed: 2024-01-01',
    'bytes.yaml': b'\xff\xfe\x00',
    'text.txt': 'seed: 3',
    'nothing': 'seed: 3',
}


def config_files() -> Iterator[Case]:
    """Yield files that define no recipe, with and without an overridden field."""
    scripts = itertools.cycle(('train.py', 'prune.py', 'export.py', 'inspect.py', 'compile.py'))
    for name, content in CONFIG_FILES.items():
        script = next(scripts)
        yield Case('config', name, script, recipe_command(script, f'--config={name}'), write(name, content))
    for script in ('sweep.py', 'pretrain.py'):
        for name in ('syntax.py', 'none.py', 'exits.py', 'empty_dict.py', 'cut.json', 'circle.yaml', 'bytes.yaml'):
            change = write(name, CONFIG_FILES[name])
            yield Case('config', name, script, (f'--config={name}', OUT), change)
        yield Case('config', 'a recipe', script, (RECIPE, OUT))
    for script in SCRIPTS_OF_RECIPES:
        for config in (
            'absent.py',
            'absent.json',
            'data',
            'configs/blip2_both.pyy',
            'configs/blip2_both.py:mode=model',
            'configs/blip2_both.py:',
            'configs/blip2_both.py:hardware=abacus',
            'configs/sweeps/steps.py',
            'configs/demo_pretrain.py',
            'recipe.json:model=model',
            '',
            ' ',
            '/dev/null',
            'a\udcffb.py',
        ):
            yield Case('config', config or 'empty', script, recipe_command(script, f'--config={config}'))
    yield Case('config', 'pipe', 'train.py', ('--config=pipe.py', OUT), pipe('pipe.py'))
    yield Case('config', 'circle', 'train.py', ('--config=circle.py', OUT), circle('circle.py'))
    yield Case('config', 'folder', 'train.py', ('--config=folder.json', OUT), make_folder('folder.json'))


# Model directories.

SCRIPTS_OF_MODELS = {
    'train.py': (RECIPE, OUT),
    'prune.py': (RECIPE, OUT),
    'evaluate.py': ('--model=model', '--data=data', '--questions=2', '--batch=2'),
    'generate.py': ('data/0.png', QUESTION, '--model=model'),
    'inspect.py': ('model', RECIPE),
    'compile.py': ('model', RECIPE, OUT),
}
ADAPTER = '{"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}'
KEY = 'language_model.model.decoder.layers.0.fc1.weight'

# What every script that takes a model must notice: its config and the list of its weights.
BAD_MODELS = {
    'missing': remove('model'),
    'empty': make_folder('model'),
    'a file': lambda folder: (remove('model')(folder), write('model', 'x')(folder)),
    'a circle of links': circle('model'),
    'no config': remove('model/config.json'),
    'config cut': cut('model/config.json'),
    'config empty': write('model/config.json', ''),
    'config a list': write('model/config.json', '[]'),
    'config a number': write('model/config.json', '3'),
    'config deep': write('model/config.json', '[' * 100_000),
    'config not text': write('model/config.json', b'\xff\xfe\x00'),
    'config a folder': make_folder('model/config.json'),
    'config a pipe': pipe('model/config.json'),
    'config without type': fields('model/config.json', model_type=...),
    'config of no family': fields('model/config.json', model_type='bert'),
    'config of an unknown type': fields('model/config.json', model_type='no-such'),
    'config with a number as type': fields('model/config.json', model_type=3),
    'config of remote code': fields('model/config.json', model_type='mine', auto_map={'AutoConfig': 'mine.Config'}),
    'wrong family': lambda folder: (remove('model')(folder), (folder / 'llava').rename(folder / 'model')),
    'model type of another family': fields('model/config.json', model_type='llava'),
    'image size a list': fields('model/config.json', vision_config={'image_size': [28, 28]}),
    'no text config': fields('model/config.json', text_config=None, vision_config=None),
    'text config a list': fields('model/config.json', text_config=[]),
    'vision config a text': fields('model/config.json', vision_config='x'),
    'width a text': fields('model/config.json', text_config={'hidden_size': 'x'}),
    'width zero': fields('model/config.json', text_config={'hidden_size': 0}),
    'width negative': fields('model/config.json', text_config={'hidden_size': -32}),
    'width null': fields('model/config.json', text_config={'hidden_size': None}),
    'width another': fields('model/config.json', text_config={'hidden_size': 48}),
    'width fractional': fields('model/config.json', text_config={'hidden_size': 32.5}),
    'heads zero': fields('model/config.json', text_config={'num_attention_heads': 0}),
    'heads that do not divide': fields('model/config.json', text_config={'num_attention_heads': 5}),
    'layers negative': fields('model/config.json', text_config={'num_hidden_layers': -1}),
    'layers zero': fields('model/config.json', text_config={'num_hidden_layers': 0}),
    'layers many': fields('model/config.json', text_config={'num_hidden_layers': 3}),
    'layers a billion': fields('model/config.json', text_config={'num_hidden_layers': 10**9}),
    'vocabulary zero': fields('model/config.json', text_config={'vocab_size': 0}),
    'vocabulary huge': fields('model/config.json', text_config={'vocab_size': 10**12}),
    'patch zero': fields('model/config.json', vision_config={'patch_size': 0}),
    'patch that does not divide': fields('model/config.json', vision_config={'patch_size': 9}),
    'image huge': fields('model/config.json', vision_config={'image_size': 10**6}),
    'activation unknown': fields('model/config.json', text_config={'activation_function': 'no_such'}),
    'queries zero': fields('model/config.json', num_query_tokens=0),
    'no weights': remove('model/model.safetensors'),
    'weights cut': cut('model/model.safetensors'),
    'weights empty': write('model/model.safetensors', ''),
    'weights no safetensors': write('model/model.safetensors', 'x' * 1000),
    'weights with a huge header': write('model/model.safetensors', b'\xff' * 8 + b'{}'),
    'weights a folder': make_folder('model/model.safetensors'),
    'weights a pipe': pipe('model/model.safetensors'),
    'weights pickled': lambda folder: (folder / 'model/model.safetensors').rename(folder / 'model/pytorch_model.bin'),
    'tensor missing': tensors(lambda weights: weights.pop(KEY)),
    'tensor of another shape': tensors(lambda weights: weights.update({KEY: weights[KEY][:, :7].copy()})),
    'tensor of integers': tensors(lambda weights: weights.update({KEY: weights[KEY].astype(np.int32)})),
    'tensor transposed': tensors(lambda weights: weights.update({KEY: weights[KEY].T.copy()})),
    'no tensors': tensors(dict.clear),
    'index without shards': lambda folder: (
        remove('model/model.safetensors')(folder),
        write('model/model.safetensors.index.json', json.dumps({'weight_map': {KEY: 'model-1.safetensors'}}))(folder),
    ),
    'index out of the folder': lambda folder: (
        (folder / 'model/model.safetensors').rename(folder / 'other.safetensors'),
        write('model/model.safetensors.index.json', json.dumps({'weight_map': {KEY: '../other.safetensors'}}))(folder),
    ),
    'index damaged': lambda folder: (
        remove('model/model.safetensors')(folder),
        write('model/model.safetensors.index.json', '{')(folder),
    ),
    'index without map': lambda folder: (
        remove('model/model.safetensors')(folder),
        write('model/model.safetensors.index.json', '{"weight_map": [1]}')(folder),
    ),
    'adapter beside': lambda folder: (
        write('model/adapter_config.json', ADAPTER)(folder),
        write('model/adapter_model.safetensors', 'x')(folder),
    ),
    'quantised': fields('model/config.json', quantization_config={'quant_method': 'gptq', 'bits': 4}),
}
# Of these, `inspect.py` and `compile.py` describe the shapes, which only a reader of weights can refuse.
WITHOUT_WEIGHTS = {'no weights', 'weights pickled', 'index without shards', 'index damaged', 'index without map'}
WITHOUT_WEIGHTS |= {'index out of the folder'}
# Only the values of the weights, the texts and the settings of decoding show these.
BAD_CONTENTS = {
    'weights with NaN': tensors(lambda weights: weights[KEY].fill(np.nan)),
    'weights with infinity': tensors(lambda weights: weights[KEY].fill(np.inf)),
    'no tokenizer': remove('model/tokenizer.json'),
    'tokenizer cut': cut('model/tokenizer.json'),
    'tokenizer a list': write('model/tokenizer.json', '[]'),
    'tokenizer not text': write('model/tokenizer.json', b'\xff\xfe\x00'),
    'tokenizer config cut': cut('model/tokenizer_config.json'),
    'no processor': remove('model/processor_config.json'),
    'processor cut': cut('model/processor_config.json'),
    'processor a list': write('model/processor_config.json', '[]'),
    'image size zero': fields('model/processor_config.json', image_processor={'size': {'height': 0, 'width': 0}}),
    'image size a text': fields('model/processor_config.json', image_processor={'size': {'height': 'x', 'width': 'x'}}),
    'image size another': fields('model/processor_config.json', image_processor={'size': {'height': 42, 'width': 42}}),
}
# BLIP-2's language model does not read generation_config.json.
BAD_GENERATION = {
    'generation config cut': cut('llava/generation_config.json'),
    'generation config a list': write('llava/generation_config.json', '[]'),
    'generation option unknown here': fields('llava/generation_config.json', repetition_penalty=2.0),
    'generation eos a text': fields('llava/generation_config.json', eos_token_id='x'),
    'generation eos a fraction': fields('llava/generation_config.json', eos_token_id=1.5),
}
BAD_TEXT_FORMATS = {
    'cut': '{"prompt": "{}"',
    'a list': '[]',
    'an unknown field': '{"template": "Question: {}"}',
    'a prompt without braces': '{"prompt": "x", "prompt_tokens": 40, "answer_tokens": 8, "decoding": {}}',
    'tokens a text': '{"prompt": "{}", "prompt_tokens": "x", "answer_tokens": 8, "decoding": {}}',
    'tokens negative': '{"prompt": "{}", "prompt_tokens": -4, "answer_tokens": 8, "decoding": {}}',
    'decoding unknown': '{"prompt": "{}", "prompt_tokens": 40, "answer_tokens": 8, "decoding": {"top_q": 3}}',
    'decoding of no beams': '{"prompt": "{}", "prompt_tokens": 40, "answer_tokens": 8, "decoding": {"num_beams": 0}}',
}


def models() -> Iterator[Case]:
    """Yield damaged model directories."""
    groups = [itertools.cycle(group) for group in (('train.py', 'prune.py'), ('evaluate.py', 'generate.py'))]
    describers = itertools.cycle(('inspect.py', 'compile.py'))
    for name, change in BAD_MODELS.items():
        # Scripts without a recipe take a model of any family.
        chosen = ['train.py', 'prune.py'] if name == 'wrong family' else [next(group) for group in groups]
        if name not in WITHOUT_WEIGHTS:
            chosen.append(next(describers))
        for script in chosen:
            yield Case('model', name, script, SCRIPTS_OF_MODELS[script], change)
    for name, change in BAD_CONTENTS.items():
        for group in groups:
            script = next(group)
            yield Case('model', name, script, SCRIPTS_OF_MODELS[script], change, is_late=True)
    for name, change in BAD_GENERATION.items():
        for script in ('evaluate.py', 'generate.py'):
            command = [word.replace('--model=model', '--model=llava') for word in SCRIPTS_OF_MODELS[script]]
            yield Case('model', name, script, tuple(command), change)
    for name, content in BAD_TEXT_FORMATS.items():
        for script in ('evaluate.py', 'generate.py'):
            change = write('model/text_format.json', content)
            yield Case('model', f'text format {name}', script, SCRIPTS_OF_MODELS[script], change)
    for script, flag in (
        ('evaluate.py', '--model='),
        ('generate.py', '--model='),
        ('inspect.py', ''),
        ('compile.py', ''),
    ):
        others = [word for word in SCRIPTS_OF_MODELS[script] if word not in ('model', '--model=model', RECIPE)]
        for name in ('no/such', 'no_such', 'data', 'recipe.json', '', ' ', 'a' * 300, '/dev/null', 'run', 'x:y'):
            # A recipe is an argument of its own for these scripts.
            if (script, name) == ('inspect.py', 'recipe.json'):
                continue
            yield Case('model', f'named {name[:20]!r}', script, (f'{flag}{name}', *others))


# Data.


def image_bytes(kind: str, **options: Any) -> bytes:
    """Return an image file."""
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(buffer, kind, **options)
    return buffer.getvalue()


BAD_DATA = {
    'missing': remove('data'),
    'empty': make_folder('data'),
    'a file': lambda folder: (remove('data')(folder), write('data', 'x')(folder)),
    'a circle of links': circle('data'),
    'no list': remove('data/data.jsonl'),
    'list empty': write('data/data.jsonl', ''),
    'list blank': write('data/data.jsonl', '\n\n \n'),
    'list a folder': make_folder('data/data.jsonl'),
    'list a pipe': pipe('data/data.jsonl'),
    'list not text': write('data/data.jsonl', b'\xff\xfe\x00' * 100),
    'list of numbers': write('data/data.jsonl', '3\n' * 20),
    'list deep': write('data/data.jsonl', ('[' * 100_000 + '\n') * 2),
    'one array': lines(lambda old: [f'[{",".join(old)}]']),
    'most lines cut': lines(lambda old: [line[:20] for line in old[:8]] + old[8:]),
    'all lines the same': lines(lambda old: old[:1] * 12),
    'no image field': lines(lambda old: [line.replace('"image"', '"picture"') for line in old]),
    'image a number': each_line(image=3),
    'image absolute': each_line(image='/etc/hostname'),
    'image out of the folder': each_line(image='../recipe.json'),
    'image missing': each_line(image='absent.png'),
    'image a folder': each_line(image='.'),
    'image with a null byte': each_line(image='a\0b.png'),
    'image with a lone surrogate': each_line(image='\ud800.png'),
    'image name too long': each_line(image='a' * 300),
    'image a device': lambda folder: (
        each_line(image='device')(folder),
        (folder / 'data/device').symlink_to('/dev/zero'),
    ),
    'image a pipe': lambda folder: (each_line(image='pipe')(folder), pipe('data/pipe')(folder)),
    'image no image': each_line(image='data.jsonl'),
    'prompt empty': each_line(prompt=' '),
    'prompt a list': each_line(prompt=['x']),
    'prompt too long': each_line(prompt='is it red? ' * 100),
    'answer empty': each_line(answer=''),
    'answer null': each_line(answer=None),
    'answer too long': each_line(answer='teal ' * 100),
    'split unknown': each_line(split='dev'),
    'no test lines': each_line(split='train'),
    'no training lines': each_line(split='test'),
}


def tar_file(members: dict[str, bytes], *, size: int | None = None) -> Callable[[Path], None]:
    """Return a change that adds a tar file of samples, which may be cut off."""

    def change(folder: Path) -> None:
        (folder / 'more').mkdir()
        with tarfile.open(folder / 'more/00000.tar', 'w') as archive:
            for name, content in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        if size is not None:
            os.truncate(folder / 'more/00000.tar', size)

    return change


SAMPLE = {'0.jpg': image_bytes('JPEG'), '0.txt': b'a red circle'}
LLAVA_ROW = '{"id": "0", "conversations": [{"from": "human", "value": "is it?"}, {"from": "gpt", "value": "no"}]}'
# Data of other layouts, as the second source of a recipe.
BAD_SOURCES = {
    'empty': make_folder('more'),
    'a file of nothing known': write('more/a.bin', 'x'),
    'a pipe': pipe('more'),
    'tar no tar': write('more/0.tar', 'x' * 2000),
    'tar empty': write('more/0.tar', ''),
    'tar without samples': tar_file({'a.bin': b'x'}),
    'tar cut in a header': tar_file(SAMPLE, size=1600),
    'tar cut in an image': tar_file(SAMPLE, size=700),
    'tar of broken images': tar_file({'0.jpg': b'x', '0.txt': b'a red circle'}),
    'tar captions no text': tar_file({**SAMPLE, '0.txt': b'\xff'}),
    'json cut': write('more/a.json', f'[{LLAVA_ROW}, {LLAVA_ROW[:40]}'),
    'json of other records': write('more/a.json', '[{"a": 1}]'),
    'json deep': write('more/a.json', '[' * 100_000),
    'conversations of nobody': write('more/a.json', f'[{LLAVA_ROW.replace("human", "nobody")}]'),
    'conversation no list': write('more/a.json', f'[{LLAVA_ROW}, {{"conversations": 3}}]'),
    'captions without images': write('more/a.json', '[{"image": "a.jpg", "caption": "a"}]'),
    'two files': both(write('more/a.json', f'[{LLAVA_ROW}]'), write('more/b.json', f'[{LLAVA_ROW}]')),
    'table of other columns': write('more/a.tsv', 'a\tb\n'),
    'table cut': write('more/a.tsv', 'a\thttp://b/c\nd\n'),
    'table not text': write('more/a.tsv', b'\xff\n'),
    'table no gzip': write('more/a.tsv.gz', 'caption\tpath\n'),
    'text not text': write('more/a.txt', b'\xff\xfe'),
    'text blank': write('more/a.txt', ' \n'),
    'prepared data broken': both(write('more/features.json', '{'), write('more/dataset_info.json', '{')),
}
BAD_IMAGES = {
    'cut': image_bytes('PNG')[:60],
    'empty': b'',
    'a text': b'no image',
    'a jpeg cut': image_bytes('JPEG')[:300],
    'a gif header': b'GIF89a',
    'svg': b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    'a bomb': image_bytes('PNG')[:16] + (60_000).to_bytes(4, 'big') * 2 + image_bytes('PNG')[24:],
}


def damaged_images(content: bytes) -> Callable[[Path], None]:
    """Return a change that replaces all images of the data."""

    def change(folder: Path) -> None:
        for file in (folder / 'data').glob('*.png'):
            file.write_bytes(content)

    return change


def data() -> Iterator[Case]:
    """Yield folders of data that cannot be used."""
    scripts = itertools.cycle(('train.py', 'prune.py', 'evaluate.py'))
    for name, change in BAD_DATA.items():
        for script in (next(scripts), next(scripts)):
            if script == 'evaluate.py' and name.startswith(('answer too', 'no training')):
                script = 'train.py'
            yield Case('data', name, script, SCRIPTS_OF_MODELS[script], change)
    for name, change in BAD_SOURCES.items():
        script = next(scripts)
        flag = '--data' if script == 'evaluate.py' else '--config.data'
        yield Case('source', name, script, (*SCRIPTS_OF_MODELS[script], f'{flag}=data,more'), change)
    for name, content in BAD_IMAGES.items():
        script = next(scripts)
        # Only the header of an image is read before it is used.
        change = damaged_images(content)
        yield Case('data', f'images {name}', script, SCRIPTS_OF_MODELS[script], change, is_late=True)


def questions() -> Iterator[Case]:
    """Yield what `generate.py` cannot answer."""
    command = ('--model=model',)
    for name, content in BAD_IMAGES.items():
        yield Case('image', name, 'generate.py', ('bad.png', QUESTION, *command), write('bad.png', content))
    for name in ('absent.png', 'data', '', ' ', 'a' * 300, '/dev/zero', '/dev/null', 'http://x/y.png', 'a\udcff.png'):
        yield Case('image', f'named {name[:20]!r}', 'generate.py', (name, QUESTION, *command))
    yield Case('image', 'a pipe', 'generate.py', ('pipe.png', QUESTION, *command), pipe('pipe.png'))
    yield Case('image', 'a circle', 'generate.py', ('circle.png', QUESTION, *command), circle('circle.png'))
    for name, question in {
        'empty': '',
        'blank': ' \n',
        'too long': 'is it red? ' * 1000,
        'not text': 'is it \udcff?',
    }.items():
        yield Case('question', name, 'generate.py', ('data/0.png', question, *command))
    yield Case('question', 'none', 'generate.py', ('data/0.png', *command))
    yield Case('question', 'nothing', 'generate.py', command)
    yield Case('question', 'three', 'generate.py', ('data/0.png', QUESTION, QUESTION, *command))


# Flags.

BAD_FLAGS = {
    'train.py': (
        '--stepz=3',
        '--workdir=',
        '--workdir= ',
        '--nodry_run=3',
        '--dry_run=maybe',
        '--config',
        '--config.restore.steps',
        '--nodistributed=3',
        '--noconfig.profile=3',
        '--noconfig.restore.steps',
        '---workdir=out',
        '--workdir=a\udcff',
        '--format=hf',
        '--flagfile=absent',
        'now',
        'configs/blip2_both.py',
        'workdir=out',
    ),
    'prune.py': ('--samples=3', 'recipe.json', '--workdir=', '--undefok'),
    'export.py': ('--format=onnx', '--format=', '--format', 'packed', '--dry_run'),
    'sweep.py': (
        '--run=',
        '--run=no_such',
        '--config.budget=huge',
        '--config.budget=',
        '--config.budgets.hour.seeds=0',
        '--config.budgets.hour.seeds=many',
        '--config.budgets.hour.restore.steps=0',
        '--config.budgets.hour.restore.steps=nan',
        '--config.budgets.hour.restore.stepz=3',
        '--config.budgets.hour.prune.samples=-1',
        '--config.points=3',
        '--config.name=../x',
        '--config.base.seed=-1',
        '--config.base.restore.peak=nan',
        '--config.base.restore.kd=2',
        '--config.base.prune.pattern.language=half',
        '--config.base.model=no/such',
        '--config.base.lora.rank.language=100000',
        '--config.base.restore.clip=inf',
        '--config.base.seed=2147483647 --config.budget=full',
        '--config=configs/sweeps/steps.py:recipe=none',
        '--config=configs/sweeps/steps.py:recipe=../x',
        '--config=configs/sweeps/steps.py:recipe=',
        '--config=configs/sweeps/steps.py:recipe=files',
        '--config=configs/sweeps/steps.py:model=',
        '--config=configs/sweeps/stepz.py',
        '--dry_run --config.base.seed=-1',
        'modality',
    ),
    'pretrain.py': ('--dry_run', '--config.facts=3', '--config.nothing=3', 'now', '--config.facts.stepz=3'),
    'evaluate.py': (
        '--questions=0',
        '--questions=-1',
        '--questions=many',
        '--batch=0',
        '--batch=1.5',
        '--seed=-1',
        '--seed=2147483648',
        '--dtype=floaty',
        '--dtype=int8',
        '--data=no/such',
        '--data=',
        '--data=model',
        '--data=no_such:Name',
        '--data=json:loads',
        '--shuffle_images=maybe',
        '--num_beams=0',
        '--num_beams=100000000',
        '--max_new_tokens=0',
        '--max_new_tokens=100000000',
        '--min_length=-1',
        '--length_penalty=nan',
        '--length_penalty=inf',
        '--length_penalty=many',
        '--prompt=',
        '--prompt=no braces',
        '--prompt={} {}',
        r'--prompt=<image>\n{}',
        '--prompt_tokens=0',
        '--prompt_tokens=1',
        '--prompt_tokens=100000',
        '--family=no_such',
        '--family=no_such:FAMILY',
        '--family=json:loads',
        '--workdir=out',
        'model',
        '--repetition_penalty=0',
        '--repetition_penalty=nan',
        '--tasks=',
        '--tasks=gqa',
        '--tasks=list',
        '--tasks=gqa --data_root=data',
        '--tasks=gqa --data_root=data --output=out',
        '--tasks=gqa --data_root=no/such --output=out',
        '--tasks=gqa --data_root=recipe.json --output=out',
        '--tasks=gqaa --data_root=data --output=out',
        '--tasks=json:loads --data_root=data --output=out',
        '--tasks=list --data_root=no/such',
        '--tasks=gqa,data --data_root=data --output=out',
        '--tasks=data,./data --output=out',
        '--tasks=gqa --data_root=data --output=out --limit=0',
        '--tasks=gqa --data_root=data --output=out --offset=-1',
        '--tasks=gqa --data_root=data --output=out --tolerance=2',
        '--tasks=flickr30k_test_retrieval --data_root=data --output=out',
        '--tasks=flickr30k_test_retrieval --data_root=data --output=out --candidates=0',
        '--tasks=flickr30k_test_retrieval --data_root=data --output=out --vision_from=no/such',
        '--tasks=gqa --data_root=data --output=out --vision_from=model',
        '--vision_from=model',
    ),
    'generate.py': (
        '--dtype=floaty',
        '--num_beams=0',
        '--num_beams=1.5',
        '--num_beams=100000000',
        '--max_new_tokens=-1',
        '--max_new_tokens=99999999999999999999',
        '--max_new_tokens=100000000',
        '--min_length=-1',
        '--length_penalty=nan',
        '--length_penalty=-inf',
        '--prompt=x',
        '--prompt_tokens=0',
        '--prompt_tokens=1',
        '--family=json:loads',
        '--family=no_such:FAMILY',
        '--seed=3',
        '--config=recipe.json',
    ),
    'inspect.py': (
        '--workdir=out',
        '--config.restore.steps=0',
        '--config.restore.stepz=3',
        'data',
        '--config=configs/sweeps/steps.py',
        '--config=configs/llava_both.py',
        '--config=recipe.json --config.prune.pattern.language=2:7',
        '--config=recipe.json --config.lora.targets.language=none',
        '--config=recipe.json --config.family=json:loads',
    ),
    'compile.py': (
        '--topology=',
        '--topology=v5e',
        '--topology=v9x:2x2',
        '--topology=v5e:0x2',
        '--topology=v5e:-1x2',
        '--topology=v5e:axb',
        '--topology=h100:0',
        '--topology=h100:many',
        '--topology=h100:99999999999',
        '--program=train',
        '--program=calibrate --config=recipe.json --config.prune.samples=0 --config.prune.method=magnitude '
        '--config.prune.allocation=uniform',
        '--mesh=worst',
        '--tries=0',
        '--price=many',
        '--price=nan',
        '--price=-1',
        '--price=inf',
        '--effort=2',
        '--effort=nan',
        '--workdir=',
        '--config.mesh.fsdp=64 --config=recipe.json',
        'data',
    ),
}


def flag_command(script: str) -> tuple[str, ...]:
    """Return good arguments, to which a bad flag is added."""
    if script == 'sweep.py':
        return ('--config=configs/sweeps/steps.py:recipe=blip2_both,model=model,data=data', OUT)
    if script == 'pretrain.py':
        return (OUT,)
    if script == 'export.py':
        return (RECIPE, '--workdir=run')
    if script in ('inspect.py', 'compile.py'):
        return ('model', OUT) if script == 'compile.py' else ('model',)
    return SCRIPTS_OF_MODELS[script]


def flags() -> Iterator[Case]:
    """Yield flags and positional arguments."""
    for script, words in BAD_FLAGS.items():
        for word in words:
            added = word.split(' --')
            added = [added[0], *(f'--{rest}' for rest in added[1:])]
            yield Case('flag', word, script, (*flag_command(script), *added))
    for script in ('train.py', 'prune.py', 'export.py', 'sweep.py', 'pretrain.py'):
        for name, words in {
            'processes alone': '--num_processes=2',
            'index alone': '--process_id=0',
            'no processes': '--num_processes=0 --coordinator=127.0.0.1:1234',
            'index negative': '--process_id=-1 --coordinator=127.0.0.1:1234',
            'index a word': '--process_id=first --coordinator=127.0.0.1:1234',
            'index too large': '--process_id=2 --num_processes=2 --coordinator=127.0.0.1:1234',
            'address a word': '--coordinator=nonsense --num_processes=2 --process_id=0',
            'address without port': '--coordinator=127.0.0.1: --num_processes=2 --process_id=0',
            'port too large': '--coordinator=127.0.0.1:99999 --num_processes=2 --process_id=0',
            'port zero': '--coordinator=127.0.0.1:0 --num_processes=2 --process_id=0',
            'address empty': '--coordinator= --num_processes=2 --process_id=0',
            'address alone': '--coordinator=127.0.0.1:1234',
            'environment without processes': '--distributed',
        }.items():
            yield Case('distributed', name, script, (*flag_command(script), *words.split()))


def pretraining() -> Iterator[Case]:
    """Yield fields of a pretraining: all of them."""
    config = demo_pretrain.get_config()
    for name in field_names(config):
        default = value_of(config, name)
        if isinstance(default, ConfigDict):
            continue
        for word in WRONG_WORDS[type(default)]:
            yield Case('pretraining', f'{name}={word}', 'pretrain.py', (OUT, f'--config.{name}={word}'))
    for word in ('vision.heads=7', 'vision.patch_size=7', 'qformer.heads=7', 'shares=(1,1)', 'shares=(0,0,0)'):
        yield Case('pretraining', word, 'pretrain.py', (OUT, f'--config.{word}'))


# Workdirs.


def unwritable_workdirs() -> dict[str, tuple[str, Callable[[Path], Any]]]:
    """Return names of workdirs that no run can write to, and what makes them so."""
    return {
        'a file': ('out', write('out', 'x')),
        'below a file': ('out/run', write('out', 'x')),
        'a circle of links': ('out', circle('out')),
        'below a circle of links': ('out/run', circle('out')),
        'a link to nowhere': ('out', lambda folder: (folder / 'out').symlink_to('/no/such/folder')),
        'a pipe': ('out', pipe('out')),
        'a device': ('/dev/null', lambda folder: None),
        'below a device': ('/dev/null/run', lambda folder: None),
        # Even the superuser makes no folder there.
        'not writable': ('/proc/run', lambda folder: None),
        'a name too long': ('a' * 300, lambda folder: None),
        'lock a folder': ('out', lambda folder: (folder / 'out/lock').mkdir(parents=True)),
    }


DAMAGED_CONFIGS = {
    'cut': '{"seed": 3',
    'empty': '',
    'a list': '[]',
    'a number': '3',
    'not text': b'\xff\xfe\x00',
    'deep': '[' * 100_000,
    'another': '{"seed": 3}',
}


def workdirs() -> Iterator[Case]:
    """Yield folders that cannot hold this run."""
    commands = {
        'train.py': (RECIPE,),
        'prune.py': (RECIPE,),
        'export.py': (RECIPE,),
        'sweep.py': flag_command('sweep.py')[:1],
        'pretrain.py': (),
        'compile.py': ('model', RECIPE),
    }
    for script, command in commands.items():
        for name, (path, change) in unwritable_workdirs().items():
            if script == 'compile.py' and name == 'lock a folder':
                continue
            # `compile.py` writes last, and the chips' compilers need not be there: its own check comes first.
            yield Case(
                'workdir', name, script, (*command, f'--workdir={path}'), change, is_late=name == 'lock a folder'
            )
        if script == 'compile.py':
            continue
        for name, content in DAMAGED_CONFIGS.items():
            yield Case('workdir', f'config {name}', script, (*command, OUT), write('out/config.json', content))
        yield Case(
            'workdir',
            'config a folder',
            script,
            (*command, OUT),
            lambda folder: (folder / 'out/config.json').mkdir(parents=True),
        )
    for script in ('train.py', 'prune.py', 'export.py'):
        for word in ('seed=3', 'restore.steps=3', 'prune.method=wanda', 'evaluate.questions=2', 'text.prompt=Q: {}'):
            yield Case('workdir', f'of another {word}', script, (RECIPE, '--workdir=run', f'--config.{word}'))
        yield Case(
            'workdir',
            'of other weights',
            script,
            (RECIPE, '--workdir=run'),
            lambda folder: (
                tensors(lambda weights: weights[KEY].fill(0.5))(folder),
                remove('run/export.json')(folder),
                remove('run/export_pruned.json')(folder),
                remove('run/prune.json')(folder),
            ),
        )
    for script in ('sweep.py', 'pretrain.py'):
        yield Case('workdir', 'of a recipe', script, (*commands[script], '--workdir=run'))
    yield Case('workdir', 'without a run', 'export.py', (RECIPE, OUT))
    yield Case('workdir', 'without a run, packed', 'export.py', (RECIPE, OUT, '--format=packed'))
    yield Case('workdir', 'packed LoRA of a dense base', 'export.py', (RECIPE, '--workdir=run', '--format=packed_lora'))


# Files of a finished run, and whether `train.py`, `prune.py` or `export.py` reads or checks them.
RESULTS = tuple(
    names.result_file(stage)
    for stage in (
        names.ZEROS,
        names.PRUNE,
        names.TEACHER,
        *names.TRAINING.values(),
        names.EXPORT,
        names.EXPORT_PRUNED,
        names.PACKED[0],
        names.FLOOR,
        *map(names.evaluation_stage, names.ALL_MODELS),
    )
)
OUTPUTS = (
    names.MASKS,
    names.KERNELS,
    *map(names.trained_file, names.TRAINING.values()),
    'teacher/000000.safetensors',
    'exported/model.safetensors',
    'exported/config.json',
    'exported/text_format.json',
    'exported/tokenizer.json',
    'adapter/adapter_model.safetensors',
    'adapter/adapter_config.json',
    'pruned/model.safetensors',
    'packed/packed.safetensors',
    'packed/config.json',
    *(f'answers_{model}.jsonl' for model in names.ALL_MODELS),
)


def stage_files() -> Iterator[Case]:
    """Yield damaged files of a finished run: results of stages, and what the stages wrote."""
    for file in (*RESULTS, names.ENVIRONMENTS, names.INPUTS):
        damages = {
            'of another run': of_another_run(f'run/{file}'),
            'flipped': flip(f'run/{file}'),
            'cut': cut(f'run/{file}'),
            'empty': write(f'run/{file}', ''),
            'a list': write(f'run/{file}', '[]'),
            'an object': write(f'run/{file}', '{}'),
            'not text': write(f'run/{file}', b'\xff\xfe\x00'),
            'a folder': make_folder(f'run/{file}'),
        }
        for name, change in damages.items():
            yield Case('stage', f'{file} {name}', 'train.py', (RECIPE, '--workdir=run'), change)
    for file in OUTPUTS:
        damages = {
            'missing': remove(f'run/{file}'),
            'cut': cut(f'run/{file}'),
            'empty': write(f'run/{file}', ''),
            'flipped': flip(f'run/{file}'),
            'a folder': make_folder(f'run/{file}'),
        }
        for name, change in damages.items():
            yield Case('stage', f'{file} {name}', 'train.py', (RECIPE, '--workdir=run'), change)
    for file in (names.result_file(names.PRUNE), names.MASKS, names.KERNELS, 'pruned/model.safetensors'):
        for name, damage in {'cut': cut, 'a folder': make_folder}.items():
            yield Case('stage', f'{file} {name}', 'prune.py', (RECIPE, '--workdir=run'), damage(f'run/{file}'))
    for file in (names.result_file('restore'), 'restore.safetensors', names.MASKS):
        for name, damage in {'cut': cut, 'a folder': make_folder}.items():
            command = (RECIPE, '--workdir=run', '--format=packed')
            change = both(damage(f'run/{file}'), remove('run/packed.json'))
            yield Case('stage', f'{file} {name}', 'export.py', command, change)
    # Damage is found before a stage that does not read the damaged file.
    change = both(flip(f'run/{names.MASKS}'), remove('run/evaluate_dense.json'))
    yield Case('stage', 'masks before the dense model', 'train.py', (RECIPE, '--workdir=run'), change)
    yield Case('stage', f'{names.INPUTS} missing', 'train.py', (RECIPE, '--workdir=run'), remove(f'run/{names.INPUTS}'))
    yield Case('stage', 'image replaced', 'train.py', (RECIPE, '--workdir=run'), same_size_image('data/0.png'))
    # A finished run as a model.
    for file in ('config.json', 'model.safetensors', 'tokenizer.json', 'text_format.json'):
        change = cut(f'run/exported/{file}')
        for script in ('evaluate.py', 'generate.py'):
            command = [word.replace('--model=model', '--model=run/exported') for word in SCRIPTS_OF_MODELS[script]]
            yield Case('stage', f'exported/{file} cut', script, tuple(command), change)
    for file in ('config.json', 'packed.safetensors'):
        for name, damage in {'cut': cut, 'missing': remove, 'empty': empty}.items():
            command = ('data/0.png', QUESTION, '--model=run/packed')
            yield Case('stage', f'packed/{file} {name}', 'generate.py', command, damage(f'run/packed/{file}'))
    for name, content in {
        'cut': '{"data": ',
        'a list': '[]',
        'without data': '{}',
        'data a number': '{"data": 3}',
    }.items():
        change = write('run/config.json', content)
        yield Case('stage', f'config {name}', 'evaluate.py', ('--model=run/exported',), change)


CASES = [
    *field_words(),
    *field_values(),
    *combinations(),
    *config_files(),
    *models(),
    *data(),
    *questions(),
    *flags(),
    *pretraining(),
    *workdirs(),
    *stage_files(),
]
