"""What a user can act on ends a script as one line that names what and where, with an exit code and no traceback."""

import errno
import functools
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import sparselora_jax as sl
from sparselora_jax import recipe
from sparselora_jax.checkpoints import embedded
from sparselora_jax.data import easy_vqa, images, text_format
from sparselora_jax.data.dataset import Dataset, Split
from sparselora_jax.data.text_format import TextFormat
from sparselora_jax.evaluation import vqa
from sparselora_jax.jobs import sweep_runs
from sparselora_jax.jobs.job import Job
from sparselora_jax.runtime import os_errors

ROOT = Path(__file__).parents[2]
QUESTION = 'what color is the circle?'


@pytest.fixture
def refused(script, tmp_path):
    """`refused(name, *arguments)`: the one line of a script that cannot go on; nothing is left in its workdir."""

    def run(name, *arguments):
        workdir = [] if name in ('generate.py', 'evaluate.py') else [f'--workdir={tmp_path / "run"}']
        code, out, err = script(name, *arguments, *workdir)
        assert code == 1
        assert err.startswith('error: '), err
        assert err.count('\n') == 1, err
        assert 'Traceback' not in out + err
        return err

    return run


@pytest.mark.slow
def test_a_shell_sees_one_line_and_the_code(tmp_path):
    command = [sys.executable, ROOT / 'launch/train.py', '--config.restore.stepz=3', '--workdir=run']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr == "error: config has no field 'restore.stepz'; did you mean 'restore.steps'?\n"
    assert not (tmp_path / 'run').exists()


@pytest.mark.slow
@pytest.mark.parametrize('arguments', [['evaluate.py', '--tasks=list', '--data_root=.'], ['train.py', '--help']])
def test_a_list_whose_reader_has_ended_ends_quietly(arguments):
    """As `head` ends after its lines."""
    name, *others = arguments
    command = [sys.executable, ROOT / 'launch' / name, *others]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writer)
    assert done.stderr == ''
    assert done.returncode == 128 + signal.SIGPIPE


def test_a_job_whose_reader_has_ended_says_that_it_stopped(script, monkeypatch, tmp_path):
    def tell(job, stage):
        raise BrokenPipeError(errno.EPIPE, 'Broken pipe')

    monkeypatch.setattr(Job, 'read_result', tell)
    monkeypatch.setattr(os, 'dup2', lambda *descriptors: None)
    monkeypatch.setattr(sys, 'stdout', sys.__stdout__)
    code, _, err = script('train.py', f'--workdir={tmp_path / "run"}')
    assert code == 130
    told = 'stopped: the program that read the output has ended; finished stages are kept; run the same command'
    assert err.startswith(told)


@pytest.mark.slow
def test_scripts_do_without_torch_and_leave_no_none_where_others_look_for_it():
    has = 'from transformers.utils import is_torch_available'
    check = "assert not is_torch_available() and 'torch' not in sys.modules"
    command = [sys.executable, '-c', f"import sys; sys.path.append('launch'); import cli; {has}; {check}"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120)


@pytest.mark.parametrize('name', ['train.py', 'prune.py', 'export.py', 'pretrain.py'])
def test_a_config_that_is_missing_is_named_with_the_nearest(refused, name):
    err = refused(name, '--config=configs/blip2_lang_onyl.py')
    assert 'configs/blip2_lang_onyl.py: no such config; did you mean configs/blip2_lang_only.py?' in err


def test_a_flag_and_its_value_may_be_two_words(refused):
    err = refused('train.py', '--config', 'configs/blip2_both.py', '--config.prune.sampels', '3')
    assert "no field 'prune.sampels'; did you mean 'prune.samples'?" in err


