"""Restoration: the SparseLoRA loss, its schedule and its train step (arXiv 2404.02424).

`step(state, frozen, batch)`: `state` holds what is trained and is donated; `frozen` (params, masks, teacher) is an
argument. Only `lora` is ever differentiated, so base and masks are bit-identical after any number of steps.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from sparselora_jax.train import State, make_step
from sparselora_jax.weights import bind

KL_REDUCTIONS = ('token', 'sequence')


class Frozen(NamedTuple):
    """What a step only reads. `teacher` is a params tree of its own, or None: the unmasked `params` (shared)."""

    params: dict
    masks: dict | None
    teacher: dict | None = None


def paper_optimizer(
    steps: int,
    *,
    peak: float = 1e-4,
    warmup: int = 1000,
    start: float = 1e-6,
    end: float = 1e-5,
    weight_decay: float = 0.05,
    clip: float | None = None,
) -> optax.GradientTransformation:
    """AdamW with the paper's schedule: linear warm-up over `warmup` steps, then cosine to `end` at `steps`."""
    schedule = optax.warmup_cosine_decay_schedule(start, peak, min(warmup, max(steps - 1, 0)), steps, end)
    adamw = optax.adamw(schedule, weight_decay=weight_decay)
    return adamw if clip is None else optax.chain(optax.clip_by_global_norm(clip), adamw)


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
    ce = jnp.sum(weights.ce * optax.softmax_cross_entropy_with_integer_labels(student, targets))
    if teacher is None:
        return ce, {'loss': ce, 'ce': ce}
    log_student = jax.nn.log_softmax(student / temperature)
    log_teacher = jax.nn.log_softmax(jax.lax.stop_gradient(teacher) / temperature)
    kl = jnp.sum(weights.kl * jnp.sum(jnp.exp(log_teacher) * (log_teacher - log_student), axis=-1))
    loss = (1 - kd) * ce + kd * kl
    return loss, {'loss': loss, 'ce': ce, 'kl': kl}


def make_train_step(
    forward: Callable[[dict, dict], Array],
    tx: optax.GradientTransformation,
    *,
    kd: float = 0.1,
    temperature: float = 2.0,
    kl_reduction: str = 'token',
    gradient: str = 'exact',
    accumulate: int = 1,
) -> Callable[[State, Frozen, dict], tuple[State, dict[str, Array]]]:
    """The jitted step, `(state, frozen, batch) -> (state, metrics)`.

    Args:
      forward: `forward(weights, batch)` -> logits `[batch, tokens, vocab]` that predict `batch['targets']`.
      kd, temperature: see `distillation_loss`; `kd=0` runs no teacher.
      kl_reduction: see `token_weights`.
      gradient: see `weights.Adapted`.
      accumulate: micro-batches a step; must divide the batch; changes nothing beyond rounding.

    Returns:
      The step. `batch` holds `targets` and `answer` besides what `forward` reads; metrics are `loss`, `ce`, `kl`,
      `grad_norm`.
    """

    def prepare(batch):
        return batch | {'weights': token_weights(batch['answer'], kl_reduction=kl_reduction)}

    def loss(lora, frozen, batch):
        student = forward(bind(frozen.params, frozen.masks, lora, gradient=gradient), batch)
        teacher = None
        if kd:
            teacher = forward(frozen.params if frozen.teacher is None else frozen.teacher, batch)
        return distillation_loss(student, teacher, batch['targets'], batch['weights'], kd=kd, temperature=temperature)

    return make_step(loss, tx, accumulate=accumulate, prepare=prepare)
