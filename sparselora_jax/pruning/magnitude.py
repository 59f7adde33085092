"""Pruning without data: by magnitude, and at random (the floor that every method is compared with)."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from sparselora_jax.pruning.method import Method
from sparselora_jax.sparse.masks import mask_from_scores
from sparselora_jax.sparse.patterns import Pattern


@dataclass(frozen=True)
class Magnitude(Method):
    """Score `|W|`.

    Attributes:
      group: comparison group of unstructured patterns, `'output'` or `'matrix'`.
    """

    group: str = 'output'
    statistic: ClassVar[None] = None
    edits_kept_weights: ClassVar[bool] = False
    outputs_are_independent: ClassVar[bool] = True

    def __call__(
        self,
        kernel: Float[Array, 'inputs outputs'],
        statistic: None,
        pattern: Pattern,
        num_zeros: ArrayLike | None = None,
    ) -> tuple[Float[Array, 'inputs outputs'], Bool[Array, 'inputs outputs']]:
        """Return the kernel with its zeros, and the mask.

        Args:
          kernel: dense weights.
          statistic: None.
          pattern: see `Method`.
          num_zeros: see `mask_from_scores`.
        """
        # Scores in the kernel's own dtype: |W| is exact in it.
        mask = mask_from_scores(jnp.abs(kernel), pattern, group=self.group, num_zeros=num_zeros)
        return jnp.where(mask, kernel, jnp.zeros((), kernel.dtype)), mask


@dataclass(frozen=True)
class Random(Method):
    """A uniform random score. The same `seed` and kernel give the same mask; another layer has another mask.

    Attributes:
      seed: seed of the random numbers.
      group: comparison group of unstructured patterns, `'output'` or `'matrix'`.
    """

    seed: int = 0
    group: str = 'output'
    statistic: ClassVar[None] = None
    edits_kept_weights: ClassVar[bool] = False
    outputs_are_independent: ClassVar[bool] = False  # scores are drawn for the whole kernel

    def __call__(
        self,
        kernel: Float[Array, 'inputs outputs'],
        statistic: None,
        pattern: Pattern,
        num_zeros: ArrayLike | None = None,
    ) -> tuple[Float[Array, 'inputs outputs'], Bool[Array, 'inputs outputs']]:
        """Return the kernel with its zeros, and the mask.

        Args:
          kernel: dense weights.
          statistic: None.
          pattern: see `Method`.
          num_zeros: see `mask_from_scores`.
        """
        # A method does not know the index of its layer, so the sum of the weights' bits tells layers apart.
        bits = jnp.sum(jax.lax.bitcast_convert_type(kernel.astype(jnp.float32), jnp.uint32), dtype=jnp.uint32)
        scores = jax.random.uniform(jax.random.fold_in(jax.random.key(self.seed), bits), kernel.shape)
        mask = mask_from_scores(scores, pattern, group=self.group, num_zeros=num_zeros)
        return jnp.where(mask, kernel, jnp.zeros((), kernel.dtype)), mask
