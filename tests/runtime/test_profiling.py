"""The trace of a few training steps, read back by JAX's own reader: those steps and no others, each with its batch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparselora_jax.restoration.saved_state import Checkpoints
from sparselora_jax.restoration.train import BadStepError, fit, init_state, make_step
from sparselora_jax.runtime import profiling


def loss(trained, frozen, batch):
    value = jnp.sum(trained * batch)
    return value, {'loss': value}


def run(folder, batches):
    """A step for each batch, with a trace."""
    tx = optax.sgd(0.1)
    fit(
        make_step(loss, tx),
        init_state(jnp.ones(2), tx),
        None,
        batches,
        steps=len(batches),
        checkpoints=Checkpoints(folder / 'checkpoints'),
        profile=folder,
    )


def read(folder):
    """{name: [(start, end, stats)]} of a trace, in nanoseconds."""
    (file,) = folder.glob('plugins/profile/*/*.xplane.pb')
    events = {}
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        for event in (event for line in plane.lines for event in line.events):
            end = event.start_ns + event.duration_ns
            events.setdefault(event.name, []).append((event.start_ns, end, dict(event.stats)))
    return events


def test_the_third_to_fifth_steps_of_a_run_are_traced_each_with_its_batch(tmp_path):
    run(tmp_path, [np.ones(2, np.float32)] * 7)
    events = read(tmp_path)
    steps, batches = events[profiling.STEP], events[profiling.DATA]
    assert [stats['step_num'] for *_, stats in steps] == [3, 4, 5]
    assert len(batches) == 3
    for (start, end, _), (first, last, _) in zip(steps, batches, strict=True):
        assert start <= first <= last <= end
    work = [start for of_name in events.values() for start, _, stats in of_name if 'hlo_op' in stats]
    assert all(any(start <= at <= end for at in work) for start, end, _ in steps)


def test_a_run_that_ends_within_the_trace_leaves_it(tmp_path):
    with pytest.raises(BadStepError):
        run(tmp_path, [np.ones(2, np.float32)] * 3 + [np.full(2, np.nan, np.float32)] * 2)
    assert [stats['step_num'] for *_, stats in read(tmp_path)[profiling.STEP]] == [3, 4]


def test_a_run_of_fewer_steps_says_that_there_is_no_trace(tmp_path, capsys):
    run(tmp_path, [np.ones(2, np.float32)] * 2)
    assert 'profile: no trace, since 2 steps are left' in capsys.readouterr().out
    assert not (tmp_path / 'plugins').exists()
