"""Four devices equal one: the train step and the pruner under data, fsdp and tensor sharding."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparselora_jax as sl
from sparselora_jax import restore, sharding
from sparselora_jax.models import llama
from sparselora_jax.models.init import init_params
from sparselora_jax.models.runners import scan_blocks

CFG = llama.LlamaConfig(vocab=16, width=16, depth=2, heads=4, kv_heads=2, mlp_width=24)


def logits(w, batch, run=scan_blocks):
    x = llama.embed_tokens(w['language'], CFG, batch['tokens'])
    valid = jnp.ones(batch['tokens'].shape, bool)
    return llama.head(w['language'], CFG, llama.forward(w['language'], CFG, x, valid, run))


def setup():
    params = init_params(jax.random.key(0), {'language': llama.shapes(CFG)}, std=1.0)
    _, masks = sl.prune_tree(params, None, [('.*', '2:4')], method=sl.Magnitude())
    lora = sl.init_lora(jax.random.key(1), params, [('.*', sl.LoraSpec(4, 8))])
    lora = jax.tree.map(lambda leaf: leaf + 0.01, lora)
    tokens = jax.random.randint(jax.random.key(2), (8, 6), 0, 16)
    return params, masks, lora, {'tokens': tokens, 'targets': tokens, 'answer': jnp.ones((8, 6), bool)}


@pytest.mark.parametrize('axes', [{'data': 4}, {'fsdp': 4}, {'data': 2, 'tensor': 2}, {'fsdp': 2, 'tensor': 2}])
@pytest.mark.parametrize('gathering', [False, True])
def test_the_train_step_equals_one_device(axes, gathering):
    params, masks, lora, batch = setup()
    tx = optax.sgd(0.1)
    step = restore.make_train_step(logits, tx)
    want, metrics = step(sl.init_state(jax.tree.map(jnp.copy, lora), tx), restore.Frozen(params, masks), batch)
    mesh = sharding.make_mesh(**axes)
    frozen = restore.Frozen(sharding.shard(params, mesh), sharding.shard(masks, mesh))
    state = sl.init_state(sharding.shard(lora, mesh), tx)
    if gathering:
        parts = axes.get('data', 1) * axes.get('fsdp', 1)
        step = restore.make_train_step(
            lambda w, batch: logits(w, batch, sharding.gathering(scan_blocks, mesh)), tx, parts=parts
        )
    got, sharded = step(state, frozen, sharding.shard_batch(batch, mesh))
    np.testing.assert_allclose(sharded['loss'], metrics['loss'], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got.trained, want.trained)
    if 'fsdp' in axes or 'tensor' in axes:
        kernel = frozen.params['language']['blocks']['mlp']['up']['kernel']
        assert kernel.addressable_shards[0].data.size == kernel.size // (axes.get('fsdp', 1) * axes.get('tensor', 1))


@pytest.mark.parametrize('base', ['packed24', 'int4'])
def test_a_base_in_fewer_bytes_is_split_too(base):
    params, masks, lora, batch = setup()
    reduced, tx = restore.reduce_base(restore.Frozen(params, masks), base), optax.sgd(0.1)
    step = restore.make_train_step(logits, tx, kd=0.0)
    want, _ = step(sl.init_state(jax.tree.map(jnp.copy, lora), tx), reduced, batch)
    mesh = sharding.make_mesh(fsdp=2, tensor=2)
    frozen = restore.Frozen(*(None if tree is None else sharding.shard(tree, mesh) for tree in reduced))
    got, _ = step(sl.init_state(sharding.shard(lora, mesh), tx), frozen, sharding.shard_batch(batch, mesh))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got.trained, want.trained)
    arrays = jax.tree.leaves(frozen.params['language']['blocks']['mlp']['up']['kernel'])
    assert arrays[0].addressable_shards[0].data.size == arrays[0].size // 4


def test_the_pruner_equals_one_device():
    params, _, _, batch = setup()

    def forward(w, batch, run):
        x = llama.embed_tokens(w['language'], CFG, batch['tokens'])
        return llama.forward(w['language'], CFG, x, jnp.ones(batch['tokens'].shape, bool), run)

    rules = [('language/blocks/.*', '2:4'), ('.*', 'dense')]
    want = sl.prune(forward, params, [batch], rules, method=sl.Wanda())
    mesh = sharding.make_mesh(data=2, tensor=2)
    got = sl.prune(forward, sharding.shard(params, mesh), [sharding.shard_batch(batch, mesh)], rules, method=sl.Wanda())
    agree = jax.tree.map(lambda a, b: float(np.mean(np.asarray(a) == np.asarray(b))), got.masks, want.masks)
    assert min(jax.tree.leaves(agree)) >= 0.995


def test_an_untied_head_is_split_over_both_axes():
    mesh = sharding.make_mesh(fsdp=2, tensor=2)
    shapes = llama.shapes(replace(CFG, tied=False))['head']
    params = {'language': {'head': {'kernel': jnp.ones(shapes['kernel'])}}}
    placed = sharding.shard(params, mesh)['language']['head']['kernel']
    assert {shard.data.shape for shard in placed.addressable_shards} == {(CFG.width // 2, CFG.vocab // 2)}


def test_a_dimension_over_two_axes_is_split_by_both_or_by_none():
    mesh = sharding.make_mesh(data=2, tensor=2)
    rules = [('.*', jax.sharding.PartitionSpec(None, ('data', 'tensor')))]
    tree = {'fits': jnp.ones((2, 8)), 'does_not': jnp.ones((2, 6))}
    placed = sharding.shard(tree, mesh, rules)
    assert placed['fits'].addressable_shards[0].data.shape == (2, 2)
    assert placed['does_not'].addressable_shards[0].data.shape == (2, 6)


def test_what_a_mesh_does_not_divide_is_said_with_the_nearest_that_does():
    shapes = {'language': llama.shapes(replace(CFG, heads=6, kv_heads=3, head_dim=2))}
    shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, 'float32'), shapes, is_leaf=lambda s: isinstance(s, tuple))
    (line,) = sharding.undivided(shapes, sharding.make_mesh(tensor=4))
    assert line == (
        'tensor=4 does not divide 2 of 7 kernels, e.g. the 6 of language/blocks/attn/k/kernel: they lie whole on every '
        'device; data=2, fsdp=1, tensor=2 divides all'
    )
    assert not sharding.undivided(shapes, sharding.make_mesh(data=2, fsdp=2))


def test_a_mesh_that_does_not_fit_is_named():
    with pytest.raises(sharding.MeshError, match='needs 3 devices, there are 4'):
        sharding.make_mesh(data=3)
