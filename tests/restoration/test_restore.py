"""Contracts of the train step: it compiles once, leaves the base alone, restores, and merges exactly sparse."""

import re

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest

import sparselora_jax as sl
from sparselora_jax.models import llama
from sparselora_jax.models.init import init_params
from sparselora_jax.restoration import losses, restore
from sparselora_jax.restoration.saved_state import Checkpoints
from sparselora_jax.restoration.train import fit
from sparselora_jax.sparse import rules

CFG = llama.LlamaConfig(vocab=13, width=16, depth=2, heads=4, kv_heads=2, mlp_width=24)


def forward(w, batch):
    x = llama.embed_tokens(w, CFG, batch['tokens'])
    return llama.head(w, CFG, llama.forward(w, CFG, x, jnp.ones(batch['tokens'].shape, bool)))


def setup():
    params = init_params(jax.random.key(0), llama.shapes(CFG), std=1.0)
    _, masks = sl.prune_tree(params, None, [('.*', '2:4')], method=sl.Magnitude())
    lora = sl.init_lora(jax.random.key(1), params, [('.*', sl.LoraSpec(4, 8))])
    tokens = jax.random.randint(jax.random.key(2), (4, 6), 0, 13)
    batch = {'tokens': tokens, 'targets': tokens, 'answer': jnp.ones((4, 6), bool)}
    return params, masks, lora, batch


@pytest.mark.parametrize('gradient', ['exact', 'straight_through'])
def test_steps_restore_compile_once_and_leave_the_base_alone(gradient):
    params, masks, lora, batch = setup()
    before = jax.tree.map(np.array, (params, masks))
    traces = []

    def counted(w, batch):
        traces.append(1)
        return forward(w, batch)

    tx = optax.adamw(1e-2)
    step = restore.make_train_step(counted, tx, gradient=gradient)
    state, seen = sl.init_state(lora, tx), []
    for _ in range(30):
        state, metrics = step(state, restore.Frozen(params, masks), batch)
        seen.append(float(metrics['loss']))
    assert len(traces) == 2  # student and teacher
    assert seen[-1] < 0.5 * seen[0]
    assert int(state.step) == 30
    assert jax.tree.all(jax.tree.map(np.array_equal, before, (params, masks)))
    merged = sl.merge(params, masks, state.trained)
    sl.check_sparse(merged, masks)
    bound = forward(sl.bind(params, masks, state.trained), batch)
    assert jnp.allclose(bound, forward(merged, batch), atol=1e-4)


@pytest.mark.slow
def test_training_the_pruned_kernels_keeps_every_zero_and_moves_nothing_else():
    params, masks, _, batch = setup()
    masks['blocks']['mlp'].pop('up')  # stays dense, so it is not trained
    before = jax.tree.map(np.array, (params, masks))
    tx = restore.paper_optimizer(30, peak=1e-2, warmup=1, weight_decay=0.5)
    step = restore.make_train_step(forward, tx, trained='weights')
    frozen = restore.Frozen(params, masks)
    state, seen = sl.init_state(restore.pruned_kernels(params, masks), tx), []
    for _ in range(30):
        state, metrics = step(state, frozen, batch)
        seen.append(float(metrics['loss']))
    assert seen[-1] < 0.5 * seen[0]
    assert jax.tree.all(jax.tree.map(np.array_equal, before, (params, masks)))
    trained, flat_masks, dense = map(rules.flatten, (state.trained, masks, params))
    assert trained.keys() == flat_masks.keys()
    for path, kernel in trained.items():
        assert not kernel[~flat_masks[path]].any(), path
        assert not np.array_equal(kernel[flat_masks[path]], dense[path][flat_masks[path]]), path
    merged = restore.merge_trained(frozen, state.trained, 'weights')
    sl.check_sparse(merged, masks)
    for path, leaf in rules.flatten(merged).items():
        assert np.array_equal(leaf, trained.get(path, dense[path])), path


@pytest.mark.slow
def test_the_gradient_of_the_pruned_kernels_is_that_of_the_masked_loss():
    """And the teacher is the dense model, not what is trained."""
    params, masks, _, batch = setup()
    kernels = restore.pruned_kernels(params, masks)
    teacher, weights = forward(params, batch), losses.token_weights(batch['answer'])

    def masked_loss(kernels):
        student = rules.flatten(params)
        for path, mask in rules.flatten(masks).items():
            student[path] = rules.flatten(kernels)[path] * mask.astype(jnp.float32)
        logits = forward(rules.unflatten(student), batch)
        return losses.distillation_loss(logits, teacher, batch['targets'], weights, kd=0.3)[0]

    want = jax.grad(masked_loss)(kernels)
    tx = optax.sgd(1.0)
    step = restore.make_train_step(forward, tx, kd=0.3, trained='weights')
    state, _ = step(sl.init_state(jax.tree.map(jnp.copy, kernels), tx), restore.Frozen(params, masks), batch)
    got = jax.tree.map(lambda old, new: old - new, kernels, state.trained)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


