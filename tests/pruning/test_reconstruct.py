"""Reconstruction: kept weights approach least squares, nothing gets worse, zeros and masks stay, padding is ignored."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparselora_jax as sl
from sparselora_jax.pruning import ReconstructError
from sparselora_jax.pruning.reconstruct import Targets, block_reconstructor
from sparselora_jax.sparse import rules, sharding

RULES = [('tower/blocks/.*/kernel', '2:4')]
NAMES = ('fc1/kernel', 'fc2/kernel')
LAYERS, SAMPLES, ROWS, WIDTH = 2, 8, 6, 8


def mlp_block(w, x, ctx, cache):
    """A block with a residual sum, two kernels and a bias."""
    hidden = jax.nn.gelu(sl.linear(x, w['fc1']['kernel'], w['fc1']['bias']))
    return x + sl.linear(hidden, w['fc2']['kernel']), cache


def forward(w, batch, run):
    x, _ = run('tower', mlp_block, w['tower']['blocks'], batch['x'], {'valid': batch['valid']})
    return x


def scan(tower, block, weights, x, ctx, cache=None):
    """Run blocks one by one, on one device."""
    for layer in range(LAYERS):
        x, _ = block(jax.tree.map(lambda leaf, layer=layer: leaf[layer], weights), x, ctx, None)
    return x, cache


def setup(dtype=jnp.float32):
    keys = iter(jax.random.split(jax.random.key(0), 4))

    def normal(*shape):
        return jax.random.normal(next(keys), shape).astype(dtype)

    blocks = {
        'fc1': {'kernel': normal(LAYERS, WIDTH, 16), 'bias': normal(LAYERS, 16)},
        'fc2': {'kernel': normal(LAYERS, 16, WIDTH) / 4},
    }
    valid = jnp.arange(ROWS)[None] >= (jnp.arange(SAMPLES) % 4)[:, None]
    return {'tower': {'blocks': blocks}}, {'x': normal(SAMPLES, ROWS, WIDTH), 'valid': valid}


def prune(params, batch, method=None, **options):
    return sl.prune(forward, params, [batch], options.pop('rules', RULES), method=method or sl.Wanda(), **options)


def error(params, pruned, batch):
    """Squared error of the last hidden states over all rows that are not padding."""
    difference = forward(params, batch, scan) - forward(pruned, batch, scan)
    return float(jnp.sum(jnp.where(batch['valid'][..., None], difference, 0.0) ** 2))


def block_error(w, inputs, target):
    """Squared error of each row, relative to its target, summed."""
    output = np.asarray(mlp_block(rules.unflatten(w), inputs, {}, None)[0])
    target = np.asarray(target)
    return float(np.sum(np.sum((output - target) ** 2, axis=-1) / np.sum(target**2, axis=-1)))


def one_linear(w, x, ctx, cache):
    return sl.linear(x, w['kernel']), cache


@pytest.mark.parametrize('pattern', ['2:4', '0.6'])
def test_a_linear_block_approaches_the_least_squares_solution_under_its_mask(pattern):
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(WIDTH, WIDTH)) / 2 + np.eye(WIDTH)
    x = (rng.normal(size=(32, ROWS, WIDTH)) @ mix).astype(np.float32)
    dense = rng.normal(size=(WIDTH, 4)).astype(np.float32)
    mask = np.asarray(sl.mask_from_scores(jnp.abs(dense), sl.parse_pattern(pattern)))
    pruned = jnp.where(mask, dense, 0.0)
    # The oracle, one output after the other, in float64.
    rows = x.reshape(-1, WIDTH).astype(np.float64)
    # Errors are relative to the dense output of a row.
    rows /= np.linalg.norm(rows @ dense.astype(np.float64), axis=1, keepdims=True)
    wanted = np.zeros(dense.shape)
    for output in range(4):
        kept = np.flatnonzero(mask[:, output])
        wanted[kept, output] = np.linalg.lstsq(rows[:, kept], rows @ dense[:, output].astype(np.float64))[0]

    chunks = [(jnp.asarray(part), {}) for part in np.split(x, 4)]
    targets = Targets(one_linear, None, 'dense').of_layer({'kernel': jnp.asarray(dense)}, chunks)
    train = block_reconstructor(one_linear, sl.Reconstruct(passes=80, rate=0.05, batch=8))
    got = train(
        {'kernel': jnp.asarray(dense)}, {'kernel': pruned}, {'kernel': jnp.asarray(mask)}, chunks, targets, 'here'
    )['kernel']
    assert np.array_equal(np.asarray(got) != 0, mask)
    assert np.abs(got - wanted).max() < 0.01 * np.abs(pruned - wanted).max()


@pytest.mark.parametrize('target', ['dense', 'pruned'])
@pytest.mark.parametrize(('method', 'pattern'), [(sl.Wanda(), '2:4'), (sl.SparseGPT(block=8), '0.6')])
def test_the_error_falls_and_zeros_masks_and_other_weights_stay(method, pattern, target):
    params, batch = setup()
    rule_list = [('tower/blocks/.*/kernel', pattern)]
    plain = prune(params, batch, method, rules=rule_list)
    options = sl.Reconstruct(passes=8, rate=0.02, batch=4, target=target)
    better = prune(params, batch, method, rules=rule_list, reconstruct=options)
    first = {path: mask[0] for path, mask in rules.flatten(plain.masks).items()}
    for path, mask in rules.flatten(better.masks).items():
        assert jnp.array_equal(mask[0], first[path])  # the first block has the same inputs
        assert not rules.flatten(better.params)[path][~mask].any()
    bias = 'tower/blocks/fc1/bias'
    assert jnp.array_equal(rules.flatten(better.params)[bias], rules.flatten(params)[bias])
    assert better.tokens == plain.tokens
    assert error(params, better.params, batch) < 0.7 * error(params, plain.params, batch)


def test_without_reconstruction_nothing_changes():
    params, batch = setup()
    for got, wanted in zip(prune(params, batch), prune(params, batch, reconstruct=None), strict=True):
        assert jax.tree.all(jax.tree.map(np.array_equal, got, wanted))


def test_targets_follow_the_dense_blocks_or_start_from_the_pruned_ones():
    params, batch = setup()
    layers = [jax.tree.map(lambda leaf, i=i: leaf[i], params['tower']['blocks']) for i in range(LAYERS)]
    x, other = batch['x'], batch['x'] + 1.0
    for target, second in (('dense', None), ('pruned', other)):
        targets = Targets(mlp_block, None, target)
        first = targets.of_layer(rules.flatten(layers[0]), [(x, {})])[0]
        np.testing.assert_allclose(first, mlp_block(layers[0], x, {}, None)[0], rtol=1e-5, atol=1e-5)
        wanted = mlp_block(layers[1], first if second is None else second, {}, None)[0]
        got = targets.of_layer(rules.flatten(layers[1]), [(other, {})])[0]
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_a_token_whose_output_is_large_counts_as_any_other():
    """The kernel that serves ten small rows beats the one that serves a large one."""
    x = jnp.concatenate([jnp.tile(jnp.array([1.0, 1.0, 0.0, 0.0]), (10, 1)), jnp.array([[1e3, 0.0, 1e3, 0.0]])])[None]
    dense = {'kernel': jnp.array([[1.0], [1.0], [-0.5], [0.0]])}
    mask = jnp.array([[True], [False], [False], [True]])
    target = one_linear(dense, x, {}, None)[0]
    train = block_reconstructor(one_linear, sl.Reconstruct(passes=200, rate=0.05, batch=1))
    got = train(dense, {'kernel': jnp.where(mask, dense['kernel'], 0.0)}, {'kernel': mask}, [(x, {})], [target], 'here')
    # Of 10 (a / 2 - 1)^2 + (2 a - 1)^2 the minimum, by hand; the sum without division has it at a = 0.5.
    assert float(got['kernel'][0, 0]) == pytest.approx(14 / 13, rel=0.02)


@pytest.fixture(scope='module')
def one_layer():
    """A pruned layer and a function that reconstructs it; its programs are compiled once."""
    params, batch = setup()
    w = rules.flatten(jax.tree.map(lambda leaf: leaf[0], params['tower']['blocks']))
    masks = {name: sl.mask_from_scores(jnp.abs(w[name]), sl.parse_pattern('2:4')) for name in NAMES}
    pruned = {name: jnp.where(masks[name], w[name], 0.0) for name in NAMES}
    target = mlp_block(rules.unflatten(w), batch['x'], {}, None)[0]
    return w, pruned, masks, batch['x'], target


@pytest.mark.parametrize('rate', [1e-3, 0.3, 1e4, 1e30])
def test_any_rate_returns_the_best_kernels_seen_and_a_huge_one_is_logged(one_layer, rate, caplog):
    w, pruned, masks, x, target = one_layer
    train = block_reconstructor(mlp_block, sl.Reconstruct(passes=3, rate=rate, batch=4))
    with caplog.at_level(logging.WARNING):
        got = train(w, pruned, masks, [(x, {})], [target], 'tower/blocks, layer 7')
    before = block_error(w | pruned, x, target)
    assert block_error(w | got, x, target) <= before
    if rate == 1e-3:
        assert not caplog.records
        assert block_error(w | got, x, target) < before
    if rate >= 1e4:
        assert [record.message.partition(': relative')[0] for record in caplog.records] == [
            'tower/blocks, layer 7: reconstruction diverged'
        ]
        assert 'its weights are as pruned; lower reconstruct.rate' in caplog.text
        assert all(jnp.array_equal(got[name], pruned[name]) for name in NAMES)


def test_a_later_pass_that_diverges_keeps_the_best_pass(one_layer, monkeypatch, caplog):
    w, pruned, masks, x, target = one_layer
    # A pass of one step, so its error is that of the kernels after the pass before it.
    options = sl.Reconstruct(passes=4, rate=1e-2, batch=8)
    seen = []

    # With one chunk, one error is read before the first pass, one in each pass, and one at the end.
    def read(error):
        seen.append(float(error))
        return float('nan') if len(seen) == 5 else seen[-1]

    monkeypatch.setattr('sparselora_jax.runtime.processes.on_host', read)
    train = block_reconstructor(mlp_block, options)
    got = train(w, pruned, masks, [(x, {})], [target], 'here')
    assert len(seen) == 6  # the initial error, four passes, and the error of the kernels after the third
    assert seen[0] == pytest.approx(seen[1], rel=1e-5)
    assert seen[3] < seen[2] < seen[1]
    assert block_error(w | got, x, target) == pytest.approx(seen[5], rel=1e-4)
    assert seen[5] == pytest.approx(seen[4], rel=1e-4)  # of the fourth pass, before the value was replaced
    assert 'nan in pass 4; its weights are those after pass 3' in caplog.text


def test_a_block_without_an_error_stays(one_layer):
    w, pruned, masks, x, _ = one_layer
    # Computed by a compiled program, as the error is, so that not one bit differs.
    target = jax.jit(mlp_block)(rules.unflatten(w | pruned), x, {}, None)[0]
    train = block_reconstructor(mlp_block, sl.Reconstruct(passes=1))
    got = train(w, pruned, masks, [(x, {})], [target], 'here')
    assert all(jnp.array_equal(got[name], pruned[name]) for name in NAMES)


def test_a_block_whose_error_is_not_finite_stays_and_is_logged(one_layer, caplog):
    w, pruned, masks, x, target = one_layer
    train = block_reconstructor(mlp_block, sl.Reconstruct(passes=1))
    got = train(w, pruned, masks, [(x, {})], [target.at[0].set(jnp.inf)], 'tower/blocks, layer 7')
    assert all(jnp.array_equal(got[name], pruned[name]) for name in NAMES)
    assert caplog.messages == ['tower/blocks, layer 7: not reconstructed: its relative squared error is nan as pruned']


@pytest.mark.parametrize('padding', [7.0, np.nan])
def test_padding_rows_change_nothing(padding):
    params, batch = setup()
    other = batch | {'x': jnp.where(batch['valid'][..., None], batch['x'], padding)}
    options = sl.Reconstruct(passes=2, rate=0.02, batch=8)
    results = [prune(params, one, reconstruct=options) for one in (batch, other)]
    assert jax.tree.all(jax.tree.map(jnp.array_equal, results[0].params, results[1].params))


def test_layers_that_are_taken_as_they_are_pruned_are_those_of_the_whole_result():
    params, batch = setup()
    options = sl.Reconstruct(passes=2, rate=0.02, batch=4)
    wanted = prune(params, batch, reconstruct=options)
    arrays = {path: np.array(leaf) for path, leaf in rules.flatten(params).items()}

    def keep(path, layer, kernel, mask):
        arrays[path][layer] = kernel  # written over while the walk goes on

    prune(rules.unflatten(arrays), batch, reconstruct=options, keep=keep)
    for path, leaf in rules.flatten(wanted.params).items():
        np.testing.assert_array_equal(arrays[path], leaf)


@pytest.mark.slow
def test_kernels_in_bfloat16_are_trained_in_float32_and_returned_in_bfloat16():
    params, batch = setup(jnp.bfloat16)
    plain = prune(params, batch)
    # Half of an update of this size is lost in bfloat16, so moments and sums must be float32.
    better = prune(params, batch, reconstruct=sl.Reconstruct(passes=8, rate=5e-3, batch=4))
    assert {leaf.dtype for leaf in jax.tree.leaves(better.params)} == {np.dtype(jnp.bfloat16)}
    sl.check_sparse(better.params, better.masks)
    assert error(params, better.params, batch) < 0.9 * error(params, plain.params, batch)


@pytest.mark.slow
@pytest.mark.parametrize('axes', [{'data': 4}, {'data': 2, 'fsdp': 2}])
def test_four_devices_agree_with_one_device(axes):
    params, batch = setup()
    options = sl.Reconstruct(passes=3, rate=0.02, batch=4)
    mesh = sharding.make_mesh(**axes)
    one = prune(params, batch, reconstruct=options, chunk=4)
    four = prune(sharding.shard(params, mesh), sharding.shard_batch(batch, mesh), reconstruct=options, chunk=1)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, one.masks, four.masks))
    sl.check_sparse(four.params, four.masks)
    # Devices sum the same gradients in another order; Adam divides by their size, which enlarges rounding.
    for path, leaf in rules.flatten(one.params).items():
        np.testing.assert_allclose(rules.flatten(four.params)[path], leaf, rtol=0, atol=2e-4, err_msg=path)


def test_programs_are_compiled_once_for_all_layers():
    params, batch = setup()
    traces = []

    def counted(w, x, ctx, cache):
        traces.append(1)
        return mlp_block(w, x, ctx, cache)

    def counted_forward(w, batch, run):
        return run('tower', counted, w['tower']['blocks'], batch['x'], {'valid': batch['valid']})[0]

    sl.prune(counted_forward, params, [batch], RULES, method=sl.Wanda(), reconstruct=sl.Reconstruct(passes=2))
    # The programs that observe a block, compute its targets, its error and a step, and run the pruned block.
    assert len(traces) == 5


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'passes': 0}, 'reconstruct.passes 0: expected a whole number, 1 or more'),
        ({'passes': True}, 'reconstruct.passes True: expected a whole number, 1 or more'),
        ({'batch': -1}, 'reconstruct.batch -1: expected a whole number, 1 or more'),
        ({'rate': 0.0}, 'reconstruct.rate 0.0: expected a positive number'),
        ({'rate': float('nan')}, 'reconstruct.rate nan: expected a positive number'),
        ({'target': 'sparse'}, "reconstruct.target 'sparse': expected one of dense, pruned"),
    ],
)
def test_illegal_options_are_refused(options, message):
    with pytest.raises(ReconstructError) as error:
        sl.Reconstruct(**options)
    assert str(error.value) == message


def test_what_does_not_fit_the_samples_is_refused_before_any_work():
    params, batch = setup()
    with pytest.raises(ReconstructError, match=r'reconstruct.batch 8: expected at most 4, the samples that are proc'):
        prune(params, batch, reconstruct=sl.Reconstruct(batch=8), chunk=4)
    split = sharding.shard_batch(batch, sharding.make_mesh(data=4))
    with pytest.raises(ReconstructError, match=r'reconstruct.batch 2: expected a multiple of 4, the devices'):
        prune(params, split, reconstruct=sl.Reconstruct(batch=2))


def test_weights_of_a_forward_with_blocks_are_refused_and_the_name_of_its_pads_is_given():
    params, batch = setup()
    with pytest.raises(sl.CalibrationError, match=r"ctx\['valid'\]"):
        prune(params, batch, weights='valid')
