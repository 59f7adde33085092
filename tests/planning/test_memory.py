"""The analytic memory against arrays and against the compiler's own count."""

import jax
import jax.numpy as jnp
import pytest

from configs import blip2_both
from sparselora_jax import pruning
from sparselora_jax.models import blip2, llama, qformer, t5, vit
from sparselora_jax.planning import memory, programs, tracing
from sparselora_jax.pruning import calibrate
from sparselora_jax.restoration.restore import paper_optimizer
from sparselora_jax.sparse import rules, sharding, weights

VISION = vit.ViTConfig(image_size=28, patch_size=7, width=64, depth=2, heads=4, mlp_width=128)
QFORMER = qformer.QFormerConfig(queries=8, width=64, pairs=1, heads=4, mlp_width=128, image_width=64)
LLAMA = llama.LlamaConfig(vocab=256, width=128, depth=3, heads=4, kv_heads=2, mlp_width=256, tied=False)
T5 = t5.T5Config(vocab=64, width=32, depth=2, encoder_depth=3, heads=4, head_dim=8, mlp_width=64)
CFG = blip2.Blip2Config(VISION, QFORMER, LLAMA)


@pytest.fixture
def config():
    made = blip2_both.get_config()
    made.restore.batch, made.text.prompt_tokens, made.text.answer_tokens = 8, 24, 8
    made.prune.samples, made.prune.chunk = 8, 4
    return made


def arrays(made):
    """Params, masks and LoRA of a recipe, as arrays."""
    trees = made.params, made.masks, made.lora
    return jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), trees)


def on_first_device(tree):
    first = jax.devices()[0]
    shards = (shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards)
    return sum(shard.data.nbytes for shard in shards if shard.device == first)


@pytest.mark.slow
@pytest.mark.parametrize(
    'axes', [(1, 1, 1), (1, 2, 2), *(pytest.param(a, marks=pytest.mark.slow) for a in ((1, 4, 1), (4, 1, 1)))]
)
def test_params_masks_and_lora_are_exact_on_every_mesh(config, axes):
    config.mesh = dict(zip(sharding.AXES, axes, strict=True))
    config.dtype = 'bfloat16'
    made = memory.recipe(CFG, config)
    held = memory.restore(made).held
    mesh = sharding.make_mesh(**config.mesh) if max(axes) > 1 else None
    params, masks, lora = (tree if mesh is None else sharding.shard(tree, mesh) for tree in arrays(made))
    tx = paper_optimizer(10)
    adam = [leaf for leaf in jax.tree.leaves(tx.init(lora)) if leaf.ndim]
    want = {'params': params, 'masks (1 byte a weight)': masks, 'LoRA (float32)': lora}
    assert {name: held[name] for name in want} == {name: on_first_device(tree) for name, tree in want.items()}
    if mesh is None:
        assert held['Adam (2 of LoRA)'] == sum(leaf.nbytes for leaf in adam)


@pytest.mark.compiled
@pytest.mark.parametrize(
    ('remat', 'trained', 'dropout'),
    [(False, 'lora', 0.0), (True, 'lora', 0.0), (True, 'weights', 0.0), (False, 'lora', 0.1), (True, 'lora', 0.1)],
)
def test_a_step_is_estimated_close_to_the_compilers_count(optimised, config, remat, trained, dropout):
    """In float32: on a CPU XLA computes bfloat16 in float32, and takes twice the temporary memory."""
    config.restore.remat, config.restore.trained, config.lora.dropout = remat, trained, dropout
    made = memory.recipe(CFG, config)
    stage, (step, (state, frozen, batch)) = memory.restore(made), programs.restore_step(made)
    found = step.lower(state, frozen, batch).compile().memory_analysis()
    resident = sum(
        size for name, size in stage.held.items() if name.startswith(('params', 'masks', 'LoRA', 'trained', 'Adam'))
    )
    arguments = resident + tracing.nbytes(batch) + 2 * 4 + 4  # the batch, two counters of the optimizer, the step
    assert found.argument_size_in_bytes == pytest.approx(arguments, abs=16)
    assert 0.85 < found.temp_size_in_bytes / (stage.total - resident) < 1.2


