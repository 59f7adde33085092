"""Untrained parameters of any tower, from its shapes."""

import jax
import jax.numpy as jnp
from jaxtyping import Array


def init_params(key: Array, shapes: dict, *, std: float = 0.02, dtype=jnp.float32) -> dict:
    """Random parameters of the given shapes: kernels scaled by 1/sqrt(in), scales one, biases zero, tables `std`."""
    leaves, treedef = jax.tree.flatten_with_path(shapes, is_leaf=lambda s: isinstance(s, tuple))

    def leaf(index: int, name: str, shape: tuple[int, ...]) -> Array:
        if name in ('scale', 'bias'):
            return jnp.full(shape, float(name == 'scale'), dtype)
        scale = shape[-2] ** -0.5 if name == 'kernel' else std
        return scale * jax.random.truncated_normal(jax.random.fold_in(key, index), -2.0, 2.0, shape, dtype)

    return treedef.unflatten([leaf(i, path[-1].key, shape) for i, (path, shape) in enumerate(leaves)])
