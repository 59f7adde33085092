"""Prune every kernel of a model: a method prunes one kernel, the functions here apply it to all layers."""

import contextlib
import functools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, PyTree

from sparselora_jax.pruning import calibrate
from sparselora_jax.pruning.calibrate import CalibrationError, InputStatistic
from sparselora_jax.pruning.calibration_inputs import check_forward
from sparselora_jax.pruning.method import Method, MethodError, check_statistic, prunes_jointly
from sparselora_jax.pruning.reconstruct import Reconstruct, Targets, block_reconstructor, check_reconstruct
from sparselora_jax.pruning.targets import (
    Methods,
    PatternRules,
    in_blocks,
    matrix_shape,
    methods_of,
    pattern_zeros,
    patterns_of,
    per_group,
)
from sparselora_jax.pruning.verdict import call_method, explain, is_right
from sparselora_jax.pruning.walk import block_observer, joined, walk
from sparselora_jax.runtime import processes
from sparselora_jax.sparse import sharding
from sparselora_jax.sparse.axes import KernelAxes
from sparselora_jax.sparse.patterns import Pattern
from sparselora_jax.sparse.rules import RuleError, block_path, flatten, paths_of, unflatten, with_leaves


class PruneResult(NamedTuple):
    """Pruned params (zeros in place), their masks, and the tokens that each pruned kernel was calibrated on."""

    params: dict
    masks: dict
    tokens: dict[str, int]


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


def prune(
    forward: Callable[..., Any],
    params: dict,
    batches: Iterable[dict],
    rules: PatternRules,
    *,
    method: Methods,
    zeros: dict[str, np.ndarray] | None = None,
    chunk: int = 8,
    reconstruct: Reconstruct | None = None,
    keep: Callable[[str, int, Array, Array], None] | None = None,
    progress: Callable[[str, int, int], None] = lambda tower, layer, layers: None,
) -> PruneResult:
    """Prune a model block by block; each block is calibrated on the outputs of the pruned blocks before it.

    `forward` runs once over the whole calibration set. This function runs its stacks of blocks, `chunk` samples at a
    time. So memory holds the hidden states of all samples and the statistics of one block. A block is compiled once for
    all its layers, or twice if `chunk` does not divide the number of samples.

    Args:
      forward: `forward(weights, batch, run)`, which passes its blocks to `run` (see `models.runners`).
      params: a tree whose stacked blocks are at `<tower>/blocks`, where `<tower>` is the name that `forward` passes to
        `run`. The leaves of blocks may be weights on disk: any object with a shape whose `leaf[layer]` is a layer's
        array.
      batches: dicts of arrays of one shape, samples first.
      rules: `(regex, pattern)`; only kernels inside blocks can be pruned.
      method: see `prune_tree`.
      zeros: see `prune_tree`.
      chunk: number of samples processed at a time on each device that has its own samples (docs/scaling.md says what is
        then the same as on one device).
      reconstruct: how the kept weights of each block are trained once it is pruned, to give the dense block's output;
        None: they stay as the method returns them. Memory then holds twice the hidden states of all samples.
      keep: `keep(path, layer, kernel, mask)` is called with each layer as soon as it is pruned. The result then holds
        the unchanged `params` and no masks. It is for a model that does not fit into memory, or fits only once. A layer
        is read only once, before this call, so `keep` may overwrite a numpy array.
      progress: called before each block with (tower, layer, layers).

    Returns:
      The pruned params and masks, unless `keep` takes them, and the number of tokens of each pruned kernel.

    Raises:
      CalibrationError: there is no batch, activations or weights are not finite, or `forward` is no function.
      PatternError: see `prune_tree`.
      RuleError: see `prune_tree`; or a kernel that the forward does not run in a block.
      MethodError: see `prune_tree`.
      ReconstructError: `reconstruct` is no `Reconstruct`, or its batch does not fit the chunks.
    """
    check_forward(forward, 'params', 'batch', 'run')
    samples = joined(batches, chunk)
    mesh = sharding.mesh_of_rows(samples)
    parts = sharding.row_parts(mesh)
    check_reconstruct(reconstruct, chunk * parts, parts)
    patterns = patterns_of(params, rules)
    methods = methods_of(params, method)
    totals = pattern_zeros(flatten(params), patterns, methods, zeros)
    pruned_layers: dict[str, list[Array]] = {}
    mask_layers: dict[str, list[Array]] = {}
    tokens: dict[str, int] = {}
    dead_inputs: dict[str, list[ArrayLike]] = {}

    def collect(path, layer, kernel, mask):
        pruned_layers.setdefault(path, []).append(kernel)
        mask_layers.setdefault(path, []).append(mask)

    # Without `keep` layers are gathered here and stacked at the end.
    take = keep or collect

    def enter(tower, block):
        paths = in_blocks(patterns, tower)
        block_patterns = {name: patterns[path] for name, path in paths.items()}
        block_methods = {name: methods[path] for name, path in paths.items()}
        # A method without a statistic gets squares, to count tokens and to find activations that are not finite.
        stats_of = {name: method.statistic or calibrate.squares for name, method in block_methods.items()}
        observe = block_observer(block, stats_of.get, mesh)
        if reconstruct:
            targets = Targets(block, mesh, reconstruct.target)
            train = block_reconstructor(block, reconstruct, mesh)

        def visit(layer, layers, w, chunks):
            progress(tower, layer, layers)
            if not paths:  # the tower stays dense
                return w

            def place(name, _layer):
                return f'{block_path(tower, name)}, layer {layer}'

            # The inputs of this block come from the pruned blocks before it.
            stats = observe(unflatten(w), chunks, place)
            counts = {name: int(totals[path][layer]) for name, path in paths.items()}
            pruned, masks = _prune_block(w, stats, block_patterns, block_methods, counts)
            if reconstruct:
                wanted = targets.of_layer(w, chunks)
                pruned = train(w, pruned, masks, chunks, wanted, f'{tower}/blocks, layer {layer}')
            for name, path in paths.items():
                take(path, layer, pruned[name], masks[name])
                tokens[path] = int(stats[name][1])
                if methods[path].statistic is not None:
                    count = calibrate.count_dead_inputs(methods[path].statistic, stats[name][0])
                    dead_inputs.setdefault(path, []).append(count)
            # The walk then runs the samples through the pruned block.
            return w | pruned

        return visit

    walk(forward, params, samples, enter, chunk=chunk)
    # Kernels outside the blocks were never visited. To leave them dense without an error would break the pattern.
    missed = sorted(patterns.keys() - tokens.keys())
    if missed:
        raise RuleError(f'{missed[0]}: not inside the blocks of a tower that the forward runs; make it dense')
    flat = flatten(params)
    dead_by_path = {path: np.stack([processes.on_host(count) for count in dead_inputs[path]]) for path in dead_inputs}
    calibrate.warn_about_dead_inputs(dead_by_path, {path: flat[path].shape[-2] for path in dead_by_path})
    masks = {}
    for path in list(pruned_layers):  # popped, so that at most one stack exists twice
        flat[path] = jnp.stack(pruned_layers.pop(path))
        masks[path] = jnp.stack(mask_layers.pop(path))
    return PruneResult(unflatten(flat), unflatten(masks), tokens)


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


def _prune_block(
    w: dict[str, Array],
    stats: dict[str, InputStatistic],
    patterns: dict[str, Pattern],
    methods: dict[str, Method],
    zeros: dict[str, int],
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Prune the kernels of one block, and return (pruned kernels, masks).

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
