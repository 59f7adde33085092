"""x @ packed weights against x @ dense ones on the accelerator of this machine: numbers checked, then timed in turn."""

import functools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import sparselora_jax as sl
from sparselora_jax.kernels.matmul24 import matmul24
from sparselora_jax.packing.packed24 import pack24, quantise24, unpack24

LAYERS = 8  # different weights, one after the other, so that no cache holds them
BOUND = 2**-7  # of an error, over the sum of magnitudes: bf16 rounds to 2**-9


def timed(rows: int, inputs: int, outputs: int, *, rounds: int) -> None:
    """Prints a line for each product and kind of weights; ends where numbers are wrong."""
    dense = jax.random.normal(jax.random.key(0), (LAYERS, inputs, outputs), jnp.bfloat16)
    packed = pack24(jnp.where(mask := sl.mask_from_scores(jnp.abs(dense), '2:4'), dense, 0), mask)
    weights = {'dense': unpack24(packed), 'packed': packed, 'packed int4': quantise24(packed)}
    for transposed in (False, True):
        x = jax.random.normal(jax.random.key(1), (rows, outputs if transposed else inputs), jnp.bfloat16)
        times: dict[str, list[float]] = {name: [] for name in weights}
        errors = {name: error(x, w, transposed) for name, w in weights.items()}
        runs = {name: functools.partial(layers, x, w, transposed=transposed) for name, w in weights.items()}
        for run in runs.values():
            jax.block_until_ready(run())
        for _ in range(rounds):
            for name, run in runs.items():
                times[name].append(seconds(run) / LAYERS)
        where = f'{jax.devices()[0].device_kind} | {rows} | {inputs}x{outputs} | {"g @ W.T" if transposed else "x @ W"}'
        for name, of_name in times.items():
            ratios = [one / other for one, other in zip(of_name, times['dense'], strict=True)]
            print(
                f'| {where} | {name} | {errors[name]:.1e} | {1e6 * statistics.median(of_name):.1f} | '
                f'{1e6 * min(of_name):.1f} to {1e6 * max(of_name):.1f} | {statistics.median(ratios):.2f} | '
                f'{min(ratios):.2f} to {max(ratios):.2f} |',
                flush=True,
            )
            if not errors[name] < BOUND:
                raise SystemExit(f'{name}: off by {errors[name]} of the sum of magnitudes, expected below {BOUND}')


def product(x: jax.Array, weights: jax.Array | sl.Packed24, transposed: bool) -> jax.Array:
    """`x @ W`, or `x @ W.T` as the gradient of the other is made."""
    if isinstance(weights, jax.Array):
        return x @ (weights.T if transposed else weights)
    if not transposed:
        return matmul24(x, weights)
    like = jax.ShapeDtypeStruct((x.shape[0], weights.shape[0]), x.dtype)
    return jax.linear_transpose(lambda y: matmul24(y, weights), like)(x)[0]


@functools.partial(jax.jit, static_argnames='transposed')
def layers(x: jax.Array, weights: jax.Array | sl.Packed24, *, transposed: bool) -> jax.Array:
    """The product with each layer's weights; each waits for the one before."""

    def one(x, w):
        y = product(x, w, transposed)
        return x + 0 * y[:1, :1], None

    return jax.lax.scan(one, x, weights)[0]


def error(x: jax.Array, weights: jax.Array | sl.Packed24, transposed: bool) -> float:
    """The largest of the first layer's, over the sum of magnitudes; the right numbers are of float64 on the host."""
    one = jax.tree.map(lambda leaf: leaf[0], weights)
    wide = np.asarray(one if isinstance(one, jax.Array) else unpack24(one, jnp.float32), np.float64)
    wide, rows = (wide.T if transposed else wide), np.asarray(x, np.float64)
    got = np.asarray(jax.jit(product, static_argnums=2)(x, one, transposed), np.float64)
    return float(np.max(np.abs(got - rows @ wide) / np.maximum(np.abs(rows) @ np.abs(wide), 1e-9)))


def seconds(run: Callable[[], jax.Array]) -> float:
    """Wall-clock time of one call."""
    started = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - started
