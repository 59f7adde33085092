"""ADMM against plain numpy in float64, written from the paper, and against what it is meant to improve on."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from sparselora_jax import pruning
from sparselora_jax.pruning.calibrate import InputStatistic
from sparselora_jax.sparse.masks import violations
from sparselora_jax.sparse.patterns import PatternError, parse_pattern


def correlated(inputs=32, outputs=12, tokens=200, seed=0):
    """A kernel, and inputs that depend on each other and differ in size."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(inputs, inputs)) / inputs**0.5 + np.eye(inputs)
    x = rng.normal(size=(tokens, inputs)) @ mixing * rng.uniform(0.2, 3.0, size=inputs)
    return rng.normal(size=(inputs, outputs)), x


def numpy_mask(scores, pattern, group, total, missing):
    """Prune the lowest scores: all but a part `missing` of the final zeros."""
    mask = np.ones(scores.shape, bool)
    may_be_pruned = np.ones(scores.shape, bool)
    if pattern.structured:
        for output in range(scores.shape[1]):
            for start in range(0, len(scores), pattern.m):
                order = start + np.argsort(scores[start : start + pattern.m, output], kind='stable')
                may_be_pruned[order[pattern.m - pattern.n :], output] = False
    places = [np.unravel_index(np.arange(scores.size), scores.shape)]
    if pattern.structured or group == 'output':
        places = [(np.arange(len(scores)), np.full(len(scores), output)) for output in range(scores.shape[1])]
    for place, of_group in zip(places, np.broadcast_to(total, len(places)), strict=True):
        zeros = of_group - int(of_group * missing)
        candidates = np.flatnonzero(may_be_pruned[place])
        lowest = candidates[np.argsort(scores[place][candidates], kind='stable')[:zeros]]
        mask[place[0][lowest], place[1][lowest]] = False
    return mask


def numpy_admm(kernel, hessian, pattern, method, total=None, mask=None):
    """W, Z and U as the paper has them, each iteration with a linear solve; `mask` is a given one."""
    norms = np.sqrt(np.diag(hessian))
    gram = hessian / np.outer(norms, norms) + method.ridge * np.eye(len(kernel))
    w0 = kernel * norms[:, None]
    if total is None:
        total = pattern.zeros(kernel.size if method.group == 'matrix' and not pattern.structured else len(kernel))
    w, u, is_given = w0, np.zeros_like(w0), mask is not None
    for step in range(1, method.iterations + 1):
        if step <= method.growth and not is_given:
            missing = ((method.growth - step) / method.growth) ** 3
            mask = numpy_mask(np.abs(w + u), pattern, method.group, total, missing)
        z = np.where(mask, w + u, 0)
        u = u + w - z
        w = np.linalg.solve(gram + method.rho * np.eye(len(gram)), gram @ w0 + method.rho * (z - u))
    return np.where(mask, w + u, 0) / norms[:, None], mask


def error(pruned, kernel, x):
    """The squared error of the outputs, relative to the outputs."""
    return np.linalg.norm(x @ (np.asarray(pruned, np.float64) - kernel)) ** 2 / np.linalg.norm(x @ kernel) ** 2


def fp32(kernel, x):
    return jnp.asarray(kernel, jnp.float32), jnp.asarray(x.T @ x, jnp.float32)


@pytest.mark.parametrize('pattern', ['2:4', '4:8', '1:3', '0.5', '0.7'])
@pytest.mark.parametrize(
    'options', [{}, {'group': 'matrix'}, {'ridge': 0.01, 'rho': 0.3, 'iterations': 9, 'growth': 4}]
)
def test_equals_numpy_in_float64(pattern, options):
    pattern = parse_pattern(pattern)
    kernel, x = correlated(inputs=48)
    method = pruning.ADMM(**options)
    with jax.enable_x64(True):
        ours, mask = method(jnp.asarray(kernel), jnp.asarray(x.T @ x), pattern)
        ours, mask = np.asarray(ours), np.asarray(mask)
    want, want_mask = numpy_admm(kernel, x.T @ x, pattern, method)
    np.testing.assert_array_equal(mask, want_mask)
    np.testing.assert_allclose(ours, want, rtol=1e-8, atol=1e-10)
    assert not violations(jnp.asarray(mask), pattern, method.group)


