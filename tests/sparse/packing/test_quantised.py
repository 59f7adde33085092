"""Four-bit kernels against numpy, and what a base in fewer bytes is to everything that reads it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix

import sparselora_jax as sl
from sparselora_jax.planning import tracing
from sparselora_jax.restoration import restore
from sparselora_jax.sparse import packing, rules
from sparselora_jax.sparse.packing import quantised

# Appendix E of arXiv 2305.14314 (QLoRA).
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
BASES = ('int4', 'nf4', 'packed24', 'packed24_int4', 'bitmask')


def kernel(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def numpy_levels(weights, scale, kind):
    """(every weight at its nearest level of the scale of its tile, whether two are as near), in float64."""
    *layers, inputs, outputs = weights.shape
    tile = np.gcd(inputs, 128)
    tiles = weights.astype(np.float64).reshape(*layers, inputs // tile, tile, outputs)
    scale = np.where(scale == 0, 1, scale.astype(np.float64))[..., None, :]
    levels = np.arange(-8, 8) if kind == 'int4' else np.array(NF4)
    far = np.abs((tiles / scale)[..., None] - levels)
    first, second = np.sort(far, axis=-1)[..., :2].transpose(-1, *range(tiles.ndim))
    return (levels[far.argmin(axis=-1)] * scale).reshape(weights.shape), (second - first < 1e-4).reshape(weights.shape)


@pytest.mark.parametrize('kind', packing.FOUR_BITS)
@pytest.mark.parametrize('shape', [(256, 6), (2, 96, 4)])
def test_weights_are_at_their_nearest_levels_of_a_scale_better_than_the_largest_makes(kind, shape):
    weights = kernel(*shape)
    weights[..., :8, 0] = 0
    got = quantised.quantise(jnp.asarray(weights), kind)
    tile = np.gcd(shape[-2], 128)
    assert got.shape == shape
    assert got.scale.dtype == jnp.bfloat16
    assert got.scale.shape == (*shape[:-2], shape[-2] // tile, shape[-1])
    want, tied = numpy_levels(weights, np.asarray(got.scale), kind)
    held = quantised.dequantise(got)
    assert np.isclose(held, want, rtol=1e-6, atol=1e-6)[~tied].all()
    assert tied.mean() < 0.03
    layers, how = weights.reshape(-1, *shape[-2:]), {'channelwise_axes': [1], 'tiled_axes': {0: tile}}
    how |= {'scale_dtype': jnp.bfloat16}
    by_largest = [
        quantised.dequantise(qwix.quantize(layer, quantised.FOUR_BITS[kind], **how))
        for layer in map(jnp.asarray, layers)
    ]
    errors = [
        np.square(np.reshape(of, layers.shape) - layers).reshape(len(layers), -1, tile, shape[-1]).sum(axis=2)
        for of in (held, np.stack(by_largest))
    ]
    assert (errors[0] <= 1.00001 * errors[1]).all()
    assert errors[0].sum() < 0.95 * errors[1].sum()


@pytest.mark.parametrize('kind', packing.FOUR_BITS)
def test_values_on_a_grid_are_held_as_they_are(kind):
    rng = np.random.default_rng(0)
    codes, scale = rng.integers(0, 16, (128, 64)), jnp.asarray(rng.normal(size=64), jnp.bfloat16).astype(jnp.float32)
    levels = np.arange(-8.0, 8) if kind == 'int4' else np.array(NF4)
    weights = jnp.asarray(levels, jnp.float32)[codes] * scale
    np.testing.assert_array_equal(quantised.dequantise(quantised.quantise(weights, kind)), weights)


@pytest.mark.parametrize('kind', packing.FOUR_BITS)
def test_a_tile_of_zeros_is_zeros(kind):
    weights = jnp.zeros((256, 2)).at[0, 0].set(1.0)
    np.testing.assert_allclose(quantised.dequantise(quantised.quantise(weights, kind)), weights, atol=0.07)


def tree(dtype=jnp.float32):
    """(params, masks): two kernels that have a mask, one that has none, a bias."""
    params = {
        'a': {'kernel': kernel(3, 16, 12), 'bias': kernel(3, 12)},
        'b': {'kernel': kernel(24, 8, seed=1)},
        'c': {'kernel': kernel(8, 8, seed=2)},
    }
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)
    _, masks = sl.prune_tree(params, None, [('[ab]/.*', '2:4'), ('.*', 'dense')], method=sl.Magnitude())
    return params, masks


@pytest.mark.parametrize('base', BASES)
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_the_shapes_are_those_of_what_is_made(base, dtype):
    params, masks = tree(dtype)
    made = sl.reduce_base(sl.Frozen(params, masks), base)
    expected = packing.reduce_shapes(params, dict.fromkeys(rules.flatten(masks), 0.5), base)

    def shapes(of):
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), of)

    assert shapes(made.params) == shapes(expected[0])
    assert shapes(made.masks or {}) == shapes(expected[1])
    bits = tracing.nbytes([rules.flatten(made.params)[path] for path in rules.flatten(masks)]) * 8
    weights = sum(mask.size for mask in rules.flatten(masks).values())
    per_weight = {'int4': 5.4, 'nf4': 5.4, 'packed24_int4': 4.4}  # scales of few inputs weigh much
    assert bits / weights <= per_weight.get(base, 8 * np.dtype(dtype).itemsize / 2 + 1)


@pytest.mark.parametrize('base', BASES)
def test_merge_adds_to_what_the_base_holds_and_keeps_every_zero(base):
    params, masks = tree()
    lora = sl.init_lora(jax.random.key(0), params, [('.*', (2, 4))])
    lora = jax.tree.map(lambda leaf: leaf + 0.1, lora)
    made = sl.reduce_base(sl.Frozen(params, masks), base)
    held = sl.unpack(made.params, jnp.float32)
    got = restore.merge_trained(made, lora, 'lora', dtype=jnp.float32)
    want = restore.merge_trained(sl.Frozen(held, masks), lora, 'lora')
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-7, atol=1e-9), got, want)
    sl.check_sparse(got, masks)
    if base in ('packed24', 'bitmask'):  # lossless
        jax.tree.map(np.testing.assert_array_equal, got, sl.merge(params, masks, lora))


def test_formats_may_be_rules():
    params, masks = tree()
    made = sl.reduce_base(sl.Frozen(params, masks), [('a/.*', 'packed24_int4'), ('b/.*', 'bitmask')])
    assert made.params['a']['kernel'].scale is not None
    assert isinstance(made.params['b']['kernel'], sl.Bitmask)
    assert made.masks is None
    assert made.params['c']['kernel'] is params['c']['kernel']


@pytest.mark.parametrize('base', BASES)
@pytest.mark.parametrize('gradient', ['exact', 'straight_through'])
def test_outputs_and_gradients_are_those_of_the_dense_kernel(base, gradient):
    params, masks = tree()
    lora = sl.init_lora(jax.random.key(0), params, [('b/.*', (2, 4)), ('.*', None)])
    lora = jax.tree.map(lambda leaf: leaf + 0.1, lora)
    made, x = sl.reduce_base(sl.Frozen(params, masks), base), kernel(5, 24, seed=3)

    def loss(x, lora, params, masks):
        weights = sl.bind(params, masks, lora, gradient=gradient)
        return jnp.sum(jnp.sin(sl.linear(x, weights['b']['kernel'])))

    differentiated = jax.value_and_grad(loss, argnums=(0, 1))
    got = differentiated(jnp.asarray(x), lora, made.params, made.masks)
    held = sl.unpack(made.params, jnp.float32)
    want = differentiated(jnp.asarray(x), lora, held, masks)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)


def test_an_unknown_kind_is_named():
    params, masks = tree()
    with pytest.raises(sl.PackingError, match=r"format 'int3': expected one of .*, int4, nf4"):
        sl.reduce_base(sl.Frozen(params, masks), 'int3')
