"""What a product says about a kernel: the roles of its axes, and the rows of its input."""

import itertools
import math
import operator
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Shaped

from sparselora_jax.pruning.tracing.devices import ONE_DEVICE, Placement
from sparselora_jax.pruning.tracing.operations import Operand, UnfollowedError, shape_of
from sparselora_jax.pruning.tracing.origin import Origin, Part, Shard
from sparselora_jax.sparse.axes import KernelAxes

# For each operand of a product: the axes that are contracted, and those that both operands have (layers, experts).
Axes = tuple[int, ...]


@dataclass(frozen=True)
class Arrangement:
    """How the rows of an input are read from the other operand of a product.

    Attributes:
      shape: the operand's shape after its axes are split into parts of the kernel's axes.
      order: the order of these axes: layers, tokens, inputs.
      layers: number of layers that are read at once (experts).
      tokens: sizes of the axes of tokens, in the operand's order.
      inputs: number of inputs.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    layers: int
    tokens: tuple[int, ...]
    inputs: int

    def rows(self, x: Array) -> Float[Array, 'layers tokens inputs']:
        """Return the rows of an input, in the order of the kernel's axes.

        Args:
          x: the other operand of the product.
        """
        # Where shardings are explicit, JAX reshapes no array whose axes are divided.
        if any(jax.typeof(x).sharding.spec):
            x = jax.sharding.reshard(x, PartitionSpec())
        return x.reshape(self.shape).transpose(self.order).reshape(self.layers, math.prod(self.tokens), self.inputs)

    def weights_of_rows(self, weights: Shaped[Array, '...']) -> Shaped[Array, ' tokens'] | None:
        """Return the weight of each row, if the axes of the weights are the first axes of the tokens.

        Neighbours of these axes may be joined: rows `[batch * tokens]` have weights `[batch, tokens]`. Further axes,
        such as heads, share the weight of their token.

        Args:
          weights: a weight for each token, whatever its axes.

        Returns:
          The weights, or None if the tokens have other axes.
        """
        # Products of the first 1, 2, ... sizes. Joined axes leave some out, and nothing else does.
        ends = [end for end in itertools.accumulate(self.tokens, operator.mul) if end <= weights.size]
        ends_of_weights = {1, *itertools.accumulate(weights.shape, operator.mul)}
        if weights.size not in ends or not ends_of_weights.issuperset(ends):
            return None
        return jnp.repeat(weights.reshape(-1), math.prod(self.tokens) // max(weights.size, 1))


@dataclass(frozen=True)
class Product:
    """One product of a kernel and its input.

    Attributes:
      origin: origin of the operand that is the kernel.
      axes: the roles of the leaf's axes.
      x: the other operand; None while the program is only analysed. A convolution has its patches here.
      arrangement: how its rows are read.
      group_sizes: number of rows of each expert of a ragged product; None: every layer reads its own rows.
      source: the array that the input was read from; patches are new arrays.
      scope: the body of a loop or the branch that the product is in; None: the program itself.
      placement: which devices have rows and layers of their own.
    """

    origin: Origin
    axes: KernelAxes
    x: Array | None
    arrangement: Arrangement
    group_sizes: Int[Array | np.ndarray, ' layers'] | None
    source: Any
    scope: object = None
    placement: Placement = ONE_DEVICE

    @property
    def path(self) -> str:
        """The path of the leaf."""
        return self.origin.path

    def layer_indices(self) -> Int[Array, ' at_once']:
        """Return the numbers of the layers that the product reads; layers are numbered over all their axes."""
        # Layers are numbered like the elements of an array of all layer axes.
        indices = jnp.zeros(1, jnp.int32)
        for axis in self.axes.layers:
            along_axis = self._indices(axis)
            indices = (indices[:, None] * self.origin.shape[axis] + along_axis).reshape(-1)
        return indices

    def _indices(self, axis: int) -> Int[Array, ' at_once']:
        """Return the indices of one axis of the leaf that are read: the sum of those of its parts."""
        indices = jnp.zeros(1, jnp.int32)
        # On a device that holds a part of the axis, an index that was taken counts from the beginning of that part.
        for pin in self.origin.pins:
            if pin.axis == axis:
                indices = indices + jnp.asarray(pin.index, jnp.int32)
        for part in _in_order(_parts_of(self.origin, axis)):
            of_part = part.start + part.stride * jnp.arange(part.size, dtype=jnp.int32)
            indices = (indices[:, None] + of_part).reshape(-1)
        for shard in self.origin.shards:
            # The device's number, major to minor over the parts of the shard.
            rest = math.prod(part.size for part in shard.parts)
            for part in shard.parts:
                size_before, rest = rest, rest // part.size
                if part.axis == axis:
                    number = jax.lax.axis_index(shard.mesh_axis) % size_before // rest
                    indices = indices + part.start + part.stride * number
        return indices

    def weights_of_rows(self, weights: Shaped[Array, '...']) -> Shaped[Array, ' tokens'] | None:
        """Return the weight of each row that a device reads; None: the rows are no tokens with weights.

        Args:
          weights: a weight for each token of the whole batch.
        """
        # Sorted rows are in another order than the tokens, even if they are as many.
        if self.group_sizes is not None:
            return None
        own = self.placement.own_part(weights, self.arrangement.tokens)
        return None if own is None else self.arrangement.weights_of_rows(own)

    def share_key(self) -> tuple:
        """Return a key that is equal for two products that read the same rows for the same layers."""
        layers = self.axes.layers
        # Which outputs a product reads does not matter: its rows are those of the other outputs.
        pins = tuple(
            (pin.axis, pin.index if isinstance(pin.index, int) else id(pin.index))
            for pin in self.origin.pins
            if pin.axis in layers
        )
        shards = tuple(shard for shard in self.origin.shards if _is_along(shard, layers))
        sizes = self.axes.sizes(self.origin.shape)[0]
        groups = None if self.group_sizes is None else id(self.group_sizes)
        return id(self.source), id(self.scope), self.arrangement, pins, shards, self.placement, sizes, groups


def find_product(equation: core.JaxprEqn, operands: Sequence[Operand], mesh_axes: tuple[Hashable, ...] = ()) -> Product:
    """Return what a product says about the one of its operands that is a leaf.

    Args:
      equation: a `dot_general`, `ragged_dot_general` or `conv_general_dilated`.
      operands: its operands.
      mesh_axes: within `shard_map`, the axes of the mesh whose devices run the product.

    Raises:
      UnfollowedError: both operands are leaves, one is complex, or the axes of the leaf have no clear roles.
    """
    followed = [index for index, operand in enumerate(operands[:2]) if operand.origin is not None]
    # Of two weights neither is the input of the other: their product is a weight itself.
    if len(followed) != 1:
        raise UnfollowedError('two leaves are multiplied with each other, or a leaf says where groups begin')
    # Statistics are sums of real numbers; a part of each product would be left out of them.
    if any(jnp.issubdtype(variable.aval.dtype, jnp.complexfloating) for variable in equation.invars):
        raise UnfollowedError('it is a product of complex numbers')
    (kernel,) = followed
    product = PRODUCTS[equation.primitive.name](equation, operands, kernel)
    # Along these axes devices hold rows of their own, unless they read other layers or inputs of the kernel there.
    of_rows = operands[1 - kernel].varies.intersection(mesh_axes)
    of_layers = _mesh_axes_of_layers(product)
    # `_product` has joined the inputs that devices divide.
    gathered = {shard.mesh_axis for shard in operands[kernel].origin.shards} - {
        shard.mesh_axis for shard in product.origin.shards
    }
    placement = Placement(mesh_axes, rows=of_rows - of_layers - gathered, layers=of_layers)
    return replace(product, placement=placement)


def _mesh_axes_of_layers(product: Product) -> frozenset[Hashable]:
    """Return the axes of a mesh along which devices have other layers."""
    layers = product.axes.layers
    pinned = [pin.mesh_axes for pin in product.origin.pins if pin.axis in layers]
    divided = {shard.mesh_axis for shard in product.origin.shards if _is_along(shard, layers)}
    return frozenset(divided).union(*pinned)


def _is_along(shard: Shard, axes: Collection[int]) -> bool:
    """Return whether devices divide one of these axes of the leaf."""
    return any(part.axis in axes for part in shard.parts)


def _dot_general(equation: core.JaxprEqn, operands: Sequence[Operand], kernel: int) -> Product:
    contracted, batch = equation.params['dimension_numbers']
    return _product(
        operands[kernel].origin,
        operands[1 - kernel].value,
        shape_of(equation, 1 - kernel),
        contracted=(contracted[kernel], contracted[1 - kernel]),
        batch=(batch[kernel], batch[1 - kernel]),
    )


def _ragged_dot_general(equation: core.JaxprEqn, operands: Sequence[Operand], kernel: int) -> Product:
    numbers = equation.params['ragged_dot_dimension_numbers']
    contracted, batch = numbers.dot_dimension_numbers
    if kernel != 1 or batch[0] or len(numbers.rhs_group_dimensions) != 1 or equation.params.get('group_offset'):
        raise UnfollowedError('only a ragged product [tokens, inputs] x [experts, inputs, outputs] can be followed')
    (experts,) = numbers.rhs_group_dimensions
    return _product(
        operands[1].origin,
        operands[0].value,
        shape_of(equation, 0),
        contracted=(contracted[1], contracted[0]),
        batch=((), ()),
        group_axis=experts,
        group_sizes=operands[2].value,
    )


def _conv_general_dilated(equation: core.JaxprEqn, operands: Sequence[Operand], kernel: int) -> Product:
    params = equation.params
    if kernel != 1 or params['feature_group_count'] != 1 or params['batch_group_count'] != 1:
        raise UnfollowedError('a convolution of several groups of channels has no single input')
    numbers = params['dimension_numbers']
    _, channels, *window = numbers.rhs_spec
    shape = shape_of(equation, 1)

    def patches(x):
        # [batch, channels * window, *positions], channels first.
        return jax.lax.conv_general_dilated_patches(
            x,
            filter_shape=[shape[axis] for axis in window],
            window_strides=params['window_strides'],
            padding=params['padding'],
            lhs_dilation=params['lhs_dilation'],
            rhs_dilation=params['rhs_dilation'],
            dimension_numbers=jax.lax.ConvDimensionNumbers(
                numbers.lhs_spec, numbers.rhs_spec, (0, 1, *range(2, len(shape)))
            ),
            precision=jax.lax.Precision.HIGHEST,  # the patches are copies of the image
        )

    # A convolution is a product of its kernel with the patches of the image.
    image = operands[0].value
    image_shape = jax.ShapeDtypeStruct(shape_of(equation, 0), equation.invars[0].aval.dtype)
    patches_shape = jax.eval_shape(patches, image_shape).shape
    contracted_sizes = [shape[axis] for axis in (channels, *window)]
    split_shape = (patches_shape[0], *contracted_sizes, *patches_shape[2:])
    return _product(
        operands[1].origin,
        None if image is None else patches(image).reshape(split_shape),
        split_shape,
        contracted=((channels, *window), tuple(range(1, 1 + len(contracted_sizes)))),
        batch=((), ()),
        source=image,
    )


PRODUCTS: dict[str, Callable[[core.JaxprEqn, Sequence[Operand], int], Product]] = {
    'conv_general_dilated': _conv_general_dilated,
    'dot_general': _dot_general,
    'ragged_dot_general': _ragged_dot_general,
}


def _product(
    origin: Origin,
    x: Array | None,
    x_shape: tuple[int, ...],
    *,
    contracted: tuple[Axes, Axes],
    batch: tuple[Axes, Axes],
    group_axis: int | None = None,
    group_sizes: Array | np.ndarray | None = None,
    source: Any = None,
) -> Product:
    """Return a product.

    Where devices divide the inputs of the kernel, each gathers the inputs of all.

    Args:
      origin: origin of the kernel.
      x: the other operand.
      x_shape: its shape.
      contracted: contracted axes of the kernel, and of x in the same order.
      batch: axes that both have, of the kernel and of x.
      group_axis: axis of the kernel that numbers the experts of a ragged product.
      group_sizes: number of rows of each expert.
      source: see `Product`; None: x.
    """
    source = x if source is None else source
    input_axes = {part.axis for axis in contracted[0] for part in origin.axes[axis]}
    for shard in [shard for shard in origin.shards if _is_along(shard, input_axes)]:
        # The devices become a new first axis of both operands, which is contracted too.
        origin = origin.stack_shards([shard.mesh_axis])
        if origin is None:
            raise UnfollowedError('devices read indices of it that are known only when it runs')
        x = x if x is None else jax.lax.all_gather(x, shard.mesh_axis)
        x_shape = (math.prod(part.size for part in shard.parts), *x_shape)
        contracted = tuple((0, *[axis + 1 for axis in axes]) for axes in contracted)
        batch = tuple(tuple(axis + 1 for axis in axes) for axes in batch)
        group_axis = None if group_axis is None else group_axis + 1
    # A kernel that was broadcast over such an axis is the same for all of it: x has more tokens there.
    layer_axes = [(mine, other) for mine, other in zip(*batch, strict=True) if origin.axes[mine]]
    layer_parts = {other: origin.axes[mine] for mine, other in layer_axes}
    input_parts = {other: origin.axes[mine] for mine, other in zip(*contracted, strict=True)}
    groups = () if group_axis is None else origin.axes[group_axis]
    axes = _roles(origin, [*layer_parts.values(), groups], list(input_parts.values()))
    # Split the axes of x like those of the kernel, then bring the parts into the order of the leaf.
    split_shape: list[int] = []
    token_axes: list[int] = []
    places: dict[Part, int] = {}
    for axis, size in enumerate(x_shape):
        parts = layer_parts.get(axis) or input_parts.get(axis)
        if parts is None:
            token_axes.append(len(split_shape))
            split_shape.append(size)
            continue
        for part in parts:
            places[part] = len(split_shape)
            split_shape.append(part.size)
    ordered_layers = _in_order([part for parts in layer_parts.values() for part in parts])
    ordered_inputs = _in_order([part for parts in input_parts.values() for part in parts])
    order = [places[part] for part in ordered_layers] + token_axes + [places[part] for part in ordered_inputs]
    arrangement = Arrangement(
        shape=tuple(split_shape),
        order=tuple(order),
        layers=math.prod(part.size for part in ordered_layers),
        tokens=tuple(split_shape[axis] for axis in token_axes),
        inputs=math.prod(part.size for part in ordered_inputs),
    )
    return Product(origin, axes, x, arrangement, group_sizes, source)


def _roles(origin: Origin, layers: Sequence[Sequence[Part]], inputs: Sequence[Sequence[Part]]) -> KernelAxes:
    """Return the roles of a leaf's axes.

    Raises:
      UnfollowedError: an axis has two roles, or only a part of its layers or inputs is read.
    """
    layer_parts = [part for parts in layers for part in parts]
    input_parts = [part for parts in inputs for part in parts]
    if not input_parts:
        raise UnfollowedError('no axis of the leaf is contracted')
    if any(not parts for parts in inputs):
        raise UnfollowedError('the leaf was broadcast along a contracted axis')
    # What a slice left out of the outputs does not matter: each output has the same input.
    output_axes = set(range(len(origin.shape))) - {part.axis for part in (*layer_parts, *input_parts)}
    # An axis of outputs of which one part is indexed and another is there was sliced, too.
    sliced = {axis for axis in output_axes if _parts_of(origin, axis)}
    pinned = {pin.axis for pin in origin.pins} - sliced
    # Parts of an axis that are not contracted would be outputs: the axis would have two roles.
    for axis in {part.axis for part in (*layer_parts, *input_parts)}:
        same_role = [part for part in (layer_parts + input_parts) if part.axis == axis]
        is_in_both = axis in {part.axis for part in layer_parts} and axis in {part.axis for part in input_parts}
        if is_in_both or len(same_role) != len(_parts_of(origin, axis)):
            raise UnfollowedError(f'axis {axis} of the leaf is contracted only in part')
        divided = [part for shard in origin.shards for part in shard.parts if part.axis == axis]
        if math.prod(part.size for part in (*same_role, *divided)) != origin.shape[axis]:
            raise UnfollowedError(f'only some indices of axis {axis} of the leaf are read')
    return KernelAxes(
        layers=tuple(sorted(pinned | {part.axis for part in layer_parts})),
        inputs=tuple(sorted({part.axis for part in input_parts})),
        outputs=tuple(sorted(output_axes - pinned)),
    )


def _parts_of(origin: Origin, axis: int) -> list[Part]:
    """Return the parts of one axis of the leaf, wherever in the value they are."""
    return [part for parts in origin.axes for part in parts if part.axis == axis]


def _in_order(parts: Sequence[Part]) -> list[Part]:
    return sorted(parts, key=lambda part: (part.axis, -part.stride))