def test_a_directory_or_a_folder_of_data_that_is_not_there_is_named(refused, tmp_path):
    err = refused('train.py', '--config=configs/blip2_lang_only.py:model=no/such/directory')
    assert 'no/such/directory: no such directory' in err
    err = refused('train.py', f'--config=configs/llava_both.py:model={tmp_path}')
    assert f'{tmp_path}: no config.json' in err
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('argument', ['some/dir', 'modle=some/dir', 'model=', 'pattern=2:4,pattern=2:4', 'data'])
def test_a_malformed_config_argument_is_named(refused, argument):
    err = refused('train.py', f'--config=configs/blip2_both.py:{argument}')
    assert f"configs/blip2_both.py: config argument '{argument.split(',')[-1]}': expected model=" in err


def test_hardware_that_has_no_preset_is_named(refused):
    err = refused('train.py', '--config=configs/blip2_both.py:hardware=abacus')
    assert "hardware 'abacus': expected one of cpu, gpu, " in err


def test_a_mesh_that_the_devices_cannot_form_is_named(refused, tiny_model):
    assert 'a mesh of data=1, fsdp=64' in refused('prune.py', '--config.mesh.fsdp=64')


@pytest.mark.parametrize('pattern', ['5:4', '2:4:8', '1.5', 'half'])
def test_a_pattern_that_does_not_parse_is_named(refused, tmp_path, pattern):
    assert f"pattern '{pattern}': " in refused('prune.py', f'--config.prune.pattern.language={pattern}')
    assert not (tmp_path / 'run').exists()


def test_a_method_that_does_not_exist_is_named(refused):
    assert "prune.method 'wandas': expected one of random, " in refused('prune.py', '--config.prune.method=wandas')


@pytest.fixture
def tiny_model(monkeypatch, tiny_blip2):
    monkeypatch.setattr(embedded, 'load', lambda *args, **kw: tiny_blip2)
    monkeypatch.setattr(easy_vqa, 'load', lambda data_dir: pytest.fail('work began: the data were read'))


def test_a_group_that_does_not_divide_is_named_before_any_work(refused, tiny_model):
    err = refused('train.py', '--config.prune.pattern.language=2:7')
    assert re.search(r'language/blocks/\S+/kernel: pattern 2:7 does not fit: 7 does not divide .* of \d+', err)


def test_lora_targets_that_match_nothing_are_named_before_any_work(refused, tiny_model):
    err = refused('train.py', '--config.lora.targets.language=attn/z/.*')
    assert "lora.targets.language: 'attn/z/.*' matches no kernel of the blocks; they are attn/k/kernel, " in err


def test_a_workdir_is_not_claimed_by_a_config_that_cannot_run(refused, tiny_model, tmp_path):
    refused('train.py', '--config.prune.pattern.language=2:7')
    assert not (tmp_path / 'run' / 'config.json').exists()


@pytest.mark.parametrize('field', ['gradient=inexact', 'kl_reduction=tokens', 'accumulate=3'])
def test_a_knob_of_restoring_that_cannot_work_is_named_before_any_work(refused, tiny_model, field):
    assert field.partition('=')[0] in refused('train.py', f'--config.restore.{field}')


@pytest.mark.parametrize(
    'field',
    [
        'dtype=floaty',
        'lora.rank.language=-1',
        'prune.chunk=0',
        'prune.cycles=0',
        'prune.initial=dsnot',
        'prune.threshold=-1.0',
        'restore.checkpoint_every=0',
        'evaluate.questions=0',
        'text.prompt=Question:',
        'restore.shares=(1,2)',
        'stream=True',
        'text.prompt={} {}',
        'evaluate.max_new_tokens=1',
    ],
)
def test_a_value_that_cannot_work_is_named_before_any_work(refused, field):
    assert field.partition('=')[0] in refused('train.py', f'--config.{field}')


@pytest.fixture
def no_data(monkeypatch, tiny_model):
    """The tiny model and a data set without questions."""
    empty = Split([{}], lambda: [('never read', 'never read')])
    monkeypatch.setattr(easy_vqa, 'load', lambda data_dir: Dataset(empty, empty, (), str))


def test_a_workdir_that_cannot_be_one_is_named(script, no_data):
    code, _, err = script('prune.py', '--workdir=README.md')
    assert code == 1
    assert err.count('\n') == 1
    assert 'README.md' in err


