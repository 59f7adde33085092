"""Untrained parameters of any tower, from its shapes."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array


def init_params(key: Array, shapes: dict, *, std: float = 0.02, dtype: DTypeLike = jnp.float32) -> dict:
    """Create random parameters of the given shapes.

    Kernels are drawn with deviation 1/sqrt(inputs), embeddings and positions with `std`; scales are one and biases
    zero.

    Args:
      key: of `jax.random`.
      shapes: a params tree of tuples, as `Model.shapes` returns it.
      std: deviation of all that is no kernel.
      dtype: of every parameter.

    Returns:
      A params tree.
    """
    leaves, treedef = jax.tree.flatten_with_path(shapes, is_leaf=lambda s: isinstance(s, tuple))

    def draw(index: int, name: str, shape: tuple[int, ...]) -> Array:
        if name in ('scale', 'bias'):  # norms begin as the identity
            return jnp.full(shape, float(name == 'scale'), dtype)
        # The last two axes of a kernel are [inputs, outputs]; the axis of layers comes before.
        scale = shape[-2] ** -0.5 if name == 'kernel' else std
        # A key of its own for each leaf: adding a parameter changes no other one's values but those behind it.
        return scale * jax.random.truncated_normal(jax.random.fold_in(key, index), -2.0, 2.0, shape, dtype)

    return treedef.unflatten([draw(index, path[-1].key, shape) for index, (path, shape) in enumerate(leaves)])
