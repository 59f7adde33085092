"""An origin tells for every element of a value which element of the leaf it is, whatever operations came before."""

import itertools

import numpy as np
import pytest

from sparselora_jax.pruning.tracing.origin import Origin

SHAPE = (4, 6, 8)


def elements(origin, shape, device=0):
    """The flat indices of the leaf that a value of this shape holds on a device, according to its origin."""
    strides = np.cumprod((*origin.shape[1:], 1)[::-1])[::-1]
    indices = np.zeros(shape, int)
    for pin in origin.pins:
        indices = indices + pin.index * strides[pin.axis]
    for shard in origin.shards:
        numbers = np.unravel_index(device, [part.size for part in shard.parts])
        for part, number in zip(shard.parts, numbers, strict=True):
            indices = indices + (part.start + part.stride * number) * strides[part.axis]
    for axis, parts in enumerate(origin.axes):
        positions = np.zeros(1, int)
        for part in parts:
            of_part = (part.start + part.stride * np.arange(part.size)) * strides[part.axis]
            positions = (positions[:, None] + of_part).reshape(-1)
        indices = indices + positions.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    return indices


def reshaped(shape):
    return lambda origin, value: (origin.reshape(value.shape, shape), value.reshape(shape))


def transposed(*permutation):
    return lambda origin, value: (origin.transpose(permutation), value.transpose(permutation))


def sliced(axis, start, size):
    def apply(origin, value):
        return origin.slice(axis, start, size), value.take(range(start, start + size), axis)

    return apply


def picked(axis, index):
    return lambda origin, value: (origin.pin(axis, index), value.take(index, axis))


def broadcast(shape, dimensions):
    def apply(origin, value):
        expanded = np.ones(len(shape), int)
        expanded[list(dimensions)] = value.shape
        return origin.broadcast(value.shape, shape, dimensions), np.broadcast_to(value.reshape(expanded), shape)

    return apply


OPERATIONS = [
    [transposed(2, 0, 1)],
    [reshaped((24, 8))],
    [reshaped((4, 48)), reshaped((4, 6, 2, 4))],
    [reshaped((2, 2, 6, 8)), transposed(1, 0, 3, 2)],
    [reshaped((2, 2, 6, 8)), reshaped((4, 6, 8))],
    [sliced(1, 2, 3)],
    [sliced(2, 4, 4), reshaped((4, 6, 2, 2)), transposed(3, 2, 1, 0)],
    [picked(0, 3)],
    [sliced(0, 1, 3), picked(0, 1)],
    [picked(0, 2), transposed(1, 0), reshaped((2, 4, 6)), picked(2, 5)],
    [sliced(0, 2, 1), reshaped((6, 8))],
    [reshaped((4, 1, 6, 8, 1)), transposed(4, 2, 0, 1, 3)],
    [broadcast((4, 6, 8, 5), (0, 1, 2))],
    [sliced(0, 1, 1), broadcast((3, 6, 8), (0, 1, 2))],
]


@pytest.mark.parametrize('operations', OPERATIONS)
def test_an_origin_names_the_elements_of_the_leaf(operations):
    value = np.arange(np.prod(SHAPE)).reshape(SHAPE)
    origin = Origin.of_leaf('w', SHAPE)
    for operation in operations:
        origin, value = operation(origin, value)
    np.testing.assert_array_equal(elements(origin, value.shape), value)


@pytest.mark.parametrize('operations', OPERATIONS[:5])
def test_a_value_is_put_back_into_its_leaf_and_taken_out_again(operations):
    leaf = np.arange(np.prod(SHAPE)).reshape(SHAPE)
    origin, value = Origin.of_leaf('w', SHAPE), leaf
    for operation in operations:
        origin, value = operation(origin, value)
    np.testing.assert_array_equal(origin.to_leaf(value), leaf)
    np.testing.assert_array_equal(origin.from_leaf(leaf), value)


