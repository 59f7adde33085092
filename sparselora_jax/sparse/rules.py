"""Ordered (regex, value) rules over the paths of a pytree.

Everything said per weight (pattern, rank, sharding) is such a list. `re.fullmatch`, first match wins; a kernel that no
rule matches and a rule that matches nothing are errors, so a typo never silently leaves a tower dense.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from flax import traverse_util

from sparselora_jax.runtime.errors import SparseloraError


class RuleError(SparseloraError, ValueError):
    """A rule list that does not fit the tree it is applied to."""


def flatten(tree: dict) -> dict[str, Any]:
    """Nested dict -> {'language/blocks/attn/q/kernel': leaf}, by name. Non-dict containers (Lora, arrays) are leaves.

    Sorted, whatever the tree's own order: JAX sorts keys wherever it maps a tree, so a tree that was put on a mesh has
    another order than the one that was read, and what is drawn for the n-th kernel must not depend on that.
    """
    return dict(sorted(traverse_util.flatten_dict(tree, sep='/').items()))


def unflatten(flat: dict[str, Any]) -> dict:
    """The inverse of `flatten`."""
    return traverse_util.unflatten_dict(flat, sep='/')


def named_kernel(path: str) -> bool:
    """Whether an array is laid out [in, out]."""
    return path.rsplit('/', 1)[-1] == 'kernel'


def is_kernel(path: str, leaf: Any) -> bool:
    """Whether a leaf is a matrix that the library may prune or adapt: named `kernel`, of rank 2 or more."""
    return named_kernel(path) and getattr(leaf, 'ndim', 0) >= 2


def kernels(params: dict) -> dict[str, Any]:
    """The kernels of a params tree, by path."""
    return {path: leaf for path, leaf in flatten(params).items() if is_kernel(path, leaf)}


def match(rules: Sequence[tuple[str, Any]], paths: Iterable[str]) -> dict[str, Any]:
    """The value of each path: {path: value of the first rule whose regex matches the whole path}.

    Raises:
      RuleError: a path that no rule matches, a rule whose regex matches no path at all, or a regex that does not
        compile. A final catch-all `'.*'` may be shadowed completely by the rules before it.

    >>> match([('.*/q/kernel', '2:4'), ('.*', 'dense')], ['attn/q/kernel', 'head/kernel'])
    {'attn/q/kernel': '2:4', 'head/kernel': 'dense'}
    """
    paths = list(paths)
    compiled = []
    for pattern, value in rules:
        try:
            compiled.append((re.compile(pattern), value))
        except re.error as error:
            raise RuleError(f'rule {pattern!r} is not a regular expression: {error}') from None
    for regex, _ in compiled:
        if regex.pattern != '.*' and not any(regex.fullmatch(path) for path in paths):
            raise RuleError(f'rule {regex.pattern!r} matches none of the {len(paths)} kernels, e.g. {paths[:3]}')
    return {path: first_match(rules, path) for path in paths}


def first_match(rules: Sequence[tuple[str, Any]], path: str) -> Any:
    """The value of the first rule whose regex matches the whole path.

    Raises:
      RuleError: none does.
    """
    for pattern, value in rules:
        if re.fullmatch(pattern, path):
            return value
    raise RuleError(f'no rule matches kernel {path!r}; end the list with a (".*", ...) rule')
