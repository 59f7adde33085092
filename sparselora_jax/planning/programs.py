"""The programs of a recipe and the shapes of what they read: to count, trace or compile them without any weights."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sparselora_jax.models.model import abstract_model
from sparselora_jax.planning import memory
from sparselora_jax.planning.tracing import Stack, batch_of, stacks
from sparselora_jax.pruning import calibrate
from sparselora_jax.pruning.walk import block_step, block_sums
from sparselora_jax.recipe import prune_methods, reads_teacher, restore_program
from sparselora_jax.restoration.losses import TopK
from sparselora_jax.restoration.restore import Frozen, pruned_kernels
from sparselora_jax.restoration.train import State, init_state
from sparselora_jax.sparse import rules as rules_lib
from sparselora_jax.sparse import sharding


def restore_step(made: memory.Recipe) -> tuple[Any, tuple]:
    """(the jitted step of restoration, the shapes of its arguments: state, frozen, batch)."""
    cfg, config, knobs = made.cfg, made.config, made.config.restore
    step, tx = restore_program(abstract_model(cfg), config, made.mesh)
    trained = made.lora
    if knobs.trained == 'weights':
        trained = jax.eval_shape(pruned_kernels, made.params, made.masks)
    state = jax.eval_shape(lambda tree: init_state(tree, tx), trained)
    params, masks = memory.base(made)
    frozen = Frozen(params, masks or None, made.params if memory.holds_teacher(made) else None)
    batch = batch_of(cfg, config.text, knobs.batch)
    if reads_teacher(config):
        tokens = jax.ShapeDtypeStruct((*batch['targets'].shape, knobs.top_k), jnp.int32)
        log_probs = jax.ShapeDtypeStruct((*batch['targets'].shape, knobs.top_k + 1), jnp.float32)
        batch['teacher'] = TopK(tokens, log_probs)
    return step, (state, frozen, batch)


def placed(arguments: tuple, mesh: Mesh) -> tuple:
    """The shapes of `restore_step`'s arguments, each with where it lies: trees by `sharding.RULES`, batches by row."""
    state, frozen, batch = arguments

    def by_rules(tree):
        return jax.tree.map(_at, tree, sharding.shardings(tree, mesh))

    def everywhere(tree, spec):
        return jax.tree.map(lambda leaf: _at(leaf, NamedSharding(mesh, spec)), tree)

    def as_trained(tree):  # the optimizer's moments
        return jax.tree.structure(tree) == jax.tree.structure(state.trained)

    optimizer = jax.tree.map(
        lambda tree: by_rules(tree) if as_trained(tree) else everywhere(tree, PartitionSpec()),
        state.optimizer,
        is_leaf=as_trained,
    )
    state = State(by_rules(state.trained), optimizer, everywhere(state.step, PartitionSpec()))
    frozen = Frozen(*(None if tree is None else by_rules(tree) for tree in frozen))
    return state, frozen, everywhere(batch, sharding.BATCH)


def _at(leaf: Any, where: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


class Pass(NamedTuple):
    """One program of a calibration pass: a chunk of samples in one block of a tower.

    Attributes:
      runs: how often it runs, over all layers and chunks.
      program: `(sums, w, pruned, x, ctx) -> (sums, x)`, jitted: statistics of what the kernels that are to be pruned
        read are added to sums, then the chunk goes on through the block as it was pruned. In a tower that stays dense
        sums are empty and it only goes on.
      arguments: their shapes.
    """

    tower: str
    runs: int
    program: Callable
    arguments: tuple


def calibration(made: memory.Recipe) -> list[Pass]:
    """The programs with which the pruner calibrates a recipe's model, one for each run of blocks.

    Each device has `prune.chunk` samples at a time. Between these programs kernels are pruned, and before them images
    and words are embedded: neither is in them.
    """
    config, parts = made.config, made.config.mesh.data * made.config.mesh.fsdp
    samples = config.prune.samples // parts
    chunk = min(config.prune.chunk, samples)
    found = stacks(made.cfg, made.params, batch_of(made.cfg, config.text, chunk * parts))
    return [_pass(made, stack, stack.depth * -(-samples // chunk)) for stack in found]


def _pass(made: memory.Recipe, stack: Stack, runs: int) -> Pass:
    step, methods = block_step(stack.block, made.mesh), prune_methods(made.config)
    paths = {name: f'{stack.tower}/blocks/{name}' for name in stack.inputs}
    pruned = {name: rules_lib.first_match(methods, path) for name, path in paths.items() if path in made.densities}
    stats = {name: method.statistic or calibrate.squares for name, method in pruned.items()}
    sums = block_sums(stack.block, stats.get, made.mesh)

    def observe_and_go_on(before, w, pruned, x, ctx):
        return sums.add(before, w, (x, ctx)) if stats else before, step(pruned, (x, ctx))

    zeros = jax.eval_shape(sums.zeros, stack.weights, (stack.x, stack.ctx)) if stats else {}
    program = jax.jit(observe_and_go_on, donate_argnums=0)
    return Pass(stack.tower, runs, program, (zeros, stack.weights, stack.weights, stack.x, stack.ctx))


def placed_pass(made: memory.Recipe, one: Pass, mesh: Mesh) -> tuple:
    """The shapes of a pass's arguments, each with where it lies: weights by `sharding.RULES`, samples by row."""
    stacked = rules_lib.flatten(sharding.shardings(made.params, mesh))
    sums, w, pruned, x, ctx = one.arguments

    def of_layer(tree):
        flat = {
            name: _at(leaf, NamedSharding(mesh, PartitionSpec(*stacked[f'{one.tower}/blocks/{name}'].spec[1:])))
            for name, leaf in rules_lib.flatten(tree).items()
        }
        return rules_lib.unflatten(flat)

    by_row = (
        jax.tree.map(lambda leaf: _at(leaf, sharding.fitting(mesh, sharding.BATCH, leaf.shape)), part)
        for part in (x, ctx)
    )
    sums = jax.tree.map(lambda leaf: _at(leaf, calibrate.place_of_sum(leaf.shape, mesh)), sums)
    return sums, of_layer(w), of_layer(pruned), *by_row
