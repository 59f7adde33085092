"""Paths of a params tree, and ordered (regex, value) rules over them.

Everything said per weight (pattern, rank, sharding) is an ordered list of rules. A rule applies to a path that its
regex matches in full; the first such rule wins. A kernel that no rule matches and a rule that matches nothing are
errors, so a typo never leaves a tower dense without a word.

This module owns the syntax of paths. `language/blocks/attn/q/kernel` is the kernel `attn/q/kernel` of every block of
the stack `language`. A tower may hold two stacks: T5 has `language/encoder` and `language/decoder`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from flax import traverse_util
from jaxtyping import PyTree

from sparselora_jax.runtime.errors import SparseloraError

Value = TypeVar('Value')

KERNEL = 'kernel'  # the last part of the path of a matrix [in, out]
BLOCKS = 'blocks'  # the part of a path below which arrays are stacked: [layers, ...]
SHOWN = 5  # leaves that an error lists

# Kernels of Flax's MultiHeadDotProductAttention are [in, heads, head_dim], `out` is [heads, head_dim, out].
_ATTENTION = ('query', 'key', 'value', 'out')


class RuleError(SparseloraError, ValueError):
    """A rule list that does not fit the tree it is applied to, or a tree that has no kernels."""


def flatten(tree: PyTree) -> dict[str, Any]:
    """Return the leaves of a nested dict by path: {'language/blocks/attn/q/kernel': leaf}.

    Containers that are not dicts (`Lora`, packed kernels, arrays) are leaves. Paths are sorted, whatever the order of
    the tree. JAX sorts keys wherever it maps a tree, so a tree on a mesh has another order than the one that was read;
    random numbers drawn for the n-th kernel must not depend on that.

    Args:
      tree: nested dicts whose keys are strings.

    Raises:
      RuleError: the tree is no dict, or a key is no string.
    """
    if not isinstance(tree, Mapping):
        raise RuleError(f'the tree is a {type(tree).__name__}: {_EXPECTED}')
    try:
        leaves = traverse_util.flatten_dict(tree)
    except AssertionError:  # a mapping that Flax does not take for a dict, such as the State of an NNX model
        kind = f'{type(tree).__name__} (of NNX? nnx.to_pure_dict(state) makes a dict)'
        raise RuleError(f'the tree is a {kind}: {_EXPECTED}') from None
    for keys in leaves:
        for key in keys:
            if not isinstance(key, str):
                path = '/'.join(map(str, keys))
                raise RuleError(f'{path}: key {key!r} is a {type(key).__name__}, expected a string: {_EXPECTED}')
    return {'/'.join(keys): leaves[keys] for keys in sorted(leaves, key='/'.join)}


_EXPECTED = f'expected nested dicts with string keys, whose matrices are called {KERNEL!r}'


def unflatten(flat: Mapping[str, Any]) -> dict:
    """Return the nested dict whose leaves have these paths: the inverse of `flatten`."""
    return traverse_util.unflatten_dict(flat, sep='/')


def is_in_block(path: str) -> bool:
    """Return whether a path leads into a stack of blocks.

    >>> is_in_block('language/blocks/attn/q/kernel'), is_in_block('language/head/kernel')
    (True, False)
    """
    return BLOCKS in path.split('/')[:-1]


def stack_of(path: str) -> str:
    """Return the stack of blocks that a path leads into; a path outside of blocks is returned as it is.

    >>> stack_of('language/encoder/blocks/attn/q/kernel'), stack_of('language/head/kernel')
    ('language/encoder', 'language/head/kernel')
    """
    return _split_at_blocks(path)[0] if is_in_block(path) else path


def name_in_block(path: str) -> str:
    """Return the name that an array has within its block; a path outside of blocks is returned as it is.

    >>> name_in_block('language/blocks/attn/q/kernel')
    'attn/q/kernel'
    """
    return _split_at_blocks(path)[1] if is_in_block(path) else path


def block_path(tower: str, name: str) -> str:
    """Return the path of the array that is called `name` within the blocks of a stack.

    Args:
      tower: the stack: `language`, or `language/encoder`.
      name: within a block: `attn/q/kernel`.

    >>> block_path('language', 'attn/q/kernel')
    'language/blocks/attn/q/kernel'
    """
    return f'{tower}/{BLOCKS}/{name}' if tower else f'{BLOCKS}/{name}'


def block_rule(tower: str, regex: str = '.*') -> str:
    """Return the regex of the paths in a tower's blocks whose rest matches a regex.

    Args:
      tower: name of the tower. A T5 has two stacks, `language/encoder` and `language/decoder`; both match `language`.
      regex: over the names within a block, such as `attn/[qv]/kernel`.

    >>> block_rule('language', 'attn/q/kernel|mlp/up/kernel')
    'language/(.*/)?blocks/(?:attn/q/kernel|mlp/up/kernel)'
    """
    # Grouped: in 'prefix/a|b' the prefix would belong to the first alternative only.
    rest = regex if regex == '.*' else f'(?:{regex})'
    return f'{tower}/(.*/)?{BLOCKS}/{rest}'


def _split_at_blocks(path: str) -> tuple[str, str]:
    parts = path.split('/')
    index = parts.index(BLOCKS)
    return '/'.join(parts[:index]), '/'.join(parts[index + 1 :])


def named_kernel(path: str) -> bool:
    """Return whether the array of this path is laid out [in, out]."""
    return path.rsplit('/', 1)[-1] == KERNEL


def is_kernel(path: str, leaf: Any) -> bool:
    """Return whether a leaf is a matrix that the library may prune or adapt: named `kernel`, of rank 2 or more."""
    return named_kernel(path) and getattr(leaf, 'ndim', 0) >= 2


def kernels(params: PyTree) -> dict[str, Any]:
    """Return the kernels of a params tree by path.

    Args:
      params: nested dicts whose matrices are called `kernel`.

    Raises:
      RuleError: the tree has no kernel at all, or a list or tuple, whose kernels would be left out. Names leaves.
    """
    flat = flatten(params)
    for path, leaf in flat.items():
        # Named tuples and dataclasses are kinds of kernels; plain lists and tuples are containers of layers.
        if type(leaf) in (list, tuple):
            raise RuleError(f'{path} is a {type(leaf).__name__}, whose kernels have no path: {_EXPECTED}')
    found = {path: leaf for path, leaf in flat.items() if is_kernel(path, leaf)}
    if not found:
        leaves = [f'{path} {getattr(leaf, "shape", type(leaf).__name__)}' for path, leaf in flat.items()]
        rest = f' and {len(leaves) - SHOWN} more' if len(leaves) > SHOWN else ''
        raise RuleError(f'no kernel among {", ".join(leaves[:SHOWN]) or "no leaves"}{rest}: {_EXPECTED}')
    return found


def check_layout(params: PyTree, paths: Iterable[str]) -> None:
    """Check that the axes of kernels that are to be pruned or adapted are known.

    A kernel is `[in, out]`; a kernel of three axes is a stack `[layers, in, out]`. But Flax's attention and its
    DenseGeneral have kernels `[in, heads, head_dim]`, whose groups would run along the wrong axis. So a kernel of three
    axes outside of `blocks` is refused in two cases: the bias beside it is not `[layers, out]`, or its layer is called
    `query`, `key`, `value` or `out` and no bias shows that it is a stack. More than three axes are refused everywhere.

    Args:
      params: the params tree.
      paths: of the kernels to check.

    Raises:
      RuleError: names path and shape, and asks for a reshape to [in, out].
    """
    flat = flatten(params)
    for path in paths:
        shape = tuple(flat[path].shape)
        layer = path.removesuffix(f'/{KERNEL}')
        # Within blocks the first axis is the layer, whatever the layers are called.
        is_stack = len(shape) == 3 and (is_in_block(path) or _looks_stacked(layer, shape, flat.get(f'{layer}/bias')))
        if len(shape) > 2 and not is_stack:
            raise RuleError(
                f'{path} {list(shape)}: which axes are contracted is not known. Expected [in, out], or a stack '
                f'[layers, in, out]. Reshape it: [in, heads, head_dim] to [in, heads * head_dim], '
                f'[heads, head_dim, out] to [heads * head_dim, out]'
            )


def _looks_stacked(layer: str, shape: tuple[int, ...], bias: Any) -> bool:
    """Return whether a kernel of three axes is [layers, in, out], as far as its bias and its layer's name tell."""
    layers, inputs, outputs = shape
    if bias is not None:
        of_stack = (layers, outputs)
        of_attention = (inputs, outputs)  # [heads, head_dim]
        if tuple(bias.shape) != of_stack:
            return False
        if of_stack != of_attention:
            return True
    return layer.rsplit('/', 1)[-1] not in _ATTENTION


