"""Zeros of every layer sum exactly to the budget, keep their bounds, and follow the scores as a plain loop has them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparselora_jax import pruning
from sparselora_jax.pruning.allocate import check_bound, check_zeros, round_zeros, run_allocation, total
from sparselora_jax.sparse.patterns import PatternError
from sparselora_jax.sparse.rules import stack_of

SIZES = {'a/blocks/q/kernel': 60, 'a/blocks/up/kernel': 150, 'b/blocks/q/kernel': 77}
LAYERS = {'a/blocks/q/kernel': 3, 'a/blocks/up/kernel': 3, 'b/blocks/q/kernel': 2}


def draw(rng, spread=2.0):
    return {path: rng.lognormal(sigma=spread, size=LAYERS[path]) for path in SIZES}


def numpy_kept(scores, sizes, kept, highest):
    """The source's loop on real numbers: the floor first, then the rest by the scores of groups that are not full."""
    scores, sizes = np.array(scores, float), np.array(sizes, float)
    have = (1 - highest) * sizes
    while kept - have.sum() > 1e-9 * kept:
        have = have + scores / scores.sum() * (kept - have.sum())
        scores[have >= sizes] = 0
        have = np.minimum(have, sizes)
    return have


def test_a_groups_ratio_is_that_of_the_sources_loop():
    scores, highest = {path: np.ones(LAYERS[path]) for path in SIZES}, 0.8
    scores['a/blocks/q/kernel'] = np.array([0.5, 1.0, 3.0])
    groups = [('a', layer) for layer in range(3)] + [('b', layer) for layer in range(2)]
    of_group = [sum(scores[path][layer] for path in SIZES if stack_of(path) == g) for g, layer in groups]
    sizes = [sum(SIZES[path] for path in SIZES if stack_of(path) == g) for g, _ in groups]
    budget = 400
    kept = numpy_kept(of_group, sizes, sum(sizes) - budget, highest)
    got = pruning.allocate(scores, SIZES, budget, highest=highest)
    for path in SIZES:
        for layer in range(LAYERS[path]):
            index = groups.index((stack_of(path), layer))
            want = SIZES[path] * (1 - kept[index] / sizes[index])
            assert abs(got[path][layer] - want) < 1, (path, layer)


def test_groups_that_fill_up_leave_the_rest_to_the_others():
    sizes, scores = {'fc/kernel': 1000}, {'fc/kernel': np.array([1000.0, 20.0, 2.0, 1.0])}
    for budget in range(100, 3200, 300):
        got = pruning.allocate(scores, sizes, budget, highest=0.8)['fc/kernel']
        kept = numpy_kept(scores['fc/kernel'], [1000] * 4, 4000 - budget, 0.8)
        assert got.sum() == budget
        np.testing.assert_allclose(1000 - got, kept, atol=1)


def test_the_sum_is_exact_and_the_bounds_hold():
    rng = np.random.default_rng(0)
    weights = sum(SIZES[path] * LAYERS[path] for path in SIZES)
    for _ in range(200):
        highest = rng.uniform(0.3, 0.99)
        budget = int(rng.uniform(0.05, 0.98) * highest * weights)
        got = pruning.allocate(draw(rng), SIZES, budget, highest=highest)
        assert total(got) == budget
        for path, zeros in got.items():
            assert zeros.shape == (LAYERS[path],)
            assert zeros.min() >= 0
            assert zeros.max() <= highest * SIZES[path] + 1e-6
        # Kernels of a block share a ratio, but for rounding.
        a, b = (got[path] / SIZES[path] for path in list(SIZES)[:2])
        assert np.abs(a - b).max() <= 1 / 60 + 1 / 150


def test_of_two_layers_the_one_with_the_higher_score_keeps_more():
    rng = np.random.default_rng(1)
    alone = ('a/blocks/up/kernel', 'b/blocks/q/kernel')  # the only kernel of its block
    drawn = draw(rng, spread=1.0)
    scores = {path: drawn[path] for path in alone}
    got = pruning.allocate(scores, SIZES, 300, highest=0.9)
    for path in alone:
        order = np.argsort(scores[path])
        assert (np.diff(got[path][order]) <= 0).all()


