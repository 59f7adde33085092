"""Dropout of LoRA's inputs: values and gradients are torch's for the same bits, and a draw knows its row alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import sparselora_jax as sl
from sparselora_jax.sparse.dropout import Dropout, DropoutError, kept_entries, row_keys

RATE = 0.3
ROWS = 3


def parts(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 5)
    kernel = jax.random.normal(keys[0], (16, 12), dtype)
    lora = sl.Lora(jax.random.normal(keys[1], (16, 3)), jax.random.normal(keys[2], (3, 12)), 0.5)
    mask = sl.mask_from_scores(jax.random.uniform(keys[3], (16, 12)), '2:4')
    return kernel, mask, lora, jax.random.normal(keys[4], (ROWS, 5, 16), dtype)


def of_kernel(step=0, rate=RATE, path='q/kernel', layers=()):
    return Dropout(rate, row_keys(7, jnp.asarray(step), ROWS)).of_kernel(path, layers)


def torch_loss(kernel, mask, lora, x, kept, *, masks_update):
    """The formula in torch, with torch's own gradients: dropout's `x * kept / (1 - rate)` before the update."""
    kernel, mask, a, b, x = (torch.tensor(np.asarray(array)) for array in (kernel, mask, lora.a, lora.b, x))
    for leaf in (a, b, x):
        leaf.requires_grad_()
    dropped = x * torch.tensor(np.asarray(kept)) / (1 - RATE)
    update = lora.scale * (a @ b)
    if masks_update:
        update = update * mask
    loss = torch.tanh(x @ (kernel * mask) + dropped @ update + 1).sum()
    loss.backward()
    return float(loss.detach()), a.grad, b.grad, x.grad


@pytest.mark.parametrize('kind', ['exact', 'plain', 'dense', 'packed'])
def test_values_and_gradients_are_those_of_torch_for_the_same_bits(kind):
    kernel, mask, lora, x = parts()
    dropout = of_kernel()
    if kind == 'dense':
        mask = jnp.ones_like(mask)
    adapted = {
        'dense': lambda lora: sl.Adapted(kernel, None, lora, dropout=dropout),
        'packed': lambda lora: sl.Adapted(packed, None, lora, dropout=dropout),
    }
    packed = sl.pack({'kernel': kernel}, {'kernel': mask}, 'packed24')['kernel'] if kind == 'packed' else None
    weight = adapted.get(kind, lambda lora: sl.Adapted(kernel, mask, lora, kind, dropout=dropout))

    def ours(lora, x):
        return jnp.sum(jnp.tanh(sl.linear(x, weight(lora), jnp.ones(12))))

    loss, (of_lora, of_x) = jax.value_and_grad(ours, argnums=(0, 1))(lora, x)
    want = torch_loss(kernel, mask, lora, x, kept_entries(dropout, x.shape), masks_update=kind != 'plain')
    for got, oracle in zip((loss, of_lora.a, of_lora.b, of_x), want, strict=True):
        np.testing.assert_allclose(got, oracle, rtol=1e-4, atol=1e-4)


def test_straight_through_has_the_same_values_and_ignores_the_mask_in_the_factors_gradients():
    kernel, mask, lora, x = parts()
    dropout = of_kernel()
    exact, straight = (sl.Adapted(kernel, mask, lora, name, dropout=dropout) for name in ('exact', 'straight_through'))
    np.testing.assert_array_equal(sl.linear(x, exact), sl.linear(x, straight))
    grads = jax.grad(lambda lora: jnp.sum(sl.linear(x, dataclasses.replace(straight, lora=lora))))(lora)
    dropped = jnp.where(kept_entries(dropout, x.shape), x, 0) / (1 - RATE)
    want = jnp.einsum('bti,bto->io', dropped, jnp.ones((ROWS, 5, 12))) * lora.scale
    np.testing.assert_allclose(grads.a, want @ lora.b.T, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_draw_depends_on_step_row_kernel_and_layer_and_on_nothing_else():
    shape = (ROWS, 50, 16)
    kept = kept_entries(of_kernel(), shape)
    assert abs(float(jnp.mean(kept)) - (1 - RATE)) < 0.03
    # One row alone draws what it draws beside others, and its length is that of all axes after the rows.
    whole = of_kernel()
    alone = dataclasses.replace(whole, keys=whole.keys[1:2])
    np.testing.assert_array_equal(kept_entries(alone, (1, 50, 16))[0], kept[1])
    np.testing.assert_array_equal(kept_entries(whole, (2 * ROWS, 25, 16)).reshape(shape), kept)
    stacked = of_kernel(layers=(2,))
    layers = [dataclasses.replace(stacked, keys=stacked.keys[layer]) for layer in range(2)]
    others = [of_kernel(step=1), of_kernel(path='k/kernel'), layers[1]]
    draws = [kept, *(kept_entries(other, shape) for other in others)]
    draws.append(jnp.roll(kept, 1, axis=0))
    # Two independent draws agree in this share of their entries.
    by_chance = RATE**2 + (1 - RATE) ** 2
    for other in draws[1:]:
        assert abs(float(jnp.mean(other == kept)) - by_chance) < 0.05


def test_an_input_without_the_rows_of_the_batch_is_refused():
    kernel, mask, lora, _ = parts()
    with pytest.raises(DropoutError, match=r'shape \(4, 16\), which has no axis of the 3 rows'):
        sl.linear(jnp.ones((4, 16)), sl.Adapted(kernel, mask, lora, dropout=of_kernel()))


def test_the_activations_decide_the_dtype():
    kernel, mask, lora, x = parts(jnp.bfloat16)
    weight = sl.Adapted(kernel, mask, lora, dropout=of_kernel())
    assert sl.linear(x, weight).dtype == jnp.bfloat16
    grads = jax.grad(lambda lora: jnp.sum(sl.linear(x, dataclasses.replace(weight, lora=lora)).astype(jnp.float32)))(
        lora
    )
    assert grads.a.dtype == grads.b.dtype == jnp.float32