@pytest.mark.slow
def test_in_fp32_it_agrees_with_float64():
    kernel, x = correlated(inputs=128, outputs=64, tokens=1000)
    for pattern in map(parse_pattern, ('2:4', '0.5')):
        ours, mask = pruning.ADMM()(*fp32(kernel, x), pattern)
        want, want_mask = numpy_admm(kernel, x.T @ x, pattern, pruning.ADMM())
        assert np.mean(np.asarray(mask) == want_mask) >= 0.995
        assert abs(error(ours, kernel, x) - error(want, kernel, x)) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize('pattern', ['2:4', '0.5', '0.7'])
@pytest.mark.parametrize('seed', [0, 1])
def test_the_error_is_below_that_of_wanda_and_of_sparsegpt(pattern, seed):
    pattern = parse_pattern(pattern)
    kernel, x = correlated(inputs=64, outputs=48, tokens=600, seed=seed)
    weights, hessian = fp32(kernel, x)
    ours, _ = pruning.ADMM()(weights, hessian, pattern)
    wanda, _ = pruning.Wanda()(weights, jnp.diagonal(hessian), pattern)
    sparsegpt, _ = pruning.SparseGPT(block=16)(weights, hessian, pattern)
    assert error(ours, kernel, x) < error(sparsegpt, kernel, x) < error(wanda, kernel, x)


@pytest.mark.slow
def test_a_growing_mask_is_better_than_wandas():
    kernel, x = correlated(inputs=64, outputs=48, tokens=600)
    for pattern in map(parse_pattern, ('2:4', '0.5', '0.7')):
        grown, _ = pruning.ADMM()(*fp32(kernel, x), pattern)
        at_once, _ = pruning.ADMM(growth=1)(*fp32(kernel, x), pattern)
        assert error(grown, kernel, x) < error(at_once, kernel, x)


@pytest.mark.slow
def test_with_growth_of_one_the_mask_is_wandas():
    kernel, x = correlated()
    for pattern in map(parse_pattern, ('2:4', '0.5')):
        with jax.enable_x64(True):
            hessian = jnp.asarray(x.T @ x)
            _, mask = pruning.ADMM(growth=1)(jnp.asarray(kernel), hessian, pattern)
            _, wanda = pruning.Wanda()(jnp.asarray(kernel), jnp.diagonal(hessian), pattern)
        np.testing.assert_array_equal(mask, wanda)


def test_a_given_mask_is_kept_and_its_weights_come_near_the_best_ones():
    kernel, x = correlated()
    method = pruning.ADMM(ridge=0.0, iterations=400)
    mask = np.random.default_rng(3).random(kernel.shape) < 0.6
    with jax.enable_x64(True):
        few = np.asarray(pruning.ADMM().refit(jnp.asarray(kernel), jnp.asarray(x.T @ x), jnp.asarray(mask)))
        ours = np.asarray(method.refit(jnp.asarray(kernel), jnp.asarray(x.T @ x), jnp.asarray(mask)))
    np.testing.assert_allclose(
        few, numpy_admm(kernel, x.T @ x, None, pruning.ADMM(), 0, mask)[0], rtol=1e-8, atol=1e-10
    )
    assert not ours[~mask].any()
    best = np.zeros_like(kernel)
    for output in range(kernel.shape[1]):
        kept = mask[:, output]
        best[kept, output] = np.linalg.lstsq(x[:, kept], x @ kernel[:, output], rcond=None)[0]
    masked_alone = error(np.where(mask, kernel, 0), kernel, x)
    assert error(best, kernel, x) <= error(ours, kernel, x) < 1.001 * error(best, kernel, x)
    assert error(few, kernel, x) < 1.1 * error(best, kernel, x) < masked_alone


