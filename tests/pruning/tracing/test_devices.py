"""A forward that runs in `shard_map` gives the statistics of the same forward without it.

The oracle is the same weights in a plain forward; `test_program.py` compares the statistics of such with numpy.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import sparselora_jax as sl
from sparselora_jax.pruning import calibrate
from sparselora_jax.pruning.calibrate import CalibrationError

WIDTH = 8
HIDDEN = 16
LAYERS = 4
W = {
    'up': 0.5 * jax.random.normal(jax.random.key(0), (WIDTH, HIDDEN)),
    'down': 0.5 * jax.random.normal(jax.random.key(1), (HIDDEN, WIDTH)),
}
STACK = {'w': 0.5 * jax.random.normal(jax.random.key(2), (LAYERS, WIDTH, WIDTH))}
X = jax.random.normal(jax.random.key(3), (4, 8, WIDTH))
BATCHES = [X, 2 * X]


# The test of masks runs with Hessians too.
STATISTICS = [calibrate.squares, pytest.param(calibrate.hessian, marks=pytest.mark.slow)]


def mesh_of(**axes):
    sizes = list(axes.values())
    return Mesh(np.asarray(jax.devices()[: np.prod(sizes)]).reshape(sizes), list(axes))


ROW = mesh_of(d=4)
SQUARE = mesh_of(data=2, tensor=2)
SPLIT_HIDDEN = {'up': P(None, 'tensor'), 'down': P('tensor')}


def mapped(function, mesh, in_specs, out_specs, **options):
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, **options)


def plain(params, x):
    return jnp.tanh(x @ params['up']) @ params['down']


def summed(params, x):
    return jax.lax.psum(plain(params, x), 'tensor')


def outputs_split(params, x):
    split = mapped(jnp.matmul, ROW, (P(), P(None, 'd')), P(None, None, 'd'))
    return split(jnp.tanh(split(x, params['up'])), params['down'])


def inputs_split(params, x):
    split = mapped(lambda x, w: jax.lax.psum(x @ w, 'd'), ROW, (P(None, None, 'd'), P('d')), P())
    return split(jnp.tanh(split(x, params['up'])), params['down'])


def inputs_split_and_results_scattered(params, x):
    def product(x, w):
        return jax.lax.psum_scatter(x @ w, 'd', scatter_dimension=2, tiled=True)

    def both(params, x):
        return product(jnp.tanh(product(x, params['up'])), params['down'])

    return mapped(both, ROW, (P('d'), P(None, None, 'd')), P(None, None, 'd'))(params, x)


def hidden_split_along_two_axes(params, x):
    both = ('data', 'tensor')
    specs = {'up': P(None, both), 'down': P(both)}
    return mapped(lambda params, x: jax.lax.psum(plain(params, x), both), SQUARE, (specs, P()), P())(params, x)


def nested(params, x):
    inner = jax.shard_map(summed, in_specs=(SPLIT_HIDDEN, P()), out_specs=P(), axis_names={'tensor'})
    outer = mapped(inner, SQUARE, (P(), P('data')), P('data'), axis_names={'data'})
    return jax.jit(outer)(params, x)


def weights_gathered(params, x):
    def both(params, x):
        up = jax.lax.all_gather(params['up'], 'd', axis=1, tiled=True)
        down = jax.lax.all_gather(params['down'], 'd').reshape(HIDDEN, WIDTH)
        return plain({'up': up, 'down': down}, x)

    return mapped(both, ROW, ({'up': P(None, 'd'), 'down': P('d')}, P('d')), P('d'))(params, x)


def weights_gathered_before(params, x):
    def gather(params):
        return jax.tree.map(lambda w: jax.lax.all_gather(w, 'd', tiled=True), params)

    return plain(mapped(gather, ROW, P('d'), P(), check_vma=False)(params), x)


def weights_split_before(params, x):
    return plain(mapped(lambda params: params, ROW, P('d'), P('d'))(params), x)


def rows_gathered_before_each_product(params, x):
    def both(params, x):
        hidden = jnp.tanh(jax.lax.all_gather(x, 'd', tiled=True) @ params['up'])
        return jax.lax.all_gather(hidden, 'd', axis=2, tiled=True) @ params['down']

    return mapped(both, ROW, (P(None, 'd'), P('d')), P(None, None, 'd'))(params, x)


def one_index_each(params, x):
    # Each device holds one input and one output, so that its axes have length 1.
    mesh = mesh_of(d=4)
    up = params['up'].reshape(4, 2, 4, 4)
    down = params['down'].reshape(4, 4, 4, 2)
    first = mapped(
        lambda x, w: jax.lax.psum(jnp.einsum('btic,icoh->btoh', x, w), 'd'), mesh, (P(None, None, 'd'), P('d')), P()
    )(x.reshape(*x.shape[:2], 4, 2), up)
    second = mapped(
        lambda x, w: jnp.einsum('btoh,ohic->btic', x, w), mesh, (P(), P(None, None, 'd')), P(None, None, 'd')
    )
    return second(jnp.tanh(first), down).reshape(x.shape)


FORMS = {
    'replicated': mapped(plain, ROW, P(), P()),
    'batch split': mapped(plain, ROW, (P(), P('d')), P('d')),
    'batch split along two axes': mapped(plain, SQUARE, (P(), P(('data', 'tensor'))), P(('data', 'tensor'))),
    'sequence split': mapped(plain, ROW, (P(), P(None, 'd')), P(None, 'd')),
    'batch and sequence split': mapped(plain, SQUARE, (P(), P('data', 'tensor')), P('data', 'tensor')),
    'batch split, unchecked': mapped(plain, ROW, (P(), P('d')), P('d'), check_vma=False),
    'outputs split': outputs_split,
    'inputs split': inputs_split,
    'inputs split and results scattered': inputs_split_and_results_scattered,
    'one index each': one_index_each,
    'outputs, inputs, batch': mapped(summed, SQUARE, (SPLIT_HIDDEN, P('data')), P('data')),
    'outputs, inputs, batch, unchecked': mapped(summed, SQUARE, (SPLIT_HIDDEN, P('data')), P('data'), check_vma=False),
    'within jit': jax.jit(mapped(summed, SQUARE, (SPLIT_HIDDEN, P('data')), P('data'))),
    'rematerialised': jax.checkpoint(mapped(jax.checkpoint(summed), SQUARE, (SPLIT_HIDDEN, P('data')), P('data'))),
    'one axis of the mesh': jax.jit(
        mapped(summed, SQUARE, (SPLIT_HIDDEN, P()), P(), axis_names={'tensor'}),
    ),
    'hidden split along two axes': hidden_split_along_two_axes,
    'nested': nested,
    'pmap': jax.pmap(plain, in_axes=(None, 0)),
    'weights gathered': weights_gathered,
    'weights gathered before': weights_gathered_before,
    'weights split before': weights_split_before,
    'rows gathered before each product': rows_gathered_before_each_product,
}
# Where devices do not divide rows, the same sums are computed.
SAME_SUMS = {
    'replicated',
    'outputs split',
    'inputs split',
    'one index each',
    'hidden split along two axes',
    'weights gathered before',
    'weights split before',
}

QUICK = 'outputs split', 'inputs split', 'batch split', 'weights gathered'


@pytest.mark.parametrize('stat', STATISTICS)
@pytest.mark.parametrize(
    'form', [form if form in QUICK else pytest.param(form, marks=pytest.mark.slow) for form in FORMS]
)
def test_statistics_equal_those_of_a_plain_forward(form, stat):
    np.testing.assert_allclose(FORMS[form](W, X), plain(W, X), atol=1e-5)
    want = sl.collect(plain, W, BATCHES, stat=stat)
    statistics = sl.collect(FORMS[form], W, BATCHES, stat=stat)
    assert statistics.keys() == want.keys()
    np.testing.assert_allclose(statistics['up'].total, want['up'].total, rtol=1e-5)
    np.testing.assert_allclose(statistics['down'].total, want['down'].total, rtol=1e-4, atol=1e-4)
    for path in want:
        assert statistics[path].axes == want[path].axes
        assert int(statistics[path].tokens) == int(want[path].tokens)
    # The input of the second product was summed in another order where devices divide the inputs of the first.
    if form in SAME_SUMS:
        np.testing.assert_array_equal(statistics['up'].total, want['up'].total)


@pytest.mark.slow
def test_shardings_may_be_explicit():
    def forward(params, x):
        split = {path: jax.sharding.reshard(params[path], spec) for path, spec in SPLIT_HIDDEN.items()}
        return jnp.einsum('bth,ho->bto', jnp.tanh(x @ split['up']), split['down'], out_sharding=P('data'))

    want = sl.collect(plain, W, [X], stat=calibrate.hessian)
    with jax.set_mesh(jax.make_mesh((2, 2), ('data', 'tensor'))):
        batch = jax.device_put(X, P('data'))
        statistics = sl.collect(forward, jax.device_put(W, P()), [batch], stat=calibrate.hessian)
    for path in W:
        np.testing.assert_allclose(statistics[path].total, want[path].total, rtol=1e-4, atol=1e-4)
        assert int(statistics[path].tokens) == int(want[path].tokens)


@pytest.mark.slow
@pytest.mark.parametrize('method', [sl.Wanda(), sl.SparseGPT(block=8)], ids=['wanda', 'sparsegpt'])
@pytest.mark.parametrize('form', ['batch split', 'inputs split', 'outputs, inputs, batch'])
def test_masks_equal_those_of_a_plain_forward(form, method):
    rules = [('.*', '2:4')]
    want = sl.prune_tree(W, sl.collect(plain, W, BATCHES, stat=method.statistic), rules, method=method)
    statistics = sl.collect(FORMS[form], W, BATCHES, stat=method.statistic)
    pruned, masks = sl.prune_tree(W, statistics, rules, method=method)
    assert jax.tree.all(jax.tree.map(np.array_equal, masks, want[1]))
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=1e-5), pruned, want[0])


@pytest.mark.slow
def test_one_pass_prunes_products_of_their_own_regions_one_after_the_other():
    want = sl.prune(plain, W, BATCHES, [('.*', '2:4')], method=sl.Wanda())
    got = sl.prune(FORMS['inputs split'], W, BATCHES, [('.*', '2:4')], method=sl.Wanda())
    assert jax.tree.all(jax.tree.map(np.array_equal, got.masks, want.masks))


@pytest.mark.parametrize('form', ['outputs, inputs, batch', 'weights gathered'])
def test_one_pass_prunes_the_products_of_one_region_together(form):
    # Like those of a loop: all statistics are of the dense kernels.
    _, want = sl.prune_tree(W, sl.collect(plain, W, BATCHES), [('.*', '2:4')], method=sl.Wanda())
    got = sl.prune(FORMS[form], W, BATCHES, [('.*', '2:4')], method=sl.Wanda())
    assert jax.tree.all(jax.tree.map(np.array_equal, got.masks, want))


def plain_stack(params, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params['w'])[0]


def scan_within(params, x):
    def run(w, x):
        def step(x, w):
            return jnp.tanh(jax.lax.psum_scatter(x @ w, 'tensor', scatter_dimension=2, tiled=True)), None

        return jax.lax.scan(step, x, w)[0]

    place = P('data', None, 'tensor')
    return mapped(run, SQUARE, (P(None, 'tensor'), place), place)(params['w'], x)


def loop_within(params, x):
    def run(w, x):
        return jax.lax.fori_loop(0, LAYERS, lambda i, x: jnp.tanh(x @ w[i]), x)

    return mapped(run, ROW, (P(), P('d')), P('d'))(params['w'], x)


def loop_whose_end_is_data(params, x):
    def run(w, x):
        end = LAYERS + 0 * jax.lax.pmax(jnp.max(x), 'd').astype(jnp.int32)
        state = jax.lax.while_loop(
            lambda state: state[0] < end, lambda state: (state[0] + 1, product(state, w)), (0, x)
        )
        return state[1]

    def product(state, w):
        return jnp.tanh(state[1] @ w[state[0]])

    return mapped(run, ROW, (P(), P('d')), P('d'))(params['w'], x)


def branches_within(params, x):
    def run(w, x):
        is_positive = jax.lax.psum(x[0, 0, 0], 'd') > 0
        for layer in range(LAYERS):
            arguments = (x, w[layer])
            x = jnp.tanh(jax.lax.cond(is_positive, lambda x, w: x @ w, lambda x, w: jnp.dot(x, w), *arguments))
        return x

    return mapped(run, ROW, (P(), P('d')), P('d'))(params['w'], x)


def within_scan(params, x):
    product = mapped(lambda x, w: jax.lax.psum(x @ w, 'd'), ROW, (P(None, None, 'd'), P('d')), P())
    return jax.lax.scan(lambda x, w: (jnp.tanh(product(x, w)), None), x, params['w'])[0]


STACKED_FORMS = [scan_within, loop_within, loop_whose_end_is_data, branches_within, within_scan]


@pytest.mark.slow
@pytest.mark.parametrize('stat', STATISTICS)
@pytest.mark.parametrize('forward', STACKED_FORMS, ids=lambda form: form.__name__)
def test_layers_of_a_stack(forward, stat):
    np.testing.assert_allclose(forward(STACK, X), plain_stack(STACK, X), atol=1e-5)
    want = sl.collect(plain_stack, STACK, BATCHES, stat=stat)['w']
    statistic = sl.collect(forward, STACK, BATCHES, stat=stat)['w']
    np.testing.assert_allclose(statistic.total, want.total, rtol=1e-4, atol=1e-4)
    assert statistic.tokens.tolist() == want.tokens.tolist()
    assert statistic.axes == want.axes


@pytest.mark.parametrize('spec', [P(), P('d')])
def test_devices_run_layers_of_their_own(spec):
    def run(w, x):
        return jnp.tanh(x[0] @ w[jax.lax.axis_index('d') if spec == P() else 0])[None]

    forward = mapped(run, ROW, (spec, P('d')), P('d'))
    statistic = sl.collect(lambda params, x: forward(params['w'], x), STACK, BATCHES, stat=calibrate.hessian)['w']
    rows = np.asarray(X, np.float64)
    want = [5 * rows[layer].T @ rows[layer] for layer in range(LAYERS)]
    np.testing.assert_allclose(statistic.total, want, rtol=1e-5, atol=1e-5)
    assert statistic.tokens.tolist() == [16] * LAYERS


def test_experts_are_divided_among_devices():
    dispatched = jax.random.normal(jax.random.key(5), (LAYERS, 5, WIDTH))

    def forward(params, x):
        product = mapped(lambda x, w: jnp.einsum('eti,eio->eto', x, w), SQUARE, (P('data'), P('data')), P('data'))
        return product(x, params['w'])

    statistic = sl.collect(forward, STACK, [dispatched])['w']
    np.testing.assert_allclose(statistic.total, np.sum(np.square(dispatched), axis=1), rtol=1e-5)
    assert statistic.tokens.tolist() == [5] * LAYERS


def test_tokens_of_a_ragged_product_are_counted_per_expert_of_each_device():
    # Each of two devices has two experts, and rows sorted by expert, of which some belong to none.
    rows = jax.random.normal(jax.random.key(5), (2, 6, WIDTH))
    sizes = jnp.array([[1, 3], [2, 4]], jnp.int32)

    def forward(params, batch):
        def product(rows, sizes, w):
            return jax.lax.ragged_dot(rows[0], w, sizes[0])[None]

        return mapped(product, mesh_of(d=2), (P('d'), P('d'), P('d')), P('d'))(*batch, params['w'])

    statistic = sl.collect(forward, STACK, [(rows, sizes)])['w']
    squares = np.square(np.asarray(rows))
    of_experts = [squares[0, :1], squares[0, 1:4], squares[1, :2], squares[1, 2:]]
    np.testing.assert_allclose(statistic.total, [part.sum(0) for part in of_experts], rtol=1e-5)
    assert statistic.tokens.tolist() == [1, 3, 2, 4]


def test_channels_of_an_image_are_divided_among_devices():
    params = {'kernel': jax.random.normal(jax.random.key(0), (2, 2, 4, 5))}
    images = jax.random.normal(jax.random.key(1), (2, 4, 4, 4))

    def embed(params, images):
        return jax.lax.conv_general_dilated(
            images, params['kernel'], (2, 2), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
        )

    def split(params, images):
        place = P(None, None, 'd')
        summed = mapped(
            lambda params, images: jax.lax.psum(embed(params, images), 'd'),
            ROW,
            (place, P(None, None, None, 'd')),
            P(),
        )
        return summed(params, images)

    want = sl.collect(embed, params, [images], stat=calibrate.hessian)['kernel']
    statistic = sl.collect(split, params, [images], stat=calibrate.hessian)['kernel']
    np.testing.assert_array_equal(statistic.total, want.total)
    assert statistic.axes == want.axes


def test_kernels_that_read_one_array_share_a_sum():
    params = {'q': W['up'], 'k': W['up'] + 1}
    forward = mapped(lambda p, x: (x @ p['q'], x @ p['k']), ROW, (P(None, 'd'), P()), P(None, None, 'd'))
    programs = calibrate.make_sums(forward, stats=lambda path: calibrate.squares)
    programs.total(params, [X])
    assert programs.leaders == {'q': 'k', 'k': 'k'}


def test_a_mean_counts_the_tokens_of_all_devices():
    mean = calibrate.Mean(calibrate.squares)
    statistic = sl.collect(FORMS['outputs, inputs, batch'], W, BATCHES, stat=mean)['up']
    np.testing.assert_allclose(statistic.total, 2.5 * np.mean(np.square(X), axis=(0, 1)), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('form', ['inputs split', 'batch split', 'outputs, inputs, batch', 'sequence split'])
def test_tokens_have_weights(form):
    weights = jnp.arange(8) < jnp.array([[8], [3], [1], [5]])
    for of_tokens in (weights, jnp.where(weights, jax.random.uniform(jax.random.key(4), weights.shape), 0.0)):
        want = sl.collect(plain, W, [X], weights=lambda x, of_tokens=of_tokens: of_tokens)
        statistics = sl.collect(FORMS[form], W, [X], weights=lambda x, of_tokens=of_tokens: of_tokens)
        np.testing.assert_allclose(statistics['up'].total, want['up'].total, rtol=1e-5)
        np.testing.assert_allclose(statistics['down'].total, want['down'].total, rtol=1e-4)
        assert int(statistics['up'].tokens) == 17


@pytest.mark.parametrize('form', ['batch split along two axes', 'batch and sequence split'])
def test_weights_of_tokens_that_two_axes_of_a_mesh_divide_are_refused(form):
    with pytest.raises(CalibrationError, match=r'^weights of tokens \[4, 8\] fit the rows of no kernel: '):
        sl.collect(FORMS[form], W, [X], weights=lambda x: jnp.ones((4, 8), bool))


def some_devices_multiply(params, x):
    def run(w, x):
        return jax.lax.cond(jax.lax.axis_index('d') == 0, lambda x: x @ w, lambda x: x + 0.0, x)

    return mapped(run, ROW, (P(), P('d')), P('d'), check_vma=False)(params['kernel'], x)


def some_devices_go_on(params, x):
    def run(w, x):
        end = jax.lax.axis_index('d')
        return jax.lax.fori_loop(0, end, lambda i, x: jnp.tanh(x @ w), x)

    return mapped(run, ROW, (P(), P('d')), P('d'), check_vma=False)(params['kernel'], x)


def summed_weights(params, x):
    run = mapped(lambda w, x: x @ jax.lax.psum(w, 'd'), ROW, (P('d'), P()), P())
    return run(params['kernel'], x[..., :2])


def uneven_parts(params, x):
    # Six rows of eight, of which each of four devices holds one and a half.
    split = mapped(lambda w: w, ROW, P('d'), P('d'))(params['kernel'][:6].reshape(48))
    return x[..., :6] @ split.reshape(6, 8)


UNFOLLOWED = {
    'branch': (some_devices_multiply, 'only some devices of a shard_map run a product with it'),
    'rounds': (some_devices_go_on, 'only some devices of a shard_map run a product with it'),
    'psum': (summed_weights, r'psum_invariant \(.*test_devices.py:\d+\): not a layout operation'),
    'parts': (uneven_parts, r'shard_map \(.*test_devices.py:\d+\): a device holds no part of whole axes'),
}


@pytest.mark.parametrize('name', UNFOLLOWED)
def test_what_cannot_be_followed_is_named(name):
    forward, reason = UNFOLLOWED[name]
    with pytest.raises(CalibrationError, match=f'^kernel: no product of the forward reads it: .*{reason}'):
        sl.collect(forward, {'kernel': STACK['w'][0]}, [X])


def test_a_product_of_some_devices_does_not_stop_the_others(caplog):
    params = {'some': STACK['w'][0], 'all': STACK['w'][1]}

    def forward(params, x):
        return some_devices_multiply({'kernel': params['some']}, x) @ params['all']

    assert set(sl.collect(forward, params, [X])) == {'all'}
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.endswith('some: only some devices of a shard_map run a product with it')
