"""Each token counts as often as its weight says, in every kernel whose rows are the tokens; others are named."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparselora_jax as sl
from sparselora_jax import pruning
from sparselora_jax.pruning import calibrate
from sparselora_jax.pruning.calibrate import CalibrationError

WIDTH = 8
W = {'w': 0.5 * jax.random.normal(jax.random.key(0), (WIDTH, WIDTH))}
KINDS = {'squares': calibrate.squares, 'hessian': calibrate.hessian}


def batches(count=3):
    """Batches of 2 sequences of 5 tokens; every third token or so weighs nothing."""
    made = []
    for i in range(count):
        weights = jax.random.uniform(jax.random.key(10 + i), (2, 5), minval=-1.0, maxval=2.0)
        made.append({'x': jax.random.normal(jax.random.key(i), (2, 5, WIDTH)), 'importance': jnp.maximum(weights, 0.0)})
    return made


def forward(params, batch):
    return batch['x'] @ params['w']


def gram(batches):
    """Return the weighted Gram matrix of the rows, its diagonal, the number of rows and the sum of their weights."""
    x = np.concatenate([np.asarray(batch['x'], np.float64).reshape(-1, WIDTH) for batch in batches])
    weights = np.concatenate([np.asarray(batch['importance'], np.float64).reshape(-1) for batch in batches])
    matrix = x.T @ (weights[:, None] * x)
    return {'hessian': matrix, 'squares': np.diagonal(matrix)}, int(np.sum(weights > 0)), weights.sum()


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('weights', ['importance', lambda batch: batch['importance']], ids=['key', 'function'])
def test_statistics_equal_weighted_gram_matrices(kind, weights):
    statistic = sl.collect(forward, W, batches(), stat=KINDS[kind], weights=weights)['w']
    want, tokens, _ = gram(batches())
    np.testing.assert_allclose(statistic.total, want[kind], rtol=1e-5, atol=1e-5)
    assert int(statistic.tokens) == tokens


def test_means_are_weighted_means():
    method = pruning.DSnoT(pruning.SparseGPT())
    mean = sl.collect(forward, W, batches(), stat=calibrate.Mean(calibrate.squares), weights='importance')['w'].total
    moments = sl.collect(forward, W, batches(), stat=method.statistic, weights='importance')['w'].total
    want, _, weight = gram(batches())
    np.testing.assert_allclose(mean, want['squares'] / weight, rtol=1e-5)
    np.testing.assert_allclose(moments.second, want['squares'] / weight, rtol=1e-5)
    np.testing.assert_allclose(moments.initial, want['hessian'] / weight, rtol=1e-5, atol=1e-5)
    first = sum(np.einsum('bt,bti->i', *(np.asarray(batch[name], np.float64) for name in ('importance', 'x')))
                for batch in batches())  # fmt: skip
    np.testing.assert_allclose(moments.first, first / weight, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('stat', [*KINDS.values(), pruning.DSnoT().statistic], ids=[*KINDS, 'moments'])
def test_masks_of_booleans_integers_and_floats_give_the_same_bits(stat):
    masks = [batch['importance'] > 0 for batch in batches()]
    found = []
    for dtype in (bool, jnp.int32, jnp.float32, jnp.bfloat16):
        masked = [batch | {'mask': mask.astype(dtype)} for batch, mask in zip(batches(), masks, strict=True)]
        found.append(sl.collect(forward, W, masked, stat=stat, weights='mask')['w'])
    for other in found[1:]:
        jax.tree.map(np.testing.assert_array_equal, other[:2], found[0][:2])


def test_a_weight_of_one_is_no_weight():
    ones = [batch | {'importance': jnp.ones((2, 5))} for batch in batches()]
    plain = sl.collect(forward, W, ones, stat=calibrate.hessian)['w']
    for weights in ('importance', lambda batch: None, lambda batch: np.ones((2, 5), bool)):
        weighted = sl.collect(forward, W, ones, stat=calibrate.hessian, weights=weights)['w']
        np.testing.assert_array_equal(weighted.total, plain.total)
        assert int(weighted.tokens) == 30


def test_what_tokens_of_weight_zero_hold_does_not_matter():
    want = sl.collect(forward, W, batches(), weights='importance')['w'].total
    for value in (99.0, jnp.nan, jnp.inf):
        others = [
            batch | {'x': jnp.where(batch['importance'][..., None] > 0, batch['x'], value)} for batch in batches()
        ]
        np.testing.assert_array_equal(sl.collect(forward, W, others, weights='importance')['w'].total, want)


def test_tiny_activations_keep_their_weights():
    tiny = [batch | {'x': 1e-24 * batch['x']} for batch in batches()]
    total = sl.collect(forward, W, tiny, stat=calibrate.hessian, weights='importance')['w'].total
    scaled = np.asarray(total, np.float64) / np.float64(calibrate.SCALE * 1e-24) ** 2
    np.testing.assert_allclose(scaled, gram(batches())[0]['hessian'], rtol=1e-4, atol=1e-4)


ROWS = {
    'flat': lambda params, batch: batch['x'].reshape(10, WIDTH) @ params['w'],
    'heads': lambda params, batch: batch['x'].reshape(2, 5, 2, 4) @ params['half'],
    'flat heads': lambda params, batch: batch['x'].reshape(10, 2, 4) @ params['half'],
    'kernel first': lambda params, batch: jnp.einsum('io,bti->bto', params['w'], batch['x']),
    'split inputs': lambda params, batch: jnp.einsum('bthd,hdo->bto', batch['x'].reshape(2, 5, 2, 4), params['heads']),
    'two experts': lambda params, batch: jnp.einsum('ebti,eio->ebto', jnp.stack([batch['x']] * 2), params['experts']),
    'loop': lambda params, batch: jax.lax.fori_loop(0, 2, lambda i, x: x @ params['experts'][i] * 0 + x, batch['x']),
}


@pytest.mark.parametrize('form', ROWS)
def test_rows_with_the_axes_of_the_weights_in_front_have_their_weights(form, caplog):
    kernels = {'w': W['w'], 'half': W['w'][:4], 'heads': W['w'].reshape(2, 4, 8), 'experts': jnp.stack([W['w']] * 2)}
    statistics = sl.collect(ROWS[form], kernels, batches(), weights='importance')
    ((name, statistic),) = statistics.items()
    want, tokens, _ = gram(batches())
    squares = want['squares']
    if name == 'half':
        # Both halves of each token are rows.
        squares = squares.reshape(2, 4).sum(axis=0)
        tokens = 2 * tokens
    np.testing.assert_allclose(statistic.total, np.broadcast_to(squares, statistic.total.shape), rtol=1e-5)
    assert set(statistic.tokens.reshape(-1).tolist()) == {tokens}
    assert not caplog.records


def test_a_weight_for_each_sequence_is_that_of_all_its_tokens():
    def of_sequences(weights):
        return sl.collect(forward, W, batches(1), weights=lambda batch: weights)['w'].total

    of_tokens = of_sequences(jnp.array([[2.0] * 5, [0.5] * 5]))
    np.testing.assert_array_equal(of_sequences(jnp.array([2.0, 0.5])), of_tokens)


def test_kernels_with_other_rows_count_every_row_and_are_named_once(caplog):
    params = dict.fromkeys(('token', 'pooled', 'turned', 'class'), W['w'])
    params['moe'] = jnp.stack([W['w']] * 2)

    def forward(params, batch):
        x = batch['x'] @ params['token']
        pooled = x.mean(axis=1) @ params['pooled']
        # Rows of a ragged product are sorted by expert, whatever their number.
        sorted_rows = jax.lax.ragged_dot(x.reshape(10, WIDTH), params['moe'], jnp.array([4, 6], jnp.int32))
        return pooled @ params['class'], x.swapaxes(0, 1) @ params['turned'], sorted_rows

    found = sl.collect(forward, params, batches(), weights='importance')
    plain = sl.collect(forward, params, batches())
    for name in ('pooled', 'turned', 'class', 'moe'):
        np.testing.assert_array_equal(found[name].total, plain[name].total)
        np.testing.assert_array_equal(found[name].tokens, plain[name].tokens)
    np.testing.assert_allclose(found['token'].total, gram(batches())[0]['squares'], rtol=1e-5)
    (record,) = caplog.records
    assert record.message == (
        'weights of tokens do not fit the rows of class [2]; moe [10] sorted by expert; pooled [2]; turned [5, 2]: '
        'each of these rows counts once'
    )


def test_statistics_that_cannot_weigh_tokens_take_only_booleans():
    def outliers(x):
        return jnp.sum((jnp.abs(x) > 1).astype(jnp.float32), axis=0)

    masked = [batch | {'mask': batch['importance'] > 0} for batch in batches()]
    want = sum(np.sum(np.abs(batch['x']) > 1, axis=(0, 1), where=np.asarray(batch['mask'])[..., None])
               for batch in masked)  # fmt: skip
    np.testing.assert_array_equal(sl.collect(forward, W, masked, stat=outliers, weights='mask')['w'].total, want)
    message = r'^statistic outliers cannot weigh tokens by numbers: give weights of True and False, or give it a method'
    with pytest.raises(CalibrationError, match=message):
        sl.collect(forward, W, masked, stat=outliers, weights='importance')


WRONG = {
    'array': (jnp.ones((2, 5)), r"^weights is a .*Array.*: expected the name of an entry of each batch, such as 'att"),
    'number': (1.0, '^weights is a float: expected the name of an entry of each batch'),
    'no such entry': ('mask', "^weights='mask': batch 0 has no such entry; it has importance, x"),
    'batch has no names': (1, '^weights is a int: expected the name'),
    'function fails': (lambda batch: batch['mask'], r"^function weights \(of batch 0\) fails: KeyError: 'mask'"),
    'list': (lambda batch: [1.0, 2.0], '^weights of batch 0: a list; expected an array'),
    'text': (lambda batch: np.array(['a', 'b']), '^weights of batch 0: an array of <U1; expected booleans or numbers'),
    'complex': (lambda batch: np.ones((2, 5), complex), '^weights of batch 0: an array of complex128; expected bool'),
    'one for all': (lambda batch: jnp.ones(()), r'^weights of batch 0: shape \(\); expected one number a token'),
    'other tokens': (
        lambda batch: jnp.ones((2, 6)),
        r'^weights of tokens \[2, 6\] fit the rows of no kernel: w \[2, 5',
    ),
    'turned': (lambda batch: jnp.ones((5, 2)), r'^weights of tokens \[5, 2\] fit the rows of no kernel: w \[2, 5\]'),
    'of inputs': (lambda batch: jnp.ones((2, 5, 8)), r'^weights of tokens \[2, 5, 8\] fit the rows of no kernel'),
    'negative': (lambda batch: jnp.ones((2, 5)).at[1, 3].set(-2.0), r'^weights of batch 0: -2.0 at \[1, 3\]; expected'),
    'negative int': (
        lambda batch: np.array([[0], [-1]]),
        r'^weights of batch 0: -1 at \[1, 0\]; expected numbers of 0',
    ),
    'NaN': (lambda batch: jnp.ones((2, 5)).at[0, 0].set(jnp.nan), r'^weights of batch 0: nan at \[0, 0\]; expected'),
    'infinite': (lambda batch: np.full((2, 5), np.inf), r'^weights of batch 0: inf at \[0, 0\]; expected'),
    'all zero': (
        lambda batch: jnp.zeros((2, 5)),
        '^w: no token reached it during calibration .one of weight 0 does not count.$',
    ),
}


@pytest.mark.parametrize('name', WRONG)
def test_wrong_weights_end_in_one_line(name, monkeypatch):
    monkeypatch.setattr('jaxtyping.config.jaxtyping_disable', True)
    weights, message = WRONG[name]
    with pytest.raises(CalibrationError) as error:
        sl.collect(forward, W, batches(), weights=weights)
    assert re.search(message, str(error.value))
    assert '\n' not in str(error.value)


def test_the_batch_of_wrong_weights_is_named():
    wrong = batches()
    wrong[2]['importance'] = wrong[2]['importance'].at[0, 1].set(jnp.nan)
    with pytest.raises(CalibrationError, match=r'^weights of batch 2: nan at \[0, 1\]'):
        sl.collect(forward, W, iter(wrong), weights='importance')
    with pytest.raises(CalibrationError, match=r"^weights='importance': batch 1 is a .*Array.*, not a dict"):
        sl.collect(lambda params, batch: batch['x'] @ params['w'], W, [wrong[0], jnp.ones(3)], weights='importance')


@pytest.mark.parametrize('first', [None, np.array([True, False, True, True])], ids=['none', 'mask'])
def test_weights_may_be_numbers_in_some_batches_only(first):
    params = {'w': jax.random.normal(jax.random.key(0), (8, 8))}
    x = np.asarray(jax.random.normal(jax.random.key(1), (2, 4, 8)))
    numbers = np.array([1.0, 2.0, 0.0, 0.5], np.float32)
    batches = [{'x': x[0], 'weights': first}, {'x': x[1], 'weights': numbers}]
    got = {}
    for name, given in (('in order', batches), ('reversed', batches[::-1])):
        got[name] = sl.collect(
            lambda p, batch: batch['x'] @ p['w'],
            params,
            given,
            stat=calibrate.Mean(calibrate.squares),
            weights=lambda b: b['weights'],
        )['w']
    counts = np.ones(4) if first is None else first
    weights = np.concatenate([counts, numbers])
    want = weights @ np.square(x.reshape(8, 8)) / weights.sum()
    for statistic in got.values():
        np.testing.assert_allclose(statistic.total, want, rtol=1e-5)
        assert int(statistic.tokens) == counts.sum() + 3
