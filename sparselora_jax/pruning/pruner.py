"""Prune a model kernel by kernel: each kernel is calibrated on what the pruned kernels before it compute."""

import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree

from sparselora_jax.pruning import calibrate
from sparselora_jax.pruning.calibrate import InputStatistic
from sparselora_jax.pruning.calibration_inputs import (
    CalibrationError,
    CheckedBatches,
    TokenWeights,
    WeightedBatch,
    check_batches,
    check_forward,
    check_params,
    check_weights,
    naming_lines,
)
from sparselora_jax.pruning.kernels import prune_matrices, prune_targets
from sparselora_jax.pruning.one_pass import Chunk, Level, OnePass, Place, Target
from sparselora_jax.pruning.reconstruct import Reconstruct, Targets, block_reconstructor, check_reconstruct
from sparselora_jax.pruning.targets import (
    Methods,
    PatternRules,
    check_visited,
    in_blocks,
    methods_of,
    pattern_zeros,
    patterns_of,
)
from sparselora_jax.pruning.tracing import program as tracing
from sparselora_jax.pruning.tracing.schedule import Schedule, layer_axes, make_schedule
from sparselora_jax.pruning.walk import BlockPass, block_observer, joined, naming, walk
from sparselora_jax.runtime import processes
from sparselora_jax.sparse import sharding
from sparselora_jax.sparse.axes import KernelAxes, matrix_shape
from sparselora_jax.sparse.patterns import parse_pattern
from sparselora_jax.sparse.rules import (
    block_path,
    first_match,
    flatten,
    name_in_block,
    paths_of,
    unflatten,
    with_leaves,
)


class PruneResult(NamedTuple):
    """The result of `prune`.

    Attributes:
      params: the pruned params, with zeros in place.
      masks: the masks of the pruned kernels.
      tokens: number of tokens that each pruned kernel was calibrated on.
      axes: the roles of the axes of the kernels of any forward, for `init_lora` and others; empty for a model whose
        blocks were run: its kernels are `[layers, inputs, outputs]`.
    """

    params: PyTree
    masks: dict
    tokens: dict[str, int]
    axes: dict[str, KernelAxes]


SEQUENTIAL = ('kernel', 'layer')


