"""The file of `--config`: found by the folder of the user or by the repository; its own faults are one line."""

import json
import re

import pytest

from configs import blip2_lang_only, files, llava_both
from sparselora_jax.recipe import ConfigError, check_values


def read(tmp_path, text, name='mine.py'):
    (tmp_path / name).write_text(text)
    return files.read(str(tmp_path / name))


def fields(config):
    return json.loads(config.to_json())


@pytest.mark.parametrize(
    ('text', 'said'),
    [
        ('def get_config(arg=None): return None', r'get_config returns NoneType, expected a ConfigDict'),
        ('def get_config(arg=None): return {"seed": 3}', r'get_config returns dict, expected a ConfigDict'),
        ('def get_config(arg=None):\n  return 1 / 0', r'mine.py, line 2: ZeroDivisionError: division by zero'),
        ('def get_config(arg=None): open("absent.txt")', r'line 1: absent.txt: no such file or folder'),
        ('def get_config(arg=None): raise SystemExit(0)', r'line 1: SystemExit: 0'),
        ('def get_config(arg=None): raise KeyError("a\\nb")', r'KeyError'),
        ('import no_such_module', r"ModuleNotFoundError: No module named 'no_such_module'"),
        ('def get_config(', r'SyntaxError: '),
        ('x = 3', r'defines no get_config\(\)'),
        ('get_config = 3', r'defines no get_config\(\)'),
        (
            'from configs.base import base_config\ndef get_config():\n  c = base_config()\n  c.seed = "x"\n  return c',
            r'mine.py, line 4: TypeError',
        ),
    ],
)
def test_a_fault_in_a_config_file_is_one_line_with_its_place(tmp_path, text, said):
    with pytest.raises(ConfigError, match=said) as raised:
        read(tmp_path, text)
    assert '\n' not in str(raised.value)
    assert '[Errno' not in str(raised.value)


def test_a_config_of_ones_own_need_not_take_an_argument(tmp_path):
    config = read(tmp_path, 'from configs.base import base_config\ndef get_config(): return base_config()')
    # The base is for any family, and a recipe for one.
    assert fields(config) == fields(blip2_lang_only.get_config()) | {'family': ''}


@pytest.mark.parametrize('original', [blip2_lang_only, llava_both])
def test_a_run_can_be_repeated_from_its_own_config(tmp_path, original):
    config = original.get_config('pattern=0.7')
    config.restore.peak = 5e-4
    again = read(tmp_path, config.to_json(), 'config.json')
    assert fields(again) == fields(config)
    check_values(again)


def test_yaml_overrides_the_defaults_by_the_types_of_yaml_1_2(tmp_path):
    text = 'seed: 7\nprune:\n  pattern: {language: 2:4, vision: 0.5}\nrestore:\n  peak: 1e-4\n  spike: 3\n'
    config = read(tmp_path, text + '  shares: [1, 1, 2]\nstream: false\n', 'mine.yaml')
    check_values(config)
    expected = blip2_lang_only.get_config()
    expected.family = ''  # the defaults are those of the base, which is for any family
    expected.seed = 7
    expected.prune.pattern.vision = '0.5'
    expected.restore.peak = 1e-4
    expected.restore.spike = 3.0
    expected.restore.shares = (1, 1, 2)
    assert fields(config) == fields(expected)
    assert isinstance(config.restore.shares, tuple)
    assert isinstance(config.restore.spike, float)


@pytest.mark.parametrize(
    ('name', 'text', 'said'),
    [
        ('a.json', '{"restore": {"stepz": 3}}', r"config has no field 'restore.stepz'; did you mean 'restore.steps'\?"),
        ('a.json', '{"restore": 3}', r'restore 3: expected fields'),
        ('a.json', '{"seed": {"x": 3}}', r"config has no field 'seed.x'"),
        ('a.json', '{"lora": {"rank": 4}}', r'lora.rank 4: expected a value for each tower'),
        (
            'a.json',
            '{"lora": {"rank": {"language": 1.5}}}',
            r'lora.rank.language 1.5: expected 0 \(leave it alone\) or m',
        ),
        ('a.json', '{"restore": {"steps": true}}', r'restore.steps True: expected 1 or more'),
        ('a.json', '{"restore": {"peak": NaN}}', r'restore.peak nan: expected a positive number'),
        ('a.json', '[1]', r'expected fields with values, found list'),
        ('a.json', 'null', r'expected fields with values, found NoneType'),
        ('a.json', '{"seed": }', r'not readable as json \(Expecting value'),
        ('a.json', '[' * 100_000, r'not readable as json'),
        ('a.json', '{"points": [], "base": {}}', r'the config of a sweep; repeat it with the .py file'),
        ('a.yaml', 'restore: [1', r'not readable as yaml \(line 1: '),
        ('a.yaml', '!!python/object/apply:os.system ["ls"]', r'not readable as yaml'),
        ('a.yaml', 'a: &a {b: *a}', r'contains itself'),
        ('a.yaml', '3: 4', r'3: expected the name of a field'),
        ('a.yaml', 'restore.steps: 4', r"'restore.steps': expected the name of a field; write groups of fields nested"),
        ('a.yaml', 'restore: {on_bad_step: no, steps: 0x10}', r'restore.(on_bad_step|steps) '),
        ('a.txt', 'seed: 3', r'expected a file that ends in .py, .json or .yaml'),
    ],
)
def test_a_file_of_fields_that_cannot_be_is_named(tmp_path, name, text, said):
    with pytest.raises(ConfigError, match=said) as raised:
        read(tmp_path, text, name)
    assert str(raised.value).startswith(str(tmp_path / name))
    assert '\n' not in str(raised.value)


def test_text_that_is_not_utf_8_is_named(tmp_path):
    (tmp_path / 'a.yaml').write_bytes(b'\xff\xfe\x00')
    with pytest.raises(ConfigError, match=r'a.yaml: not readable as yaml'):
        files.read(str(tmp_path / 'a.yaml'))


def test_a_file_of_fields_takes_no_argument(tmp_path):
    (tmp_path / 'a.yaml').write_text('seed: 3')
    with pytest.raises(ConfigError, match=r'only a .py file takes an argument'):
        files.read(f'{tmp_path / "a.yaml"}:model=m')


@pytest.mark.parametrize('name', ['configs/llava_both.py', 'llava_both', 'configs/llava_both', 'modality'])
def test_a_config_of_the_repository_is_found_from_any_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert files.find(name).is_file()


def test_a_config_of_the_users_folder_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'configs').mkdir()
    (tmp_path / 'configs/llava_both.py').write_text('def get_config(): return None')
    assert files.find('configs/llava_both.py').resolve() == tmp_path / 'configs/llava_both.py'


def test_a_config_that_is_missing_is_named_with_the_folders_searched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = rf'configs/llava_bth.py: no such config; did you mean configs/llava_both.py\? \(searched {tmp_path} and '
    with pytest.raises(ConfigError, match=said):
        files.find('configs/llava_bth.py')
    with pytest.raises(ConfigError, match=f'{re.escape(str(tmp_path))}: not a file'):
        files.find(str(tmp_path))
