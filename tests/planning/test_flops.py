"""FLOPs counted from traces against counts by hand: every matmul once for each time it runs."""

import functools

import jax
import jax.numpy as jnp
import pytest

import sparselora_jax as sl
from configs import blip2_both
from sparselora_jax.models import blip2, llama, qformer, vit
from sparselora_jax.planning import flops, memory
from sparselora_jax.restoration import restore
from sparselora_jax.sparse import rules

RANK, BATCH, TOKENS = 8, 4, 6


def llama_config(depth=3, width=16, vocab=50):
    return llama.LlamaConfig(vocab=vocab, width=width, depth=depth, heads=4, kv_heads=2, mlp_width=24)


def shapes_of(cfg):
    is_shape = {'is_leaf': lambda shape: isinstance(shape, tuple)}
    params = jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), llama.shapes(cfg), **is_shape)
    masks = {path: jax.ShapeDtypeStruct(k.shape, bool) for path, k in rules.kernels(params).items() if 'blocks' in path}
    lora = [('blocks/.*', (RANK, RANK)), ('.*', None)]
    return (
        params,
        rules.unflatten(masks),
        jax.eval_shape(lambda key: sl.init_lora(key, params, lora), jax.random.key(0)),
    )


def forward(cfg):
    def logits(w, batch):
        x = llama.embed_tokens(w, cfg, batch['tokens'])
        return llama.head(w, cfg, llama.forward(w, cfg, x, jnp.ones(batch['tokens'].shape, bool)))

    return logits


def batch():
    tokens = jax.ShapeDtypeStruct((BATCH, TOKENS), jnp.int32)
    return {'tokens': tokens, 'targets': tokens, 'answer': jax.ShapeDtypeStruct((BATCH, TOKENS), bool)}


def by_hand(cfg):
    """(base, attention, head, low, product) of one forward; low: x @ A @ B, product: A @ B."""
    kernels = [k.shape for path, k in rules.kernels(shapes_of(cfg)[0]).items() if 'blocks' in path]
    rows, base, low, product = BATCH * TOKENS, 0, 0, 0
    for layers, inputs, outputs in kernels:
        base += layers * 2 * rows * inputs * outputs
        low += layers * 2 * rows * RANK * (inputs + outputs)
        product += layers * 2 * inputs * RANK * outputs
    attention = cfg.depth * 2 * (2 * BATCH * TOKENS * TOKENS * cfg.width)
    return base, attention, 2 * rows * cfg.width * cfg.vocab, low, product


def test_a_forward():
    cfg = llama_config()
    base, attention, head, _, _ = by_hand(cfg)
    assert flops.matmul_flops(forward(cfg), shapes_of(cfg)[0], batch()) == base + attention + head


@pytest.mark.slow
@pytest.mark.parametrize('gradient', ['exact', 'straight_through', 'weights'])
def test_a_train_step(gradient):
    """Teacher and student forward; dx, with attention's own forward once more; what the gradient needs."""
    cfg, tx = llama_config(), restore.paper_optimizer(10)
    params, masks, lora = shapes_of(cfg)
    base, attention, head, low, product = by_hand(cfg)
    want = 2 * (base + attention) + base + 3 * attention + 3 * head
    trained = 'weights' if gradient == 'weights' else 'lora'
    want += {'exact': base + 4 * product, 'straight_through': 2 * product + 2 * low, 'weights': base}[gradient]
    step = restore.make_train_step(
        forward(cfg), tx, gradient='exact' if trained == 'weights' else gradient, trained=trained
    )
    first = lora if trained == 'lora' else jax.eval_shape(restore.pruned_kernels, params, masks)
    state = jax.eval_shape(lambda tree: sl.init_state(tree, tx), first)
    assert flops.matmul_flops(step, state, restore.Frozen(params, masks), batch()) == want


def test_loops_branches_and_what_cannot_be_counted():
    x = jnp.ones((2, 3))
    w = jnp.ones((3, 3))
    once = 2 * 2 * 3 * 3
    assert flops.matmul_flops(lambda x: jax.lax.fori_loop(0, 7, lambda i, x: x @ w, x), x) == 7 * once
    assert flops.matmul_flops(lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ w @ w, lambda x: x, x), x) == 2 * once
    with pytest.raises(ValueError, match='while loop'):
        flops.matmul_flops(lambda x: jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ w, x), x)


@pytest.fixture
def made():
    cfg = blip2.Blip2Config(
        vision=vit.ViTConfig(image_size=28, patch_size=7, width=16, depth=2, heads=4, mlp_width=32),
        qformer=qformer.QFormerConfig(queries=8, width=16, pairs=1, heads=4, mlp_width=32, image_width=16),
        language=llama_config(vocab=64),
    )
    config = blip2_both.get_config()
    config.restore.batch = 4
    return memory.recipe(cfg, config)


@pytest.mark.slow
def test_an_answer_counts_pruned_kernels_at_their_density(made):
    text, params = made.config.text, made.params
    dense, same = flops.answer(made.cfg, text, params, {})
    assert dense == same
    tokens = 8 + text.prompt_tokens + text.answer_tokens - 1
    path = 'language/blocks/mlp/down/kernel'
    layer = 2 * tokens * 24 * 16
    assert flops.answer(made.cfg, text, params, {path: [0.5, 1.0, 0.25]}) == (dense, dense - 1.25 * layer)
    kernels = rules.kernels(params)
    every = {path: [0.0] * kernel.shape[0] for path, kernel in kernels.items() if path.startswith('vision/blocks')}
    removed = dense - flops.answer(made.cfg, text, params, every)[1]
    assert removed == sum(
        2 * 17 * leaf.shape[0] * leaf.shape[1] * leaf.shape[2] for p, leaf in kernels.items() if p in every
    )


@pytest.mark.slow
def test_a_recipes_step_costs_what_it_trains(made):
    """Distillation a forward more; whole kernels in proportion to the batch, LoRA's products not."""

    @functools.cache
    def step(**fields):
        config = made.config.copy_and_resolve_references()
        config.restore.update(fields)
        return flops.train_step(memory.recipe(made.cfg, config))

    assert step(kd=0.0) < step() < 1.5 * step(kd=0.0)
    assert step(batch=8) < 2 * step()
    assert step(teacher='top_k', top_k=8) == step(kd=0.0)  # it has run before
    control = flops.train_step(made._replace(masks={}))
    assert control == step(gradient='straight_through')  # without a mask both gradients are the same
    weights = step(trained='weights')
    assert step(trained='weights', batch=8) == 2 * weights
