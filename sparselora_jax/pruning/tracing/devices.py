"""What a program within `shard_map` says about the devices that run it: what differs between them, what is summed."""

import math
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Bool, Int, PyTree, Shaped

from sparselora_jax.pruning.tracing.origin import Origin

# Exchanges after which all devices along their axes hold the same.
_SAME_ON_ALL = ('all_gather', 'all_gather_invariant', 'pbroadcast', 'pmax', 'pmin', 'psum', 'psum_invariant')
# Notes for JAX's own check of what varies; they change no value.
NOTES = ('pvary',)


def mesh_axes_of(equation: core.JaxprEqn) -> tuple[Hashable, ...]:
    """Return the axes of a mesh along which an operation exchanges values, or tells devices apart.

    Args:
      equation: the operation.
    """
    params = equation.params
    axes = params.get('axes', params.get('axis_name', ()))
    axes = axes if isinstance(axes, tuple | list) else (axes,)
    # The axes of other operations, such as a sum, are numbers.
    return tuple(axis for axis in axes if axis is not None and not isinstance(axis, int))


def varies_after(equation: core.JaxprEqn, varies: frozenset[Hashable]) -> frozenset[Hashable]:
    """Return what the results of an operation vary with.

    Args:
      equation: the operation.
      varies: what its operands vary with.
    """
    axes = mesh_axes_of(equation)
    name = equation.primitive.name
    if name in NOTES:
        return varies
    if name in _SAME_ON_ALL and equation.params.get('axis_index_groups') is None:
        return varies - set(axes)
    return varies | set(axes)


def mesh_axes_by_axis(spec: PartitionSpec) -> dict[int, tuple[Hashable, ...]]:
    """Return {axis of a value: axes of the mesh that divide it, major to minor}.

    Args:
      spec: how a `shard_map` divides the value.
    """
    by_axis = {axis: names if isinstance(names, tuple) else (names,) for axis, names in enumerate(spec)}
    return {axis: names for axis, names in by_axis.items() if names not in ((), (None,))}


def divide(origin: Origin | None, spec: PartitionSpec, mesh: Mesh | AbstractMesh) -> Origin | None:
    """Return the origin of what each device holds of a value.

    Args:
      origin: origin of the value; None: it has none.
      spec: how a `shard_map` divides it.
      mesh: the mesh of the devices.
    """
    for axis, names in mesh_axes_by_axis(spec).items():
        # The first axis of the mesh divides first.
        for name in names:
            origin = origin and origin.shard(axis, name, mesh.shape[name])
    return origin


def join(
    origin: Origin | None,
    spec: PartitionSpec,
    mesh: Mesh | AbstractMesh,
    own_axes: Collection[Hashable],
    shape: Sequence[int],
) -> Origin | None:
    """Return the origin of the value whose parts the devices hold.

    Args:
      origin: origin of what each device holds; None: it has none.
      spec: how a `shard_map` joins it.
      mesh: the mesh of the devices.
      own_axes: axes of the mesh that this `shard_map` divides values along; an outer one may have others.
      shape: shape of what each device holds.
    """
    shape = list(shape)
    for axis, names in mesh_axes_by_axis(spec).items():
        devices = math.prod(mesh.shape[name] for name in names)
        origin = origin and origin.concatenate_shards(names, devices, axis, shape)
        shape[axis] *= devices
    # What devices divide and do not join again is no leaf outside.
    is_whole = origin and not any(shard.parts and shard.mesh_axis in own_axes for shard in origin.shards)
    return origin if is_whole else None


@dataclass(frozen=True)
class Placement:
    """Which devices of a `shard_map` have rows and layers of their own in a product.

    Attributes:
      mesh_axes: the axes of the mesh; none outside of `shard_map`.
      rows: axes along which devices have rows of their own.
      layers: axes along which devices have layers (experts) of their own.
      some_devices: whether only some devices may run the product, because they differ in the branches that they take.
    """

    mesh_axes: tuple[Hashable, ...] = ()
    rows: frozenset[Hashable] = frozenset()
    layers: frozenset[Hashable] = frozenset()
    some_devices: bool = False

    def own_part(self, array: Shaped[Array, '...'], rows: Sequence[int]) -> Shaped[Array, '...'] | None:
        """Return a device's part of an array that has an entry for each row of all devices.

        Args:
          array: the array; its axes are the first axes of the rows.
          rows: sizes of the axes of the device's rows.

        Returns:
          The part; None if the sizes do not tell which part it is.
        """
        if not self.rows:
            return array
        # Of devices along two axes of a mesh, the sizes do not tell which axis divides what.
        if len(self.rows) > 1:
            return None
        (mesh_axis,) = self.rows
        devices = jax.lax.axis_size(mesh_axis)
        # The devices divide the axis along which the array is longer than the rows, by their number.
        for axis, size in enumerate(rows[: array.ndim]):
            whole = (*rows[:axis], size * devices, *rows[axis + 1 :])
            if array.shape == whole[: array.ndim]:
                return jax.lax.dynamic_slice_in_dim(array, jax.lax.axis_index(mesh_axis) * size, size, axis)
        return None

    def combine(
        self, sums: PyTree, layers: Int[Array, ' at_once']
    ) -> tuple[PyTree, Int[Array, ' at_once_on_all_devices']]:
        """Return the sums of all devices, and the numbers of their layers; all devices get the same.

        Args:
          sums: sums over one device's rows, `[at_once, ...]` each.
          layers: numbers of the layers that the device's sums belong to.
        """
        for axis in self.mesh_axes:
            # From here on, all devices along this axis have the sums of all their layers.
            if axis in self.layers:
                sums, layers = jax.tree.map(lambda leaf, axis=axis: _concatenated(leaf, axis), (sums, layers))
        repeated = [axis for axis in self.mesh_axes if axis not in self.rows]
        return self._total(sums, repeated), self._total(layers, self.mesh_axes)

    def _total(self, tree: PyTree, repeated: Sequence[Hashable]) -> PyTree:
        """Return the sum over all devices; along `repeated` they hold the same, which counts once."""
        if not self.mesh_axes:
            return tree
        # Zeros are added in place of what is the same, so that the sum is exact.
        is_counted = _is_first(repeated)

        def total(leaf):
            leaf = jnp.where(is_counted, leaf, jnp.zeros((), leaf.dtype))
            # One by one: JAX sums over several axes only if it knows the same about all of them.
            for axis in self.mesh_axes:
                leaf = jax.lax.psum(leaf, axis)
            return leaf

        return jax.tree.map(total, tree)


# Outside of `shard_map`.
ONE_DEVICE = Placement()


def _is_first(mesh_axes: Sequence[Hashable]) -> Bool[Array, '']:
    """Return whether a device is the first along some axes of the mesh."""
    is_first = jnp.array(True)
    for axis in mesh_axes:
        is_first &= jax.lax.axis_index(axis) == 0
    return is_first


def _concatenated(leaf: Array, mesh_axis: Hashable) -> Array:
    return jax.lax.all_gather(leaf, mesh_axis, tiled=True)
