"""Apply methods to kernels: to the kernels of any tree, in one shot, or to those that are pruned together."""

import contextlib
import functools
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, PyTree

from sparselora_jax.pruning.calibrate import CalibrationError, InputStatistic
from sparselora_jax.pruning.method import Method, MethodError, check_statistic, prunes_jointly
from sparselora_jax.pruning.one_pass import Target
from sparselora_jax.pruning.targets import (
    Methods,
    PatternRules,
    methods_of,
    pattern_zeros,
    patterns_of,
    per_group,
)
from sparselora_jax.pruning.verdict import call_method, explain, is_right
from sparselora_jax.sparse import sharding
from sparselora_jax.sparse.axes import KernelAxes, matrix_shape
from sparselora_jax.sparse.patterns import Pattern
from sparselora_jax.sparse.rules import flatten, paths_of, unflatten, with_leaves


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
    """Add the path of a kernel to the errors of its method, which does not know it."""
    try:
        yield
    except (CalibrationError, MethodError) as error:
        raise type(error)(f'{path}: {error}') from error


@functools.partial(jax.jit, static_argnames=('method', 'pattern'))
def _prune_kernel(
    kernel: Array, statistic: PyTree, zeros: ArrayLike | None, *, method: Method, pattern: Pattern
) -> tuple[Array, Array, Bool[Array, '']]:
    """Prune one kernel or a stack of them, and return (pruned, mask, whether they are right)."""
    if kernel.ndim == 2:
        pruned, mask = call_method(method, kernel, statistic, pattern, zeros)
    else:
        # One layer at a time: all at once would need memory for the scores of all layers.
        pruned, mask = jax.lax.map(
            lambda layer: call_method(method, layer[0], layer[1], pattern, layer[2]), (kernel, statistic, zeros)
        )
    # Statistics that a caller brings were not checked when they were summed.
    has_finite_statistic = jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(statistic)]).all()
    return pruned, mask, has_finite_statistic & is_right(method, pattern, kernel, pruned, mask, zeros)


@functools.partial(jax.jit, static_argnames=('method', 'pattern', 'places'))
def _prune_joined(
    kernels: tuple[Array, ...],
    statistic: PyTree,
    zeros: ArrayLike | None,
    *,
    method: Method,
    pattern: Pattern,
    places: tuple[NamedSharding, ...] | None,
) -> tuple[list[Array], list[Array], Bool[Array, '']]:
    """Prune kernels that share a statistic as one wide kernel, and return (pruned kernels, masks, whether right).

    Args:
      kernels: `[inputs, outputs]` each.
      statistic: statistic of the input that they share.
      zeros: number of zeros of each comparison group, for all kernels in order.
      method: method of all kernels.
      pattern: pattern of all kernels.
      places: sharding of each kernel on a mesh. A method walks along inputs, so each device prunes some outputs with
        all their inputs, and no comparison group is split.
    """
    # [inputs, outputs of all kernels]: a method sees one wide kernel.
    kernel = jnp.concatenate(kernels, axis=-1)
    constrain = jax.lax.with_sharding_constraint
    if places is not None:
        mesh = places[0].mesh
        outputs = sharding.fitting(mesh, PartitionSpec(None, ('fsdp', 'tensor')), kernel.shape)
        # Every device needs the whole statistic: each output is pruned along all inputs.
        statistic = jax.tree.map(lambda leaf: constrain(leaf, NamedSharding(mesh, PartitionSpec())), statistic)
        kernel = constrain(kernel, outputs)
    pruned, mask = call_method(method, kernel, statistic, pattern, zeros)
    if places is not None:
        pruned, mask = constrain((pruned, mask), outputs)
    # Split into the original kernels.
    ends = np.cumsum([kernel.shape[-1] for kernel in kernels])[:-1].tolist()
    results = (jnp.split(pruned, ends, axis=-1), jnp.split(mask, ends, axis=-1))
    if places is not None:
        # Back to the kernels' own shardings, where the next block expects them.
        results = constrain(results, (list(places), list(places)))
    return *results, is_right(method, pattern, kernel, pruned, mask, zeros)


