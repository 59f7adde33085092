"""What each layout operation of a program does to the origin of its operand."""

import contextlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from jax.extend import core

from sparselora_jax.pruning.tracing.devices import mesh_axes_of
from sparselora_jax.pruning.tracing.origin import Origin

# What a value may vary with, beside the axes of a mesh.
BATCH = object()
OF_BATCH = frozenset({BATCH})


class Operand(NamedTuple):
    """A value of a program.

    Attributes:
      value: the array; None while the program is only analysed.
      origin: where it comes from, if it is a leaf of params in another layout.
      varies: what it varies with: `BATCH` if it depends on the batch, and within `shard_map` the axes of the mesh along
        along which devices may have different values.
      lost: paths of leaves from which it was computed in ways that cannot be followed, other than by products.
      looked_up: origin of matrices that an index of several elements has looked up, as if they were a leaf; the axes of
        the index are broadcast ones.
    """

    value: Any
    origin: Origin | None = None
    varies: frozenset[Hashable] = frozenset()
    lost: frozenset[str] = frozenset()
    looked_up: Origin | None = None


class UnfollowedError(Exception):
    """An operation through which a leaf cannot be followed; the message says why."""


# `rule(equation, operands)` returns the origin of each result.
Rule = Callable[[core.JaxprEqn, Sequence[Operand]], list[Origin | None]]

# Operations whose result has the layout of one operand. If there are others, the operation is a dequantisation, a mask
# or an update of the weight; they must not depend on the batch.
ELEMENTWISE = (
    'add',
    'convert_element_type',
    'copy',
    'copy_p',
    'device_put',
    'div',
    'mul',
    'name',
    'neg',
    'optimization_barrier',
    'pvary',
    'reduce_precision',
    'reshard',
    'select_n',
    'sharding_constraint',
    'stop_gradient',
    'sub',
)


def origins_after(equation: core.JaxprEqn, operands: Sequence[Operand]) -> list[Origin | None]:
    """Return the origins of an operation's results.

    Args:
      equation: the operation.
      operands: its operands, at least one of which has an origin.

    Raises:
      UnfollowedError: the operation is no layout operation, or one that moves weights between axes.
    """
    name = equation.primitive.name
    if name not in _RULES:
        raise UnfollowedError('not a layout operation')
    origins = _RULES[name](equation, operands)
    if None in origins and name not in ELEMENTWISE:
        raise UnfollowedError('its result is no slice or arrangement of whole axes')
    return origins


def looked_up_after(equation: core.JaxprEqn, operands: Sequence[Operand]) -> Origin | None:
    """Return the `looked_up` of an operation's result; None: it holds no matrices that were looked up.

    Args:
      equation: the operation.
      operands: its operands.
    """
    name = equation.primitive.name
    if name == 'gather' and operands[0].origin and _looks_up_matrices(equation):
        whole = Origin.of_leaf(operands[0].origin.path, equation.outvars[0].aval.shape)
        of_matrix = equation.params['dimension_numbers'].offset_dims
        return replace(whole, axes=tuple(parts if i in of_matrix else () for i, parts in enumerate(whole.axes)))
    if name not in _RULES or len(operands) != 1 or operands[0].looked_up is None:
        return None
    with contextlib.suppress(UnfollowedError):
        return _RULES[name](equation, [Operand(None, operands[0].looked_up)])[0]
    return None


def shape_of(equation: core.JaxprEqn, index: int) -> tuple[int, ...]:
    """Return the shape of one operand of an operation.

    Args:
      equation: the operation.
      index: number of the operand.
    """
    return tuple(equation.invars[index].aval.shape)


def _integers(equation: core.JaxprEqn, name: str) -> tuple[int, ...]:
    """Return a parameter of an operation; a program may hold integers of NumPy."""
    return tuple(map(int, equation.params[name]))


def _elementwise(equation: core.JaxprEqn, operands: Sequence[Operand]) -> list[Origin | None]:
    # These take several values and return each of them.
    if len(equation.outvars) == len(operands) > 1:
        return [operand.origin for operand in operands]
    shape = tuple(equation.outvars[0].aval.shape)
    followed = [operand.origin for operand in operands if operand.origin is not None]
    if len({origin.path for origin in followed}) > 1:
        raise UnfollowedError(f'it combines {followed[0].path} and {followed[1].path}')
    if len({(origin.axes, len(origin.pins)) for origin in followed}) > 1:
        raise UnfollowedError('it combines several parts of one leaf')
    if any(BATCH in operand.varies for operand in operands):
        raise UnfollowedError('it combines the leaf with values that depend on the batch')
    # JAX broadcasts explicitly, except for scalars, which have no axes to follow.
    whole = [index for index, operand in enumerate(operands) if operand.origin and shape_of(equation, index) == shape]
    if not whole:
        raise UnfollowedError('it broadcasts the leaf')
    return [operands[whole[0]].origin]


def _transpose(equation: core.JaxprEqn, operands: Sequence[Operand]) -> list[Origin | None]:
    return [operands[0].origin.transpose(_integers(equation, 'permutation'))]


def _squeeze(equation: core.JaxprEqn, operands: Sequence[Operand]) -> list[Origin | None]:
    return [operands[0].origin.squeeze(_integers(equation, 'dimensions'))]


