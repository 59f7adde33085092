"""Estimate the memory that each stage of a recipe takes on one device, from shapes alone, as a sum of named terms.

The shapes of hidden states and of each linear's input come from tracing the model's own forward on a batch of shapes.
Temporary memory that XLA adds (for fusions, layouts and collectives) is not counted; `restore` says how large the error
is.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jaxtyping import PyTree
from ml_collections import ConfigDict

from sparselora_jax import pruning
from sparselora_jax.checkpoints.layout import PIECE
from sparselora_jax.evaluation import decode
from sparselora_jax.models.model import abstract_model, abstract_params
from sparselora_jax.planning.tracing import ModelConfig, Stack, batch_of, nbytes, stacks
from sparselora_jax.pruning import calibrate
from sparselora_jax.pruning.kernels import kernels_pruned_as_one
from sparselora_jax.recipe import (
    base_formats,
    edited_kernels,
    lora_rules,
    prune_methods,
    prune_rules,
    reconstruction,
    rounded_rules,
    runs_teacher,
)
from sparselora_jax.sparse import rules, sharding
from sparselora_jax.sparse.packing import reduce_shapes
from sparselora_jax.sparse.weights import init_lora

FLOAT = 4  # bytes of float32
DISTILLED = 3  # arrays of logits in the loss: the student's, the teacher's and the gradient
DRAWN = 4  # numbers of 32 bits for each entry of an input that dropout draws


class Stage(NamedTuple):
    """Bytes that a stage takes on one device.

    Attributes:
      held: bytes that are in memory throughout the stage, by term.
      moments: for each phase of the stage, the additional bytes by term. Phases follow each other, so only the largest
        counts.
    """

    held: dict[str, int]
    moments: dict[str, dict[str, int]]

    @property
    def total(self) -> int:
        """Return the peak in bytes."""
        return _sum(self.held) + max((_sum(terms) for terms in self.moments.values()), default=0)


def _sum(terms: Mapping[str, int]) -> int:
    return sum(terms.values())


def on_device(tree: PyTree, mesh: AbstractMesh | None) -> int:
    """Return the bytes of params, masks or LoRA on one device of a mesh.

    Args:
      tree: arrays or their shapes, sharded by `sharding.RULES`.
      mesh: mesh of the devices; None: one device.
    """
    if mesh is None:
        return nbytes(tree)
    return shard_bytes(tree, sharding.shardings(tree, mesh))


def shard_bytes(tree: PyTree, shardings: PyTree) -> int:
    """Return the bytes of a tree that lie on one device.

    Args:
      tree: arrays or their shapes.
      shardings: sharding of each leaf.
    """

    def shard(leaf: Any, where: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(where.shard_shape(leaf.shape), leaf.dtype)

    return nbytes(jax.tree.map(shard, tree, shardings))


class Recipe(NamedTuple):
    """The trees of a recipe, as shapes, and their mesh.

    Attributes:
      cfg: our config of the model.
      config: the recipe.
      params: params of the dense model.
      masks: masks of the pruned kernels.
      densities: share of weights that each pruned kernel keeps, by path.
      lora: factors of the adapted kernels.
      mesh: mesh of the devices; None: one device.
    """

    cfg: ModelConfig
    config: ConfigDict
    params: dict
    masks: dict
    densities: dict[str, float]
    lora: dict
    mesh: AbstractMesh | None


def recipe(cfg: ModelConfig, config: ConfigDict) -> Recipe:
    """Return the trees that the stages of a recipe hold.

    Args:
      cfg: our config of the model.
      config: a recipe, as `configs/*.py` return it.

    Raises:
      PatternError: a pattern that does not fit a kernel.
      RuleError: a rule that matches no kernel.
      ConfigError: an unknown method.
    """
    params = abstract_params(cfg, config.dtype)
    kernels = rules.kernels(params)
    # Dense kernels have no pattern here, and so no mask.
    patterns = pruning.patterns_of(params, prune_rules(config))
    masks = {path: jax.ShapeDtypeStruct(kernels[path].shape, jnp.bool_) for path in patterns}
    lora = jax.eval_shape(lambda key: init_lora(key, params, lora_rules(config)), jax.random.key(0))
    sizes = tuple(config.mesh[axis] for axis in sharding.AXES)
    return Recipe(
        cfg=cfg,
        config=config,
        params=params,
        masks=rules.unflatten(masks),
        densities={path: 1 - pattern.sparsity for path, pattern in patterns.items()},
        lora=lora,
        mesh=AbstractMesh(sizes, sharding.AXES) if max(sizes) > 1 else None,
    )


def base(trees: Recipe) -> tuple[dict, dict]:
    """Return the shapes of (params, masks) as restoration holds them.

    Args:
      trees: trees of the recipe.
    """
    formats = base_formats(trees.config)
    if formats is None or not trees.masks:
        return trees.params, trees.masks
    return reduce_shapes(trees.params, trees.densities, formats)


def holds_teacher(trees: Recipe) -> bool:
    """Return whether restoration holds dense params for the teacher besides those of the student."""
    edits = bool(edited_kernels(trees.config, trees.densities))
    is_changed = edits or base_formats(trees.config) is not None
    return runs_teacher(trees.config) and bool(trees.masks) and is_changed


def _samples_on_device(trees: Recipe, count: int) -> int:
    """Return how many samples of a batch are on one device; batches are split along data and fsdp."""
    parts = trees.config.mesh.data * trees.config.mesh.fsdp
    return math.ceil(count / parts)


def _traced(trees: Recipe, samples: int) -> list[Stack]:
    return stacks(trees.cfg, trees.params, batch_of(trees.cfg, trees.config.text, samples))


def _params_where(trees: Recipe, keep: Callable[[str], bool]) -> int:
    """Return the bytes on one device of the params whose paths `keep` accepts."""
    flat = rules.flatten(trees.params)
    return on_device(rules.unflatten({path: leaf for path, leaf in flat.items() if keep(path)}), trees.mesh)


def load(trees: Recipe) -> Stage:
    """Estimate reading the model.

    Args:
      trees: trees of the recipe.
    """
    # A tensor is read in pieces, so that no second copy of a large one is needed.
    piece = min(PIECE, max(nbytes(leaf) for leaf in jax.tree.leaves(trees.params)))
    moments = {'placing a piece of a tensor': {'as it was read, and in our layout': 2 * piece}}
    return Stage({'params': on_device(trees.params, trees.mesh)}, moments)


def prune(trees: Recipe) -> Stage:
    """Estimate pruning block by block, with the hidden states of the whole calibration set in memory.

    The job writes each pruned layer to disk at once, so pruned kernels are not held.

    Args:
      trees: trees of the recipe.
    """
    rule_list = prune_methods(trees.config)
    methods = {path: rules.first_match(rule_list, path) for path in trees.densities}
    stage = _walk(trees, methods, from_disk=trees.config.stream)
    options = reconstruction(trees.config)
    if options is None:
        return stage
    samples = _calibration_samples(trees)
    targets = 0 if trees.config.prune.offload else max(stack.hidden for stack in _traced(trees, samples))
    batches = _traced(trees, min(_samples_on_device(trees, options.batch), samples))
    training = max((_training(trees, stack) for stack in batches), key=_sum)
    return Stage(
        stage.held | {'hidden states that blocks are trained to give': targets},
        stage.moments | {'training a block': training},
    )


def _calibration_samples(trees: Recipe) -> int:
    """Return the number of calibration samples on one device."""
    # Without calibration samples a job runs one (`jobs.stages`).
    return max(1, _samples_on_device(trees, trees.config.prune.samples))


def _training(trees: Recipe, stack: Stack) -> dict[str, int]:
    """Return the memory terms of reconstructing one block."""
    kernels = rules.kernels(trees.params)
    pruned = [path for path in trees.densities if _is_in(stack, path)]
    copy = FLOAT * sum(math.prod(kernels[path].shape[-2:]) for path in pruned)
    return {
        'one block': _block(trees, stack),
        # Each is held whole on each device; weights may be split along fsdp, which makes it less.
        'kernels, two moments, gradient and the best kernels (float32)': 5 * copy,
        "outputs of the block's linears and their gradients": 2 * stack.outputs + _working(stack),
    }


def round_base(trees: Recipe) -> Stage:
    """Estimate rounding the base to four bits; without such a base the stage has no terms.

    Like pruning it goes block by block, and it reads the blocks from disk.

    Args:
      trees: trees of the recipe.
    """
    rule_list = rounded_rules(trees.config)
    if not rule_list:
        return Stage({}, {})
    paths = pruning.patterns_of(trees.params, rule_list)
    return _walk(trees, dict.fromkeys(paths, pruning.GPTQ()), from_disk=True)


def _walk(trees: Recipe, methods: dict[str, Any], *, from_disk: bool) -> Stage:
    """Estimate a walk over all blocks that changes kernels.

    Args:
      trees: trees of the recipe.
      methods: method of every kernel that is changed, by path.
      from_disk: whether blocks are read one at a time, so that only arrays outside the blocks are held.
    """
    config = trees.config
    samples = _calibration_samples(trees)
    # All samples pass through one block before any reaches the next, so the hidden states of all samples are held.
    held = {
        'params': _params_where(trees, lambda path: not (from_disk and rules.is_in_block(path))),
        'calibration batch': nbytes(batch_of(trees.cfg, config.text, samples)),
        'hidden states of the calibration set': max(
            _waiting(stack, offload=config.prune.offload) for stack in _traced(trees, samples)
        ),
    }
    if config.prune.sequential == 'kernel' and not config.prune.offload:
        # All samples wait inside the block until the kernels that read this array are pruned.
        inputs = [nbytes(array) for stack in _traced(trees, samples) for array in stack.inputs.values()]
        held['input of a kernel for the calibration set'] = max(inputs, default=0)
    # A block processes one chunk at a time, so its inner arrays have the size of one chunk.
    chunks = _traced(trees, min(config.prune.chunk, samples))
    observing = [_observing(trees, stack, methods) for stack in chunks]
    cutting = [_cutting(trees, stack, methods) for stack in chunks]
    moments = {'observing a block': max(observing, key=_sum), 'pruning a block': max(cutting, key=_sum)}
    return Stage(held, moments)


def _waiting(stack: Stack, *, offload: bool) -> int:
    """Return the bytes of hidden states, and of what blocks only read, that a device holds between two programs."""
    if offload:
        # Only what the forward itself holds: the input of the stack, and what its blocks read.
        return stack.hidden + nbytes(stack.ctx)
    # Three copies of x: the input of the stack, the outputs of the last block, and those of this block. Two of what
    # blocks only read: the whole and its chunks.
    return 3 * stack.hidden + 2 * nbytes(stack.ctx)


def _is_in(stack: Stack, path: str) -> bool:
    """Return whether a path lies in the blocks of a stack."""
    return rules.is_in_block(path) and rules.stack_of(path) == stack.tower


def _block(trees: Recipe, stack: Stack) -> int:
    """Return the bytes of one block's params on one device."""
    return _params_where(trees, lambda path: _is_in(stack, path)) // stack.depth