def test_equal_scores_per_weight_are_uniform():
    scores = {path: np.full(LAYERS[path], float(SIZES[path])) for path in SIZES}
    weights = sum(SIZES[path] * LAYERS[path] for path in SIZES)
    got = pruning.allocate(scores, SIZES, weights // 2, highest=0.8)
    for path, zeros in got.items():
        assert np.abs(zeros / SIZES[path] - 0.5).max() <= 1 / SIZES[path]


def test_the_scale_of_scores_changes_nothing():
    scores = draw(np.random.default_rng(2))
    first = pruning.allocate(scores, SIZES, 450, highest=0.8)
    for scale in (1e-12, 1e12):
        second = pruning.allocate({path: scale * s for path, s in scores.items()}, SIZES, 450, highest=0.8)
        assert all(np.array_equal(first[path], second[path]) for path in SIZES)


def test_rounding_goes_to_the_largest_remainders_and_stops_at_what_a_layer_may_lose():
    wanted = {'q': np.array([1.7, 2.6, 3.9, 0.8])}
    most = {'q': np.array([9, 9, 3, 9])}
    assert round_zeros(wanted, 9, most)['q'].tolist() == [2, 3, 3, 1]
    assert round_zeros({'q': np.array(2.5), 'k': np.array([0.5])}, 3, {'q': np.array(9), 'k': np.array([9])}) == {
        'q': np.array(3),
        'k': np.array([0]),
    }


@pytest.mark.parametrize('group', ['output', 'matrix'])
def test_the_budget_is_what_uniform_pruning_makes(group):
    params = {
        'a': {'blocks': {'q': {'kernel': jnp.arange(2 * 7 * 5.0).reshape(2, 7, 5)}}},
        'b': {'kernel': jnp.ones((4, 4))},
    }
    rules, method = [('a/.*', 0.7), ('.*', 0.3)], pruning.Magnitude(group=group)
    uniform = pruning.uniform_zeros(params, rules, method=method)
    _, masks = pruning.prune_tree(params, None, rules, method=method)
    made = {'a/blocks/q/kernel': masks['a']['blocks']['q']['kernel'], 'b/kernel': masks['b']['kernel']}
    assert {path: int((~mask).sum()) for path, mask in made.items()} == {p: int(z.sum()) for p, z in uniform.items()}
    assert uniform['a/blocks/q/kernel'].shape == (2,)
    assert uniform['b/kernel'].shape == ()
    assert pruning.kernel_sizes(params, uniform) == {'a/blocks/q/kernel': 35, 'b/kernel': 16}


def test_what_is_allocated_is_pruned_exactly():
    params = {'a': {'blocks': {'q': {'kernel': jnp.sin(jnp.arange(2 * 8 * 5.0)).reshape(2, 8, 5)}}}}
    rules, method = [('.*', 0.5)], pruning.Magnitude()
    uniform = pruning.uniform_zeros(params, rules, method=method)
    sizes = pruning.kernel_sizes(params, uniform)
    zeros = pruning.allocate({'a/blocks/q/kernel': np.array([1.0, 3.0])}, sizes, total(uniform), highest=0.8)
    _, masks = pruning.prune_tree(params, None, rules, method=method, zeros=zeros)
    assert (~np.asarray(masks['a']['blocks']['q']['kernel'])).sum(axis=(1, 2)).tolist() == zeros[
        'a/blocks/q/kernel'
    ].tolist()
    assert zeros['a/blocks/q/kernel'].tolist() == [26, 14]


def test_what_cannot_be_allocated_is_named():
    params = {'a': {'blocks': {'q': {'kernel': jnp.ones((2, 8, 5))}}}}
    for pattern, message in (('2:4', 'a/blocks/q/kernel: .* N:M pattern 2:4'), ('dense', 'no zeros to allocate')):
        with pytest.raises(PatternError, match=message):
            pruning.uniform_zeros(params, [('.*', pattern)], method=pruning.Magnitude())
    path = 'fc/kernel'

    def of(scores, budget=100, highest=0.8, sizes=100):
        pruning.allocate({path: np.array(scores)}, {path: sizes}, budget, highest=highest)

    with pytest.raises(PatternError, match=r'120 of 200 weights \(0.6000\) .* highest sparsity of 0.5 allows 100'):
        of([1.0, 2.0], budget=120, highest=0.5)
    with pytest.raises(PatternError, match='120 of 200'):
        check_bound({path: np.array([60, 60])}, {path: 100}, 0.5)
    for highest in (0.0, 1.5):
        with pytest.raises(PatternError, match=r'expected a share in \(0, 1\]'):
            of([1.0, 2.0], highest=highest)
    for odd in (np.nan, np.inf, -1.0):
        with pytest.raises(PatternError, match=r'fc/kernel, layer 1: importance .*: expected a finite number'):
            of([1.0, odd])
    with pytest.raises(PatternError, match='2 of 2 groups of kernels have importance 0'):
        of([0.0, 0.0])
    with pytest.raises(PatternError, match=r'1 of 2 groups .* cannot hold the 150 weights'):
        of([0.0, 1.0], budget=50)
    with pytest.raises(PatternError, match='fc/kernel, layer 0: all 100 weights would be pruned'):
        of([0.0, 1.0], highest=1.0)
    with pytest.raises(PatternError, match='9 zeros are to be allocated, and at most 6 may be'):
        round_zeros({path: np.array([4.5, 4.5])}, 9, {path: np.array([3, 3])})


@pytest.mark.parametrize(
    ('zeros', 'message'),
    [
        ({'q': np.array([5, 6])}, '11 in all, expected 10, the sum of uniform pruning'),
        ({'q': np.array([5.5, 4.5])}, 'q has float64 numbers'),
        ({'q': np.array([10])}, r'q has int64 numbers of shape \(1,\)'),
        ({}, 'q is missing'),
        ({'q': np.array([5, 5]), 'k': np.array([0])}, 'k is no kernel that is pruned'),
        ({'q': np.array([-1, 11])}, 'q has -1, expected 0 or more'),
        ({'q': np.array([2, 8])}, 'q, layer 1: all 8 weights would be pruned'),
        ([5, 5], 'expected a dict by path, not list'),
    ],
)
def test_what_an_allocation_returns_is_checked(zeros, message):
    uniform = {'q': np.array([5, 5])}
    sizes = {'q': 8}
    check_zeros({'q': np.array([4, 6])}, uniform, sizes)
    with pytest.raises(PatternError, match=message):
        check_zeros(zeros, uniform, sizes)


def inputs_of(uniform, sizes):
    """What an allocation gets; the functions are never called."""

    def unused(*args):
        raise NotImplementedError

    return pruning.AllocationInputs(
        params={},
        uniform=uniform,
        sizes=sizes,
        forward=unused,
        loss=unused,
        calibration=unused,
        score_batches=unused,
        is_image=unused,
        key=jax.random.key(0),
        progress=unused,
    )


class EditsInPlace(pruning.Allocation):
    def __call__(self, inputs):
        inputs.uniform['q'] -= 1
        inputs.sizes['q'] = 1000
        return inputs.uniform


class Lists(pruning.Allocation):
    def __call__(self, inputs):
        return {path: zeros.tolist() for path, zeros in inputs.uniform.items()}


class ReturnsNothing(pruning.Allocation):
    def __call__(self, inputs):
        return None


class Raises(pruning.Allocation):
    def __call__(self, inputs):
        return inputs.no_such_thing


class Ragged(pruning.Allocation):
    def __call__(self, inputs):
        return {'q': [[1], [2, 3]]}


def test_an_allocation_that_edits_its_inputs_is_compared_with_the_untouched_numbers():
    inputs = inputs_of({'q': np.array([5, 5])}, {'q': 8})
    with pytest.raises(PatternError, match='8 in all, expected 10'):
        run_allocation(EditsInPlace(), inputs)
    assert inputs.uniform['q'].tolist() == [5, 5]
    assert inputs.sizes == {'q': 8}


def test_an_allocation_may_return_lists():
    zeros = run_allocation(Lists(), inputs_of({'q': np.array([5, 5])}, {'q': 8}))
    assert isinstance(zeros['q'], np.ndarray)
    assert zeros['q'].tolist() == [5, 5]


@pytest.mark.parametrize(
    ('allocation', 'error', 'message'),
    [
        (ReturnsNothing(), PatternError, 'expected a dict by path, not NoneType'),
        (Raises(), pruning.AllocationError, "allocation Raises fails: AttributeError: .*'no_such_thing'"),
        (Ragged(), pruning.AllocationError, 'allocation Ragged fails: ValueError: '),
    ],
)
def test_an_allocation_that_fails_is_named(allocation, error, message):
    with pytest.raises(error, match=message):
        run_allocation(allocation, inputs_of({'q': np.array([5, 5])}, {'q': 8}))


@pytest.mark.parametrize('wanted', [[-30.0, 10.0, 40.0], [-1e9, 0.25, 21.5], [90.0, -60.0, -10.0], [30.0, 30.0, 90.0]])
def test_zeros_beyond_a_limit_are_made_up_for_by_the_others(wanted):
    most = {'q': np.array([15, 15, 30])}
    zeros = round_zeros({'q': np.array(wanted)}, 20, most)['q']
    assert zeros.sum() == 20
    assert ((zeros >= 0) & (zeros <= most['q'])).all()
    # The order of the wishes is kept, up to rounding and to the limits.
    order = np.argsort(wanted)
    assert (np.diff(np.minimum(zeros, 15)[order]) >= -1).all()
