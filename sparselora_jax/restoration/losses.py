"""Compute the restoration loss (arXiv 2404.02424): cross-entropy and distillation over answer tokens."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

KL_REDUCTIONS = ('token', 'sequence')
KD_WEIGHT = 0.1  # share of the distillation term in the loss
KD_TEMPERATURE = 2.0  # divides the logits of both models in the distillation term


class TokenWeights(NamedTuple):
    """Weight of each position in the two sums of the loss.

    The weights are computed over a whole batch, so the losses of its micro-batches add up to the loss of the batch.

    Attributes:
      ce: weights of the cross-entropy.
      kl: weights of the KL divergence from the teacher.
    """

    ce: Float[Array, 'batch tokens']
    kl: Float[Array, 'batch tokens']


def token_weights(answer: Bool[Array, 'batch tokens'], *, kl_reduction: str = 'token') -> TokenWeights:
    """Return the weight of each position in the loss; positions outside the answers weigh zero.

    Args:
      answer: True where the target is a token of the answer.
      kl_reduction: `'token'` takes the mean of the KL over all answer tokens. `'sequence'` divides its sum by the batch
        size, as the paper's public code does; distillation then weighs more on longer answers.

    Returns:
      Both kinds of weights.

    Raises:
      ValueError: `kl_reduction` is unknown.

    >>> token_weights(jnp.array([[True, True], [True, False]]), kl_reduction='sequence').kl.tolist()
    [[0.5, 0.5], [0.5, 0.0]]
    """
    if kl_reduction not in KL_REDUCTIONS:
        raise ValueError(f'kl_reduction {kl_reduction!r}: expected one of {", ".join(KL_REDUCTIONS)}')
    counts = answer.astype(jnp.float32)
    # A micro-batch may have no answer token at all; 0 / 0 would poison the whole step.
    mean = counts / jnp.maximum(jnp.sum(counts), 1.0)
    return TokenWeights(ce=mean, kl=mean if kl_reduction == 'token' else counts / answer.shape[0])


class TopK(NamedTuple):
    """The most likely tokens of a teacher at each position, and all other tokens as one outcome.

    Attributes:
      tokens: ids of the k most likely tokens, in descending order of probability.
      log_probs: their log-probabilities at the temperature; the last entry is that of all other tokens together.
    """

    tokens: Int[Array, 'batch tokens k']
    log_probs: Float[Array, 'batch tokens k+1']


def top_k(logits: Float[Array, 'batch tokens vocab'], k: int, *, temperature: float = KD_TEMPERATURE) -> TopK:
    """Return the `k` most likely tokens of each position.

    Args:
      logits: the teacher's logits.
      k: number of tokens, 1 to vocab - 1, so that at least one token is left for the other outcome.
      temperature: divides the logits.

    Returns:
      Tokens and log-probabilities in float32.

    Raises:
      ValueError: `k` is out of range.

    >>> likeliest = top_k(jnp.log(jnp.array([[[0.2, 0.5, 0.3]]])), 1, temperature=1.0)
    >>> likeliest.tokens.tolist(), jnp.exp(likeliest.log_probs).round(4).tolist()
    ([[[1]]], [[[0.5, 0.5]]])
    """
    if not 1 <= k < logits.shape[-1]:
        raise ValueError(f'k {k}: expected 1 to {logits.shape[-1] - 1}, fewer than the tokens of the vocabulary')
    tokens = jax.lax.top_k(logits, k)[1]
    return TopK(tokens, _outcome_log_probs(logits, tokens, temperature))


def _outcome_log_probs(
    logits: Float[Array, 'batch tokens vocab'], tokens: Int[Array, 'batch tokens k'], temperature: float
) -> Float[Array, 'batch tokens k+1']:
    """Return the log-probabilities of some tokens, and at the end that of all others together."""
    logits = logits.astype(jnp.float32) / temperature
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    of_tokens = jnp.take_along_axis(logits, tokens, axis=-1)
    # Sum over the other tokens directly: 1 - sum(p) would lose all digits if the chosen tokens have nearly all
    # probability.
    others = jnp.put_along_axis(logits, tokens, -jnp.inf, axis=-1, inplace=False)
    return jnp.concatenate([of_tokens, jax.nn.logsumexp(others, axis=-1, keepdims=True)], axis=-1) - total


def top_k_kl(
    student: Float[Array, 'batch tokens vocab'], teacher: TopK, *, temperature: float = KD_TEMPERATURE
) -> Float[Array, 'batch tokens']:
    """Return KL(teacher || student) over k + 1 outcomes: the teacher's k likeliest tokens, and all others together.

    It is at most the KL over the vocabulary, because outcomes are merged. It grows with k and equals that KL at
    k = vocab - 1.

    Args:
      student: logits of the student.
      teacher: result of `top_k` at the same temperature.
      temperature: divides the student's logits.

    Returns:
      The KL in nats at each position.
    """
    gaps = teacher.log_probs - _outcome_log_probs(student, teacher.tokens, temperature)
    return jnp.sum(jnp.exp(teacher.log_probs) * gaps, axis=-1)


def distillation_loss(
    student: Float[Array, 'batch tokens vocab'],
    teacher: Float[Array, 'batch tokens vocab'] | TopK | None,
    targets: Int[Array, 'batch tokens'],
    weights: TokenWeights,
    *,
    kd: float = KD_WEIGHT,
    temperature: float = KD_TEMPERATURE,
) -> tuple[Float[Array, ''], dict[str, Array]]:
    """Return `(1 - kd) * CE + kd * KL(teacher || student)`, the loss of arXiv 2404.02424, and its parts.

    As in the paper, the KL is not multiplied by the square of the temperature.

    Args:
      student: logits of the model that is trained.
      teacher: logits of the dense model; or the result of `top_k` at the same temperature, which makes the KL that of
        `top_k_kl`; or None, which leaves out the KL and `kd` with it.
      targets: token that each position should predict.
      weights: weight of each position, from `token_weights`.
      kd: share of the KL in the loss, 0 to 1.
      temperature: divides the logits of both models in the KL.

    Returns:
      The loss in nats, and metrics: `loss`, `ce` and, where there is a teacher, `kl`.
    """
    if teacher is None:
        ce = jnp.sum(weights.ce * optax.softmax_cross_entropy_with_integer_labels(student, targets))
        return ce, {'loss': ce, 'ce': ce}
    if isinstance(teacher, TopK):
        token_ce = optax.softmax_cross_entropy_with_integer_labels(student, targets)
        token_kl = top_k_kl(student, teacher, temperature=temperature)
    else:
        token_ce, token_kl = _token_losses(temperature, student, jax.lax.stop_gradient(teacher), targets)
    ce = jnp.sum(weights.ce * token_ce)
    kl = jnp.sum(weights.kl * token_kl)
    loss = (1 - kd) * ce + kd * kl
    return loss, {'loss': loss, 'ce': ce, 'kl': kl}


def answer_loss(
    logits: Float[Array, 'batch tokens vocab'], targets: Int[Array, 'batch tokens'], answer: Bool[Array, 'batch tokens']
) -> Float[Array, '']:
    """Return the mean cross-entropy of the answer tokens, which ECoFLaP (arXiv 2310.02998) differentiates.

    Args:
      logits: logits of the model.
      targets: token that each position should predict.
      answer: True where the target is a token of the answer.

    Returns:
      The mean in nats.
    """
    return distillation_loss(logits, None, targets, token_weights(answer))[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_losses(
    temperature: float,
    student: Float[Array, 'batch tokens vocab'],
    teacher: Float[Array, 'batch tokens vocab'],
    targets: Int[Array, 'batch tokens'],
) -> tuple[Float[Array, 'batch tokens'], Float[Array, 'batch tokens']]:
    """Return the cross-entropy and the KL of each token.

    The gradient is written by hand. Autodiff of the two softmaxes reads arrays of the vocabulary's size three times as
    often, and keeps more of them for the backward pass.
    """
    return _token_losses_forward(temperature, student, teacher, targets)[0]


def _token_losses_forward(temperature, student, teacher, targets):
    """Return both losses, and what the backward pass needs: logits, targets and the logarithms of three sums."""
    # KL = sum p_t (t - s) / T + logsumexp(s / T) - logsumexp(t / T): one exponential of each kind serves all sums.
    # Subtracting the maximum first keeps every exponential at 1 or below.
    top_student, top_teacher = (jnp.max(x, axis=-1, keepdims=True) for x in (student, teacher))
    shares = jnp.exp((teacher - top_teacher) / temperature)
    total = jnp.sum(shares, axis=-1, keepdims=True)
    # The gap t - s is weighted before it is divided by the sum: one division a position instead of one a token id.
    cross = jnp.sum(shares * (teacher - student), axis=-1) / (total[..., 0] * temperature)
    hard = top_student + jnp.log(jnp.sum(jnp.exp(student - top_student), axis=-1, keepdims=True))
    soft = jnp.sum(jnp.exp((student - top_student) / temperature), axis=-1, keepdims=True)
    soft = top_student / temperature + jnp.log(soft)
    soft_teacher = top_teacher / temperature + jnp.log(total)
    ce = hard[..., 0] - jnp.take_along_axis(student, targets[..., None], axis=-1)[..., 0]
    kl = cross + (soft - soft_teacher)[..., 0]
    return (ce, kl), (student, teacher, targets, hard, soft, soft_teacher)


def _token_losses_backward(temperature, saved, gradients):
    """Return the gradient towards the student's logits; teacher and targets have none."""
    student, teacher, targets, hard, soft, soft_teacher = saved
    g_ce, g_kl = (g[..., None] for g in gradients)
    # Both gradients are a difference of probabilities: of the student and the target, of the student and the teacher.
    # The compiler fuses all of it into one pass over the vocabulary; a one-hot array of the targets is never stored.
    label = jnp.arange(student.shape[-1], dtype=targets.dtype) == targets[..., None]
    d_ce = jnp.exp(student - hard) - label.astype(student.dtype)
    d_kl = jnp.exp(student / temperature - soft) - jnp.exp(teacher / temperature - soft_teacher)
    return g_ce * d_ce + g_kl / temperature * d_kl, None, None


_token_losses.defvjp(_token_losses_forward, _token_losses_backward)
