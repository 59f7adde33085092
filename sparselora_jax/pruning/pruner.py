"""Prunes every kernel of a model with a method; the method knows one kernel, the walker knows the layers."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from sparselora_jax.pruning import calibrate
from sparselora_jax.pruning.targets import in_blocks, methods_of, pattern_zeros, patterns_of, per_group
from sparselora_jax.pruning.walk import block_observer, joined, walk
from sparselora_jax.sparse import rules as rules_lib
from sparselora_jax.sparse import sharding
from sparselora_jax.sparse.masks import Pattern


class PruneResult(NamedTuple):
    """Pruned params (zeros in place), their masks, and the tokens that each pruned kernel was calibrated on."""

    params: dict
    masks: dict
    tokens: dict[str, int]


@functools.partial(jax.jit, static_argnames=('method', 'pattern'))
def _prune_kernel(kernel: Array, statistic: Any, zeros: Any, *, method: Any, pattern: Pattern) -> tuple[Array, Array]:
    if kernel.ndim == 2:
        return method(kernel, statistic, pattern, zeros)
    return jax.lax.map(lambda layer: method(layer[0], layer[1], pattern, layer[2]), (kernel, statistic, zeros))


@functools.partial(jax.jit, static_argnames=('method', 'pattern', 'places'))
def _prune_joined(
    kernels: tuple[Array, ...], statistic: Any, zeros: Any, *, method: Any, pattern: Pattern, places: tuple | None
) -> tuple[list[Array], list[Array], Array]:
    """Kernels with one statistic, side by side: (pruned kernels, masks, whether all is finite).

    Args:
      places: where each kernel lies on a mesh. A method walks along inputs, so a device prunes some outputs, with all
        their inputs: no group is cut.
    """
    kernel = jnp.concatenate(kernels, axis=-1)
    constrain = jax.lax.with_sharding_constraint
    if places is not None:
        mesh = places[0].mesh
        outputs = sharding.fitting(mesh, PartitionSpec(None, ('fsdp', 'tensor')), kernel.shape)
        statistic = jax.tree.map(lambda leaf: constrain(leaf, NamedSharding(mesh, PartitionSpec())), statistic)
        kernel = constrain(kernel, outputs)
    pruned, mask = method(kernel, statistic, pattern, zeros)
    if places is not None:
        pruned, mask = constrain((pruned, mask), outputs)
    ends = np.cumsum([kernel.shape[-1] for kernel in kernels])[:-1].tolist()
    results = jnp.split(pruned, ends, axis=-1), jnp.split(mask, ends, axis=-1)
    if places is not None:
        results = constrain(results, (list(places), list(places)))
    return *results, jnp.isfinite(pruned).all()


def prune_tree(
    params: PyTree,
    stats: dict[str, tuple[Any, Array]] | None,
    rules: Sequence[tuple[str, Any]],
    *,
    method: Any,
    zeros: dict[str, np.ndarray] | None = None,
) -> tuple[dict, dict]:
    """Prunes any nested dict of kernels in one shot.

    Args:
      stats: what `collect` returned; None for a method without a statistic.
      rules: `(regex, pattern)` in order; every kernel must match.
      method: `Magnitude()`, `Random()`, `Wanda()`, `SparseGPT()`, `DSnoT()`, or rules `(regex, method)`, where towers
        differ.
      zeros: path -> zeros of each layer's kernel (of the kernel, where it is no stack), instead of what the pattern
        says (see `pruning.allocate`).

    Returns:
      (params with zeros in place, masks).

    Raises:
      PatternError: a pattern that does not fit its kernel. RuleError: see `rules.match`.
      CalibrationError: a kernel without the statistic that its method needs.

    >>> from sparselora_jax.pruning import Magnitude
    >>> params = {'q': {'kernel': jnp.array([[1.0], [-2.0]])}}
    >>> pruned, masks = prune_tree(params, None, [('.*', 0.5)], method=Magnitude())
    >>> pruned['q']['kernel'].tolist()
    [[0.0], [-2.0]]
    """
    flat, masks, methods = rules_lib.flatten(params), {}, methods_of(params, method)
    patterns = patterns_of(params, rules)
    totals = pattern_zeros(flat, patterns, methods, zeros)
    for path, pattern in patterns.items():
        statistic, method = None, methods[path]
        if method.statistic is not None:
            if path not in (stats or {}):
                raise calibrate.CalibrationError(f'{path}: no statistic; run collect with a forward that uses it')
            statistic = stats[path][0]
        counts = [per_group(method, pattern, flat[path].shape[-1], int(total)) for total in totals[path].reshape(-1)]
        counts = None if pattern.structured else np.stack(counts) if totals[path].ndim else counts[0]
        flat[path], masks[path] = _prune_kernel(flat[path], statistic, counts, method=method, pattern=pattern.kind)
        _check_finite(path, jnp.isfinite(flat[path]).all())
    return rules_lib.unflatten(flat), rules_lib.unflatten(masks)


def prune(
    forward: Callable[..., Any],
    params: dict,
    batches: Iterable[dict],
    rules: Sequence[tuple[str, Any]],
    *,
    method: Any,
    zeros: dict[str, np.ndarray] | None = None,
    chunk: int = 8,
    keep: Callable[[str, int, Array, Array], None] | None = None,
    progress: Callable[[str, int, int], None] = lambda tower, layer, layers: None,
) -> PruneResult:
    """Prunes a model block by block: a block's statistics come from the outputs of the blocks already pruned.

    `forward` runs once over the whole calibration set; its stacks of blocks are run here, `chunk` samples at a time, so
    memory holds the samples' hidden states and one block's statistics. A block is compiled once for all its layers
    (twice where `chunk` does not divide the samples).

    Args:
      forward: `forward(weights, batch, run)` that hands its blocks to `run` (see `models.runners`).
      params: a tree whose stacked blocks lie under `<tower>/blocks`, with the tower's name as `forward` gives it. A
        block's leaves may be anything with a shape that gives a layer's array when it is indexed: weights on disk.
      batches: dicts of arrays of one shape, samples first.
      rules: `(regex, pattern)`; only kernels inside blocks can be pruned.
      method: see `prune_tree`, as for `zeros`.
      chunk: samples a time, on each device that has samples of its own (see docs/scaling.md for what then is the same
        as on one device).
      keep: `keep(path, layer, kernel, mask)` is handed every pruned layer at once, and the result holds `params` as
        they came and no masks: for a model that memory does not hold, or holds once. A layer is read once, before
        it is kept, so `keep` may write over a numpy array.
      progress: called before each block.

    Raises:
      CalibrationError: no batch, or non-finite activations. PatternError, RuleError: see `prune_tree`.
    """
    samples = joined(batches, chunk)
    mesh = sharding.mesh_of_rows(samples)
    patterns, methods = patterns_of(params, rules), methods_of(params, method)
    totals = pattern_zeros(rules_lib.flatten(params), patterns, methods, zeros)
    pruned, masks, tokens = {}, {}, {}

    def collect(path, layer, kernel, mask):
        pruned.setdefault(path, []).append(kernel)
        masks.setdefault(path, []).append(mask)

    def enter(tower, block):
        paths = in_blocks(patterns, tower)
        here = {name: patterns[path] for name, path in paths.items()}
        of_block = {name: methods[path] for name, path in paths.items()}
        stats_of = {name: method.statistic or calibrate.squares for name, method in of_block.items()}
        observe = block_observer(block, stats_of.get, mesh)

        def visit(layer, layers, w, chunks):
            progress(tower, layer, layers)
            if not here:
                return w
            stats = observe(rules_lib.unflatten(w), chunks)
            counts = {name: int(totals[path][layer]) for name, path in paths.items()}
            new, kept = _prune_block(w, stats, here, of_block, counts)
            for name, path in paths.items():
                (keep or collect)(path, layer, new[name], kept[name])
                tokens[path] = int(stats[name][1])
            return w | new

        return visit

    walk(forward, params, samples, enter, chunk=chunk)
    if missed := sorted(patterns.keys() - tokens.keys()):
        raise rules_lib.RuleError(f'{missed[0]}: not inside the blocks of a tower that the forward runs; make it dense')
    flat = rules_lib.flatten(params)
    for path in list(pruned):  # popped, so that at most one stack exists twice
        flat[path], masks[path] = jnp.stack(pruned.pop(path)), jnp.stack(masks[path])
    return PruneResult(rules_lib.unflatten(flat), rules_lib.unflatten(masks), tokens)


def _check_finite(path: str, finite: Array) -> None:
    if not finite:
        raise calibrate.CalibrationError(
            f'{path}: pruned weights are not finite; a singular Hessian needs more damping or more samples'
        )


def _prune_block(
    w: dict[str, Array],
    stats: dict[str, tuple[Any, Array]],
    patterns: dict[str, Pattern],
    methods: dict[str, Any],
    zeros: dict[str, int],
) -> tuple[dict[str, Array], dict[str, Array]]:
    """One block's pruned kernels and their masks.

    Kernels that share their statistic (q, k and v) are pruned as one where outputs don't compete with each other: one
    Hessian is inverted for them, and one loop runs over their inputs.
    """
    groups: dict[Any, list[str]] = {}
    for name, pattern in patterns.items():
        method, statistic = methods[name], stats[name][0]
        together = method.statistic is not None and (pattern.structured or method.group == 'output')
        same = (id(statistic), method, pattern.kind, w[name].dtype)
        groups.setdefault(same if together else name, []).append(name)
    pruned, masks = {}, {}
    for names in groups.values():
        method, pattern = methods[names[0]], patterns[names[0]]
        statistic = stats[names[0]][0] if method.statistic else None
        counts = [per_group(method, patterns[name], w[name].shape[-1], zeros[name]) for name in names]
        counts = counts[0] if len(names) == 1 or pattern.structured else np.concatenate(counts)
        kernels = tuple(w[name] for name in names)
        places = tuple(map(sharding.on_mesh, kernels))
        places = None if None in places else places
        knobs = {'method': method, 'pattern': pattern.kind, 'places': places}
        *results, finite = _prune_joined(kernels, statistic, counts, **knobs)
        _check_finite(names[0], finite)
        for into, result in zip((pruned, masks), results, strict=True):
            into.update(zip(names, result, strict=True))
    return pruned, masks
