"""What a model consists of and what a recipe does to it, from shapes alone: nothing is loaded or printed here."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from sparselora_jax.sparse import rules as rules_lib


class Tower(NamedTuple):
    """One row of a model's towers; blocks 0: a part without any."""

    name: str
    blocks: int
    width: int
    parameters: int
    share: float  # of the whole model's


class Match(NamedTuple):
    """What one rule of a list decides: the kernels that it is the first to match, by path."""

    regex: str
    value: Any
    paths: tuple[str, ...]
    matrices: int  # layers counted
    parameters: int


def count(tree: Any) -> int:
    """How many numbers a tree of arrays, or of their shapes, holds."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def towers(cfg: Any, params: dict) -> list[Tower]:
    """The model's parts in order; of an encoder-decoder its stacks, and beside them what they share."""
    flat, total = rules_lib.flatten(params), count(params)
    depths = {path.split('/blocks/')[0]: leaf.shape[0] for path, leaf in flat.items() if '/blocks/' in path}
    sizes: dict[str, int] = {}
    for path, leaf in flat.items():
        stack = next((name for name in depths if path.startswith(f'{name}/')), path.split('/')[0])
        sizes[stack] = sizes.get(stack, 0) + count(leaf)

    def width(name):  # a projection is as wide as what it projects to
        return getattr(cfg, name.split('/')[0], cfg.language).width

    return [Tower(name, depths.get(name, 0), width(name), size, size / total) for name, size in sizes.items()]


def matches(params: dict, rules: Sequence[tuple[str, Any]]) -> list[Match]:
    """What each rule decides, in order.

    Raises:
      RuleError: a kernel that no rule matches, or a rule that matches none.
    """
    kernels = rules_lib.kernels(params)
    rules_lib.match(rules, kernels)
    first = {path: rules_lib.first_match([(r, i) for i, (r, _) in enumerate(rules)], path) for path in kernels}
    found = []
    for index, (regex, value) in enumerate(rules):
        paths = tuple(path for path in kernels if first[path] == index)
        matrices = sum(math.prod(kernels[path].shape[:-2]) for path in paths)
        found.append(Match(regex, value, paths, matrices, sum(count(kernels[path]) for path in paths)))
    return found


def dense_groups(params: dict, pruned: Sequence[str]) -> dict[str, int]:
    """{name of a group: its parameters} of what stays dense: kernels by tower and part, all else as one."""
    kernels, groups = rules_lib.kernels(params), {}
    for path in kernels.keys() - set(pruned):
        stack, inside, _ = path.partition('/blocks/')
        name = f'{stack}/blocks' if inside else path.removesuffix('/kernel')
        groups[name] = groups.get(name, 0) + count(kernels[path])
    groups = dict(sorted(groups.items()))
    return groups | {'embeddings, positions, norms, biases': count(params) - count(list(kernels.values()))}