@pytest.mark.slow
def test_trained_kernels_resume_bit_for_bit(tmp_path):
    params, masks, _, batch = setup()
    tx = restore.paper_optimizer(4, peak=1e-2, warmup=1)
    step, frozen = restore.make_train_step(forward, tx, trained='weights'), restore.Frozen(params, masks)

    def run(folder, steps):
        state = sl.init_state(restore.pruned_kernels(params, masks), tx)
        return fit(step, state, frozen, [batch] * 4, steps=steps, checkpoints=Checkpoints(folder), every=1)

    whole = run(tmp_path / 'whole', 4)
    run(tmp_path / 'cut', 2)
    assert jax.tree.all(jax.tree.map(np.array_equal, run(tmp_path / 'cut', 4), whole))


def test_pruned_kernels_of_bfloat16_are_trained_in_float32_and_merged_back():
    params, masks, _, _ = setup()
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    kernels = restore.pruned_kernels(params, masks)
    assert {leaf.dtype for leaf in jax.tree.leaves(kernels)} == {jnp.dtype('float32')}
    merged = restore.merge_trained(restore.Frozen(params, masks), kernels, 'weights')
    assert jax.tree.all(jax.tree.map(np.array_equal, merged, sl.merge(params, masks)))


@pytest.mark.slow
@pytest.mark.parametrize('kl_reduction', ['token', pytest.param('sequence', marks=pytest.mark.slow)])
def test_micro_batches_change_nothing_beyond_rounding(kl_reduction):
    params, masks, lora, batch = setup()
    batch['answer'] = jnp.arange(6)[None] < jnp.array([1, 2, 6, 4])[:, None]  # micro-batches of 3 and 10 tokens
    tx = optax.sgd(1e-1)
    results = []
    for accumulate in (1, 2):
        step = restore.make_train_step(forward, tx, accumulate=accumulate, kl_reduction=kl_reduction)
        state = sl.init_state(jax.tree.map(jnp.copy, lora), tx)
        state, metrics = step(state, restore.Frozen(params, masks), batch)
        results.append((state.trained, metrics))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *results)


@pytest.mark.compiled
@pytest.mark.parametrize(('trained', 'share'), [('lora', 0.25), ('weights', 1.25)])
def test_the_compiled_step_holds_no_second_copy_of_the_kernels(optimised, trained, share):
    """The compiler's own count of the whole step, teacher included: temporary memory grows with the number of layers by
    activations, far less than a layer's kernels, and by gradients where kernels are trained."""

    def temporary(depth):
        cfg = llama.LlamaConfig(vocab=16, width=128, depth=depth, heads=4, kv_heads=4, mlp_width=512)
        params = init_params(jax.random.key(0), llama.shapes(cfg))
        _, masks = sl.prune_tree(params, None, [('.*', '2:4')], method=sl.Magnitude())
        lora = sl.init_lora(jax.random.key(1), params, [('.*', sl.LoraSpec(2, 4))])
        tokens = jnp.zeros((1, 2), jnp.int32)
        batch = {'tokens': tokens, 'targets': tokens, 'answer': jnp.ones((1, 2), bool)}

        def logits(w, batch):
            x = llama.embed_tokens(w, CFG, batch['tokens'])
            return llama.head(w, cfg, llama.forward(w, cfg, x, jnp.ones(batch['tokens'].shape, bool)))

        tx = optax.adamw(1e-3)
        step = restore.make_train_step(logits, tx, trained=trained)
        first = lora if trained == 'lora' else restore.pruned_kernels(params, masks)
        compiled = step.lower(sl.init_state(first, tx), restore.Frozen(params, masks), batch).compile()
        kernels = jax.tree.leaves(params['blocks'])
        layer = sum(leaf.nbytes for leaf in kernels) / depth
        return compiled.memory_analysis().temp_size_in_bytes, layer

    (few, layer), (many, _) = temporary(2), temporary(18)
    assert many - few < 16 * layer * share


def test_teacher_of_its_own_is_used():
    params, masks, lora, batch = setup()
    tx = optax.sgd(0.0)
    step = restore.make_train_step(forward, tx, kd=1.0)
    student = sl.merge(params, masks)
    frozen = restore.Frozen(student, masks, teacher=student)
    _, metrics = step(sl.init_state(lora, tx), frozen, batch)
    assert abs(float(metrics['kl'])) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize('base', ['packed24', *(pytest.param(b, marks=pytest.mark.slow) for b in ('bitmask', 'nf4'))])
