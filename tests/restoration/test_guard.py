"""Contracts of bad steps: they change nothing, good ones are as without a guard, and too many in a row stop the run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparselora_jax.restoration import guard
from sparselora_jax.restoration.saved_state import Checkpoints
from sparselora_jax.restoration.train import BadStepError, fit, init_state, make_step

ADAM = optax.adamw(1e-2)


def loss(trained, frozen, batch):
    value = jnp.mean(jnp.square(trained * batch - 1))
    return value, {'loss': value}


def batches(count, bad):
    rng = np.random.default_rng(0)
    return [jnp.asarray(bad.get(i, rng.normal(size=3)), jnp.float32) for i in range(count)]


def run(tx, drawn, folder, **knobs):
    seen = []
    checkpoints = Checkpoints(folder)
    state = init_state(jnp.ones(3), tx)
    knobs |= {'steps': len(drawn), 'checkpoints': checkpoints, 'log': lambda step, values: seen.append(values)}
    state = fit(make_step(loss, tx), state, None, drawn, **knobs)
    return state, seen


def test_good_steps_are_those_without_a_guard(tmp_path):
    bad = {2: np.nan * np.ones(3), 3: np.inf * np.ones(3), 15: 1e4 * np.ones(3)}
    drawn = batches(18, bad)
    guarded, seen = run(guard.skip_bad_steps(ADAM, spike=50.0), drawn, tmp_path / 'a', patience=3)
    without = [batch for index, batch in enumerate(drawn) if index not in bad]
    plain, _ = run(ADAM, without, tmp_path / 'b')
    same = jax.tree.map(np.array_equal, (guarded.trained, guarded.optimizer.inner), (plain.trained, plain.optimizer))
    assert jax.tree.all(same)
    assert [int(values['skipped']) for values in seen] == [0, 0, 1, 2] + 11 * [0] + [1, 0, 0]
    assert int(guarded.step) == 18


def test_too_many_in_a_row_stop_the_run(tmp_path):
    bad = {index: np.nan * np.ones(3) for index in (3, 4, 5)}
    with pytest.raises(
        BadStepError, match='step 6: loss is nan, 3 bad steps in a row; the last good state is that of step'
    ):
        run(guard.skip_bad_steps(ADAM), batches(9, bad), tmp_path, patience=3, every=2)


def test_a_spike_stops_the_run_where_none_is_to_be_left_out(tmp_path):
    drawn = batches(14, {12: 1e4 * np.ones(3)})
    with pytest.raises(
        BadStepError, match=r'step 13: the loss has jumped to .*e\+0.; the last good state is that of step 10'
    ):
        run(guard.skip_bad_steps(ADAM, spike=50.0), drawn, tmp_path, every=5)
    run(guard.skip_bad_steps(ADAM), drawn, tmp_path / 'no limit', every=50)
