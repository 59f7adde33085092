"""The roles of a kernel's axes: which are contracted with the input, which are outputs, and which number layers.

The library's own models have kernels `[layers, inputs, outputs]`. Others do not: the attention of Flax has
`[inputs, heads, head_dim]` and `[heads, head_dim, outputs]`, and layers may be stacked along any axis.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array


@dataclass(frozen=True)
class KernelAxes:
    """The role of each axis of a kernel.

    Attributes:
      layers: axes of independent kernels, such as layers or experts, in the kernel's order.
      inputs: axes that a product contracts. N:M groups and comparison groups run along them.
      outputs: all other axes.
    """

    layers: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @classmethod
    def of_stack(cls, ndim: int) -> 'KernelAxes':
        """Return the roles of a kernel `[*layers, inputs, outputs]`.

        Args:
          ndim: number of its axes, two or more.
        """
        return cls(tuple(range(ndim - 2)), (ndim - 2,), (ndim - 1,))

    @property
    def order(self) -> tuple[int, ...]:
        """The axes, ordered by role."""
        return self.layers + self.inputs + self.outputs

    def sizes(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int, int]:
        """Return (sizes of the layer axes, number of inputs, number of outputs) of a kernel.

        Args:
          shape: shape of the kernel.
        """
        layers = tuple(shape[axis] for axis in self.layers)
        inputs = math.prod(shape[axis] for axis in self.inputs)
        outputs = math.prod(shape[axis] for axis in self.outputs)
        return layers, inputs, outputs

    def to_matrix(self, kernel: Array) -> Array:
        """Return a kernel, or its mask, as `[*layers, inputs, outputs]`.

        Args:
          kernel: the array.

        >>> kernel = jnp.zeros((2, 8, 4))  # the heads and their sizes are contracted
        >>> KernelAxes(layers=(), inputs=(0, 1), outputs=(2,)).to_matrix(kernel).shape
        (16, 4)
        """
        layers, inputs, outputs = self.sizes(kernel.shape)
        return jnp.transpose(kernel, self.order).reshape(*layers, inputs, outputs)

    def from_matrix(self, matrix: Array, shape: tuple[int, ...]) -> Array:
        """Return an array of `to_matrix` in the kernel's own layout.

        Args:
          matrix: `[*layers, inputs, outputs]`.
          shape: shape of the kernel.
        """
        # Undo the steps of `to_matrix` in the opposite order.
        ordered = matrix.reshape([shape[axis] for axis in self.order])
        inverse = sorted(range(len(shape)), key=self.order.__getitem__)
        return jnp.transpose(ordered, inverse)
