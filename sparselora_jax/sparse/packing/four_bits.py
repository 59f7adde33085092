"""Rounds weights to four bits: one of sixteen levels, times a bf16 scale shared by a run of inputs."""

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
# Tried ratios of the largest magnitude to the largest level. A ratio above 1 clips the largest values, and rounds the
# others more finely.
CUT_OFF = np.arange(15, 25) / 16


def shares(kind: str) -> np.ndarray:
    """Return the scales to try, as shares of the largest magnitude.

    Some scales map the largest magnitude to one of the levels, so values that are on a grid already get their scale
    back. Other scales clip it. Negative scales are tried too, because the levels of both kinds are asymmetric.

    Args:
      kind: kind of levels, `int4` or `nf4`.
    """
    magnitudes = np.abs(LEVELS[kind])
    positive = 1 / np.unique(np.concatenate([magnitudes[magnitudes > 0], magnitudes.max() * CUT_OFF]))
    return np.concatenate([positive, -positive]).astype(np.float32)


def best_scale(values: Float[Array, '*blocks rows outputs'], kind: str) -> Float[Array, '*blocks outputs']:
    """Return the bf16 scale of each output that rounds its rows with the least squared error.

    Args:
      values: rows that share a scale.
      kind: kind of levels, `int4` or `nf4`.
    """
    largest = jnp.max(jnp.abs(values), axis=-2)

    def try_scale(share):
        scale = (largest * share).astype(jnp.bfloat16)
        return scale, jnp.sum(jnp.square(values - rounded(values, scale, kind)), axis=-2)

    # Try one scale after the other. All at once would need the kernel's memory once per scale.
    scales, errors = jax.lax.map(try_scale, shares(kind).astype(values.dtype))
    return jnp.take_along_axis(scales, jnp.argmin(errors, axis=0)[None], axis=0)[0]


def nearest(
    values: Float[Array, '*blocks rows outputs'], scale: Float[Array, '*blocks outputs'], kind: str
) -> Int[Array, '*blocks rows outputs']:
    """Return the index (0 to 15, ascending) of the level nearest to each value divided by its scale.

    Args:
      values: rows that share a scale.
      scale: the scale of each output.
      kind: kind of levels, `int4` or `nf4`.

    >>> nearest(jnp.array([[7.4], [-0.6], [9.0]]), jnp.array([1.0]), 'int4').tolist()
    [[15], [7], [15]]
    """
    # A scale is 0 if all its values are 0.
    units = values / jnp.where(scale == 0, 1, scale).astype(values.dtype)[..., None, :]
    levels = np.array(LEVELS[kind])
    if kind == 'int4':
        return (jnp.clip(jnp.round(units), -8, 7) + 8).astype(jnp.int32)
    # The index is the number of midpoints between levels below the value. For sixteen levels a search would be slower.
    middles = ((levels[1:] + levels[:-1]) / 2).astype(units.dtype)
    return sum((units > middle).astype(jnp.int32) for middle in middles)


def rounded(
    values: Float[Array, '*blocks rows outputs'], scale: Float[Array, '*blocks outputs'], kind: str
) -> Float[Array, '*blocks rows outputs']:
    """Return every value rounded to its nearest level times its scale.

    Args:
      values: rows that share a scale.
      scale: the scale of each output.
      kind: kind of levels, `int4` or `nf4`.
    """
    levels = jnp.asarray(LEVELS[kind], values.dtype)[nearest(values, scale, kind)]
    return levels * scale.astype(values.dtype)[..., None, :]
