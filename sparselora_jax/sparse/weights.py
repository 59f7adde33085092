"""The kinds of kernels that a model reads, and `bind` and `merge`, which build them from params, masks and lora.

`effective_weight` is the method's one formula, `(W + s*A*B) * M` (arXiv 2404.02424). Both the forward
and the merge call it, so a merged weight equals the trained one bit for bit.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, PyTree
from qwix import QArray

from sparselora_jax.runtime.errors import SparseloraError
from sparselora_jax.sparse.axes import AxesByPath, KernelAxes, kernels_of, matrix_shape, roles_by_path, unusual_roles
from sparselora_jax.sparse.dense import check_floating, dense_kernel, dense_mask
from sparselora_jax.sparse.dropout import Dropout
from sparselora_jax.sparse.packing import PackedKernel, PackedMask, ReducedMatrix, is_reduced
from sparselora_jax.sparse.rules import (
    RuleError,
    check_layout,
    flatten,
    match,
    paths_of,
    unflatten,
    with_leaves,
)

GRADIENTS = ('exact', 'straight_through', 'plain')

Kernel = Float[Array, '*layers inputs outputs'] | PackedKernel | QArray | ReducedMatrix
Mask = Bool[Array, '*layers inputs outputs'] | PackedMask


class LoraSpec(NamedTuple):
    """Rank of a low-rank update and its numerator `alpha`; the scale is `alpha / rank`."""

    rank: int
    alpha: float


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Lora:
    """A low-rank update `scale * a @ b`. The scale is stored here, so that `bind` and `merge` use the same one.

    Attributes:
      a: `[*layers, inputs, rank]`.
      b: `[*layers, rank, outputs]`.
      scale: factor of the product.
      axes: the roles of the kernel's axes, if they are not `[*layers, inputs, outputs]`. Several axes of inputs are one
        axis of `a`, and several axes of outputs are one axis of `b`.
    """

    a: Any  # JAX unflattens placeholders into the fields, so they carry no shape check
    b: Any
    scale: float = field(metadata={'static': True})
    axes: KernelAxes | None = field(default=None, metadata={'static': True})


class KernelError(SparseloraError, TypeError):
    """A kernel that is no array, used as one."""


class ReadByLinear:
    """The base class of kernels that only `linear` can read; any other product raises an error that says so."""

    def _refuse(self, *operands: object) -> NoReturn:
        raise KernelError(
            f'a kernel is a {type(self).__name__}, which is no array: write sl.linear(x, kernel, bias) in place of '
            'x @ kernel + bias, so that the kernel can be masked or adapted'
        )

    # JAX calls the last one where an array is expected, such as in `jnp.dot`.
    __matmul__ = _refuse
    __rmatmul__ = _refuse
    __jax_array__ = _refuse


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Masked(ReadByLinear):
    """A pruned kernel: reads as `where(mask, kernel, 0)`."""

    kernel: Any  # [*layers, in, out], an array or four-bit
    mask: Any  # bool, the same shape, or a PackedMask


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Adapted(ReadByLinear):
    """A kernel with a low-rank update, under the mask if there is one.

    Attributes:
      kernel: `[*layers, in, out]`, an array or four-bit; or a packed kernel, which stores its own mask.
      mask: bool of the same shape, or a `PackedMask`, or None.
      lora: the low-rank update.
      gradient: `'exact'`; or `'straight_through'`: the gradients of A and B ignore the mask; or `'plain'`: ordinary
        LoRA, `where(mask, W, 0) + s*A*B`, whose merge is dense (for comparison only).
      parts: number of parts into which the batch is split over devices. Each part's exact gradient is masked and
        contracted to gradients of A and B before the parts are summed. So devices exchange factors, not kernels.
      dropout: which entries of the input the low-rank update does not see; the base sees all. None: it sees all too.
    """

    kernel: Any
    mask: Any
    lora: Any
    gradient: str = field(default='exact', metadata={'static': True})
    parts: int = field(default=1, metadata={'static': True})
    dropout: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the kernel."""
        return self.kernel.shape


