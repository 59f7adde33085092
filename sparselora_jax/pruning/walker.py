"""Walks a model's layers and prunes each with a method; the method knows one kernel, the walker knows the layers."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sparselora_jax import calibrate
from sparselora_jax import rules as rules_lib
from sparselora_jax.models.runners import valid_rows
from sparselora_jax.sparsity import Pattern, PatternError, parse_pattern, spread


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


@functools.partial(jax.jit, static_argnames=('method', 'pattern'))
def _prune_joined(
    kernels: tuple[Array, ...], statistic: Any, zeros: Any, *, method: Any, pattern: Pattern
) -> tuple[list[Array], list[Array], Array]:
    """Kernels with one statistic, side by side: (pruned kernels, masks, whether all is finite)."""
    pruned, mask = method(jnp.concatenate(kernels, axis=-1), statistic, pattern, zeros)
    ends = np.cumsum([kernel.shape[-1] for kernel in kernels])[:-1].tolist()
    return jnp.split(pruned, ends, axis=-1), jnp.split(mask, ends, axis=-1), jnp.isfinite(pruned).all()


def pattern_zeros(
    flat: dict[str, Any],
    patterns: dict[str, Pattern],
    methods: dict[str, Any],
    given: dict[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Zeros of every layer's kernel, counted here on the host: `given`, or what the pattern asks of each group."""
    for path in given or {}:
        if path not in patterns or patterns[path].structured:
            kind = str(patterns[path]) if path in patterns else 'dense'
            raise PatternError(f'{path}: numbers of zeros have no meaning for pattern {kind}')
    found = {}
    for path, pattern in patterns.items():
        *layers, inputs, outputs = flat[path].shape
        if path not in (given or {}):
            by_output = pattern.structured or methods[path].group == 'output'
            total = pattern.zeros(inputs) * outputs if by_output else pattern.zeros(inputs * outputs)
            found[path] = np.full(layers, total)
            continue
        found[path] = zeros = np.asarray(given[path])
        if zeros.shape != tuple(layers) or zeros.min() < 0 or zeros.max() > inputs * outputs:
            expected = f'one number of 0 to {inputs * outputs} for each of {layers} layers'
            raise PatternError(f'{path}: zeros {zeros.tolist()}: expected {expected}')
    return found


def _per_group(method: Any, pattern: Pattern, outputs: int, total: int) -> np.ndarray | None:
    """Zeros of each comparison group of a kernel; None: N:M says it."""
    if pattern.structured:
        return None
    return spread(total, outputs) if method.group == 'output' else np.asarray(total, np.int32)


def patterns_of(params: dict, rules: Sequence[tuple[str, Any]]) -> dict[str, Pattern]:
    """The pattern of every kernel that is not dense; what does not fit is named before any work is done.

    Raises:
      PatternError, RuleError: see `prune_tree`.
    """
    found = rules_lib.kernels(params)
    patterns = {path: parse_pattern(text) for path, text in rules_lib.match(rules, found).items()}
    for path, pattern in patterns.items():
        try:
            pattern.zeros(found[path].shape[-2])
        except PatternError as error:
            raise PatternError(f'{path}: {error}') from None
    return {path: pattern for path, pattern in patterns.items() if not pattern.dense}


def methods_of(params: dict, method: Any) -> dict[str, Any]:
    """The method of every kernel, from one for all or from rules."""
    rules = method if isinstance(method, Sequence) else [('.*', method)]
    return rules_lib.match(rules, rules_lib.kernels(params))


