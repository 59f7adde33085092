"""Diversity-aware sparsity (DAS, of TAMP, arXiv 2504.09897): a block whose tokens differ more keeps more weights.

The importance of a kernel is the mean of three diversities of its outputs y on the dense model (section 3.1):

    s = (s_v + s_l + s_vl) / 3

Each is the mean over pairs of tokens of one sample of `1 - cos(y_i, y_j)`: of two tokens of the image, of two tokens of
the text, and of one of each. A tower that reads only one modality has only that diversity. Kept weights are shared out
as in ECoFLaP (`allocate`), among the blocks of a tower. So each tower keeps its own number of zeros.

Differences from the public code (G-JWLee/TAMP):

- It leaves out all pairs of one modality whose cosine is 0 or below. Here every pair counts, as the paper says.
- It shares weights out among single kernels, in equal parts for equal importance, so that small kernels stay dense.
  Here a block's part is in proportion to its size times its importance, the mean over its weights.
- The cosines of all pairs are not computed. With unit vectors u, the sum of `u_i u_j` over all pairs of different
  tokens is `|sum u|^2 - sum |u|^2`.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from sparselora_jax.models.runners import Block, valid_rows
from sparselora_jax.pruning import calibrate
from sparselora_jax.pruning.allocate import allocate, check_left, total
from sparselora_jax.pruning.allocation import Allocation, AllocationError, AllocationInputs, Zeros
from sparselora_jax.pruning.targets import check_visited, in_blocks
from sparselora_jax.pruning.tracing import program as tracing
from sparselora_jax.pruning.tracing.products import Product
from sparselora_jax.pruning.walk import in_chunks, joined, naming, walk
from sparselora_jax.runtime import processes
from sparselora_jax.sparse import sharding
from sparselora_jax.sparse.rules import flatten, stack_of, unflatten

# Stacks whose rows are the tokens of the prompt, among which those of the image stand.
READS_PROMPT = ('language', 'language/encoder')


def diversities(
    y: Float[Array, 'samples tokens outputs'], is_image: Bool[Array, 'samples tokens'], valid: Bool[Array, '...']
) -> Float[Array, 'samples 3']:
    """Return the diversities of image tokens, of text tokens, and between both, of each sample.

    A diversity of a sample without such pairs is NaN.

    Args:
      y: outputs of a kernel.
      is_image: whether a token belongs to the image.
      valid: False for pads, which belong to no modality; `[samples, tokens]`.

    >>> y = jnp.array([[[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]]])
    >>> diversities(y, jnp.array([[True, True, False]]), jnp.ones((1, 3), bool)).tolist()
    [[1.0, nan, 0.5]]
    """
    y = y.astype(jnp.float32)
    norms = jnp.linalg.norm(y, axis=-1, keepdims=True)
    # An output of zeros has no direction; its cosines count as 0.
    # The inner where keeps the division finite, which the outer one alone would not.
    units = jnp.where(norms > 0, y / jnp.where(norms > 0, norms, 1.0), 0.0)
    sums = []
    within = []
    counts = []
    # Pads belong to neither modality.
    for belongs in (is_image & valid, ~is_image & valid):
        of_modality = jnp.where(belongs[..., None], units, 0.0)
        sums.append(of_modality.sum(axis=1))
        counts.append(belongs.sum(axis=1).astype(jnp.float32))
        pairs = counts[-1] * (counts[-1] - 1)
        cosines = jnp.square(sums[-1]).sum(axis=-1) - jnp.square(of_modality).sum(axis=(1, 2))
        within.append(_mean_distance(cosines, pairs))
    between = _mean_distance((sums[0] * sums[1]).sum(axis=-1), counts[0] * counts[1])
    return jnp.stack([*within, between], axis=-1)


def _mean_distance(cosines: Float[Array, ' samples'], pairs: Float[Array, ' samples']) -> Float[Array, ' samples']:
    """Return 1 minus the mean cosine; NaN where there are no pairs."""
    # Tokens that are all alike can come out below 0 by rounding.
    distance = jnp.maximum(1 - cosines / jnp.maximum(pairs, 1), 0)
    return jnp.where(pairs > 0, distance, jnp.nan)


def diversity_scores(
    forward: Callable[..., Any],
    params: dict,
    batches: Iterable[dict],
    paths: Iterable[str],
    *,
    is_image: Callable[[dict], Bool[Array, 'batch tokens'] | None] = lambda batch: None,
    chunk: int = 8,
    progress: Callable[[str, int, int], None] = lambda tower, layer, layers: None,
) -> dict[str, np.ndarray]:
    """Return the mean diversity of each kernel's outputs in the dense model.

    As in `prune`, memory holds the hidden states of the samples and one block, so leaves may be weights on disk.

    Args:
      forward: see `prune`.
      params: see `prune`.
      batches: see `prune`.
      paths: paths of the kernels to prune; other kernels are ignored.
      is_image: which tokens of a batch's `input_ids` belong to the image; None: none of them.
      chunk: see `prune`.
      progress: see `prune`.

    Returns:
      {path: diversity of each layer}, from 0 (all outputs have one direction) to 2.

    Raises:
      CalibrationError: no batch; activations that are not finite; or a kernel of whose outputs there are no pairs.
      RuleError: a kernel lies outside all blocks.
    """
    samples = joined(batches, chunk)
    mesh = sharding.mesh_of_rows(samples)
    paths = set(paths)
    # In the order of the samples, which `joined` may have dealt to devices.
    image = is_image(samples)
    scores: dict[str, list[float]] = {}

    def enter(tower, block):
        names = in_blocks(paths, tower)
        measure = jax.jit(sharding.on_own_rows(_measure(block, names), mesh))

        def visit(layer, layers, w, chunks):
            progress(tower, layer, layers)
            if not names:
                return w, None
            # A vision tower, a Q-Former and a decoder's answer have tokens of one modality.
            images = _images_of(chunks, image if tower in READS_PROMPT else None, chunk, mesh)
            found = [measure(unflatten(w), inputs) for inputs in zip(chunks, images, strict=True)]
            for name, path in names.items():
                with naming(tower, layer):
                    scores.setdefault(path, []).append(_score(name, [of_chunk[name] for of_chunk in found]))
            # Weights stay unchanged: diversities are those of the dense model.
            return w, None

        return visit

    walk(forward, params, samples, enter, chunk=chunk)
    check_visited(paths, scores)
    return {path: np.array(of_layers) for path, of_layers in scores.items()}


def _images_of(
    chunks: Sequence[tuple[Array, dict]], image: Bool[Array, 'batch tokens'] | None, chunk: int, mesh: Mesh | None
) -> list[Bool[Array, 'rows tokens']]:
    """Return for each chunk which of its rows belong to the image; of a tower that reads no prompt, all are alike."""
    if image is None:
        return [jnp.zeros(x.shape[:2], bool) for x, _ in chunks]
    return [part for part, _ in in_chunks(image, {}, chunk, mesh)]


def _measure(block: Block, names: Iterable[str]) -> Callable[..., dict[str, Float[Array, 'samples 3']]]:
    """Return `(w, ((x, ctx), is_image)) -> {name: diversities}` of the outputs of a block's kernels."""

    def run_block(w, inputs):
        return block(w, *inputs, None)

    def measure(w, chunk):
        inputs, image = chunk
        program = tracing.trace(run_block, w, inputs, names.__contains__)
        calibrate.check_found(program)
        kernels = flatten(w)
        found = {}

        def visit(product: Product, _sums: Any) -> None:
            found[product.path] = _of_product(product, kernels[product.path], inputs, image)

        program.run(w, inputs, visit)
        return found

    return measure


