"""Trace any forward to a program, and find the products in it that read a leaf of params."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
from jax.extend import core
from jaxtyping import PyTree

from sparselora_jax.pruning.tracing.operations import OF_BATCH, Operand
from sparselora_jax.pruning.tracing.origin import Origin
from sparselora_jax.pruning.tracing.products import Product
from sparselora_jax.pruning.tracing.walk import Visit, Walk
from sparselora_jax.sparse.axes import KernelAxes
from sparselora_jax.sparse.rules import leaves_by_path

NEVER_READ = (
    'the forward never multiplies with it, as part of its first argument; params from outside the function do not count'
)


class Program(NamedTuple):
    """A traced forward.

    Attributes:
      jaxpr: the program; its arguments are the arrays of params, then those of the batch.
      origins: the origin of each argument; None: it is no kernel, or belongs to the batch.
      num_params: number of arguments that belong to params.
      axes: {path: the roles of its axes} of all kernels that a product reads, in the order in which the program does.
      lost: {path: why}, of the other kernels.
      unfollowed: those of `lost` that are multiplied, in products that cannot be followed.
    """

    jaxpr: core.ClosedJaxpr
    origins: list[Origin | None]
    num_params: int
    axes: dict[str, KernelAxes]
    lost: dict[str, str]
    unfollowed: dict[str, str]

    def run(self, params: PyTree, batch: PyTree, visit: Visit, sums: PyTree = ()) -> None:
        """Run the program, and call `visit` with each product of a kernel; it is called under jit.

        Args:
          params: see `trace`.
          batch: see `trace`.
          visit: called as `visit(product, sums)` with each product of a kernel that `axes` holds.
          sums: tree of `jax.new_ref` that `visit` adds to. It gets them as they are seen at the place of the product:
            within `shard_map`, a program can only read and write what was passed to it.
        """

        def visit_kernel(product, sums):
            if product.path in self.axes:
                visit(replace(product, axes=self.axes[product.path]), sums)

        walk = Walk(visit_kernel, has_values=True, sums=sums)
        walk.run(self.jaxpr, self._arguments(arrays_of((params, batch))))

    def _arguments(self, values: Sequence[Any]) -> list[Operand]:
        return [
            Operand(value, origin, OF_BATCH if index >= self.num_params else frozenset())
            for index, (value, origin) in enumerate(zip(values, self.origins, strict=True))
        ]


def trace(
    forward: Callable[[Any, Any], Any], params: PyTree, batch: PyTree, is_kernel: Callable[[str], bool]
) -> Program:
    """Trace a forward, and find the products that read its kernels.

    Args:
      forward: `forward(params, batch)`; its result is discarded.
      params: any tree. Leaves that are no arrays are given to `forward` as they are.
      batch: any tree of arrays.
      is_kernel: path of an array of params -> whether to follow it.
    """
    leaves, structure = jax.tree.flatten((params, batch))

    def run(arrays):
        remaining = iter(arrays)
        whole = structure.unflatten([next(remaining) if is_array(leaf) else leaf for leaf in leaves])
        # The program needs results to be a program; what is no array cannot be one of them.
        return [result for result in jax.tree.leaves(forward(*whole)) if is_array(result)]

    # Shapes are enough: within `jit`, the arrays are tracers of the outer program.
    jaxpr = jax.make_jaxpr(run)(arrays_of((params, batch)))
    origins = [
        Origin.of_leaf(path, leaf.shape) if is_kernel(path) else None
        for path, leaf in leaves_by_path(params).items()
        if is_array(leaf)
    ]
    num_params = len(origins)
    origins += [None] * len(arrays_of(batch))
    program = Program(jaxpr, origins, num_params, {}, {}, {})
    return program._replace(**_analysis(program))


def is_array(leaf: object) -> bool:
    """Return whether a leaf is an array, or the shape of one."""
    return hasattr(leaf, 'shape') and hasattr(leaf, 'dtype')


def arrays_of(tree: PyTree) -> list[Any]:
    """Return the leaves of a tree that are arrays, in order: the arguments of a traced program.

    Args:
      tree: params, or a batch.
    """
    return [leaf for leaf in jax.tree.leaves(tree) if is_array(leaf)]


def _analysis(program: Program) -> dict[str, dict]:
    """Return what is known of the kernels of a program: the fields `axes`, `lost` and `unfollowed`."""
    products: dict[str, list[Product]] = {}

    def visit(product, sums):
        products.setdefault(product.path, []).append(product)

    # Without values nothing is computed: shapes and origins are enough.
    walk = Walk(visit, has_values=False)
    walk.run(program.jaxpr, program._arguments([None] * len(program.origins)))
    kernels = [origin.path for origin in program.origins if origin is not None]
    lost = {path: walk.lost.get(path, NEVER_READ) for path in kernels if path not in products}
    axes = {}
    for path, of_kernel in products.items():
        # Products that need different statistics cannot share one.
        common = _common_axes(of_kernel)
        conflict = _conflict(of_kernel) if common else 'products contract different axes of it'
        if conflict:
            lost[path] = conflict
            walk.unfollowed[path] = conflict
        else:
            axes[path] = common
    unfollowed = {path: reason for path, reason in walk.unfollowed.items() if path in lost}
    return {'axes': axes, 'lost': lost, 'unfollowed': unfollowed}


def _common_axes(products: Sequence[Product]) -> KernelAxes | None:
    """Return the roles that all products of a kernel give to its axes; None: they need different statistics."""
    outputs = {axis for product in products for axis in product.axes.outputs}
    common = set()
    for product in products:
        # One column of a matrix looks like a layer, until another product reads several columns.
        columns = outputs.intersection(product.axes.layers)
        is_one_index = columns <= {pin.axis for pin in product.origin.pins}
        # Where devices read columns of their own, their rows are placed as those of layers.
        if columns and (not is_one_index or product.placement.layers):
            return None
        layers = tuple(axis for axis in product.axes.layers if axis not in columns)
        common.add(KernelAxes(layers, product.axes.inputs, tuple(sorted(outputs))))
    # One statistic cannot serve a matrix and its transpose.
    return common.pop() if len(common) == 1 and not outputs.intersection(products[0].axes.inputs) else None


def _conflict(products: Sequence[Product]) -> str | None:
    """Return why the products of a kernel have no common statistic, though its axes have the same roles in them."""
    # Devices exchange what they have summed, which needs all of them.
    if any(product.placement.some_devices for product in products):
        return 'only some devices of a shard_map run a product with it'
    return None
