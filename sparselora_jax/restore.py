"""Restoration: the SparseLoRA train step and its schedule (arXiv 2404.02424).

`step(state, frozen, batch)`: `state` holds what is trained and is donated; `frozen` (params, masks, teacher) is an
argument. Only what is trained is ever differentiated, so base and masks are bit-identical after any number of steps.

What is trained is LoRA, or, for comparison, the pruned kernels themselves (masked full fine-tuning).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from sparselora_jax.losses import distillation_loss, token_weights
from sparselora_jax.rules import flatten, unflatten
from sparselora_jax.train import State, make_step
from sparselora_jax.weights import bind, merge, with_kernels

TRAINED = ('lora', 'weights')


class Frozen(NamedTuple):
    """What a step only reads. `teacher` is a params tree of its own, or None: the unmasked `params` (shared)."""

    params: dict
    masks: dict | None
    teacher: dict | None = None


def pruned_kernels(params: dict, masks: dict, *, dtype: jax.typing.DTypeLike = jnp.float32) -> dict:
    """Copies of the kernels that have a mask, zeros in place: what masked full fine-tuning starts from.

    Their zeros have no gradient and no moments, and weight decay scales them: AdamW leaves them exactly zero.
    """
    flat = flatten(params)
    return unflatten({path: jnp.where(mask, flat[path], 0).astype(dtype) for path, mask in flatten(masks).items()})


def merge_trained(frozen: Frozen, trained: dict, kind: str) -> dict:
    """The restored model as plain arrays with exact zeros, in the dtypes of its params.

    Args:
      kind: what `trained` is, one of `TRAINED`.
    """
    if kind == 'lora':
        return merge(frozen.params, frozen.masks, trained)
    flat = flatten(frozen.params)
    kernels = {path: kernel.astype(flat[path].dtype) for path, kernel in flatten(trained).items()}
    return merge(with_kernels(frozen.params, unflatten(kernels)), frozen.masks)


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


def make_train_step(
    forward: Callable[[dict, dict], Array],
    tx: optax.GradientTransformation,
    *,
    kd: float = 0.1,
    temperature: float = 2.0,
    kl_reduction: str = 'token',
    gradient: str = 'exact',
    accumulate: int = 1,
    trained: str = 'lora',
) -> Callable[[State, Frozen, dict], tuple[State, dict[str, Array]]]:
    """The jitted step, `(state, frozen, batch) -> (state, metrics)`.

    Args:
      forward: `forward(weights, batch)` -> logits `[batch, tokens, vocab]` that predict `batch['targets']`.
      kd, temperature: see `distillation_loss`; `kd=0` runs no teacher.
      kl_reduction: see `token_weights`.
      gradient: see `weights.Adapted`.
      accumulate: micro-batches a step; must divide the batch; changes nothing beyond rounding.
      trained: what the state trains: `'lora'`, or `'weights'`, the kernels of `pruned_kernels`; the teacher then still
        reads those of `frozen`.

    Returns:
      The step. `batch` holds `targets` and `answer` besides what `forward` reads; metrics are `loss`, `ce`,
      `grad_norm`, and `kl` where there is a teacher.
    """

    def prepare(batch):
        return batch | {'weights': token_weights(batch['answer'], kl_reduction=kl_reduction)}

    def student_weights(tree, frozen):
        if trained == 'weights':
            return bind(with_kernels(frozen.params, tree), frozen.masks)
        return bind(frozen.params, frozen.masks, tree, gradient=gradient)

    def loss(tree, frozen, batch):
        student = forward(student_weights(tree, frozen), batch)
        teacher = None
        if kd:
            teacher = forward(frozen.params if frozen.teacher is None else frozen.teacher, batch)
        return distillation_loss(student, teacher, batch['targets'], batch['weights'], kd=kd, temperature=temperature)

    return make_step(loss, tx, accumulate=accumulate, prepare=prepare)