def prune(
    forward: Callable[..., Any],
    params: PyTree,
    batches: Iterable[Any],
    rules: PatternRules,
    *,
    method: Methods,
    zeros: dict[str, np.ndarray] | None = None,
    weights: TokenWeights = None,
    sequential: str = 'kernel',
    chunk: int = 8,
    reconstruct: Reconstruct | None = None,
    offload: bool = False,
    keep: Callable[[str, int, Array, Array], None] | None = None,
    progress: Callable[[str, int, int], None] = lambda tower, layer, layers: None,
) -> PruneResult:
    """Prune a model; each kernel is calibrated on what the pruned kernels before it compute.

    Any forward that JAX can trace will do. Its program is cut at its kernels (`tracing.schedule`), and each product
    runs once. Each batch is a chunk that runs at once.

    On a mesh, the compiler divides the work as the shardings of `params` and `batches` say. Masks then differ from
    those of one device in near-ties at most.

    The models of this package, and others that take a runner (`models.runners`), can do more: masks on a mesh are those
    of one device (docs/scaling.md), and blocks may be reconstructed. This function then runs their stacks of blocks,
    `chunk` samples at a time. So memory holds the hidden states of all samples and the statistics of one block. A block
    is compiled once for all its layers, or twice if `chunk` does not divide the number of samples.

    Args:
      forward: `forward(params, batch)`, or `forward(params, batch, run)`, which passes its blocks to `run`. A third
        argument with a default is a runner only if it is called `run`.
      params: any tree of arrays. With `run`, a tree whose stacked blocks are at `<tower>/blocks`, where `<tower>` is
        the name that `forward` passes to `run`. The leaves of blocks may be weights on disk: any object with a shape
        whose `leaf[layer]` is a layer's array.
      batches: what `forward` takes. With `run`, dicts of arrays, samples first.
      rules: `(regex, pattern)`; with `run`, only kernels inside blocks can be pruned.
      method: see `prune_tree`.
      zeros: see `prune_tree`.
      weights: a weight for each token, see `collect`. With `run`, pads are known by `ctx['valid']`, see `Block`.
      sequential: `'kernel'`: as above. `'layer'`: all kernels of a block are calibrated on the block before any of them
        is pruned, as the code of Wanda and SparseGPT does; the block then runs twice. It needs a forward with `run`.
      chunk: with `run`, number of samples processed at a time on each device that has its own samples (docs/scaling.md
        says what is then the same as on one device).
      reconstruct: how the kept weights of each block are trained once it is pruned, to give the dense block's output;
        None: they stay as the method returns them. Memory then holds twice the hidden states of all samples.
      offload: whether activations wait in the memory of the host while no program reads them. Device memory then holds
        those of one chunk, besides the statistics and the weights of one block. Copying takes time. Without `run`, give
        the batches as arrays of NumPy.
      keep: `keep(path, layer, kernel, mask)` is called with each layer as soon as it is pruned. The result then holds
        the unchanged `params` and no masks. It is for a model that does not fit into memory, or fits only once. A layer
        is read only once, before this call, so `keep` may overwrite a numpy array. Without `run`, layers are counted
        over all axes of layers, and kernel and mask have the layout of the leaf; experts that one product reads come
        together, under the number of the first.
      progress: called before each block with (tower, layer, layers); without `run`, before each cut of the program
        with (path, pruned kernels, kernels), where each layer of a stack counts.

    Returns:
      The pruned params and masks, unless `keep` takes them, the number of tokens of each pruned kernel, and the roles
      of the axes of kernels.

    Raises:
      CalibrationError: there is no batch, activations or weights are not finite, or `forward` is no function.
      PatternError: see `prune_tree`.
      RuleError: see `prune_tree`; or a kernel that the forward does not run in a block.
      MethodError: see `prune_tree`.
      ReconstructError: `reconstruct` is no `Reconstruct`, or its batch does not fit the chunks.
    """
    # Checked before the forward is looked at, since a misspelt word says nothing about it.
    if sequential not in SEQUENTIAL:
        raise CalibrationError(f'sequential {sequential!r}: expected one of {", ".join(SEQUENTIAL)}')
    for name, function in {'keep': keep, 'progress': progress}.items():
        if not (callable(function) or (function is None and name == 'keep')):
            raise CalibrationError(f'{name} is a {type(function).__name__}: expected a function, see sl.prune')
    if not _takes_runner(forward):
        asked = {"sequential='layer'": sequential == 'layer', 'reconstruct': reconstruct}
        for name in (name for name, is_asked in asked.items() if is_asked):
            raise CalibrationError(f'{name} needs a forward with blocks: forward(params, batch, run), models.runners')
        return _prune_program(
            forward,
            params,
            batches,
            rules,
            method=method,
            zeros=zeros,
            weights=weights,
            offload=offload,
            keep=keep,
            progress=progress,
        )
    if weights is not None:
        raise CalibrationError(
            "weights: expected a forward without blocks; blocks are given ctx['valid'], True where a row is no pad"
        )
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
        one_pass = OnePass(methods.__getitem__, mesh, offload)
        observe = block_observer(block, stats_of.get, mesh)
        blocks = BlockPass(block, paths, mesh)
        if reconstruct:
            targets = Targets(block, mesh, reconstruct.target, offload=offload)
            train = block_reconstructor(block, reconstruct, mesh)

        def visit(layer, layers, w, chunks):
            progress(tower, layer, layers)
            if not paths:  # the tower stays dense
                return w, None

            def place(name, _layer=None):
                return f'{block_path(tower, name)}, layer {layer}'

            counts = {name: int(totals[path][layer]) for name, path in paths.items()}
            pruned: dict[str, Array] = {}
            masks: dict[str, Array] = {}
            stats: dict[str, InputStatistic] = {}
            outputs = None
            # The inputs of this block come from the pruned blocks before it.
            if sequential == 'layer':
                with naming(tower, layer):
                    stats = observe(unflatten(w), chunks, place)
                    pruned, masks = prune_matrices(w, stats, block_patterns, block_methods, counts)
            else:
                # Called for each group of kernels that read the same activations.
                def prune_cut(targets):
                    zeros_of = {place: totals[target.path][layer] for place, target in targets.items()}
                    new_kernels, new_masks = prune_targets(targets, patterns, methods, zeros_of)
                    for place, target in targets.items():
                        name = name_in_block(target.path)
                        pruned[name] = new_kernels[place]
                        masks[name] = new_masks[place]
                        stats[name] = target.statistic
                    return new_kernels

                one_pass.prune = prune_cut
                outputs = blocks.run(layer, w, chunks, one_pass)
            if reconstruct:
                wanted = targets.of_layer(w, chunks)
                pruned = train(w, pruned, masks, chunks, wanted, f'{tower}/blocks, layer {layer}')
                outputs = None  # those of the kernels as they were pruned
            for name, path in paths.items():
                take(path, layer, pruned[name], masks[name])
                tokens[path] = int(stats[name][1])
                if methods[path].statistic is not None:
                    count = calibrate.count_dead_inputs(methods[path].statistic, stats[name][0])
                    dead_inputs.setdefault(path, []).append(count)
            return w | pruned, outputs

        return visit

    walk(forward, params, samples, enter, chunk=chunk, offload=offload)
    check_visited(patterns, tokens)
    flat = flatten(params)
    dead_by_path = {path: np.stack([processes.on_host(count) for count in dead_inputs[path]]) for path in dead_inputs}
    calibrate.warn_about_dead_inputs(dead_by_path, {path: flat[path].shape[-2] for path in dead_by_path})
    masks = {}
    for path in list(pruned_layers):  # popped, so that at most one stack exists twice
        flat[path] = jnp.stack(pruned_layers.pop(path))
        masks[path] = jnp.stack(mask_layers.pop(path))
    return PruneResult(unflatten(flat), unflatten(masks), tokens, {})


