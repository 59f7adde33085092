"""Contracts of the loop: an interrupted run that goes on ends bit-identical; a loss that is not finite stops it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import optax
import pytest

from sparselora_jax.restoration.saved_state import Checkpoints
from sparselora_jax.restoration.train import BadStepError, fit, init_state, make_step

SCRIPT = """
import sys, time
import jax, jax.numpy as jnp, numpy as np
import sparselora_jax as sl
from sparselora_jax.restoration.saved_state import Checkpoints
from sparselora_jax.models import llama
from sparselora_jax.models.init import init_params
from sparselora_jax.restoration.train import Interrupted, fit

cfg = llama.LlamaConfig(vocab=16, width=16, depth=2, heads=4, kv_heads=2, mlp_width=24)
params = init_params(jax.random.key(0), llama.shapes(cfg), std=1.0)
_, masks = sl.prune_tree(params, None, [('.*', '2:4')], method=sl.Magnitude())
lora = sl.init_lora(jax.random.key(1), params, [('.*', sl.LoraSpec(4, 8))])
class Batches:
    def __getitem__(self, step):
        tokens = jnp.asarray(np.random.default_rng(step).integers(0, 16, (4, 6)), jnp.int32)
        return {'tokens': tokens, 'targets': tokens, 'answer': jnp.ones((4, 6), bool)}
def forward(w, batch):
    x = llama.embed_tokens(w, cfg, batch['tokens'])
    return llama.head(w, cfg, llama.forward(w, cfg, x, jnp.ones(batch['tokens'].shape, bool)))
def log(step, metrics):
    print(step, flush=True)
    time.sleep(float(sys.argv[2]))
tx = sl.paper_optimizer(12, peak=1e-2, warmup=3)
step = sl.make_train_step(forward, tx)
frozen, state = sl.Frozen(params, masks), sl.init_state(lora, tx)
try:
    state = fit(step, state, frozen, Batches(), steps=12, checkpoints=Checkpoints(sys.argv[1] + '/c'), every=3, log=log)
except Interrupted as error:
    sys.exit(130)
sl.save_safetensors(sys.argv[1] + '/lora.safetensors', state.trained)
"""


def start(script: str, folder: Path, argument: object, compiled: Path) -> subprocess.Popen:
    cache = {
        'JAX_COMPILATION_CACHE_DIR': str(compiled),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    }
    env = os.environ | {'XLA_FLAGS': ''} | cache
    command = [sys.executable, '-c', script, str(folder), str(argument)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def last_line(process: subprocess.Popen) -> int:
    return int(process.communicate(timeout=120)[0].split()[-1])


@pytest.fixture(scope='module')
def whole(tmp_path_factory, compiled_once):
    """The folder of a run that nobody interrupts."""
    folder = tmp_path_factory.mktemp('runs') / 'whole'
    assert last_line(start(SCRIPT, folder, 0, compiled_once)) == 12
    return folder


@pytest.mark.processes
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGKILL])
def test_interrupted_and_resumed_is_bit_identical(tmp_path, whole, compiled_once, number):
    cut = tmp_path / 'cut'
    process = start(SCRIPT, cut, 0.3, compiled_once)
    for line in process.stdout:
        if int(line) == 5:
            while not Checkpoints(cut / 'c').steps() and process.poll() is None:  # written beside the steps
                time.sleep(0.02)
            process.send_signal(number)
            break
    process.communicate(timeout=120)
    assert process.returncode == (130 if number == signal.SIGTERM else -signal.SIGKILL)
    kept = Checkpoints(cut / 'c').steps()[-1]
    assert kept >= 5 if number == signal.SIGTERM else kept == 3
    again = start(SCRIPT, cut, 0, compiled_once)
    first = int(again.stdout.readline())
    assert first == kept + 1
    assert last_line(again) == 12
    assert (cut / 'lora.safetensors').read_bytes() == (whole / 'lora.safetensors').read_bytes()


def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_last_state(tmp_path):
    def loss(trained, frozen, batch):
        value = jnp.sum(trained * batch)
        return value, {'loss': value}

    batches = [jnp.ones(2), jnp.ones(2), jnp.full(2, jnp.nan)]
    tx = optax.sgd(0.1)
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(BadStepError, match='step 3: loss is nan; the last good state is that of step 2'):
        fit(make_step(loss, tx), init_state(jnp.ones(2), tx), None, batches, steps=3, checkpoints=checkpoints, every=1)
    assert checkpoints.steps() == [1, 2]


ENDS = """
import resource, sys
import jax.numpy as jnp
import optax
from sparselora_jax.restoration.saved_state import CheckpointError, Checkpoints
from sparselora_jax.restoration.train import fit, init_state, make_step

