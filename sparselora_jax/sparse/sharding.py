"""Where arrays live on many devices: a mesh of axes data, fsdp, tensor, and ordered rules path -> PartitionSpec."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from sparselora_jax.runtime.errors import SparseloraError
from sparselora_jax.sparse import rules as rules_lib
from sparselora_jax.sparse.weights import Lora

AXES = ('data', 'fsdp', 'tensor')
BATCH = PartitionSpec(('data', 'fsdp'))  # of a batch's leading axis
# Of what is decoded, and of its caches [rows, heads, slots, head_dim]. Not along fsdp: each token would gather all
# weights, where it now adds up its few activations.
DECODED, CACHE = PartitionSpec('data'), PartitionSpec('data', 'tensor')

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

    The factors of a `Lora` follow their kernel, bound to it or not; so do the arrays of a packed one, each as far as
    its own axes divide.

    Raises:
      RuleError: a path that no rule matches.
    """
    flat = rules_lib.flatten(tree)

    def arrays(spec: PartitionSpec, part: Any) -> Any:
        if not isinstance(part, Lora):
            return fitting(mesh, spec, part.shape)
        *layers, inputs, outputs = [*spec, *[None] * (part.a.ndim - len(spec))]
        a, b = PartitionSpec(*layers, inputs, None), PartitionSpec(*layers, None, outputs)
        return Lora(fitting(mesh, a, part.a.shape), fitting(mesh, b, part.b.shape), part.scale)

    def of(path: str, leaf: Any) -> Any:
        spec = rules_lib.first_match(rules, path)
        return jax.tree.map(lambda part: arrays(spec, part), leaf, is_leaf=lambda part: isinstance(part, Lora))

    return rules_lib.unflatten({path: of(path, leaf) for path, leaf in flat.items()})


def undivided(shapes: dict, mesh: Mesh | AbstractMesh) -> list[str]:
    """A line for each axis that does not divide all kernels that it should split, with the nearest mesh that does.

    Args:
      shapes: params, by shapes.
    """
    lines = []
    for axis in ('fsdp', 'tensor'):
        split: dict[str, int] = {}  # path -> the dimension that this axis should split
        for path, leaf in rules_lib.kernels(shapes).items():
            for name, size in zip(rules_lib.first_match(RULES, path), leaf.shape, strict=False):
                split |= {path: size} if name == axis else {}
        devices = mesh.shape[axis]
        if odd := {path: size for path, size in split.items() if size % devices}:
            path, size = next(iter(odd.items()))
            fits = next(n for n in range(devices, 0, -1) if devices % n == 0 and not any(s % n for s in split.values()))
            better = dict(mesh.shape) | {axis: fits, 'data': mesh.shape['data'] * devices // fits}
            lines.append(
                f'{axis}={devices} does not divide {len(odd)} of {len(split)} kernels, e.g. the {size} of {path}: they '
                f'lie whole on every device; {", ".join(f"{name}={n}" for name, n in better.items())} divides all'
            )
    return lines


def shard(tree: dict, mesh: Mesh, rules: Sequence[tuple[str, PartitionSpec]] = RULES) -> dict:
    """Puts params, masks or lora onto the mesh."""
    return jax.device_put(tree, shardings(tree, mesh, rules))


def everywhere(tree: Any, mesh: Mesh) -> Any:
    """What is not on the mesh yet, whole on each of its devices."""

    def put(leaf):
        on_mesh = isinstance(getattr(leaf, 'sharding', None), NamedSharding)
        return leaf if on_mesh else jax.device_put(leaf, NamedSharding(mesh, PartitionSpec()))

    return jax.tree.map(put, tree)


def local_rows(mesh: Mesh, batch: int) -> list[int]:
    """The rows of a batch of this size that devices of this process hold."""
    where = NamedSharding(mesh, BATCH).addressable_devices_indices_map((batch,))
    return sorted({row for (rows,) in where.values() for row in range(batch)[rows]})


def shard_batch(rows: Any, mesh: Mesh) -> Any:
    """Splits the leading axis of every array over data and fsdp together.

    Args:
      rows: a batch; of many processes, each has its `local_rows`.
    """
    where = NamedSharding(mesh, BATCH)
    return jax.tree.map(lambda array: jax.make_array_from_process_local_data(where, array), rows)


def on_mesh(array: Any) -> NamedSharding | None:
    """Where an array lies on a mesh of `make_mesh`; None: it does not."""
    where = getattr(array, 'sharding', None)
    return where if isinstance(where, NamedSharding) and where.mesh.axis_names == AXES else None


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh on which the arrays of a tree lie; None: on none."""
    return next((where.mesh for where in map(on_mesh, jax.tree.leaves(tree)) if where is not None), None)


def mesh_of_rows(batch: Any) -> Mesh | None:
    """The mesh over which `shard_batch` has split the rows of a batch; None: it has not."""
    found = (where for where in map(on_mesh, jax.tree.leaves(batch)) if where is not None)
    return next((where.mesh for where in found if tuple(where.spec)[:1] == tuple(BATCH)), None)


def row_parts(mesh: Mesh | AbstractMesh | None) -> int:
    """Into how many parts `shard_batch` splits rows; None: one device."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in BATCH[0])


def on_own_rows(function: Callable[..., Any], mesh: Mesh | AbstractMesh | None) -> Callable[[Any, Any], Any]:
    """`function(weights, batch)`, in a program, as each device runs it alone: whole weights, its own rows of the batch.

    What a device runs is the program of one device with as many rows, so they come out with the same bits. Along tensor
    the compiler still divides weights and products. All results are split by rows.

    Args:
      mesh: see `mesh_of_rows`; None: one device, the function as it is.
    """
    if mesh is None:
        return function

    @functools.wraps(function)
    def run(weights, batch):
        rows = jax.tree.leaves(batch)[0].shape[0]
        split = jax.tree.map(lambda leaf: BATCH if leaf.shape[:1] == (rows,) else PartitionSpec(), batch)
        knobs = {'mesh': mesh, 'axis_names': set(BATCH[0]), 'check_vma': False}
        return jax.shard_map(function, in_specs=(PartitionSpec(), split), out_specs=BATCH, **knobs)(weights, batch)

    return run


def gathered(tree: dict, mesh: Mesh | AbstractMesh) -> dict:
    """`shardings` of weights that a program has gathered along fsdp: that axis only says where they are kept."""
    rules = [(regex, PartitionSpec(*(None if axis == 'fsdp' else axis for axis in spec))) for regex, spec in RULES]
    return shardings(tree, mesh, rules)


def split_rows(tree: Any, mesh: Mesh | AbstractMesh | None, spec: PartitionSpec = BATCH) -> Any:
    """Activations, in a program: each device with rows of its own; mesh None: one device, the tree as it is."""
    if mesh is None:
        return tree
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, fitting(mesh, spec, leaf.shape)), tree)