def _statistics(stack: Stack, methods: dict[str, Any]) -> dict[str, int]:
    """Return the bytes of one block's statistics, by kernel; kernels that read the same array count once."""
    sizes = {}
    for name, array in stack.inputs.items():
        path = rules.block_path(stack.tower, name)
        if path in methods:
            # The pruner collects squares even for a method without a statistic, to count tokens and to find NaN.
            statistic = methods[path].statistic or calibrate.squares
            rows = jax.ShapeDtypeStruct((1, array.shape[-1]), jnp.float32)
            sizes[stack.leaders[name]] = nbytes(jax.eval_shape(statistic, rows))
    return sizes


def _observing(trees: Recipe, stack: Stack, methods: dict[str, Any]) -> dict[str, int]:
    """Return the memory terms of collecting a block's statistics."""
    terms = {
        'one block': _block(trees, stack),
        # The sum so far, the chunk's sum, and their total.
        'its statistics, thrice': 3 * _sum(_statistics(stack, methods)),
        'one chunk in it': _working(stack),
    }
    if trees.mesh is not None and trees.mesh.shape['fsdp'] > 1:
        terms['the block, gathered along fsdp'] = _gathered(trees, stack)
    return terms


def _gathered(trees: Recipe, stack: Stack) -> int:
    """Return the bytes of one block's params on a device that runs it, gathered along fsdp."""
    flat = rules.flatten(trees.params)
    blocks = rules.unflatten({path: leaf for path, leaf in flat.items() if _is_in(stack, path)})
    return shard_bytes(blocks, sharding.gathered(blocks, trees.mesh)) // stack.depth