def _takes_runner(forward: object) -> bool:
    """Return whether a forward has a third argument that runs its blocks: one called `run`, or one without a default.

    Raises:
      CalibrationError: it is no function of params and a batch.
    """
    try:
        arguments = list(inspect.signature(forward).parameters.values())
    except (TypeError, ValueError):  # no function, or one that is not written in Python
        arguments = []
    third = arguments[2] if len(arguments) > 2 else None
    # Others are options of the user's model, such as `train=False`, or the `*args` that `apply` of Flax has.
    takes = (
        third is not None
        and third.kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        and (third.name == 'run' or third.default is inspect.Parameter.empty)
    )
    check_forward(forward, 'params', 'batch', *(['run'] if takes else []))
    return takes


def _prune_program(
    forward: Callable[[PyTree, Any], Any],
    params: PyTree,
    batches: Iterable[Any],
    rules: PatternRules,
    *,
    method: Methods,
    zeros: dict[str, np.ndarray] | None,
    weights: TokenWeights,
    offload: bool,
    keep: Callable[[str, int, Array, Array], None] | None,
    progress: Callable[[str, int, int], None],
) -> PruneResult:
    """Prune the kernels of any forward; see `prune`."""
    check_batches(batches)
    check_params(params)
    check_weights(weights)
    forward = naming_lines(forward)
    checked = list(CheckedBatches(batches, weights))
    if not checked:
        raise CalibrationError('the calibration set is empty: no batch arrived')
    weighted = [batch if weights is not None else WeightedBatch(batch, None) for batch in checked]
    batches = [batch for batch, _ in weighted]
    followed = calibrate.kernel_paths(params)
    # A traced program has fixed shapes, so batches of another size have a program of their own.
    programs: dict[Any, tracing.Program] = {}
    keys = []
    for batch in batches:
        leaves, structure = jax.tree.flatten(batch)
        # A number of Python has the dtype of an array, but does not change that of other arrays.
        kinds = tuple((np.shape(leaf), jnp.result_type(leaf), getattr(leaf, 'weak_type', False)) for leaf in leaves)
        keys.append((structure, kinds))
        if keys[-1] not in programs:
            programs[keys[-1]] = tracing.trace(forward, params, batch, followed.__contains__)
            calibrate.check_found(programs[keys[-1]])
            # A cut sees its own kernels only, so this is checked beforehand.
            if weights is not None:
                calibrate.check_weights_fit(forward, params, checked[len(keys) - 1])
    axes = programs[keys[0]].axes
    leaves = paths_of(params)
    patterns = patterns_of(params, rules, axes)
    methods = methods_of(params, method, axes)
    shapes = {path: matrix_shape(leaves[path].shape, axes[path]) for path in patterns}
    dtypes = {path: jax.ShapeDtypeStruct(shape, leaves[path].dtype) for path, shape in shapes.items()}
    calibrate.warn_about_unfollowed(_passed_over(programs.values(), rules))
    totals = pattern_zeros(dtypes, patterns, methods, zeros)
    num_kernels = sum(total.size for total in totals.values())
    # The layers of a stack are pruned one by one, and joined at the end unless `keep` takes them.
    parts: dict[str, list[_Pruned]] = {path: [] for path in patterns}
    layer_sizes = {path: axes[path].sizes(leaves[path].shape)[0] for path in patterns}

    def prune_cut(targets: dict[str, Target]) -> dict[str, Array]:
        first = next(iter(targets.values()))
        progress(first.path, sum(map(len, parts.values())), num_kernels)
        of_layers = {}
        for name, target in targets.items():
            # Experts that one product reads are still together; the layers of a scan are not.
            index = tuple(target.place.index.get(axis, slice(None)) for axis in axes[target.path].layers)
            of_layers[name] = totals[target.path][index]
        kernels, masks = prune_targets(targets, patterns, methods, of_layers)
        for name, target in targets.items():
            part = _Pruned(target, target.place.to_leaf(kernels[name]), target.place.to_leaf(masks[name]))
            # Only the statistic's counts are needed once the layer is taken.
            if keep is not None:
                keep(target.path, _layer_number(target, axes[target.path], layer_sizes[target.path]), *part[1:])
                part = _Pruned(target, None, None)
            parts[target.path].append(part)
        return kernels

    arrays = tracing.arrays_of(params)
    numbers = {key: number for number, key in enumerate(programs)}
    levels = [
        Level.of_arguments(make_schedule(program, is_pruned=patterns.__contains__), arrays)
        for program in programs.values()
    ]
    for level in levels:
        _check_layer_axes(level.schedule)
    chunks = []
    for key, (batch, of_tokens) in zip(keys, weighted, strict=True):
        values = levels[numbers[key]].values_of_chunk(tracing.arrays_of(batch))
        chunks.append(Chunk(numbers[key], values, lambda path, of_tokens=of_tokens: of_tokens))
    places = {path: Place.of_leaf(path, leaves[path].shape) for path in patterns}
    one_pass = OnePass(methods.__getitem__, offload=offload)
    one_pass.prune = prune_cut
    one_pass.run(levels, chunks, places)
    for path in patterns:
        _check_layers(path, leaves[path].shape, parts[path])
    kernels = {} if keep else {path: _joined(leaves[path].shape, parts[path]) for path in patterns}
    _warn_about_dead_inputs(parts, methods, {path: shape[-2] for path, shape in shapes.items()})
    return PruneResult(
        with_leaves(params, {path: kernel for path, (kernel, _) in kernels.items()}),
        unflatten({path: mask for path, (_, mask) in kernels.items()}),  # empty if `keep` took the masks
        {path: int(parts[path][-1].target.statistic.tokens.min()) for path in patterns},
        dict(axes),
    )