def top_k(
    scores: Float[Array, 'rows candidates'], k: int, *, mesh: Mesh | None
) -> tuple[Float[Array, 'rows {k}'], Int[Array, 'rows {k}']]:
    """`jax.lax.top_k` of decoded rows: each device's own. The compiler would gather all rows on every device.

    Args:
      mesh: None: one device.
    """

    def best(own):
        return tuple(jax.lax.top_k(own, k))

    if mesh is None:
        return best(scores)
    rows = fitting(mesh, DECODED, scores.shape).spec
    return jax.shard_map(best, mesh=mesh, in_specs=rows, out_specs=rows)(scores)


def gathering(run: Callable[..., Any], mesh: Mesh | AbstractMesh) -> Callable[..., Any]:
    """A runner: `run`, where each block gathers its own weights, and every device has rows of its own.

    Left to itself the compiler may split products along fsdp's inputs instead: all rows on every device, activations to
    be added up.
    """

    def run_gathering(tower, block, weights, x, ctx, cache=None):
        prefix = f'{tower}/blocks/'
        flat = {prefix + name: leaf for name, leaf in rules_lib.flatten(weights).items()}
        stacked = rules_lib.flatten(gathered(rules_lib.unflatten(flat), mesh))
        of_layer = rules_lib.unflatten({path.removeprefix(prefix): _one_layer(leaf) for path, leaf in stacked.items()})

        def gathering_block(w, x, ctx, cache):
            x, cache = block(jax.lax.with_sharding_constraint(w, of_layer), split_rows(x, mesh), ctx, cache)
            return split_rows(x, mesh), cache

        return run(tower, gathering_block, weights, split_rows(x, mesh), ctx, cache)

    return run_gathering


def _one_layer(stacked: Any) -> Any:
    return jax.tree.map(lambda where: NamedSharding(where.mesh, PartitionSpec(*where.spec[1:])), stacked)


def gather_outside_blocks(weights: dict, mesh: Mesh | AbstractMesh) -> dict:
    """Embeddings, heads and whatever else is no block's, gathered, in a program."""
    flat = rules_lib.flatten(weights)
    outside = rules_lib.unflatten({path: leaf for path, leaf in flat.items() if '/blocks/' not in path})
    whole = jax.lax.with_sharding_constraint(outside, gathered(outside, mesh))
    return rules_lib.unflatten(flat | rules_lib.flatten(whole))
