"""T5's relative positions: a learned bias for every bucket of distances."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def distance_buckets(buckets: int, max_distance: int) -> np.ndarray:
    """The bucket of every distance 0..max_distance: exact for the first half, logarithmic for the second.

    A table made on the host: an accelerator's logarithm may put a distance that lies on a boundary on its other side.

    >>> distance_buckets(8, 16).tolist()
    [0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7, 7]
    """
    exact = buckets // 2
    distance = np.arange(max_distance + 1)
    # In fp32 and in this order, as in transformers: its truncation decides which bucket a boundary belongs to.
    octaves = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    far = octaves / np.float32(math.log(max_distance / exact)) * np.float32(buckets - exact)
    far = np.minimum(exact + far.astype(np.int32), buckets - 1)
    return np.where(distance < exact, distance, far).astype(np.int32)


def relative_bias(
    table: Float[Array, 'buckets heads'],
    positions: Int[Array, 'batch tokens'],
    slot_positions: Int[Array, 'batch slots'],
    *,
    max_distance: int,
    bidirectional: bool,
) -> Float[Array, 'batch heads tokens slots']:
    """What the distance from a token to a slot adds to their product.

    Args:
      max_distance: slots as far as this or farther share a bucket.
      bidirectional: half the buckets are for later slots; otherwise those are taken to be at distance 0.
    """
    offset = slot_positions[:, None, :] - positions[:, :, None]
    buckets = table.shape[0] // 2 if bidirectional else table.shape[0]
    distance = jnp.abs(offset) if bidirectional else jnp.maximum(-offset, 0)
    bucket = jnp.asarray(distance_buckets(buckets, max_distance))[jnp.minimum(distance, max_distance)]
    if bidirectional:
        bucket = jnp.where(offset > 0, bucket + buckets, bucket)
    return jnp.moveaxis(table[bucket], -1, 1)
