"""x @ packed weights against x @ dense ones on the accelerator of this machine: numbers checked, then timed in turn."""

import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np
from timing import in_turn

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
        errors = {name: error(x, w, transposed) for name, w in weights.items()}
        times = in_turn({name: functools.partial(run, x, w, transposed) for name, w in weights.items()}, rounds)
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


def run(x: jax.Array, weights: jax.Array | sl.Packed24, transposed: bool) -> None:
    """One timed call."""
    jax.block_until_ready(layers(x, weights, transposed=transposed))


def product(x: jax.Array, weights: jax.Array | sl.Packed24, transposed: bool) -> jax.Array:
    """`x @ W`, or `x @ W.T` as the gradient of the other is made."""
    if isinstance(weights, jax.Array):
        return x @ (weights.T if transposed else weights)
    if not transposed:
        return matmul24(x, weights)
    unused = jnp.zeros((x.shape[0], weights.shape[0]), x.dtype)
    return jax.vjp(lambda y: matmul24(y, weights), unused)[1](x)[0]


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
