"""OWL (arXiv 2310.05175): a block with more outliers among its Wanda scores keeps more weights.

The outlier share D of a block is the share of its scores `|W_ij| * ||x_i||_2` that exceed M times their mean (the
paper's layerwise outlier distribution). The density of a block follows the public code. Shares are scaled to a range of
2 lambda, and shifted so that the mean density stays: `kept = (1 - s) + d - mean d` with `d = 2 lambda (D - min D) /
(max D - min D)`. In the public code all blocks have the same size and sparsity s. Here the mean weights each block by
its number of weights, and s is the sparsity of each kernel.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Int

from sparselora_jax.pruning import calibrate
from sparselora_jax.pruning.allocate import check_left, round_zeros, total
from sparselora_jax.pruning.allocation import Allocation, AllocationError, AllocationInputs, Zeros
from sparselora_jax.pruning.targets import check_visited, in_blocks
from sparselora_jax.pruning.walk import block_observer, joined, naming, walk
from sparselora_jax.sparse import sharding
from sparselora_jax.sparse.patterns import PatternError
from sparselora_jax.sparse.rules import block_path, stack_of, unflatten


@jax.jit
def _outliers(kernels: list[Array], squares: list[Array], threshold: ArrayLike) -> Int[Array, ' kernels']:
    """Count the scores of each kernel above `threshold` times the mean score of all kernels."""
    # Wanda's scores, in float32 whatever the weights' dtype.
    scores = [
        jnp.abs(w.astype(jnp.float32)) * jnp.sqrt(sums)[:, None] for w, sums in zip(kernels, squares, strict=True)
    ]
    # One mean over all kernels of the block: an outlier stands out in its block, not in its kernel.
    mean = sum(jnp.sum(s) for s in scores) / sum(s.size for s in scores)
    return jnp.stack([jnp.sum(s > threshold * mean, dtype=jnp.int32) for s in scores])


def outlier_shares(
    forward: Callable[..., Any],
    params: dict,
    batches: Iterable[dict],
    paths: Iterable[str],
    *,
    threshold: float = 5.0,
    chunk: int = 8,
    progress: Callable[[str, int, int], None] = lambda tower, layer, layers: None,
) -> dict[str, np.ndarray]:
    """Return the share of outliers in each block of the dense model.

    As in `prune`, memory holds the hidden states of the samples, and one block with its statistics. So leaves may be
    weights on disk.

    Args:
      forward: see `prune`.
      params: see `prune`.
      batches: see `prune`.
      paths: paths of the kernels to prune; other kernels are ignored.
      threshold: the paper's M; an outlier exceeds M times the mean score of its block.
      chunk: see `prune`.
      progress: see `prune`.

    Returns:
      {stack of blocks (see `rules.stack_of`): share of each layer}.

    Raises:
      CalibrationError: no batch, or non-finite activations.
      RuleError: a kernel lies outside all blocks.
    """
    samples = joined(batches, chunk)
    mesh = sharding.mesh_of_rows(samples)
    paths = set(paths)
    shares: dict[str, list[float]] = {}

    def enter(tower, block):
        names = sorted(in_blocks(paths, tower))
        # Scores of all kernels of a block are compared, so their statistics have one scale.
        observe = block_observer(block, dict.fromkeys(names, calibrate.squares).get, mesh, one_scale=True)

        def visit(layer, layers, w, chunks):
            progress(tower, layer, layers)
            if not names:
                return w, None

            def place(name, _layer):
                return f'{block_path(tower, name)}, layer {layer}'

            with naming(tower, layer):
                stats = observe(unflatten(w), chunks, place)
            # The number of weights in a block may not fit into 32 bits, so counts are added up on the host.
            counts = _outliers([w[name] for name in names], [stats[name][0] for name in names], threshold)
            size = sum(w[name].size for name in names)
            shares.setdefault(tower, []).append(int(np.asarray(counts).sum(dtype=np.int64)) / size)
            # Weights stay unchanged: shares are those of the dense model.
            return w, None

        return visit

    walk(forward, params, samples, enter, chunk=chunk)
    check_visited(paths, {path for path in paths if stack_of(path) in shares})
    return {tower: np.array(of_layers) for tower, of_layers in shares.items()}


def owl_zeros(
    shares: dict[str, np.ndarray],
    uniform: Zeros,
    sizes: dict[str, int],
    *,
    spread: float = 0.08,
) -> Zeros:
    """Return the zeros of each layer's kernel: uniform sparsity, shifted by each block's outlier share.

    Args:
      shares: see `outlier_shares`.
      uniform: zeros under uniform pruning (see `uniform_zeros`); the result has the same sum.
      sizes: number of weights of one layer's kernel, by path.
      spread: the paper's lambda; sparsities differ by at most 2 lambda between kernels of the same pattern.

    Raises:
      PatternError: a sparsity lies outside [0, 1], or a layer's kernel would keep no weight.

    >>> uniform = {'language/blocks/q/kernel': np.array([50, 50])}
    >>> shares = {'language': np.array([0.01, 0.03])}
    >>> owl_zeros(shares, uniform, {'language/blocks/q/kernel': 100})['language/blocks/q/kernel'].tolist()
    [58, 42]
    """
    every = np.concatenate(list(shares.values()))
    lowest = every.min()
    width = every.max() - lowest
    # The paper's d, the shift of each block's density; 0 if all blocks have the same share.
    moved = {tower: 2 * spread * (share - lowest) / width if width else 0 * share for tower, share in shares.items()}
    # Blocks differ in size, so the mean is weighted by their numbers of weights.
    weights = sum(sizes[path] * zeros.size for path, zeros in uniform.items())
    mean = sum(sizes[path] * moved[stack_of(path)].sum() for path in uniform) / weights
    wanted = {path: zeros - sizes[path] * (moved[stack_of(path)] - mean) for path, zeros in uniform.items()}
    for path, of_layers in wanted.items():
        # A large spread can push a sparsity out of [0, 1]; clipping it would change the sum.
        odd = np.flatnonzero((of_layers < 0) | (of_layers > sizes[path]))
        if odd.size:
            ratio = of_layers[odd[0]] / sizes[path]
            raise PatternError(
                f"{path}, layer {odd[0]}: OWL's sparsity would be {ratio:.3f}; use a smaller spread than {spread}"
            )
    # Ratios lie in [0, 1] by now, so the only bound is the kernel itself.
    most = {path: np.full(zeros.shape, sizes[path]) for path, zeros in uniform.items()}
    zeros = round_zeros(wanted, total(uniform), most)
    check_left(zeros, sizes)
    return zeros


@dataclass(frozen=True)
class OWL(Allocation):
    """Shift the sparsity of uniform pruning by each block's share of outliers.

    Attributes:
      outlier: the paper's M; an outlier exceeds M times the mean score of its block.
      spread: the paper's lambda; sparsities differ by at most 2 lambda between kernels of the same pattern.
      chunk: number of samples processed at a time on each device.
    """

    outlier: float = 5.0
    spread: float = 0.08
    chunk: int = 8
    needs_model_in_memory: ClassVar[bool] = False
    uses_calibration: ClassVar[bool] = True

    def __post_init__(self):
        for option in ('outlier', 'spread'):
            if not getattr(self, option) > 0:
                raise AllocationError(f'{option} {getattr(self, option)}: expected more than 0')

    def check(self, uniform: Zeros, sizes: dict[str, int]) -> None:
        """Check that every sparsity stays in (0, 1), whatever the outliers.

        Args:
          uniform: see `AllocationInputs`.
          sizes: see `AllocationInputs`.

        Raises:
          PatternError: a sparsity may leave (0, 1).
        """
        for path, zeros in uniform.items():
            # An early check with one lambda; `owl_zeros` checks the resulting ratios.
            ratio = zeros.max() / sizes[path]
            if not self.spread < ratio < 1 - self.spread:
                raise PatternError(
                    f'{path}: sparsity {ratio:.3f} with spread {self.spread}: OWL may shift it by the spread, and it '
                    'must stay between 0 and 1; use a smaller spread'
                )

    def __call__(self, inputs: AllocationInputs) -> Zeros:
        """Return the zeros that follow from the dense model's outliers on the calibration batches.

        Args:
          inputs: see `Allocation`.

        Raises:
          PatternError: see `owl_zeros`.
        """
        shares = outlier_shares(
            inputs.forward,
            inputs.params,
            inputs.calibration(),
            tuple(inputs.uniform),
            threshold=self.outlier,
            chunk=self.chunk,
        )
        return owl_zeros(shares, inputs.uniform, inputs.sizes, spread=self.spread)
