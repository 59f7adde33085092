"""Restore a pruned model: the SparseLoRA train step, its optimizer and its results (arXiv 2404.02424).

The step is `step(state, frozen, batch)`. `state` holds what is trained, and its buffers are donated. `frozen` (params,
masks, teacher) is only read. Only the trained tree is differentiated, so params and masks are bit-identical after any
number of steps.

The trained tree is LoRA or, for comparison, the pruned kernels themselves (masked full fine-tuning).
"""

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from sparselora_jax.restoration.losses import (
    KD_TEMPERATURE,
    KD_WEIGHT,
    KL_REDUCTIONS,
    TopK,
    distillation_loss,
    token_weights,
)
from sparselora_jax.restoration.train import Step, make_step
from sparselora_jax.runtime.errors import SparseloraError
from sparselora_jax.sparse.axes import AxesByPath
from sparselora_jax.sparse.dense import unpack
from sparselora_jax.sparse.dropout import Dropout, row_keys
from sparselora_jax.sparse.packing import is_reduced, reduce_kernels
from sparselora_jax.sparse.rules import flatten, paths_of, unflatten, with_leaves
from sparselora_jax.sparse.weights import GRADIENTS, bind, merge

TRAINED = ('lora', 'weights')
COMBINED = ('bind', 'merge')


class RestoreError(SparseloraError, ValueError):
    """An option of an optimizer or a train step that has no meaning."""


class Frozen(NamedTuple):
    """Trees that a step only reads.

    Attributes:
      params: base weights, any tree of arrays. Kernels may be packed, with their masks, or quantised.
      masks: masks of the kernels that are not packed; None if there are none.
      teacher: params of the teacher. None: the unmasked `params`, which takes no memory of its own.
    """

    params: PyTree
    masks: dict | None
    teacher: PyTree | None = None


def pruned_kernels(params: PyTree, masks: dict, *, dtype: jax.typing.DTypeLike = jnp.float32) -> dict:
    """Copy the kernels that have a mask, with zeros in place: the start of masked full fine-tuning.

    The zeros have no gradient and so no moments, and weight decay only scales them: AdamW leaves them exactly zero.

    Args:
      params: base weights, any tree.
      masks: the pruning masks.
      dtype: dtype of the copies; half precision would lose small updates.

    Returns:
      A tree with the paths of `masks`.
    """
    flat = paths_of(params)
    return unflatten({path: jnp.where(mask, flat[path], 0).astype(dtype) for path, mask in flatten(masks).items()})


def reduce_base(frozen: Frozen, base: str | Sequence[tuple[str, str]], *, axes: AxesByPath | None = None) -> Frozen:
    """Return the same trees in fewer bytes: masked kernels are packed, or stored in four bits with a one-bit mask.

    Args:
      frozen: params and masks after pruning.
      base: one format, or a list of (regex, format), see `packing.reduce_kernels`.
      axes: see `packing.pack`.

    Returns:
      The reduced params and the masks that are still needed; the teacher is passed on.

    Raises:
      PackingError: see `packing.pack`.
    """
    params, masks = reduce_kernels(frozen.params, frozen.masks, base, axes=axes)
    return Frozen(params, masks, frozen.teacher)


def merge_trained(frozen: Frozen, trained: dict, kind: str, *, dtype: jax.typing.DTypeLike | None = None) -> PyTree:
    """Return the restored model as plain arrays with exact zeros.

    A quantised base is dequantised first and LoRA is added in float32, so the merged weights are not quantised again.

    Args:
      frozen: the trees that the steps have read.
      trained: the tree that the steps have trained.
      kind: what `trained` is, one of `TRAINED`.
      dtype: dtype of the merged kernels; by default each kernel's own (a quantised kernel's is that of its scales).

    Returns:
      Params with the paths of `frozen.params`.
    """
    if kind == 'lora':
        return unpack(merge(frozen.params, frozen.masks, trained, dtype=dtype), dtype)
    # Trained kernels are always float32: cast them to the model's dtype.
    flat = paths_of(frozen.params)
    kernels = {path: kernel.astype(flat[path].dtype) for path, kernel in flatten(trained).items()}
    return merge(with_leaves(frozen.params, kernels), frozen.masks)


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
    """Return AdamW with linear warm-up and cosine decay; the defaults are those of the YAML files of arXiv 2404.02424.

    The scripts of its code override them; `configs/paper/base.py` has what they run.

    Args:
      steps: number of steps of the whole run; the learning rate reaches `end` at the last step.
      peak: learning rate after the warm-up.
      warmup: steps of the warm-up; cut to `steps - 1` where the run is shorter.
      start: learning rate of the first step.
      end: learning rate of the last step.
      weight_decay: decoupled weight decay, in units of the learning rate.
      clip: global norm to which gradients are clipped; None: they are not.

    Returns:
      An optax optimizer.

    Raises:
      RestoreError: a number is outside its range.
    """
    _check_number('steps', steps, low=1, is_integer=True)
    _check_number('warmup', warmup, low=0, is_integer=True)
    for name, rate in (('peak', peak), ('start', start), ('end', end), ('weight_decay', weight_decay)):
        _check_number(name, rate, low=0)
    if clip is not None:
        _check_number('clip', clip, low=0, excludes_low=True)
    # optax requires at least one step of decay after the warm-up.
    warmup_steps = min(warmup, max(steps - 1, 0))
    schedule = optax.warmup_cosine_decay_schedule(start, peak, warmup_steps, steps, end)
    adamw = optax.adamw(schedule, weight_decay=weight_decay)
    return adamw if clip is None else optax.chain(optax.clip_by_global_norm(clip), adamw)


