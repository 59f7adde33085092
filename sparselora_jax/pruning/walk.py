"""Runs a model's blocks layer by layer over the calibration samples, so that each can be looked at or changed."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sparselora_jax import calibrate
from sparselora_jax import rules as rules_lib
from sparselora_jax.models.runners import valid_rows


def joined(batches: Iterable[dict]) -> dict:
    """One batch of all samples.

    Raises:
      CalibrationError: no batch.
    """
    if not (batches := list(batches)):
        raise calibrate.CalibrationError('the calibration set is empty: no batch arrived')
    return jax.tree.map(lambda *leaves: jnp.concatenate([jnp.asarray(leaf) for leaf in leaves]), *batches)


def block_observer(block: Callable, stats: Callable[[str], Callable | None]) -> Callable[..., Any]:
    """`(w, chunks) -> {name: (sum, tokens)}`: what the kernels of a layer read; see `calibrate.make_observer`.

    Args:
      stats: the statistic of a kernel, by its name within the block, or None: it is not watched.
    """
    return calibrate.make_observer(
        lambda w, inputs: block(w, *inputs, None),
        stats=stats,
        valid=lambda name, inputs: valid_rows(name, inputs[1]),
    )


def walk(
    forward: Callable[..., Any],
    params: dict,
    samples: dict,
    enter: Callable[[str, Callable], Callable[[int, int, dict, list], dict]],
    *,
    chunk: int,
) -> None:
    """Runs `forward` over all samples, block by block, `chunk` samples at a time; see `prune`.

    Args:
      enter: `enter(tower, block)`, called at each stack of blocks, returns `visit(layer, layers, w, chunks)`: that is
        given a layer's weights by path and its inputs, `[(x, ctx), ...]`, and returns the weights to go on with.

    Raises:
      CalibrationError: one of `visit`, which names a kernel within its block: with tower and layer.
    """

    def run(tower, block, weights, x, ctx, cache=None):
        visit = enter(tower, block)
        step = jax.jit(lambda w, x, ctx: block(w, x, ctx, None)[0])
        chunks = in_chunks(x, ctx, chunk)
        layers = jax.tree.leaves(weights)[0].shape[0]
        for layer in range(layers):
            w = rules_lib.flatten(jax.tree.map(lambda leaf, layer=layer: jnp.asarray(leaf[layer]), weights))
            try:
                w = visit(layer, layers, w, chunks)
            except calibrate.CalibrationError as error:
                raise calibrate.CalibrationError(f'{tower}/blocks/{error} (layer {layer})') from None
            for i, (x, ctx) in enumerate(chunks):  # one by one: two sets of hidden states are never held
                chunks[i] = (step(rules_lib.unflatten(w), x, ctx), ctx)
        return jnp.concatenate([x for x, _ in chunks]), cache

    forward(params, samples, run)


def in_chunks(x: Array, ctx: dict, chunk: int) -> list[tuple[Array, dict]]:
    """Chunks of samples; arrays of `ctx` have the batch, or 1, as their leading axis."""
    batch = x.shape[0]
    return [_part((x, ctx), first, batch=batch, size=min(chunk, batch - first)) for first in range(0, batch, chunk)]


@functools.partial(jax.jit, static_argnames=('batch', 'size'))
def _part(arrays: Any, first: Any, *, batch: int, size: int) -> Any:
    def part(leaf):
        whole = leaf.shape[0] == 1 and batch > 1
        return leaf if whole else jax.lax.dynamic_slice_in_dim(leaf, first, size)

    return jax.tree.map(part, arrays)
