"""Prune, restore and export by several processes: as by one; one that is killed ends the others, and a rerun resumes.

Every process is a real one, with its share of four CPU devices, on a tiny directory of BLIP-2.
"""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_jobs import RECIPES, SMALL
from tiny_models import save, save_data

pytestmark = pytest.mark.processes

JOB = """
import json, sys, time
sys.modules['torch'] = None  # as the scripts have it
import jax
jax.config.update('jax_numpy_dtype_promotion', 'strict')
jax.config.update('jax_disable_most_optimizations', True)
from configs import blip2_both
from sparselora_jax.jobs import stages
from sparselora_jax.jobs.job import Job
from sparselora_jax.runtime import processes
from sparselora_jax.runtime.errors import SparseloraError

coordinator, count, index, workdir, recipe, fields, pause = sys.argv[1:]
if int(count) > 1:
    processes.connect(coordinator, int(count), int(index))
shown = stages.Progress.__call__
stages.Progress.__call__ = lambda *args: (time.sleep(float(pause)), shown(*args))
config = blip2_both.get_config(recipe)
config.update_from_flattened_dict(json.loads(fields))
job = Job(config, workdir)
try:
    with processes.joint():
        stages.prune(job)
        stages.restore(job, 'restore', lambda: job.base)
        stages.export(job)
except SparseloraError as error:
    processes.leave(error)
"""
FILES = 'masks.safetensors', 'restore.safetensors', 'exported/model.safetensors'


@pytest.fixture(scope='module')
def start(tmp_path_factory, compiled_once):
    """`start(count, workdir, mesh, pause)`: the processes of a run."""
    folder = tmp_path_factory.mktemp('world')
    save_data(folder, 24)
    (folder / 'model').mkdir()
    save('blip2-opt', folder / 'model')
    recipe = f'model={folder / "model"},data={folder},pattern=2:4,hardware=cpu'
    steps = {'restore.batch': 8, 'restore.steps': 6, 'restore.checkpoint_every': 2}
    small = SMALL | steps | {'text.prompt': RECIPES['blip2-opt'][1], 'prune.samples': 8, 'prune.chunk': 8}
    compiled = {
        'JAX_COMPILATION_CACHE_DIR': str(compiled_once),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    }
    flags = '--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1 '

    def run(count, workdir, mesh=(4, 1), pause=0):
        with socket.socket() as free:
            free.bind(('localhost', 0))
            coordinator = f'localhost:{free.getsockname()[1]}'
        devices = flags + f'--xla_force_host_platform_device_count={4 // count}'
        environment = os.environ | {'XLA_FLAGS': devices, 'JAX_PLATFORMS': 'cpu'} | compiled
        fields = json.dumps(small | {'mesh.data': mesh[0], 'mesh.fsdp': mesh[1]})
        streams = {
            'cwd': Path(__file__).parents[2],
            'stdout': subprocess.DEVNULL,
            'stderr': subprocess.PIPE,
            'text': True,
        }
        return [
            subprocess.Popen(
                [sys.executable, '-c', JOB, *map(str, (coordinator, count, index, workdir, recipe, fields, pause))],
                env=environment,
                **streams,
            )
            for index in range(count)
        ]

    return run


def finish(processes):
    for process in processes:
        _, said = process.communicate(timeout=240)
        assert process.returncode == 0, said[-2000:]


@pytest.fixture(scope='module')
def alone(start, tmp_path_factory):
    """What one process leaves."""
    workdir = tmp_path_factory.mktemp('alone')
    finish(start(1, workdir))
    return {name: load_file(workdir / name) for name in FILES}


def check_same(workdir, alone):
    for name, want in alone.items():
        got = load_file(workdir / name)
        assert got.keys() == want.keys()
        for path in want:
            if name == FILES[0]:
                assert (got[path] == want[path]).all(), path
            else:  # sums over processes are taken in another order
                np.testing.assert_allclose(got[path], want[path], rtol=0, atol=1e-6, err_msg=path)


@pytest.mark.parametrize(('count', 'mesh'), [(2, (2, 2)), (4, (4, 1))])
def test_several_processes_leave_what_one_does(start, alone, tmp_path, count, mesh):
    finish(start(count, tmp_path, mesh))
    check_same(tmp_path, alone)


def test_processes_that_find_no_others_say_so_soon():
    alone = """
from sparselora_jax.runtime import processes
try:
    processes.connect()
except processes.ProcessError as error:
    print(error, flush=True)
processes.connect('localhost:1', 2, 1, timeout=2)
"""
    streams = {'capture_output': True, 'text': True, 'cwd': Path(__file__).parents[2]}
    done = subprocess.run([sys.executable, '-c', alone], timeout=60, **streams)
    assert 'pass --coordinator=HOST:PORT' in done.stdout
    assert done.returncode
    assert 'within 2 seconds' in done.stderr
    assert 'is localhost:1 the address of process 0' in done.stderr


def reach(step, workdir, processes):
    """Waits for a checkpoint of this step."""
    while not list(workdir.glob(f'checkpoints/restore/{step}/manifest.json')):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.1)


def test_a_killed_or_terminated_process_ends_the_others_and_the_rerun_resumes_on_any_mesh(start, alone, tmp_path):
    first, second = start(2, tmp_path, pause=1)
    reach(2, tmp_path, (first, second))
    second.kill()
    killed = time.monotonic()
    _, said = first.communicate(timeout=60)
    assert first.returncode != 0
    assert time.monotonic() - killed < 60
    assert 'another process of this run' in said, said[-2000:]
    before = (tmp_path / 'prune.json').read_text()

    both = start(2, tmp_path, pause=1)
    reach(4, tmp_path, both)
    both[1].terminate()
    said = [process.communicate(timeout=60)[1] for process in both]
    assert all('of 6 is saved' in of_process for of_process in said), said

    finish(start(1, tmp_path, mesh=(2, 2)))  # on all four devices, split otherwise
    check_same(tmp_path, alone)
    assert (tmp_path / 'prune.json').read_text() == before
