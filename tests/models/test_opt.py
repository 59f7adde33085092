"""OPT against torch transformers, over what its config may say: logits to 1e-4; and token by token as the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from sparselora_jax.models import layers, opt
from sparselora_jax.models.runners import scan_blocks, unrolled_blocks, unstack
from sparselora_jax.runtime.errors import BatchError, UnsupportedModelError
from sparselora_jax.sparse import rules

SIZES = {
    'vocab_size': 37,
    'hidden_size': 32,
    'ffn_dim': 48,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'max_position_embeddings': 16,
    'attn_implementation': 'eager',
}
CASES = {
    'as published': {},
    'norms after, projected words': {'do_layer_norm_before': False, 'word_embed_proj_dim': 24},
    'no biases, no final norm': {
        'enable_bias': False,
        '_remove_final_layer_norm': True,
        'activation_function': 'gelu',
        'word_embed_proj_dim': 40,
    },
}
TOKENS = np.random.default_rng(0).integers(0, 37, (3, 12))
VALID = np.ones((3, 12), bool)
VALID[0, :4] = VALID[1, 3:7] = False  # pads before, and between


@pytest.fixture(scope='module', params=CASES.values(), ids=CASES)
def model(request, from_torch, perturbed):
    """(cfg, params, the torch module)."""
    hf = OPTConfig(**SIZES, **request.param)
    module = perturbed(OPTForCausalLM(hf))
    cfg = opt.from_hf(hf)
    return cfg, from_torch(module.state_dict(), opt.keys(cfg), opt.shapes(cfg), 'model.decoder.'), module


def logits(w, cfg, tokens, valid):
    x = opt.embed_tokens(w, cfg, jnp.asarray(tokens, jnp.int32))
    return opt.head(w, cfg, opt.forward(w, cfg, x, jnp.asarray(valid)))


def steps(w, cfg, run, blocks, caches):
    """A jitted function that runs some tokens: (x, view, caches) -> (hidden states, caches)."""

    def step(x, view, caches):
        x, ctx = opt.embed(w, cfg, x, view)
        x, caches = run('language', lambda w, *args: opt.block(w, cfg, *args), blocks, x, ctx, caches)
        return opt.finish(w, cfg, x), caches

    return jax.jit(step)


def test_logits_equal_torch(model):
    cfg, w, module = model
    for valid in (np.ones_like(VALID), VALID):
        with torch.no_grad():
            want = module(torch.asarray(TOKENS), attention_mask=torch.asarray(valid).long()).logits
        np.testing.assert_allclose(logits(w, cfg, TOKENS, valid)[valid], want.numpy()[valid], atol=1e-4)


def test_every_parameter_is_known(model):
    cfg, _, module = model
    sizes = [np.prod(shape) for shape in rules.flatten(opt.shapes(cfg)).values()]
    assert sum(sizes) == sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.slow
@pytest.mark.parametrize('run', [scan_blocks, unrolled_blocks])
def test_tokens_one_by_one_are_as_all_at_once(model, run):
    cfg, w, _ = model
    caches, blocks = opt.caches(cfg, 3, 12, jnp.float32), unstack(w['blocks'])
    if run is scan_blocks:
        caches, blocks = jax.tree.map(lambda *leaves: jnp.stack(leaves), *caches), w['blocks']
    step = steps(w, cfg, run, blocks, caches)
    x, valid, out = opt.embed_tokens(w, cfg, jnp.asarray(TOKENS, jnp.int32)), jnp.asarray(VALID), []
    view = layers.causal_view(valid)
    for i in range(12):
        here = view._replace(positions=view.positions[:, i : i + 1], mask=view.mask[:, i : i + 1])
        hidden, caches = step(x[:, i : i + 1], here, caches)
        out.append(hidden)
    want = opt.forward(w, cfg, x, valid)
    np.testing.assert_allclose(jnp.concatenate(out, axis=1)[valid], want[valid], atol=1e-4)


@pytest.mark.slow
def test_beams_are_tokens_of_one_row(model):
    cfg, w, _ = model
    prompt, beams = jnp.asarray(TOKENS[:1, :4], jnp.int32), jnp.asarray(TOKENS[1:3, 4:7], jnp.int32)
    slots = 4 + 2 * 3
    step = steps(w, cfg, unrolled_blocks, unstack(w['blocks']), None)
    owner = jnp.asarray([-1] * 4 + [0, 1] * 3)  # -1: the prompt's, which both beams read
    position = jnp.asarray([0, 1, 2, 3, 4, 4, 5, 5, 6, 6], jnp.int32)[None]
    here = jnp.arange(slots)
    mask = here[None, :4, None] >= here
    caches = opt.caches(cfg, 1, slots, jnp.float32)
    _, caches = step(opt.embed_tokens(w, cfg, prompt), layers.View(position[:, :4], position, mask), caches)
    out = []
    for i in range(3):
        mask = ((owner == -1) | (owner == jnp.arange(2)[:, None])) & (here < 4 + 2 * (i + 1))
        view = layers.View(jnp.full((1, 2), 4 + i, jnp.int32), position, mask[None])
        hidden, caches = step(opt.embed_tokens(w, cfg, beams[:, i][None]), view, caches)
        out.append(hidden[0])
    rows = jnp.concatenate([jnp.tile(prompt, (2, 1)), beams], axis=1)
    want = opt.forward(w, cfg, opt.embed_tokens(w, cfg, rows), jnp.ones(rows.shape, bool))[:, 4:]
    np.testing.assert_allclose(jnp.stack(out, axis=1), want, atol=1e-4)


def test_a_fully_padded_row_is_finite(model):
    cfg, w, _ = model
    valid = VALID.copy()
    valid[2] = False
    assert np.isfinite(logits(w, cfg, TOKENS, valid)).all()


def test_a_text_longer_than_the_table_is_refused(model):
    cfg, w, _ = model
    tokens = np.zeros((1, 17), int)
    with pytest.raises(BatchError, match=r'17 tokens: .* at most 16'):
        logits(w, cfg, tokens, np.ones_like(tokens, bool))


def test_what_is_not_known_is_named():
    for options in (
        {'layer_norm_elementwise_affine': False},
        {'activation_function': 'mish'},
    ):
        with pytest.raises(UnsupportedModelError, match=f'{next(iter(options))} .*of opt'):
            opt.from_hf(OPTConfig(**SIZES, **options))
