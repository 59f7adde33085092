"""Statistics equal numpy's on the same activations; pads do not count; nothing to learn from is an error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparselora_jax import pruning
from sparselora_jax.models import llama
from sparselora_jax.models.init import init_params
from sparselora_jax.planning.flops import matmul_flops
from sparselora_jax.pruning import calibrate
from sparselora_jax.sparse.linear import linear

PARAMS = {'blocks': {'fc': {'kernel': 0.3 * jax.random.normal(jax.random.key(0), (3, 8, 8))}}}


def forward(weights, batch):
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(linear(x, w['fc']['kernel'])), None), batch['x'], weights['blocks'])
    return x


def batches(count=3):
    return [{'x': jax.random.normal(jax.random.key(i), (2, 5, 8))} for i in range(count)]


@pytest.mark.parametrize('stat', [calibrate.squares, calibrate.hessian])
def test_statistics_under_scan_equal_numpy(stat):
    total, tokens, _ = calibrate.collect(forward, PARAMS, batches(), stat=stat)['blocks/fc/kernel']
    x = np.concatenate([np.asarray(b['x']).reshape(-1, 8) for b in batches()]).astype(np.float64)
    for layer in range(3):
        want = np.sum(x**2, axis=0) if stat is calibrate.squares else x.T @ x
        np.testing.assert_allclose(total[layer], want, rtol=1e-4, atol=1e-4)
        x = np.tanh(x @ np.asarray(PARAMS['blocks']['fc']['kernel'][layer], np.float64))
    assert tokens.tolist() == [30, 30, 30]


@pytest.mark.parametrize('inputs', [256, 515])
def test_a_hessian_in_blocks_equals_numpy_and_is_symmetric(inputs):
    x = jax.random.normal(jax.random.key(0), (40, inputs))
    found = jax.jit(calibrate.hessian)(x)
    exact = np.asarray(x, np.float64)
    np.testing.assert_allclose(found, exact.T @ exact, rtol=1e-5, atol=1e-4)
    assert jnp.array_equal(found, found.T)


@pytest.mark.parametrize('inputs', [512, 576, 1536, 4096])
def test_a_hessian_takes_at_most_65_percent_of_the_operations(inputs):
    x = jax.ShapeDtypeStruct((1024, inputs), jnp.float32)
    assert matmul_flops(calibrate.hessian, x) <= 0.65 * 2 * 1024 * inputs**2


def test_pads_do_not_count():
    batch = batches(1)[0] | {'valid': jnp.arange(5)[None] >= jnp.array([2, 0])[:, None]}
    other = batch | {'x': jnp.where(batch['valid'][..., None], batch['x'], 99.0)}
    runs = [calibrate.collect(forward, PARAMS, [b], weights='valid') for b in (batch, other)]
    (total, tokens, _), (same, *_) = (run['blocks/fc/kernel'] for run in runs)
    assert tokens.tolist() == [8, 8, 8]
    assert jnp.array_equal(total, same)


def test_a_tower_of_ours_needs_no_hook():
    cfg = llama.LlamaConfig(vocab=11, width=16, depth=2, heads=4, kv_heads=2, mlp_width=24)
    params = init_params(jax.random.key(0), llama.shapes(cfg))
    valid = jnp.arange(6)[None] >= jnp.array([0, 3])[:, None]
    batch = {'x': jax.random.normal(jax.random.key(1), (2, 6, 16)), 'valid': valid}
    stats = calibrate.collect(lambda w, b: llama.forward(w, cfg, b['x'], b['valid']), params, [batch], weights='valid')
    assert set(stats) == {f'blocks/attn/{n}/kernel' for n in 'qkvo'} | {
        f'blocks/mlp/{n}/kernel' for n in ('gate', 'up', 'down')
    }
    assert all(statistic.tokens.tolist() == [9, 9] for statistic in stats.values())
    assert jnp.array_equal(stats['blocks/attn/q/kernel'][0], stats['blocks/attn/v/kernel'][0])
    assert not jnp.array_equal(stats['blocks/attn/q/kernel'][0], stats['blocks/attn/o/kernel'][0])


def test_kernels_that_share_an_input_share_its_statistic():
    params = {name: {'kernel': jnp.eye(4)} for name in ('q', 'k', 'twice')}

    def forward(w, x):
        y = linear(x, w['q']['kernel']) + linear(x, w['k']['kernel'])
        return linear(linear(y, w['twice']['kernel']), w['twice']['kernel'])

    x = jax.random.normal(jax.random.key(0), (3, 4))
    stats = calibrate.collect(forward, params, [x])
    assert stats['q/kernel'][0] is stats['k/kernel'][0]
    # A kernel that is read twice counts both inputs: here 2x each.
    np.testing.assert_allclose(stats['twice/kernel'][0], 8 * stats['q/kernel'][0], rtol=1e-6)
    assert int(stats['twice/kernel'][1]) == 6


def test_empty_set_is_refused():
    with pytest.raises(calibrate.CalibrationError, match='empty'):
        calibrate.collect(forward, PARAMS, [])


def test_non_finite_activations_name_path_and_layer():
    params = {'blocks': {'fc': {'kernel': PARAMS['blocks']['fc']['kernel'].at[0, 0, 0].set(jnp.nan)}}}
    with pytest.raises(calibrate.CalibrationError, match='blocks/fc/kernel, layer 1: activations are not finite'):
        calibrate.collect(forward, params, batches())


def one_kernel(scale, stat, batches=None):
    """The statistic of activations times `scale`, and the kernel that reads them."""
    params = {'fc': {'kernel': jax.random.normal(jax.random.key(7), (16, 8))}}
    x = [jax.random.normal(jax.random.key(i), (20, 16)) * jnp.linspace(0.1, 3.0, 16) for i in range(3)]
    batches = batches or [scale * part for part in x]
    stats = calibrate.collect(lambda w, x: linear(x, w['fc']['kernel']), params, batches, stat=stat)
    return params, stats


METHODS = [pruning.Wanda(), pruning.SparseGPT(block=8), pruning.DSnoT(threshold=0.0), pruning.ADMM()]


@pytest.mark.slow
@pytest.mark.parametrize('method', METHODS, ids=['wanda', 'sparsegpt', 'dsnot', 'admm'])
@pytest.mark.parametrize('pattern', ['2:4', '0.5'])
@pytest.mark.parametrize('scale', [1e-12, 1e-22, 1e-30])
def test_activations_whose_squares_underflow_give_the_masks_of_ordinary_ones(method, pattern, scale):
    params, ordinary = one_kernel(1.0, method.statistic)
    _, tiny = one_kernel(scale, method.statistic)
    results = [pruning.prune_tree(params, stats, [('.*', pattern)], method=method) for stats in (ordinary, tiny)]
    (want, want_mask), (got, mask) = ((tree['fc']['kernel'] for tree in result) for result in results)
    np.testing.assert_array_equal(mask, want_mask)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_each_layer_of_a_stack_is_scaled_for_itself():
    kernel = PARAMS['blocks']['fc']['kernel']
    params = {'blocks': {'fc': {'kernel': kernel.at[0].multiply(1e-24)}}}

    def forward(weights, batch):
        x, _ = jax.lax.scan(lambda x, w: (linear(x, w['fc']['kernel']), None), batch['x'], weights['blocks'])
        return x

    (want, *_), (got, *_) = (
        calibrate.collect(forward, tree, batches())['blocks/fc/kernel'] for tree in (PARAMS, params)
    )
    np.testing.assert_array_equal(got[0], want[0])  # ordinary: the very same bits
    scaled = np.asarray(got[1:], np.float64) / np.float64(calibrate.SCALE * 1e-24) ** 2
    np.testing.assert_allclose(scaled, want[1:], rtol=1e-5)


def test_ordinary_activations_are_never_scaled(monkeypatch):
    monkeypatch.setattr(calibrate, '_Scaled', lambda stat: pytest.fail('scaled'))
    dead = jnp.ones((20, 16)).at[:, 3].set(0.0)
    for scale in (1e-9, 1e9):
        _, stats = one_kernel(1.0, calibrate.squares, [scale * dead])
        assert float(stats['fc/kernel'][0][3]) == 0
    # A first moment may be 0 by chance.
    one_kernel(1.0, pruning.DSnoT().statistic, [jnp.array([[1.0], [-1.0]]) * jnp.ones(16)])


def test_statistics_that_are_compared_have_one_scale():
    params = {name: {'kernel': jnp.eye(4)} for name in ('a', 'b')}

    def forward(w, x):
        return linear(linear(x, w['a']['kernel']) * jnp.float32(1e-24), w['b']['kernel'])

    def observed(x):
        observe = calibrate.make_observer(forward, stats=lambda path: calibrate.squares, one_scale=True)
        stats = observe(params, [x])
        return stats['a/kernel'][0], stats['b/kernel'][0]

    a, b = observed(jnp.ones((3, 4)))
    assert a.tolist() == [3.0] * 4
    assert not b.any()
    a, b = observed(jnp.full((3, 4), 2.0**-40))
    assert a.tolist() == [3 * 2.0**48] * 4  # both times 2**64
    np.testing.assert_allclose(b, 3 * (2.0**24 * 1e-24) ** 2, rtol=1e-5)


def test_a_kernel_without_any_input_is_named_and_a_generator_cannot_be_read_twice(caplog):
    one_kernel(1.0, calibrate.squares, [jnp.zeros((2, 16))])
    assert [record.message for record in caplog.records] == [
        'fc/kernel: all 16 inputs are zero on every calibration token; nothing says which of its weights matter'
    ]
    caplog.clear()
    one_kernel(1.0, calibrate.squares, iter([jnp.full((2, 16), 1e-22)]))
    assert 'fc/kernel: activations are zero, or too small for float32 squares; give' in caplog.text


def test_statistics_of_which_not_only_ratios_matter_are_never_of_scaled_activations():
    params = {'q': {'kernel': jnp.ones((4, 2))}}
    x = jax.random.normal(jax.random.key(0), (10, 4))

    def outliers(x):
        return jnp.sum((jnp.abs(x) > 6).astype(jnp.float32), axis=0)

    stats = calibrate.collect(lambda w, b: linear(b, w['q']['kernel']), params, [x], stat=outliers)
    np.testing.assert_array_equal(stats['q/kernel'][0], np.zeros(4))
