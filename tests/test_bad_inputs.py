"""Every bad input ends a script with one line and loses nothing; good inputs from any folder end well."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from collections import Counter
from pathlib import Path

import filelock
import pytest
from bad_inputs import CASES, OUTPUTS, RECIPE, RESULTS, flag_command
from tiny_jobs import small_config
from tiny_models import save, save_data

from sparselora_jax.checkpoints import gguf
from sparselora_jax.jobs import export, names, report, stages, sweep_runs
from sparselora_jax.jobs.job import Job
from sparselora_jax.runtime.files import LOCK

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path.name for path in (ROOT / 'launch').glob('*.py') if path.name != 'cli.py')
SECONDS = 20  # a bad input is refused within this time
# Fields that make the run write every kind of file.
ALL_STAGES = {
    'prune.method': 'sparsegpt',
    'prune.pattern.vision': '0.5',
    'prune.pattern.language': '0.5',
    'prune.allocation': 'owl',
    'restore.teacher': 'top_k',
    'restore.top_k': 8,
    'restore.control': True,
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def workspace(tmp_path_factory):
    """A folder with a tiny model, data, a finished run on them, and its recipe; made once for all workers."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if 'PYTEST_XDIST_WORKER' in os.environ else folder) / 'workspace'
    with filelock.FileLock(folder.with_suffix('.lock')):
        if not folder.exists():
            partial = folder.with_suffix('.partial')
            for name in ('model', 'llava', 'data'):
                (partial / name).mkdir(parents=True)
            save('blip2-opt', partial / 'model')
            save('llava-default', partial / 'llava')
            save_data(partial / 'data', 12)
            with contextlib.chdir(partial):
                config = small_config('blip2-opt', 'model', 'data', **ALL_STAGES)
                job = Job(config, 'run')
                stages.run(job)
                export.export_pruned(job)
                export.export_packed(job)
                report.write(job)
                # Paths are relative, so that a copy of the workspace is one.
                Path('recipe.json').write_text(config.to_json())
            partial.rename(folder)
    return folder


@pytest.fixture
def copy(workspace, tmp_path, monkeypatch, request):
    """A copy of the workspace, as the current folder."""
    folder = tmp_path / 'copy'
    case = request.node.callspec.params.get('case') if hasattr(request.node, 'callspec') else None
    ignored = [] if case is None or case.reads_run else ['run']
    # Times are kept: a file of another time is read again.
    shutil.copytree(workspace, folder, ignore=shutil.ignore_patterns(*ignored))
    if not ignored:
        move_run(folder)
    monkeypatch.chdir(folder)
    return folder


def move_run(folder):
    """Let the finished run of a copied workspace name the model and the data of the copy."""
    file = folder / 'run/config.json'
    fields = json.loads(file.read_text())
    fields |= {name: str(folder / Path(fields[name]).name) for name in ('model', 'data')}
    file.write_text(json.dumps(fields))


@pytest.fixture
def no_work(monkeypatch):
    """Work of more than a moment is a failure."""

    def fail(*args, **kwargs):
        pytest.fail('work began')

    monkeypatch.setattr(Job, '_begin', fail)
    monkeypatch.setattr(sweep_runs, 'run_apart', fail)
    monkeypatch.setattr(gguf, 'load_llama', fail)


def contents(folder):
    """What is below a folder: for each path its type, and the digest of a file or the target of a link."""
    found = {}
    for path in sorted(folder.rglob('*')):
        # It names the process that last used the workdir.
        if path.name == LOCK:
            continue
        mode = path.lstat().st_mode
        if stat.S_ISREG(mode):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            content = os.readlink(path) if stat.S_ISLNK(mode) else ''
        found[str(path.relative_to(folder))] = (stat.S_IFMT(mode), content)
    return found


@contextlib.contextmanager
def at_most(seconds):
    """Fail, even in a system call, if something takes longer."""

    def fail(number, frame):
        pytest.fail(f'not refused within {seconds} s')

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def is_ordinary(line):
    """Whether a line of stderr is no error: the header of a run, progress, or a warning."""
    return bool(re.match(r'sparselora-jax |note: |WARNING:|\d+ examples?\b', line)) or ' | ETA ' in line


def check_refusal(code, err):
    """A refusal has a code of its own, and one line."""
    assert code == 1, err
    lines = [line for line in err.splitlines() if not is_ordinary(line)]
    assert len(lines) == 1, err
    assert lines[0].startswith('error: '), err
    assert len(lines[0]) > len('error: ') + 10, err
    assert 'Traceback' not in err
    assert '[Errno' not in err


