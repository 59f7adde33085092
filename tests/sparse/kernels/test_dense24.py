"""A packed kernel as an array: on a mesh each device unpacks its own part (here by the GPU's kernel, interpreted)."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import sparselora_jax as sl
from sparselora_jax.sparse import sharding
from sparselora_jax.sparse.kernels.dense24 import unpacked_in_parts
from sparselora_jax.sparse.packing.packed24 import pack24, quantise24, unpack24

OUTPUTS = 16
BY_OUTPUTS, BY_INPUTS, WHOLE = PartitionSpec(None, 'tensor'), PartitionSpec('tensor'), PartitionSpec()


def packed_kernel(inputs, four_bits):
    dense = jax.random.normal(jax.random.key(0), (inputs, OUTPUTS), jnp.bfloat16)
    mask = sl.mask_from_scores(jnp.abs(dense), '2:4')
    packed = pack24(jnp.where(mask, dense, jnp.zeros((), dense.dtype)), mask)
    return quantise24(packed) if four_bits else packed


@pytest.mark.slow
@pytest.mark.parametrize('four_bits', [False, True])
@pytest.mark.parametrize(
    ('inputs', 'split', 'sent'),
    [
        (512, WHOLE, []),
        pytest.param(512, BY_OUTPUTS, [], marks=pytest.mark.slow),
        (512, BY_INPUTS, ['all-reduce']),  # of the product alone
        pytest.param(40, BY_OUTPUTS, [], marks=pytest.mark.slow),
        (40, BY_INPUTS, None),  # no device has whole octets, or a whole run with one scale
        (36, BY_OUTPUTS, []),  # the last octet is filled up
    ],
)
def test_each_device_of_a_mesh_unpacks_its_part(inputs, split, sent, four_bits):
    packed, mesh = packed_kernel(inputs, four_bits), sharding.make_mesh(tensor=4)
    dtype = jnp.dtype('float32' if four_bits else 'bfloat16')
    placed = jax.tree.map(lambda array: jax.device_put(array, sharding.fitting(mesh, split, array.shape)), packed)
    unpack = jax.jit(lambda packed: unpacked_in_parts(packed, dtype, platform='cuda', interpret=True))
    np.testing.assert_array_equal(unpack(placed), unpack24(packed, dtype))

    x = jnp.ones((8, inputs), dtype)
    x = jax.device_put(x, sharding.fitting(mesh, PartitionSpec(None, *split[:1]), x.shape))
    multiply = jax.jit(lambda x, packed: x @ unpacked_in_parts(packed, dtype, platform='cuda', interpret=True))
    found = re.findall(
        r'= \S+ (all-\w+|reduce-scatter|collective-\w+)\(', multiply.lower(x, placed).compile().as_text()
    )
    assert sent is None or found == sent
