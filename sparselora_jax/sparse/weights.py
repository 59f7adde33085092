"""What a model's kernel can be, and the trees that make it: params, masks, lora -> bind / merge.

`effective_weight` is the method's one formula, `(W + s*A*B) * M` (arXiv 2404.02424); forward and merge both call it, so
a merged weight equals the one trained with, bit for bit.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree
from qwix import QArray

from sparselora_jax.sparse import rules as rules_lib
from sparselora_jax.sparse.dense import dense_kernel, dense_mask
from sparselora_jax.sparse.packing import Bitmask, Packed24, PackedMask

GRADIENTS = ('exact', 'straight_through', 'plain')


class LoraSpec(NamedTuple):
    """Rank of a low-rank update and its numerator `alpha`; the scale is `alpha / rank`."""

    rank: int
    alpha: float


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Lora:
    """A low-rank update `scale * a @ b`. The scale lives here so that bind and merge cannot disagree."""

    a: Any  # [*layers, in, rank]; JAX unflattens placeholders into the fields, so they carry no shape check
    b: Any  # [*layers, rank, out]
    scale: float = field(metadata={'static': True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Masked:
    """A pruned kernel: reads as `where(mask, kernel, 0)`."""

    kernel: Any  # [*layers, in, out], an array or in four bits
    mask: Any  # bool, the same shape, or a PackedMask


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Adapted:
    """A kernel with a low-rank update, under the mask if there is one.

    gradient: `'exact'`, or `'straight_through'` (backward as if the mask were all ones for A and B), or `'plain'`:
    ordinary LoRA, `where(mask, W, 0) + s*A*B`, whose merge is dense; kept for comparison.

    parts: into how many the batch is split over devices. The exact gradient of each part goes through the mask and into
    A's and B's gradients before parts are added up, so devices send factors and no kernels.
    """

    kernel: Any  # [*layers, in, out], an array or in four bits; a packed one brings its mask
    mask: Any  # bool, the same shape, or a PackedMask, or None
    lora: Any  # Lora
    gradient: str = field(default='exact', metadata={'static': True})
    parts: int = field(default=1, metadata={'static': True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the kernel."""
        return self.kernel.shape


def effective_weight(
    kernel: Float[Array, '*layers inputs outputs'] | Packed24 | Bitmask | QArray,
    mask: Bool[Array, '*layers inputs outputs'] | PackedMask | None = None,
    lora: Lora | None = None,
    *,
    dtype: jax.typing.DTypeLike | None = None,
) -> Float[Array, '*layers inputs outputs']:
    """`where(mask, kernel + scale * a @ b, 0)`, summed in fp32 and cast last (a bf16 sum loses small updates).

    A packed kernel has zeros of its own, and LoRA does not fill them.

    >>> lora = Lora(a=jnp.ones((2, 1)), b=jnp.ones((1, 2)), scale=0.5)
    >>> effective_weight(jnp.ones((2, 2)), jnp.array([[True, False], [False, True]]), lora).tolist()
    [[1.5, 0.0], [0.0, 1.5]]
    """
    dtype = dtype or kernel.dtype
    if lora is None and mask is None:
        return dense_kernel(kernel, dtype)
    mask, kernel = dense_mask(mask, kernel), dense_kernel(kernel, dtype if lora is None else jnp.float32)
    if lora is not None:
        a, b = lora.a.astype(jnp.float32), lora.b.astype(jnp.float32)
        kernel = kernel + lora.scale * jnp.matmul(a, b, precision='highest')
    if mask is not None:
        kernel = jnp.where(mask, kernel, jnp.zeros((), kernel.dtype))
    return kernel.astype(dtype)


