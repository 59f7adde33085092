"""The loss and its gradient against numpy and autodiff of the paper's formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparselora_jax.restoration import losses


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
    assert jnp.isfinite(loss)
    assert jnp.isfinite(grad).all()
    alone, _ = losses.distillation_loss(student, None, targets, weights)
    assert jnp.isfinite(alone)


def test_an_unknown_reduction_is_named():
    with pytest.raises(ValueError, match="kl_reduction 'mean': expected one of token, sequence"):
        losses.token_weights(jnp.ones((1, 1), bool), kl_reduction='mean')


@pytest.mark.parametrize('k', [1, 3, 6])
def test_top_k_kl_equals_numpy_and_never_exceeds_that_of_the_vocabulary(k):
    student, teacher, _, _ = data()

    def softmax(x):
        return np.exp(x.astype(np.float64)) / np.sum(np.exp(x.astype(np.float64)), axis=-1, keepdims=True)

    p, q = softmax(teacher / 2), softmax(student / 2)
    order = np.argsort(-teacher, axis=-1)

    def outcomes(x):
        x = np.take_along_axis(x, order, axis=-1)
        return np.concatenate([x[..., :k], x[..., k:].sum(axis=-1, keepdims=True)], axis=-1)

    want = np.sum(outcomes(p) * np.log(outcomes(p) / outcomes(q)), axis=-1)
    kept = losses.top_k(jnp.asarray(teacher), k)
    got = losses.top_k_kl(jnp.asarray(student), kept)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    whole = np.sum(p * np.log(p / q), axis=-1)
    assert np.all(want <= whole + 1e-12)
    if k == 6:  # the others are one token
        np.testing.assert_allclose(got, whole, rtol=1e-4, atol=1e-5)


def test_the_loss_with_all_but_one_token_is_that_with_the_logits_and_so_is_its_gradient():
    student, teacher, targets, answer = map(jnp.asarray, data())
    weights, kept = losses.token_weights(answer), losses.top_k(teacher, 6)

    def loss(student, teacher):
        return losses.distillation_loss(student, teacher, targets, weights, kd=0.4)[0]

    got, want = (jax.value_and_grad(loss)(student, of) for of in (kept, teacher))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, want)


def test_huge_logits_stay_finite_with_few_tokens():
    student, teacher, targets, answer = map(jnp.asarray, data())
    weights = losses.token_weights(answer)
    kept = losses.top_k(1e4 * teacher, 2)
    loss, grad = jax.value_and_grad(lambda s: losses.distillation_loss(s, kept, targets, weights)[0])(1e4 * student)
    assert jnp.isfinite(loss)
    assert jnp.isfinite(grad).all()


def test_as_many_tokens_as_the_vocabulary_has_are_refused():
    for k in (0, 7):
        with pytest.raises(ValueError, match=f'k {k}: expected 1 to 6'):
            losses.top_k(jnp.ones((1, 1, 7)), k)
