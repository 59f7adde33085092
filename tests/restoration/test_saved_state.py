"""Contracts of checkpoints: read back bit for bit, damage falls back, a full disk loses nothing."""

import json
import math
import os
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_disk import files_of_at_most

import sparselora_jax as sl
from sparselora_jax.restoration.saved_state import CheckpointError, Checkpoints
from sparselora_jax.sparse import sharding


def state(value):
    lora = {'q': {'kernel': sl.Lora(jnp.full((3, 2), value), jnp.ones((2, 4)), 2.0)}}
    return sl.init_state(lora, optax.adamw(1e-3))


def test_read_back_bit_for_bit_and_only_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.restore(state(0.0)) is None
    for step in (1, 2, 3):
        checkpoints.save(step, state(step / 3))
    assert checkpoints.steps() == [2, 3]
    got = checkpoints.restore(state(0.0))
    assert got.trained['q']['kernel'].scale == 2.0
    np.testing.assert_array_equal(got.trained['q']['kernel'].a, state(1.0).trained['q']['kernel'].a)


def test_what_four_devices_saved_is_read_on_any_mesh(tmp_path):
    lora = {'blocks': {'attn': {'q': {'kernel': sl.Lora(jnp.ones((1, 4, 2)), jnp.ones((1, 2, 8)), 2.0)}}}}
    one_device = sl.init_state(lora, optax.adamw(1e-3))

    def on(**axes):
        mesh = sharding.make_mesh(**axes, devices=jax.devices()[: math.prod(axes.values())])
        return sharding.everywhere(sl.init_state(sharding.shard(lora, mesh), optax.adamw(1e-3)), mesh)

    values = jax.tree.map(lambda leaf: jnp.arange(leaf.size, dtype=leaf.dtype).reshape(leaf.shape) + 1, one_device)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, jax.device_put(values, jax.tree.map(lambda leaf: leaf.sharding, on(fsdp=2, tensor=2))))
    for like in (one_device, on(fsdp=2), on(data=2, tensor=2)):
        got = checkpoints.restore(like)
        jax.tree.map(np.testing.assert_array_equal, got, values)
        assert all(a.sharding == b.sharding for a, b in zip(*map(jax.tree.leaves, (got, like)), strict=True))