def init_lora(
    key: Array, params: PyTree, rules: Sequence[tuple[str, Any]], *, dtype: jax.typing.DTypeLike = jnp.float32
) -> dict:
    """LoRA factors for the kernels that `rules` select: A uniform as in LoRA's reference, B zero.

    Args:
      rules: `(regex, LoraSpec or (rank, alpha) or None)`, in order; every kernel must match.

    Raises:
      RuleError: a kernel that no rule matches, a rule that matches none, a tree without kernels, or a kernel whose
        axes are not known (see `rules.check_layout`).
      ValueError: a rank below one.

    >>> lora = init_lora(jax.random.key(0), {'q': {'kernel': jnp.ones((8, 4))}}, [('.*', LoraSpec(2, 4))])
    >>> lora['q']['kernel'].a.shape, lora['q']['kernel'].b.shape, lora['q']['kernel'].scale
    ((8, 2), (2, 4), 2.0)
    """
    found = rules_lib.kernels(params)
    specs = rules_lib.match(rules, found)
    rules_lib.check_layout(params, [path for path, spec in specs.items() if spec is not None])
    lora = {}
    for index, (path, spec) in enumerate(specs.items()):
        if spec is None:
            continue
        rank, alpha = spec
        if rank < 1:
            raise ValueError(f'{path}: LoRA rank {rank} is below one; use None to leave a kernel alone')
        *layers, inputs, outputs = found[path].shape
        bound = inputs**-0.5
        a = jax.random.uniform(jax.random.fold_in(key, index), (*layers, inputs, rank), dtype, -bound, bound)
        lora[path] = Lora(a=a, b=jnp.zeros((*layers, rank, outputs), dtype), scale=alpha / rank)
    return rules_lib.unflatten(lora)


def bind(
    params: dict, masks: dict | None = None, lora: dict | None = None, *, gradient: str = 'exact', parts: int = 1
) -> dict[str, Any]:
    """The weights a model reads: params with each masked or adapted kernel replaced by its kind.

    Nothing is computed here: `linear` combines a layer's weight where it is used, so one layer's combination lives at a
    time.

    Args:
      gradient, parts: see `Adapted`.

    Raises:
      ValueError: a mask or a factor whose path or shape is not that of a kernel, or an unknown `gradient`.
    """
    if gradient not in GRADIENTS:
        raise ValueError(f'gradient {gradient!r}: expected one of {", ".join(GRADIENTS)}')
    flat = rules_lib.flatten(params)
    masks, lora = rules_lib.flatten(masks or {}), rules_lib.flatten(lora or {})
    _check_fit(flat, masks, lora)
    for path in masks.keys() - lora.keys():
        flat[path] = Masked(flat[path], masks[path])
    for path, factors in lora.items():
        flat[path] = Adapted(flat[path], masks.get(path), factors, gradient, parts)
    return rules_lib.unflatten(flat)


def with_kernels(params: dict, kernels: dict) -> dict:
    """Params with some of their leaves replaced by those of `kernels`, by path."""
    return rules_lib.unflatten(rules_lib.flatten(params) | rules_lib.flatten(kernels))


def merge(
    params: dict, masks: dict | None, lora: dict | None = None, *, dtype: jax.typing.DTypeLike | None = None
) -> dict:
    """Folds `lora` into `params` under the masks: plain arrays, exact zeros where the mask is False.

    Differentiable in `lora`, so it also trains a model that is not ours: `loss(apply(merge(params, masks, lora)))`.

    Args:
      dtype: of the merged kernels; each kernel's own by default.

    Raises:
      ValueError: a mask or a factor whose path or shape is not that of a kernel.
    """
    flat = rules_lib.flatten(params)
    masks, lora = rules_lib.flatten(masks or {}), rules_lib.flatten(lora or {})
    _check_fit(flat, masks, lora)
    for path in masks.keys() | lora.keys():
        flat[path] = _merged(flat[path], masks.get(path), lora.get(path), dtype)
    return rules_lib.unflatten(flat)


@functools.partial(jax.jit, static_argnames='dtype')  # kernels of one shape are one program, which towers have many of
def _merged(kernel: Any, mask: Any, lora: Any, dtype: Any) -> Array:
    """`effective_weight`, a layer at a time: its fp32 sum of a whole stack would be several times the model's share."""
    if kernel.ndim == 2:
        return effective_weight(kernel, mask, lora, dtype=dtype)
    return jax.lax.map(lambda layer: effective_weight(*layer, dtype=dtype), (kernel, mask, lora))


def _check_fit(params: dict[str, Any], masks: dict[str, Any], lora: dict[str, Any]) -> None:
    for path, mask in masks.items():
        if path not in params or params[path].shape != mask.shape:
            have = getattr(params.get(path), 'shape', 'no such kernel')
            raise ValueError(f'{path}: mask of shape {mask.shape} for a kernel of shape {have}')
    for path, factors in lora.items():
        have = getattr(params.get(path), 'shape', None)
        if have is None or (*factors.a.shape[:-1], factors.b.shape[-1]) != have:
            raise ValueError(f'{path}: LoRA factors {factors.a.shape} x {factors.b.shape} for a kernel of shape {have}')
