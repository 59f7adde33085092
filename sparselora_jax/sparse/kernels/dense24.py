"""A `Packed24` as an array, lowered for the platform that a program is compiled for."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import CompoundFactor, SdyShardingRule, custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from sparselora_jax.sparse.kernels import gpu
from sparselora_jax.sparse.packing.packed24 import BYTE, SCALED, Packed24, unpack24


def dense24(packed: Packed24, dtype: Any = None) -> Float[Array, '*layers inputs outputs']:
    """`unpack24`; on GPUs a matrix is unpacked by a kernel, which reads every byte once; on a mesh each its part."""
    made = jnp.dtype('float32') if packed.scale is not None else packed.values.dtype  # as `unpack24`, before it casts
    if packed.ndim != 2 or not gpu.takes(made, packed):
        return unpack24(packed, dtype)
    cuda = functools.partial(unpacked_in_parts, dtype=made)
    matrix = jax.lax.platform_dependent(packed, default=functools.partial(unpack24, dtype=made), cuda=cuda)
    return matrix.astype(dtype or packed.dtype)


def unpacked_in_parts(packed: Packed24, dtype: Any, *, interpret: bool = False) -> Float[Array, 'inputs outputs']:
    """`gpu.unpacked`, of which each device of a mesh makes what is made of its parts of the arrays."""
    return _unpacked(packed, dtype, interpret)


@functools.partial(custom_partitioning, static_argnums=(1, 2))
def _unpacked(packed, dtype, interpret):
    return gpu.unpacked(packed, dtype, interpret=interpret)


def _partition(dtype, interpret, mesh, arguments, result):
    """What a device does: (mesh, its function, where the result lies, where the arguments do)."""
    (packed,), where = arguments, result.sharding
    inputs, outputs = [*where.spec, None, None][:2]
    parts, across = (math.prod(mesh.shape[axis] for axis in _axes(split)) for split in (inputs, outputs))
    whole = BYTE if packed.scale is None else SCALED  # inputs that are not cut
    if packed.inputs % (parts * whole):
        inputs, parts = None, 1
    if result.shape[-1] % (2 * across):  # `gpu.takes`
        outputs = None
    where = NamedSharding(mesh, PartitionSpec(inputs, outputs))

    def unpack(part):
        part = dataclasses.replace(part, inputs=packed.inputs // parts)
        return gpu.unpacked(part, dtype, interpret=interpret)

    return mesh, unpack, where, (jax.tree.map(lambda array: where, packed),)


def _axes(split: Any) -> tuple[str, ...]:
    return (split,) if isinstance(split, str) else split or ()


def _rule(dtype, interpret, mesh, operands, results):
    """Which dimensions are split alike: outputs, and inputs where no octet, or run with one scale, is cut."""
    del dtype, interpret, mesh
    rows = [operand.shape[0] for operand in operands]
    (inputs, _), fewest = results[0].shape, min(rows)
    if fewest == 1 or any(count % fewest for count in [*rows, inputs]):
        return ', '.join(f'i{at} o' for at in range(len(rows))) + ' -> i o'
    sizes = {f'f{at}': count // fewest for at, count in enumerate([*rows, inputs])}

    def mapping(name):
        return ('i', 'o') if sizes[name] == 1 else (CompoundFactor('i', name), 'o')

    mappings = [mapping(name) for name in sizes]
    sizes = {name: size for name, size in sizes.items() if size > 1}
    return SdyShardingRule(tuple(mappings[:-1]), (mappings[-1],), **sizes)


_unpacked.def_partition(_partition, sharding_rule=_rule)
