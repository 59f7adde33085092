"""A teacher's likeliest tokens on disk: what is read is what was kept, nothing is computed twice."""

import jax.numpy as jnp
import numpy as np
import pytest

import sparselora_jax as sl
from sparselora_jax.restoration import losses, teacher

BATCHES = [{'x': np.random.default_rng(seed).normal(size=(2, 3, 5)).astype(np.float32)} for seed in range(3)]
KNOBS = {'steps': 3, 'k': 2, 'temperature': 2.0}


def logits(weights, batch):
    return batch['x'] @ weights


def test_what_is_read_is_what_was_kept(tmp_path):
    weights = jnp.asarray(np.random.default_rng(9).normal(size=(5, 7)), jnp.float32)
    size = teacher.keep(tmp_path, logits, weights, BATCHES, **KNOBS)
    assert size == sum(file.stat().st_size for file in tmp_path.iterdir())
    for step, batch in enumerate(BATCHES):
        got, want = teacher.read(tmp_path, step), losses.top_k(logits(weights, batch), 2)
        np.testing.assert_array_equal(got.tokens, want.tokens)
        np.testing.assert_allclose(got.log_probs, want.log_probs, rtol=1e-5)


def test_what_is_there_is_not_computed_again(tmp_path):
    weights, done = jnp.ones((5, 7)), []
    teacher.keep(tmp_path, logits, weights, BATCHES, **KNOBS | {'steps': 2})
    before = (tmp_path / '000000.safetensors').read_bytes()
    teacher.keep(tmp_path, logits, 2 * weights, BATCHES, **KNOBS, progress=done.append)
    assert done == [3]
    assert (tmp_path / '000000.safetensors').read_bytes() == before


def test_what_is_damaged_or_of_another_run_is_computed_again(tmp_path, capsys):
    weights, done = jnp.ones((5, 7)), []
    teacher.keep(tmp_path, logits, weights, BATCHES, **KNOBS)
    files = sorted(tmp_path.iterdir())
    before = [file.read_bytes() for file in files]
    teacher.keep(tmp_path / 'other', logits, weights, BATCHES, **KNOBS, owner='you')
    files[0].write_bytes(before[0][:-1] + bytes([before[0][-1] ^ 1]))
    files[1].write_bytes(before[1][:50])
    (tmp_path / 'other' / files[2].name).replace(files[2])
    teacher.keep(tmp_path, logits, weights, BATCHES, **KNOBS, progress=done.append)
    assert done == [1, 2, 3]
    assert [file.read_bytes() for file in files] == before
    assert capsys.readouterr().err.count('safetensors: damaged, or of another run; it is computed again') == 3


def test_what_is_missing_or_damaged_is_named(tmp_path):
    with pytest.raises(sl.StorageError, match=r'000004.safetensors: no such file'):
        teacher.read(tmp_path, 4)
    sl.save_safetensors(tmp_path / '000004.safetensors', {'tokens': jnp.ones(2)})
    with pytest.raises(sl.StorageError, match=r"holds \['tokens'\], expected tokens, log_probs"):
        teacher.read(tmp_path, 4)