def match(rules: Sequence[tuple[str, Value]], paths: Iterable[str]) -> dict[str, Value]:
    """Return the value of each path: that of the first rule whose regex matches the whole path.

    Args:
      rules: `(regex, value)` in order. A final catch-all `'.*'` may be shadowed completely by the rules before it.
      paths: the paths of all kernels.

    Raises:
      RuleError: a path that no rule matches, a rule whose regex matches no path at all, or a regex that does not
        compile.

    >>> match([('.*/q/kernel', '2:4'), ('.*', 'dense')], ['attn/q/kernel', 'head/kernel'])
    {'attn/q/kernel': '2:4', 'head/kernel': 'dense'}
    """
    paths = list(paths)
    for pattern, _ in rules:
        try:
            regex = re.compile(pattern)
        except re.error as error:
            raise RuleError(f'rule {pattern!r} is not a regular expression: {error}') from None
        # A catch-all may be left with nothing; any other rule without a path is a typo.
        if pattern != '.*' and not any(regex.fullmatch(path) for path in paths):
            raise RuleError(f'rule {pattern!r} matches none of the {len(paths)} kernels, e.g. {paths[:3]}')
    return {path: first_match(rules, path) for path in paths}


def first_match(rules: Sequence[tuple[str, Value]], path: str) -> Value:
    """Return the value of the first rule whose regex matches the whole path.

    Args:
      rules: `(regex, value)` in order.
      path: the path of one kernel.

    Raises:
      RuleError: no rule matches.
    """
    for pattern, value in rules:
        if re.fullmatch(pattern, path):
            return value
    raise RuleError(f'no rule matches kernel {path!r}; end the list with a (".*", ...) rule')
