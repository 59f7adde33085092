"""What each kernel of a model is to become, from ordered rules: its pattern, its method, its number of zeros."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import PyTree

from sparselora_jax.sparse import rules as rules_lib
from sparselora_jax.sparse.masks import Pattern, PatternError, parse_pattern, spread


def patterns_of(params: PyTree, rules: Sequence[tuple[str, Any]]) -> dict[str, Pattern]:
    """The pattern of every kernel that is not dense; what does not fit is named before any work is done.

    Raises:
      PatternError, RuleError: see `prune_tree`.
    """
    found = rules_lib.kernels(params)
    patterns = {path: parse_pattern(text) for path, text in rules_lib.match(rules, found).items()}
    rules_lib.check_layout(params, [path for path, pattern in patterns.items() if not pattern.dense])
    for path, pattern in patterns.items():
        try:
            pattern.zeros(found[path].shape[-2])
        except PatternError as error:
            raise PatternError(f'{path}: {error}') from None
    return {path: pattern for path, pattern in patterns.items() if not pattern.dense}


def in_blocks(paths: Iterable[str], tower: str) -> dict[str, str]:
    """{name within a block: path} of a tower's kernels.

    >>> in_blocks(['vision/blocks/mlp/fc1/kernel', 'language/head/kernel'], 'vision')
    {'mlp/fc1/kernel': 'vision/blocks/mlp/fc1/kernel'}
    """
    prefix = f'{tower}/blocks/'
    return {path[len(prefix) :]: path for path in paths if path.startswith(prefix)}


def methods_of(params: PyTree, method: Any) -> dict[str, Any]:
    """The method of every kernel, from one for all or from rules."""
    rules = method if isinstance(method, Sequence) else [('.*', method)]
    return rules_lib.match(rules, rules_lib.kernels(params))


def pattern_zeros(
    flat: dict[str, Any],
    patterns: dict[str, Pattern],
    methods: dict[str, Any],
    given: dict[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Zeros of every layer's kernel, counted here on the host: `given`, or what the pattern asks of each group.

    Raises:
      PatternError: numbers that cannot be, or a sparsity so low that it is none.
    """
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
            if not total:
                size = inputs if by_output else inputs * outputs
                what = f'sparsity {pattern.sparsity:g} of {size} weights is less than one'
                raise PatternError(f"{path}: {what}: ask for more, for group 'matrix', or for 'dense'")
            found[path] = np.full(layers, total)
            continue
        found[path] = zeros = np.asarray(given[path])
        if zeros.shape != tuple(layers) or zeros.min() < 0 or zeros.max() > inputs * outputs:
            expected = f'one number of 0 to {inputs * outputs} for each of {layers} layers'
            raise PatternError(f'{path}: zeros {zeros.tolist()}: expected {expected}')
    return found


def per_group(method: Any, pattern: Pattern, outputs: int, total: int) -> np.ndarray | None:
    """Zeros of each comparison group of a kernel; None: N:M says it."""
    if pattern.structured:
        return None
    return spread(total, outputs) if method.group == 'output' else np.asarray(total, np.int32)
