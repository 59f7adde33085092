"""Contract: a mask has exactly the promised zeros per comparison group, ties by position."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import sparselora_jax as sl
from sparselora_jax import PatternError
from sparselora_jax.sparse import masks as sparsity


def numpy_mask(scores, pattern, group):
    """The definition, one group at a time: stable sort, drop the first ones."""
    inputs, outputs = scores.shape
    mask = np.ones(scores.shape, bool)

    def prune(view, values, zeros):
        view[np.argsort(values, kind='stable')[:zeros]] = False

    if pattern.structured:
        for column in range(outputs):
            for start in range(0, inputs, pattern.m):
                rows = slice(start, start + pattern.m)
                prune(mask[rows, column], scores[rows, column], pattern.m - pattern.n)
    elif group == 'output':
        for column in range(outputs):
            prune(mask[:, column], scores[:, column], int(round(pattern.sparsity * inputs, 6)))
    else:
        flat = mask.reshape(-1)
        prune(flat, scores.reshape(-1), int(round(pattern.sparsity * scores.size, 6)))
    return mask


@pytest.mark.parametrize('ties', [False, True])
@pytest.mark.parametrize(
    ('text', 'group'), [('2:4', 'output'), ('4:8', 'output'), ('0.7', 'output'), ('0.7', 'matrix'), ('dense', 'output')]
)
def test_mask_equals_the_definition(text, group, ties):
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 3, (16, 10)).astype(np.float32) if ties else rng.random((16, 10), np.float32)
    pattern = sparsity.parse_pattern(text)
    ours = np.asarray(sparsity.mask_from_scores(jnp.asarray(scores), pattern, group=group))
    np.testing.assert_array_equal(ours, numpy_mask(scores, pattern, group))


def test_stacked_layers_are_pruned_one_by_one():
    scores = jax.random.uniform(jax.random.key(0), (3, 8, 4))
    stacked = sparsity.mask_from_scores(scores, 0.5)
    for layer in range(3):
        assert jnp.array_equal(stacked[layer], sparsity.mask_from_scores(scores[layer], 0.5))


def test_number_of_zeros_may_be_traced_and_compiles_once():
    traces = []

    @jax.jit
    def mask(scores, zeros):
        traces.append(zeros)
        return sparsity.mask_from_scores(scores, 0.5, num_zeros=zeros)

    scores = jax.random.uniform(jax.random.key(0), (10, 4))
    for zeros in (0, 3, 7, 10):
        assert (jnp.sum(~mask(scores, zeros), axis=0) == zeros).all()
    assert len(traces) == 1


@pytest.mark.parametrize('text', ['', '2', '4:2', '0:4', '4:4', '-0.1', '1.0', 'nan', '2:4:8', 'half'])
def test_bad_pattern_is_refused_by_name(text):
    with pytest.raises(sparsity.PatternError, match='pattern'):
        sparsity.parse_pattern(text)


def test_pattern_that_does_not_divide_the_axis_is_refused():
    with pytest.raises(sparsity.PatternError, match='4 does not divide the input axis of 6'):
        sparsity.mask_from_scores(jnp.ones((6, 2)), '2:4')


def test_zeros_are_counted_on_the_host_in_decimal():
    for size in range(10, 2000, 10):
        assert sparsity.parse_pattern(0.7).zeros(size) == size // 10 * 7


def test_check_masks_names_path_layer_and_count():
    mask = sparsity.mask_from_scores(jax.random.uniform(jax.random.key(0), (3, 8, 4)), '2:4')
    sparsity.check_masks({'q': {'kernel': mask}}, [('vision/.*', 'dense'), ('.*', '2:4')])  # a dense tower has no masks
    broken = mask.at[1, :, 2].set(True)
    with pytest.raises(sparsity.PatternError, match=r'q/kernel, layer \[1\]: 2 groups break pattern 2:4'):
        sparsity.check_masks({'q': {'kernel': broken}}, [('.*', '2:4')])


def test_check_sparse_names_path_layer_and_count():
    masks = {'q': {'kernel': jnp.array([[[True], [False]], [[False], [False]]])}}
    params = {'q': {'kernel': jnp.array([[[1.0], [0.0]], [[2.0], [0.0]]])}}
    with pytest.raises(sparsity.PatternError, match=r'q/kernel, layer \[1\]: 1 weights'):
        sparsity.check_sparse(params, masks)


def test_density_counts_what_is_kept():
    masks = {'a': {'kernel': jnp.array([[True, False], [True, True]])}, 'b': {'kernel': jnp.zeros((2, 2), bool)}}
    assert sparsity.density(masks) == {'a/kernel': 0.75, 'b/kernel': 0.0, 'total': 0.375}


@pytest.mark.parametrize('num_zeros', [-1, 5, 2.0, np.array([1, 2, 5])])
def test_impossible_numbers_of_zeros_are_refused(num_zeros, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, 'jaxtyping_disable', True)
    with pytest.raises(sparsity.PatternError, match='expected integers from 0 to 4'):
        sparsity.mask_from_scores(jnp.ones((4, 3)), 0.5, num_zeros=num_zeros)


@pytest.mark.parametrize('pattern', ['2:4', 0.5])
@pytest.mark.parametrize('bad', [jnp.nan, jnp.inf, -jnp.inf])
def test_scores_that_are_not_finite_do_not_change_the_number_of_zeros(pattern, bad):
    scores = jax.random.normal(jax.random.key(0), (8, 6))
    for wrong in (scores.at[0, 0].set(bad), scores.at[:4, 1].set(bad), jnp.full_like(scores, bad)):
        np.testing.assert_array_equal(jnp.sum(sl.mask_from_scores(wrong, pattern), axis=0), [4] * 6)


def test_scores_need_two_axes_and_groups_a_known_name(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, 'jaxtyping_disable', True)
    with pytest.raises(PatternError, match=r'scores of shape \[4\]: expected \[\*layers, inputs, outputs\]'):
        sl.mask_from_scores(jnp.ones(4), '2:4')
    for pattern in ('2:4', 0.5):
        with pytest.raises(PatternError, match="group 'rows': expected 'output' or 'matrix'"):
            sl.mask_from_scores(jnp.ones((4, 2)), pattern, group='rows')


def test_a_pattern_is_checked_however_it_is_made():
    assert sl.Pattern(n=2, m=4) == sl.parse_pattern('2:4')
    wrong = [{'n': 3, 'm': 2}, {'n': 0, 'm': 4}, {'sparsity': 0.3, 'n': 2, 'm': 4}, {'sparsity': -1.0}]
    for fields in [*wrong, {'sparsity': 2.0}, {'sparsity': float('nan')}]:
        with pytest.raises(PatternError):
            sl.Pattern(**fields)


@pytest.mark.parametrize('mask', [np.ones((8, 8), np.float32), None, 'mask'])
def test_what_is_no_mask_is_named(mask):
    with pytest.raises(PatternError, match=r'^q: the mask is .*, expected an array of booleans$'):
        sparsity.check_masks({'q': mask}, [('.*', 0.5)], axes={'q': sl.KernelAxes((), (0,), (1,))})
