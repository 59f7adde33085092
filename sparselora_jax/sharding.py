"""Where arrays live on many devices: a mesh of axes data, fsdp, tensor, and ordered rules path -> PartitionSpec."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from sparselora_jax import rules as rules_lib
from sparselora_jax.errors import SparseloraError
from sparselora_jax.weights import Lora

AXES = ('data', 'fsdp', 'tensor')
BATCH = PartitionSpec(('data', 'fsdp'))  # of a batch's leading axis

# Kernels are [layers, in, out], a head's [in, out]. Attention's and the MLP's first kernels split their outputs, the
# second their inputs.
RULES = (
    ('.*blocks/.*/(q|k|v|gate|up|fc1)/kernel', PartitionSpec(None, 'fsdp', 'tensor')),
    ('.*blocks/.*/(o|down|fc2)/kernel', PartitionSpec(None, 'tensor', 'fsdp')),
    ('.*embed', PartitionSpec('tensor', 'fsdp')),
    ('.*head/kernel', PartitionSpec('fsdp', 'tensor')),
    ('.*', PartitionSpec()),
)


class MeshError(SparseloraError, ValueError):
    """A mesh that the devices cannot form."""


def make_mesh(*, data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh.

    Raises:
      MeshError: the product of the axes is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if data * fsdp * tensor != len(devices):
        raise MeshError(
            f'a mesh of data={data}, fsdp={fsdp}, tensor={tensor} needs {data * fsdp * tensor} devices, '
            f'there are {len(devices)}'
        )
    return Mesh(np.asarray(devices).reshape(data, fsdp, tensor), AXES)


def fitting(mesh: Mesh | AbstractMesh, spec: PartitionSpec, shape: tuple[int, ...]) -> NamedSharding:
    """The spec, but for axes that don't divide evenly (few key/value heads): those are replicated."""
    spec = [*spec, *[None] * (len(shape) - len(spec))][: len(shape)]

    def fits(axis: str | tuple[str, ...] | None, size: int) -> bool:
        names = (axis,) if isinstance(axis, str) else axis or ()
        return size % math.prod(mesh.shape[name] for name in names) == 0

    kept = [axis if fits(axis, size) else None for axis, size in zip(spec, shape, strict=True)]
    return NamedSharding(mesh, PartitionSpec(*kept))


def shardings(tree: dict, mesh: Mesh | AbstractMesh, rules: Sequence[tuple[str, PartitionSpec]] = RULES) -> dict:
    """A NamedSharding for every array of params, masks or lora.

    The factors of a `Lora` follow their kernel; so do the arrays of a packed one, each as far as its own axes divide.

    Raises:
      RuleError: a path that no rule matches.
    """
    flat = rules_lib.flatten(tree)

    def of(path: str, leaf: Any) -> Any:
        spec = rules_lib.first_match(rules, path)
        if isinstance(leaf, Lora):
            layers, inputs, outputs = [*spec, None, None, None][:3]
            a, b = PartitionSpec(layers, inputs, None), PartitionSpec(layers, None, outputs)
            return Lora(fitting(mesh, a, leaf.a.shape), fitting(mesh, b, leaf.b.shape), leaf.scale)
        return jax.tree.map(lambda array: fitting(mesh, spec, array.shape), leaf)

    return rules_lib.unflatten({path: of(path, leaf) for path, leaf in flat.items()})


def shard(tree: dict, mesh: Mesh, rules: Sequence[tuple[str, PartitionSpec]] = RULES) -> dict:
    """Puts params, masks or lora onto the mesh."""
    return jax.device_put(tree, shardings(tree, mesh, rules))


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Splits the leading axis of every array over data and fsdp together."""
    return jax.device_put(batch, NamedSharding(mesh, BATCH))