def _of_product(
    product: Product, kernel: Float[Array, 'inputs outputs'], inputs: tuple[Array, dict], image: Bool[Array, '...']
) -> Float[Array, 'samples 3']:
    samples, *others = product.arrangement.tokens
    rows = product.arrangement.rows(product.x)[0].reshape(samples, math.prod(others), -1)
    # The block computes this product too; the compiler runs it once.
    outputs = jnp.matmul(rows, kernel.astype(rows.dtype))
    valid = valid_rows(product.path, inputs[1])
    # Keys and values of an encoder's output read other rows than the block's own, all of one modality.
    if image.shape != outputs.shape[:2]:
        image = jnp.zeros(outputs.shape[:2], bool)
    if valid is None:
        valid = jnp.ones(outputs.shape[:2], bool)
    return diversities(outputs, image, jnp.broadcast_to(valid, outputs.shape[:2]))


def _score(name: str, of_chunks: Sequence[Float[Array, 'samples 3']]) -> float:
    """Return the mean over the modalities of a kernel of the mean over all samples.

    Raises:
      CalibrationError: there is none, or it is not finite.
    """
    values = np.concatenate([processes.on_host(of_chunk) for of_chunk in of_chunks]).astype(np.float64)
    means = []
    for of_pairs in values.T:
        known = of_pairs[~np.isnan(of_pairs)]
        if known.size:
            # An exact sum does not depend on the order of the samples, which a mesh changes.
            means.append(math.fsum(known) / known.size)
    if not means:
        raise calibrate.CalibrationError(
            f'{name}: no sample has two tokens whose outputs are finite, so there is no diversity'
        )
    return sum(means) / len(means)


