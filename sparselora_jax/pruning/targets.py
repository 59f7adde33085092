"""Find the pattern, the method and the number of zeros of each kernel, from ordered rules."""

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from sparselora_jax.pruning.method import Method, MethodError, check_method
from sparselora_jax.runtime.errors import calling
from sparselora_jax.sparse.axes import KernelAxes, kernels_of, matrix_shape
from sparselora_jax.sparse.patterns import Pattern, PatternError, parse_pattern, spread
from sparselora_jax.sparse.rules import (
    KERNEL,
    RuleError,
    check_layout,
    check_rules,
    first_match,
    flatten,
    hidden_matrices,
    is_in_block,
    match,
    name_in_block,
    named_kernel,
    paths_of,
    stack_of,
)

# A method for all kernels, or ordered rules `(regex, method)`.
Methods = Method | Sequence[tuple[str, Method]]
# Ordered rules `(regex, pattern)`, each pattern parsed or as `parse_pattern` reads it.
PatternRules = Sequence[tuple[str, Pattern | str | float]]


def patterns_of(
    params: PyTree, rules: PatternRules, axes: Mapping[str, KernelAxes] | None = None
) -> dict[str, Pattern]:
    """Return the pattern of every kernel that is not dense, by path, and check that it fits the kernel.

    Args:
      params: anything with the shapes of a params tree.
      rules: `(regex, pattern)` in order; every kernel must match.
      axes: see `kernels_of`.

    Raises:
      PatternError: a pattern does not parse, or does not fit its kernel.
      RuleError: see `rules.match` and `rules.check_layout`.
    """
    axes = axes or {}
    all_kernels = kernels_of(params, axes)
    if axes:
        _check_read(rules, all_kernels, params)
    patterns = {path: parse_pattern(text) for path, text in match(rules, all_kernels).items()}
    patterns = {path: pattern for path, pattern in patterns.items() if not pattern.dense}
    # Calibration knows the roles of axes; without it, they follow from names and shapes.
    unknown = [path for path in patterns if path not in axes]
    if unknown:
        check_layout(params, unknown)
    # A kernel that is not seen would stay dense without a word.
    for path in hidden_matrices(params) if not axes else ():
        for candidate in (path, f'{path}/{KERNEL}'):
            if not parse_pattern(first_match([*rules, ('.*', 'dense')], candidate)).dense:
                raise RuleError(
                    f'{path} is a {type(flatten(params)[path]).__name__}, and rules prune it: expected a plain array. '
                    'Unbox it (flax.linen.meta.unbox, nnx.to_pure_dict), or make it dense by a rule of its own'
                )
    for path, pattern in patterns.items():
        try:
            pattern.zeros(matrix_shape(all_kernels[path].shape, axes.get(path))[-2])
        except PatternError as error:
            raise PatternError(f'{path}: {error}') from None
    return patterns


def _check_read(rules: PatternRules, all_kernels: Mapping[str, Any], params: PyTree) -> None:
    """Check that no rule is meant for a matrix that calibration found to be no kernel.

    Raises:
      RuleError: a rule matches only such a matrix; or see `rules.check_rules`.
    """
    check_rules(rules)
    matrices = [path for path, leaf in paths_of(params).items() if getattr(leaf, 'ndim', 0) >= 2]
    for regex, _ in rules:
        # Rules that match nothing at all are typos, which `rules.match` names.
        matched = [path for path in matrices if re.fullmatch(regex, path)]
        if matched and not all_kernels.keys() & set(matched):
            if any(map(named_kernel, matrices)) and not any(map(named_kernel, matched)):
                raise RuleError(
                    f'rule {regex!r} matches {matched[0]}, which is no kernel: in a tree with matrices called '
                    f'{KERNEL!r}, no others are pruned; leave the rule out'
                )
            raise RuleError(
                f'rule {regex!r} matches {matched[0]}, which has no statistic: no product of the forward that '
                '`collect` ran reads it, or `select` left it out'
            )


def in_blocks(paths: Iterable[str], tower: str) -> dict[str, str]:
    """Return {name within a block: path} of a tower's kernels.

    Args:
      paths: paths of any kernels.
      tower: a stack of blocks: `vision`, or `language/encoder`.

    >>> in_blocks(['vision/blocks/mlp/fc1/kernel', 'language/head/kernel'], 'vision')
    {'mlp/fc1/kernel': 'vision/blocks/mlp/fc1/kernel'}
    """
    return {name_in_block(path): path for path in paths if is_in_block(path) and stack_of(path) == tower}


def check_visited(paths: Iterable[str], visited: Container[str]) -> None:
    """Check that a walk over the blocks came to all kernels: those outside were never visited.

    Args:
      paths: paths of the kernels that it should have come to.
      visited: those that it came to.

    Raises:
      RuleError: it missed one; to leave it dense without an error would break its pattern.
    """
    missed = sorted(path for path in paths if path not in visited)
    if missed:
        raise RuleError(f'{missed[0]}: not inside the blocks of a tower that the forward runs; make it dense')