@pytest.mark.slow
def test_statistics_are_those_that_calibration_gathers(config):
    made = memory.recipe(CFG, config)
    params, _, _ = arrays(made)
    stack = tracing.stacks(CFG, made.params, tracing.batch_of(CFG, config.text, 4))[-1]
    assert (stack.tower, stack.depth, stack.x.shape) == ('language', 3, (4, 8 + 24 + 8 - 1, 128))
    sparsegpt = dict.fromkeys(made.densities, pruning.SparseGPT())
    hessians = memory._statistics(stack, sparsegpt)
    assert hessians == {'attn/q/kernel': 4 * 128**2, 'attn/o/kernel': 4 * 128**2} | {
        'mlp/gate/kernel': 4 * 128**2,
        'mlp/down/kernel': 4 * 256**2,
    }
    weights = rules.unflatten({path: leaf[0] for path, leaf in rules.flatten(params['language']['blocks']).items()})
    x, ctx = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), (stack.x, stack.ctx))
    observe = calibrate.make_observer(
        lambda w, inputs: llama.block(w, LLAMA, *inputs, None), stats=lambda name: calibrate.hessian
    )
    gathered = {id(statistic.total): statistic.total for statistic in observe(weights, [(x, ctx)]).values()}
    assert sum(total.nbytes for total in gathered.values()) == sum(hessians.values())


@pytest.mark.slow
def test_rounding_a_base_takes_what_sparsegpt_takes_from_disk_and_nothing_where_nothing_is_rounded(config):
    assert memory.round_base(memory.recipe(CFG, config)).total == 0
    config.restore.base, config.prune.method, config.stream = 'nf4', 'sparsegpt', True
    made = memory.recipe(CFG, config)
    assert memory.round_base(made) == memory.prune(made)


@pytest.mark.compiled
def test_merging_takes_a_layer_beside_what_it_merges(optimised, config):
    made = memory.recipe(CFG, config)
    path = 'language/blocks/mlp/gate/kernel'
    trees = (rules.unflatten({path: rules.flatten(tree)[path]}) for tree in (made.params, made.masks, made.lora))
    found = jax.jit(weights.merge).lower(*trees).compile().memory_analysis()
    assert found.temp_size_in_bytes < 1.2 * sum(memory.merge(made).moments['merging a layer'].values())


def test_the_stacks_of_an_encoder_decoder_and_what_they_read(config):
    cfg = blip2.Blip2Config(VISION, QFORMER, T5)
    params = memory.recipe(cfg, config).params
    found = {stack.tower: stack for stack in tracing.stacks(cfg, params, tracing.batch_of(cfg, config.text, 2))}
    assert list(found) == ['vision', 'qformer', 'language/encoder', 'language/decoder']
    assert found['language/encoder'].x.shape == (2, 8 + 24, 32)
    assert found['language/decoder'].x.shape == (2, 8, 32)
    reads = found['language/decoder'].inputs['cross/k/kernel']
    assert reads.shape == (2, 8 + 24, 32)  # the encoder's output, which k and v share
    assert found['language/decoder'].leaders['cross/v/kernel'] == 'cross/k/kernel'


@pytest.mark.slow
def test_a_frozen_tower_before_the_first_lora_keeps_nothing(config):
    whole = memory.restore(memory.recipe(CFG, config)).held["linears' outputs"]
    config.lora.rank.vision = 0
    without = memory.restore(memory.recipe(CFG, config)).held["linears' outputs"]
    config.lora.rank.qformer = 0
    language = memory.restore(memory.recipe(CFG, config)).held["linears' outputs"]
    batch = tracing.batch_of(CFG, config.text, 8)
    stacks = tracing.stacks(CFG, memory.recipe(CFG, config).params, batch)
    assert [whole - without, without - language, language] == [stack.depth * stack.outputs for stack in stacks]