def check_unchanged(before, after, *, is_late):
    """Nothing is lost; and nothing is new, unless a stage had begun."""
    assert {name: after.get(name) for name in before} == before
    if not is_late:
        assert after.keys() == before.keys()


@pytest.mark.parametrize('case', CASES, ids=lambda case: case.id)
def test_a_bad_input_is_one_line_and_loses_nothing(script, copy, request, case):
    if not case.is_late:
        request.getfixturevalue('no_work')
    case.change(copy)
    before = contents(copy)
    # Python's own stderr shows names that are no text like this; that of pytest refuses them.
    sys.stderr.reconfigure(errors='backslashreplace')
    with at_most(SECONDS):
        code, _, err = script(case.script, *case.arguments)
    check_refusal(code, err)
    check_unchanged(before, contents(copy), is_late=case.is_late)


# One real process for each script: with its own parser, and with what Python prints when it ends.
SAMPLES = {case.script: case for case in CASES if case.kind in ('model', 'workdir')}


@pytest.mark.parametrize('case', SAMPLES.values(), ids=lambda case: case.id)
def test_a_bad_input_of_a_process_is_one_line_and_loses_nothing(copy, case):
    case.change(copy)
    before = contents(copy)
    command = [sys.executable, ROOT / 'launch' / case.script, *case.arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    check_refusal(done.returncode, done.stderr)
    check_unchanged(before, contents(copy), is_late=case.is_late)


def test_all_scripts_and_all_files_of_a_run_have_cases(workspace):
    assert Counter(case.script for case in CASES).keys() == set(SCRIPTS) == SAMPLES.keys()
    assert max(Counter(case.id for case in CASES).values()) == 1
    assert len(CASES) >= 200
    written = {path.name for path in (workspace / 'run').iterdir()}
    damaged = {file.partition('/')[0] for file in (*RESULTS, *OUTPUTS)} | {names.ENVIRONMENTS, names.INPUTS}
    # The rest is for people, or is checked when it is read: the log, the report, checkpoints.
    others = {'config.json', 'lock', 'log.jsonl', 'report.html', 'report.json', 'checkpoints'}
    assert {name for name in written if not name.startswith('events.')} == damaged | others


@pytest.mark.parametrize('flag', ['--help', '--version'])
@pytest.mark.parametrize('name', SCRIPTS)
def test_help_and_version_end_well_and_write_nothing(script, copy, name, flag):
    before = contents(copy)
    code, out, err = script(name, flag)
    assert (code, err) == (0, '')
    assert out.strip()
    assert contents(copy) == before


@pytest.mark.parametrize('name', ['train.py', 'prune.py', 'sweep.py'])
def test_a_dry_run_ends_well_and_writes_nothing(script, copy, no_work, name):
    before = contents(copy)
    code, out, err = script(name, *flag_command(name), '--dry_run')
    assert code == 0, err
    assert 'nothing was written' in out
    assert contents(copy) == before


def test_a_good_run_in_another_folder_ends_well(copy, tmp_path):
    (tmp_path / 'elsewhere').mkdir()
    options = {'model': copy / 'model', 'data': copy / 'data', 'prune.method': 'magnitude', 'prune.samples': 0}
    options |= {'prune.allocation': 'uniform', 'restore.teacher': 'model'}
    fields = [f'--config.{name}={value}' for name, value in options.items()]
    command = [sys.executable, ROOT / 'launch/prune.py', f'--config={copy / "recipe.json"}', '--workdir=out', *fields]
    done = subprocess.run(command, cwd=tmp_path / 'elsewhere', capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'elsewhere/out/pruned/model.safetensors').is_file()


def test_a_recipe_without_calibration_is_described(script, copy):
    options = ['--config.prune.method=magnitude', '--config.prune.samples=0', '--config.prune.allocation=uniform']
    code, out, err = script('inspect.py', RECIPE, *options)
    assert code == 0, err
    assert 'memory of one device' in out


def test_a_finished_run_ends_well_again(script, copy, no_work):
    code, out, err = script('train.py', RECIPE, '--workdir=run')
    assert code == 0, err
    assert 'complete: run/report.html' in out
    code, out, err = script('evaluate.py', '--model=run/exported', '--questions=2')
    assert code == 0, err
    assert 'accuracy' in out
