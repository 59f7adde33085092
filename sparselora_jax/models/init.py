"""Random initial parameters of any tower, from its shapes."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array


def init_params(key: Array, shapes: dict, *, std: float = 0.02, dtype: DTypeLike = jnp.float32) -> dict:
    """Create random parameters of the given shapes.

    Kernels have standard deviation 1/sqrt(inputs), embeddings and positions have `std`. Scales are one, biases zero.

    Args:
      key: a PRNG key.
      shapes: a params tree of tuples, as `Model.shapes` returns it.
      std: standard deviation of embeddings and positions.
      dtype: dtype of every parameter.

    Returns:
      A params tree.
    """
    leaves, treedef = jax.tree.flatten_with_path(shapes, is_leaf=lambda s: isinstance(s, tuple))

    def draw(index: int, name: str, shape: tuple[int, ...]) -> Array:
        if name in ('scale', 'bias'):  # norms start as the identity
            return jnp.full(shape, float(name == 'scale'), dtype)
        # The last two axes of a kernel are [inputs, outputs], after the layer axis.
        scale = shape[-2] ** -0.5 if name == 'kernel' else std
        # Each leaf has its own key, so adding a parameter changes only the values of the leaves after it.
        return scale * jax.random.truncated_normal(jax.random.fold_in(key, index), -2.0, 2.0, shape, dtype)

    return treedef.unflatten([draw(index, path[-1].key, shape) for index, (path, shape) in enumerate(leaves)])