@dataclass(frozen=True)
class DAS(Allocation):
    """Share kept weights out among the blocks of each tower by the diversity of their outputs.

    Attributes:
      margin: a block's sparsity exceeds the largest of its tower under uniform pruning by at most this.
      chunk: number of samples processed at a time on each device.
    """

    margin: float = 0.1
    chunk: int = 8
    needs_model_in_memory: ClassVar[bool] = False
    uses_calibration: ClassVar[bool] = True

    def __post_init__(self):
        if not 0 < self.margin < 1:
            raise AllocationError(f'margin {self.margin}: expected more than 0 and less than 1')

    def __call__(self, inputs: AllocationInputs) -> Zeros:
        """Return the zeros that follow from the diversities of the dense model on the calibration batches.

        Args:
          inputs: see `Allocation`.

        Raises:
          PatternError: see `allocate`.
        """
        layers_of = {stack_of(path): of_layers.size for path, of_layers in inputs.uniform.items()}
        report = inputs.progress('diversity', sum(layers_of.values()))
        done = 0

        def progress(tower, layer, layers):
            nonlocal done
            # Towers that stay dense are run too, but nothing is measured there.
            if tower in layers_of:
                done += 1
                report(done, f'{tower} layer {layer + 1} of {layers}')

        scores = diversity_scores(
            inputs.forward,
            inputs.params,
            inputs.calibration(),
            tuple(inputs.uniform),
            is_image=inputs.is_image,
            chunk=self.chunk,
            progress=progress,
        )
        return das_zeros(scores, inputs.uniform, inputs.sizes, margin=self.margin)


def das_zeros(scores: dict[str, np.ndarray], uniform: Zeros, sizes: dict[str, int], *, margin: float = 0.1) -> Zeros:
    """Return the zeros of each layer's kernel; every tower has as many as under uniform pruning.

    Args:
      scores: see `diversity_scores`.
      uniform: zeros under uniform pruning (see `uniform_zeros`).
      sizes: number of weights of one layer's kernel, by path.
      margin: see `DAS`.

    Raises:
      PatternError: see `allocate`.

    >>> uniform = {'language/blocks/q/kernel': np.array([50, 50])}
    >>> scores = {'language/blocks/q/kernel': np.array([0.2, 0.6])}
    >>> das_zeros(scores, uniform, {'language/blocks/q/kernel': 100})['language/blocks/q/kernel'].tolist()
    [55, 45]
    """
    zeros = {}
    for tower in dict.fromkeys(map(stack_of, uniform)):
        own = {path: of_layers for path, of_layers in uniform.items() if stack_of(path) == tower}
        ratio = max(of_layers.max() / sizes[path] for path, of_layers in own.items())
        # `allocate` shares weights out by score alone, so a large kernel needs a larger one.
        weighted = {path: scores[path] * sizes[path] for path in own}
        zeros |= allocate(weighted, {path: sizes[path] for path in own}, total(own), highest=min(1.0, ratio + margin))
    check_left(zeros, sizes)
    return {path: zeros[path] for path in uniform}
