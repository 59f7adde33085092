"""The one matmul every model calls; it dispatches on the kind of kernel."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from sparselora_jax.sparse import packing
from sparselora_jax.sparse.dense import dense_kernel, dense_mask
from sparselora_jax.sparse.kernels.matmul24 import matmul24
from sparselora_jax.sparse.weights import Adapted, Lora, Masked, effective_weight


def linear(
    x: Float[Array, '*batch inputs'], kernel: Any, bias: Float[Array, ' outputs'] | None = None
) -> Float[Array, '*batch outputs']:
    """`x @ kernel + bias` in x's dtype, for any kind of kernel: an array, packed, Masked, Adapted, a calibrating one.

    Raises:
      TypeError: a kernel of an unknown kind.

    >>> linear(jnp.ones((1, 2)), jnp.ones((2, 3))).tolist()
    [[2.0, 2.0, 2.0]]
    """
    if isinstance(kernel, jax.Array | np.ndarray):
        y = x @ kernel.astype(x.dtype)
    elif isinstance(kernel, packing.Packed24):
        y = matmul24(x, kernel)
    elif isinstance(kernel, packing.Bitmask):
        y = _bitmask_matmul(x, kernel)
    elif isinstance(kernel, Masked):
        y = x @ effective_weight(kernel.kernel, kernel.mask, dtype=x.dtype)
    elif isinstance(kernel, Adapted):
        y = _adapted(x, kernel)
    elif hasattr(kernel, 'observe'):
        return linear(x, kernel.observe(x), bias)
    else:
        raise TypeError(f'linear does not know a kernel of kind {type(kernel).__name__}')
    return checkpoint_name(y if bias is None else y + bias.astype(y.dtype), 'linear')


@jax.custom_vjp
def _bitmask_matmul(x, kernel):
    return x @ dense_kernel(kernel, x.dtype)


def _bitmask_forward(x, kernel):
    return _bitmask_matmul(x, kernel), kernel  # not its array: the backward unpacks one layer at a time


def _bitmask_backward(kernel, g):
    return g @ dense_kernel(kernel, g.dtype).T, None


_bitmask_matmul.defvjp(_bitmask_forward, _bitmask_backward)


def _adapted(x: Float[Array, '*batch inputs'], weight: Adapted) -> Float[Array, '*batch outputs']:
    masked = weight.mask is not None or packing.is_packed(
        weight.kernel
    )  # without a mask both gradients of the combined weight are the same
    gradient = 'straight_through' if weight.gradient == 'exact' and not masked else weight.gradient
    parts = weight.parts if x.ndim > 1 and x.shape[0] % weight.parts == 0 else 1
    return _adapted_matmul(gradient, parts, x, weight.kernel, weight.mask, weight.lora)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _adapted_matmul(gradient, parts, x, kernel, mask, lora):
    del parts  # of the backward
    if gradient != 'plain':
        return x @ effective_weight(kernel, mask, lora, dtype=x.dtype)
    y = x @ effective_weight(kernel, mask, dtype=x.dtype)
    return y + lora.scale * ((x @ lora.a.astype(x.dtype)) @ lora.b.astype(x.dtype))


def _adapted_forward(gradient, parts, x, kernel, mask, lora):
    # Saves what the weight is made of: the backward rebuilds one layer's weight at a time.
    return _adapted_matmul(gradient, parts, x, kernel, mask, lora), (x, kernel, mask, lora)


def _adapted_backward(gradient, parts, saved, g):
    x, kernel, mask, lora = saved
    a, b, combined = lora.a, lora.b, None if gradient == 'plain' else lora
    dx = g @ effective_weight(kernel, mask, combined, dtype=g.dtype).T
    x2, g2 = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    if gradient == 'exact':
        x3, g3 = (rows.reshape(parts, -1, rows.shape[-1]) for rows in (x2, g2))
        dw = jnp.where(dense_mask(mask, kernel), jax.vmap(_contract_rows)(x3, g3), 0.0)
        da, db = (jnp.sum(of_parts, 0) for of_parts in (dw @ b.astype(dw.dtype).T, a.astype(dw.dtype).T @ dw))
    else:
        # Barriers, or XLA folds the small transposes into products that walk x and g by columns (16x slower on a CPU).
        gb, xa = jax.lax.optimization_barrier((g2 @ b.astype(g2.dtype).T, x2 @ a.astype(x2.dtype)))
        da = jax.lax.optimization_barrier(_contract_rows(gb, x2)).T
        db = _contract_rows(xa, g2)
        if gradient == 'plain':
            dx = dx + lora.scale * (gb @ a.astype(gb.dtype).T).reshape(dx.shape)
    grads = Lora((lora.scale * da).astype(a.dtype), (lora.scale * db).astype(b.dtype), lora.scale)
    return dx, None, None, grads  # base and mask are never differentiated


def _contract_rows(x: Float[Array, 'rows m'], y: Float[Array, 'rows n']) -> Float[Array, 'm n']:
    """`x.T @ y`, summed in fp32."""
    return jnp.matmul(x.T, y, preferred_element_type=jnp.float32)


_adapted_matmul.defvjp(_adapted_forward, _adapted_backward)
