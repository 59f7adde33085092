"""Sharding of arrays: a mesh with the axes data, fsdp and tensor, and ordered rules path -> PartitionSpec."""

import dataclasses
import functools
import math
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PyTree

from sparselora_jax.runtime.errors import SparseloraError
from sparselora_jax.sparse.axes import KernelAxes
from sparselora_jax.sparse.dropout import Dropout
from sparselora_jax.sparse.rules import (
    SHOWN,
    block_path,
    first_match,
    flatten,
    is_in_block,
    kernels,
    name_in_block,
    named_kernel,
    unflatten,
)
from sparselora_jax.sparse.weights import Lora

AXES = ('data', 'fsdp', 'tensor')
BATCH = PartitionSpec(('data', 'fsdp'))  # sharding of a batch's leading axis

# Shardings of decoded rows, and of their caches [rows, heads, slots, head_dim]. Rows are not split along fsdp: each
# token would then gather all weights, instead of summing a few activations across devices.
DECODED = PartitionSpec('data')
CACHE = PartitionSpec('data', 'tensor')

# Kernels are [layers, in, out], and a head's kernel is [in, out]. The first kernels of attention and MLP split their
# outputs along tensor, the second ones their inputs. So no activations move between the two.
RULES = (
    ('.*blocks/.*/(q|k|v|gate|up|fc1)/kernel', PartitionSpec(None, 'fsdp', 'tensor')),
    ('.*blocks/.*/(o|down|fc2)/kernel', PartitionSpec(None, 'tensor', 'fsdp')),
    ('.*embed', PartitionSpec('tensor', 'fsdp')),
    ('.*head/kernel', PartitionSpec('fsdp', 'tensor')),
    # Small, and used once a forward: not split on purpose.
    ('(.*/)?(patch|projection|project_in|project_out|projector|projector/fc[12])/kernel', PartitionSpec()),
    ('.*', PartitionSpec()),
)

# Lines about kernels that no rule splits, which are printed once.
_TOLD: set[str] = set()

ShardingRules = Sequence[tuple[str, PartitionSpec]]


class MeshError(SparseloraError, ValueError):
    """A mesh that the devices cannot form."""


def check_mesh(mesh: object) -> None:
    """Check that an object is a mesh.

    Args:
      mesh: what a user gave as a mesh; None: none.

    Raises:
      MeshError: it is something else.
    """
    if mesh is not None and not isinstance(mesh, Mesh):
        raise MeshError(f'mesh is a {type(mesh).__name__}: expected a mesh, such as that of sharding.make_mesh(data=2)')