def _passed_over(programs: Iterable[tracing.Program], rules: PatternRules) -> dict[str, str]:
    """Return {path: why} of the arrays that a forward multiplies and rules prune, but that cannot be followed."""
    reasons = {path: reason for program in programs for path, reason in program.unfollowed.items()}
    dense = ('.*', 'dense')
    return {
        path: reason for path, reason in reasons.items() if not parse_pattern(first_match([*rules, dense], path)).dense
    }


class _Pruned(NamedTuple):
    """A kernel that was pruned, or a layer of a stack: its kernel and mask in the layout of the leaf.

    Both are None once `keep` has taken them.
    """

    target: Target
    kernel: Array | None
    mask: Array | None


def _layer_number(target: Target, axes: KernelAxes, sizes: Sequence[int]) -> int:
    """Return the number of the first layer that a target holds, counted over all axes of layers; 0 without layers."""
    number = 0
    for axis, size in zip(axes.layers, sizes, strict=True):
        # Experts that one product reads are still together; the first of them stands for all.
        number = number * size + target.place.index.get(axis, 0)
    return number


def _warn_about_dead_inputs(
    parts: Mapping[str, Sequence[_Pruned]], methods: Mapping[str, Any], inputs: Mapping[str, int]
) -> None:
    counts = {}
    for path, of_path in parts.items():
        statistic = methods[path].statistic
        if statistic is not None:
            dead = [calibrate.count_dead_inputs(statistic, part.target.statistic.total) for part in of_path]
            # Some layers may have been read alone, and others in a stack that holds several or one.
            counts[path] = np.concatenate([np.reshape(processes.on_host(count), -1) for count in dead])
    calibrate.warn_about_dead_inputs(counts, inputs)