def _cutting(trees: Recipe, stack: Stack, methods: dict[str, pruning.Method]) -> dict[str, int]:
    """Return the memory terms of pruning the kernels of one block."""
    statistics = _statistics(stack, methods)
    kernels = rules.kernels(trees.params)
    patterns = pruning.patterns_of(trees.params, prune_rules(trees.config))
    paths = {name: rules.block_path(stack.tower, name) for name in stack.inputs}
    pruned = {name: path for name, path in paths.items() if path in methods}
    groups = kernels_pruned_as_one(
        {name: patterns[path] for name, path in pruned.items()},
        {name: methods[path] for name, path in pruned.items()},
        stack.leaders,
    )
    copies_of_kernels = [0]
    copies_of_statistics = [0]
    for names in groups:
        method = methods[pruned[names[0]]]
        weights = sum(math.prod(kernels[pruned[name]].shape[-2:]) for name in names)
        copies_of_kernels.append(method.kernel_copies * weights * FLOAT)
        copies_of_statistics.append(method.statistic_copies * statistics[stack.leaders[names[0]]])
    terms = {'one block': _block(trees, stack), 'its statistics': _sum(statistics)}
    if any(copies_of_statistics):
        terms['inverting the largest Hessian'] = max(copies_of_statistics)
    return terms | {'weights, scores, ranks of kernels pruned as one': max(copies_of_kernels)}


