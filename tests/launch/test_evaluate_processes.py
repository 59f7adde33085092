"""Score tasks by two processes of launch/evaluate.py: as by one; one that is killed ends the other, a rerun resumes.

Every process is a real one, with its share of the CPU devices, on tiny models.
"""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import miniature_benchmarks as miniature
import pytest
import tiny_models
import tiny_retrieval

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]
DEVICES = 4
QUESTIONS = 24
BATCH = 4
# The script, slowed down after each batch, so that a process can be killed between two of them.
SCRIPT = """
import runpy, sys, time
pause, *sys.argv = sys.argv[1:]
sys.path[0] = 'launch'
import cli
from sparselora_jax.runtime.progress import Progress
shown = Progress.__call__
Progress.__call__ = lambda *args: (time.sleep(float(pause)), shown(*args))
runpy.run_path(sys.argv[0], run_name='__main__')
"""


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    """A folder with a model that answers, a model of retrieval, benchmarks, and questions of a user's own."""
    folder = tmp_path_factory.mktemp('world')
    (folder / 'model').mkdir()
    tiny_models.save('blip2-opt', folder / 'model')
    tiny_retrieval.save(folder / 'retrieval')
    miniature.gqa(folder / 'data')
    karpathy = folder / 'data' / 'dataset_flickr30k.json'
    miniature.karpathy(karpathy, folder / 'data', 'flickr30k', ('test',) * 6)
    tiny_retrieval.write_captions(karpathy)
    lines = []
    for number in range(QUESTIONS):
        miniature.write(folder / 'cats' / f'{number}.png', miniature.image(number, '.png'))
        question = 'Is it ' + 'very ' * (number % 3) + 'red?'
        lines.append({'image': f'{number}.png', 'question': question, 'references': ['yes', 'teal']})
    miniature.write(folder / 'cats' / 'data.jsonl', lines)
    return folder


@pytest.fixture(scope='module')
def start(world, compiled_once):
    """`start(count, output, *flags, pause)`: the processes of an evaluation."""
    compiled = {
        'JAX_COMPILATION_CACHE_DIR': str(compiled_once),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    }
    quick = '--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1 '

    def run(count, output, *flags, pause=0):
        with socket.socket() as free:
            free.bind(('localhost', 0))
            coordinator = f'localhost:{free.getsockname()[1]}'
        devices = quick + f'--xla_force_host_platform_device_count={DEVICES // count}'
        environment = os.environ | {'XLA_FLAGS': devices, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)} | compiled
        arguments = [pause, 'launch/evaluate.py', f'--output={output}', f'--batch={BATCH}', *flags]
        started = []
        for index in range(count):
            of_process = [f'--coordinator={coordinator}', f'--num_processes={count}', f'--process_id={index}']
            started.append(
                subprocess.Popen(
                    [sys.executable, '-c', SCRIPT, *map(str, arguments), *(of_process if count > 1 else [])],
                    env=environment,
                    cwd=ROOT,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        return started

    return run


def finish(processes):
    """Wait for all processes; what each printed."""
    printed = []
    for process in processes:
        out, said = process.communicate(timeout=240)
        assert process.returncode == 0, said[-2000:]
        printed.append(out)
    return printed


def check_same(folder, alone):
    names = sorted(file.name for file in alone.iterdir() if file.name != 'lock')
    assert sorted(file.name for file in folder.iterdir() if file.name != 'lock') == names
    for name in names:
        assert (folder / name).read_bytes() == (alone / name).read_bytes(), name


def test_one_that_is_killed_ends_the_other_and_a_rerun_on_another_mesh_leaves_what_one_process_does(
    start, world, tmp_path
):
    flags = f'--tasks={world / "cats"},gqa', f'--model={world / "model"}', f'--data_root={world / "data"}'
    flags += '--num_beams=1', '--max_new_tokens=4'
    folder = tmp_path / 'two'
    answers = folder / 'answers_cats.jsonl'
    first, second = start(2, folder, *flags, pause=1)
    while not answers.exists():
        assert first.poll() is None
        assert second.poll() is None
        time.sleep(0.05)
    second.kill()
    alone = start(1, tmp_path / 'one', *flags)
    _, said = first.communicate(timeout=60)
    assert first.returncode != 0
    assert 'another process of this run' in said, said[-2000:]
    before = answers.read_text()
    assert BATCH <= before.count('\n') < QUESTIONS

    printed, printed_by_second = finish(start(2, folder, *flags, '--mesh=data=2,fsdp=2'))
    assert answers.read_text().startswith(before)
    assert '24 items' in printed
    assert 'items' not in printed_by_second  # JAX prints lines about its connections
    finish(alone)
    check_same(folder, tmp_path / 'one')
    predictions = [json.loads(line)['prediction'] for line in (folder / 'samples_cats.jsonl').read_text().splitlines()]
    assert len(predictions) == QUESTIONS
    assert len(set(predictions)) > 1  # equal answers would hide that they are in another order


def test_a_search_of_two_processes_is_that_of_one(start, world, tmp_path):
    flags = '--tasks=flickr30k_test_retrieval', f'--model={world / "retrieval"}', f'--data_root={world / "data"}'
    folders = [tmp_path / 'one', tmp_path / 'two']
    for processes in [start(count, folder, *flags) for count, folder in enumerate(folders, start=1)]:
        finish(processes)
    one, two = (json.loads((folder / 'results.json').read_text())['results'] for folder in folders)
    assert one == two
    samples = [(folder / 'samples_flickr30k_test_retrieval.jsonl').read_text() for folder in folders]
    assert samples[0] == samples[1]