def test_each_output_has_its_own_number_of_zeros_without_another_compilation():
    kernel, x = correlated()
    traces = []

    @jax.jit
    def prune(kernel, hessian, zeros):
        traces.append(zeros)
        return pruning.ADMM()(kernel, hessian, parse_pattern('0.5').kind, zeros)

    for zeros in (np.arange(12, dtype=np.int32), np.full(12, 31, np.int32), np.zeros(12, np.int32)):
        ours, mask = prune(*fp32(kernel, x), zeros)
        np.testing.assert_array_equal(np.sum(~np.asarray(mask), axis=0), zeros)
        want, _ = numpy_admm(kernel, x.T @ x, parse_pattern('0.5'), pruning.ADMM(), zeros)
        np.testing.assert_allclose(ours, want, rtol=0.05, atol=2e-3)
    assert len(traces) == 1
    # Nothing is pruned, so nothing has to be made up for.
    np.testing.assert_allclose(ours, kernel, rtol=1e-5, atol=1e-6)


def test_of_equal_scores_the_earlier_input_is_pruned_first():
    for pattern, want in (('2:4', [False, False, True, True] * 2), ('0.5', [False] * 4 + [True] * 4)):
        _, mask = pruning.ADMM(growth=1)(jnp.ones((8, 3)), jnp.eye(8), parse_pattern(pattern))
        np.testing.assert_array_equal(mask, np.tile(np.array(want)[:, None], 3))


@pytest.mark.parametrize('pattern', ['2:4', '0.5'])
def test_dead_inputs_are_pruned_first_and_do_not_break_the_hessian(pattern):
    kernel, x = correlated()
    x[:, [5, 6]] = 0
    ours, mask = pruning.ADMM()(*fp32(kernel, x), parse_pattern(pattern))
    assert np.isfinite(ours).all()
    assert not np.asarray(mask)[[5, 6]].any()
    assert not violations(mask, parse_pattern(pattern))


def test_without_data_of_any_input_all_weights_become_zero():
    ours, mask = pruning.ADMM()(jnp.ones((8, 4)), jnp.zeros((8, 8)), parse_pattern('2:4'))
    assert not np.asarray(ours).any()
    assert not violations(mask, parse_pattern('2:4'))


def test_fewer_samples_than_inputs_are_enough():
    kernel, x = correlated(tokens=10)
    ours, _ = pruning.ADMM(ridge=0.0)(*fp32(kernel, x), parse_pattern('2:4'))
    assert np.isfinite(ours).all()


@pytest.mark.parametrize('pattern', ['2:4', '0.5'])
def test_a_hessian_that_cannot_be_factored_is_reported(pattern):
    hessian = jnp.eye(8) - 5 * jnp.ones((8, 8)) * (1 - jnp.eye(8))  # no sum of squares
    params = {'q': {'kernel': jnp.ones((8, 4))}}
    stats = {'q/kernel': InputStatistic(hessian, jnp.int32(8))}
    with pytest.raises(pruning.calibrate.CalibrationError, match=r'^q/kernel: pruned weights are not finite \(ADMM\)'):
        pruning.prune_tree(params, stats, [('.*', pattern)], method=pruning.ADMM())


@pytest.mark.parametrize(
    ('options', 'said'),
    [
        ({'ridge': -0.1}, 'ADMM ridge -0.1: expected a finite number, 0 or more'),
        ({'ridge': float('nan')}, 'ADMM ridge nan'),
        ({'rho': 0.0}, 'ADMM rho 0.0: expected a finite number above 0'),
        ({'rho': float('inf')}, 'ADMM rho inf'),
        ({'iterations': 0}, 'ADMM iterations 0: expected a whole number, 1 or more'),
        ({'iterations': 2.5}, 'ADMM iterations 2.5'),
        ({'growth': 21}, 'ADMM growth 21: expected a whole number from 1 to iterations, 20'),
        ({'growth': 0}, 'ADMM growth 0'),
        ({'group': 'block'}, "ADMM group 'block': expected 'output' or 'matrix'"),
    ],
)
def test_an_option_out_of_its_range_is_named(options, said, monkeypatch):
    # Users do not run with the type checker of the tests, which would refuse a number that is not whole first.
    monkeypatch.setattr(jaxtyping.config, 'jaxtyping_disable', True)
    with pytest.raises(PatternError, match=said):
        pruning.ADMM(**options).check(parse_pattern('0.5'), 32)


def test_a_pattern_that_does_not_fit_is_refused():
    with pytest.raises(PatternError, match='30'):
        pruning.ADMM().check(parse_pattern('2:4'), 30)
