"""Build a recipe's programs and the shapes of their arguments, to count, trace or compile them without weights."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from sparselora_jax.models.model import abstract_model
from sparselora_jax.planning import memory
from sparselora_jax.planning.tracing import Stack, batch_of, stacks
from sparselora_jax.pruning import calibrate
from sparselora_jax.pruning.walk import block_step, block_sums
from sparselora_jax.recipe import prune_methods, reads_teacher, restore_program
from sparselora_jax.restoration.losses import TopK
from sparselora_jax.restoration.restore import Frozen, pruned_kernels
from sparselora_jax.restoration.train import State, init_state
from sparselora_jax.sparse import rules, sharding


def restore_step(trees: memory.Recipe) -> tuple[Callable, tuple[State, Frozen, dict]]:
    """Return the jitted step of restoration and the shapes of its arguments.

    Args:
      trees: trees of the recipe.

    Returns:
      (step, (state, frozen, batch)).
    """
    config = trees.config
    # The same step that a job runs, so that the figures are those of the real program.
    step, tx = restore_program(abstract_model(trees.cfg), config, trees.mesh)
    if config.restore.trained == 'weights':
        trained = jax.eval_shape(pruned_kernels, trees.params, trees.masks)
    else:
        trained = trees.lora
    state = jax.eval_shape(lambda tree: init_state(tree, tx), trained)
    params, masks = memory.base(trees)
    teacher = trees.params if memory.holds_teacher(trees) else None
    # A step takes None if there are no masks: packed kernels contain their own.
    frozen = Frozen(params, masks or None, teacher)
    batch = batch_of(trees.cfg, config.text, config.restore.batch)
    if reads_teacher(config):
        targets = batch['targets'].shape
        top_k = config.restore.top_k
        # One more entry than tokens: the last one is for all other tokens together.
        batch['teacher'] = TopK(
            tokens=jax.ShapeDtypeStruct((*targets, top_k), jnp.int32),
            log_probs=jax.ShapeDtypeStruct((*targets, top_k + 1), jnp.float32),
        )
    return step, (state, frozen, batch)


def placed(arguments: tuple[State, Frozen, dict], mesh: Mesh) -> tuple[State, Frozen, dict]:
    """Return the shapes of `restore_step`'s arguments with their shardings: trees by `sharding.RULES`, batches by row.

    Args:
      arguments: (state, frozen, batch).
      mesh: mesh of the devices that the step is compiled for.
    """
    state, frozen, batch = arguments
    structure = jax.tree.structure(state.trained)

    def by_rules(tree: PyTree) -> PyTree:
        return jax.tree.map(_at, tree, sharding.shardings(tree, mesh))

    def everywhere(tree: PyTree, spec: PartitionSpec) -> PyTree:
        return jax.tree.map(lambda leaf: _at(leaf, NamedSharding(mesh, spec)), tree)

    # The optimizer's moments have the structure and the shardings of the trained tree; its counters are replicated.
    def is_moment(tree: PyTree) -> bool:
        return jax.tree.structure(tree) == structure

    optimizer = jax.tree.map(
        lambda tree: by_rules(tree) if is_moment(tree) else everywhere(tree, PartitionSpec()),
        state.optimizer,
        is_leaf=is_moment,
    )
    state = State(by_rules(state.trained), optimizer, everywhere(state.step, PartitionSpec()))
    frozen = Frozen(*(None if tree is None else by_rules(tree) for tree in frozen))
    return state, frozen, everywhere(batch, sharding.BATCH)


def _at(leaf: Any, where: NamedSharding) -> jax.ShapeDtypeStruct:
    """Return the shape of an array with this sharding."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


class Pass(NamedTuple):
    """One program of a calibration pass: a chunk of samples in one block of a stack.

    Attributes:
      tower: path of the stack of blocks.
      runs: how often the program runs, over all layers and chunks.
      program: `(sums, weights, pruned, x, ctx) -> (sums, x)`, jitted. It adds the statistics of the inputs of the
        kernels to prune to `sums`, then runs the block with its pruned weights on the chunk. In a tower that stays
        dense, sums are empty and only the block is run.
      arguments: shapes of the program's arguments.
    """

    tower: str
    runs: int
    program: Callable
    arguments: tuple


def calibration(trees: memory.Recipe) -> list[Pass]:
    """Return the programs that calibrate a recipe's model, one for each stack of blocks.

    Each device processes `prune.chunk` samples at a time. Two things are not counted: pruning the kernels and
    reconstructing the block, which happen between these programs, and embedding images and words, which happens before
    them.

    Args:
      trees: trees of the recipe.
    """
    config = trees.config
    parts = config.mesh.data * config.mesh.fsdp
    samples = config.prune.samples // parts
    chunk = min(config.prune.chunk, samples)
    chunks = -(-samples // chunk)  # rounded up: the last chunk may be smaller
    traced = stacks(trees.cfg, trees.params, batch_of(trees.cfg, config.text, chunk * parts))
    return [_pass(trees, stack, stack.depth * chunks) for stack in traced]


def _pass(trees: memory.Recipe, stack: Stack, runs: int) -> Pass:
    """Return the program of one stack, built from the same functions that the pruner runs."""
    step = block_step(stack.block, trees.mesh)
    methods = prune_methods(trees.config)
    statistics = {}
    for name in stack.inputs:
        path = rules.block_path(stack.tower, name)
        if path in trees.densities:
            # The pruner collects squares even for a method without a statistic.
            statistics[name] = rules.first_match(methods, path).statistic or calibrate.squares
    sums = block_sums(stack.block, statistics.get, trees.mesh)

    def observe_and_go_on(before, weights, pruned, x, ctx):
        after = sums.add(before, weights, (x, ctx)) if statistics else before
        return after, step(pruned, (x, ctx))

    # In a tower that stays dense no kernel is observed, so there are no sums.
    zeros = jax.eval_shape(sums.zeros, stack.weights, (stack.x, stack.ctx)) if statistics else {}
    program = jax.jit(observe_and_go_on, donate_argnums=0)  # sums are updated in place
    return Pass(stack.tower, runs, program, (zeros, stack.weights, stack.weights, stack.x, stack.ctx))


def placed_pass(trees: memory.Recipe, one: Pass, mesh: Mesh) -> tuple:
    """Return the shapes of a pass's arguments with their shardings: weights by `sharding.RULES`, samples by row.

    Args:
      trees: trees of the recipe.
      one: a pass from `calibration`.
      mesh: mesh of the devices that the program is compiled for.
    """
    stacked = rules.flatten(sharding.shardings(trees.params, mesh))
    sums, weights, pruned, x, ctx = one.arguments

    def of_layer(tree: dict) -> dict:
        flat = {}
        for name, leaf in rules.flatten(tree).items():
            # The first axis of a stacked array, the layers, is not split; a layer has the remaining axes.
            axes = stacked[rules.block_path(one.tower, name)].spec[1:]
            flat[name] = _at(leaf, NamedSharding(mesh, PartitionSpec(*axes)))
        return rules.unflatten(flat)

    def by_row(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: _at(leaf, sharding.fitting(mesh, sharding.BATCH, leaf.shape)), tree)

    # Each device holds some columns of a Hessian, but all of the squares.
    sums = jax.tree.map(lambda leaf: _at(leaf, calibrate.place_of_sum(leaf.shape, mesh)), sums)
    return sums, of_layer(weights), of_layer(pruned), by_row(x), by_row(ctx)
