"""Every way of writing a product gives the statistic of the same rows; what cannot be followed is named."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparselora_jax as sl
from sparselora_jax.pruning import calibrate
from sparselora_jax.pruning.calibrate import CalibrationError

LAYERS = 4
WIDTH = 8
W = {'w': 0.5 * jax.random.normal(jax.random.key(0), (LAYERS, WIDTH, WIDTH))}
X = jax.random.normal(jax.random.key(1), (2, 3, WIDTH))


@jax.custom_vjp
def product_with_its_own_gradient(x, w):
    return x @ w


product_with_its_own_gradient.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0]))


@jax.custom_jvp
def product_with_its_own_tangent(x, w):
    return x @ w


product_with_its_own_tangent.defjvp(lambda primals, tangents: (primals[0] @ primals[1], tangents[0] @ primals[1]))


def scan(params, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params['w'])[0]


def scan_backwards(params, x):
    # The first layer that runs is the last of the stack.
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params['w'], reverse=True)[0]


def scan_of_rematerialised(params, x):
    block = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
    return jax.lax.scan(block, x, params['w'])[0]


def loop(params, x):
    return jax.lax.fori_loop(0, LAYERS, lambda i, x: jnp.tanh(x @ params['w'][i]), x)


def loop_with_weights_in_its_carry(params, x):
    def step(i, carry):
        w, x = carry
        return w, jnp.tanh(x @ w[i])

    return jax.lax.fori_loop(0, LAYERS, step, (params['w'], x))[1]


def loop_whose_end_is_data(params, x):
    def step(state):
        i, x = state
        return i + 1, jnp.tanh(x @ jnp.take(params['w'], i, axis=0))

    end = LAYERS + 0 * jnp.argmax(x)
    return jax.lax.while_loop(lambda state: state[0] < end, step, (0, x))[1]


def unrolled(params, x):
    for i in range(LAYERS):
        x = jnp.tanh(x @ params['w'][i])
    return x


def branches(params, x):
    for i in range(LAYERS):
        w = params['w'][i]
        x = jnp.tanh(jax.lax.cond(x[0, 0, 0] > 0, lambda x, w: x @ w, lambda x, w: jnp.dot(x, w), x, w))
    return x


def transposed(params, x):
    for w in params['w'].transpose(0, 2, 1):
        x = jnp.tanh(jax.lax.dot_general(x, w, (((2,), (1,)), ((), ()))))
    return x


def kernel_first(params, x):
    for i in range(LAYERS):
        x = jnp.tanh(jnp.einsum('io,bti->bto', params['w'][i], x))
    return x


def jitted(params, x):
    product = jax.jit(lambda x, w: jnp.tanh(x @ w))
    for i in range(LAYERS):
        x = product(x, params['w'][i])
    return x


def own_derivatives(params, x):
    for i in range(LAYERS):
        rule = product_with_its_own_gradient if i % 2 else product_with_its_own_tangent
        x = jnp.tanh(rule(x, params['w'][i]))
    return x


def in_heads(params, x):
    for i in range(LAYERS):
        heads = params['w'][i].reshape(WIDTH, 2, WIDTH // 2)
        x = jnp.tanh(jnp.einsum('bti,ihd->bthd', x, heads).reshape(x.shape))
    return x


def contracted_in_heads(params, x):
    for i in range(LAYERS):
        heads = params['w'][i].reshape(2, WIDTH // 2, WIDTH)
        x = jnp.tanh(jnp.einsum('bhtd,hdo->bto', x.reshape(2, 3, 2, 4).transpose(0, 2, 1, 3), heads))
    return x


def sliced_outputs(params, x):
    for i in range(LAYERS):
        parts = jnp.split(params['w'][i], 2, axis=1)
        x = jnp.tanh(jnp.concatenate([x @ part for part in parts], axis=-1))
    return x


def interleaved_outputs(params, x):
    for i in range(LAYERS):
        pairs = params['w'][i].reshape(WIDTH, WIDTH // 2, 2)
        x = jnp.tanh(jnp.stack([x @ pairs[..., 0], x @ pairs[..., 1]], axis=-1).reshape(x.shape))
    return x


def with_integers_of_numpy(params, x):
    width = np.int64(WIDTH)
    for i in np.arange(LAYERS):
        w = jax.lax.slice(params['w'], (i, np.int64(0), np.int64(0)), (i + 1, width, width)).reshape(width, width)
        w = jax.lax.broadcast_in_dim(w, (1, width, width), np.arange(1, 3))
        x = jnp.tanh(x @ jax.lax.squeeze(w, np.arange(1)))
    return x


def one_column(params, x):
    for i in range(LAYERS):
        w = params['w'][i]
        x = jnp.tanh(jnp.concatenate([x @ w[:, :1], x @ w[:, 1:-1], (x @ w[:, -1])[..., None]], axis=-1))
    return x


def columns_of_layers(params, x):
    for i in range(LAYERS):
        parts = [x @ params['w'][i, :, :-1], x @ params['w'][i, :, -1:]]
        x = jnp.tanh(jnp.concatenate(parts, axis=-1))
    return x


def vmapped_rows(params, x):
    for i in range(LAYERS):
        x = jnp.tanh(jax.vmap(lambda row, w: row @ w, (0, None))(x, params['w'][i]))
    return x


def cast_masked_and_scaled(params, x):
    for i in range(LAYERS):
        w = jnp.where(jnp.ones((WIDTH, WIDTH), bool), params['w'][i], 0.0)
        x = jnp.tanh(x @ jax.lax.stop_gradient(2.0 * w / 2.0).astype(jnp.float32))
    return x


FORMS = [
    scan,
    scan_of_rematerialised,
    loop,
    loop_with_weights_in_its_carry,
    loop_whose_end_is_data,
    unrolled,
    branches,
    transposed,
    kernel_first,
    jitted,
    own_derivatives,
    in_heads,
    contracted_in_heads,
    sliced_outputs,
    interleaved_outputs,
    one_column,
    columns_of_layers,
    with_integers_of_numpy,
    vmapped_rows,
    cast_masked_and_scaled,
]


@pytest.mark.parametrize('stat', [calibrate.squares, calibrate.hessian])
@pytest.mark.parametrize('forward', FORMS, ids=lambda form: form.__name__)
def test_statistics_equal_numpy(forward, stat):
    statistic = sl.collect(forward, W, [X, 2 * X], stat=stat)['w']
    for layer in range(LAYERS):
        want = 0
        for batch in (X, 2 * X):
            x = np.asarray(batch, np.float64).reshape(-1, WIDTH)
            for earlier in range(layer):
                x = np.tanh(x @ np.asarray(W['w'][earlier], np.float64))
            want = want + (np.sum(x**2, axis=0) if stat is calibrate.squares else x.T @ x)
        np.testing.assert_allclose(statistic.total[layer], want, rtol=1e-4, atol=1e-4)
    assert statistic.tokens.tolist() == [12] * LAYERS
    assert statistic.axes.layers == (0,)


def test_a_scan_backwards_numbers_layers_by_their_place():
    reversed_stack = {'w': W['w'][::-1]}
    backwards = sl.collect(scan_backwards, reversed_stack, [X])['w'].total
    np.testing.assert_array_equal(backwards[::-1], sl.collect(scan, W, [X])['w'].total)


def test_layers_may_be_stacked_along_any_axis():
    params = {'w': jnp.moveaxis(W['w'], 0, 1)}
    statistic = sl.collect(lambda p, x: scan({'w': jnp.moveaxis(p['w'], 1, 0)}, x), params, [X])['w']
    assert statistic.axes.layers == (1,)
    np.testing.assert_array_equal(statistic.total, sl.collect(scan, W, [X])['w'].total)


def test_experts_have_a_statistic_each():
    params = {'w': W['w'][:3]}
    dispatched = jax.random.normal(jax.random.key(2), (3, 5, WIDTH))
    statistic = sl.collect(lambda p, x: jnp.einsum('eti,eio->eto', x, p['w']), params, [dispatched])['w']
    np.testing.assert_allclose(statistic.total, np.sum(np.square(dispatched), axis=1), rtol=1e-5)
    assert statistic.tokens.tolist() == [5, 5, 5]
    mapped = sl.collect(lambda p, x: jax.vmap(jnp.matmul)(x, p['w']), params, [dispatched])['w']
    np.testing.assert_array_equal(mapped.total, statistic.total)


def test_tokens_of_a_ragged_product_are_counted_per_expert():
    params = {'w': W['w'][:3]}
    rows = jax.random.normal(jax.random.key(2), (7, WIDTH))
    sizes = jnp.array([4, 1, 2], jnp.int32)
    statistic = sl.collect(lambda p, x: jax.lax.ragged_dot(x, p['w'], sizes), params, [rows])['w']
    squares = np.square(np.asarray(rows))
    want = [squares[:4].sum(0), squares[4:5].sum(0), squares[5:].sum(0)]
    np.testing.assert_allclose(statistic.total, want, rtol=1e-5)
    assert statistic.tokens.tolist() == [4, 1, 2]


@pytest.mark.parametrize('stride', [2, 1])
def test_a_patch_embedding_reads_patches(stride):
    params = {'kernel': jax.random.normal(jax.random.key(0), (2, 2, 3, 5))}
    images = jax.random.normal(jax.random.key(1), (2, 4, 4, 3))

    def embed(p, images):
        return jax.lax.conv_general_dilated(
            images, p['kernel'], (stride, stride), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
        )

    statistic = sl.collect(embed, params, [images], stat=calibrate.hessian)['kernel']
    starts = range(0, 3, stride)
    patches = [np.asarray(images)[:, i : i + 2, j : j + 2].reshape(2, -1) for i in starts for j in starts]
    rows = np.concatenate(patches).astype(np.float64)
    np.testing.assert_allclose(statistic.total, rows.T @ rows, rtol=1e-4, atol=1e-5)
    assert int(statistic.tokens) == len(rows)
    assert (statistic.axes.inputs, statistic.axes.outputs) == ((0, 1, 2), (3,))


def test_a_tied_kernel_sums_over_its_uses_and_a_lookup_is_no_use():
    params = {'embed': jax.random.normal(jax.random.key(0), (11, WIDTH)), 'w': W['w'][0]}

    def forward(p, tokens):
        x = jnp.tanh(p['embed'][tokens] @ p['w'])
        return (x @ p['embed'].T), (2 * x) @ p['embed'].T

    tokens = jnp.array([[1, 2, 3]])
    statistics = sl.collect(forward, params, [tokens])
    x = np.tanh(np.asarray(params['embed'])[tokens[0]] @ np.asarray(params['w']))
    np.testing.assert_allclose(statistics['embed'].total, 5 * np.sum(x**2, axis=0), rtol=1e-5)
    assert int(statistics['embed'].tokens) == 6
    assert statistics['embed'].axes.inputs == (1,)


def test_learned_queries_are_inputs_not_kernels():
    params = {'queries': jnp.ones((3, WIDTH)), 'q': {'kernel': W['w'][0]}}
    statistics = sl.collect(lambda p, x: (p['queries'] * 2) @ p['q']['kernel'] + x, params, [X[0]])
    assert statistics['q/kernel'].total.tolist() == [12.0] * WIDTH


UNFOLLOWED = {
    'sort': (lambda p, x: x @ jnp.sort(p['kernel'], axis=0), r'sort \(.*test_program.py:\d+\): not a layout operation'),
    'other kernel': (lambda p, x: x @ (p['kernel'] @ p['kernel']), 'two leaves are multiplied'),
    'data': (lambda p, x: x @ (p['kernel'] * x[0, 0]), 'values that depend on the batch'),
    'some inputs': (lambda p, x: x[..., :4] @ p['kernel'][:4], 'only some indices of axis 0'),
    'strides': (lambda p, x: x[..., ::2] @ p['kernel'][::2], 'leaves out indices in between'),
    'both axes': (lambda p, x: x @ p['kernel'] @ p['kernel'].T, 'contract different axes'),
    'never': (lambda p, x: x, 'the forward never multiplies with it'),
    'nothing': (lambda p, x: None, 'the forward never multiplies with it'),
    'complex': (
        lambda p, x: x.astype(jnp.complex64) @ p['kernel'].astype(jnp.complex64),
        'a product of complex numbers',
    ),
    'diagonal': (lambda p, x: jnp.sum(x * p['kernel'][0]), 'depend on the batch'),
}


@pytest.mark.parametrize('name', UNFOLLOWED)
def test_what_cannot_be_followed_is_named(name):
    forward, reason = UNFOLLOWED[name]
    with pytest.raises(CalibrationError, match=f'^kernel: no product of the forward reads it: .*{reason}'):
        sl.collect(forward, {'kernel': W['w'][0]}, [X])


def test_an_index_that_a_branch_computes_is_named():
    def forward(params, x):
        index = jnp.argmax(x) % LAYERS
        return x @ jax.lax.cond(x[0, 0, 0] > 0, lambda: params['w'][index], lambda: params['w'][index])

    with pytest.raises(CalibrationError, match=r'^w: no product .*: cond \(.*: its branches return different parts'):
        sl.collect(forward, W, [X])


def test_an_array_that_is_multiplied_but_not_followed_is_logged(caplog):
    params = {'depthwise': jnp.ones((3, 1, WIDTH)), 'w': W['w'][0], 'scale': jnp.ones((1, WIDTH))}

    def forward(params, x):
        x = jax.lax.conv_general_dilated(
            x, params['depthwise'], (1,), 'SAME', dimension_numbers=('NWC', 'WIO', 'NWC'), feature_group_count=WIDTH
        )
        return (x * params['scale']) @ params['w']

    assert set(sl.collect(forward, params, [X])) == {'w'}
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith('arrays that are multiplied, but get no statistic: depthwise: conv_general_dilated (')
    assert line.endswith('a convolution of several groups of channels has no single input')


def swapped_in_a_loop(w, other, x):
    return jax.lax.scan(lambda carry, _: ((carry[1], carry[0], x @ carry[0]), None), (w, other, x), length=3)[0][2]


MULTIPLIED_AFTER = {
    'concatenate': lambda w, other, x: x @ jnp.concatenate([w, other], axis=1),
    'stack': lambda w, other, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, jnp.stack([w, other]))[0],
    'gather': lambda w, other, x: x @ w[jnp.arange(WIDTH)[::-1]],
    'tanh': lambda w, other, x: jax.jit(jnp.matmul)(x, jnp.tanh(w)),
    'scan': swapped_in_a_loop,
}


@pytest.mark.parametrize('operation', MULTIPLIED_AFTER)
def test_an_array_that_is_lost_before_its_product_is_logged(operation, caplog):
    params = {'w': W['w'][0], 'other': W['w'][1], 'last': W['w'][2]}

    def forward(params, x):
        return MULTIPLIED_AFTER[operation](params['w'], params['other'], x).sum(-1, keepdims=True) * x @ params['last']

    assert set(sl.collect(forward, params, [X])) == {'last'}
    assert set(sl.prune(forward, params, [X], [('.*', 0.5)], method=sl.Wanda()).masks) == {'last'}
    for line in (record.getMessage() for record in caplog.records):
        assert re.search(rf'get no statistic: .*\bw: {operation} \(', line)
    assert len(caplog.records) == 2
    # Nobody is told of what is to stay dense.
    sl.prune(forward, params, [X], [('last', 0.5), ('.*', 'dense')], method=sl.Wanda())
    assert len(caplog.records) == 2


def einsum_of_looked_up(experts, x, chosen):
    return jnp.einsum('bti,btio->bto', x, experts[chosen])


def vmap_of_looked_up(experts, x, chosen):
    return jax.vmap(jax.vmap(lambda row, expert: row @ experts[expert]))(x, chosen)


def transposed_and_looked_up(experts, x, chosen):
    of_token = jnp.take(experts.swapaxes(1, 2), chosen, axis=0).astype(x.dtype)
    return jax.jit(lambda w: jnp.einsum('btoi,bti->bto', w, x))(of_token)


@pytest.mark.parametrize('form', [einsum_of_looked_up, vmap_of_looked_up, transposed_and_looked_up])
def test_experts_that_are_looked_up_by_token_are_logged(form, caplog):
    params = {'experts': W['w'][:3], 'router': W['w'][3][:, :3]}
    assert set(sl.collect(lambda p, x: form(p['experts'], x, jnp.argmax(x @ p['router'], -1)), params, [X])) == {
        'router'
    }
    (line,) = [record.getMessage() for record in caplog.records]
    assert re.search(
        r'get no statistic: experts: gather \(.*: it looks up several matrices .*sort tokens by expert', line
    )


def test_tables_of_heads_are_not_logged(caplog):
    params = {'table': jnp.ones((11, 2, 4)), 'w': W['w'][0]}

    def forward(params, tokens):
        x = params['table'][tokens]
        keys = (x.reshape(*tokens.shape, WIDTH) @ params['w']).reshape(x.shape)
        return jnp.einsum('bqhd,bkhd->bhqk', x, keys)

    assert set(sl.collect(forward, params, [jnp.array([[1, 2, 3]])])) == {'w'}
    assert not caplog.records


def test_what_only_says_which_layer_is_read_is_not_logged(caplog):
    params = {'w': W['w'][:1], 'places': jnp.eye(3)}
    assert set(sl.collect(lambda p, x: x @ p['w'][jnp.argmax(p['places'][0])], params, [X])) == {'w'}
    assert not caplog.records


def test_tables_and_learned_inputs_are_not_logged(caplog):
    params = {'table': jnp.ones((11, WIDTH)), 'places': jnp.ones((5, WIDTH)), 'queries': W['w'][1], 'w': W['w'][0]}

    def forward(params, tokens):
        keys = params['table'][tokens] + jnp.flip(params['places'])[: tokens.shape[1]]
        return jnp.tanh(params['queries']) @ params['w'] @ keys.swapaxes(1, 2)

    assert set(sl.collect(forward, params, [jnp.array([[1, 2, 3]])])) == {'w'}
    assert not caplog.records


def test_a_layer_that_no_product_reads_is_named():
    with pytest.raises(CalibrationError, match=r'^w, layer 2: no token reached it'):
        sl.collect(lambda p, x: x @ p['w'][0] @ p['w'][1] @ p['w'][3], W, [X])


def test_a_matrix_of_which_only_one_column_is_read_is_named():
    with pytest.raises(CalibrationError, match=r'^w, layer 0: no token .*; products read single indices of axis 1'):
        sl.collect(lambda p, x: x @ p['w'][:, 3], {'w': W['w'][0]}, [X])


def test_a_batch_of_another_shape_is_traced_again():
    statistic = sl.collect(scan, W, [X, X[:1]])['w']
    assert statistic.tokens.tolist() == [9] * LAYERS
