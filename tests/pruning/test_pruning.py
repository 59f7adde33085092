"""Masks and updates against plain numpy in float64, written from the papers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparselora_jax import pruning
from sparselora_jax.pruning import calibrate
from sparselora_jax.sparse import masks as sparsity


def data(inputs=32, outputs=12, tokens=200):
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(inputs, inputs)) / inputs**0.5 + np.eye(inputs)
    return rng.normal(size=(inputs, outputs)), rng.normal(size=(tokens, inputs)) @ mixing


def lowest(scores, zeros):
    mask = np.ones(scores.size, bool)
    mask[np.argsort(scores.reshape(-1), kind='stable')[:zeros]] = False
    return mask.reshape(scores.shape)


def share(total, end, inputs):
    """What the first slabs have of a kernel's zeros."""
    return total * end // inputs


def numpy_sparsegpt(kernel, hessian, pattern, block, group, damp=0.01):
    """Algorithm 1 of arXiv 2301.00774, weights as [out, in], one column after the other."""
    w, n = kernel.T.copy(), len(hessian)
    inverse = np.linalg.inv(hessian + damp * np.mean(np.diag(hessian)) * np.eye(n))
    u = np.linalg.cholesky(inverse).T
    mask = np.ones(w.shape, bool)
    for j in range(n):
        if pattern.structured and j % pattern.m == 0:
            for row in range(len(w)):
                part = slice(j, j + pattern.m)
                mask[row, part] = lowest(w[row, part] ** 2 / np.diag(u)[part] ** 2, pattern.m - pattern.n)
        if not pattern.structured and j % block == 0:
            part = slice(j, j + block)
            scores = w[:, part] ** 2 / np.diag(u)[part] ** 2
            if group == 'output':
                zeros = share(pattern.zeros(n), min(j + block, n), n) - share(pattern.zeros(n), j, n)
                mask[:, part] = np.stack([lowest(s, zeros) for s in scores])
            else:
                total = pattern.zeros(n * len(w))
                zeros = share(total, min(j + block, n), n) - share(total, j, n)
                mask[:, part] = lowest(scores.T, zeros).T
        error = np.where(mask[:, j], 0, w[:, j]) / u[j, j]
        w[:, j:] -= np.outer(error, u[j, j:])
        w[~mask[:, j], j] = 0
    return w.T, mask.T


@pytest.mark.parametrize('pattern', ['2:4', '4:8', '0.5', '0.6', '0.7'])
@pytest.mark.parametrize(
    ('group', 'block'),
    [
        ('output', 16),
        pytest.param('block', 16, marks=pytest.mark.slow),
        pytest.param('output', 24, marks=pytest.mark.slow),
        ('block', 24),
    ],
)
def test_sparsegpt_equals_numpy_in_float64(pattern, group, block):  # 24 does not divide the inputs
    pattern = sparsity.parse_pattern(pattern)
    kernel, x = data()
    with jax.enable_x64(True):
        method = pruning.SparseGPT(block=block, group=group)
        ours, mask = method(jnp.asarray(kernel), jnp.asarray(x.T @ x), pattern)
        ours, mask = np.asarray(ours), np.asarray(mask)
    want, want_mask = numpy_sparsegpt(kernel, x.T @ x, pattern, block, group)
    np.testing.assert_array_equal(mask, want_mask)
    np.testing.assert_allclose(ours, want, rtol=1e-8, atol=1e-10)
    sparsity.check_masks(
        {'kernel': jnp.asarray(mask)}, [('.*', pattern)], group='matrix' if group == 'block' else group
    )


@pytest.mark.parametrize('pattern', ['2:4', '0.5'])
def test_sparsegpt_in_fp32_agrees_and_reconstructs(pattern):
    pattern = sparsity.parse_pattern(pattern)
    kernel, x = data(inputs=128, outputs=64, tokens=1000)
    fp32 = jnp.asarray(kernel, jnp.float32), jnp.asarray(x.T @ x, jnp.float32)
    ours, mask = pruning.SparseGPT(block=32)(*fp32, pattern)
    want, want_mask = numpy_sparsegpt(kernel, x.T @ x, pattern, 32, 'output')
    assert np.mean(np.asarray(mask) == want_mask) >= 0.995

    def error(w):
        return np.linalg.norm(x @ (w - kernel)) / np.linalg.norm(x @ kernel)

    assert abs(error(np.asarray(ours)) - error(want)) < 1e-3
    magnitude, _ = pruning.Magnitude()(fp32[0], None, pattern)
    assert error(np.asarray(ours)) < error(np.asarray(magnitude))


def numpy_mask(scores, pattern, group):
    if group == 'matrix' and not pattern.structured:
        return lowest(scores, pattern.zeros(scores.size))
    size = pattern.m or len(scores)
    return np.stack(
        [np.concatenate([lowest(p, pattern.zeros(size)) for p in s.reshape(-1, size)]) for s in scores.T], axis=1
    )