def test_a_config_that_is_not_python_is_named(refused):
    assert 'README.md: ' in refused('train.py', '--config=README.md')


def test_exporting_before_restoring_names_what_is_missing(refused, no_data):
    assert 'no restored model; first run launch/train.py' in refused('export.py')


@pytest.fixture
def image(tmp_path):
    path = tmp_path / 'image.png'
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 64, 3), np.uint8)).save(path)
    return path


def test_batches_that_the_mesh_cannot_split_are_named_before_any_work(refused, tiny_model):
    err = refused('train.py', '--config.mesh.fsdp=4', '--config.restore.batch=6')
    assert 'restore.batch / restore.accumulate is 6: mesh.data * mesh.fsdp = 4 does not divide it; ' in err
    assert 'data=1, fsdp=2, tensor=2 divides all, or ask for a multiple of 4' in err
    allocation = ['--config.prune.allocation=ecoflap_first', '--config.prune.pattern.language=0.5']
    scored = ['--config.prune.score_batch=2', '--config.prune.score_samples=8']
    assert 'prune.score_batch is 2: mesh' in refused('train.py', '--config.mesh.fsdp=4', *allocation, *scored)


@pytest.mark.parametrize('flag', ['--batch=0', '--questions=0', '--dtype=floaty'])
def test_a_flag_of_evaluate_that_cannot_work_is_named(script, flag):
    code, out, err = script('evaluate.py', flag)
    assert code != 0
    assert flag.strip('-').partition('=')[0] in err
    assert 'Traceback' not in out + err


def test_generate_names_an_image_that_it_cannot_read(refused, tmp_path):
    assert 'absent.png: no such file' in refused('generate.py', 'absent.png', QUESTION)
    (tmp_path / 'text.png').write_text('no image')
    assert 'text.png: not a readable image' in refused('generate.py', tmp_path / 'text.png', QUESTION)


def test_generate_needs_an_image_and_a_question(refused, image):
    assert 'expected two arguments: IMAGE "question"' in refused('generate.py', image)
    assert 'the question is empty' in refused('generate.py', image, ' ')


def damaged(path):
    """The same path, as a file cut short."""
    with embedded.BRIDGE.open('rb') as source:
        path.write_bytes(source.read(100_000))
    return path


@pytest.mark.parametrize(
    ('name', 'arguments'), [('generate.py', ('image.png', QUESTION)), ('evaluate.py', ('--data=easy_vqa',))]
)
def test_a_missing_or_damaged_export_is_named(refused, image, tmp_path, name, arguments):
    arguments = [image if argument == 'image.png' else argument for argument in arguments]
    path = tmp_path / 'export' / 'model.safetensors'
    assert f'{path.parent}: no such directory' in refused(name, *arguments, f'--model={path.parent}')
    path.parent.mkdir()
    (path.parent / 'config.json').write_text('{"model_type": "blip-2"}')
    damaged(path)
    assert f'{path}: ' in refused(name, *arguments, f'--model={path.parent}')


def test_a_missing_or_damaged_bridge_is_named(refused, image, tmp_path, monkeypatch):
    path = tmp_path / 'bridge.safetensors'
    monkeypatch.setattr(embedded, 'load', functools.partial(embedded.load, path))
    assert f'{path}: no such file' in refused('generate.py', image, QUESTION)
    damaged(path)
    assert f'{path}: not a complete safetensors file' in refused('generate.py', image, QUESTION)
    assert f'{path}: not a complete safetensors file' in refused('evaluate.py')


@pytest.mark.slow
def test_generate_answers_as_evaluation_does(script, image, tmp_path, tiny_blip2):
    model, params = tiny_blip2
    pixels, text = images.read_image(image), TextFormat(decoding={'max_new_tokens': 4})
    embedded.save(tmp_path / 'export', model, params, texts={text_format.FILE: text_format.dump(text)})
    record = {'image': pixels, 'question': QUESTION, 'answer': 'teal'}
    processor, split = embedded.load_processor(model.cfg), Split([record], lambda: [])
    want = vqa.evaluate(model, params, processor, text, split, [0], batch=1, **text.decoding).predicted
    code, out, err = script('generate.py', image, QUESTION, f'--model={tmp_path / "export"}')
    assert code == 0, err
    assert out.splitlines() == want[0].splitlines()


