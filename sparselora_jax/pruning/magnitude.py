"""Pruning without data: by magnitude, and at random (the floor that every method is compared with)."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sparselora_jax.sparse.masks import Pattern, mask_from_scores


@dataclass(frozen=True)
class Magnitude:
    """Score `|W|`."""

    group: str = 'output'
    statistic: ClassVar[None] = None

    def __call__(
        self, kernel: Float[Array, 'inputs outputs'], statistic: None, pattern: Pattern, num_zeros: Any = None
    ) -> tuple[Float[Array, 'inputs outputs'], Bool[Array, 'inputs outputs']]:
        """The kernel with its zeros, and the mask; `num_zeros`: see `mask_from_scores`."""
        mask = mask_from_scores(jnp.abs(kernel), pattern, group=self.group, num_zeros=num_zeros)
        return jnp.where(mask, kernel, jnp.zeros((), kernel.dtype)), mask


@dataclass(frozen=True)
class Random:
    """A uniform random score; the same `seed` and kernel give the same mask, another layer another one."""

    seed: int = 0
    group: str = 'output'
    statistic: ClassVar[None] = None

    def __call__(
        self, kernel: Float[Array, 'inputs outputs'], statistic: None, pattern: Pattern, num_zeros: Any = None
    ) -> tuple[Float[Array, 'inputs outputs'], Bool[Array, 'inputs outputs']]:
        """The kernel with its zeros, and the mask; `num_zeros`: see `mask_from_scores`."""
        bits = jnp.sum(jax.lax.bitcast_convert_type(kernel.astype(jnp.float32), jnp.uint32), dtype=jnp.uint32)
        scores = jax.random.uniform(jax.random.fold_in(jax.random.key(self.seed), bits), kernel.shape)
        mask = mask_from_scores(scores, pattern, group=self.group, num_zeros=num_zeros)
        return jnp.where(mask, kernel, jnp.zeros((), kernel.dtype)), mask
