"""Rounding under a mask: the values are those of the paper's algorithm in numpy, four bits hold them, outputs gain."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import sparselora_jax as sl
from sparselora_jax import pruning
from sparselora_jax.pruning import calibrate
from sparselora_jax.sparse import packing
from sparselora_jax.sparse.packing import four_bits

PATTERN = sl.parse_pattern('2:4')


def pruned_and_inputs(inputs=200, outputs=6, tokens=500):
    """A kernel at 2:4, and tokens in which a few directions prevail."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(inputs, outputs))
    kernel *= np.asarray(sl.mask_from_scores(jnp.abs(jnp.asarray(kernel, jnp.float32)), '2:4'))
    few = rng.normal(size=(tokens, inputs // 10)) @ rng.normal(size=(inputs // 10, inputs))
    return kernel, few + 0.3 * rng.normal(size=(tokens, inputs))


def nearest(weights, scale, kind):
    levels = np.array(four_bits.LEVELS[kind])
    return levels[np.abs(np.asarray(weights)[..., None] / scale - levels).argmin(axis=-1)] * scale


def numpy_scale(weights, kind):
    shares = four_bits.shares(kind).astype(np.float64)
    scales = (np.abs(weights).max() * shares).astype(ml_dtypes.bfloat16).astype(np.float64)
    return scales[np.argmin([np.sum((nearest(weights, scale, kind) - weights) ** 2) for scale in scales])]


def numpy_gptq(kernel, hessian, kind, size, damp=0.01):
    """One input after the other; what is left is corrected by the inverse Hessian of what is left."""
    w, mask = kernel.copy(), kernel != 0
    inverse = np.linalg.inv(hessian + damp * np.mean(np.diag(hessian)) * np.eye(len(hessian)))
    for i in range(len(w)):
        if i % size == 0:
            part = slice(i, i + size)
            scales = [numpy_scale(w[part, o][mask[part, o]], kind) for o in range(w.shape[1])]
        rounded = np.where(mask[i], [nearest(v, scale, kind) for v, scale in zip(w[i], scales, strict=True)], 0)
        error = (w[i] - rounded) / inverse[i, i]
        w[i:] -= np.outer(inverse[i:, i], error)
        w[i] = rounded
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return w


@pytest.mark.parametrize(
    ('held', 'kind', 'inputs', 'size'),
    [('packed24_int4', 'int4', 200, 128), ('int4', 'int4', 192, 64), ('nf4', 'nf4', 192, 64)],
)
def test_equals_numpy_in_float64(held, kind, inputs, size):
    kernel, x = pruned_and_inputs(inputs)
    want = numpy_gptq(kernel, x.T @ x, kind, size)
    with jax.enable_x64(True):
        got, mask = pruning.GPTQ(format=held)(jnp.asarray(kernel), jnp.asarray(x.T @ x), PATTERN)
    np.testing.assert_allclose(got, want, atol=1e-9)
    np.testing.assert_array_equal(mask, kernel != 0)


def through(held, weights, mask):
    """The kernel as it is read from what holds it."""
    params, masks = {'kernel': weights}, {'kernel': mask}
    reduced, _ = packing.reduce_kernels(params, masks, held)
    return sl.unpack(reduced, jnp.float32)['kernel']


@pytest.mark.slow
@pytest.mark.parametrize('held', ['packed24_int4', 'nf4', pytest.param('int4', marks=pytest.mark.slow)])
@pytest.mark.parametrize('dtype', [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
def test_four_bits_hold_the_values_and_outputs_are_nearer_than_by_rounding_to_the_nearest(dtype, held):
    kernel, x = (jnp.asarray(array, dtype) for array in pruned_and_inputs(256))
    hessian = calibrate.hessian(x)
    got, mask = pruning.GPTQ(format=held)(kernel, hessian, PATTERN)
    assert got.dtype == dtype
    assert (mask == (kernel != 0)).all()
    assert not got[~mask].any()
    read, plain = (through(held, weights, mask) for weights in (got, kernel))
    if dtype == jnp.float32:
        np.testing.assert_array_equal(read, got)
    errors = [jnp.linalg.norm(x.astype(jnp.float32) @ (w - kernel.astype(jnp.float32))) for w in (read, plain)]
    assert errors[0] < 0.7 * errors[1]


def test_dead_inputs_do_not_break_the_hessian():
    kernel, x = pruned_and_inputs()
    x[:, [3, 130]] = 0
    got, _ = pruning.GPTQ()(jnp.asarray(kernel, jnp.float32), jnp.asarray(x.T @ x, jnp.float32), PATTERN)
    assert jnp.isfinite(got).all()


def test_a_singular_hessian_is_said():
    kernel, x = (jnp.asarray(array, jnp.float32) for array in pruned_and_inputs(tokens=5))
    got, _ = pruning.GPTQ(damp=0.0)(kernel, x.T @ x, PATTERN)
    assert jnp.isnan(got).all()


def test_an_unknown_holder_is_named():
    kernel, x = (jnp.asarray(array, jnp.float32) for array in pruned_and_inputs())
    with pytest.raises(packing.PackingError, match="GPTQ format 'int3': expected one of packed24_int4, int4, nf4"):
        pruning.GPTQ(format='int3')(kernel, x.T @ x, PATTERN)
