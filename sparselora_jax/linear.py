"""The one matmul every model calls; it dispatches on the kind of kernel."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from sparselora_jax.weights import Adapted, Lora, Masked, effective_weight


def linear(
    x: Float[Array, '*batch inputs'], kernel: Any, bias: Float[Array, ' outputs'] | None = None
) -> Float[Array, '*batch outputs']:
    """`x @ kernel + bias` in x's dtype, for any kind of kernel (an array, Masked, Adapted, a calibrating one).

    Raises:
      TypeError: a kernel of an unknown kind.

    >>> linear(jnp.ones((1, 2)), jnp.ones((2, 3))).tolist()
    [[2.0, 2.0, 2.0]]
    """
    if isinstance(kernel, jax.Array):
        y = x @ kernel.astype(x.dtype)
    elif isinstance(kernel, Masked):
        y = x @ effective_weight(kernel.kernel, kernel.mask, dtype=x.dtype)
    elif isinstance(kernel, Adapted):
        y = _adapted(x, kernel)
    elif hasattr(kernel, 'observe'):
        return linear(x, kernel.observe(x), bias)
    else:
        raise TypeError(f'linear does not know a kernel of kind {type(kernel).__name__}')
    return checkpoint_name(y if bias is None else y + bias.astype(y.dtype), 'linear')


def _adapted(x: Float[Array, '*batch inputs'], weight: Adapted) -> Float[Array, '*batch outputs']:
    kernel, mask, lora = weight.kernel, weight.mask, weight.lora
    if weight.gradient == 'plain':
        y = x @ effective_weight(kernel, mask, dtype=x.dtype)
        return y + lora.scale * ((x @ lora.a.astype(x.dtype)) @ lora.b.astype(x.dtype))
    exact = weight.gradient == 'exact' and mask is not None  # without a mask both gradients are the same
    return _combined_matmul(exact, x, kernel, mask, lora)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _combined_matmul(exact, x, kernel, mask, lora):
    return x @ effective_weight(kernel, mask, lora, dtype=x.dtype)


def _combined_forward(exact, x, kernel, mask, lora):
    # Saves the parts, not their combination: the backward rebuilds one layer's weight at a time.
    return _combined_matmul(exact, x, kernel, mask, lora), (x, kernel, mask, lora)


def _combined_backward(exact, saved, g):
    x, kernel, mask, lora = saved
    dx = g @ effective_weight(kernel, mask, lora, dtype=g.dtype).T
    x2, g2 = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    a, b = lora.a, lora.b
    if exact:
        dw = jnp.where(mask, jnp.matmul(x2.T, g2, preferred_element_type=jnp.float32), 0.0)
        da, db = dw @ b.astype(dw.dtype).T, a.astype(dw.dtype).T @ dw
    else:
        da = jnp.matmul(x2.T, g2 @ b.astype(g2.dtype).T, preferred_element_type=jnp.float32)
        db = jnp.matmul((x2 @ a.astype(x2.dtype)).T, g2, preferred_element_type=jnp.float32)
    grads = Lora((lora.scale * da).astype(a.dtype), (lora.scale * db).astype(b.dtype), lora.scale)
    return dx, None, None, grads  # base and mask are never differentiated


_combined_matmul.defvjp(_combined_forward, _combined_backward)
