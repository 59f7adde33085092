"""The roles of a kernel's axes: which are contracted with the input, which are outputs, and which number layers.

The library's own models have kernels `[layers, inputs, outputs]`. Others do not: the attention of Flax has
`[inputs, heads, head_dim]` and `[heads, head_dim, outputs]`, and layers may be stacked along any axis.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from sparselora_jax.sparse.rules import RuleError, is_kernel, kernels, paths_of


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


@runtime_checkable
class KnowsAxes(Protocol):
    """An object that knows the roles of a kernel's axes, such as what `collect` returns for each kernel."""

    @property
    def axes(self) -> KernelAxes | None:
        """Return the roles; None: the kernel is `[*layers, inputs, outputs]`."""
        ...


# The roles of the axes of kernels, by path: what `collect` returned, or the roles themselves.
AxesByPath = Mapping[str, KernelAxes | KnowsAxes]


def roles_by_path(axes: AxesByPath | None) -> dict[str, KernelAxes]:
    """Return the roles of the axes of kernels, by path.

    Args:
      axes: what `collect` returned, or `{path: KernelAxes}`; None: nothing is known.

    Raises:
      RuleError: it is something else.
    """
    expected = 'expected what sl.collect returned, or {path: sl.KernelAxes(layers, inputs, outputs)}'
    if axes is None:
        return {}
    if not isinstance(axes, Mapping):
        raise RuleError(f'axes is a {type(axes).__name__}: {expected}')
    roles = {}
    for path, value in axes.items():
        # A statistic has the roles beside its sum; None there stands for an ordinary kernel.
        of_kernel = value if isinstance(value, KernelAxes) else getattr(value, 'axes', value)
        if isinstance(of_kernel, KernelAxes):
            roles[path] = of_kernel
        elif of_kernel is not None:
            raise RuleError(f'{path}: its axes are a {type(of_kernel).__name__}: {expected}')
    return roles


def unusual_roles(leaves: Mapping[str, Any], axes: AxesByPath | None) -> dict[str, KernelAxes]:
    """Return the roles of those kernels that are not `[*layers, inputs, outputs]`, and check all roles.

    Args:
      leaves: the leaves of the tree, by path.
      axes: see `roles_by_path`.

    Raises:
      RuleError: see `roles_by_path`; or the tree has no such kernel, or the roles do not name each of its axes once.
    """
    roles = roles_by_path(axes)
    unusual = {}
    for path, of_kernel in roles.items():
        # Without this check, the kernel that was meant would be taken for an ordinary one.
        if path not in leaves:
            raise RuleError(
                f'{path}: its axes are given, but the tree has no such path, e.g. {next(iter(leaves), "none")}: '
                'expected the tree for which sl.collect was called'
            )
        # Leaves of modules may be functions, which have no shape.
        shape = tuple(getattr(leaves[path], 'shape', ()))
        if sorted(of_kernel.order) != list(range(len(shape))):
            raise RuleError(f'{path} {list(shape)}: {of_kernel} does not give each of its {len(shape)} axes one role')
        # Ordinary kernels stay without roles, so that their factors, files and programs are those of nested dicts.
        if of_kernel != KernelAxes.of_stack(len(shape)):
            unusual[path] = of_kernel
    return unusual


def matrix_shape(shape: tuple[int, ...], axes: KernelAxes | None) -> tuple[int, ...]:
    """Return the shape of a kernel as `[*layers, inputs, outputs]`.

    Args:
      shape: shape of the kernel.
      axes: the roles of its axes; None: it has this form.
    """
    if axes is None:
        return tuple(shape)
    layers, inputs, outputs = axes.sizes(tuple(shape))
    return (*layers, inputs, outputs)


def kernels_of(params: PyTree, axes: Mapping[str, KernelAxes] | None = None) -> dict[str, Any]:
    """Return the leaves that rules apply to, by path.

    Args:
      params: anything with the shapes of a params tree.
      axes: the roles of the axes of kernels that calibration found. Without them, kernels are found by their names.

    Raises:
      RuleError: see `rules.kernels`.
    """
    if not axes:
        return kernels(params)
    leaves = paths_of(params)
    # Kernels without statistics count too: a rule that prunes one must not be passed over.
    return {path: leaf for path, leaf in leaves.items() if path in axes or is_kernel(path, leaf)}
