"""A recipe's programs from shapes alone: they are the programs that run, and lie on a mesh as arrays do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_memory import CFG, config

from sparselora_jax.planning import flops, memory, meshes, programs, tracing
from sparselora_jax.planning.collectives import collectives
from sparselora_jax.sparse import rules, sharding

assert config  # a fixture


@pytest.mark.slow
@pytest.mark.parametrize(
    'fields',
    [
        {},
        pytest.param({'trained': 'weights'}, marks=pytest.mark.slow),
        pytest.param({'base': 'packed', 'teacher': 'top_k'}, marks=pytest.mark.slow),
        pytest.param({'base': 'packed_int4'}, marks=pytest.mark.slow),
        pytest.param({'base': 'nf4', 'teacher': 'top_k', 'accumulate': 2}, marks=pytest.mark.slow),
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


@pytest.mark.slow
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


def test_a_calibration_pass_runs_each_block_on_each_chunk(config):
    config.mesh.data, config.prune.samples, config.prune.chunk = 2, 8, 2  # four samples a device, two at a time
    config.prune.pattern.vision = 'dense'
    made = memory.recipe(CFG, config)
    passes = {one.tower: one for one in programs.calibration(made)}
    depths = {'vision': CFG.vision.depth, 'qformer': CFG.qformer.pairs, 'language': CFG.language.depth}
    assert {tower: one.runs for tower, one in passes.items()} == {tower: 2 * depth for tower, depth in depths.items()}
    sums, *_ = passes['language'].arguments
    lm, (batch, tokens, width) = CFG.language, passes['language'].arguments[3].shape
    assert batch == 4
    assert not passes['vision'].arguments[0]
    assert sorted(of_kernel.total.shape[-1] for of_kernel in sums.values()) == [
        width,
        width,
        width,
        lm.mlp_width,
    ]  # q k v, o, gate up
    kernels = sum(width * n for n in (lm.heads * lm.head_dim, 2 * lm.kv_heads * lm.head_dim, lm.heads * lm.head_dim))
    kernels += 3 * width * lm.mlp_width
    attention = 2 * lm.heads * lm.head_dim * tokens
    unread = width * lm.mlp_width  # statistics need no output of the last kernel
    want = 2 * batch * tokens * (2 * (kernels + attention) - unread)
    assert flops.matmul_flops(passes['language'].program, *passes['language'].arguments) == want
    placed = programs.placed_pass(made, passes['language'], sharding.make_mesh(data=2, fsdp=2))
    assert placed[3].sharding.shard_shape(placed[3].shape) == (1, tokens, width)
    assert placed[1]['attn']['q']['kernel'].sharding.spec[0] == 'fsdp'


def drawn(arguments):
    """Arrays of these shapes, small enough for losses that say something."""
    leaves, structure = jax.tree.flatten(arguments)
    rng = np.random.default_rng(0)

    def one(leaf):
        if leaf.dtype == jnp.bool_:
            return rng.random(leaf.shape) < 0.7
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return rng.integers(0, 8, leaf.shape) if leaf.ndim else np.zeros(())
        return 0.1 * rng.normal(size=leaf.shape)

    return jax.tree.unflatten(structure, [jnp.asarray(one(leaf), leaf.dtype) for leaf in leaves])


@pytest.fixture
def one_device(config):
    """(config, arguments, what the step makes of them on one device)."""
    config.restore.kd = 0.0  # a teacher is one more forward to compile
    step, arguments = programs.restore_step(memory.recipe(CFG, config))
    arguments = drawn(arguments)
    return config, arguments, step(*jax.tree.map(jnp.copy, arguments))


@pytest.mark.slow
@pytest.mark.parametrize(('axes', 'accumulate'), [({'fsdp': 2, 'tensor': 2}, 2)], ids=str)
def test_a_step_on_a_mesh_is_that_of_one_device(one_device, axes, accumulate):
    config, arguments, (want, said) = one_device
    config.mesh.update(axes)
    config.restore.accumulate = accumulate
    step, _ = programs.restore_step(memory.recipe(CFG, config))
    mesh = sharding.make_mesh(**config.mesh)
    where = jax.tree.map(lambda leaf: leaf.sharding, programs.placed(arguments, mesh))
    got, metrics = step(*jax.device_put(arguments, where))
    np.testing.assert_allclose(metrics['loss'], said['loss'], rtol=1e-5)
    np.testing.assert_allclose(metrics['grad_norm'], said['grad_norm'], rtol=1e-4)
    moments = got.optimizer[1][0].mu, want.optimizer[1][0].mu  # a tenth of the clipped gradients
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), *moments)
    assert all(leaf.sharding.mesh.shape == mesh.shape for leaf in jax.tree.leaves(got.trained))


@pytest.mark.slow
@pytest.mark.parametrize('axes', [{'data': 4}, {'data': 2, 'fsdp': 2}], ids=str)
def test_devices_send_factors_and_one_layers_kernels(config, axes):
    """Along data nothing but what LoRA's gradients and a few scalars need; along fsdp kernels, a layer at a time."""
    config.mesh.update(axes)
    config.restore.kd = 0.0
    made = memory.recipe(CFG, config)
    step, arguments = programs.restore_step(made)
    text = step.lower(*programs.placed(arguments, sharding.make_mesh(**config.mesh))).compile().as_text()
    found = collectives(text, 4)
    factors = tracing.nbytes(made.lora)
    reduced = [c for c in found if c.kind in ('all-reduce', 'reduce-scatter')]
    gathers = [c for c in found if c.kind == 'all-gather']
    assert {c.kind for c in found} <= {'all-reduce', 'reduce-scatter', 'all-gather'}
    assert sum(c.sent for c in reduced) < 2 * factors + 4096
    assert bool(gathers) == ('fsdp' in axes)
    assert sum(c.sent for c in found) == pytest.approx(meshes.sent(made), rel=0.5)  # which only compares meshes
    if not gathers:
        return
    kernels = rules.kernels(made.params)
    largest = max(tracing.nbytes(leaf) // (leaf.shape[0] if leaf.ndim == 3 else 1) for leaf in kernels.values())
    assert max(c.size for c in gathers) <= largest
    # Forward and backward.
    passes = 2 * (tracing.nbytes(made.params) + tracing.nbytes(made.masks) + factors)
    assert sum(c.sent for c in gathers) < 1.2 * passes
