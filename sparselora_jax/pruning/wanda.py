"""Wanda (arXiv 2306.11695): score `|W_ij| * ||x_i||_2`, one shot, kept weights untouched."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from sparselora_jax.pruning import calibrate
from sparselora_jax.pruning.method import Method, check_statistic
from sparselora_jax.sparse.masks import mask_from_scores
from sparselora_jax.sparse.patterns import Pattern


@dataclass(frozen=True)
class Wanda(Method):
    """Score each weight by its magnitude times the norm of its input (section 3 of the paper).

    The statistic is the sum of squares of each input over all calibration tokens, `[inputs]`, in fp32.

    Attributes:
      group: comparison group of unstructured patterns: `'output'` as in the paper, or `'matrix'`.
    """

    group: str = 'output'
    statistic: ClassVar[calibrate.Statistic] = staticmethod(calibrate.squares)
    edits_kept_weights: ClassVar[bool] = False
    outputs_are_independent: ClassVar[bool] = True

    def __call__(
        self,
        kernel: Float[Array, 'inputs outputs'],
        statistic: Float[Array, ' inputs'],
        pattern: Pattern,
        num_zeros: ArrayLike | None = None,
    ) -> tuple[Float[Array, 'inputs outputs'], Bool[Array, 'inputs outputs']]:
        """Return the kernel with its zeros, and the mask.

        Args:
          kernel: dense weights.
          statistic: sum of squares of each input.
          pattern: see `Method`.
          num_zeros: see `mask_from_scores`.

        >>> kernel = jnp.array([[3.0], [2.0], [1.0], [1.0]])
        >>> _, mask = Wanda()(kernel, jnp.array([0.0, 1.0, 1.0, 9.0]), Pattern(0.5, 2, 4))
        >>> mask[:, 0].tolist()
        [False, True, False, True]
        """
        check_statistic(self, statistic, kernel.shape[0])
        # Scores are compared in the statistic's dtype, float32, whatever that of the weights.
        scores = jnp.abs(kernel.astype(statistic.dtype)) * jnp.sqrt(statistic)[:, None]
        # Ties, such as those of dead inputs, are broken by position.
        mask = mask_from_scores(scores, pattern, group=self.group, num_zeros=num_zeros)
        return jnp.where(mask, kernel, jnp.zeros((), kernel.dtype)), mask