SCRIPTS = ['train.py', 'prune.py', 'export.py', 'sweep.py', 'pretrain.py', 'evaluate.py', 'generate.py', 'inspect.py']
SCRIPTS += ['compile.py']


@pytest.mark.parametrize('name', SCRIPTS)
def test_help_lists_the_scripts_own_flags_and_nothing_else(script, name):
    code, out, err = script(name, '--help')
    assert (code, err) == (0, '')
    listed = re.findall(r'^  --(?:\[no\])?([\w.]+)', out, re.M)
    source = (ROOT / 'launch' / name).read_text()
    own = re.findall(r"flags\.DEFINE_\w+\(\s*'(\w+)'", source)
    assert own == [flag for flag in listed if flag in own]
    own += ['distributed', 'coordinator', 'num_processes', 'process_id', 'workdir', 'config', 'config.NAME', 'dry_run']
    own += ['help_config', 'version', 'help', 'model', 'family', 'prompt', 'prompt_tokens', 'dtype']
    assert set(listed) <= {*own, 'num_beams', 'max_new_tokens', 'min_length', 'length_penalty', 'repetition_penalty'}
    assert f'usage: python launch/{name}' in out
    assert f'python launch/{name}' in out.partition('usage:')[0], 'an example'


@pytest.mark.parametrize('name', SCRIPTS)
def test_no_import_before_cli_finds_the_inspect_of_the_scripts(name):
    before, cli_import, _ = (ROOT / 'launch' / name).read_text().partition('import cli\n')
    assert cli_import
    # The other tests call scripts in this process, where `inspect` is imported already. `-S` leaves out the installed
    # packages, since some of them import it at the start of Python.
    setup = f'import sys; sys.path.insert(0, {str(ROOT / "launch")!r})\n'
    subprocess.run([sys.executable, '-S', '-c', setup + before], check=True, timeout=60)


def test_help_shows_defaults_and_the_values_of_an_enumeration(script):
    _, out, _ = script('evaluate.py', '--help')
    assert '  --questions=INT: number of test questions (default: 1000)\n' in out
    assert '  --dtype=float32|bfloat16|float16: type of the weights (default: float32)\n' in out


def test_help_config_lists_every_field(script):
    code, out, _ = script('train.py', '--help_config')
    assert code == 0
    assert out.count('--config.') == len(recipe.FIELDS)
    assert '--config.restore.kd=0.1\n' in out
    assert 'Expected: a number from 0 to 1.' in out


def test_version(script):
    code, out, _ = script('train.py', '--version')
    assert code == 0
    assert out.startswith(f'sparselora-jax {sl.__version__} ')