def _reshape(equation: core.JaxprEqn, operands: Sequence[Operand]) -> list[Origin | None]:
    return [operands[0].origin.reshape(shape_of(equation, 0), _integers(equation, 'new_sizes'))]


def _broadcast_in_dim(equation: core.JaxprEqn, operands: Sequence[Operand]) -> list[Origin | None]:
    shape = _integers(equation, 'shape')
    dimensions = _integers(equation, 'broadcast_dimensions')
    return [operands[0].origin.broadcast(shape_of(equation, 0), shape, dimensions)]


def _slice(equation: core.JaxprEqn, operands: Sequence[Operand]) -> list[Origin | None]:
    starts = _integers(equation, 'start_indices')
    ends = _integers(equation, 'limit_indices')
    strides = equation.params['strides'] or [1] * len(starts)
    # A `Part` could hold a stride, but then one part of an axis would be an input and the rest would not.
    if any(stride != 1 for stride in strides):
        raise UnfollowedError('it leaves out indices in between')
    sizes = [end - start for start, end in zip(starts, ends, strict=True)]
    return [_sliced(operands[0].origin, shape_of(equation, 0), [Operand(start) for start in starts], sizes)]


def _dynamic_slice(equation: core.JaxprEqn, operands: Sequence[Operand]) -> list[Origin | None]:
    if operands[0].origin is None:
        raise UnfollowedError('the leaf is used as an index')
    return [_sliced(operands[0].origin, shape_of(equation, 0), operands[1:], equation.params['slice_sizes'])]


def _sliced(
    origin: Origin | None, shape: Sequence[int], starts: Sequence[Operand], sizes: Sequence[int]
) -> Origin | None:
    """Return the origin of a slice; a start may be traced where a single index is taken."""
    for axis, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        # Along an axis that is taken whole, JAX clamps the start to 0, whatever it is.
        if origin is None or size == shape[axis]:
            continue
        if size == 1:
            origin = origin.slice_one(axis, start.value, start.varies - {BATCH})
        elif isinstance(start.value, int | np.integer | np.ndarray):
            origin = origin.slice(axis, int(start.value), size)
        else:
            raise UnfollowedError('it takes a range of indices from a place that is known only when it runs')
    return origin


def _looks_up_matrices(equation: core.JaxprEqn) -> bool:
    """Return whether a gather returns a matrix, or more, for each index."""
    return len(equation.params['dimension_numbers'].offset_dims) > 1


def _gather(equation: core.JaxprEqn, operands: Sequence[Operand]) -> list[Origin | None]:
    """Follow `leaf[index]` for one index, which JAX may write as a gather."""
    numbers = equation.params['dimension_numbers']
    sizes = equation.params['slice_sizes']
    shape = shape_of(equation, 0)
    (axis, *other_axes) = numbers.start_index_map
    is_one_index = shape_of(equation, 1) == (1,) and not other_axes and numbers.collapsed_slice_dims == (axis,)
    is_whole = all(size == length for i, (size, length) in enumerate(zip(sizes, shape, strict=True)) if i != axis)
    if operands[0].origin is None or not is_one_index or not is_whole:
        raise UnfollowedError(
            'it looks up several matrices (experts of tokens?); sort tokens by expert, as jax.lax.ragged_dot does'
            if _looks_up_matrices(equation)
            else 'it looks up several rows (an embedding?)'
        )
    index = operands[1]
    position = None if index.value is None else index.value[0]
    return [operands[0].origin.pin(axis, position, index.varies - {BATCH})]


def _split(equation: core.JaxprEqn, operands: Sequence[Operand]) -> list[Origin | None]:
    axis = equation.params['axis']
    origins = []
    start = 0
    for size in map(int, equation.params['sizes']):
        sizes = list(shape_of(equation, 0))
        starts = [0] * len(sizes)
        starts[axis] = start
        sizes[axis] = size
        origins.append(_sliced(operands[0].origin, shape_of(equation, 0), [Operand(i) for i in starts], sizes))
        start += size
    return origins


def _all_gather(equation: core.JaxprEqn, operands: Sequence[Operand]) -> list[Origin | None]:
    params = equation.params
    if params['axis_index_groups'] is not None:
        raise UnfollowedError('it gathers groups of devices')
    origin = operands[0].origin
    shape = shape_of(equation, 0)
    # Tiled: devices are joined along this axis; else they become it.
    axis = params['all_gather_dimension']
    mesh_axes = mesh_axes_of(equation)
    if params['tiled']:
        return [origin.concatenate_shards(mesh_axes, params['axis_size'], axis, shape)]
    stacked = origin.stack_shards(mesh_axes)
    order = [*range(1, axis + 1), 0, *range(axis + 1, len(shape) + 1)]
    return [stacked and stacked.transpose(order)]


_RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(('all_gather', 'all_gather_invariant'), _all_gather),
    'broadcast_in_dim': _broadcast_in_dim,
    'dynamic_slice': _dynamic_slice,
    'gather': _gather,
    'reshape': _reshape,
    'slice': _slice,
    'split': _split,
    'squeeze': _squeeze,
    'transpose': _transpose,
}