class Batches:
    def __getitem__(self, index):
        if index == 4:
            sys.exit('train.jsonl, line 5: no image')
        return jnp.ones(2)
def loss(trained, frozen, batch):
    value = sum(jnp.sum(leaf) for leaf in trained.values()) * jnp.sum(batch)
    return value, {'loss': value}
def log(step, metrics):
    if step == 4 and sys.argv[2] == 'loop':
        sys.exit('train.jsonl, line 5: no image')
    if sys.argv[2] == 'full disk':
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))
steps = 3 if sys.argv[2] in ('last step', 'full disk') else 9
tx = optax.sgd(0.0)
state = init_state({str(index): jnp.ones((1000, 1000)) for index in range(16)}, tx)
checkpoints = Checkpoints(sys.argv[1])
try:
    fit(make_step(loss, tx), state, None, Batches(), steps=steps, checkpoints=checkpoints, every=3, log=log)
except CheckpointError as error:
    sys.exit(str(error))
"""


@pytest.mark.processes
@pytest.mark.parametrize('way_out', ['data', 'loop', 'last step'])
def test_a_checkpoint_is_complete_however_the_loop_ends(tmp_path, compiled_once, way_out):
    process = start(ENDS, tmp_path / 'c', way_out, compiled_once)
    _, errors = process.communicate(timeout=120)
    assert Checkpoints(tmp_path / 'c').steps() == [3]
    assert errors.splitlines() == ([] if way_out == 'last step' else ['train.jsonl, line 5: no image'])


@pytest.mark.processes
def test_a_full_disk_is_named_once_and_orbax_logs_no_traceback_of_it(tmp_path, compiled_once):
    process = start(ENDS, tmp_path / 'c', 'full disk', compiled_once)
    _, errors = process.communicate(timeout=120)
    assert errors.count(f'{tmp_path}/c/3 cannot be written') == 1
    assert 'ERROR:absl' not in errors  # threads of C++ may still print that nobody listens to them any more


def test_a_tree_can_be_used_after_the_steps_that_began_with_it():
    def loss(trained, frozen, batch):
        value = jnp.sum(trained['a'] * batch)
        return value, {'loss': value}

    tx = optax.sgd(0.1)
    tree = {'a': jnp.ones(2)}
    state = init_state(tree, tx)
    assert state.trained['a'].sharding == tree['a'].sharding
    make_step(loss, tx)(state, None, jnp.ones(2))
    assert tree['a'].tolist() == [1.0, 1.0]


def test_the_next_batch_is_drawn_before_a_steps_numbers_are_waited_for(tmp_path):
    events = []

    class Batches:
        def __getitem__(self, index):
            events.append(f'batch {index}')
            return jnp.ones(2)

    def loss(trained, frozen, batch):
        value = jnp.sum(trained * batch)
        return value, {'loss': value}

    tx, knobs = optax.sgd(0.1), {'steps': 3, 'checkpoints': Checkpoints(tmp_path)}
    knobs['log'] = lambda step, metrics: events.append(f'step {step} done')
    state = fit(make_step(loss, tx), init_state(jnp.ones(2), tx), None, Batches(), **knobs)
    assert events == ['batch 0', 'batch 1', 'step 1 done', 'batch 2', 'step 2 done', 'step 3 done']
    fit(make_step(loss, tx), state, None, Batches(), **knobs)
    assert len(events) == 6  # nothing was left to do