@pytest.mark.parametrize(
    ('arguments', 'said'),
    [
        (
            ['train.py', 'configs/blip2_both.py'],
            "unknown argument 'configs/blip2_both.py': did you mean --config=configs",
        ),
        (['evaluate.py', 'model=M'], "unknown argument 'model=M': did you mean --model=M?"),
        (['prune.py', 'now'], "unknown argument 'now': see python launch/prune.py --help"),
        (['generate.py', 'a.png', 'what?', 'why?'], "unknown argument 'why?'"),
        (['train.py', '--stepz=3'], "Unknown command line flag 'stepz'"),
        (['evaluate.py', '--seed=-1'], 'flag --seed=-1'),
        (['evaluate.py', '--num_beams=many'], 'flag --num_beams=many'),
        (['train.py', '--config'], '--config has no value'),
        (['train.py', '--config.restore.steps=many'], 'config.restore.steps'),
        (['train.py', '--config.restore.steps'], 'config.restore.steps'),
        (
            ['train.py', '--config=configs/sweeps/steps.py'],
            'is a sweep, and this script needs a recipe; run it with pyth',
        ),
        (
            ['sweep.py', '--config=configs/blip2_both.py'],
            'is a recipe, and this script needs a sweep; run it with python',
        ),
        (['pretrain.py', '--config=configs/blip2_both.py'], 'is a recipe, and this script needs a pretraining; run'),
        (['train.py', '--config=configs/demo_pretrain.py'], 'is a pretraining, and this script needs a recipe'),
        (['pretrain.py', '--config.seed=-1'], 'seed -1: expected a whole number from 0'),
        (['pretrain.py', '--config.facts.steps=0'], 'facts.steps 0: expected 1 or more'),
        (['pretrain.py', '--config.lora.peak=nan'], 'lora.peak nan: expected a positive number'),
        (['pretrain.py', '--config.shares=(0,0,0)'], 'shares (0, 0, 0): expected a share of each kind'),
        (['pretrain.py', '--config.vision.heads=7'], 'heads 7: does not divide the width of its tower, 192'),
        (['pretrain.py', '--config.vision.patch_size=7'], 'vision.patch_size 7: does not divide the image, 64'),
        (['sweep.py', '--config.points=3'], '--config.points: only base, budget and budgets of a sweep can be set'),
        (['sweep.py', '--config.name=../x'], '--config.name: only base, budget and budgets of a sweep can be set'),
        (['train.py', '--flagfile=nonsense'], 'unknown flag --flagfile: see python launch/train.py --help'),
        (['prune.py', '--flagfile='], 'unknown flag --flagfile'),
        (['evaluate.py', '--undefok=stepz', '--stepz=3'], 'unknown flag --undefok'),
        (['train.py', '--config.restore.peak=True'], "config.restore.peak=True: could not convert string to float: 'T"),
        (['train.py', '--config.restore.peak=inf'], 'restore.peak inf: expected a positive number'),
        (['train.py', '--config.data=photos'], '--config=configs/NAME.py:data=photos'),
        (['train.py', '--nodistributed=3'], '--nodistributed=3 does not take an argument'),
        (['train.py', '--workdir='], "--workdir is empty: expected a folder; '.' is the current one"),
        (['sweep.py', '--config.budgets.hour.seeds=0'], 'budgets.hour.seeds 0: expected 1 or more'),
        (['sweep.py', '--config.budgets.hour.restore.steps=0'], 'point dense: restore.steps 0: expected 1 or more'),
        (
            ['sweep.py', '--config=configs/sweeps/steps.py', '--config.budgets.hour.restore.steps=2'],
            'points one-16th-2-4 and one-8th-2-4: the same recipe, with 1 steps of restoration; use a budget with more',
        ),
        (['train.py', '--num_processes=2'], '--num_processes needs --coordinator=HOST:PORT'),
        (['train.py', '--process_id=0'], '--process_id needs --coordinator=HOST:PORT'),
        (['train.py', '--coordinator=nonsense'], '--coordinator=nonsense: expected HOST:PORT'),
        (['train.py', '--coordinator=a:99999', '--num_processes=2'], '--coordinator=a:99999: expected HOST:PORT'),
        (
            ['train.py', '--coordinator=a:1', '--num_processes=2', '--process_id=2'],
            '--process_id=2: expected less than --num_processes=2',
        ),
        (['train.py', '--config=configs/blip2_both.py:data=a,b'], 'a path with a comma goes into --config.data=PATH'),
    ],
)
def test_a_command_that_cannot_be_is_one_line(script, tmp_path, monkeypatch, arguments, said):
    # If a command were accepted, its work would go here.
    monkeypatch.setattr(sweep_runs, 'run_apart', lambda command, folder: pytest.fail('a run began'))
    name, *flags = arguments
    workdir = [] if name in ('evaluate.py', 'generate.py') else [f'--workdir={tmp_path / "run"}']
    code, out, err = script(name, *workdir, *flags)
    assert not (tmp_path / 'run').exists()
    assert code == 1
    assert err.startswith('error: '), err
    assert said in err
    assert err.count('\n') == 1
    assert out == ''


