"""What a weight can be in four bits: one of sixteen levels, times the bf16 scale that a run of inputs shares."""

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
CUT_OFF = np.arange(15, 25) / 16  # what the largest magnitude may be of the largest level's, beyond which it is cut off


def shares(kind: str) -> np.ndarray:
    """The scales that are tried, over the largest magnitude.

    That magnitude becomes one of the levels, so the scale of values that lie on a grid already is found again; or it is
    cut off. Negative scales too: neither kind's levels are symmetric.
    """
    magnitudes = np.abs(LEVELS[kind])
    positive = 1 / np.unique(np.concatenate([magnitudes[magnitudes > 0], magnitudes.max() * CUT_OFF]))
    return np.concatenate([positive, -positive]).astype(np.float32)


def best_scale(values: Float[Array, '*blocks rows outputs'], kind: str) -> Float[Array, '*blocks outputs']:
    """In bf16: of those tried, the one by which an output's rows are rounded with the least squared error."""
    largest = jnp.max(jnp.abs(values), axis=-2)

    def error(share):
        scale = (largest * share).astype(jnp.bfloat16)
        return scale, jnp.sum(jnp.square(values - rounded(values, scale, kind)), axis=-2)

    scales, errors = jax.lax.map(error, shares(kind).astype(values.dtype))
    return jnp.take_along_axis(scales, jnp.argmin(errors, axis=0)[None], axis=0)[0]


def nearest(
    values: Float[Array, '*blocks rows outputs'], scale: Float[Array, '*blocks outputs'], kind: str
) -> Int[Array, '*blocks rows outputs']:
    """Which of the sixteen levels, from below, is nearest to each value over its scale.

    >>> nearest(jnp.array([[7.4], [-0.6], [9.0]]), jnp.array([1.0]), 'int4').tolist()
    [[15], [7], [15]]
    """
    units = values / jnp.where(scale == 0, 1, scale).astype(values.dtype)[..., None, :]
    levels = np.array(LEVELS[kind])
    if kind == 'int4':
        return (jnp.clip(jnp.round(units), -8, 7) + 8).astype(jnp.int32)
    middles = ((levels[1:] + levels[:-1]) / 2).astype(units.dtype)
    return sum((units > middle).astype(jnp.int32) for middle in middles)


def rounded(
    values: Float[Array, '*blocks rows outputs'], scale: Float[Array, '*blocks outputs'], kind: str
) -> Float[Array, '*blocks rows outputs']:
    """Every value at its nearest level, times its scale."""
    levels = jnp.asarray(LEVELS[kind], values.dtype)[nearest(values, scale, kind)]
    return levels * scale.astype(values.dtype)[..., None, :]
