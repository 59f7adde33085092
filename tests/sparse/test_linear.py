"""One matmul for every kind of kernel: outputs and gradients are those of the plain formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparselora_jax as sl
from sparselora_jax.runtime.errors import SparseloraError


def parts(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 5)
    kernel = jax.random.normal(keys[0], (16, 12), dtype)
    lora = sl.Lora(jax.random.normal(keys[1], (16, 3)), jax.random.normal(keys[2], (3, 12)), 0.5)
    mask = sl.mask_from_scores(jax.random.uniform(keys[3], (16, 12)), '2:4')
    return kernel, mask, lora, jax.random.normal(keys[4], (2, 5, 16), dtype)


FORMULAS = {
    'masked': lambda w, m, lora, x: x @ jnp.where(m, w, 0),
    'exact': lambda w, m, lora, x: x @ jnp.where(m, w + lora.scale * lora.a @ lora.b, 0),
    'plain': lambda w, m, lora, x: x @ (jnp.where(m, w, 0) + lora.scale * lora.a @ lora.b),
}


@pytest.mark.parametrize('kind', FORMULAS)
def test_outputs_and_gradients_are_those_of_the_formula(kind):
    kernel, mask, lora, x = parts()

    def ours(lora, x):
        weight = sl.Masked(kernel, mask) if kind == 'masked' else sl.Adapted(kernel, mask, lora, kind)
        return jnp.sum(jnp.tanh(sl.linear(x, weight, jnp.ones(12))))

    def oracle(lora, x):
        return jnp.sum(jnp.tanh(FORMULAS[kind](kernel, mask, lora, x) + 1))

    got, want = (jax.value_and_grad(f, argnums=(0, 1))(lora, x) for f in (ours, oracle))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)


def test_the_activations_decide_the_dtype():
    kernel, mask, lora, x = parts(jnp.bfloat16)
    for weight in (kernel, np.asarray(kernel), sl.Masked(kernel, mask), sl.Adapted(kernel, mask, lora)):
        assert sl.linear(x, weight).dtype == jnp.bfloat16
    grads = jax.grad(lambda lora: jnp.sum(sl.linear(x, sl.Adapted(kernel, mask, lora)).astype(jnp.float32)))(lora)
    assert grads.a.dtype == grads.b.dtype == jnp.float32


@pytest.mark.parametrize('product', [lambda x, kernel: x @ kernel, lambda x, kernel: kernel @ x, jnp.dot, jnp.matmul])
@pytest.mark.parametrize('kind', ['Masked', 'Adapted'])
def test_a_product_that_is_not_linears_is_refused(product, kind):
    kernel, mask, lora, x = parts()
    params = {'q': {'kernel': kernel}}
    masks = {'q': {'kernel': mask}}

    def multiply():
        bound = sl.bind(params, masks, {'q': {'kernel': lora}} if kind == 'Adapted' else None)
        return product(x, bound['q']['kernel'])

    with pytest.raises(SparseloraError, match=f'a kernel is a {kind}, which is no array: write sl.linear'):
        multiply()
