"""ECoFLaP (arXiv 2310.02998): how much each layer matters to the loss of the whole model, by gradients or without.

Scores of each layer's kernel, for `allocate`, as the public code's scripts for BLIP-2 have them:

- first order, `GradMagAbs_sum`: the sum over a kernel of `|W| * mean over batches of |dL/dW|`;
- zeroth order, `MEZO-GradOnly_sum`: the mean over batches of `|L(W + eps z) - L(W - eps z)| / (2 eps)`, where z is
  standard normal noise on that one kernel of that one layer, and forwards are all that is needed.

Scores of a block's kernels are added up, and blocks of all towers compete for one budget (`allocate`). Both need the
model in memory (the zeroth order runs it twice for each kernel, layer and batch) and work through a runner: any forward
that hands its blocks to `run` will do.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparselora_jax.models.runners import remat_blocks, scan_blocks
from sparselora_jax.pruning import calibrate
from sparselora_jax.pruning.targets import in_blocks
from sparselora_jax.sparse import rules as rules_lib

ROWS = 32  # inputs of a kernel whose noise is drawn at once

Loss = Callable[..., Float[Array, '']]  # loss(weights, batch, run)


@jax.custom_vjp
def _scored(kernel: Array, tap: Array) -> Array:
    """The kernel. The gradient of `tap` is the kernel's score: its own gradient is reduced where it arises."""
    del tap
    return kernel


def _scored_backward(kernel, gradient):
    score = jnp.sum(jnp.abs(kernel.astype(jnp.float32)) * jnp.abs(gradient.astype(jnp.float32)))
    return jnp.zeros_like(kernel), score.astype(score_dtype(kernel))


def score_dtype(kernel: Any) -> Any:
    """fp32, or the kernel's own where that is wider."""
    return jnp.float64 if kernel.dtype == jnp.float64 else jnp.float32


_scored.defvjp(lambda kernel, tap: (kernel, kernel), _scored_backward)


def tapped_blocks(taps: dict[str, Float[Array, ' layers']]) -> Callable[..., Any]:
    """A runner through which the gradient of each tap is the score of its kernel and layer.

    The backward has one block's kernels' gradients at a time, and keeps a block's input and its scores.
    """

    def run(tower, block, weights, x, ctx, cache=None):
        here = in_blocks(taps, tower)

        def tapped(w, x, ctx, cache):
            flat = rules_lib.flatten(w['weights'])
            for name, tap in w['taps'].items():
                flat[name] = _scored(flat[name], tap)
            return block(rules_lib.unflatten(flat), x, ctx, cache)

        of_layers = {name: taps[path] for name, path in here.items()}
        return remat_blocks(tower, tapped, {'weights': weights, 'taps': of_layers}, x, ctx, cache)

    return run


def make_first_order(loss: Loss) -> Callable[[dict, Any, dict[str, Array]], dict[str, Array]]:
    """`(params, batch, taps) -> scores of one batch`, jitted; `taps` are zeros `[layers]`, by path."""
    return jax.jit(lambda params, batch, taps: jax.grad(lambda taps: loss(params, batch, tapped_blocks(taps)))(taps))


def first_order_scores(loss: Loss, params: dict, batches: Iterable[Any], paths: Sequence[str]) -> dict[str, np.ndarray]:
    """The sum over each layer's kernel of `|W| * mean over batches of |dL/dW|`.

    A kernel's gradient is reduced to its score inside the backward of its block, so memory holds one block's gradients,
    and what `remat_blocks` keeps.

    Args:
      loss: `loss(weights, batch, run)` -> a scalar: the mean over the batch.
      batches: of one shape.
      paths: of stacked kernels inside the blocks.

    Returns:
      {path: score of each layer}, float64 on the host.

    Raises:
      CalibrationError: no batch. RuleError: a kernel outside of all blocks.
    """
    step, flat = make_first_order(loss), rules_lib.flatten(params)
    _check_paths(flat, paths)
    taps = {path: jnp.zeros(flat[path].shape[0], score_dtype(flat[path])) for path in paths}
    scores = _mean([step(params, batch, taps) for batch in batches])
    return {path: scores[path] for path in paths}  # jax sorts keys


def _mean(scores: list[Any]) -> Any:
    if not scores:
        raise calibrate.CalibrationError('the calibration set is empty: no batch arrived')
    return jax.tree.map(lambda *leaves: np.mean([np.asarray(leaf, np.float64) for leaf in leaves], axis=0), *scores)