@pytest.mark.parametrize('seed', range(40))
def test_random_operations_are_followed_or_given_up(seed):
    rng = np.random.default_rng(seed)
    value = np.arange(np.prod(SHAPE)).reshape(SHAPE)
    origin = Origin.of_leaf('w', SHAPE)
    for _ in range(6):
        axes = list(range(value.ndim))
        kind = rng.choice(['transpose', 'reshape', 'slice', 'pick'])
        if kind == 'transpose':
            operation = transposed(*rng.permutation(axes).tolist())
        elif kind == 'reshape':
            divisors = [d for d in range(1, value.size + 1) if value.size % d == 0]
            first = int(rng.choice(divisors))
            second = int(rng.choice([d for d in divisors if value.size // first % d == 0]))
            operation = reshaped((first, second, value.size // first // second))
        elif kind == 'slice' and value.ndim:
            axis = int(rng.choice(axes))
            size = int(rng.integers(1, value.shape[axis] + 1))
            operation = sliced(axis, int(rng.integers(0, value.shape[axis] - size + 1)), size)
        elif value.ndim > 1:
            axis = int(rng.choice(axes))
            operation = picked(axis, int(rng.integers(value.shape[axis])))
        else:
            continue
        new_origin, new_value = operation(origin, value)
        if new_origin is None:
            return
        origin, value = new_origin, new_value
        np.testing.assert_array_equal(elements(origin, value.shape), value)


def test_what_mixes_axes_is_given_up():
    origin = Origin.of_leaf('w', (4, 6))
    joined = origin.reshape((4, 6), (24,))
    assert joined.pin(0, 3) is None
    assert joined.slice(0, 2, 9) is None
    assert joined.reshape((24,), (3, 8)) is None
    assert origin.broadcast((4, 6), (4, 6, 2), (0, 1)).reshape((4, 6, 2), (4, 12)) is None


def test_traced_indices_are_compared_by_identity():
    origin = Origin.of_leaf('w', (4, 6))
    indices = [object(), object()]
    for first, second in itertools.product(indices, indices):
        assert origin.pin(0, first).is_same_as(origin.pin(0, second)) == (first is second)


DIVIDED = [
    ([], 0, 4),
    ([], 1, 3),
    ([reshaped((24, 8))], 0, 8),
    ([reshaped((24, 8))], 0, 24),
    ([transposed(2, 0, 1), sliced(0, 2, 4)], 0, 2),
    ([picked(1, 5)], 1, 8),
]


@pytest.mark.parametrize(('operations', 'axis', 'devices'), DIVIDED)
def test_devices_divide_an_axis_and_join_it_again(operations, axis, devices):
    whole = np.arange(np.prod(SHAPE)).reshape(SHAPE)
    origin = Origin.of_leaf('w', SHAPE)
    for operation in operations:
        origin, whole = operation(origin, whole)
    divided = origin.shard(axis, 'd', devices)
    parts = np.split(whole, devices, axis)
    for device, part in enumerate(parts):
        np.testing.assert_array_equal(elements(divided, part.shape, device), part)
    stacked = divided.stack_shards(['d'])
    np.testing.assert_array_equal(elements(stacked, (devices, *parts[0].shape)), np.stack(parts))
    joined = divided.concatenate_shards(['d'], devices, axis, parts[0].shape)
    np.testing.assert_array_equal(elements(joined, whole.shape), whole)
    # Whatever a device does to its part, the parts can be stacked.
    picked_parts = [part.take(0, axis) for part in parts]
    np.testing.assert_array_equal(
        elements(divided.pin(axis, 0).stack_shards(['d']), (devices, *picked_parts[0].shape)), np.stack(picked_parts)
    )


def test_what_devices_cannot_divide_or_join_is_given_up():
    origin = Origin.of_leaf('w', (6, 8))
    assert origin.reshape((6, 8), (48,)).shard(0, 'd', 4) is None
    assert origin.stack_shards(['d']) is None
    assert origin.shard(1, 'd', 4).pin(1, object()).stack_shards(['d']) is None