def prune_tree(
    params: dict,
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
        counts = [_per_group(method, pattern, flat[path].shape[-1], int(total)) for total in totals[path].reshape(-1)]
        counts = None if pattern.structured else np.stack(counts) if totals[path].ndim else counts[0]
        flat[path], masks[path] = _prune_kernel(flat[path], statistic, counts, method=method, pattern=pattern.kind)
        _check_finite(path, jnp.isfinite(flat[path]).all())
    return rules_lib.unflatten(flat), rules_lib.unflatten(masks)


def joined(batches: Iterable[dict]) -> dict:
    """One batch of all samples.

    Raises:
      CalibrationError: no batch.
    """
    if not (batches := list(batches)):
        raise calibrate.CalibrationError('the calibration set is empty: no batch arrived')
    return jax.tree.map(lambda *leaves: jnp.concatenate([jnp.asarray(leaf) for leaf in leaves]), *batches)


def walk(
    forward: Callable[..., Any],
    params: dict,
    samples: dict,
    enter: Callable[[str, Callable], Callable[[int, int, dict, list], dict]],
    *,
    chunk: int,
) -> None:
    """Runs `forward` over all samples, block by block, `chunk` samples at a time; see `prune`.

    Args:
      enter: `enter(tower, block)`, called at each stack of blocks, returns `visit(layer, layers, w, chunks)`: that is
        given a layer's weights by path and its inputs, `[(x, ctx), ...]`, and returns the weights to go on with.
    """

    def run(tower, block, weights, x, ctx, cache=None):
        visit = enter(tower, block)
        step = jax.jit(lambda w, x, ctx: block(w, x, ctx, None)[0])
        chunks = _split(x, ctx, chunk)
        layers = jax.tree.leaves(weights)[0].shape[0]
        for layer in range(layers):
            w = rules_lib.flatten(jax.tree.map(lambda leaf, layer=layer: jnp.asarray(leaf[layer]), weights))
            w = visit(layer, layers, w, chunks)
            for i, (x, ctx) in enumerate(chunks):  # one by one: two sets of hidden states are never held
                chunks[i] = (step(rules_lib.unflatten(w), x, ctx), ctx)
        return jnp.concatenate([x for x, _ in chunks]), cache

    forward(params, samples, run)


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
      chunk: samples a time.
      keep: `keep(path, layer, kernel, mask)` is handed every pruned layer at once, and the result holds `params` as
        they came and no masks: for a model that memory does not hold, or holds once. A layer is read once, before
        it is kept, so `keep` may write over a numpy array.
      progress: called before each block.

    Raises:
      CalibrationError: no batch, or non-finite activations. PatternError, RuleError: see `prune_tree`.
    """
    samples = joined(batches)
    patterns, methods = patterns_of(params, rules), methods_of(params, method)
    totals = pattern_zeros(rules_lib.flatten(params), patterns, methods, zeros)
    pruned, masks, tokens = {}, {}, {}

    def collect(path, layer, kernel, mask):
        pruned.setdefault(path, []).append(kernel)
        masks.setdefault(path, []).append(mask)

    def enter(tower, block):
        prefix = f'{tower}/blocks/'
        here = {path[len(prefix) :]: pattern for path, pattern in patterns.items() if path.startswith(prefix)}
        of_block = {name: methods[prefix + name] for name in here}
        observe = calibrate.make_observer(
            lambda w, inputs: block(w, *inputs, None),
            stats=lambda name: (of_block[name].statistic or calibrate.squares) if name in here else None,
            valid=lambda name, inputs: valid_rows(name, inputs[1]),
        )

        def visit(layer, layers, w, chunks):
            progress(tower, layer, layers)
            if not here:
                return w
            try:
                stats = observe(rules_lib.unflatten(w), chunks)
                counts = {name: int(totals[prefix + name][layer]) for name in here}
                new, kept = _prune_block(w, stats, here, of_block, counts)
            except calibrate.CalibrationError as error:
                raise calibrate.CalibrationError(f'{prefix}{error} (layer {layer})') from None
            for name in here:
                (keep or collect)(prefix + name, layer, new[name], kept[name])
                tokens[prefix + name] = int(stats[name][1])
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
        counts = [_per_group(method, patterns[name], w[name].shape[-1], zeros[name]) for name in names]
        counts = counts[0] if len(names) == 1 or pattern.structured else np.concatenate(counts)
        kernels = tuple(w[name] for name in names)
        *results, finite = _prune_joined(kernels, statistic, counts, method=method, pattern=pattern.kind)
        _check_finite(names[0], finite)
        for into, result in zip((pruned, masks), results, strict=True):
            into.update(zip(names, result, strict=True))
    return pruned, masks


def _split(x: Array, ctx: dict, chunk: int) -> list[tuple[Array, dict]]:
    """Chunks of samples; arrays of `ctx` have the batch, or 1, as their leading axis."""
    batch = x.shape[0]
    return [_part((x, ctx), first, batch=batch, size=min(chunk, batch - first)) for first in range(0, batch, chunk)]


@functools.partial(jax.jit, static_argnames=('batch', 'size'))
def _part(arrays: Any, first: Any, *, batch: int, size: int) -> Any:
    def part(leaf):
        whole = leaf.shape[0] == 1 and batch > 1
        return leaf if whole else jax.lax.dynamic_slice_in_dim(leaf, first, size)

    return jax.tree.map(part, arrays)