def _check_paths(flat: dict, paths: Sequence[str]) -> None:
    for path in paths:
        if '/blocks/' not in path or flat[path].ndim != 3:
            raise rules_lib.RuleError(f'{path}: not inside the blocks of a tower; make it dense')


def noise(key: Array, row: Int[Array, ''], row_like: Float[Array, ' outputs']) -> Float[Array, ' outputs']:
    """Z of one input's weights: standard normal, in the dtype in which it is added."""
    return jax.random.normal(jax.random.fold_in(key, row), row_like.shape, score_dtype(row_like))


def perturbed_blocks(
    paths: Sequence[str], kernel: Int[Array, ''], layer: Int[Array, ''], key: Array, scale: Float[Array, '']
) -> Callable[..., Any]:
    """A runner that adds `scale * z` to one layer of the kernel `paths[kernel]`, inside that block.

    `kernel` and `layer` may be traced: one program serves all of them. Memory is that of `scan_blocks` and the noise of
    `ROWS` inputs: the branches of a `cond` slice the stack themselves (handed a layer's kernels, each would be copied),
    and a perturbed kernel is made a few rows at a time.
    """

    def run(tower, block, weights, x, ctx, cache=None):
        indices = {name: paths.index(path) for name, path in in_blocks(paths, tower).items()}

        def plain(stack, here):
            return stack[here]

        def perturbed(stack, here):
            def one(row):
                wide = stack[here, row].astype(score_dtype(stack))
                return (wide + scale.astype(wide.dtype) * noise(key, row, wide)).astype(stack.dtype)

            return jax.lax.map(one, jnp.arange(stack.shape[1], dtype=jnp.int32), batch_size=ROWS)

        def one_block(w, x, ctx, cache):
            flat = {}
            for name, stack in rules_lib.flatten(weights).items():
                if name in indices:
                    chosen = (w['layer'] == layer) & (kernel == indices[name])
                    flat[name] = jax.lax.cond(chosen, perturbed, plain, stack, w['layer'])
                else:
                    flat[name] = stack[w['layer']]
            return block(rules_lib.unflatten(flat), x, ctx, cache)

        layers = jnp.arange(jax.tree.leaves(weights)[0].shape[0], dtype=jnp.int32)
        return scan_blocks(tower, one_block, {'layer': layers}, x, ctx, cache)

    return run


def make_zeroth_order(loss: Loss, paths: Sequence[str], *, eps: float) -> Callable[..., Float[Array, '']]:
    """`(params, batch, kernel, layer, key) -> |L(W + eps z) - L(W - eps z)| / (2 eps)`, jitted once for all of them."""

    @jax.jit
    def step(params, batch, kernel, layer, key):
        def one_side(sign):
            return loss(params, batch, perturbed_blocks(paths, kernel, layer, key, sign * eps))

        # One after the other: side by side both would hold their activations.
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
    progress: Callable[[int, str], None] = lambda done, what: None,
) -> dict[str, np.ndarray]:
    """The mean over batches of `|L(W + eps z) - L(W - eps z)| / (2 eps)`, z on one layer of one kernel at a time.

    Noise is drawn anew from its key on both sides and never kept, so memory is that of the forward and one kernel's
    noise. It costs two forwards for each kernel, layer and batch.

    Args:
      loss, batches, paths: see `first_order_scores`, as for what is returned and raised.
      key: of the noise; that of kernel k, layer l, batch b, input i is `key` with k, l, b, i folded in, in that order.
      eps: how far weights are moved, in their own unit.
      progress: called with the number of kernels and layers done.
    """
    paths, batches, flat = tuple(paths), list(batches), rules_lib.flatten(params)
    _check_paths(flat, paths)
    step, scores, done = make_zeroth_order(loss, paths, eps=eps), {}, 0
    for index, path in enumerate(paths):
        layers = []
        for layer in range(flat[path].shape[0]):
            of_layer = jax.random.fold_in(jax.random.fold_in(key, index), layer)
            keys = [jax.random.fold_in(of_layer, b) for b in range(len(batches))]
            where = np.int32(index), np.int32(layer)
            layers.append(_mean([step(params, batch, *where, k) for batch, k in zip(batches, keys, strict=True)]))
            progress(done := done + 1, path)
        scores[path] = np.array(layers)
    return scores
