"""How much memory each stage of a recipe takes on one device: analytic, from shapes, every term by its name.

The shapes of hidden states, and of what each linear reads, come from tracing the model's own forward on a batch of
shapes. What XLA adds (fusion scratch, layouts, collectives) is not in it: see `restore` for how far it is off.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from sparselora_jax import pruning
from sparselora_jax.checkpoints.layout import PIECE
from sparselora_jax.models.model import abstract_params
from sparselora_jax.planning.tracing import Stack, batch_of, nbytes, stacks
from sparselora_jax.pruning import calibrate
from sparselora_jax.recipe import base_formats, lora_rules, prune_methods, prune_rules, rounded_rules, runs_teacher
from sparselora_jax.sparse import rules as rules_lib
from sparselora_jax.sparse import sharding
from sparselora_jax.sparse.packing import reduce_shapes
from sparselora_jax.sparse.weights import init_lora

FLOAT = 4  # bytes of float32
DISTILLED = 3  # arrays of logits in the loss: the student's, the teacher's, the gradient


class Stage(NamedTuple):
    """Bytes on one device: what is held all along, and moments of which only the largest counts, each by its terms."""

    held: dict[str, int]
    moments: dict[str, dict[str, int]]

    @property
    def total(self) -> int:
        """Bytes at the highest moment."""
        return sum(self.held.values()) + max((sum(terms.values()) for terms in self.moments.values()), default=0)


def on_device(tree: dict, mesh: AbstractMesh | None) -> int:
    """Bytes of params, masks or LoRA on one device of a mesh, as `sharding.RULES` split them; None: one device."""
    if mesh is None:
        return nbytes(tree)
    split = sharding.shardings(tree, mesh)
    return nbytes(jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(s.shard_shape(x.shape), x.dtype), tree, split))


class Recipe(NamedTuple):
    """The trees of a recipe, by shapes, and where they lie."""

    cfg: Any
    config: Any
    params: dict
    masks: dict
    densities: dict[str, float]  # of the kernels that have a mask
    lora: dict
    mesh: AbstractMesh | None


def recipe(cfg: Any, config: Any) -> Recipe:
    """A family's config and a recipe (what `configs/*.py` return) -> the trees that its stages hold.

    Raises:
      PatternError, RuleError: the recipe does not fit the model. ConfigError: an unknown method.
    """
    params, axes = abstract_params(cfg, config.dtype), config.mesh.to_dict()
    kernels = rules_lib.kernels(params)
    pruned = pruning.patterns_of(params, prune_rules(config))
    masks = rules_lib.unflatten({path: jax.ShapeDtypeStruct(kernels[path].shape, jnp.bool_) for path in pruned})
    lora = jax.eval_shape(lambda key: init_lora(key, params, lora_rules(config)), jax.random.key(0))
    sizes = tuple(axes[name] for name in sharding.AXES)
    densities = {path: 1 - pattern.sparsity for path, pattern in pruned.items()}
    mesh = AbstractMesh(sizes, sharding.AXES) if max(sizes) > 1 else None
    return Recipe(cfg, config, params, masks, densities, lora, mesh)


def base(made: Recipe) -> tuple[dict, dict]:
    """(params, masks), by shapes, as restoration holds them."""
    formats = base_formats(made.config)
    if formats is None or not made.masks:
        return made.params, made.masks
    return reduce_shapes(made.params, made.densities, formats)


def holds_teacher(made: Recipe) -> bool:
    """Whether restoration holds dense params that are not those of the student."""
    changed = made.config.prune.method == 'sparsegpt' or base_formats(made.config) is not None
    return runs_teacher(made.config) and bool(made.masks) and changed


def _samples(made: Recipe, count: int) -> int:
    """How many of a batch's samples one device has: they are split over data and fsdp."""
    return -(-count // (made.config.mesh.data * made.config.mesh.fsdp))


def _traced(made: Recipe, samples: int) -> list[Stack]:
    return stacks(made.cfg, made.params, batch_of(made.cfg, made.config.text, samples))


def _only(made: Recipe, keep: Callable[[str], bool]) -> int:
    """Bytes on one device of the params whose path is to be kept."""
    flat = rules_lib.flatten(made.params)
    return on_device(rules_lib.unflatten({path: leaf for path, leaf in flat.items() if keep(path)}), made.mesh)


def load(made: Recipe) -> Stage:
    """Reading the model."""
    piece = min(PIECE, max(nbytes(leaf) for leaf in jax.tree.leaves(made.params)))
    moments = {'placing a piece of a tensor': {'as it was read, and in our layout': 2 * piece}}
    return Stage({'params': on_device(made.params, made.mesh)}, moments)


def prune(made: Recipe) -> Stage:
    """Pruning block by block, with the hidden states of the whole calibration set in memory; the job writes each pruned
    layer to disk at once.
    """
    methods = prune_methods(made.config)
    pruners = {path: rules_lib.first_match(methods, path) for path in made.densities}
    return _walk(made, pruners, from_disk=made.config.stream)


def round_base(made: Recipe) -> Stage:
    """Choosing what a base in four bits holds, which goes block by block too, of what is read from disk; or nothing."""
    if not (rules := rounded_rules(made.config)):
        return Stage({}, {})
    return _walk(made, dict.fromkeys(pruning.patterns_of(made.params, rules), pruning.GPTQ()), from_disk=True)


def _walk(made: Recipe, methods: dict[str, Any], *, from_disk: bool) -> Stage:
    """`methods`: of every kernel that is to be changed, by path."""
    config = made.config
    samples = _samples(made, config.prune.samples)
    held = {
        'params': _only(made, lambda path: not from_disk or '/blocks/' not in path),
        'calibration batch': nbytes(batch_of(made.cfg, config.text, samples)),
        # What came in, what the last block put out, what this one does; what blocks only read, whole and in chunks.
        'hidden states of the calibration set': max(3 * s.hidden + 2 * nbytes(s.ctx) for s in _traced(made, samples)),
    }
    chunks = _traced(made, min(config.prune.chunk, samples))
    observing = [_observing(made, stack, methods) for stack in chunks]
    cutting = [_cutting(made, stack, methods) for stack in chunks]
    moments = {'observing a block': max(observing, key=_sum), 'pruning a block': max(cutting, key=_sum)}
    return Stage(held, moments)


def _sum(terms: dict[str, int]) -> int:
    return sum(terms.values())


def _block(made: Recipe, stack: Stack) -> int:
    """Bytes of one block's params."""
    return _only(made, lambda path: path.startswith(f'{stack.tower}/blocks/')) // stack.depth


def _statistics(stack: Stack, methods: dict[str, Any]) -> dict[str, int]:
    """Bytes of one block's statistics: {the first kernel that reads an array: of its statistic}."""
    sizes = {}
    for name, read in stack.inputs.items():
        if (path := f'{stack.tower}/blocks/{name}') in methods:
            statistic = methods[path].statistic or calibrate.squares
            rows = jax.ShapeDtypeStruct((1, read.shape[-1]), jnp.float32)
            sizes[stack.leaders[name]] = nbytes(jax.eval_shape(statistic, rows))
    return sizes


def _observing(made: Recipe, stack: Stack, methods: dict[str, Any]) -> dict[str, int]:
    # A sum so far, a chunk's, and both added.
    statistics = 3 * _sum(_statistics(stack, methods))
    terms = {'one block': _block(made, stack), 'its statistics, thrice': statistics, 'one chunk in it': _working(stack)}
    if made.mesh is not None and made.mesh.shape['fsdp'] > 1:
        terms['the block, gathered along fsdp'] = _gathered(made, stack)
    return terms


def _gathered(made: Recipe, stack: Stack) -> int:
    """Bytes of one block's params on a device that runs it."""
    prefix = f'{stack.tower}/blocks/'
    flat = {path: leaf for path, leaf in rules_lib.flatten(made.params).items() if path.startswith(prefix)}
    where = rules_lib.flatten(sharding.gathered(rules_lib.unflatten(flat), made.mesh))
    shapes = (jax.ShapeDtypeStruct(where[path].shard_shape(leaf.shape), leaf.dtype) for path, leaf in flat.items())
    return nbytes(list(shapes)) // stack.depth


def _cutting(made: Recipe, stack: Stack, methods: dict[str, Any]) -> dict[str, int]:
    statistics, kernels = _statistics(stack, methods), rules_lib.kernels(made.params)
    groups: dict[str, int] = {}  # kernels that read the same array are pruned as one
    for name, leader in stack.leaders.items():
        if leader in statistics:
            inputs, outputs = kernels[f'{stack.tower}/blocks/{name}'].shape[-2:]
            groups[leader] = groups.get(leader, 0) + inputs * outputs * FLOAT
    terms = {'one block': _block(made, stack), 'its statistics': _sum(statistics)}
    used = set(methods.values())
    if any(isinstance(getattr(method, 'initial', method), pruning.SparseGPT | pruning.GPTQ) for method in used):
        terms['inverting the largest Hessian, thrice its size'] = 3 * max(statistics.values(), default=0)
    copies = 6 if any(isinstance(method, pruning.DSnoT) for method in used) else 4
    return terms | {'weights, scores, ranks of kernels pruned as one': copies * max(groups.values(), default=0)}


def _working(stack: Stack) -> int:
    """What a block needs beside its linears' outputs: the largest arrays (attention's weights) before and after."""
    return stack.outputs + 2 * stack.widest


def _held_base(made: Recipe) -> dict[str, int]:
    (params, masks), of = base(made), made.config.restore.base
    held = {'params': on_device(params, made.mesh)}
    if masks:
        held[f'masks ({"1 byte" if of == "dense" else "1 bit"} a weight)'] = on_device(masks, made.mesh)
    if holds_teacher(made):  # it shares what has no mask
        why = 'SparseGPT changes kept weights' if of == 'dense' else f'the base is {of}'
        held[f'kernels of the dense teacher ({why})'] = _only(made, made.densities.__contains__)
    return held


def restore(made: Recipe) -> Stage:
    """A train step.

    XLA's own count of temporary memory (all but params, masks, teacher, LoRA and Adam), in float32 on a CPU, is 0.85 to
    1.2 times this (tests/planning/test_memory.py). A CPU computes bfloat16 in float32 and takes twice as much of it.
    """
    config, knobs = made.config, made.config.restore
    micro = -(-_samples(made, knobs.batch) // knobs.accumulate)
    run, adapted = _traced(made, micro), rules_lib.flatten(made.lora if knobs.trained == 'lora' else made.masks)
    what = 'LoRA' if knobs.trained == 'lora' else 'trained kernels'
    trained = on_device(made.lora, made.mesh) if knobs.trained == 'lora' else FLOAT * on_device(made.masks, made.mesh)
    # The backward stops at the first tower that is trained; what comes before it keeps nothing.
    reached = [any(path.startswith(f'{stack.tower}/') for path in adapted) for stack in run]
    kept = run[reached.index(True) :] if any(reached) else []
    held = _held_base(made)
    held |= {f'{what} (float32)': trained, f'Adam (2 of {what})': 2 * trained}
    held[f'gradients (of {what})'] = trained * (2 if knobs.accumulate > 1 else 1)
    held['block inputs'] = sum(stack.depth * stack.hidden for stack in kept)
    if not knobs.remat:
        held["linears' outputs"] = sum(stack.depth * stack.outputs for stack in kept)
    copies = 2 if knobs.remat else 1  # of the outputs: their gradients, and themselves unless they were kept
    kernel = max(
        (math.prod(leaf.shape[-2:]) * FLOAT for leaf in rules_lib.kernels(made.params).values() if leaf.ndim > 2),
        default=0,
    )
    backward = {
        'one block in the backward': max((copies * stack.outputs + _working(stack) for stack in kept), default=0),
        'the largest combined kernel and its gradient, float32': 3 * kernel,
    }
    logits = DISTILLED * micro * config.text.answer_tokens * made.cfg.language.vocab * FLOAT
    return Stage(held, {'backward through a block': backward, 'loss': {'logits (float32)': logits}})


def merge(made: Recipe) -> Stage:
    """Folding LoRA into the kernels, a layer at a time; then writing them."""
    changed = rules_lib.flatten(made.masks).keys() | rules_lib.flatten(made.lora).keys()
    held = _held_base(made)
    held |= {'LoRA (float32)': on_device(made.lora, made.mesh), 'merged kernels': _only(made, changed.__contains__)}
    depths = {path: math.prod(leaf.shape[:-2]) for path, leaf in rules_lib.kernels(made.params).items()}
    largest = max((_only(made, path.__eq__) // depths[path] for path in rules_lib.flatten(made.lora)), default=0)
    width = jnp.dtype(made.config.dtype).itemsize
    copies = 2 if width == FLOAT else 3  # the kernel unless it is float32, its update, and their sum
    return Stage(held, {'merging a layer': {'its largest kernel, float32': copies * largest * FLOAT // width}})


STAGES = {'load': load, 'prune': prune, 'round': round_base, 'restore': restore, 'merge and export': merge}
