"""The one matmul that every model calls; it dispatches on the kind of kernel."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from sparselora_jax.sparse.dense import dense_kernel, dense_mask
from sparselora_jax.sparse.dropout import Dropout, drop, kept_entries
from sparselora_jax.sparse.kernels.matmul24 import matmul24
from sparselora_jax.sparse.packing import Packed24, PackedKernel, PackedMask, is_packed
from sparselora_jax.sparse.weights import Adapted, Kernel, Lora, Masked, effective_weight, masked_update


def linear(
    x: Float[Array, '*batch inputs'], kernel: object, bias: Float[Array, ' outputs'] | None = None
) -> Float[Array, '*batch outputs']:
    """Return `x @ kernel + bias` in x's dtype, for any kind of kernel: see `multiply`.

    Args:
      x: the input.
      kernel: an array, a packed kernel, `Masked`, `Adapted`, or another registered kind.
      bias: added to every row; None: no bias.

    Raises:
      TypeError: a kernel of an unknown kind.

    >>> linear(jnp.ones((1, 2)), jnp.ones((2, 3))).tolist()
    [[2.0, 2.0, 2.0]]
    """
    y = multiply(kernel, x)
    # The name lets a runner's checkpoint policy save these products and recompute everything else.
    return checkpoint_name(y if bias is None else y + bias.astype(y.dtype), 'linear')


@functools.singledispatch
def multiply(kernel: object, x: Float[Array, '*batch inputs']) -> Float[Array, '*batch outputs']:
    """Return `x @ kernel` in x's dtype.

    A new kind of kernel registers a function of (kernel, x): `@multiply.register(Kind)`. A packed kernel needs no
    function: it is unpacked where it is used, in the forward and again in the backward.

    Args:
      kernel: of any kind that is registered.
      x: the input.

    Raises:
      TypeError: a kernel of an unknown kind.
    """
    # These kinds are not registered: arrays have many classes, including tracers, and packed kernels are a protocol.
    if isinstance(kernel, jax.Array | np.ndarray):
        return x @ kernel.astype(x.dtype)
    if is_packed(kernel):
        return _packed_matmul(x, kernel)
    raise TypeError(f'linear does not know a kernel of kind {type(kernel).__name__}; see `multiply.register`')


@multiply.register(Packed24)
def _multiply_packed24(kernel: Packed24, x: Float[Array, '*batch inputs']) -> Float[Array, '*batch outputs']:
    return matmul24(x, kernel)


@multiply.register(Masked)
def _multiply_masked(kernel: Masked, x: Float[Array, '*batch inputs']) -> Float[Array, '*batch outputs']:
    return x @ effective_weight(kernel.kernel, kernel.mask, dtype=x.dtype)


@multiply.register(Adapted)
def _multiply_adapted(kernel: Adapted, x: Float[Array, '*batch inputs']) -> Float[Array, '*batch outputs']:
    has_mask = kernel.mask is not None or is_packed(kernel.kernel)
    gradient = kernel.gradient
    if gradient == 'exact' and not has_mask:
        # Without a mask both gradients are the same, and 'straight_through' needs one matmul less.
        gradient = 'straight_through'
    can_split = x.ndim > 1 and x.shape[0] % kernel.parts == 0
    parts = kernel.parts if can_split else 1
    if kernel.dropout is None:
        return _adapted_matmul(gradient, parts, x, kernel.kernel, kernel.mask, kernel.lora)
    if not has_mask:
        # Without a mask the update's product can be computed by its factors, which is much cheaper.
        gradient = 'plain'
    return _dropped_matmul(gradient, parts, x, kernel.kernel, kernel.mask, kernel.lora, kernel.dropout)


@jax.custom_vjp
def _packed_matmul(x: Float[Array, '*batch inputs'], kernel: PackedKernel) -> Float[Array, '*batch outputs']:
    return x @ dense_kernel(kernel, x.dtype)


def _packed_forward(
    x: Float[Array, '*batch inputs'], kernel: PackedKernel
) -> tuple[Float[Array, '*batch outputs'], PackedKernel]:
    # The residual is the packed kernel, not the dense array: the backward unpacks one layer at a time.
    return _packed_matmul(x, kernel), kernel


def _packed_backward(
    kernel: PackedKernel, g: Float[Array, '*batch outputs']
) -> tuple[Float[Array, '*batch inputs'], None]:
    return g @ dense_kernel(kernel, g.dtype).T, None


_packed_matmul.defvjp(_packed_forward, _packed_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _adapted_matmul(
    gradient: str,
    parts: int,
    x: Float[Array, '*batch inputs'],
    kernel: Kernel,
    mask: Bool[Array, 'inputs outputs'] | PackedMask | None,
    lora: Lora,
) -> Float[Array, '*batch outputs']:
    """Return `x` times the kernel with its low-rank update, see `Adapted`."""
    del parts  # only the backward uses it
    if gradient != 'plain':
        return x @ effective_weight(kernel, mask, lora, dtype=x.dtype)
    y = x @ effective_weight(kernel, mask, dtype=x.dtype)
    return y + lora.scale * ((x @ lora.a.astype(x.dtype)) @ lora.b.astype(x.dtype))


def _adapted_forward(gradient, parts, x, kernel, mask, lora):
    # Saves the parts of the weight, not their sum: the backward rebuilds one layer's weight at a time.
    return _adapted_matmul(gradient, parts, x, kernel, mask, lora), (x, kernel, mask, lora)


def _adapted_backward(gradient, parts, saved, g):
    x, kernel, mask, lora = saved
    combined = None if gradient == 'plain' else lora
    dx = g @ effective_weight(kernel, mask, combined, dtype=g.dtype).T
    da, db, gb = _factor_gradients(gradient, parts, x, g, kernel, mask, lora)
    if gradient == 'plain':
        dx = dx + lora.scale * (gb @ lora.a.astype(gb.dtype).T).reshape(dx.shape)
    grads = dataclasses.replace(
        lora, a=(lora.scale * da).astype(lora.a.dtype), b=(lora.scale * db).astype(lora.b.dtype)
    )
    return dx, None, None, grads  # no gradients for the base and the mask


def _factor_gradients(
    gradient: str,
    parts: int,
    x: Float[Array, '*batch inputs'],
    g: Float[Array, '*batch outputs'],
    kernel: Kernel,
    mask: Bool[Array, 'inputs outputs'] | PackedMask | None,
    lora: Lora,
) -> tuple[Float[Array, 'inputs rank'], Float[Array, 'rank outputs'], Float[Array, 'rows rank'] | None]:
    """Return the gradients of A and B but for the scale, and `g @ b.T` if they are computed from it.

    Args:
      gradient: see `Adapted`.
      parts: see `Adapted`.
      x: what the low-rank update reads.
      g: gradient of the output.
      kernel: the base.
      mask: True where a weight is kept.
      lora: the low-rank update.
    """
    a = lora.a
    b = lora.b
    rows_x = x.reshape(-1, x.shape[-1])
    rows_g = g.reshape(-1, g.shape[-1])
    if gradient == 'exact':
        # Compute the masked weight gradient separately for each part of the batch (one part per device). The parts are
        # summed only after they are gradients of the small factors, so little data moves between devices.
        parts_x = rows_x.reshape(parts, -1, rows_x.shape[-1])
        parts_g = rows_g.reshape(parts, -1, rows_g.shape[-1])
        dw = jnp.where(dense_mask(mask, kernel), jax.vmap(_contract_rows)(parts_x, parts_g), 0.0)
        da_of_parts = dw @ b.astype(dw.dtype).T
        db_of_parts = a.astype(dw.dtype).T @ dw
        return jnp.sum(da_of_parts, 0), jnp.sum(db_of_parts, 0), None
    # Without the barriers, XLA folds the small transposes into products that read x and g by columns (16x slower on
    # a CPU).
    gb, xa = jax.lax.optimization_barrier((rows_g @ b.astype(rows_g.dtype).T, rows_x @ a.astype(rows_x.dtype)))
    da = jax.lax.optimization_barrier(_contract_rows(gb, rows_x)).T
    db = _contract_rows(xa, rows_g)
    return da, db, gb


def _contract_rows(x: Float[Array, 'rows m'], y: Float[Array, 'rows n']) -> Float[Array, 'm n']:
    """Return `x.T @ y`, summed in fp32."""
    return jnp.matmul(x.T, y, preferred_element_type=jnp.float32)


_adapted_matmul.defvjp(_adapted_forward, _adapted_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _dropped_matmul(
    gradient: str,
    parts: int,
    x: Float[Array, '*batch inputs'],
    kernel: Kernel,
    mask: Bool[Array, 'inputs outputs'] | PackedMask | None,
    lora: Lora,
    dropout: Dropout,
) -> Float[Array, '*batch outputs']:
    """Return `x @ (W * M) + dropped(x) @ (s*A*B * M)`: LoRA's dropout, with the update under the mask.

    The expected value is `x` times the merged weight. The mask lies between the factors' product and the input, so the
    two terms need a matmul each. Without the mask (`'plain'`), the second one is LoRA's own `(dropped(x) @ A) @ B`.
    """
    del parts  # only the backward uses it
    dropped = drop(x, kept_entries(dropout, x.shape))
    lora = _scaled(lora, dropout)
    y = x @ effective_weight(kernel, mask, dtype=x.dtype)
    if gradient == 'plain':
        return y + lora.scale * ((dropped @ lora.a.astype(x.dtype)) @ lora.b.astype(x.dtype))
    return y + dropped @ masked_update(kernel, mask, lora, dtype=x.dtype)


def _scaled(lora: Lora, dropout: Dropout) -> Lora:
    """Return the update that makes up for the dropped entries: dropout divides the kept ones by their share."""
    return dataclasses.replace(lora, scale=lora.scale / (1.0 - dropout.rate))


def _dropped_forward(gradient, parts, x, kernel, mask, lora, dropout):
    # Only the keys are saved: the backward draws the same entries again.
    return _dropped_matmul(gradient, parts, x, kernel, mask, lora, dropout), (x, kernel, mask, lora, dropout)


def _dropped_backward(gradient, parts, saved, g):
    x, kernel, mask, lora, dropout = saved
    kept = kept_entries(dropout, x.shape)
    scaled = _scaled(lora, dropout)
    da, db, gb = _factor_gradients(gradient, parts, drop(x, kept), g, kernel, mask, lora)
    if gradient == 'plain':
        through_update = scaled.scale * (gb @ lora.a.astype(gb.dtype).T).reshape(x.shape)
    else:
        through_update = g @ masked_update(kernel, mask, scaled, dtype=g.dtype).T
    # A dropped entry reaches the output through the base alone.
    dx = g @ effective_weight(kernel, mask, dtype=g.dtype).T + drop(through_update, kept)
    grad_a = (scaled.scale * da).astype(lora.a.dtype)
    grad_b = (scaled.scale * db).astype(lora.b.dtype)
    return dx, None, None, dataclasses.replace(lora, a=grad_a, b=grad_b), None


_dropped_matmul.defvjp(_dropped_forward, _dropped_backward)