@pytest.mark.parametrize('pattern', ['2:4', '4:8', '0.5', '0.7'])
@pytest.mark.parametrize('group', ['output', 'matrix'])
@pytest.mark.parametrize('name', ['wanda', 'magnitude'])
def test_wanda_and_magnitude_equal_numpy(name, pattern, group):
    kernel, x = data()
    pattern = sparsity.parse_pattern(pattern)
    method = pruning.Wanda(group=group) if name == 'wanda' else pruning.Magnitude(group=group)
    scores = np.abs(kernel) * (np.linalg.norm(x, axis=0)[:, None] if name == 'wanda' else 1)
    want = numpy_mask(scores, pattern, group)
    squares = np.sum(x**2, axis=0)
    with jax.enable_x64(True):
        pruned, mask = method(jnp.asarray(kernel), jnp.asarray(squares) if name == 'wanda' else None, pattern)
        np.testing.assert_array_equal(mask, want)
        np.testing.assert_array_equal(pruned, np.where(want, kernel, 0))
    fp32 = jnp.asarray(kernel, jnp.float32), jnp.asarray(squares, jnp.float32) if name == 'wanda' else None
    assert np.mean(np.asarray(method(*fp32, pattern)[1]) == want) >= 0.995


def test_dead_inputs_neither_survive_nor_break_the_hessian():
    kernel, x = data()
    x[:, 5] = 0
    ours, mask = pruning.SparseGPT(block=16)(
        jnp.asarray(kernel, jnp.float32), jnp.asarray(x.T @ x, jnp.float32), sparsity.parse_pattern('2:4')
    )
    assert np.isfinite(ours).all()
    assert not np.asarray(ours)[5].any()
    assert not sparsity.violations(mask, sparsity.parse_pattern('2:4'))


def test_random_is_reproducible_and_exact():
    kernel = jnp.arange(64.0).reshape(16, 4)
    masks = [pruning.Random(seed)(kernel, None, sparsity.parse_pattern('2:4'))[1] for seed in (0, 0, 1)]
    assert jnp.array_equal(masks[0], masks[1])
    assert not jnp.array_equal(masks[0], masks[2])
    other_layer = pruning.Random(0)(kernel + 1, None, sparsity.parse_pattern('2:4'))[1]
    assert not jnp.array_equal(masks[0], other_layer)
    assert not sparsity.violations(masks[2], sparsity.parse_pattern('2:4'))


def test_block_that_does_not_fit_is_refused():
    with pytest.raises(sparsity.PatternError, match='block 6 does not fit 32 inputs and pattern 2:4'):
        pruning.SparseGPT(block=6)(jnp.ones((32, 4)), jnp.eye(32), sparsity.parse_pattern('2:4'))


@pytest.mark.parametrize('pattern', ['3:6', '1:3'])
def test_groups_need_not_be_a_power_of_two(pattern):
    pattern = sparsity.parse_pattern(pattern)
    kernel, x = data(inputs=36)
    squares = np.sum(x**2, axis=0)
    with jax.enable_x64(True):
        _, wanda = pruning.Wanda()(jnp.asarray(kernel), jnp.asarray(squares), pattern)
        ours, mask = pruning.SparseGPT(block=18)(jnp.asarray(kernel), jnp.asarray(x.T @ x), pattern)
        want, want_mask = numpy_sparsegpt(kernel, x.T @ x, pattern, 18, 'output')
        np.testing.assert_array_equal(mask, want_mask)
        np.testing.assert_allclose(ours, want, rtol=1e-8, atol=1e-10)
    np.testing.assert_array_equal(wanda, numpy_mask(np.abs(kernel) * np.sqrt(squares)[:, None], pattern, 'output'))


@pytest.mark.parametrize('pattern', ['2:4', '0.5'])
def test_fewer_samples_than_inputs_need_only_damping(pattern):
    pattern = sparsity.parse_pattern(pattern)
    kernel, x = data(tokens=10)
    assert np.linalg.matrix_rank(x.T @ x) == 10
    with jax.enable_x64(True):
        ours, mask = pruning.SparseGPT(block=16)(jnp.asarray(kernel), jnp.asarray(x.T @ x), pattern)
    want, want_mask = numpy_sparsegpt(kernel, x.T @ x, pattern, 16, 'output')
    np.testing.assert_array_equal(mask, want_mask)
    np.testing.assert_allclose(ours, want, rtol=1e-6, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['wanda', 'sparsegpt'])
def test_weights_and_calibration_in_bf16_are_scored_in_fp32(name):
    pattern = sparsity.parse_pattern('2:4')
    kernel, x = (jnp.asarray(array, jnp.bfloat16) for array in data(inputs=64, outputs=32, tokens=600))
    exact, inputs = np.asarray(kernel, np.float64), np.asarray(x, np.float64)
    if name == 'wanda':
        ours, mask = pruning.Wanda()(kernel, calibrate.squares(x), pattern)
        want_mask = numpy_mask(np.abs(exact) * np.linalg.norm(inputs, axis=0)[:, None], pattern, 'output')
    else:
        ours, mask = pruning.SparseGPT(block=32)(kernel, calibrate.hessian(x), pattern)
        _, want_mask = numpy_sparsegpt(exact, inputs.T @ inputs, pattern, 32, 'output')
    assert ours.dtype == jnp.bfloat16
    assert np.mean(np.asarray(mask) == want_mask) >= 0.995


def test_of_equal_scores_the_earlier_input_is_pruned_first():
    kernel = jnp.ones((8, 3)) * jnp.array([1.0, -1.0, 1.0])
    for pattern in ('2:4', '0.5'):
        _, mask = pruning.Wanda()(kernel, jnp.ones(8), sparsity.parse_pattern(pattern))
        want = [False, False, True, True] * 2 if pattern == '2:4' else [False] * 4 + [True] * 4
        np.testing.assert_array_equal(mask, np.tile(np.array(want)[:, None], 3))