@pytest.mark.slow
def test_a_block_is_pruned_with_whole_kernels_where_fsdp_keeps_parts(config):
    moments = {}
    for fsdp in (1, 4):
        config.mesh.fsdp = fsdp
        moments[fsdp] = memory.prune(memory.recipe(CFG, config)).moments['observing a block']
    assert moments[4]['the block, gathered along fsdp'] == moments[1]['one block'] > moments[4]['one block']


@pytest.mark.slow
def test_more_of_a_knob_takes_what_it_should(config):
    def total(stage, **fields):
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict({name.replace('__', '.'): value for name, value in fields.items()})
        return stage(memory.recipe(CFG, changed)).total

    assert total(memory.restore, restore__accumulate=4) < total(memory.restore)
    assert total(memory.restore, restore__remat=True) < total(memory.restore)
    assert total(memory.restore, mesh__fsdp=4) < total(memory.restore) / 2
    assert total(memory.restore, prune__method='sparsegpt') > total(memory.restore)  # the dense teacher
    assert total(memory.prune, prune__method='sparsegpt') > total(memory.prune)
    on_wanda, on_sparsegpt = ({'prune__method': 'dsnot', 'prune__initial': name} for name in ('wanda', 'sparsegpt'))
    assert total(memory.prune, **on_sparsegpt) > total(memory.prune, **on_wanda)
    assert total(memory.restore, **on_sparsegpt) == total(memory.restore)  # kept weights are as they came
    assert total(memory.prune, stream=True) < total(memory.prune)
    reconstructing = {'prune__reconstruct__passes': 1}
    assert total(memory.prune, **reconstructing) > total(memory.prune)
    assert total(memory.restore, **reconstructing) == total(memory.restore, prune__method='sparsegpt')
    assert total(memory.prune, prune__samples=16) > total(memory.prune)


@pytest.mark.slow
@pytest.mark.parametrize('base', ['packed', 'packed_int4', 'int4', 'nf4'])
def test_a_base_in_fewer_bytes_is_counted_as_it_is_held(config, base):
    config.dtype, config.restore.base, config.restore.teacher = 'bfloat16', base, 'top_k'
    config.prune.pattern.vision = '0.6'
    made = memory.recipe(CFG, config)
    held, (params, masks) = memory.restore(made).held, memory.base(made)
    assert held['params'] == tracing.nbytes(params)
    assert not any('dense teacher' in name for name in held)
    weights = sum(leaf.size for leaf in jax.tree.leaves(made.masks))
    assert held.get('masks (1 bit a weight)', 0) == (weights / 8 if masks else 0)
    assert held['params'] < tracing.nbytes(made.params)
    config.restore.teacher = 'model'
    with_teacher = memory.restore(memory.recipe(CFG, config)).held
    assert with_teacher[f'kernels of the dense teacher (the base is {base})'] == 2 * weights


@pytest.mark.slow
def test_one_pass_holds_an_input_of_all_samples_beside_the_hidden_states(config):
    name = 'input of a kernel for the calibration set'
    by_layer = memory.prune(memory.recipe(CFG, config)).held
    assert name not in by_layer
    config.prune.sequential = 'kernel'
    held = memory.prune(memory.recipe(CFG, config)).held
    assert {term: size for term, size in held.items() if term != name} == by_layer
    # The widest is that of the language tower's `down`, in float32: of the queries and the text without its last token.
    tokens = QFORMER.queries + config.text.prompt_tokens + config.text.answer_tokens - 1
    assert held[name] == config.prune.samples * tokens * LLAMA.mlp_width * 4


@pytest.mark.slow
def test_activations_that_wait_on_the_host_do_not_count(config):
    config.prune.sequential = 'kernel'
    config.prune.reconstruct.passes = 1
    config.prune.reconstruct.batch = 1
    here = memory.prune(memory.recipe(CFG, config)).held
    config.prune.offload = True
    offloaded = memory.prune(memory.recipe(CFG, config)).held
    name = 'hidden states of the calibration set'
    assert offloaded[name] < here[name] / 2
    assert (
        sum(size for term, size in offloaded.items() if 'hidden' not in term)
        == here['params'] + here['calibration batch']
    )
    assert not offloaded['hidden states that blocks are trained to give']