def effective_weight(
    kernel: Kernel,
    mask: Mask | None = None,
    lora: Lora | None = None,
    *,
    dtype: DTypeLike | None = None,
) -> Float[Array, '*layers inputs outputs']:
    """Return `where(mask, kernel + scale * a @ b, 0)`, the method's formula (arXiv 2404.02424).

    It is summed in fp32 and cast last, because a sum in bf16 loses small updates. LoRA does not fill the zeros of a
    packed kernel.

    Args:
      kernel: a kernel of any kind, or a stack of them.
      mask: True where a weight is kept; None: all, or those that a packed kernel keeps.
      lora: the low-rank update; None: no update.
      dtype: dtype of the result; default: the kernel's dtype.

    Raises:
      RuleError: the mask or the factors do not fit the kernel.

    >>> lora = Lora(a=jnp.ones((2, 1)), b=jnp.ones((1, 2)), scale=0.5)
    >>> effective_weight(jnp.ones((2, 2)), jnp.array([[True, False], [False, True]]), lora).tolist()
    [[1.5, 0.0], [0.0, 1.5]]
    """
    _check_fit({'kernel': kernel}, {} if mask is None else {'kernel': mask}, {} if lora is None else {'kernel': lora})
    if _axes_of(kernel, lora) is not None:
        return _through_matrices(effective_weight, kernel, mask, lora, dtype)
    dtype = dtype or kernel.dtype
    if lora is None and mask is None:
        # This also covers packed kernels, which unpack with their zeros in place.
        return dense_kernel(kernel, dtype)
    # With LoRA a packed kernel needs its mask too: the sum must not fill its zeros.
    mask = dense_mask(mask, kernel)
    weight = dense_kernel(kernel, dtype if lora is None else jnp.float32)
    if lora is not None:
        weight = weight + _update(lora)
    if mask is not None:
        weight = jnp.where(mask, weight, jnp.zeros((), weight.dtype))
    return weight.astype(dtype)


def masked_update(kernel: Kernel, mask: Mask | None, lora: Lora, *, dtype: DTypeLike) -> Float[Array, 'inputs outputs']:
    """Return `where(mask, scale * a @ b, 0)`: what LoRA adds to the pruned kernel in `effective_weight`.

    Args:
      kernel: a kernel of any kind; only its mask is read, if it stores one.
      mask: True where a weight is kept; None: all, or those that a packed kernel keeps.
      lora: the low-rank update.
      dtype: dtype of the result; the product is computed in fp32.
    """
    update = _update(lora)
    mask = dense_mask(mask, kernel)
    if mask is not None:
        update = jnp.where(mask, update, 0.0)
    return update.astype(dtype)


def _update(lora: Lora) -> Float[Array, '*layers inputs outputs']:
    """Return `scale * a @ b` in fp32."""
    a = lora.a.astype(jnp.float32)
    b = lora.b.astype(jnp.float32)
    return lora.scale * jnp.matmul(a, b, precision='highest')


def _axes_of(kernel: object, lora: Lora | None) -> KernelAxes | None:
    """Return the roles of a kernel's axes; None: it is `[*layers, inputs, outputs]`, or no factors depend on them."""
    if isinstance(kernel, ReducedMatrix):
        return kernel.axes
    return None if lora is None else lora.axes


def _through_matrices(
    combine: Callable[..., Array], kernel: Kernel, mask: Mask | None, lora: Lora | None, dtype: DTypeLike | None
) -> Float[Array, '...']:
    """Return `combine(kernel, mask, lora, dtype=dtype)` of the matrix form, in the kernel's own layout."""
    axes = _axes_of(kernel, lora)
    # A packed kernel was packed in its matrix form. Anything else is brought into it first.
    matrix = kernel.matrix if isinstance(kernel, ReducedMatrix) else axes.to_matrix(dense_kernel(kernel))
    if mask is not None:
        mask = axes.to_matrix(dense_mask(mask, kernel))
    if lora is not None:
        # The factors are those of the matrix form already.
        lora = dataclasses.replace(lora, axes=None)
    return axes.from_matrix(combine(matrix, mask, lora, dtype=dtype), tuple(kernel.shape))


