"""Describes a model and what a recipe does to it, from shapes alone; `launch/inspect.py` prints it."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
from jaxtyping import PyTree

from sparselora_jax.planning.tracing import ModelConfig
from sparselora_jax.sparse import rules


class Tower(NamedTuple):
    """One row of a model's towers.

    Attributes:
      name: of a tower, of a stack of blocks in it, or of a part between towers.
      blocks: number of blocks; 0 for a part without blocks.
      width: of the hidden states.
      parameters: number of parameters.
      share: of the whole model's parameters.
    """

    name: str
    blocks: int
    width: int
    parameters: int
    share: float


class Match(NamedTuple):
    """What one rule of a list decides.

    Attributes:
      regex: of the rule.
      value: of the rule.
      paths: of the kernels that it is the first rule to match.
      matrices: number of these kernels, each layer counted.
      parameters: number of their parameters.
    """

    regex: str
    value: Any
    paths: tuple[str, ...]
    matrices: int
    parameters: int


def count(tree: PyTree) -> int:
    """Return how many numbers a tree of arrays, or of their shapes, holds."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def towers(cfg: ModelConfig, params: dict) -> list[Tower]:
    """Return the parts of a model in order; of an encoder-decoder its two stacks, and beside them what they share.

    Args:
      cfg: our config of the model.
      params: arrays or their shapes.
    """
    flat = rules.flatten(params)
    total = count(params)
    # Arrays of blocks are stacked: their first axis is the number of blocks.
    depths = {rules.stack_of(path): leaf.shape[0] for path, leaf in flat.items() if rules.is_in_block(path)}
    sizes: dict[str, int] = {}
    for path, leaf in flat.items():
        # What a stack has outside of its blocks (a final norm) counts to it, all else to its tower.
        stack = next((name for name in depths if path.startswith(f'{name}/')), path.split('/')[0])
        sizes[stack] = sizes.get(stack, 0) + count(leaf)

    def width(name: str) -> int:
        # A projection is as wide as the language tower that it projects to.
        tower = getattr(cfg, name.split('/')[0], cfg.language)
        return tower.width

    return [Tower(name, depths.get(name, 0), width(name), size, size / total) for name, size in sizes.items()]


def matches(params: dict, rule_list: Sequence[tuple[str, Any]]) -> list[Match]:
    """Return what each rule decides, in order.

    Args:
      params: arrays or their shapes.
      rule_list: see `sparse.rules`.

    Raises:
      RuleError: a kernel that no rule matches, or a rule that matches none.
    """
    kernels = rules.kernels(params)
    # Refuses what does not fit; below, values are not enough, since two rules may have the same one.
    rules.match(rule_list, kernels)
    numbered = [(regex, index) for index, (regex, _) in enumerate(rule_list)]
    first_rule = {path: rules.first_match(numbered, path) for path in kernels}
    decided = []
    for index, (regex, value) in enumerate(rule_list):
        paths = tuple(path for path in kernels if first_rule[path] == index)
        match = Match(
            regex=regex,
            value=value,
            paths=paths,
            matrices=sum(math.prod(kernels[path].shape[:-2]) for path in paths),
            parameters=sum(count(kernels[path]) for path in paths),
        )
        decided.append(match)
    return decided


def dense_groups(params: dict, pruned: Iterable[str]) -> dict[str, int]:
    """Return the number of parameters that stay dense: of kernels by stack or layer, and of all else together.

    Args:
      params: arrays or their shapes.
      pruned: paths of the kernels that are pruned.
    """
    kernels = rules.kernels(params)
    # The kernels of a stack are one group, a kernel outside of blocks (head, projection) is one of its own.
    groups: dict[str, int] = {}
    for path in kernels.keys() - set(pruned):
        in_block = rules.is_in_block(path)
        name = f'{rules.stack_of(path)}/{rules.BLOCKS}' if in_block else path.removesuffix(f'/{rules.KERNEL}')
        groups[name] = groups.get(name, 0) + count(kernels[path])
    groups = dict(sorted(groups.items()))
    groups['embeddings, positions, norms, biases'] = count(params) - count(list(kernels.values()))
    return groups
