"""Wanda (arXiv 2306.11695): score `|W_ij| * ||x_i||_2`, one shot, kept weights untouched."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sparselora_jax.pruning import calibrate
from sparselora_jax.sparse.masks import Pattern, mask_from_scores


@dataclass(frozen=True)
class Wanda:
    """Its statistic is the sum of squares of each input over all calibration tokens, `[in]`, in fp32."""

    group: str = 'output'
    statistic: ClassVar = staticmethod(calibrate.squares)

    def __call__(
        self,
        kernel: Float[Array, 'inputs outputs'],
        statistic: Float[Array, ' inputs'],
        pattern: Pattern,
        num_zeros: Any = None,
    ) -> tuple[Float[Array, 'inputs outputs'], Bool[Array, 'inputs outputs']]:
        """The kernel with its zeros, and the mask; `num_zeros`: see `mask_from_scores`.

        >>> kernel = jnp.array([[3.0], [2.0], [1.0], [1.0]])
        >>> _, mask = Wanda()(kernel, jnp.array([0.0, 1.0, 1.0, 9.0]), Pattern(0.5, 2, 4))
        >>> mask[:, 0].tolist()
        [False, True, False, True]
        """
        scores = jnp.abs(kernel.astype(statistic.dtype)) * jnp.sqrt(statistic)[:, None]
        mask = mask_from_scores(scores, pattern, group=self.group, num_zeros=num_zeros)
        return jnp.where(mask, kernel, jnp.zeros((), kernel.dtype)), mask
