"""Global magnitude pruning is numpy's stable sort of every weight of the model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparselora_jax import pruning
from sparselora_jax.pruning.allocate import total
from sparselora_jax.sparse import rules
from sparselora_jax.sparse.masks import check_masks
from sparselora_jax.sparse.patterns import PatternError

SHAPES = {'vision/blocks/fc/kernel': (3, 6, 5), 'language/blocks/q/kernel': (2, 8, 4), 'head/kernel': (7, 3)}
METHOD = pruning.Magnitude(group='matrix')


def numpy_masks(params, budget):
    """Every weight in one array, sorted."""
    every = np.concatenate([np.abs(np.asarray(leaf, np.float64)).reshape(-1) for leaf in params.values()])
    mask = np.ones(every.size, bool)
    mask[np.argsort(every, kind='stable')[:budget]] = False
    parts = np.split(mask, np.cumsum([leaf.size for leaf in params.values()])[:-1])
    return {path: part.reshape(params[path].shape) for path, part in zip(params, parts, strict=True)}


def draw(kind, dtype):
    rng = np.random.default_rng(0)
    params = {path: rng.normal(size=shape, scale=1 + i) for i, (path, shape) in enumerate(SHAPES.items())}
    if kind == 'tied':  # many equal weights, of both signs, zeros among them
        params = {path: np.round(leaf) for path, leaf in params.items()}
    return {path: jnp.asarray(leaf, dtype) for path, leaf in sorted(params.items())}


@pytest.mark.parametrize('kind', ['distinct', 'tied'])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float64'])
@pytest.mark.parametrize('pattern', [0.1, 0.5, 0.7])
def test_global_magnitude_equals_numpy(kind, dtype, pattern):
    with jax.enable_x64(dtype == 'float64'):
        flat = draw(kind, dtype)
        params, of_all = rules.unflatten(flat), [('.*', pattern)]
        uniform = pruning.uniform_zeros(params, of_all, method=METHOD)
        zeros = pruning.global_magnitude_zeros(params, uniform)
        assert total(zeros) == total(uniform)
        _pruned, masks = pruning.prune_tree(params, None, of_all, method=METHOD, zeros=zeros)
        for path, want in numpy_masks(flat, total(uniform)).items():
            np.testing.assert_array_equal(rules.flatten(masks)[path], want, err_msg=path)
        check_masks(masks, of_all, group='matrix', zeros=zeros)


class Layers:
    """A stacked kernel of which only one layer at a time can be had; counts how often."""

    def __init__(self, leaf):
        self.leaf, self.shape, self.dtype, self.ndim, self.read = leaf, leaf.shape, leaf.dtype, leaf.ndim, 0

    def __getitem__(self, layer):
        self.read += 1
        return self.leaf[layer]


def test_weights_are_read_a_layer_at_a_time_and_twice():
    flat = {path: leaf for path, leaf in draw('distinct', 'float32').items() if leaf.ndim == 3}
    of_all = [('.*', 0.5)]
    uniform = pruning.uniform_zeros(rules.unflatten(flat), of_all, method=METHOD)
    want = pruning.global_magnitude_zeros(rules.unflatten(flat), uniform)
    lazy = {path: Layers(leaf) for path, leaf in flat.items()}
    got = pruning.global_magnitude_zeros(rules.unflatten(lazy), uniform)
    assert all(np.array_equal(got[path], want[path]) for path in flat)
    assert [leaf.read for leaf in lazy.values()] == [2 * leaf.shape[0] for leaf in flat.values()]


def test_only_the_kernels_that_are_pruned_are_compared():
    params = rules.unflatten(draw('distinct', 'float32'))
    of_one = [('language/.*', 0.5), ('.*', 'dense')]
    uniform = pruning.uniform_zeros(params, of_one, method=METHOD)
    assert list(pruning.global_magnitude_zeros(params, uniform)) == ['language/blocks/q/kernel']


def test_a_kernel_that_would_keep_nothing_is_named():
    params = {'blocks': {'a': {'kernel': jnp.full((2, 4, 4), 0.1).at[1].set(1.0)}}}
    uniform = pruning.uniform_zeros(params, [('.*', 0.5)], method=METHOD)
    with pytest.raises(PatternError, match='blocks/a/kernel, layer 0: all 16 weights would be pruned'):
        pruning.global_magnitude_zeros(params, uniform)


@pytest.mark.parametrize('kind', ['distinct', 'tied'])
@pytest.mark.parametrize('highest', [0.75, 0.8, 0.9])
def test_no_layer_exceeds_the_bound_and_the_rest_is_one_threshold(kind, highest):
    """Numpy: weights by size, one after the other, each pruned unless its layer has all that it may have."""
    flat = draw(kind, 'float32')
    params, of_all = rules.unflatten(flat), [('.*', 0.7)]
    uniform = pruning.uniform_zeros(params, of_all, method=METHOD)
    got = pruning.global_magnitude_zeros(params, uniform, highest=highest)
    layers = [layer for leaf in flat.values() for layer in (leaf if leaf.ndim == 3 else [leaf])]
    every = sorted((abs(float(w)), layer) for layer, leaf in enumerate(layers) for w in np.asarray(leaf).reshape(-1))
    left, want = [int(highest * leaf.size + 1e-6) for leaf in layers], [0] * len(layers)
    for _, layer in every:
        if sum(want) < total(uniform) and want[layer] < left[layer]:
            want[layer] += 1
    assert np.concatenate([of_layers.reshape(-1) for of_layers in got.values()]).tolist() == want
    unbounded = pruning.global_magnitude_zeros(params, uniform)
    assert highest > 0.8 or any(not np.array_equal(got[path], unbounded[path]) for path in got)


def test_a_budget_that_does_not_fit_under_the_bound_is_named():
    params = rules.unflatten(draw('distinct', 'float32'))
    uniform = pruning.uniform_zeros(params, [('.*', 0.7)], method=METHOD)
    with pytest.raises(PatternError, match=r'a highest sparsity of 0.6 allows'):
        pruning.global_magnitude_zeros(params, uniform, highest=0.6)
