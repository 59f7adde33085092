"""What a model consists of and what a recipe does to it, from shapes alone: nothing is loaded or printed here."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax

from sparselora_jax.models import blip2, causal, vit
from sparselora_jax.models.model import FAMILIES
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


def family_name(cfg: Any) -> str:
    """The name under which configs/ has the family's recipes: blip2, instructblip, llava, paligemma; or causal.

    >>> from sparselora_jax.models import llama
    >>> family_name(causal.CausalConfig(llama.LlamaConfig(8, 8, 1, 1, 1, 8)))
    'causal'
    """
    if isinstance(cfg, blip2.Blip2Config):
        return 'instructblip' if cfg.qformer.vocab else 'blip2'
    return FAMILIES[type(cfg)].__name__.rsplit('.', 1)[-1]


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


def unread(hf: Any, cfg: Any) -> dict[str, int]:
    """Parameters of the vision tower that a checkpoint holds and nothing here reads, by what they are.

    Args:
      hf: the transformers config; cfg: ours, made of it.
    """
    if isinstance(cfg, causal.CausalConfig | blip2.Blip2Config):
        return {}
    read, whole = cfg.vision, replace(vit.from_hf(hf.vision_config), final_norm=True)
    layers = whole.depth - read.depth
    deeper = count_shapes(vit.shapes(whole)) - count_shapes(vit.shapes(replace(whole, depth=read.depth)))
    found = {f'last {layers} of {whole.depth} vision layers': deeper, 'vision/norm': 2 * whole.width}
    d, f = whole.width, whole.mlp_width
    head = 4 * d * (d + 1) + d * (2 * f + 1) + f + 3 * d  # attention of a learned probe, MLP, norm
    siglip = hf.vision_config.model_type == 'siglip_vision_model'
    found['vision/head'] = head if siglip and getattr(hf.vision_config, 'vision_use_head', True) else 0
    if read.final_norm:
        del found['vision/norm']
    return {name: size for name, size in found.items() if size}


def count_shapes(shapes: dict) -> int:
    """How many numbers a tree of shapes (tuples) speaks of."""
    return sum(math.prod(shape) for shape in rules_lib.flatten(shapes).values())


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