def make_mesh(*, data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Return a mesh with these axis sizes.

    Args:
      data: number of devices that split the rows of a batch; each has whole weights.
      fsdp: number of devices that split rows and weights; weights are gathered where they are used.
      tensor: number of devices that split weights and products.
      devices: the devices to use; default: all.

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
    """Return the sharding of a spec, in which axes that do not divide evenly are replicated.

    For example, a model may have fewer key/value heads than the tensor axis has devices.

    Args:
      mesh: a mesh from `make_mesh`.
      spec: may be shorter or longer than the shape; missing axes are replicated, extra ones dropped.
      shape: shape of the array.
    """
    axes = [*spec, *[None] * (len(shape) - len(spec))][: len(shape)]

    # An array axis may be split along one mesh axis, along several together, or not at all.
    def divides(axis: str | tuple[str, ...] | None, size: int) -> bool:
        names = (axis,) if isinstance(axis, str) else axis or ()
        return size % math.prod(mesh.shape[name] for name in names) == 0

    fitting_axes = [axis if divides(axis, size) else None for axis, size in zip(axes, shape, strict=True)]
    return NamedSharding(mesh, PartitionSpec(*fitting_axes))


def shardings(tree: dict, mesh: Mesh | AbstractMesh, rules: ShardingRules = RULES) -> dict:
    """Return a NamedSharding for every array of params, masks or lora.

    The factors of a `Lora` are sharded like their kernel. So are the arrays of a packed kernel, each as far as its own
    axes divide.

    Args:
      tree: arrays or their shapes.
      mesh: a mesh from `make_mesh`.
      rules: `(regex, PartitionSpec)` in order.

    Raises:
      RuleError: a path that no rule matches.
    """

    def shard_array(spec: PartitionSpec, part: Any) -> NamedSharding | Lora | Dropout:
        if isinstance(part, Dropout):
            # The keys are those of the rows of a batch, so they are where their rows are.
            of_rows = PartitionSpec(*[None] * (part.keys.ndim - 1), *BATCH)
            return dataclasses.replace(part, keys=fitting(mesh, of_rows, part.keys.shape))
        if not isinstance(part, Lora):
            return fitting(mesh, spec, part.shape)
        # A is [*layers, in, rank] and B [*layers, rank, out]: each is split along its kernel's axis only.
        axes = part.axes or KernelAxes.of_stack(part.a.ndim)
        of_axes = [*spec, *[None] * (len(axes.order) - len(spec))]
        layers = [of_axes[axis] for axis in axes.layers]
        # Several axes of inputs are one axis of A, which is split like the first of them.
        inputs, outputs = (of_axes[role[0]] if role else None for role in (axes.inputs, axes.outputs))
        a = fitting(mesh, PartitionSpec(*layers, inputs, None), part.a.shape)
        b = fitting(mesh, PartitionSpec(*layers, None, outputs), part.b.shape)
        return dataclasses.replace(part, a=a, b=b)

    def shard_leaf(path: str, leaf: Any) -> PyTree:
        spec = first_match(rules, path)
        return jax.tree.map(
            lambda part: shard_array(spec, part), leaf, is_leaf=lambda part: isinstance(part, Lora | Dropout)
        )

    return unflatten({path: shard_leaf(path, leaf) for path, leaf in flatten(tree).items()})


def undivided(shapes: dict, mesh: Mesh | AbstractMesh) -> list[str]:
    """Return a warning for each mesh axis that does not divide all its kernels, with the nearest mesh that does.

    Args:
      shapes: the shapes of params.
      mesh: a mesh from `make_mesh`.
    """
    lines = []
    for axis in ('fsdp', 'tensor'):
        split_sizes: dict[str, int] = {}  # path -> size of the dimension that this axis should split
        for path, leaf in kernels(shapes).items():
            for name, size in zip(first_match(RULES, path), leaf.shape, strict=False):
                if name == axis:
                    split_sizes[path] = size
        devices = mesh.shape[axis]
        odd = {path: size for path, size in split_sizes.items() if size % devices}
        if odd:
            path, size = next(iter(odd.items()))
            divisors = (count for count in range(devices, 0, -1) if devices % count == 0)
            fits = next(count for count in divisors if not any(size % count for size in split_sizes.values()))
            # The remaining devices split rows instead.
            better = dict(mesh.shape) | {axis: fits, 'data': mesh.shape['data'] * devices // fits}
            lines.append(
                f'{axis}={devices} does not divide {len(odd)} of {len(split_sizes)} kernels, e.g. the {size} of '
                f'{path}: they are replicated on every device; '
                f'{", ".join(f"{name}={n}" for name, n in better.items())} divides all'
            )
    return lines


def shard(tree: dict, mesh: Mesh, rules: ShardingRules = RULES) -> dict:
    """Put params, masks or lora onto the mesh; print a line, once, about kernels that no rule splits.

    Args:
      tree: arrays.
      mesh: a mesh from `make_mesh`.
      rules: `(regex, PartitionSpec)` in order.
    """
    line = _tell_unsplit(tree, mesh, rules)
    if line and line not in _TOLD and jax.process_index() == 0:
        print(line, file=sys.stderr, flush=True)
    _TOLD.add(line)
    return jax.device_put(tree, shardings(tree, mesh, rules))


def _tell_unsplit(tree: dict, mesh: Mesh, rules: ShardingRules) -> str:
    """Return a line about the kernels that only the last rule, for every path, matches; '' if there are none."""
    paths = [path for path in flatten(tree) if named_kernel(path)]
    *own, (last, spec) = rules
    # Without such a last rule every kernel has a rule of its own. With one device along both axes nothing is split.
    if last != '.*' or any(spec) or mesh.shape['fsdp'] * mesh.shape['tensor'] == 1:
        return ''
    unsplit = [path for path in paths if not any(re.fullmatch(pattern, path) for pattern, _ in own)]
    if not unsplit:
        return ''
    shown = ', '.join(unsplit[:SHOWN]) + (f' and {len(unsplit) - SHOWN} more' if len(unsplit) > SHOWN else '')
    return (
        f'sharding: no rule splits {len(unsplit)} of {len(paths)} kernels, so every device holds all of them: {shown}; '
        "pass shard(tree, mesh, rules=[(REGEX, PartitionSpec(...)), ..., ('.*', PartitionSpec())])"
    )


def everywhere(tree: PyTree, mesh: Mesh) -> PyTree:
    """Replicate arrays on all devices of the mesh, unless they are on a mesh already.

    Args:
      tree: arrays.
      mesh: a mesh from `make_mesh`.
    """

    def put(leaf):
        if isinstance(getattr(leaf, 'sharding', None), NamedSharding):
            return leaf
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec()))

    return jax.tree.map(put, tree)


