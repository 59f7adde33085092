"""The loss and its gradient against numpy and autodiff of the paper's formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparselora_jax import losses


def data():
    rng = np.random.default_rng(0)
    student, teacher = 5 * rng.normal(size=(2, 3, 5, 7)).astype(np.float32)
    return student, teacher, rng.integers(0, 7, (3, 5)).astype(np.int32), rng.random((3, 5)) < 0.5


@pytest.mark.parametrize(
    ('kd', 'temperature', 'reduction'), [(0.1, 2.0, 'token'), (0.5, 1.0, 'token'), (0.1, 2.0, 'sequence')]
)
def test_loss_equals_numpy(kd, temperature, reduction):
    student, teacher, targets, answer = data()

    def log_softmax(x):
        return x - np.log(np.sum(np.exp(x), axis=-1, keepdims=True))

    ce = -np.take_along_axis(log_softmax(student), targets[..., None], -1)[..., 0]
    p, q = log_softmax(teacher / temperature), log_softmax(student / temperature)
    kl = np.sum(np.exp(p) * (p - q), axis=-1)
    kl = kl[answer].mean() if reduction == 'token' else kl[answer].sum() / len(answer)
    weights = losses.token_weights(jnp.asarray(answer), kl_reduction=reduction)
    got, metrics = losses.distillation_loss(
        *map(jnp.asarray, (student, teacher, targets)), weights, kd=kd, temperature=temperature
    )
    np.testing.assert_allclose(metrics['kl'], kl, rtol=1e-5)
    np.testing.assert_allclose(got, (1 - kd) * ce[answer].mean() + kd * kl, rtol=1e-5)


def test_gradient_equals_autodiff_of_the_formula():
    student, teacher, targets, answer = map(jnp.asarray, data())
    weights = losses.token_weights(answer)

    def formula(student):
        log_student, log_teacher = jax.nn.log_softmax(student / 2), jax.nn.log_softmax(teacher / 2)
        ce = -jnp.take_along_axis(jax.nn.log_softmax(student), targets[..., None], -1)[..., 0]
        kl = jnp.sum(jnp.exp(log_teacher) * (log_teacher - log_student), axis=-1)
        return jnp.sum(weights.ce * (0.9 * ce + 0.1 * kl))

    def ours(student, teacher):
        return losses.distillation_loss(student, teacher, targets, weights)[0]

    got, towards_teacher = jax.grad(ours, argnums=(0, 1))(student, teacher)
    np.testing.assert_allclose(got, jax.grad(formula)(student), atol=1e-6)
    assert not towards_teacher.any()


def test_huge_logits_stay_finite():
    student, teacher, targets, answer = map(jnp.asarray, data())
    weights = losses.token_weights(answer)
    loss, grad = jax.value_and_grad(lambda s: losses.distillation_loss(s, 1e4 * teacher, targets, weights)[0])(
        1e4 * student
    )
    assert jnp.isfinite(loss) and jnp.isfinite(grad).all()
    alone, _ = losses.distillation_loss(student, None, targets, weights)
    assert jnp.isfinite(alone)


def test_an_unknown_reduction_is_named():
    with pytest.raises(ValueError, match="kl_reduction 'mean': expected one of token, sequence"):
        losses.token_weights(jnp.ones((1, 1), bool), kl_reduction='mean')