def prune_tree(
    params: PyTree,
    stats: Mapping[str, InputStatistic] | None,
    rules: PatternRules,
    *,
    method: Methods,
    zeros: dict[str, np.ndarray] | None = None,
) -> tuple[PyTree, dict]:
    """Prune any tree of kernels in one shot.

    Args:
      params: any tree. Statistics tell which of its leaves are kernels, and the roles of their axes. Without them,
        kernels are leaves called `kernel` of nested dicts: `[inputs, outputs]` or, within a dict called `blocks`,
        stacks `[layers, inputs, outputs]`.
      stats: what `collect` returned; None for a method without a statistic.
      rules: `(regex, pattern)` in order; every kernel must match.
      method: `Magnitude()`, `Random()`, `Wanda()`, `SparseGPT()`, `DSnoT()`, or rules `(regex, method)` if towers use
        different methods.
      zeros: path -> number of zeros of each layer's kernel (a scalar if the kernel is not stacked). It replaces the
        number that the pattern implies (see `pruning.allocate`).

    Returns:
      (params with zeros in place, masks). Masks are a nested dict with the paths of the pruned kernels.

    Raises:
      PatternError: a pattern does not fit its kernel.
      RuleError: see `rules.match`.
      CalibrationError: a kernel lacks the statistic that its method needs, or has another one; or a weight or a
        statistic is not finite.
      MethodError: an object is not a pruning method; or a method fails, or does not do what it promises (`Method`).

    >>> from sparselora_jax.pruning import Magnitude
    >>> params = {'q': {'kernel': jnp.array([[1.0], [-2.0]])}}
    >>> pruned, masks = prune_tree(params, None, [('.*', 0.5)], method=Magnitude())
    >>> pruned['q']['kernel'].tolist()
    [[0.0], [-2.0]]
    """
    leaves = paths_of(params)
    axes = {path: axes for path, (_, _, axes) in (stats or {}).items() if path in leaves and axes is not None}
    methods = methods_of(params, method, axes)
    patterns = patterns_of(params, rules, axes)
    shapes = {path: matrix_shape(leaves[path].shape, axes.get(path)) for path in patterns}
    totals = pattern_zeros(
        {path: jax.ShapeDtypeStruct(shape, leaves[path].dtype) for path, shape in shapes.items()},
        patterns,
        methods,
        zeros,
    )
    # Check all statistics before the first kernel is pruned.
    statistics = {path: _statistic_for(path, methods[path], shapes[path], stats or {}) for path in patterns}
    masks = {}
    for path, pattern in patterns.items():
        of_kernel = methods[path]
        *layers, inputs, outputs = shapes[path]
        # One axis of layers, whatever the kernel has.
        stack = [math.prod(layers)] if layers else []
        counts = None
        if not pattern.structured:
            # [layers, groups], or [groups] for a kernel that is not stacked.
            per_layer = [per_group(of_kernel, pattern, outputs, int(total)) for total in totals[path].reshape(-1)]
            counts = np.stack(per_layer) if layers else per_layer[0]
        statistic = _with_layers(statistics[path], len(layers), stack)
        roles = axes.get(path) or KernelAxes.of_stack(len(shapes[path]))
        dense = roles.to_matrix(jnp.asarray(leaves[path])).reshape(*stack, inputs, outputs)
        # `pattern.kind` drops the sparsity, which is in the counts, so one program serves every sparsity.
        with _naming(path):
            pruned, mask, right = _prune_kernel(dense, statistic, counts, method=of_kernel, pattern=pattern.kind)
        if not right:
            raise explain(path, of_kernel, pattern, dense, statistic, pruned, mask, counts)
        shape = tuple(leaves[path].shape)
        leaves[path] = roles.from_matrix(pruned, shape)
        masks[path] = roles.from_matrix(mask, shape)
    return with_leaves(params, {path: leaves[path] for path in masks}), unflatten(masks)


def _with_layers(statistic: PyTree, num_axes: int, stack: Sequence[int]) -> PyTree:
    """Return a statistic whose first axes, those of the kernel's layers, are joined to one."""
    return jax.tree.map(lambda leaf: leaf.reshape(*stack, *leaf.shape[num_axes:]), statistic)


def _statistic_for(path: str, method: Method, shape: tuple[int, ...], stats: Mapping[str, InputStatistic]) -> PyTree:
    """Return the statistic of a kernel that its method needs; None: it needs none.

    Args:
      path: path of the kernel.
      method: method of the kernel.
      shape: shape of the kernel, `[*layers, inputs, outputs]`.
      stats: what `collect` returned.

    Raises:
      CalibrationError: it is missing, or its shape is that of another statistic.
    """
    if method.statistic is None:
        return None
    if path not in stats:
        raise CalibrationError(f'{path}: no statistic; run collect with a forward that uses it')
    statistic = stats[path].total
    *layers, inputs, _outputs = shape
    check_statistic(method, statistic, inputs, layers=layers, path=path)
    return statistic


def kernels_pruned_as_one(
    patterns: Mapping[str, Pattern], methods: Mapping[str, Method], inputs: Mapping[str, Hashable]
) -> list[list[str]]:
    """Group the names of a block's kernels: each group is pruned together.

    Args:
      patterns: pattern of each kernel to prune, by name.
      methods: method of each of these kernels, by name.
      inputs: identity of each kernel's input; kernels may be joined if these values are equal.
    """
    groups: dict[Hashable, list[str]] = {}
    for name, pattern in patterns.items():
        method = methods[name]
        is_joint = prunes_jointly(method, pattern)
        # Methods with the same options are equal, so kernels of different rules can still be joined.
        group = (inputs[name], method, pattern.kind) if is_joint else name
        groups.setdefault(group, []).append(name)
    return list(groups.values())