def _working(stack: Stack) -> int:
    """Return the bytes a block needs: outputs of its linears, and its largest array (attention's weights) twice."""
    return stack.outputs + 2 * stack.widest


def _held_base(trees: Recipe) -> dict[str, int]:
    """Return the memory terms of the base in restoration: params, masks, and the teacher's own kernels."""
    params, masks = base(trees)
    kind = trees.config.restore.base
    held = {'params': on_device(params, trees.mesh)}
    if masks:
        held[f'masks ({"1 byte" if kind == "dense" else "1 bit"} a weight)'] = on_device(masks, trees.mesh)
    if holds_teacher(trees):
        editor = 'reconstruction' if reconstruction(trees.config) else trees.config.prune.method
        why = f'{editor} edits kept weights' if kind == 'dense' else f'the base is {kind}'
        # Arrays without a mask are shared with the student.
        held[f'kernels of the dense teacher ({why})'] = _params_where(trees, trees.densities.__contains__)
    return held


def restore(trees: Recipe) -> Stage:
    """Estimate a train step.

    In float32 on a CPU, XLA's own count of temporary memory (all but params, masks, teacher, LoRA and Adam) is 0.85 to
    1.2 times this estimate (tests/planning/test_memory.py). A CPU computes bfloat16 in float32, which takes twice as
    much temporary memory.

    Args:
      trees: trees of the recipe.
    """
    config = trees.config.restore
    if config.trained == 'lora':
        kind = 'LoRA'
        adapted = rules.flatten(trees.lora)
        trained = on_device(trees.lora, trees.mesh)
    else:
        kind = 'trained kernels'
        adapted = rules.flatten(trees.masks)
        # A mask has one byte per weight; a trained kernel is float32.
        trained = FLOAT * on_device(trees.masks, trees.mesh)
    micro_batch = math.ceil(_samples_on_device(trees, config.batch) / config.accumulate)
    traced = _traced(trees, micro_batch)
    # The backward ends at the first trained tower; towers before it store no activations.
    is_trained = [any(_is_in(stack, path) for path in adapted) for stack in traced]
    in_backward = traced[is_trained.index(True) :] if any(is_trained) else []
    held = _held_base(trees)
    held[f'{kind} (float32)'] = trained
    held[f'Adam (2 of {kind})'] = 2 * trained
    # With micro-batches, both the sum so far and the part that is added.
    held[f'gradients (of {kind})'] = trained * (2 if config.accumulate > 1 else 1)
    held['block inputs'] = sum(stack.depth * stack.hidden for stack in in_backward)
    if not config.remat:
        held["linears' outputs"] = sum(stack.depth * stack.outputs for stack in in_backward)
    # Copies of the outputs of a block's linears: their gradients and, with remat, the recomputed outputs.
    copies = 2 if config.remat else 1
    # Arrays of three axes are the stacked kernels of blocks; one layer of each is combined at a time.
    kernels = [leaf for leaf in rules.kernels(trees.params).values() if leaf.ndim > 2]
    largest_kernel = max((math.prod(leaf.shape[-2:]) * FLOAT for leaf in kernels), default=0)
    backward = {
        'one block in the backward': max(
            (copies * stack.outputs + _working(stack) for stack in in_backward), default=0
        ),
        'the largest combined kernel and its gradient, float32': 3 * largest_kernel,
    }
    if trees.config.lora.dropout and config.trained == 'lora':
        # Draws depend on keys alone, so a compiler may make those of all kernels of a block first. It then holds about
        # four 32-bit numbers for each entry of their inputs. The update is a kernel beside the base.
        drawn = (sum(math.prod(array.shape) for array in stack.inputs.values()) for stack in in_backward)
        backward['dropout: draws of a block, and the largest update, float32'] = (
            DRAWN * FLOAT * max(drawn, default=0) + largest_kernel
        )
    # Logits are computed only at the positions of the answer.
    logits = DISTILLED * micro_batch * trees.config.text.answer_tokens * trees.cfg.language.vocab * FLOAT
    return Stage(held, {'backward through a block': backward, 'loss': {'logits (float32)': logits}})


