"""Paths of a params tree, and ordered (regex, value) rules over them.

Every setting per weight (pattern, rank, sharding) is an ordered list of rules. A rule applies to a path if its regex
matches the whole path; the first such rule wins. A kernel that no rule matches is an error, and so is a rule that
matches nothing. So a typo never silently leaves a tower dense.

Only this module parses paths. `language/blocks/attn/q/kernel` is the kernel `attn/q/kernel` of every block of
the stack `language`. A tower may hold two stacks: T5 has `language/encoder` and `language/decoder`.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
from flax import traverse_util
from jaxtyping import PyTree
from qwix import QArray

from sparselora_jax.runtime.errors import SparseloraError

Value = TypeVar('Value')

KERNEL = 'kernel'  # the last part of the path of a matrix [in, out]
BLOCKS = 'blocks'  # the part of a path below which arrays are stacked: [layers, ...]
SHOWN = 5  # most leaves that an error lists


class RuleError(SparseloraError, ValueError):
    """A list of rules that does not fit its tree, or a tree without kernels."""


def flatten(tree: PyTree) -> dict[str, Any]:
    """Return the leaves of a nested dict by path: {'language/blocks/attn/q/kernel': leaf}.

    Containers that are not dicts (`Lora`, packed kernels, arrays) are leaves. Paths are sorted, so the result does
    not depend on the tree's order. This matters because random numbers are drawn for the n-th kernel, and JAX sorts
    keys when it maps a tree: a tree on a mesh is ordered differently from the tree that was read.

    Args:
      tree: nested dicts whose keys are strings.

    Raises:
      RuleError: the tree is not a dict, or a key is not a string or contains a slash.
    """
    if not isinstance(tree, Mapping):
        raise RuleError(f'the tree is a {type(tree).__name__}: {_EXPECTED}')
    try:
        leaves = traverse_util.flatten_dict(tree)
    except AssertionError:  # a mapping that Flax does not accept as a dict, such as the State of an NNX model
        kind = f'{type(tree).__name__} (of NNX? nnx.to_pure_dict(state) makes a dict)'
        raise RuleError(f'the tree is a {kind}: {_EXPECTED}') from None
    for keys in leaves:
        for key in keys:
            if not isinstance(key, str):
                path = '/'.join(map(str, keys))
                raise RuleError(f'{path}: key {key!r} is a {type(key).__name__}, expected a string: {_EXPECTED}')
            # Its path would be that of a nested dict.
            if '/' in key:
                raise RuleError(f'key {key!r} contains a slash, which separates the keys of a path: use another name')
    return {'/'.join(keys): leaves[keys] for keys in sorted(leaves, key='/'.join)}


_EXPECTED = f'expected nested dicts with string keys, whose matrices are called {KERNEL!r}'


def leaves_by_path(tree: PyTree, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Return the leaves of any tree by path, in the tree's own order.

    For nested dicts the paths are those of `flatten`. The `value` of a box around an array, such as a variable of NNX,
    is no part of the path.

    Args:
      tree: any pytree: dicts, lists, dataclasses, modules.
      is_leaf: tells for a part of the tree whether it is a leaf; None: only arrays are.

    Raises:
      RuleError: two leaves have the same path.

    >>> leaves_by_path({'layers': [{'w': 1.0}, {'w': 2.0}]})
    {'layers/0/w': 1.0, 'layers/1/w': 2.0}
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf)
    by_path = {}
    for keys, leaf in leaves:
        is_boxed = len(keys) > 1 and isinstance(keys[-1], jax.tree_util.GetAttrKey) and keys[-1].name == 'value'
        path = jax.tree_util.keystr(keys[:-1] if is_boxed else keys, simple=True, separator='/')
        if path in by_path:
            raise RuleError(f'{path}: two leaves have this path; use keys without slashes')
        by_path[path] = leaf
    return by_path


def paths_of(tree: PyTree) -> dict[str, Any]:
    """Return the leaves of any tree by path: of nested dicts by `flatten`, of other trees by `leaves_by_path`.

    A packed or four-bit kernel is one leaf.

    Args:
      tree: any pytree.
    """
    return flatten(tree) if _is_nested_dict(tree) else leaves_by_path(tree, _is_reduced)


def with_leaves(tree: PyTree, leaves: Mapping[str, Any]) -> PyTree:
    """Return a tree with other leaves at some of its paths.

    Args:
      tree: any pytree.
      leaves: the new leaves, by the paths of `paths_of`.
    """
    if _is_nested_dict(tree):
        return unflatten(flatten(tree) | dict(leaves))
    structure = jax.tree.structure(tree, is_leaf=_is_reduced)
    return structure.unflatten([leaves.get(path, leaf) for path, leaf in paths_of(tree).items()])


def _is_reduced(node: object) -> bool:
    """Return whether a part of a tree is a packed or four-bit kernel, which is a tree of arrays itself."""
    # On the class: a box of NNX seems to have all attributes of what is in it.
    return isinstance(node, QArray) or hasattr(type(node), 'unpack_mask')


def _is_nested_dict(tree: PyTree) -> bool:
    """Return whether `flatten` reaches all arrays of a tree: it takes what is no dict for a leaf."""
    # Haiku's keys are paths themselves.
    if not isinstance(tree, dict) or any(isinstance(key, str) and '/' in key for key in tree):
        return False
    return all(
        _is_nested_dict(child) if isinstance(child, dict) else not _is_container(child) for child in tree.values()
    )


def _is_container(leaf: object) -> bool:
    """Return whether a leaf of nested dicts is a tree itself; kinds of kernels are trees too, but have a shape."""
    return leaf is not None and not hasattr(leaf, 'shape') and not jax.tree_util.all_leaves([leaf])


def unflatten(flat: Mapping[str, Any]) -> dict:
    """Return the nested dict whose leaves have these paths: the inverse of `flatten`."""
    return traverse_util.unflatten_dict(flat, sep='/')


def is_in_block(path: str) -> bool:
    """Return whether a path is inside a stack of blocks.

    >>> is_in_block('language/blocks/attn/q/kernel'), is_in_block('language/head/kernel')
    (True, False)
    """
    return BLOCKS in path.split('/')[:-1]


def stack_of(path: str) -> str:
    """Return the stack of blocks that contains a path; a path outside blocks is returned unchanged.

    >>> stack_of('language/encoder/blocks/attn/q/kernel'), stack_of('language/head/kernel')
    ('language/encoder', 'language/head/kernel')
    """
    return _split_at_blocks(path)[0] if is_in_block(path) else path


def name_in_block(path: str) -> str:
    """Return the name of an array within its block; a path outside blocks is returned unchanged.

    >>> name_in_block('language/blocks/attn/q/kernel')
    'attn/q/kernel'
    """
    return _split_at_blocks(path)[1] if is_in_block(path) else path


def block_path(tower: str, name: str) -> str:
    """Return the path of the array `name` within the blocks of a stack.

    Args:
      tower: path of the stack, such as `language` or `language/encoder`.
      name: name within a block, such as `attn/q/kernel`.

    >>> block_path('language', 'attn/q/kernel')
    'language/blocks/attn/q/kernel'
    """
    return f'{tower}/{BLOCKS}/{name}' if tower else f'{BLOCKS}/{name}'


def block_rule(tower: str, regex: str = '.*') -> str:
    """Return a regex that matches the paths in a tower's blocks whose name within the block matches `regex`.

    Args:
      tower: name of the tower. A T5 has two stacks, `language/encoder` and `language/decoder`; both match `language`.
      regex: regex of names within a block, such as `attn/[qv]/kernel`.

    >>> block_rule('language', 'attn/q/kernel|mlp/up/kernel')
    'language/(.*/)?blocks/(?:attn/q/kernel|mlp/up/kernel)'
    """
    # Grouped, because in 'prefix/a|b' the prefix would apply to the first alternative only.
    rest = regex if regex == '.*' else f'(?:{regex})'
    return f'{tower}/(.*/)?{BLOCKS}/{rest}'


def _split_at_blocks(path: str) -> tuple[str, str]:
    parts = path.split('/')
    index = parts.index(BLOCKS)
    return '/'.join(parts[:index]), '/'.join(parts[index + 1 :])


def named_kernel(path: str) -> bool:
    """Return whether a path names a kernel, whose layout is [in, out]."""
    return path.rsplit('/', 1)[-1] == KERNEL


def is_kernel(path: str, leaf: Any) -> bool:
    """Return whether a leaf is a matrix that the library may prune or adapt: named `kernel`, of rank 2 or more."""
    return named_kernel(path) and getattr(leaf, 'ndim', 0) >= 2


def kernels(params: PyTree) -> dict[str, Any]:
    """Return the kernels of a params tree by path.

    Args:
      params: nested dicts whose matrices are called `kernel`.

    Raises:
      RuleError: the tree has no kernels, or has a list or tuple, whose kernels have no path; the message names leaves.
    """
    flat = flatten(params)
    for path, leaf in flat.items():
        # Named tuples and dataclasses may be kinds of kernels; plain lists and tuples are containers of layers.
        if type(leaf) in (list, tuple):
            raise RuleError(f'{path} is a {type(leaf).__name__}, whose kernels have no path: {_EXPECTED}')
    found = {path: leaf for path, leaf in flat.items() if is_kernel(path, leaf)}
    if not found:
        leaves = [f'{path} {getattr(leaf, "shape", type(leaf).__name__)}' for path, leaf in flat.items()]
        rest = f' and {len(leaves) - SHOWN} more' if len(leaves) > SHOWN else ''
        raise RuleError(f'no kernel among {", ".join(leaves[:SHOWN]) or "no leaves"}{rest}: {_EXPECTED}')
    return found


def hidden_matrices(params: PyTree) -> list[str]:
    """Return the paths of leaves that hold a matrix but are no arrays, so that `kernels` does not see them.

    Such are boxes (`nn.Partitioned`), the state of a module, and objects of any kind in the place of a kernel.

    Args:
      params: the params tree.
    """
    leaves = {path: leaf for path, leaf in flatten(params).items() if not hasattr(leaf, 'shape')}
    return [
        path
        for path, leaf in leaves.items()
        if named_kernel(path) or any(getattr(part, 'ndim', 0) >= 2 for part in jax.tree.leaves(leaf))
    ]


def check_layout(params: PyTree, paths: Iterable[str]) -> None:
    """Check that the axes of the kernels to prune or adapt are known.

    A kernel is `[in, out]`, and a kernel with three axes is a stack `[layers, in, out]`. But Flax's attention and
    DenseGeneral have kernels `[in, heads, head_dim]`, whose groups would run along the wrong axis. So a kernel with
    three axes must lie within `blocks`, where all kernels of a stack have the same number of layers, or have a bias
    beside it that can only be `[layers, out]`. Kernels with more than three axes are always refused.

    Args:
      params: the params tree.
      paths: paths of the kernels to check.

    Raises:
      RuleError: the axes are unknown; names path and shape, and says how to make them known.
    """
    flat = flatten(params)
    stacked = [path for path, leaf in flat.items() if is_in_block(path) and is_kernel(path, leaf) and leaf.ndim == 3]
    # {stack: its first kernel}, which the others must agree with.
    first_of_stack = {stack_of(path): path for path in reversed(stacked)}
    for path in paths:
        shape = tuple(flat[path].shape)
        if is_in_block(path) and len(shape) == 3:
            _check_stack(path, shape, first_of_stack[stack_of(path)], flat)
        bias = flat.get(f'{path.removesuffix(KERNEL)}bias')
        # Within blocks the first axis is always the layer.
        is_stack = len(shape) == 3 and (is_in_block(path) or _has_bias_of_stack(shape, bias))
        if len(shape) > 2 and not is_stack:
            raise RuleError(
                f'{path} {list(shape)}: which axes are contracted is unknown. Expected [in, out]. Reshape it: '
                '[in, heads, head_dim] to [in, heads * head_dim], [heads, head_dim, out] to [heads * head_dim, out]. '
                f'If it is a stack [layers, in, out], put it into a dict called {BLOCKS!r}'
            )


def _check_stack(path: str, shape: tuple[int, ...], first: str, flat: Mapping[str, Any]) -> None:
    """Check that a kernel with three axes within `blocks` can be a stack `[layers, in, out]`."""
    remedy = f'expected stacks [layers, in, out] of one number of layers within {BLOCKS!r}'
    # Layers that are numbered are not stacked, so the first axis is no layer.
    number = next((part for part in name_in_block(path).split('/') if part.isdigit()), None)
    if number is not None:
        raise RuleError(f'{path} {list(shape)}: the key {number!r} numbers layers that are not stacked; {remedy}')
    first_shape = tuple(flat[first].shape)
    if shape[0] != first_shape[0]:
        raise RuleError(f'{path} {list(shape)} and {first} {list(first_shape)} differ in their first axis; {remedy}')


def _has_bias_of_stack(shape: tuple[int, ...], bias: Any) -> bool:
    """Return whether the bias of a kernel with three axes can only be that of a stack `[layers, in, out]`."""
    layers, inputs, outputs = shape
    # The bias of [in, heads, head_dim] is [heads, head_dim]; if layers equal inputs, both kinds have the same shape.
    return bias is not None and tuple(bias.shape) == (layers, outputs) and layers != inputs


def check_rules(rules: object) -> None:
    """Check that an object is a list of rules.

    Args:
      rules: what a user gave as rules.

    Raises:
      RuleError: it is not, and the message shows how to write it; or a regex does not compile.
    """
    expected = "expected a list of pairs (regex, value) in order, such as [('.*/q/kernel', '2:4'), ('.*', 'dense')]"
    if isinstance(rules, str | Mapping) or not isinstance(rules, Sequence):
        raise RuleError(f'rules {rules!r}: {expected}')
    for rule in rules:
        if isinstance(rule, str) or not isinstance(rule, Sequence) or len(rule) != 2 or not isinstance(rule[0], str):
            raise RuleError(f'rule {rule!r}: {expected}')
        try:
            re.compile(rule[0])
        except re.error as error:
            raise RuleError(f'rule {rule[0]!r} is not a regular expression: {error}') from None


def match(rules: Sequence[tuple[str, Value]], paths: Iterable[str]) -> dict[str, Value]:
    """Return the value of the first matching rule for each path.

    Args:
      rules: `(regex, value)` in order. Earlier rules may fully shadow a final catch-all `'.*'`.
      paths: the paths of all kernels.

    Raises:
      RuleError: the rules are no list of pairs, no rule matches a path, a regex matches no path at all, or a regex does
        not compile.

    >>> match([('.*/q/kernel', '2:4'), ('.*', 'dense')], ['attn/q/kernel', 'head/kernel'])
    {'attn/q/kernel': '2:4', 'head/kernel': 'dense'}
    """
    paths = list(paths)
    check_rules(rules)
    for pattern, _ in rules:
        # A catch-all may be left without paths; any other rule without a path is a typo.
        if pattern != '.*' and not any(re.fullmatch(pattern, path) for path in paths):
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
