"""Unpacks a `Packed24` to an array, by the kernel of the platform that a program is lowered for.

On a mesh, XLA cannot partition a Pallas call: it would gather the whole packed kernel on every device. So the call is
wrapped in `custom_partitioning`. It tells XLA which part of the result each device computes from its part of the packed
arrays.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import CompoundFactor, SdyShardingRule, custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sparselora_jax.sparse.kernels.platforms import PLATFORMS
from sparselora_jax.sparse.packing.packed24 import BYTE, SCALED, Packed24, unpack24


def dense24(packed: Packed24, dtype: DTypeLike | None = None) -> Float[Array, '*layers inputs outputs']:
    """Return the kernel with its zeros, as `unpack24` does.

    A matrix is unpacked by the platform's own kernel if there is one; on GPUs it reads every byte once. On a mesh each
    device unpacks its part.

    Args:
      packed: one matrix, or a stack of them.
      dtype: dtype of the result; default: the dtype of the values (for int4, of the scales).
    """
    # The dtype in which `unpack24` computes, before it casts.
    unpacked_dtype = jnp.dtype('float32') if packed.scale is not None else packed.values.dtype
    branches = {}
    for name in PLATFORMS:
        platform = PLATFORMS.find(name)
        if platform.unpack is not None and platform.takes(unpacked_dtype, packed):
            branches[name] = functools.partial(unpacked_in_parts, dtype=unpacked_dtype, platform=name)
    if packed.ndim != 2 or not branches:
        return unpack24(packed, dtype)
    default = functools.partial(unpack24, dtype=unpacked_dtype)
    matrix = jax.lax.platform_dependent(packed, default=default, **branches)
    return matrix.astype(dtype or packed.dtype)


def unpacked_in_parts(
    packed: Packed24, dtype: DTypeLike, *, platform: str, interpret: bool = False
) -> Float[Array, 'inputs outputs']:
    """Unpack W by a platform's own kernel, where each device of a mesh computes its part.

    Args:
      packed: one matrix.
      dtype: dtype of its values; fp32 for int4 values.
      platform: a name of `PLATFORMS` that has an `unpack`.
      interpret: run the kernel by Pallas' interpreter.
    """
    return _unpacked(packed, dtype, platform, interpret)


@functools.partial(custom_partitioning, static_argnums=(1, 2, 3))
def _unpacked(packed, dtype, platform, interpret):
    return PLATFORMS.find(platform).unpack(packed, dtype, interpret=interpret)


def _partition(dtype, platform, interpret, mesh, arguments, result):
    """Return what one device does: (mesh, its function, sharding of the result, shardings of the arguments).

    XLA proposes a sharding of the result. This drops axes that would split an octet, a run with one scale, or outputs
    that the kernel reads together.
    """
    (packed,) = arguments
    inputs_axes, outputs_axes = [*result.sharding.spec, None, None][:2]
    inputs_parts = _devices_along(mesh, inputs_axes)
    outputs_parts = _devices_along(mesh, outputs_axes)
    indivisible = BYTE if packed.scale is None else SCALED  # inputs that share a byte of positions, or a scale
    if packed.inputs % (inputs_parts * indivisible):
        inputs_axes = None
        inputs_parts = 1
    if result.shape[-1] % (outputs_parts * PLATFORMS.find(platform).unpack_outputs):
        outputs_axes = None
    sharding = NamedSharding(mesh, PartitionSpec(inputs_axes, outputs_axes))

    def unpack(part):
        # `inputs` is static, so it still has the global value.
        part = dataclasses.replace(part, inputs=packed.inputs // inputs_parts)
        return PLATFORMS.find(platform).unpack(part, dtype, interpret=interpret)

    return mesh, unpack, sharding, (jax.tree.map(lambda array: sharding, packed),)


def _devices_along(mesh, axes: str | tuple[str, ...] | None) -> int:
    """Return the number of parts into which the mesh axes split a dimension."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(mesh.shape[name] for name in names)


def _sharding_rule(dtype, platform, interpret, mesh, operands, results):
    """Tell XLA's sharding propagation (Shardy) which dimensions of the arrays are split in the same way.

    The outputs always are. The inputs are, if each array's number of rows is a multiple of the smallest number. Then
    the factor `i` is that smallest number, and the factors `f0`, `f1`, ... are the multiples. Otherwise a split would
    cut an octet or a run with one scale, so the inputs of each array get an independent dimension.
    """
    del dtype, platform, interpret, mesh
    rows = [operand.shape[0] for operand in operands]
    inputs = results[0].shape[0]
    fewest = min(rows)
    if fewest == 1 or any(count % fewest for count in [*rows, inputs]):
        return ', '.join(f'i{index} o' for index in range(len(rows))) + ' -> i o'
    sizes = {f'f{index}': count // fewest for index, count in enumerate([*rows, inputs])}

    def mapping(name):
        # Shardy refuses factors of size 1.
        return ('i', 'o') if sizes[name] == 1 else (CompoundFactor('i', name), 'o')

    mappings = [mapping(name) for name in sizes]
    sizes = {name: size for name, size in sizes.items() if size > 1}
    return SdyShardingRule(tuple(mappings[:-1]), (mappings[-1],), **sizes)


_unpacked.def_partition(_partition, sharding_rule=_sharding_rule)
