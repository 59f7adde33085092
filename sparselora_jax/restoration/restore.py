"""Restoration: the SparseLoRA train step and its schedule (arXiv 2404.02424).

`step(state, frozen, batch)`: `state` holds what is trained and is donated; `frozen` (params, masks, teacher) is an
argument. Only what is trained is ever differentiated, so base and masks are bit-identical after any number of steps.

What is trained is LoRA, or, for comparison, the pruned kernels themselves (masked full fine-tuning).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from sparselora_jax.restoration.losses import distillation_loss, token_weights
from sparselora_jax.restoration.train import State, make_step
from sparselora_jax.sparse.dense import unpack
from sparselora_jax.sparse.packing import is_reduced, reduce_kernels
from sparselora_jax.sparse.rules import flatten, unflatten
from sparselora_jax.sparse.weights import bind, merge, with_kernels

TRAINED = ('lora', 'weights')


class Frozen(NamedTuple):
    """What a step only reads.

    Attributes:
      params: kernels may be packed, which bring their masks, or quantised.
      teacher: a params tree of its own, or None: the unmasked `params` (shared).
    """

    params: dict
    masks: dict | None
    teacher: dict | None = None


def pruned_kernels(params: dict, masks: dict, *, dtype: jax.typing.DTypeLike = jnp.float32) -> dict:
    """Copies of the kernels that have a mask, zeros in place: what masked full fine-tuning starts from.

    Their zeros have no gradient and no moments, and weight decay scales them: AdamW leaves them exactly zero.
    """
    flat = flatten(params)
    return unflatten({path: jnp.where(mask, flat[path], 0).astype(dtype) for path, mask in flatten(masks).items()})


def reduce_base(frozen: Frozen, base: str | Sequence[tuple[str, str]]) -> Frozen:
    """The same in fewer bytes: kernels that have a mask packed, or in four bits beside a mask of one bit.

    Args:
      base: formats, see `packing.reduce_kernels`.

    Raises:
      PackingError: see `packing.pack`.
    """
    params, masks = reduce_kernels(frozen.params, frozen.masks, base)
    return Frozen(params, masks, frozen.teacher)


def merge_trained(frozen: Frozen, trained: dict, kind: str, *, dtype: jax.typing.DTypeLike | None = None) -> dict:
    """The restored model as plain arrays with exact zeros.

    A quantised base is dequantised, and what was trained is added in float32: the merge in high precision.

    Args:
      kind: what `trained` is, one of `TRAINED`.
      dtype: of the merged kernels; each kernel's own by default (of four bits: that of their scales).
    """
    if kind == 'lora':
        return unpack(merge(frozen.params, frozen.masks, trained, dtype=dtype), dtype)
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
    parts: int = 1,
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
      parts: see `weights.Adapted`.

    Returns:
      The step. `batch` holds `targets` and `answer` besides what `forward` reads; and, if the teacher is not to be run,
      `teacher`, what `losses.top_k` has kept of its logits. Metrics are `loss`, `ce`, `grad_norm`, and `kl` where there
      is a teacher.

    Raises:
      ValueError: when it is traced: a teacher that would have to be the params, but those are packed.
    """

    def prepare(batch):
        return batch | {'weights': token_weights(batch['answer'], kl_reduction=kl_reduction)}

    def student_weights(tree, frozen):
        if trained == 'weights':
            return bind(with_kernels(frozen.params, tree), frozen.masks)
        return bind(frozen.params, frozen.masks, tree, gradient=gradient, parts=parts)

    def loss(tree, frozen, batch):
        read = {name: array for name, array in batch.items() if name not in ('teacher', 'weights')}
        student = forward(student_weights(tree, frozen), read)
        teacher = batch.get('teacher') if kd else None
        if kd and teacher is None:
            teacher = forward(_teacher_weights(frozen), read)
        return distillation_loss(student, teacher, batch['targets'], batch['weights'], kd=kd, temperature=temperature)

    return make_step(loss, tx, accumulate=accumulate, prepare=prepare)


def _teacher_weights(frozen: Frozen) -> dict:
    if frozen.teacher is not None:
        return frozen.teacher
    changed = [path for path, leaf in flatten(frozen.params).items() if is_reduced(leaf)]
    if changed:
        raise ValueError(
            f'{changed[0]} is packed or quantised, so the params are no dense teacher: '
            "give Frozen.teacher, or batch['teacher'], or kd=0"
        )
    return frozen.params