def make_train_step(
    forward: Callable[[dict, dict], Array],
    tx: optax.GradientTransformation,
    *,
    kd: float = KD_WEIGHT,
    temperature: float = KD_TEMPERATURE,
    kl_reduction: str = 'token',
    gradient: str = 'exact',
    accumulate: int = 1,
    trained: str = 'lora',
    combine: str = 'bind',
    parts: int = 1,
    dropout: float = 0.0,
    seed: int = 0,
) -> Step:
    """Return the jitted step of SparseLoRA (arXiv 2404.02424), `(state, frozen, batch) -> (state, metrics)`.

    For a forward without logits, or for another loss, see `make_step`.

    Args:
      forward: `forward(weights, batch)` returns logits `[batch, tokens, vocab]` that predict `batch['targets']`.
      tx: the optimizer, e.g. `paper_optimizer`.
      kd: share of the distillation term, see `losses.distillation_loss`; 0 runs no teacher.
      temperature: divides the logits in that term.
      kl_reduction: see `losses.token_weights`.
      gradient: `'exact'` or `'straight_through'`, see `weights.Adapted`.
      accumulate: micro-batches of a step; must divide the batch. It changes nothing beyond rounding.
      trained: `'lora'`, or `'weights'` for the tree of `pruned_kernels`. The teacher reads `frozen` in both cases.
      combine: `'bind'`: `forward` reads the result of `bind`, so it must multiply by `sl.linear`. If it scans its
        layers, memory holds the combined weights of one layer. `'merge'`: `forward` reads plain arrays, the result of
        `merge`, so any model will do. If it scans its layers, memory holds the merged kernels of all layers, and their
        gradients.
      parts: row blocks of the gradient's products, see `weights.Adapted`.
      dropout: probability that the low-rank update of a kernel does not see an entry of its input; the base sees all.
        The forward's inputs must begin with the axis of rows. The teacher, `merge` and `bind` drop nothing.
      seed: seed of what is dropped. It also depends on the step, the row of the batch, the kernel and the layer, and on
        nothing else: a resumed run, another mesh and micro-batches drop the same.

    Returns:
      The step; `state` is donated. `frozen` is a `Frozen`. `batch` holds `targets` and `answer` of shape `[batch,
      tokens]`, and whatever `forward` reads. If a batch contains `teacher`, a `losses.TopK`, no teacher is run. Metrics
      are `loss`, `ce`, `grad_norm`, and `kl` where there is a teacher.

    Raises:
      RestoreError: an option is unknown or outside its range, or has no meaning for `combine='merge'`; or, when the
        step is traced, the batch lacks `targets` or `answer`, the params should be the teacher but are packed or
        quantised, or `accumulate` does not divide the batch.
    """
    _check_number('kd', kd, low=0, high=1)
    _check_number('temperature', temperature, low=0, excludes_low=True)
    _check_number('accumulate', accumulate, low=1, is_integer=True)
    _check_number('parts', parts, low=1, is_integer=True)
    _check_number('dropout', dropout, low=0, high=1, excludes_high=True)
    _check_number('seed', seed, low=0, is_integer=True)
    _check_choice('kl_reduction', kl_reduction, KL_REDUCTIONS)
    _check_choice('gradient', gradient, GRADIENTS)
    _check_choice('trained', trained, TRAINED)
    _check_choice('combine', combine, COMBINED)
    # A merge is differentiated as it is: its gradient is the exact one, and the compiler splits its products.
    if combine == 'merge' and (gradient != 'exact' or parts != 1):
        raise RestoreError("gradient and parts are options of linear, which combine='merge' does not use: leave them")
    if dropout and (combine == 'merge' or trained != 'lora'):
        raise RestoreError(
            f"dropout {dropout!r}: linear drops inputs of LoRA, so it needs combine='bind' and trained='lora'"
        )

    def prepare(batch, steps_done):
        missing = [name for name in ('targets', 'answer') if name not in batch]
        if missing:
            raise RestoreError(f'the batch has no {missing[0]!r}: expected `targets` and `answer` of [batch, tokens]')
        rows = batch['targets'].shape[0]
        if rows % accumulate:
            raise RestoreError(f'accumulate {accumulate} does not divide the batch of {rows}')
        # The weight of a token depends on how many answer tokens the whole batch has, so it is computed before the
        # batch is split into micro-batches.
        prepared = batch | {'weights': token_weights(batch['answer'], kl_reduction=kl_reduction)}
        if dropout:
            # A row keeps its key when the batch is split, so micro-batches drop what the whole batch would.
            prepared['dropout_keys'] = row_keys(seed, steps_done, rows)
        return prepared

    def student_weights(tree, frozen, keys):
        # Trained kernels take the place of those of the base, and have no factors.
        is_lora = trained == 'lora'
        params = frozen.params if is_lora else with_leaves(frozen.params, flatten(tree))
        lora = tree if is_lora else None
        if combine == 'merge':
            # Packed kernels without factors stay packed in a merge.
            return unpack(merge(params, frozen.masks, lora))
        dropped = None if keys is None else Dropout(dropout, keys)
        return bind(params, frozen.masks, lora, gradient=gradient, parts=parts, dropout=dropped)

    def teacher_logits(frozen: Frozen, batch: dict, inputs: dict) -> Array | TopK | None:
        if not kd:
            return None
        likeliest = batch.get('teacher')
        return forward(_teacher_weights(frozen), inputs) if likeliest is None else likeliest

    def loss(tree, frozen, batch):
        # The teacher's tokens, the weights of the loss and the keys are not inputs of the model.
        not_inputs = ('teacher', 'weights', 'dropout_keys')
        inputs = {name: array for name, array in batch.items() if name not in not_inputs}
        student = forward(student_weights(tree, frozen, batch.get('dropout_keys')), inputs)
        # `frozen` is not differentiated, so the teacher has no gradient and its activations are not stored.
        teacher = teacher_logits(frozen, batch, inputs)
        return distillation_loss(student, teacher, batch['targets'], batch['weights'], kd=kd, temperature=temperature)

    return make_step(loss, tx, accumulate=accumulate, prepare=prepare)