def merge(trees: Recipe) -> Stage:
    """Estimate merging LoRA into the kernels, a layer at a time, and writing them.

    Args:
      trees: trees of the recipe.
    """
    lora = rules.flatten(trees.lora)
    # Pruned or adapted kernels are merged; all others are written unchanged.
    changed = rules.flatten(trees.masks).keys() | lora.keys()
    held = _held_base(trees)
    held['LoRA (float32)'] = on_device(trees.lora, trees.mesh)
    held['merged kernels'] = _params_where(trees, changed.__contains__)
    depths = {path: math.prod(leaf.shape[:-2]) for path, leaf in rules.kernels(trees.params).items()}
    largest_layer = max((_params_where(trees, path.__eq__) // depths[path] for path in lora), default=0)
    width = jnp.dtype(trees.config.dtype).itemsize
    # In float32: the kernel (unless it is float32 already), its update, and their sum.
    copies = 2 if width == FLOAT else 3
    merging = {'its largest kernel, float32': copies * largest_layer * FLOAT // width}
    return Stage(held, {'merging a layer': merging})


def prompts_like(cfg: ModelConfig, text: Any, rows: int) -> dict:
    """Return the shapes of a batch of prompts, with which generation begins.

    Args:
      cfg: our config of the model.
      text: has `prompt_tokens` and `answer_tokens`.
      rows: number of prompts.
    """
    batch = batch_of(cfg, text, rows)
    if not cfg.language.tower.is_encoder_decoder:
        return batch
    # Answers begin with the start token alone.
    first = jax.ShapeDtypeStruct((rows, 1), jnp.int32)
    return batch | {'decoder_input_ids': first, 'decoder_attention_mask': first}


def search(cfg: ModelConfig, params: dict, batch: dict, *, beams: int, new_tokens: int) -> dict[str, int]:
    """Estimate the search for the next tokens of answers, in bytes by name.

    Args:
      cfg: our config of the model.
      params: params, or their shapes.
      batch: see `prompts_like`.
      beams: number of beams of each prompt.
      new_tokens: maximum number of tokens of an answer.
    """
    rows = batch['input_ids'].shape[0]
    slots = beams * new_tokens
    caches = decode.cache_shapes(abstract_model(cfg), params, batch, slots=slots)
    # The widest array of keys has a slot for each token that a beam may read.
    read = max(leaf.shape[2] for leaf in jax.tree.leaves(caches) if leaf.ndim == 4)
    return {
        'keys and values': nbytes(caches),
        # Logits, their logarithms, and the scores that beams are chosen by.
        'scores of all tokens (float32)': 3 * rows * beams * cfg.language.vocab * FLOAT,
        'attention of one layer (float32)': rows * beams * cfg.language.heads * read * FLOAT,
        'which slots a beam reads': rows * beams * slots,
    }


def evaluate(trees: Recipe) -> Stage:
    """Estimate answering one batch of test questions.

    Args:
      trees: trees of the recipe.
    """
    options = trees.config.evaluate
    return answer(trees, trees.config.text, beams=options.num_beams, new_tokens=options.max_new_tokens)


def answer(trees: Recipe, text: Any, *, beams: int, new_tokens: int) -> Stage:
    """Estimate answering one batch of prompts of any format.

    Args:
      trees: trees of the recipe.
      text: has `prompt_tokens` and `answer_tokens`.
      beams: number of beams of each prompt.
      new_tokens: maximum number of tokens of an answer.
    """
    batch_size = trees.config.evaluate.batch
    # A batch that the axis `data` does not divide is answered by every device.
    parts = trees.config.mesh.data
    rows = batch_size // parts if batch_size % parts == 0 else batch_size
    batch = prompts_like(trees.cfg, text, rows)
    held = {'params': on_device(trees.params, trees.mesh), 'images and prompts': nbytes(batch)}
    moments = {
        'reading the prompts': {'one block': max(_working(stack) for stack in _traced(trees, rows))},
        'choosing the next tokens': search(trees.cfg, trees.params, batch, beams=beams, new_tokens=new_tokens),
    }
    return Stage(held, moments)


STAGES = {
    'load': load,
    'prune': prune,
    'round': round_base,
    'restore': restore,
    'merge and export': merge,
    'evaluate': evaluate,
}