def init_lora(
    key: Array,
    params: PyTree,
    rules: Sequence[tuple[str, LoraSpec | tuple[int, int | float] | None]],
    *,
    axes: AxesByPath | None = None,
    dtype: DTypeLike = jnp.float32,
) -> dict:
    """Return LoRA factors for the kernels that rules select: A uniform as in LoRA's reference code, B zero.

    Args:
      key: a PRNG key; the n-th kernel by path draws from `fold_in(key, n)`.
      params: any tree, or its shapes. Without `axes`, kernels are the leaves called `kernel` of nested dicts.
      rules: `(regex, LoraSpec or (rank, alpha) or None)`, in order; every kernel must match.
      axes: which leaves are kernels, and the roles of their axes: what `collect` returned, the `axes` of a
        `PruneResult`, or `{path: KernelAxes}`. The factors keep them for `merge`.
      dtype: dtype of the factors.

    Raises:
      RuleError: no rule matches a kernel, a rule matches no kernel, the tree has no kernels, the axes of a kernel are
        unknown (see `rules.check_layout`) or do not fit it, or a rank is below one.

    >>> lora = init_lora(jax.random.key(0), {'q': {'kernel': jnp.ones((8, 4))}}, [('.*', LoraSpec(2, 4))])
    >>> lora['q']['kernel'].a.shape, lora['q']['kernel'].b.shape, lora['q']['kernel'].scale
    ((8, 2), (2, 4), 2.0)
    """
    roles = roles_by_path(axes)
    kernels_by_path = kernels_of(params, roles)
    unusual = unusual_roles(paths_of(params), roles) if roles else {}
    specs = match(rules, kernels_by_path)
    unknown = [path for path, spec in specs.items() if spec is not None and path not in roles]
    # Leaves called `kernel` that the forward never multiplied with: their axes must follow from their names.
    if unknown:
        check_layout(params, unknown)
    lora = {}
    # Kernels without factors are counted too. So a kernel draws the same numbers, whichever others are adapted. Only
    # nested dicts are sorted by path already.
    for index, (path, spec) in enumerate(sorted(specs.items())):
        if spec is None:
            continue
        rank, alpha = _checked_spec(path, spec)
        *layers, inputs, outputs = matrix_shape(kernels_by_path[path].shape, unusual.get(path))
        # LoRA's reference draws A by kaiming_uniform_(a=sqrt(5)), whose bound is 1 / sqrt(inputs).
        bound = inputs**-0.5
        a = jax.random.uniform(jax.random.fold_in(key, index), (*layers, inputs, rank), dtype, -bound, bound)
        b = jnp.zeros((*layers, rank, outputs), dtype)
        lora[path] = Lora(a=a, b=b, scale=alpha / rank, axes=unusual.get(path))
    return unflatten(lora)


def _checked_spec(path: str, spec: object) -> tuple[int, int | float]:
    """Return (rank, alpha) that a rule gives to a kernel.

    Raises:
      RuleError: it is something else, or out of range.
    """
    # Type by type, since True is an integer and a string of two letters is a pair.
    is_pair = isinstance(spec, tuple) and len(spec) == 2
    if not is_pair or isinstance(spec[0], bool) or not isinstance(spec[0], Integral) or not isinstance(spec[1], Real):
        raise RuleError(f'{path}: LoRA {spec!r}: expected sl.LoraSpec(rank=8, alpha=16), or None for no factors')
    rank, alpha = spec
    if not math.isfinite(alpha) or alpha <= 0:
        raise RuleError(f'{path}: LoRA alpha {alpha!r}: expected a positive number')
    if rank < 1:
        raise RuleError(f'{path}: LoRA rank {rank} is below one; use None to leave a kernel alone')
    return rank, alpha


def bind(
    params: PyTree,
    masks: dict | None = None,
    lora: dict | None = None,
    *,
    gradient: str = 'exact',
    parts: int = 1,
    dropout: Dropout | None = None,
) -> PyTree:
    """Return the weights that a model reads: params in which kernels with a mask or LoRA are `Masked` or `Adapted`.

    Nothing is computed here. `linear` combines a layer's weight where it is used, so only one layer's combined weight
    is in memory at a time. Kernels must be `[*layers, inputs, outputs]`; others can only be merged.

    Args:
      params: the params, any tree; kernels may be packed or four-bit.
      masks: the masks tree; None: nothing is pruned, or packed kernels store their masks.
      lora: the lora tree; None: nothing is adapted.
      gradient: see `Adapted`.
      parts: see `Adapted`.
      dropout: that of the model in one training step, with a key for each row of the batch; None: nothing is dropped.

    Raises:
      RuleError: the path or shape of a mask or factor is not that of a kernel, a kernel is not `[*layers, inputs,
        outputs]`, or `gradient` is unknown.
    """
    if gradient not in GRADIENTS:
        raise RuleError(f'gradient {gradient!r}: expected one of {", ".join(GRADIENTS)}')
    leaves = paths_of(params)
    flat_masks = flatten(masks or {})
    flat_lora = flatten(lora or {})
    _check_fit(leaves, flat_masks, flat_lora)
    # `linear` multiplies the last axis of its input by [inputs, outputs]. It would contract a wrong axis of these.
    for path, leaf in leaves.items():
        if _axes_of(leaf, flat_lora.get(path)) is not None:
            raise RuleError(f'{path} {list(leaf.shape)}: linear reads [inputs, outputs] only; use sl.merge for it')
    bound = {}
    # A kernel with both a mask and LoRA becomes one `Adapted`, which holds the mask.
    for path in flat_masks.keys() - flat_lora.keys():
        bound[path] = Masked(leaves[path], flat_masks[path])
    for path, factors in flat_lora.items():
        own_dropout = None if dropout is None else dropout.of_kernel(path, factors.a.shape[:-2])
        bound[path] = Adapted(leaves[path], flat_masks.get(path), factors, gradient, parts, own_dropout)
    return with_leaves(params, bound)


