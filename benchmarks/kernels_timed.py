"""x @ packed weights against x @ dense ones on the accelerator of this machine: numbers checked, then timed in turn."""

import functools
import statistics
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from gpu_times import kernel_seconds
from timing import in_turn

import sparselora_jax as sl
from sparselora_jax.sparse.kernels.matmul24 import matmul24
from sparselora_jax.sparse.packing.packed24 import pack24, quantise24, unpack24

LAYERS = 16  # different weights, one after the other, so that no cache holds them
BOUND = 2**-7  # of an error, over the sum of magnitudes: bf16 rounds to 2**-9


def timed(rows: int, inputs: int, outputs: int, *, rounds: int) -> None:
    """Print a line for each product and kind of weights; ends where numbers are wrong."""
    packed = [pruned(jax.random.key(layer), inputs, outputs) for layer in range(LAYERS)]
    weights = {
        'dense': [unpack24(one) for one in packed],
        'packed': packed,
        'packed int4': [quantise24(one) for one in packed],
    }
    for transposed in (False, True):
        x = jax.random.normal(jax.random.key(1), (rows, outputs if transposed else inputs), jnp.bfloat16)
        errors = {name: error(x, of_kind[0], transposed) for name, of_kind in weights.items()}
        runs = {name: functools.partial(every, x, of_kind, transposed) for name, of_kind in weights.items()}
        times = by_kernels(runs, rounds) if jax.default_backend() == 'gpu' else in_turn(runs, rounds)
        where = f'{jax.devices()[0].device_kind} | {rows} | {inputs}x{outputs} | {"g @ W.T" if transposed else "x @ W"}'
        for name, of_name in times.items():
            ratios = [one / other for one, other in zip(of_name, times['dense'], strict=True)]
            micros = [1e6 * one / LAYERS for one in of_name]
            print(
                f'| {where} | {name} | {errors[name]:.1e} | {statistics.median(micros):.1f} | '
                f'{min(micros):.1f} to {max(micros):.1f} | {statistics.median(ratios):.2f} | '
                f'{min(ratios):.2f} to {max(ratios):.2f} |',
                flush=True,
            )
            if not errors[name] < BOUND:
                raise SystemExit(f'{name}: off by {errors[name]} of the sum of magnitudes, expected below {BOUND}')


def pruned(key: jax.Array, inputs: int, outputs: int) -> sl.Packed24:
    """Random weights, 2:4."""
    dense = jax.random.normal(key, (inputs, outputs), jnp.bfloat16)
    mask = jax.jit(sl.mask_from_scores, static_argnums=1)(jnp.abs(dense), '2:4')
    return pack24(jnp.where(mask, dense, jnp.zeros((), dense.dtype)), mask)


def by_kernels(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """As `in_turn`, in seconds of the GPU's kernels."""
    seconds = kernel_seconds([*runs.values()] * rounds)
    return {name: seconds[at :: len(runs)] for at, name in enumerate(runs)}


def every(x: jax.Array, weights: list, transposed: bool) -> object:
    """One timed call: the product with each layer's weights."""
    if jax.default_backend() == 'gpu':
        return [one(x, of_layer, transposed) for of_layer in weights]
    return jax.block_until_ready(unrolled(x, weights, transposed))


def product(x: jax.Array, weights: jax.Array | sl.Packed24, transposed: bool) -> jax.Array:
    """`x @ W`, or `x @ W.T` as the gradient of the other is made."""
    if isinstance(weights, jax.Array):
        return x @ (weights.T if transposed else weights)
    if not transposed:
        return matmul24(x, weights)
    unused = jnp.zeros((x.shape[0], weights.shape[0]), x.dtype)
    return jax.vjp(lambda y: matmul24(y, weights), unused)[1](x)[0]


one = jax.jit(product, static_argnums=2)
unrolled = jax.jit(lambda x, weights, transposed: [product(x, w, transposed) for w in weights], static_argnums=2)


def error(x: jax.Array, weights: jax.Array | sl.Packed24, transposed: bool) -> float:
    """The largest, over the sum of magnitudes; the right numbers are of float64 on the host."""
    wide = np.asarray(weights if isinstance(weights, jax.Array) else unpack24(weights, jnp.float32), np.float64)
    wide, rows = (wide.T if transposed else wide), np.asarray(x, np.float64)
    got = np.asarray(one(x, weights, transposed), np.float64)
    return float(np.max(np.abs(got - rows @ wide) / np.maximum(np.abs(rows) @ np.abs(wide), 1e-9)))
