"""A recipe's programs from shapes alone: they are the programs that run, and lie on a mesh as arrays do."""

import jax
import jax.numpy as jnp
import pytest
from test_memory import CFG, config

from sparselora_jax import memory, programs, sharding

assert config  # a fixture


@pytest.mark.parametrize(
    'fields',
    [
        {},
        {'trained': 'weights'},
        {'base': 'packed', 'teacher': 'top_k'},
        {'base': 'packed_int4'},
        {'base': 'nf4', 'teacher': 'top_k', 'accumulate': 2},
    ],
)
def test_the_step_of_a_recipe_keeps_its_state(config, fields):
    config.restore.update(fields)
    step, (state, frozen, batch) = programs.restore_step(memory.recipe(CFG, config))
    after, metrics = jax.eval_shape(step, state, frozen, batch)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), state
    )
    assert metrics.keys() == {'loss', 'ce', 'kl', 'grad_norm'}
    assert (frozen.teacher is not None) == (fields.get('base', 'dense') != 'dense' and 'teacher' not in fields)
    assert ('teacher' in batch) == ('teacher' in fields)


def test_arguments_lie_where_arrays_would(config):
    config.restore.base, config.restore.teacher, config.mesh.fsdp, config.mesh.data = 'packed', 'top_k', 2, 2
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=1)
    made = memory.recipe(CFG, config)
    state, frozen, batch = programs.placed(programs.restore_step(made)[1], mesh)
    assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves((state, frozen, batch)))
    want = sharding.shardings(made.lora, mesh)
    for moments in (state.trained, state.optimizer[1][0].mu, state.optimizer[1][0].nu):
        assert jax.tree.map(lambda leaf: leaf.sharding, moments) == want
    assert batch['teacher'].tokens.sharding.spec == sharding.BATCH
    held = sum(
        jnp.dtype(leaf.dtype).itemsize * jnp.prod(jnp.array(leaf.sharding.shard_shape(leaf.shape)))
        for leaf in jax.tree.leaves(frozen.params)
    )
    assert held == memory.restore(made).held['params']