def _check_number(
    name: str,
    value: object,
    *,
    low: int | float,
    high: int | float = math.inf,
    is_integer: bool = False,
    excludes_low: bool = False,
    excludes_high: bool = False,
) -> None:
    """Check that an option is a number of a range.

    Raises:
      RestoreError: it is not.
    """
    kind = Integral if is_integer else Real
    is_number = isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)
    is_excluded = (excludes_low and value == low) or (excludes_high and value == high)
    if not is_number or not low <= value <= high or is_excluded:
        if excludes_low:
            bound = f'above {low}'
        elif high < math.inf:
            bound = f'from {low} to {"below " if excludes_high else ""}{high}'
        else:
            bound = f'of at least {low}'
        raise RestoreError(f'{name} {value!r}: expected {"an integer" if is_integer else "a number"} {bound}')


def _check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Check that an option is one of several words.

    Raises:
      RestoreError: it is not.
    """
    if value not in choices:
        raise RestoreError(f'{name} {value!r}: expected one of {", ".join(choices)}')


def _teacher_weights(frozen: Frozen) -> PyTree:
    """Return the params of the teacher.

    Raises:
      RestoreError: the teacher would be the params, but they no longer hold the dense weights.
    """
    if frozen.teacher is not None:
        return frozen.teacher
    reduced = [path for path, leaf in paths_of(frozen.params).items() if is_reduced(leaf)]
    if reduced:
        raise RestoreError(
            f'{reduced[0]} is packed or quantised, so the params cannot be a dense teacher: '
            "give Frozen.teacher, or batch['teacher'], or kd=0"
        )
    return frozen.params
