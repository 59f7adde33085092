"""The restoration loss (arXiv 2404.02424): cross-entropy and distillation over answer tokens."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

KL_REDUCTIONS = ('token', 'sequence')


class TokenWeights(NamedTuple):
    """What each position counts in the two sums of the loss. They are shared out over a whole batch, so the losses of
    its micro-batches add up to the loss of the batch."""

    ce: Float[Array, 'batch tokens']
    kl: Float[Array, 'batch tokens']


def token_weights(answer: Bool[Array, 'batch tokens'], *, kl_reduction: str = 'token') -> TokenWeights:
    """Only answer positions count.

    Args:
      answer: True where the target is a token of the answer.
      kl_reduction: `'token'`: the mean over answer tokens; `'sequence'`: their sum over the batch size, as the public
        code has it: distillation weighs more on longer answers.

    Raises:
      ValueError: an unknown `kl_reduction`.

    >>> token_weights(jnp.array([[True, True], [True, False]]), kl_reduction='sequence').kl.tolist()
    [[0.5, 0.5], [0.5, 0.0]]
    """
    if kl_reduction not in KL_REDUCTIONS:
        raise ValueError(f'kl_reduction {kl_reduction!r}: expected one of {", ".join(KL_REDUCTIONS)}')
    counts = answer.astype(jnp.float32)
    mean = counts / jnp.maximum(jnp.sum(counts), 1.0)
    return TokenWeights(ce=mean, kl=mean if kl_reduction == 'token' else counts / answer.shape[0])


def distillation_loss(
    student: Float[Array, 'batch tokens vocab'],
    teacher: Float[Array, 'batch tokens vocab'] | None,
    targets: Int[Array, 'batch tokens'],
    weights: TokenWeights,
    *,
    kd: float = 0.1,
    temperature: float = 2.0,
) -> tuple[Float[Array, ''], dict[str, Array]]:
    """`(1 - kd) * CE + kd * KL(teacher || student)` at a temperature, with no T^2 factor (the paper's loss).

    Args:
      teacher: logits; None drops the KL, and `kd` with it.
    """
    if teacher is None:
        ce = jnp.sum(weights.ce * optax.softmax_cross_entropy_with_integer_labels(student, targets))
        return ce, {'loss': ce, 'ce': ce}
    ce, kl = _token_losses(temperature, student, jax.lax.stop_gradient(teacher), targets)
    ce, kl = jnp.sum(weights.ce * ce), jnp.sum(weights.kl * kl)
    loss = (1 - kd) * ce + kd * kl
    return loss, {'loss': loss, 'ce': ce, 'kl': kl}


def answer_loss(
    logits: Float[Array, 'batch tokens vocab'], targets: Int[Array, 'batch tokens'], answer: Bool[Array, 'batch tokens']
) -> Float[Array, '']:
    """Mean cross-entropy of the answers' tokens: what ECoFLaP differentiates."""
    return distillation_loss(logits, None, targets, token_weights(answer))[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_losses(temperature, student, teacher, targets):
    """Cross-entropy and KL of each token, with the gradient written out: autodiff of the two softmaxes walks the
    vocabulary three times as often, and keeps more of it."""
    return _token_losses_forward(temperature, student, teacher, targets)[0]


def _token_losses_forward(temperature, student, teacher, targets):
    # KL = sum p_t (t - s) / T + logsumexp(s / T) - logsumexp(t / T): one exponential of each kind serves all sums.
    top_student, top_teacher = (jnp.max(x, axis=-1, keepdims=True) for x in (student, teacher))
    shares = jnp.exp((teacher - top_teacher) / temperature)
    total = jnp.sum(shares, axis=-1, keepdims=True)
    cross = jnp.sum(shares * (teacher - student), axis=-1) / (total[..., 0] * temperature)
    hard = top_student + jnp.log(jnp.sum(jnp.exp(student - top_student), axis=-1, keepdims=True))
    soft = jnp.sum(jnp.exp((student - top_student) / temperature), axis=-1, keepdims=True)
    soft = top_student / temperature + jnp.log(soft)
    soft_teacher = top_teacher / temperature + jnp.log(total)
    ce = hard[..., 0] - jnp.take_along_axis(student, targets[..., None], axis=-1)[..., 0]
    kl = cross + (soft - soft_teacher)[..., 0]
    return (ce, kl), (student, teacher, targets, hard, soft, soft_teacher)


def _token_losses_backward(temperature, saved, gradients):
    student, teacher, targets, hard, soft, soft_teacher = saved
    g_ce, g_kl = (g[..., None] for g in gradients)
    label = jnp.arange(student.shape[-1], dtype=targets.dtype) == targets[..., None]
    d_ce = jnp.exp(student - hard) - label.astype(student.dtype)
    d_kl = jnp.exp(student / temperature - soft) - jnp.exp(teacher / temperature - soft_teacher)
    return g_ce * d_ce + g_kl / temperature * d_kl, None, None


_token_losses.defvjp(_token_losses_forward, _token_losses_backward)
