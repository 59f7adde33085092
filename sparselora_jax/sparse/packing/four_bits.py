"""Weights in four bits: one of sixteen levels, times the bf16 scale that a run of inputs shares."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

LEVELS = {
    'int4': tuple(float(level) for level in range(-8, 8)),
    # Quantiles of the normal distribution: QLoRA (arXiv 2305.14314), appendix E.
    'nf4': (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
}
# Scales are tried by which the largest magnitude is this much times the largest level. Above 1 it is cut off, and the
# others are rounded more finely.
CUT_OFF = np.arange(15, 25) / 16


def shares(kind: str) -> np.ndarray:
    """Return the scales that are tried, as shares of the largest magnitude.

    By some the largest magnitude becomes one of the levels, so the scale of values that lie on a grid already is found
    again; by others it is cut off. Negative scales are tried too: neither kind's levels are symmetric.

    Args:
      kind: of levels, `int4` or `nf4`.
    """
    magnitudes = np.abs(LEVELS[kind])
    positive = 1 / np.unique(np.concatenate([magnitudes[magnitudes > 0], magnitudes.max() * CUT_OFF]))
    return np.concatenate([positive, -positive]).astype(np.float32)


def best_scale(values: Float[Array, '*blocks rows outputs'], kind: str) -> Float[Array, '*blocks outputs']:
    """Return the bf16 scale by which the rows of an output are rounded with the least squared error.

    Args:
      values: rows that share a scale.
      kind: of levels, `int4` or `nf4`.
    """
    largest = jnp.max(jnp.abs(values), axis=-2)

    def try_scale(share):
        scale = (largest * share).astype(jnp.bfloat16)
        return scale, jnp.sum(jnp.square(values - rounded(values, scale, kind)), axis=-2)

    # One scale after the other: all at once would take as many times the memory of the kernel.
    scales, errors = jax.lax.map(try_scale, shares(kind).astype(values.dtype))
    return jnp.take_along_axis(scales, jnp.argmin(errors, axis=0)[None], axis=0)[0]


def nearest(
    values: Float[Array, '*blocks rows outputs'], scale: Float[Array, '*blocks outputs'], kind: str
) -> Int[Array, '*blocks rows outputs']:
    """Return the number of the level, of sixteen from below, that is nearest to each value over its scale.

    Args:
      values: rows that share a scale.
      scale: of each output.
      kind: of levels, `int4` or `nf4`.

    >>> nearest(jnp.array([[7.4], [-0.6], [9.0]]), jnp.array([1.0]), 'int4').tolist()
    [[15], [7], [15]]
    """
    # A scale of 0 belongs to values that are all 0.
    units = values / jnp.where(scale == 0, 1, scale).astype(values.dtype)[..., None, :]
    levels = np.array(LEVELS[kind])
    if kind == 'int4':
        return (jnp.clip(jnp.round(units), -8, 7) + 8).astype(jnp.int32)
    # A value above so many of the middles between levels has that level; a search would be slower for sixteen.
    middles = ((levels[1:] + levels[:-1]) / 2).astype(units.dtype)
    return sum((units > middle).astype(jnp.int32) for middle in middles)


def rounded(
    values: Float[Array, '*blocks rows outputs'], scale: Float[Array, '*blocks outputs'], kind: str
) -> Float[Array, '*blocks rows outputs']:
    """Return every value at its nearest level, times its scale.

    Args:
      values: rows that share a scale.
      scale: of each output.
      kind: of levels, `int4` or `nf4`.
    """
    levels = jnp.asarray(LEVELS[kind], values.dtype)[nearest(values, scale, kind)]
    return levels * scale.astype(values.dtype)[..., None, :]