@pytest.mark.slow
def test_scripts_run_from_any_folder(tmp_path):
    command = [sys.executable, ROOT / 'launch/inspect.py', 'blip2_both']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert 'trained: LoRA in language, qformer, vision' in done.stdout
    assert not any(tmp_path.iterdir())


def test_an_interruption_of_the_imports_is_one_line():
    command = [sys.executable, '-X', 'importtime', 'launch/train.py', f'--workdir={ROOT / "no"}']
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    # Each import is a line, so the signal is sent when cli.py has installed its handler and imports go on.
    lines = []
    for line in process.stderr:
        if not lines and 'transformers' in line:
            process.send_signal(signal.SIGINT)
        if 'transformers' in line or not line.startswith('import time:'):
            lines.append(line)
    assert process.wait(60) == 130
    assert [line for line in lines if not line.startswith('import time:')] == ['stopped: nothing was begun\n']


@pytest.mark.parametrize('number', [errno.EEXIST, errno.ENOTDIR, errno.EROFS, errno.ELOOP, errno.ENOSPC, errno.EACCES])
def test_an_error_of_the_operating_system_names_the_option_and_what_to_do(
    script, tiny_model, tmp_path, monkeypatch, number
):
    folder = tmp_path / 'run'

    def fail(self):
        raise OSError(number, os.strerror(number), str(folder / 'lock'))

    monkeypatch.setattr(Job, 'check', fail)
    code, _, err = script('prune.py', f'--workdir={folder}')
    assert code == 1
    assert err == f'error: --workdir={folder}: {folder / "lock"}: {os_errors.MEANINGS[number]}\n'
    assert '[Errno' not in err


@pytest.mark.parametrize('text', ['{', '[]', '3'])
def test_a_damaged_config_of_a_workdir_is_named(script, tmp_path, text):
    (tmp_path / 'config.json').write_text(text)
    code, _, err = script('train.py', f'--workdir={tmp_path}')
    assert code == 1
    assert f'{tmp_path / "config.json"}: ' in err
    assert err.count('\n') == 1
    assert (tmp_path / 'config.json').read_text() == text


def test_a_preset_of_other_hardware_is_noted(script, tiny_model):
    _, _, err = script('train.py', '--config=configs/blip2_both.py:hardware=gpu', '--config.seed=-1')
    assert err.startswith(
        'note: hardware=gpu, but JAX finds only a CPU here; its preset is hardware=cpu\nerror: seed -1'
    )


def test_a_model_is_scored_on_the_data_of_its_run_or_on_data_that_are_named(refused, tmp_path):
    model = tmp_path / 'run/exported'
    model.mkdir(parents=True)
    assert 'its data are not known; add --data=FOLDER' in refused('evaluate.py', f'--model={model}')
    (tmp_path / 'run/config.json').write_text('[]')
    assert 'config.json: not a JSON object; add --data=' in refused('evaluate.py', f'--model={model}')


def test_memory_that_runs_out_is_one_line(refused, tiny_model, monkeypatch):
    def fail(self):
        raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 41 GB\nat ...')

    monkeypatch.setattr(Job, 'check', fail)
    assert 'out of memory (RESOURCE_EXHAUSTED: Out of memory allocating 41 GB)' in refused('prune.py')


@pytest.mark.parametrize('mesh', ['fast=2', 'data', 'data=0', 'data=2,data=2', 'data=x'])
def test_a_mesh_that_is_none_is_refused(refused, mesh):
    part = mesh.split(',')[-1]
    assert f'--mesh: {part!r} is no axis with its size' in refused('evaluate.py', f'--mesh={mesh}')


def test_a_mesh_of_other_devices_than_there_are_is_refused(refused):
    assert 'a mesh of data=64, fsdp=1, tensor=1 needs 64 devices' in refused('evaluate.py', '--mesh=data=64')
