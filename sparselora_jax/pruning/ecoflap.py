"""ECoFLaP (arXiv 2310.02998): score how much each layer matters to the model's loss, with or without gradients.

`allocate` takes the scores of each layer's kernel. They are those of the public code's scripts for BLIP-2:

- first order, `GradMagAbs_sum`: the sum over a kernel of `|W| * mean over batches of |dL/dW|`;
- zeroth order, `MEZO-GradOnly_sum`: the mean over batches of `|L(W + eps z) - L(W - eps z)| / (2 eps)`, where z is
  standard normal noise on one kernel of one layer. It needs forwards only.

`allocate` sums the scores of a block's kernels, and blocks of all towers compete for one budget. Both orders need the
whole model in memory. The zeroth order runs it twice for each kernel, layer and batch. Both work with any forward that
passes its blocks to a runner, `run`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from sparselora_jax.models.runners import remat_blocks, scan_blocks
from sparselora_jax.pruning import calibrate
from sparselora_jax.pruning.allocate import allocate, check_bound, total
from sparselora_jax.pruning.allocation import Allocation, AllocationError, AllocationInputs, Zeros, check_highest
from sparselora_jax.pruning.targets import in_blocks
from sparselora_jax.sparse.rules import RuleError, flatten, is_in_block, unflatten

ROWS = 32  # number of a kernel's inputs whose noise is drawn at once

Loss = Callable[..., Float[Array, '']]  # loss(weights, batch, run)
# A runner of a stack of blocks, see `models.runners`.
Runner = Callable[..., Any]


@jax.custom_vjp
def _scored(kernel: Array, tap: Array) -> Array:
    """Return the kernel.

    The gradient with respect to `tap` is the kernel's score. So the backward reduces the kernel's gradient at once and
    never stores it.
    """
    del tap
    return kernel


def _scored_forward(kernel, tap):
    return kernel, kernel


def _scored_backward(kernel, gradient):
    # The kernel, saved by the forward, meets its gradient here, in the backward of one block.
    score = jnp.sum(jnp.abs(kernel.astype(jnp.float32)) * jnp.abs(gradient.astype(jnp.float32)))
    return jnp.zeros_like(kernel), score.astype(score_dtype(kernel))


_scored.defvjp(_scored_forward, _scored_backward)


def score_dtype(kernel: Array | np.ndarray | jax.ShapeDtypeStruct) -> DTypeLike:
    """Return fp32, or the kernel's own dtype where that is wider."""
    return jnp.float64 if kernel.dtype == jnp.float64 else jnp.float32


def tapped_blocks(taps: dict[str, Float[Array, ' layers']]) -> Runner:
    """Return a runner in which the gradient with respect to each tap is the score of its kernel and layer.

    The backward holds the gradients of one block's kernels at a time. Only each block's input and scores are stored.

    Args:
      taps: arrays of zeros, by path.
    """

    def run(tower, block, weights, x, ctx, cache=None):
        def tapped(w, x, ctx, cache):
            # The tap goes through `_scored`, so its gradient is the score; its value, zero, is not used.
            flat = flatten(w['weights'])
            for name, tap in w['taps'].items():
                flat[name] = _scored(flat[name], tap)
            return block(unflatten(flat), x, ctx, cache)

        # The runner scans over weights and taps together: a block sees its own layer's tap.
        tower_taps = {name: taps[path] for name, path in in_blocks(taps, tower).items()}
        return remat_blocks(tower, tapped, {'weights': weights, 'taps': tower_taps}, x, ctx, cache)

    return run


def make_first_order(loss: Loss) -> Callable[[dict, Any, dict[str, Array]], dict[str, Array]]:
    """Return `(params, batch, taps) -> scores of one batch`, jitted; `taps` are zeros `[layers]`, by path.

    Args:
      loss: see `first_order_scores`.
    """
    return jax.jit(lambda params, batch, taps: jax.grad(lambda taps: loss(params, batch, tapped_blocks(taps)))(taps))