def prune_matrices(
    w: Mapping[str, Array],
    stats: Mapping[str, InputStatistic],
    patterns: Mapping[str, Pattern],
    methods: Mapping[str, Method],
    zeros: Mapping[str, int],
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Prune kernels `[inputs, outputs]` of one block, and return (pruned kernels, masks).

    Kernels that share their statistic (q, k and v) are pruned together if that does not change the result. Then one
    Hessian is inverted for them, and one loop runs over their inputs.

    Args:
      w: the block's weights, by name.
      stats: statistic of each kernel to prune, by name.
      patterns: pattern of each kernel to prune, by name.
      methods: method of each kernel to prune, by name.
      zeros: number of zeros of each of these kernels.
    """
    # `calibrate` gives kernels that read the same array the very same statistic.
    inputs = {name: (id(stats[name][0]), w[name].dtype) for name in patterns}
    pruned: dict[str, Array] = {}
    masks: dict[str, Array] = {}
    for names in kernels_pruned_as_one(patterns, methods, inputs):
        method = methods[names[0]]
        pattern = patterns[names[0]]
        statistic = stats[names[0]][0] if method.statistic else None
        counts = [per_group(method, patterns[name], w[name].shape[-1], zeros[name]) for name in names]
        # N:M has no counts: each entry is None.
        if len(names) == 1 or pattern.structured:
            joined_counts = counts[0]
        else:
            joined_counts = np.concatenate(counts)
        kernels = tuple(w[name] for name in names)
        places = tuple(map(sharding.on_mesh, kernels))
        with _naming(names[0]):
            new_kernels, new_masks, right = _prune_joined(
                kernels,
                statistic,
                joined_counts,
                method=method,
                pattern=pattern.kind,
                places=None if None in places else places,
            )
        if not right:
            results = zip(names, kernels, new_kernels, new_masks, counts, strict=True)
            errors = [
                explain(name, method, pattern, kernel, statistic, new_kernel, new_mask, zeros_of_kernel)
                for name, kernel, new_kernel, new_mask, zeros_of_kernel in results
            ]
            raise next(filter(None, errors))
        pruned.update(zip(names, new_kernels, strict=True))
        masks.update(zip(names, new_masks, strict=True))
    return pruned, masks


def prune_targets(
    targets: Mapping[str, Target],
    patterns: Mapping[str, Pattern],
    methods: Mapping[str, Method],
    zeros: Mapping[str, int | np.integer | np.ndarray],
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Prune kernels of any layout whose statistics are complete, and return (pruned kernels, masks), by name.

    Args:
      targets: the kernels, by name.
      patterns: pattern of each kernel, by path.
      methods: method of each kernel, by path.
      zeros: number of zeros of each kernel, by name: one number, or one for each of its layers.
    """
    pruned: dict[str, Array] = {}
    masks: dict[str, Array] = {}
    # Experts and other layers that one product reads are pruned one by one; matrices may be pruned together.
    single = {name: target for name, target in targets.items() if math.prod(_layer_sizes(target)) == 1}
    stats = _without_layers({name: target.statistic for name, target in single.items()})
    new_kernels, new_masks = prune_matrices(
        {name: _as_matrix(target.kernel, target.statistic.axes) for name, target in single.items()},
        stats,
        {name: patterns[target.path] for name, target in single.items()},
        {name: methods[target.path] for name, target in single.items()},
        {name: int(np.sum(zeros[name])) for name in single},
    )
    for name, target in single.items():
        pruned[name] = _from_matrix(new_kernels[name], target)
        masks[name] = _from_matrix(new_masks[name], target)
    # `prune_tree` knows how to go through layers.
    for name in targets.keys() - single.keys():
        target = targets[name]
        pattern = patterns[target.path]
        given = None if pattern.structured else {name: np.reshape(zeros[name], _layer_sizes(target))}
        rules = [('.*', str(pattern))]
        tree, tree_masks = prune_tree(
            {name: target.kernel}, {name: target.statistic}, rules, method=methods[target.path], zeros=given
        )
        pruned[name] = tree[name]
        masks[name] = flatten(tree_masks)[name]
    return pruned, masks


def _layer_sizes(target: Target) -> tuple[int, ...]:
    return target.statistic.axes.sizes(target.kernel.shape)[0]


def _without_layers(stats: Mapping[str, InputStatistic]) -> dict[str, InputStatistic]:
    """Return statistics of one layer each without the axes of layers; those that were shared are shared again."""
    totals: dict[int, PyTree] = {}
    without = {}
    for name, (total, tokens, axes) in stats.items():
        num_axes = len(axes.layers)
        if num_axes and id(total) not in totals:
            totals[id(total)] = jax.tree.map(lambda leaf, num=num_axes: leaf.reshape(leaf.shape[num:]), total)
        without[name] = InputStatistic(totals.get(id(total), total), tokens, axes)
    return without


def _as_matrix(kernel: Array, axes: KernelAxes) -> Array:
    # A copy of a kernel that is a matrix already would need its memory twice.
    if axes == KernelAxes.of_stack(2):
        return kernel
    return axes.to_matrix(kernel).reshape(axes.sizes(kernel.shape)[1:])


def _from_matrix(matrix: Array, target: Target) -> Array:
    axes = target.statistic.axes
    return matrix if axes == KernelAxes.of_stack(2) else axes.from_matrix(matrix, target.kernel.shape)