def test_a_damaged_checkpoint_falls_back_and_says_so(tmp_path):
    said = []
    checkpoints = Checkpoints(tmp_path, warn=said.append)
    for step in (1, 2):
        checkpoints.save(step, state(float(step)))
    checkpoints.finish()
    victim = max((p for p in (tmp_path / '2').rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    assert float(checkpoints.restore(state(0.0)).trained['q']['kernel'].a[0, 0]) == 1.0
    assert len(said) == 1
    assert '2: the checkpoint is damaged' in said[0]


def damage(file, how):
    """Flip a bit in the middle of a file, or cut it there."""
    data = bytearray(file.read_bytes())
    middle = len(data) // 2
    if how == 'flip':
        data[middle] ^= 1
    file.write_bytes(data if how == 'flip' else data[:middle])


@pytest.mark.parametrize('how', ['flip', 'truncate'])
def test_damage_of_any_file_is_named_or_changes_nothing(tmp_path, how):
    """What Orbax keeps beside the arrays (times, a note that it is done) is not read back."""
    warnings = []
    checkpoints = Checkpoints(tmp_path / 'whole', warn=warnings.append)
    for step in (1, 2):
        checkpoints.save(step, state(float(step)))
    checkpoints.finish()
    files = [file.relative_to(tmp_path / 'whole') for file in (tmp_path / 'whole/2').rglob('*') if file.is_file()]
    assert len(files) > 5
    for index, file in enumerate(files):
        copy = shutil.copytree(tmp_path / 'whole', tmp_path / str(index))
        damage(copy / file, how)
        warnings.clear()
        value = float(Checkpoints(copy, warn=warnings.append).restore(state(0.0)).trained['q']['kernel'].a[0, 0])
        assert (value, len(warnings)) in ((1.0, 1), (2.0, 0)), file
        assert '/d/' not in str(file) or value == 1.0, file  # arrays


def test_a_checkpoint_has_its_manifest_as_soon_as_it_has_its_name(tmp_path):
    """So a process that is killed leaves no folder that looks whole and is not."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {'a': jnp.ones((1000, 1000))})
    while not (tmp_path / '1').exists():
        time.sleep(0.001)
    assert (tmp_path / '1/manifest.json').exists()
    checkpoints.finish()


def test_damaged_checkpoints_never_displace_a_new_one(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, warn=lambda message: None)
    for step in (75, 100):
        checkpoints.save(step, state(1.0))
        checkpoints.finish()
        (tmp_path / str(step) / 'manifest.json').write_text('{}')
    assert checkpoints.restore(state(0.0)) is None
    checkpoints.save(25, state(2.0))
    assert checkpoints.steps() == [25]
    assert float(checkpoints.restore(state(0.0)).trained['q']['kernel'].a[0, 0]) == 2.0


def test_an_unfinished_checkpoint_is_not_read(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, state(float(step)))
    checkpoints.finish()
    (tmp_path / '2' / 'manifest.json').unlink()
    assert checkpoints.steps() == [1]
    checkpoints.save(2, state(5.0))  # and is written over
    assert float(checkpoints.restore(state(0.0)).trained['q']['kernel'].a[0, 0]) == 5.0


def test_a_truncated_manifest_counts_as_damage(tmp_path):
    said = []
    checkpoints = Checkpoints(tmp_path, warn=said.append)
    for step in (1, 2):
        checkpoints.save(step, state(float(step)))
    checkpoints.finish()
    manifest = tmp_path / '2' / 'manifest.json'
    manifest.write_text(json.dumps({})[:1])
    assert float(checkpoints.restore(state(0.0)).trained['q']['kernel'].a[0, 0]) == 1.0
    assert said


def test_a_full_disk_is_named_and_keeps_what_was_there(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(1.0))
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(100, 100, 0))
    with pytest.raises(CheckpointError, match='0 MiB free on this disk'):
        checkpoints.save(2, state(2.0))
    assert checkpoints.steps() == [1]


def test_steps_go_on_while_a_state_is_written(tmp_path):
    """What is saved is the state at that step, although the next step is given its buffers."""
    step = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)
    tree = {str(index): jnp.full((500, 1000), index, jnp.float32) for index in range(8)}
    checkpoints = Checkpoints(tmp_path, keep=10)
    for done in range(1, 31):
        tree = step(tree)
        if done % 10 == 0:
            checkpoints.save(done, tree)
    checkpoints.finish()
    like = jax.tree.map(jnp.zeros_like, tree)
    for done in (30, 20, 10):
        got = checkpoints.restore(like)
        assert all(bool((leaf == int(name) + done).all()) for name, leaf in got.items())
        shutil.rmtree(tmp_path / str(done))


def test_what_goes_wrong_while_writing_is_said_at_the_next_save(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(1.0))
    checkpoints.finish()
    with files_of_at_most(10):
        checkpoints.save(2, state(2.0))
        with pytest.raises(CheckpointError, match=r'/2 cannot be written .*; the checkpoints before it stay'):
            checkpoints.save(3, state(3.0))
    assert checkpoints.steps() == [1]
    checkpoints.save(3, state(3.0))
    assert checkpoints.steps() == [1, 3]


def test_an_error_stays_the_error_and_the_writer_is_waited_for(tmp_path):
    warnings = []
    checkpoints = Checkpoints(tmp_path, warn=warnings.append)

    def save_and_fail(step):
        with checkpoints:
            checkpoints.save(step, state(float(step)))
            raise KeyError('lost')

    with pytest.raises(KeyError, match='lost'):
        save_and_fail(1)
    assert (tmp_path / '1/manifest.json').exists()
    with files_of_at_most(10), pytest.raises(KeyError, match='lost'):
        save_and_fail(2)
    assert len(warnings) == 1
    assert '/2 cannot be written' in warnings[0]
    assert checkpoints.steps() == [1]


def test_a_clock_that_jumps_back_changes_nothing(tmp_path, monkeypatch):
    hours = iter(range(1_000_000, 0, -1))
    monkeypatch.setattr(time, 'time', lambda: 3600.0 * next(hours))
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, state(step / 3))
    assert checkpoints.steps() == [2, 3]
    for file in (tmp_path / '3').rglob('*'):
        os.utime(file, (0, 0))
    assert float(checkpoints.restore(state(0.0)).trained['q']['kernel'].a[0, 0]) == 1.0
