"""RIA, relative importance and activation: score a weight relative to the weights of its input and of its output.

Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models", ICLR 2024.
"""

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
class RIA(Method):
    """Score `(|W_ij| / sum of |W| of output j + |W_ij| / sum of |W| of input i) * ||x_i||_2 ** 0.5`.

    Magnitude and Wanda can prune all weights of an input or of an output. Relative importance makes that less likely:
    the largest weights of an input score high even if the input's weights are small. 0.5 is the exponent that the paper
    uses throughout. The paper's permutation of inputs for N:M is not
    implemented.

    The statistic is the sum of squares of each input over all calibration tokens, `[inputs]`, in fp32.

    Attributes:
      group: comparison group of unstructured patterns: `'output'` or `'matrix'`.
    """

    group: str = 'output'
    statistic: ClassVar[calibrate.Statistic] = staticmethod(calibrate.squares)
    edits_kept_weights: ClassVar[bool] = False
    # An input's weights are summed over the outputs of this kernel: joining q, k and v would change the sums.
    outputs_are_independent: ClassVar[bool] = False

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

        >>> kernel = jnp.array([[4.0, 4.0], [1.0, 0.0], [2.0, 2.0], [2.0, 2.0]])
        >>> _, mask = RIA()(kernel, jnp.ones(4), Pattern(0.5, 2, 4))
        >>> mask[:, 0].tolist()  # all that its second input has, though it is the smallest weight of its output
        [True, True, False, False]
        """
        check_statistic(self, statistic, kernel.shape[0])
        magnitude = jnp.abs(kernel.astype(statistic.dtype))
        of_output = jnp.sum(magnitude, axis=0, keepdims=True)
        of_input = jnp.sum(magnitude, axis=1, keepdims=True)
        # Weights of a sum of 0 are 0 themselves: dividing them by 1 leaves their share 0, not NaN.
        of_output = jnp.where(of_output == 0, 1.0, of_output)
        of_input = jnp.where(of_input == 0, 1.0, of_input)
        norm = jnp.sqrt(statistic)
        scores = (magnitude / of_output + magnitude / of_input) * jnp.sqrt(norm)[:, None]
        mask = mask_from_scores(scores, pattern, group=self.group, num_zeros=num_zeros)
        return jnp.where(mask, kernel, jnp.zeros((), kernel.dtype)), mask
