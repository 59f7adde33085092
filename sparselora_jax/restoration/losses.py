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
    its micro-batches add up to the loss of the batch.
    """

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


class TopK(NamedTuple):
    """What is kept of a teacher's logits: its likeliest tokens, and all others as one outcome."""

    tokens: Int[Array, 'batch tokens k']
    log_probs: Float[Array, 'batch tokens k+1']  # at the temperature; the last is that of all other tokens together


def top_k(logits: Float[Array, 'batch tokens vocab'], k: int, *, temperature: float = 2.0) -> TopK:
    """The `k` likeliest tokens of each position.

    Raises:
      ValueError: `k` is not in [1, vocab - 1]: the others are at least one token.

    >>> found = top_k(jnp.log(jnp.array([[[0.2, 0.5, 0.3]]])), 1, temperature=1.0)
    >>> found.tokens.tolist(), jnp.exp(found.log_probs).round(4).tolist()
    ([[[1]]], [[[0.5, 0.5]]])
    """
    if not 1 <= k < logits.shape[-1]:
        raise ValueError(f'k {k}: expected 1 to {logits.shape[-1] - 1}, fewer than the tokens of the vocabulary')
    tokens = jax.lax.top_k(logits, k)[1]
    return TopK(tokens, _log_probs_of(logits, tokens, temperature))


def _log_probs_of(logits, tokens, temperature):
    """Of these tokens, and of all others together."""
    logits = logits.astype(jnp.float32) / temperature
    whole = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    of_tokens = jnp.take_along_axis(logits, tokens, axis=-1)
    others = jnp.put_along_axis(logits, tokens, -jnp.inf, axis=-1, inplace=False)
    return jnp.concatenate([of_tokens, jax.nn.logsumexp(others, axis=-1, keepdims=True)], axis=-1) - whole


def top_k_kl(
    student: Float[Array, 'batch tokens vocab'], teacher: TopK, *, temperature: float = 2.0
) -> Float[Array, 'batch tokens']:
    """KL(teacher || student) over k + 1 outcomes: the teacher's k likeliest tokens, and any other.

    It is never more than the KL over the vocabulary (outcomes are put together), grows with k, and equals it at
    k = vocab - 1.
    """
    gaps = teacher.log_probs - _log_probs_of(student, teacher.tokens, temperature)
    return jnp.sum(jnp.exp(teacher.log_probs) * gaps, axis=-1)


def distillation_loss(
    student: Float[Array, 'batch tokens vocab'],
    teacher: Float[Array, 'batch tokens vocab'] | TopK | None,
    targets: Int[Array, 'batch tokens'],
    weights: TokenWeights,
    *,
    kd: float = 0.1,
    temperature: float = 2.0,
) -> tuple[Float[Array, ''], dict[str, Array]]:
    """`(1 - kd) * CE + kd * KL(teacher || student)` at a temperature, with no T^2 factor (the paper's loss).

    Args:
      teacher: logits; or what `top_k` has kept of them, at the same temperature: the KL is then `top_k_kl`, a loss of
        its own; None drops the KL, and `kd` with it.
    """
    if teacher is None or isinstance(teacher, TopK):
        ce = optax.softmax_cross_entropy_with_integer_labels(student, targets)
        if teacher is None:
            ce = jnp.sum(weights.ce * ce)
            return ce, {'loss': ce, 'ce': ce}
        kl = top_k_kl(student, teacher, temperature=temperature)
    else:
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
    vocabulary three times as often, and keeps more of it.
    """
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
