"""Wrong forwards, params and batches end in one line that says what is wrong, where, and what to do."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparselora_jax as sl
from sparselora_jax.pruning import calibrate
from sparselora_jax.pruning.calibrate import CalibrationError

W = jax.random.normal(jax.random.key(0), (8, 4))
PARAMS = {'q': {'kernel': W}}
X = jax.random.normal(jax.random.key(1), (2, 3, 8))
THIS_FILE = r'\S*test_calibration_inputs\.py:\d+'


def product(params, batch):
    return batch @ params['q']['kernel']


def refused(message, *arguments, **keywords):
    """Check that `collect` ends in one line."""
    with pytest.raises(CalibrationError) as error:
        sl.collect(*arguments, **keywords)
    line = str(error.value)
    assert re.search(message, line)
    assert '\n' not in line


RESULTS = {
    'nothing': None,
    'text': 'done',
    'function': jax.nn.gelu,
    'class': dict,
}


@pytest.mark.parametrize('result', RESULTS.values(), ids=RESULTS)
def test_what_a_forward_returns_does_not_matter(result):
    def forward(params, batch):
        product(params, batch)
        return result

    np.testing.assert_array_equal(
        sl.collect(forward, PARAMS, [X])['q/kernel'].total, sl.collect(product, PARAMS, [X])['q/kernel'].total
    )


def of_float(params, batch):
    return float(product(params, batch)[0, 0, 0])


def of_if(params, batch):
    y = product(params, batch)
    if y[0, 0, 0] > 0:
        return y
    return -y


def of_numpy(params, batch):
    return np.asarray(product(params, batch)).sum()


def of_mask(params, batch):
    return batch[batch > 0]


def of_range(params, batch):
    return [product(params, batch) for _ in range(jnp.argmax(batch))]


@pytest.mark.parametrize(
    'forward', [of_float, of_if, of_numpy, of_mask, of_range], ids=lambda forward: forward.__name__
)
def test_a_forward_that_reads_values_is_named_with_its_line(forward):
    refused(
        rf'^forward \({THIS_FILE}\): Python reads the value of an array, which a traced program does not have yet: '
        r'replace if, float\(\), int\(\), range\(\) and numpy by jnp.where, jax.lax.cond, jax.lax.fori_loop, jnp',
        forward,
        PARAMS,
        [X],
    )


def test_an_error_of_a_forward_is_named_with_its_line():
    def forward(params, batch):
        return jax.vmap(lambda x: x @ params['q']['kernel'].T)(batch)

    refused(rf'^forward \({THIS_FILE}\) fails: TypeError: dot_general requires contracting dim', forward, PARAMS, [X])
    refused(rf"^forward \({THIS_FILE}\) fails: KeyError: 'k'", lambda p, x: x @ p['k'], PARAMS, [X])


def test_an_error_within_a_library_is_placed_where_the_user_calls_it():
    def forward(params, batch):
        hidden = sl.linear(batch, params['q']['kernel'])
        return sl.linear(hidden, params['q']['kernel'])

    line = forward.__code__.co_firstlineno + 2
    refused(rf'^forward \(\S*test_calibration_inputs\.py:{line}\) fails: TypeError', forward, PARAMS, [X])


def test_errors_that_name_what_to_do_pass_through():
    def forward(params, batch):
        raise sl.PatternError('the words of a user')

    with pytest.raises(sl.PatternError, match=r'^the words of a user'):
        sl.collect(forward, PARAMS, [X])


@pytest.mark.parametrize('wrap', [lambda f: f, jax.jit], ids=['plain', 'jit'])
def test_a_forward_that_closes_over_its_params_is_named(wrap):
    refused(
        '^q/kernel: no product of the forward reads it: the forward never multiplies with it, as part of its first '
        'argument; params from outside the function do not count',
        wrap(lambda params, batch: product(PARAMS, batch)),
        PARAMS,
        [X],
    )


TWO = {'a': {'weight': W}, 'b': {'weight': W}, 'scale': jnp.ones((2, 4))}


def one_of_two(params, batch):
    return (batch @ params['a']['weight']) * params['scale'][0]


def test_a_selected_kernel_that_the_forward_never_reads_is_named():
    assert set(sl.collect(one_of_two, TWO, [X])) == {'a/weight'}
    refused('^b/weight: no product of the forward reads it', one_of_two, TWO, [X], select=lambda path: '/' in path)
    refused(
        r'^scale: no product of the forward reads it: mul \(.*\): .*; leave it out of select$',
        one_of_two,
        TWO,
        [X],
        select=lambda path: path in ('a/weight', 'scale'),
    )
    assert set(sl.collect(one_of_two, TWO, [X], select='a/weight'.__eq__)) == {'a/weight'}


def test_a_selection_of_nothing_and_one_that_fails_are_named():
    refused('^select picks none of 3 matrices, such as a/weight', one_of_two, TWO, [X], select=lambda path: 'z' in path)
    refused("^function select fails: KeyError: 'a/weight'", one_of_two, TWO, [X], select=lambda path: {}[path])


def test_a_rule_for_a_matrix_that_the_forward_never_reads_says_so():
    stats = sl.collect(one_of_two, TWO, [X])
    message = "^rule 'b/weight' matches b/weight, which has no statistic: no product of the forward that `collect` ran"
    with pytest.raises(sl.RuleError, match=message):
        sl.prune_tree(TWO, stats, [('b/weight', '2:4'), ('.*', 'dense')], method=sl.Wanda())


def test_a_rule_for_a_matrix_that_is_left_out_for_its_name_says_so():
    params = {'embed': jnp.ones((8, 8)), 'q': {'kernel': jnp.ones((8, 4))}}

    def forward(params, x):
        return x @ params['embed'] @ params['q']['kernel']

    message = r"^rule 'embed' matches embed, which is no kernel: in a tree with matrices called 'kernel', no others"
    with pytest.raises(sl.RuleError, match=message):
        sl.prune(forward, params, [X], [('embed', 'dense'), ('.*', '2:4')], method=sl.Wanda())


def test_batches_of_several_shapes_are_summed():
    parts = [X, X[:1], X[0], X[:, :2]]
    found = sl.collect(product, PARAMS, parts, stat=calibrate.hessian)['q/kernel']
    rows = np.concatenate([np.asarray(part, np.float64).reshape(-1, 8) for part in parts])
    np.testing.assert_allclose(found.total, rows.T @ rows, rtol=1e-5, atol=1e-5)
    assert int(found.tokens) == 16


def test_a_batch_of_a_shape_that_the_forward_does_not_take_is_named():
    refused(
        rf'^forward \({THIS_FILE}\) fails: TypeError: dot_general .* \(batch 2 of shapes \(2, 7\), batch 0 of '
        r'\(2, 3, 8\)\)$',
        product,
        PARAMS,
        [X, X, jnp.ones((2, 7))],
    )


def test_a_batch_that_uses_other_kernels_is_named():
    def forward(params, batch):
        x = batch @ params['a']['weight']
        return x if len(batch) == 2 else x @ params['b']['weight'].T

    refused(
        r'^b/weight: the forward reads it in another way than for the batches before \(batch 1 of shapes \(1, 3, 8\), '
        r'batch 0 of \(2, 3, 8\)\)$',
        forward,
        TWO,
        [X, X[:1]],
    )


LEAVES = {
    'numpy text': np.array(['a']),
    'numpy objects': np.array([object()]),
    'shape': jax.ShapeDtypeStruct((8, 4), jnp.float32),
    'on disk': type('OnDisk', (), {'shape': (8, 4), 'dtype': np.dtype('float32')})(),
}


@pytest.mark.parametrize('leaf', LEAVES.values(), ids=LEAVES)
def test_leaves_that_only_look_like_arrays_are_named(leaf):
    kind = 'array of' if isinstance(leaf, np.ndarray) else type(leaf).__name__
    refused(rf'^params: other is an? {kind}.*: expected an array of numbers', product, {**PARAMS, 'other': leaf}, [X])


OTHER_LEAVES = {'text': 'text', 'None': None, 'int': 3, 'float': 2.5, 'function': jax.nn.gelu, 'key': jax.random.key(0)}


@pytest.mark.parametrize('leaf', OTHER_LEAVES.values(), ids=OTHER_LEAVES)
def test_other_leaves_are_given_to_the_forward_as_they_are(leaf):
    def forward(params, batch):
        assert isinstance(leaf, jax.Array) or params['other'] is leaf
        return product(params, batch)

    assert set(sl.collect(forward, {**PARAMS, 'other': leaf}, [X])) == {'q/kernel'}


def test_a_leaf_that_is_not_hashable_is_named():
    refused(
        '^params: other is a set: expected an array, or an object that can be', product, {**PARAMS, 'other': {1}}, [X]
    )


@pytest.mark.parametrize('leaf', ['text', 3, None])
def test_a_kernel_that_is_no_array_fails_where_the_forward_reads_it(leaf):
    refused(rf'^forward \({THIS_FILE}\) fails: ', product, {'q': {'kernel': leaf}, 'k': {'kernel': W}}, [X])


@pytest.mark.parametrize('params', [{'q': {'kernel': None}}, {'q': jnp.ones(8)}, {}, None, 'text'])
def test_params_without_a_matrix_are_refused(params):
    refused('^params hold no array of two or more axes, so no kernel', product, params, [X])


def test_a_batch_that_holds_no_arrays_is_named():
    batch = {'x': X, 'names': ['a', 'b']}
    refused(
        r'^batch 1: names/0 is a str: expected arrays of numbers',
        lambda p, b: b['x'] @ p['q']['kernel'],
        PARAMS,
        [{'x': X}, batch],
    )
    refused(r'^batch 0 is a str: expected arrays', product, PARAMS, ['text'])
    refused(r'^batch 0 holds no array', product, PARAMS, [None])
    assert sl.collect(lambda p, b: product(p, b['x']), PARAMS, [{'x': X, 'n': 3}])


def tower(params, batch):
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), batch, params['blocks']['kernel'])
    return x @ params['a_head']['kernel']


TOWER = {'blocks': {'kernel': jax.random.normal(jax.random.key(0), (3, 8, 8))}, 'a_head': {'kernel': W}}


def test_the_first_kernel_and_batch_that_are_not_finite_are_named():
    wrong = [X, X, X.at[1, 2, 3].set(jnp.nan), X.at[0].set(jnp.inf)]
    # Kernels are named in the order in which the program reads them.
    refused(
        '^blocks/kernel, layer 0: activations are not finite or too large to be squared in calibration batch 2$',
        tower,
        TOWER,
        wrong,
    )
    wrong = [X, X.at[0].set(jnp.inf)]
    refused(
        '^blocks/kernel, layer 0: activations are not finite or too large to be squared in calibration batch 1$',
        tower,
        TOWER,
        wrong,
    )


def test_a_layer_that_makes_nan_is_named():
    params = TOWER | {'blocks': {'kernel': TOWER['blocks']['kernel'].at[1, 0, 0].set(jnp.nan)}}
    refused(
        '^blocks/kernel, layer 2: activations are not finite or too large to be squared in calibration batch 0$',
        tower,
        params,
        [X, X],
    )


def test_batches_that_cannot_be_read_again_are_not_searched():
    refused(
        '^blocks/kernel, layer 0: activations are not finite during calibration; give the batches as a list',
        tower,
        TOWER,
        itertools.chain([X, X * jnp.nan]),
    )


def test_a_sum_that_is_too_large_is_told_from_bad_activations():
    refused(
        '^q/kernel: activations are finite in each batch, but their sum is too large for float32',
        product,
        PARAMS,
        [jnp.full((1, 8), 1.5e19)] * 2,
    )


@pytest.mark.parametrize('shape', [(0, 8), (8, 0), (0, 8, 8)])
def test_an_array_without_elements_is_no_kernel(shape):
    params = {'w': jnp.zeros(shape), 'v': jnp.ones((8, 8))}

    def forward(params, x):
        of_none = [x[:, : w.shape[0]] @ w for w in params['w'].reshape(*shape[:-2] or (1,), *shape[-2:])]
        return of_none, x @ params['v']

    assert set(sl.collect(forward, params, [jnp.ones((5, 8))])) == {'v'}
    result = sl.prune(forward, params, [jnp.ones((5, 8))], [('.*', 0.5)], method=sl.Wanda())
    assert set(result.masks) == {'v'}
    assert result.params['w'].shape == shape
