"""A main job that is killed and terminated at random moments of all its stages: the reruns end as if nothing had been.

`make soak` does it a hundred times and more, and prints where it struck.
"""

import collections
import json
import multiprocessing
import os
import random
import runpy
import signal
import sys
import time
from pathlib import Path

import pytest
from safetensors import safe_open
from tiny_jobs import RECIPES, SMALL
from tiny_models import save, save_data

pytestmark = pytest.mark.processes

KILLS = int(os.environ.get('SOAK_KILLS', 4))
SEED = int(os.environ.get('SOAK_SEED', 0))
TIMES = {'seconds', 'step_s', 'steps_s', 'time_s', 'peak_memory_bytes', 'mtime_ns'}
IMPORTED = ['transformers.models.blip_2.processing_blip_2', 'sparselora_jax.jobs.stages', 'sparselora_jax.jobs.report']
STAGES = ('start', 'evaluate_dense', 'prune', 'evaluate_pruned', 'restore', 'evaluate_restored', 'export', 'floor')


@pytest.fixture(scope='module')
def start(tmp_path_factory):
    """`start(workdir)`: (a process of the main job, what it says), on a tiny directory of BLIP-2, pruned by SparseGPT.

    Each is forked from one that has imported what the script needs, which takes longer than the job.
    """
    folder = tmp_path_factory.mktemp('world')
    save_data(folder, 24)
    (folder / 'model').mkdir()
    save('blip2-opt', folder / 'model')
    fields = SMALL | {'text.prompt': RECIPES['blip2-opt'][1], 'prune.method': 'sparsegpt', 'evaluate.questions': 8}
    fields |= {'restore.steps': 12, 'restore.checkpoint_every': 3, 'restore.on_bad_step': 'skip'}
    recipe = f'configs/blip2_both.py:model={folder / "model"},data={folder},pattern=2:4,hardware=cpu'
    arguments = [f'--config={recipe}', *(f'--config.{name}={value}' for name, value in fields.items())]
    compiled = {
        'JAX_COMPILATION_CACHE_DIR': str(folder / 'compiled'),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in compiled.items():
            patch.setenv(name, value)
        forks = multiprocessing.get_context('forkserver')
        forks.set_forkserver_preload(IMPORTED)

        def run(workdir):
            output = workdir.with_suffix('.txt')
            output.write_text('')
            process = forks.Process(target=main_job, args=([*arguments, f'--workdir={workdir}'], output))
            process.start()
            return process, output

        yield run


def main_job(arguments, output):
    """The script, as in a shell."""
    os.chdir(Path(__file__).parents[2])
    for stream in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND), stream)
    sys.path.insert(0, 'launch')
    sys.argv = ['launch/train.py', *arguments]
    runpy.run_path(sys.argv[0], run_name='__main__')


def stages(output):
    """Those that a process has begun."""
    return [line.removeprefix('-- ') for line in output.read_text().splitlines() if line.startswith('-- ')]


def strike(process, output, number, rng, seconds):
    """Sends a signal, mostly once the process works; returns its exit code, which is 0 if it was complete before."""
    at_once = rng.random() < 0.1
    while not at_once and process.is_alive() and not stages(output):
        time.sleep(0.02)
    process.join(seconds * rng.random())
    if process.is_alive():
        os.kill(process.pid, number)
    return end(process, output)


def end(process, output):
    process.join(120)
    assert process.exitcode is not None, output.read_text()
    return process.exitcode


def results(workdir, *, complete=True):
    """What a run has left, but for logs, times and checkpoints; fails if a file of it is not whole."""
    found = {}
    for file in sorted(path for path in workdir.rglob('*') if path.is_file()):
        name = str(file.relative_to(workdir))
        grows = file.suffix == '.jsonl' and not complete
        if name.startswith(('checkpoints/', 'events', 'log', 'lock')) or file.suffix in ('.partial', '.html') or grows:
            continue
        if file.suffix == '.safetensors':
            with safe_open(file, framework='np') as opened:
                assert list(opened.keys()), name
        if file.suffix == '.json':
            values = json.loads(file.read_text())
            values.pop('sha256', None)  # the stamp of a result covers its times
            found[name] = without_times(values)
        else:
            found[name] = file.read_bytes()
    return found


def without_times(value):
    if not isinstance(value, dict):
        return value
    return {name: without_times(part) for name, part in value.items() if name not in TIMES}


def test_killed_at_random_moments_it_ends_bit_identical(start, tmp_path):
    begun = time.monotonic()
    for name in ('compiled', 'whole'):
        process, output = start(tmp_path / name)
        while not stages(output):
            assert process.is_alive(), output.read_text()
            time.sleep(0.02)
        worked = time.monotonic()
        assert end(process, output) == 0, output.read_text()
    work, whole = time.monotonic() - worked, results(tmp_path / 'whole')
    assert results(tmp_path / 'compiled') == whole

    rng, struck, runs = random.Random(SEED), collections.Counter(), 0
    while sum(struck.values()) < KILLS:
        workdir, code = tmp_path / f'run{runs}', None
        runs += 1
        while code != 0:
            number, (process, output) = rng.choice((signal.SIGTERM, signal.SIGKILL)), start(workdir)
            code = strike(process, output, number, rng, work) if sum(struck.values()) < KILLS else end(process, output)
            assert code in (0, -number, 130), output.read_text()
            if code:
                struck[number.name, (stages(output) or ['start'])[-1]] += 1
                left = results(workdir, complete=False)
                assert all(left[name] == whole[name] for name in left)
        assert results(workdir) == whole
    took = time.monotonic() - begun
    print(f'\n{KILLS} signals in {runs} runs and {took:.0f} s: all ended bit-identical to a run left alone,')
    print('and no file was found half-written. What they met:')
    for name in ('SIGTERM', 'SIGKILL'):
        print(f'{name}: ' + ', '.join(f'{stage} {struck[name, stage]}' for stage in STAGES))