def _check_layer_axes(schedule: Schedule) -> None:
    """Check that no layer of a leaf would be pruned twice: alone, and together with the others.

    Raises:
      CalibrationError: one would.
    """
    for path, axes in layer_axes(schedule).items():
        if len(axes) > 1:
            raise CalibrationError(
                f'{path}: some products read one layer, whose number is written in the program, and others read all of '
                'them, or one whose number is known only when it runs; write all in one way, or make it dense'
            )


def _check_layers(path: str, shape: Sequence[int], parts: Sequence[_Pruned]) -> None:
    """Check that every layer of a leaf was pruned.

    Raises:
      CalibrationError: a layer is missing.
    """
    pruned = {tuple(sorted(part.target.place.index.items())) for part in parts}
    missing = [index for index in _indices(shape, parts) if index not in pruned]
    if missing:
        layer = f', layer {", ".join(str(number) for _, number in missing[0])}' if missing[0] else ''
        raise CalibrationError(f'{path}{layer}: no product of the forward reads it in a way that can be followed')


def _indices(shape: Sequence[int], parts: Sequence[_Pruned]) -> list[tuple[tuple[int, int], ...]]:
    """Return the index of each part of a leaf, in order, as ((axis, index), ...); of a leaf that is one kernel, ()."""
    axes = sorted(parts[0].target.place.index) if parts else []
    return [tuple(zip(axes, index, strict=True)) for index in itertools.product(*[range(shape[a]) for a in axes])]


def _joined(shape: Sequence[int], parts: Sequence[_Pruned]) -> tuple[Array, Array]:
    """Return (kernel, mask) of a leaf from its layers, all of which are there."""
    by_index = {tuple(sorted(part.target.place.index.items())): part for part in parts}
    ordered = [by_index[index] for index in _indices(shape, parts)]
    axes = sorted(parts[0].target.place.index)
    # A leaf that is one kernel.
    if not axes:
        return ordered[0].kernel, ordered[0].mask
    sizes = [shape[axis] for axis in axes]

    def stack(arrays):
        # Layers are in front of the axes that are left; each goes back to its own place.
        stacked = jnp.stack(arrays)
        return jnp.moveaxis(stacked.reshape(*sizes, *stacked.shape[1:]), range(len(axes)), axes)

    return stack([part.kernel for part in ordered]), stack([part.mask for part in ordered])