def merge(params: PyTree, masks: dict | None, lora: dict | None = None, *, dtype: DTypeLike | None = None) -> PyTree:
    """Fold `lora` into `params` under the masks, as plain arrays with exact zeros where the mask is False.

    It is differentiable in `lora`, so it can train any JAX model: `loss(apply(merge(params, masks, lora)))`. Kernels
    keep their own layout: the factors know the roles of their axes.

    Args:
      params: the params, any tree; kernels may be packed or four-bit.
      masks: the masks tree; None: nothing is pruned, or packed kernels store their masks.
      lora: the lora tree; None: nothing is adapted.
      dtype: dtype of the merged kernels; default: each kernel's dtype.

    Raises:
      RuleError: the path or shape of a mask or factor is not that of a kernel, or `dtype` holds no fractions.
    """
    check_floating(dtype, RuleError)
    leaves = paths_of(params)
    flat_masks = flatten(masks or {})
    flat_lora = flatten(lora or {})
    _check_fit(leaves, flat_masks, flat_lora)
    merged = {
        path: _merged(leaves[path], flat_masks.get(path), flat_lora.get(path), dtype)
        for path in flat_masks.keys() | flat_lora.keys()
    }
    return with_leaves(params, merged)


@functools.partial(jax.jit, static_argnames='dtype')  # one program serves all kernels of a shape
def _merged(
    kernel: Kernel, mask: Mask | None, lora: Lora | None, dtype: DTypeLike | None
) -> Float[Array, '*layers inputs outputs']:
    """Return the effective weight, computed one layer at a time.

    The fp32 sum of a whole stack would need several times the model's memory.
    """
    if _axes_of(kernel, lora) is not None:
        return _through_matrices(_merged, kernel, mask, lora, dtype)
    # Nothing is summed without factors, and the first axis is that of layers only where there are any.
    if kernel.ndim == 2 or (lora is None and not is_reduced(kernel)):
        return effective_weight(kernel, mask, lora, dtype=dtype)
    return jax.lax.map(lambda layer: effective_weight(*layer, dtype=dtype), (kernel, mask, lora))


def _check_fit(params: Mapping[str, Any], masks: Mapping[str, Any], lora: Mapping[str, Lora]) -> None:
    """Check that masks and factors have the paths and shapes of kernels."""
    for path in masks.keys() | lora.keys():
        if isinstance(params.get(path), Masked | Adapted):
            raise RuleError(f'{path}: has its mask or LoRA already: expected params as they were before `bind`')
    for path, mask in masks.items():
        if not hasattr(mask, 'shape'):
            raise RuleError(f'{path}: the mask is a {type(mask).__name__}, expected an array of booleans')
        # jnp.where would silently broadcast a mask over layers, so the shapes are checked here.
        if path not in params or params[path].shape != mask.shape:
            shape = getattr(params.get(path), 'shape', 'no such kernel')
            raise RuleError(f'{path}: mask of shape {mask.shape} for a kernel of shape {shape}')
        # jnp.where takes numbers for booleans too: 0.5 would keep a weight.
        if not isinstance(mask, PackedMask) and mask.dtype != jnp.bool_:
            raise RuleError(f'{path}: the mask is an array of {mask.dtype}, expected booleans: True where kept')
    for path, factors in lora.items():
        if path not in params:
            raise RuleError(f'{path}: has LoRA factors but no kernel')
        if not isinstance(factors, Lora):
            raise RuleError(f'{path}: the factors are a {type(factors).__name__}, expected the tree of sl.init_lora')
        if not _fits(params[path], factors):
            of_axes = '' if factors.axes is None else f' and {factors.axes}'
            given = f'LoRA factors {factors.a.shape} x {factors.b.shape}{of_axes}'
            raise RuleError(f'{path}: {given} for a kernel of shape {params[path].shape}')


def _fits(kernel: Kernel, factors: Lora) -> bool:
    """Return whether factors have the shapes and the roles of axes of a kernel."""
    shape = tuple(kernel.shape)
    axes = factors.axes or KernelAxes.of_stack(len(shape))
    # Checked first: other roles would point outside the shape.
    if sorted(axes.order) != list(range(len(shape))):
        return False
    # Factors of other roles may have a fitting size by chance.
    if isinstance(kernel, ReducedMatrix) and kernel.axes != axes:
        return False
    *layers, inputs, outputs = matrix_shape(shape, axes)
    rank = factors.a.shape[-1]
    return factors.a.shape == (*layers, inputs, rank) and factors.b.shape == (*layers, rank, outputs)