def first_order_scores(loss: Loss, params: dict, batches: Iterable[Any], paths: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the sum over each layer's kernel of `|W| * mean over batches of |dL/dW|`.

    A kernel's gradient is reduced to its score inside the backward of its block, so memory holds the gradients of one
    block, and what `remat_blocks` stores.

    Args:
      loss: `loss(weights, batch, run)` -> a scalar: the mean over the batch.
      params: the dense weights.
      batches: batches of one shape.
      paths: paths of stacked kernels inside the blocks.

    Returns:
      {path: score of each layer}, float64 on the host.

    Raises:
      CalibrationError: no batch.
      RuleError: a kernel lies outside all blocks.
    """
    step = make_first_order(loss)
    flat = flatten(params)
    _check_paths(flat, paths)
    # Scores come out as the gradients with respect to these, [layers] for each kernel.
    taps = {path: jnp.zeros(flat[path].shape[0], score_dtype(flat[path])) for path in paths}
    scores = _mean([step(params, batch, taps) for batch in batches])
    return {path: scores[path] for path in paths}  # jax sorts keys


def _mean(scores: Sequence[PyTree]) -> PyTree:
    """Return the mean over batches, in float64.

    Raises:
      CalibrationError: no batch.
    """
    if not scores:
        raise calibrate.CalibrationError('the calibration set is empty: no batch arrived')
    return jax.tree.map(lambda *leaves: np.mean([np.asarray(leaf, np.float64) for leaf in leaves], axis=0), *scores)


def _check_paths(flat: Mapping[str, Any], paths: Sequence[str]) -> None:
    """Check that all kernels lie inside blocks.

    Raises:
      RuleError: one does not.
    """
    for path in paths:
        if not is_in_block(path) or flat[path].ndim != 3:
            raise RuleError(f'{path}: not inside the blocks of a tower; make it dense')


def noise(key: Array, row: Int[Array, ''], row_like: Float[Array, ' outputs']) -> Float[Array, ' outputs']:
    """Return the noise z for the weights of one input: standard normal, in the dtype of the addition.

    Args:
      key: key of the kernel and layer.
      row: index of the input.
      row_like: that input's weights.
    """
    return jax.random.normal(jax.random.fold_in(key, row), row_like.shape, score_dtype(row_like))


def perturbed_blocks(
    paths: Sequence[str], kernel: Int[Array, ''], layer: Int[Array, ''], key: Array, scale: Float[Array, '']
) -> Runner:
    """Return a runner that adds `scale * z` to one layer of the kernel `paths[kernel]`, inside that block.

    `kernel` and `layer` may be traced, so one program serves all of them. It needs the memory of `scan_blocks`, and
    that of the noise of `ROWS` inputs.

    Args:
      paths: paths of stacked kernels inside the blocks.
      kernel: index into `paths`.
      layer: index of the layer.
      key: key of the noise.
      scale: factor of the noise.
    """

    def run(tower, block, weights, x, ctx, cache=None):
        indices = {name: paths.index(path) for name, path in in_blocks(paths, tower).items()}

        # Both branches of the `cond` slice the stack themselves. If they took a layer's kernels instead, each kernel
        # would be copied.
        def plain(stack, index):
            return stack[index]

        def perturbed(stack, index):
            def perturb_row(row):
                # Noise of size eps would vanish in bf16 weights, so it is added in float32 and rounded once.
                wide = stack[index, row].astype(score_dtype(stack))
                return (wide + scale.astype(wide.dtype) * noise(key, row, wide)).astype(stack.dtype)

            # A few rows at a time, so that memory never holds the noise of a whole kernel.
            return jax.lax.map(perturb_row, jnp.arange(stack.shape[1], dtype=jnp.int32), batch_size=ROWS)

        def run_block(w, x, ctx, cache):
            flat = {}
            for name, stack in flatten(weights).items():
                # A kernel that is not scored needs no `cond`.
                if name in indices:
                    is_chosen = (w['layer'] == layer) & (kernel == indices[name])
                    flat[name] = jax.lax.cond(is_chosen, perturbed, plain, stack, w['layer'])
                else:
                    flat[name] = stack[w['layer']]
            return block(unflatten(flat), x, ctx, cache)

        # Scanned over layer indices, not weights: the block slices the stacks itself (see above).
        layers = jnp.arange(jax.tree.leaves(weights)[0].shape[0], dtype=jnp.int32)
        return scan_blocks(tower, run_block, {'layer': layers}, x, ctx, cache)

    return run


def make_zeroth_order(loss: Loss, paths: Sequence[str], *, eps: float) -> Callable[..., Float[Array, '']]:
    """Return `(params, batch, kernel, layer, key) -> |L(W + eps z) - L(W - eps z)| / (2 eps)`, jitted once for all.

    Args:
      loss: see `first_order_scores`.
      paths: see `first_order_scores`.
      eps: scale of the perturbation.
    """

    @jax.jit
    def step(params, batch, kernel, layer, key):
        def one_side(sign):
            return loss(params, batch, perturbed_blocks(paths, kernel, layer, key, sign * eps))

        # One after the other: run together, both would hold their activations.
        plus, minus = jax.lax.map(one_side, jnp.array([1.0, -1.0]))
        return jnp.abs(plus - minus) / (2 * eps)

    return step


def zeroth_order_scores(
    loss: Loss,
    params: dict,
    batches: Iterable[Any],
    paths: Sequence[str],
    *,
    key: Array,
    eps: float = 1e-3,
    progress: Callable[[int, str], None] = lambda done, path: None,
) -> dict[str, np.ndarray]:
    """Return the mean over batches of `|L(W + eps z) - L(W - eps z)| / (2 eps)`, z on one layer of a kernel.

    Both sides draw the same noise from its key and never store it, so memory is that of the forward, one
    perturbed kernel and the noise of `ROWS` inputs. It costs two forwards for each kernel, layer and batch.

    Args:
      loss: see `first_order_scores`.
      params: the dense weights.
      batches: batches of one shape.
      paths: paths of stacked kernels inside the blocks.
      key: key of the noise. Kernel k, layer l, batch b and input i use `key` with k, l, b and i folded in, in that
        order.
      eps: scale of the perturbation, in the unit of the weights.
      progress: called with the number of kernels and layers done, and the path of the last.

    Returns:
      {path: score of each layer}, float64 on the host.

    Raises:
      CalibrationError: no batch.
      RuleError: a kernel lies outside all blocks.
    """
    paths = tuple(paths)
    batches = list(batches)
    flat = flatten(params)
    _check_paths(flat, paths)
    step = make_zeroth_order(loss, paths, eps=eps)
    scores = {}
    done = 0
    for index, path in enumerate(paths):
        of_layers = []
        for layer in range(flat[path].shape[0]):
            # Keys depend on indices alone, so scores do not depend on the order of work.
            layer_key = jax.random.fold_in(jax.random.fold_in(key, index), layer)
            # Indices are numpy scalars: traced, so all kernels and layers share one program.
            of_batches = [
                step(params, batch, np.int32(index), np.int32(layer), jax.random.fold_in(layer_key, b))
                for b, batch in enumerate(batches)
            ]
            of_layers.append(_mean(of_batches))
            done += 1
            progress(done, path)
        scores[path] = np.array(of_layers)
    return scores


@dataclass(frozen=True)
class _ByImportance(Allocation):
    """Distribute kept weights by their importance to the loss; base class of both orders.

    Attributes:
      highest: sparsity that no layer's kernel exceeds.
      score_samples: number of training samples that the scores are computed from.
      score_batch: number of samples in a batch.
    """

    highest: float = 0.8
    score_samples: int = 32
    score_batch: int = 8
    needs_model_in_memory: ClassVar[bool] = True
    uses_score_batches: ClassVar[bool] = True

    def __post_init__(self):
        check_highest(self.highest)
        if self.score_samples % self.score_batch:
            raise AllocationError(
                f'score_batch {self.score_batch}: does not divide score_samples, {self.score_samples}'
            )

    def check(self, uniform: Zeros, sizes: dict[str, int]) -> None:
        """Check that the budget fits under `highest`.

        Args:
          uniform: see `AllocationInputs`.
          sizes: see `AllocationInputs`.

        Raises:
          PatternError: it does not.
        """
        check_bound(uniform, sizes, self.highest)

    def scores(self, inputs: AllocationInputs, batches: list[dict]) -> dict[str, np.ndarray]:
        """Return the importance of each layer's kernel.

        Args:
          inputs: see `Allocation`.
          batches: batches of training samples.
        """
        raise NotImplementedError

    def __call__(self, inputs: AllocationInputs) -> Zeros:
        """Return zeros by ECoFLaP's rule.

        Args:
          inputs: see `Allocation`.

        Raises:
          PatternError: see `allocate`.
        """
        batches = inputs.score_batches(self.score_samples, self.score_batch)
        scores = self.scores(inputs, batches)
        return allocate(scores, inputs.sizes, total(inputs.uniform), highest=self.highest)


@dataclass(frozen=True)
class EcoflapFirst(_ByImportance):
    """Share kept weights out by first-order scores."""

    def scores(self, inputs: AllocationInputs, batches: list[dict]) -> dict[str, np.ndarray]:
        """Return first-order scores.

        Args:
          inputs: see `Allocation`.
          batches: batches of training samples.
        """
        return first_order_scores(inputs.loss, inputs.params, batches, tuple(inputs.uniform))


@dataclass(frozen=True)
class EcoflapZeroth(_ByImportance):
    """Share kept weights out by zeroth-order scores.

    Attributes:
      noise: scale of the perturbation (eps), in the unit of the weights.
    """

    noise: float = 1e-3

    def __post_init__(self):
        super().__post_init__()
        if not self.noise > 0:
            raise AllocationError(f'noise {self.noise}: expected more than 0')

    def scores(self, inputs: AllocationInputs, batches: list[dict]) -> dict[str, np.ndarray]:
        """Return zeroth-order scores.

        Args:
          inputs: see `Allocation`.
          batches: batches of training samples.
        """
        kernels = sum(zeros.size for zeros in inputs.uniform.values())
        return zeroth_order_scores(
            inputs.loss,
            inputs.params,
            batches,
            tuple(inputs.uniform),
            key=inputs.key,
            eps=self.noise,
            progress=inputs.progress('score', kernels),
        )