def test_a_base_in_fewer_bytes_trains_as_the_kernels_that_it_holds(base):
    params, masks, lora, batch = setup()
    reduced = restore.reduce_base(restore.Frozen(params, masks), base)
    held = restore.Frozen(sl.unpack(reduced.params, jnp.float32), masks, teacher=params)
    tx, results = optax.sgd(1e-1), []
    step = restore.make_train_step(forward, tx, kd=0.4)
    for frozen in (held, reduced._replace(teacher=params)):
        state = sl.init_state(jax.tree.map(jnp.copy, lora), tx)
        for _ in range(2):
            state, metrics = step(state, frozen, batch)
        results.append((state.trained, metrics))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *results)


@pytest.mark.slow
def test_what_was_kept_of_a_teacher_stands_in_for_it():
    """With all tokens but one it is the teacher; with two, the loss is another."""
    params, masks, lora, batch = setup()
    tx = optax.sgd(1e-1)
    packed = restore.reduce_base(restore.Frozen(params, masks), 'packed24')
    step, found = restore.make_train_step(forward, tx, kd=0.4), []
    for frozen, k in ((restore.Frozen(params, masks), None), (packed, 12), (packed, 2)):
        kept = {} if k is None else {'teacher': losses.top_k(forward(params, batch), k)}
        found.append(step(sl.init_state(jax.tree.map(jnp.copy, lora), tx), frozen, batch | kept))
    (whole, metrics), (same, _), (_, other) = found
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), whole.trained, same.trained)
    assert other['kl'] < metrics['kl']
    assert other['ce'] == pytest.approx(float(metrics['ce']), rel=1e-5)


@pytest.mark.slow
def test_a_packed_base_is_no_dense_teacher():
    params, masks, lora, batch = setup()
    packed, tx = restore.reduce_base(restore.Frozen(params, masks), 'packed24'), optax.sgd(1e-1)
    with pytest.raises(
        ValueError, match=r'blocks/.*/kernel is packed or quantised, so the params cannot be a dense teacher'
    ):
        restore.make_train_step(forward, tx)(sl.init_state(lora, tx), packed, batch)
    restore.make_train_step(forward, tx, kd=0.0)(sl.init_state(lora, tx), packed, batch)


def test_paper_schedule():
    tx = restore.paper_optimizer(100, warmup=10)
    params = {'w': jnp.ones(3)}
    with jax.numpy_dtype_promotion('standard'):
        updates, _ = tx.update({'w': jnp.ones(3)}, tx.init(params), params)
    np.testing.assert_allclose(updates['w'], -1e-6 * (1 + 0.05), rtol=1e-3)


WRONG_OPTIONS = [
    ({'kd': 2.0}, 'kd 2.0: expected a number from 0 to 1'),
    ({'kd': float('nan')}, 'kd nan: expected a number from 0 to 1'),
    ({'temperature': 0}, 'temperature 0: expected a number above 0'),
    ({'accumulate': 0}, 'accumulate 0: expected an integer of at least 1'),
    ({'parts': 1.5}, 'parts 1.5: expected an integer of at least 1'),
    ({'trained': 'x'}, "trained 'x': expected one of lora, weights"),
    ({'kl_reduction': 'x'}, "kl_reduction 'x': expected one of token, sequence"),
    ({'gradient': 'x'}, "gradient 'x': expected one of exact, straight_through, plain"),
]


@pytest.mark.parametrize(('options', 'message'), WRONG_OPTIONS, ids=lambda value: str(value)[:20])
def test_options_of_a_step_that_have_no_meaning_are_refused(options, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, 'jaxtyping_disable', True)
    with pytest.raises(restore.RestoreError, match=re.escape(message)):
        restore.make_train_step(forward, optax.sgd(0.1), **options)


@pytest.mark.parametrize('name', ['peak', 'start', 'end', 'weight_decay', 'clip', 'warmup', 'steps'])
@pytest.mark.parametrize('value', [-1, float('nan'), float('inf')])
def test_options_of_the_optimizer_that_have_no_meaning_are_refused(name, value, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, 'jaxtyping_disable', True)
    with pytest.raises(restore.RestoreError, match=f'{name} {value!r}: expected'):
        restore.paper_optimizer(**({'steps': 10} | {name: value}))


@pytest.mark.parametrize('name', ['targets', 'answer'])
def test_a_batch_without_what_the_loss_needs_is_refused(name):
    params, masks, lora, batch = setup()
    tx = optax.sgd(0.1)
    step = restore.make_train_step(forward, tx, kd=0.0)
    del batch[name]
    with pytest.raises(restore.RestoreError, match=f"the batch has no '{name}'"):
        step(sl.init_state(lora, tx), sl.Frozen(params, masks), batch)


def test_micro_batches_that_do_not_divide_the_batch_are_refused():
    params, masks, lora, batch = setup()
    tx = optax.sgd(0.1)
    step = restore.make_train_step(forward, tx, kd=0.0, accumulate=3)
    with pytest.raises(restore.RestoreError, match='accumulate 3 does not divide the batch of 4'):
        step(sl.init_state(lora, tx), sl.Frozen(params, masks), batch)
