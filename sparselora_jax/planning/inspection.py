"""Describe a model and what a recipe does to it, from shapes alone; `launch/inspect.py` prints it."""

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
      name: name of a tower, of a stack of blocks in it, or of a part between towers.
      blocks: number of blocks; 0 for a part without blocks.
      width: width of the hidden states.
      parameters: number of parameters.
      share: share of the whole model's parameters.
    """

    name: str
    blocks: int
    width: int
    parameters: int
    share: float


class Match(NamedTuple):
    """The kernels that one rule of a list applies to.

    Attributes:
      regex: regex of the rule.
      value: value of the rule.
      paths: paths of the kernels for which this is the first rule that matches.
      matrices: number of these kernels, counting each layer.
      parameters: number of their parameters.
    """

    regex: str
    value: Any
    paths: tuple[str, ...]
    matrices: int
    parameters: int


def count(tree: PyTree) -> int:
    """Return the number of elements in a tree of arrays or of their shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def towers(cfg: ModelConfig, params: dict) -> list[Tower]:
    """Return the parts of a model in order; an encoder-decoder has two stacks and a part that they share.

    Args:
      cfg: our config of the model.
      params: params, arrays or their shapes.
    """
    flat = rules.flatten(params)
    total = count(params)
    # Arrays of blocks are stacked: their first axis is the number of blocks.
    depths = {rules.stack_of(path): leaf.shape[0] for path, leaf in flat.items() if rules.is_in_block(path)}
    sizes: dict[str, int] = {}
    for path, leaf in flat.items():
        # Arrays of a stack outside its blocks (a final norm) belong to the stack, all others to the tower.
        stack = next((name for name in depths if path.startswith(f'{name}/')), path.split('/')[0])
        sizes[stack] = sizes.get(stack, 0) + count(leaf)

    def width(name: str) -> int:
        tower = getattr(cfg, name.split('/')[0], None)
        if tower is not None:
            return tower.width
        # A part between towers has the width that its kernels project to.
        return max(leaf.shape[-1] for path, leaf in flat.items() if path.startswith(f'{name}/'))

    return [Tower(name, depths.get(name, 0), width(name), size, size / total) for name, size in sizes.items()]


def matches(params: dict, rule_list: Sequence[tuple[str, Any]]) -> list[Match]:
    """Return the kernels that each rule applies to, in the order of the rules.

    Args:
      params: params, arrays or their shapes.
      rule_list: see `sparse.rules`.

    Raises:
      RuleError: no rule matches a kernel, or a rule matches no kernel.
    """
    kernels = rules.kernels(params)
    # Called for its errors. Its values do not identify the rules, since two rules may have the same value.
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
    """Count the parameters that stay dense: kernels by stack or layer, and all other arrays together.

    Args:
      params: params, arrays or their shapes.
      pruned: paths of the kernels that are pruned.
    """
    kernels = rules.kernels(params)
    # The kernels of a stack are one group; a kernel outside the blocks (head, projection) is a group of its own.
    groups: dict[str, int] = {}
    for path in kernels.keys() - set(pruned):
        in_block = rules.is_in_block(path)
        name = f'{rules.stack_of(path)}/{rules.BLOCKS}' if in_block else path.removesuffix(f'/{rules.KERNEL}')
        groups[name] = groups.get(name, 0) + count(kernels[path])
    groups = dict(sorted(groups.items()))
    groups['embeddings, positions, norms, biases'] = count(params) - count(list(kernels.values()))
    return groups