def local_rows(mesh: Mesh, batch: int) -> list[int]:
    """Return the indices of the batch rows that this process's devices hold.

    Args:
      mesh: a mesh from `make_mesh`.
      batch: number of rows of the global batch.
    """
    # A set, since devices along tensor hold the same rows.
    slices = NamedSharding(mesh, BATCH).addressable_devices_indices_map((batch,))
    return sorted({row for (rows,) in slices.values() for row in range(batch)[rows]})


def shard_batch(rows: PyTree, mesh: Mesh) -> PyTree:
    """Split the leading axis of every array over data and fsdp together.

    Args:
      rows: a batch; with several processes, each passes its `local_rows`.
      mesh: a mesh from `make_mesh`.
    """
    where = NamedSharding(mesh, BATCH)
    return jax.tree.map(lambda array: jax.make_array_from_process_local_data(where, array), rows)


def on_mesh(array: object) -> NamedSharding | None:
    """Return the sharding of an array on a mesh from `make_mesh`; None: it is not on one.

    Args:
      array: an array, or any other object.
    """
    where = getattr(array, 'sharding', None)
    # A mesh from the user's own code may have other axes, which are unknown here.
    return where if isinstance(where, NamedSharding) and where.mesh.axis_names == AXES else None


def mesh_of(tree: PyTree) -> Mesh | None:
    """Return the mesh that holds the arrays of a tree; None: they are on no mesh.

    Args:
      tree: arrays.
    """
    return next((where.mesh for where in map(on_mesh, jax.tree.leaves(tree)) if where is not None), None)


def mesh_of_rows(batch: PyTree) -> Mesh | None:
    """Return the mesh over which `shard_batch` split the rows of a batch; None: they are not split.

    Args:
      batch: arrays.
    """
    places = (where for where in map(on_mesh, jax.tree.leaves(batch)) if where is not None)
    return next((where.mesh for where in places if tuple(where.spec)[:1] == tuple(BATCH)), None)


def row_parts(mesh: Mesh | AbstractMesh | None) -> int:
    """Return the number of parts into which `shard_batch` splits rows.

    Args:
      mesh: a mesh from `make_mesh`; None: one device.
    """
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in BATCH[0])


def on_own_rows(function: Callable[..., Any], mesh: Mesh | AbstractMesh | None) -> Callable[[Any, Any], Any]:
    """Return `function(weights, batch)` run by each device separately, on whole weights and its own rows.

    Each device runs the same program as a single device with that many rows, so the results have the same bits. Along
    tensor the compiler still divides weights and products. All results are split by rows.

    Args:
      function: the function to wrap; it is called under jit.
      mesh: see `mesh_of_rows`; None: one device, the function is returned unchanged.
    """
    if mesh is None:
        return function

    @functools.wraps(function)
    def run(weights, batch):
        rows = jax.tree.leaves(batch)[0].shape[0]
        # Arrays without rows, such as a table of positions, are replicated.
        split = jax.tree.map(lambda leaf: BATCH if leaf.shape[:1] == (rows,) else PartitionSpec(), batch)
        on_each_device = jax.shard_map(
            function,
            mesh=mesh,
            in_specs=(PartitionSpec(), split),
            out_specs=BATCH,
            axis_names=set(BATCH[0]),  # tensor is left to the compiler
            check_vma=False,
        )
        return on_each_device(weights, batch)

    return run