def methods_of(params: PyTree, method: Methods, axes: Mapping[str, KernelAxes] | None = None) -> dict[str, Method]:
    """Return the method of every kernel, by path.

    Args:
      params: anything with the shapes of a params tree.
      method: one for all kernels, or rules `(regex, method)`.
      axes: see `kernels_of`.

    Raises:
      MethodError: an object is not a method.
      RuleError: see `rules.match`.
    """
    # A string is a sequence too; `check_method` says what is wrong with it.
    is_rules = isinstance(method, Sequence) and not isinstance(method, str)
    method_rules = list(method) if is_rules else [('.*', method)]
    for _, candidate in method_rules:
        check_method(candidate)
    return match(method_rules, kernels_of(params, axes))


def pattern_zeros(
    flat: Mapping[str, Any],
    patterns: Mapping[str, Pattern],
    methods: Mapping[str, Method],
    given: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Return the number of zeros of every layer's kernel, computed on the host.

    Args:
      flat: anything with the shapes of the params, by path.
      patterns: pattern of each kernel to prune, by path.
      methods: method of each of these kernels, by path.
      given: number of zeros of each layer's kernel, by path, where it replaces the pattern's (see `allocate`).

    Raises:
      PatternError: a number of zeros is impossible, a sparsity prunes no weight, or a method does not support its
        pattern.
      MethodError: the check of a method fails.
    """
    given = given or {}
    for path in given:
        if path not in patterns or patterns[path].structured:
            kind = str(patterns[path]) if path in patterns else 'dense'
            raise PatternError(f'{path}: numbers of zeros have no meaning for pattern {kind}')
    zeros = {}
    for path, pattern in patterns.items():
        *layers, inputs, outputs = flat[path].shape
        # Checked here, where shapes are known and nothing is computed yet, so that an error comes early.
        _check_numbers(path, flat[path], methods[path])
        try:
            with calling(f'check of pruning method {type(methods[path]).__name__}', MethodError):
                methods[path].check(pattern, inputs)
        except PatternError as error:
            raise PatternError(f'{path}: {error}') from None
        # An allocation gives each layer its own number of zeros; a pattern gives all layers the same.
        if path in given:
            with calling(f'{path}: zeros', PatternError):
                zeros[path] = np.asarray(given[path])
            if not np.issubdtype(zeros[path].dtype, np.integer):
                raise PatternError(f'{path}: zeros are {zeros[path].dtype}, expected integers')
            most = inputs * outputs
            if zeros[path].shape != tuple(layers) or zeros[path].min() < 0 or zeros[path].max() > most:
                expected = f'one number of 0 to {most} for each of {layers} layers'
                raise PatternError(f'{path}: zeros {zeros[path].tolist()}: expected {expected}')
        else:
            zeros[path] = np.full(layers, _zeros_of_kernel(path, pattern, methods[path], inputs, outputs))
    return zeros


def _check_numbers(path: str, kernel: Any, method: Method) -> None:
    """Check that a kernel holds numbers that its method can return.

    Raises:
      MethodError: they are complex; or integers, and the method changes the weights that it keeps.
    """
    # Weights on disk need not say what they are.
    dtype = getattr(kernel, 'dtype', None)
    if dtype is None or jnp.issubdtype(dtype, jnp.floating):
        return
    name = type(method).__name__
    if not jnp.issubdtype(dtype, jnp.integer):
        raise MethodError(f'{path}: {name} cannot prune an array of {dtype}: expected real numbers')
    if method.edits_kept_weights:
        raise MethodError(
            f'{path}: {name} changes the weights that it keeps, and would cut them to {dtype}: use floats'
        )


def _zeros_of_kernel(path: str, pattern: Pattern, method: Method, inputs: int, outputs: int) -> int:
    """Return the zeros of one layer's kernel: the sum of the pattern's zeros over all comparison groups.

    Raises:
      PatternError: the sparsity is so low that no weight is pruned.
    """
    # Groups lie along the inputs of one output, or are the whole matrix.
    compares_inputs = pattern.structured or method.group == 'output'
    size = inputs if compares_inputs else inputs * outputs
    zeros = pattern.zeros(size) * outputs if compares_inputs else pattern.zeros(size)
    if not zeros:
        what = f'sparsity {pattern.sparsity:g} of {size} weights is less than one'
        raise PatternError(f"{path}: {what}: ask for more, for group 'matrix', or for 'dense'")
    return zeros


def per_group(method: Method, pattern: Pattern, outputs: int, total: int) -> np.ndarray | None:
    """Return the zeros of each comparison group of a kernel, or None for N:M, which fixes them.

    Args:
      method: method of the kernel, which names the comparison group.
      pattern: pattern of the kernel.
      outputs: number of outputs of the kernel.
      total: number of zeros of the whole kernel.
    """
    if pattern.structured:
        return None
    return spread(total, outputs) if method.group == 'output' else np.asarray(total, np.int32)
