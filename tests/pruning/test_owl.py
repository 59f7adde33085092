"""OWL's outlier shares and ratios against loops over the paper's definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparselora_jax import pruning
from sparselora_jax.models import llama
from sparselora_jax.models.init import init_params
from sparselora_jax.pruning import calibrate
from sparselora_jax.pruning.allocate import total
from sparselora_jax.sparse import rules
from sparselora_jax.sparse.patterns import PatternError
from sparselora_jax.sparse.rules import stack_of

CFG = llama.LlamaConfig(vocab=11, width=16, depth=3, heads=4, kv_heads=2, mlp_width=24)
RULES = [('language/blocks/.*', 0.5), ('.*', 'dense')]


def forward(w, batch, run):
    return llama.forward(w['language'], CFG, batch['x'], batch['valid'], run)


def setup():
    params = {'language': init_params(jax.random.key(0), llama.shapes(CFG))}
    kernel = params['language']['blocks']['mlp']['up']['kernel']  # something to stand out, in the second layer most
    params['language']['blocks']['mlp']['up']['kernel'] = kernel.at[1, :3].mul(40.0).at[2, 0].mul(40.0)
    valid = jnp.arange(6)[None] >= jnp.array([0, 3, 1, 2])[:, None]
    return params, {'x': jax.random.normal(jax.random.key(1), (4, 6, 16)), 'valid': valid}


def numpy_share(kernels, squares, threshold):
    scores = []
    for kernel, sums in zip(kernels, squares, strict=True):
        for i in range(kernel.shape[0]):
            scores.extend(abs(float(weight)) * float(sums[i]) ** 0.5 for weight in kernel[i])
    mean = sum(scores) / len(scores)
    return sum(score > threshold * mean for score in scores) / len(scores)


@pytest.mark.slow
def test_shares_are_those_of_the_dense_models_wanda_scores():
    params, batch = setup()
    paths = list(pruning.patterns_of(params, RULES))
    shares = pruning.outlier_shares(forward, params, [batch], paths, threshold=5.0, chunk=3)
    stats = calibrate.collect(
        lambda w, b: llama.forward(w['language'], CFG, b['x'], b['valid']),
        params,
        [batch],
        weights='valid',
        select=lambda path: path in paths,
    )
    flat = rules.flatten(params)
    want = [
        numpy_share([np.asarray(flat[p][layer]) for p in paths], [np.asarray(stats[p][0][layer]) for p in paths], 5.0)
        for layer in range(CFG.depth)
    ]
    np.testing.assert_allclose(shares['language'], want, atol=1e-9)
    assert want[1] > want[2] > want[0]


class Layers:
    """A stacked leaf of which one layer at a time can be had, as from a disk."""

    def __init__(self, leaf):
        self.leaf, self.shape, self.dtype, self.ndim = leaf, leaf.shape, leaf.dtype, leaf.ndim

    def __getitem__(self, layer):
        return self.leaf[layer]


def test_blocks_may_lie_on_disk():
    params, batch = setup()
    paths = list(pruning.patterns_of(params, RULES))
    lazy = {'language': params['language'] | {'blocks': jax.tree.map(Layers, params['language']['blocks'])}}
    want = pruning.outlier_shares(forward, params, [batch], paths)
    np.testing.assert_array_equal(pruning.outlier_shares(forward, lazy, [batch], paths)['language'], want['language'])


def draw(patterns=(0.5, 0.5)):
    sizes = {'a/blocks/q/kernel': 6000, 'a/blocks/up/kernel': 15000, 'b/blocks/q/kernel': 7700}
    layers = {'a': 4, 'b': 3}
    of = dict(zip('ab', patterns, strict=True))
    uniform = {path: np.full(layers[path[0]], int(of[path[0]] * size)) for path, size in sizes.items()}
    rng = np.random.default_rng(0)
    return sizes, uniform, {tower: rng.uniform(0, 0.05, size=n) for tower, n in layers.items()}


def test_ratios_of_blocks_of_one_size_are_the_sources():
    sizes, uniform = {'a/blocks/q/kernel': 10**6}, {'a/blocks/q/kernel': np.full(4, 600_000)}
    shares = np.array([0.03, 0.01, 0.02, 0.05])
    kept = (shares - shares.min()) / (shares.max() - shares.min()) * 0.08 * 2
    kept = kept - kept.mean() + (1 - 0.6)
    got = pruning.owl_zeros({'a': shares}, uniform, sizes, spread=0.08)['a/blocks/q/kernel']
    np.testing.assert_allclose(1 - got / 10**6, kept, atol=1.1e-6)
    assert got.sum() == 4 * 600_000


@pytest.mark.parametrize('patterns', [(0.5, 0.5), (0.4, 0.7)])
def test_the_sum_is_exact_and_ratios_lie_within_two_lambda(patterns):
    sizes, uniform, shares = draw(patterns)
    got = pruning.owl_zeros(shares, uniform, sizes, spread=0.08)
    assert total(got) == total(uniform)
    moved = {path: (uniform[path] - got[path]) / sizes[path] for path in sizes}  # of a block, whatever its pattern
    every = np.concatenate(list(moved.values()))
    assert every.max() - every.min() == pytest.approx(0.16, abs=1e-3)
    for path in sizes:
        assert (np.diff(moved[path][np.argsort(shares[stack_of(path)])]) >= 0).all()
    np.testing.assert_allclose(moved['a/blocks/q/kernel'], moved['a/blocks/up/kernel'], atol=1 / 6000)


def test_blocks_that_are_alike_are_pruned_uniformly():
    sizes, uniform, shares = draw()
    same = {tower: np.full(s.shape, 0.02) for tower, s in shares.items()}
    got = pruning.owl_zeros(same, uniform, sizes)
    assert all(np.array_equal(got[path], uniform[path]) for path in sizes)


def test_what_cannot_be_is_named():
    sizes, uniform, shares = draw((0.95, 0.95))
    with pytest.raises(
        PatternError, match=r"a/blocks/q/kernel, layer .: OWL's sparsity would be .*smaller spread than 0.3"
    ):
        pruning.owl_zeros(shares, uniform, sizes, spread=0.3)
    params, batch = setup()
    with pytest.raises(rules.RuleError, match='head/kernel: not inside the blocks'):
        pruning.outlier_shares(forward, params, [batch], ['head/kernel'])
    with pytest.raises(calibrate.CalibrationError, match='empty'):
        pruning.outlier_shares(forward, params, [], ['language/blocks/attn/q/kernel'])
