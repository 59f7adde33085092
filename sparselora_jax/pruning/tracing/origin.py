"""Follow a leaf of params through layout operations: which axis of a value is which axis of the leaf.

A program rarely multiplies with a leaf as it is stored. It slices a layer out of a stack, transposes, splits an axis
into heads, or casts. An `Origin` says for each axis of such a value which axis of the leaf it is, or which part of one.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple


class Part(NamedTuple):
    """Indices `start, start + stride, ...` of one axis of a leaf; a reshape splits an axis into several parts."""

    axis: int
    start: int
    stride: int
    size: int


class Pin(NamedTuple):
    """One index of an axis of a leaf: a layer that was sliced out of a stack.

    Attributes:
      axis: axis of the leaf.
      index: an integer, or a traced one; None while a program is only analysed.
      mesh_axes: axes of a mesh along which devices take different indices.
    """

    axis: int
    index: Any
    mesh_axes: frozenset[Hashable] = frozenset()


class Shard(NamedTuple):
    """Parts of a leaf whose indices lie on different devices: each device along an axis of a mesh holds one index.

    Attributes:
      mesh_axis: name of the axis of the mesh.
      parts: the parts, major to minor; none if what the devices divide was broadcast.
    """

    mesh_axis: Hashable
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Origin:
    """Where a value comes from, if it is a leaf of params in another layout.

    Attributes:
      path: path of the leaf.
      shape: shape of the leaf.
      axes: for each axis of the value its parts of the leaf, major to minor. An axis without parts was broadcast.
      pins: axes of the leaf of which the value holds one index. On a device that holds a part of such an axis, it is
        the index within that part.
      shards: within `shard_map`, what the devices have divided among them.
    """

    path: str
    shape: tuple[int, ...]
    axes: tuple[tuple[Part, ...], ...]
    pins: tuple[Pin, ...] = ()
    shards: tuple[Shard, ...] = ()

    def is_same_as(self, other: 'Origin | None') -> bool:
        """Return whether a value with another origin holds the same weights in the same layout.

        Args:
          other: the other origin.
        """
        if other is None or (self.path, self.axes, self.shards) != (other.path, other.axes, other.shards):
            return False
        pins = [{pin.axis: pin.index for pin in origin.pins} for origin in (self, other)]
        # Traced indices have no value to compare, only an identity.
        return pins[0].keys() == pins[1].keys() and all(pins[0][axis] is pins[1][axis] for axis in pins[0])

    @property
    def is_whole(self) -> bool:
        """Whether the value holds every index of the axes that are not pinned."""
        pinned = {pin.axis for pin in self.pins}
        size = math.prod(size for axis, size in enumerate(self.shape) if axis not in pinned)
        return math.prod(part.size for parts in self.axes for part in parts) == size

    @property
    def layout(self) -> 'Origin':
        """What `to_leaf` and `from_leaf` need: the same for equal layouts of different leaves, or of other layers."""
        return replace(self, path='', pins=tuple(pin._replace(index=0) for pin in self.pins))

    def to_leaf(self, array: Any) -> Any:
        """Return an array of the value's layout in the layout of the leaf; its pinned axes have length 1.

        Args:
          array: an array of the value's shape, which must be whole. It may hold one index, instead of all, of an axis
            that is an axis of the leaf.
        """
        sizes = [
            part.size if size > 1 else 1 for parts, size in zip(self.axes, array.shape, strict=True) for part in parts
        ]
        parts = [part for parts in self.axes for part in parts]
        shape = [math.prod(s for p, s in zip(parts, sizes, strict=True) if p.axis == a) for a in range(len(self.shape))]
        return array.reshape(sizes).transpose(self._order_in_leaf()).reshape(shape)

    def from_leaf(self, array: Any) -> Any:
        """Return an array of the leaf's layout in that of the value: the inverse of `to_leaf`.

        Args:
          array: an array of the leaf's shape, in which pinned axes have length 1.
        """
        order = self._order_in_leaf()
        parts = [part for parts in self.axes for part in parts]
        inverse = sorted(range(len(order)), key=order.__getitem__)
        shape = [math.prod(part.size for part in parts) for parts in self.axes]
        return array.reshape([parts[index].size for index in order]).transpose(inverse).reshape(shape)

    def _order_in_leaf(self) -> list[int]:
        """Return the numbers of the parts, in the order in which they are in the leaf."""
        parts = [part for parts in self.axes for part in parts]
        return sorted(range(len(parts)), key=lambda index: (parts[index].axis, -parts[index].stride))

    @classmethod
    def of_leaf(cls, path: str, shape: Sequence[int]) -> 'Origin':
        """Return the origin of a leaf itself.

        Args:
          path: path of the leaf.
          shape: its shape.
        """
        axes = tuple((Part(axis, 0, 1, size),) for axis, size in enumerate(shape))
        return cls(path, tuple(shape), axes)

    def transpose(self, permutation: Sequence[int]) -> 'Origin':
        """Return the origin of the transposed value.

        Args:
          permutation: for each axis of the result the axis of the value.
        """
        return replace(self, axes=tuple(self.axes[axis] for axis in permutation))

    def pin(self, axis: int, index: Any, mesh_axes: frozenset[Hashable] = frozenset()) -> 'Origin | None':
        """Return the origin after one index of an axis was taken; the axis is gone.

        Args:
          axis: axis of the value.
          index: index along it, an integer or traced; None while a program is only analysed.
          mesh_axes: axes of a mesh along which devices take different indices.

        Returns:
          The origin; None if the axis is only a part of an axis of the leaf.
        """
        parts = self.axes[axis]
        rest = self.axes[:axis] + self.axes[axis + 1 :]
        if not parts:
            return replace(self, axes=rest)
        # An index of a part alone fixes no index of the leaf's axis.
        if len(parts) > 1 or parts[0].stride != 1:
            return None
        (part,) = parts
        # Literal indices stay integers, so that a message can name them.
        position = index if index is None or part.start == 0 else index + part.start
        return replace(self, axes=rest, pins=(*self.pins, Pin(part.axis, position, mesh_axes)))

    def squeeze(self, dimensions: Sequence[int]) -> 'Origin | None':
        """Return the origin after axes of length 1 were dropped.

        Args:
          dimensions: axes of the value.
        """
        origin = self
        # From the last axis on, so that the numbers of the earlier ones stay.
        for axis in sorted((axis % len(self.axes) for axis in dimensions), reverse=True):
            origin = origin and origin.pin(axis, 0)
        return origin

    def slice(self, axis: int, start: int, size: int) -> 'Origin | None':
        """Return the origin of a contiguous slice along one axis.

        Args:
          axis: axis of the value.
          start: first index.
          size: number of indices.

        Returns:
          The origin; None if the axis consists of several parts, so that the slice is no range of the leaf.
        """
        parts = self.axes[axis]
        if not parts or (start == 0 and size == math.prod(part.size for part in parts)):
            return self
        if len(parts) > 1:
            return None
        (part,) = parts
        sliced = part._replace(start=part.start + start * part.stride, size=size)
        return self._with_axis(axis, (sliced,))

    def slice_one(self, axis: int, index: Any, mesh_axes: frozenset[Hashable] = frozenset()) -> 'Origin | None':
        """Return the origin of a slice of length 1 along one axis.

        Args:
          axis: axis of the value.
          index: see `pin`.
          mesh_axes: see `pin`.
        """
        pinned = self.pin(axis, index, mesh_axes)
        if pinned is None:
            return None
        return replace(pinned, axes=(*pinned.axes[:axis], (), *pinned.axes[axis:]))

    def broadcast(self, old_shape: Sequence[int], shape: Sequence[int], dimensions: Sequence[int]) -> 'Origin | None':
        """Return the origin after `broadcast_in_dim`.

        Args:
          old_shape: shape of the value.
          shape: shape of the result.
          dimensions: for each axis of the value its axis in the result.
        """
        axes: list[tuple[Part, ...]] = [() for _ in shape]
        origin = self
        for axis, new_axis in enumerate(dimensions):
            if old_shape[axis] != shape[new_axis]:
                # One index, repeated.
                origin = origin and origin.slice_one(axis, 0)
        if origin is None:
            return None
        for axis, new_axis in enumerate(dimensions):
            axes[new_axis] = origin.axes[axis]
        return replace(origin, axes=tuple(axes))

    def reshape(self, old_shape: Sequence[int], shape: Sequence[int]) -> 'Origin | None':
        """Return the origin after a reshape.

        Args:
          old_shape: shape of the value.
          shape: shape of the result.

        Returns:
          The origin; None if an axis of the result mixes parts of axes, or a broadcast axis with a real one.
        """
        # The elements of all axes in order, as factors that the new axes take from the front, whole or in part.
        factors = []
        for parts, size in zip(self.axes, old_shape, strict=True):
            # A broadcast axis is a factor without a part.
            factors += parts or ([size] if size > 1 else [])
        axes = []
        origin = self
        for size in shape:
            of_axis: list[Part | int] = []
            missing = size
            while missing > 1:
                factor = factors.pop(0)
                factor_size = _size(factor)
                if factor_size == 1:
                    origin = origin._without_part(factor)
                    continue
                if missing % factor_size == 0:
                    of_axis.append(factor)
                    missing //= factor_size
                    continue
                # The new axis would end within a factor that cannot be split there.
                if factor_size % missing:
                    return None
                major, minor = _split(factor, missing)
                of_axis.append(major)
                factors.insert(0, minor)
                missing = 1
            # A leaf's own axis of length 1 stays an axis where the result has one for it.
            if size == 1 and factors and _size(factors[0]) == 1:
                of_axis.append(factors.pop(0))
            joined = _joined(of_axis)
            if joined is None:
                return None
            axes.append(joined)
        for factor in factors:
            origin = origin._without_part(factor)
        return replace(origin, axes=tuple(axes))

    def shard(self, axis: int, mesh_axis: Hashable, devices: int) -> 'Origin | None':
        """Return the origin of what a device holds after the devices along an axis of a mesh have divided the value.

        Args:
          axis: axis of the value that is divided, each device in turn taking neighbouring indices.
          mesh_axis: name of the axis of the mesh.
          devices: number of devices along it.

        Returns:
          The origin; None if the indices of a device are no parts of the leaf.
        """
        mine = list(self.axes[axis])
        divided: list[Part] = []
        missing = devices
        while mine and missing > 1:
            part = mine.pop(0)
            if part.size % missing == 0:
                # The last part stays, even with one index: it tells the role of its axis.
                major, minor = _split(part, missing)
                divided.append(major)
                mine.insert(0, minor)
                missing = 1
            elif missing % part.size == 0:
                divided.append(part)
                missing //= part.size
            else:
                return None
        shard = Shard(mesh_axis, tuple(divided))
        return replace(self._with_axis(axis, tuple(mine)), shards=(*self.shards, shard))

    def stack_shards(self, mesh_axes: Sequence[Hashable]) -> 'Origin | None':
        """Return the origin after the values of all devices were stacked along a new first axis.

        Args:
          mesh_axes: axes of a mesh, major to minor, along which devices are gathered.

        Returns:
          The origin; None if the devices along one of these axes hold the same, or took indices that are traced.
        """
        by_axis = {shard.mesh_axis: shard for shard in self.shards}
        if not by_axis.keys() >= set(mesh_axes):
            return None
        parts = [part for mesh_axis in mesh_axes for part in by_axis[mesh_axis].parts]
        pins = list(self.pins)
        for pin in self.pins:
            # The first part is the most major one, whose start the others count from.
            index = next((i for i, part in enumerate(parts) if part.axis == pin.axis), None)
            if index is None:
                continue
            # Each device took one index of its own part: together they are no longer one index of the leaf's axis.
            if not isinstance(pin.index, int):
                return None
            parts[index] = parts[index]._replace(start=parts[index].start + pin.index)
            pins.remove(pin)
        rest = tuple(shard for shard in self.shards if shard.mesh_axis not in mesh_axes)
        return replace(self, axes=(tuple(parts), *self.axes), pins=tuple(pins), shards=rest)

    def concatenate_shards(
        self, mesh_axes: Sequence[Hashable], devices: int, axis: int, shape: Sequence[int]
    ) -> 'Origin | None':
        """Return the origin after the values of all devices were concatenated along one of their axes.

        Args:
          mesh_axes: see `stack_shards`.
          devices: number of devices along these axes.
          axis: axis of the value.
          shape: shape of the value on one device.
        """
        stacked = self.stack_shards(mesh_axes)
        if stacked is None:
            return None
        # Bring the devices in front of the axis that they divide, and join the two.
        ahead = range(1, axis + 1)
        behind = range(axis + 1, len(shape) + 1)
        moved = stacked.transpose([*ahead, 0, *behind])
        moved_shape = [*shape[:axis], devices, *shape[axis:]]
        joined_shape = [*shape[:axis], devices * shape[axis], *shape[axis + 1 :]]
        return moved.reshape(moved_shape, joined_shape)

    def _without_part(self, part: Part) -> 'Origin':
        """Return the origin after a part of length 1 was dropped; its axes are replaced afterwards."""
        # The one index of a part that was divided says nothing about the leaf's axis: another part has its indices.
        if any(other.axis == part.axis and other != part for parts in self.axes for other in parts):
            return self
        # Length 1 carries no data; what is left of the leaf's axis is one index.
        return replace(self, pins=(*self.pins, Pin(part.axis, part.start)))

    def _with_axis(self, axis: int, parts: tuple[Part, ...]) -> 'Origin':
        return replace(self, axes=(*self.axes[:axis], parts, *self.axes[axis + 1 :]))


def _size(factor: Part | int) -> int:
    return factor if isinstance(factor, int) else factor.size


def _split(factor: Part | int, major_size: int) -> tuple[Part | int, Part | int]:
    """Split a factor into a major and a minor one."""
    minor_size = _size(factor) // major_size
    if isinstance(factor, int):
        return major_size, minor_size
    major = factor._replace(stride=factor.stride * minor_size, size=major_size)
    return major, Part(factor.axis, 0, factor.stride, minor_size)


def _joined(factors: Sequence[Part | int]) -> tuple[Part, ...] | None:
    """Return the parts of one axis, neighbours of one axis of the leaf joined; None: broadcast and real ones mix."""
    parts: list[Part] = []
    for factor in factors:
        if isinstance(factor, int):
            continue
        last = parts[-1] if parts else None
        # Two parts that a reshape split before, side by side again.
        if last and last.axis == factor.axis and last.stride == factor.stride * factor.size:
            parts[-1] = Part(factor.axis, last.start + factor.start, factor.stride, last.size * factor.size)
        else:
            parts.append(factor)
    num_broadcast = sum(isinstance(factor, int) for factor in factors)
    return None if num_broadcast and parts else tuple(parts)