def gathered(tree: dict, mesh: Mesh | AbstractMesh) -> dict:
    """Return the shardings of weights after a program has gathered them along fsdp, where they are stored.

    Args:
      tree: arrays or their shapes.
      mesh: a mesh from `make_mesh`.
    """
    # Nothing is split along fsdp any more; tensor still divides the products.
    rules = [(regex, PartitionSpec(*(None if axis == 'fsdp' else axis for axis in spec))) for regex, spec in RULES]
    return shardings(tree, mesh, rules)


def split_rows(tree: PyTree, mesh: Mesh | AbstractMesh | None, spec: PartitionSpec = BATCH) -> PyTree:
    """Split activations under jit, so that each device has its own rows.

    Args:
      tree: arrays whose leading axis is rows.
      mesh: a mesh from `make_mesh`; None: one device, the tree is returned unchanged.
      spec: how the rows are split.
    """
    if mesh is None:
        return tree
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, fitting(mesh, spec, leaf.shape)), tree)


def top_k(
    scores: Float[Array, 'rows candidates'], k: int, *, mesh: Mesh | None
) -> tuple[Float[Array, 'rows {k}'], Int[Array, 'rows {k}']]:
    """Return `jax.lax.top_k` of decoded rows, where each device handles its own rows.

    Without this, the compiler would gather all rows on every device.

    Args:
      scores: the score of each candidate.
      k: number of candidates to return for each row.
      mesh: the mesh of the rows; None: one device.
    """

    def find_best(scores):
        return tuple(jax.lax.top_k(scores, k))

    if mesh is None:
        return find_best(scores)
    spec = fitting(mesh, DECODED, scores.shape).spec
    return jax.shard_map(find_best, mesh=mesh, in_specs=spec, out_specs=spec)(scores)


def gathering(run: Callable[..., Any], mesh: Mesh | AbstractMesh) -> Callable[..., Any]:
    """Return a runner in which each block gathers its own weights, and each device has its own rows.

    Otherwise the compiler may split products along the inputs, over fsdp. Then every device has all rows, and
    activations must be summed across devices.

    Args:
      run: a runner of blocks.
      mesh: a mesh from `make_mesh`.
    """

    def run_gathering(tower, block, weights, x, ctx, cache=None):
        # Rules match whole paths, so restore the whole paths of the stack's weights to look up their shardings.
        whole_paths = unflatten({block_path(tower, name): leaf for name, leaf in flatten(weights).items()})
        stacked = flatten(gathered(whole_paths, mesh))
        of_one_block = unflatten({name_in_block(path): _without_layers(leaf) for path, leaf in stacked.items()})

        def gathering_block(w, x, ctx, cache):
            w = jax.lax.with_sharding_constraint(w, of_one_block)
            x, cache = block(w, split_rows(x, mesh), ctx, cache)
            return split_rows(x, mesh), cache

        return run(tower, gathering_block, weights, split_rows(x, mesh), ctx, cache)

    return run_gathering


def _without_layers(stacked: PyTree) -> PyTree:
    """Return the shardings of one layer of stacked arrays."""
    return jax.tree.map(lambda where: NamedSharding(where.mesh, PartitionSpec(*where.spec[1:])), stacked)


def gather_outside_blocks(weights: dict, mesh: Mesh | AbstractMesh) -> dict:
    """Gather the weights outside blocks, under jit: embeddings, heads, final norms.

    Args:
      weights: params, bound or not.
      mesh: a mesh from `make_mesh`.
    """
    flat = flatten(weights)
    outside = unflatten({path: leaf for path, leaf in flat.items() if not is_in_block(path)})
    whole = jax.lax.with_sharding_constraint(outside, gathered(outside, mesh))
    return unflatten(flat | flatten(whole))
