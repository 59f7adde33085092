"""T5 against torch transformers, over what its config may say: logits to 1e-4; and token by token against the whole."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention

from sparselora_jax.models import layers, t5
from sparselora_jax.models.runners import scan_blocks, unrolled_blocks, unstack
from sparselora_jax.runtime.errors import UnsupportedModelError
from sparselora_jax.sparse import rules

SIZES = {
    'vocab_size': 37,
    'd_model': 32,
    'd_kv': 12,
    'd_ff': 48,
    'num_layers': 2,
    'num_decoder_layers': 3,
    'num_heads': 4,
    'relative_attention_num_buckets': 8,
    'relative_attention_max_distance': 16,
    'attn_implementation': 'eager',
}
CASES = {
    'T5 1.1': ('gated-gelu', {'tie_word_embeddings': False}, False),
    'T5': ('relu', {}, True),
    'tied, not scaled': ('gated-silu', {'tie_word_embeddings': True, 'scale_decoder_outputs': False}, True),
}
RNG = np.random.default_rng(0)
TOKENS, ANSWER = RNG.integers(0, 37, (3, 20)), RNG.integers(0, 37, (3, 18))  # distances beyond `max_distance`
VALID, ANSWER_VALID = np.ones((3, 20), bool), np.ones((3, 18), bool)
VALID[0, :4] = VALID[1, 3:7] = VALID[2, -5:] = False  # pads before, between and after
ANSWER_VALID[0, :3] = ANSWER_VALID[1, -4:] = False


@pytest.fixture(scope='module', params=CASES.values(), ids=CASES)
def model(request, from_torch, perturbed):
    """(cfg, params, the torch module)."""
    projection, options, tied = request.param
    hf = T5Config(**SIZES, feed_forward_proj=projection, **options)
    module = T5ForConditionalGeneration(hf)
    cfg = t5.from_hf(hf)
    if not tied:  # no config says so, see `from_hf`
        module.lm_head.weight = torch.nn.Parameter(torch.zeros(37, 32))
        cfg = dataclasses.replace(cfg, tied=False)
    perturbed(module, 0.1)  # products are not scaled: with more, torch is itself 1e-3 from its own fp64
    return cfg, from_torch(module.state_dict(), t5.keys(cfg), t5.shapes(cfg)), module


def encoded(w, cfg, valid=VALID):
    tokens = jnp.asarray(TOKENS, jnp.int32)
    return t5.encode(w, cfg, t5.embed_tokens(w, cfg, tokens), jnp.asarray(valid))


def hidden(w, cfg, valid=VALID, answer_valid=ANSWER_VALID):
    answer = jnp.asarray(ANSWER, jnp.int32)
    return t5.decode(w, cfg, answer, jnp.asarray(answer_valid), encoded(w, cfg, valid), jnp.asarray(valid))


def decoder(w, cfg, run, blocks, encoded_valid):
    """A jitted function that runs some tokens: (tokens, view, caches) -> (hidden states, caches)."""

    def step(tokens, view, caches):
        x, ctx = t5.embed(w, cfg, t5.embed_tokens(w, cfg, tokens), view)
        ctx |= t5.reading(encoded_valid)
        x, caches = run('language/decoder', lambda w, *args: t5.block(w, cfg, *args), blocks, x, ctx, caches)
        return t5.finish(w, cfg, x), caches

    return jax.jit(step)


def test_logits_equal_torch(model):
    cfg, w, module = model
    for valid, answer_valid in ((np.ones_like(VALID), np.ones_like(ANSWER_VALID)), (VALID, ANSWER_VALID)):
        with torch.no_grad():
            want = module(
                input_ids=torch.asarray(TOKENS),
                attention_mask=torch.asarray(valid).long(),
                decoder_input_ids=torch.asarray(ANSWER),
                decoder_attention_mask=torch.asarray(answer_valid).long(),
            )
        got = encoded(w, cfg, valid)[valid]
        np.testing.assert_allclose(got, want.encoder_last_hidden_state.numpy()[valid], atol=1e-4)
        got = t5.head(w, cfg, hidden(w, cfg, valid, answer_valid))[answer_valid]
        np.testing.assert_allclose(got, want.logits.numpy()[answer_valid], atol=1e-4)


def test_every_parameter_is_known(model):
    cfg, _, module = model
    sizes = [np.prod(shape) for shape in rules.flatten(t5.shapes(cfg)).values()]
    assert sum(sizes) == sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.slow
@pytest.mark.parametrize('run', [scan_blocks, unrolled_blocks])
def test_tokens_one_by_one_are_as_all_at_once(model, run):
    cfg, w, _ = model
    caches, blocks = t5.caches(w, cfg, encoded(w, cfg), 18, jnp.float32), unstack(w['decoder']['blocks'])
    if run is scan_blocks:
        caches, blocks = jax.tree.map(lambda *leaves: jnp.stack(leaves), *caches), w['decoder']['blocks']
    step = decoder(w, cfg, run, blocks, jnp.asarray(VALID))
    answer, out = jnp.asarray(ANSWER, jnp.int32), []
    positions, mask = (
        jnp.tile(jnp.arange(18, dtype=jnp.int32), (3, 1)),
        layers.causal_view(jnp.asarray(ANSWER_VALID)).mask,
    )
    for i in range(18):
        here = layers.View(positions[:, i : i + 1], positions, mask[:, i : i + 1])
        y, caches = step(answer[:, i : i + 1], here, caches)
        out.append(y)
    np.testing.assert_allclose(jnp.concatenate(out, axis=1)[ANSWER_VALID], hidden(w, cfg)[ANSWER_VALID], atol=1e-4)


@pytest.mark.slow
def test_beams_are_tokens_of_one_row(model):
    cfg, w, _ = model
    length, prompt, beams = 8, jnp.asarray(ANSWER[:1, :1], jnp.int32), jnp.asarray(ANSWER[1:3, 1:9], jnp.int32)
    source, valid = encoded(w, cfg)[:1], jnp.asarray(VALID[:1])
    step = decoder(w, cfg, unrolled_blocks, unstack(w['decoder']['blocks']), valid)
    owner = jnp.asarray([-1] + [0, 1] * length)  # -1: the start token's, which both beams read
    position = (jnp.arange(1 + 2 * length, dtype=jnp.int32) + 1)[None] // 2
    slots = jnp.arange(1 + 2 * length)
    caches = t5.caches(w, cfg, source, len(slots), jnp.float32)
    _, caches = step(prompt, layers.View(position[:, :1], position, (slots < 1)[None, None]), caches)
    out = []
    for i in range(length):
        mask = ((owner == -1) | (owner == jnp.arange(2)[:, None])) & (slots < 1 + 2 * (i + 1))
        view = layers.View(jnp.full((1, 2), 1 + i, jnp.int32), position, mask[None])
        y, caches = step(beams[:, i][None], view, caches)
        out.append(y[0])
    rows = jnp.concatenate([jnp.tile(prompt, (2, 1)), beams], axis=1)
    both = jnp.tile(source, (2, 1, 1)), jnp.tile(valid, (2, 1))
    want = t5.decode(w, cfg, rows, jnp.ones(rows.shape, bool), *both)[:, 1:]
    np.testing.assert_allclose(jnp.stack(out, axis=1), want, atol=1e-4)


def test_a_fully_padded_row_is_finite(model):
    cfg, w, _ = model
    valid, answer_valid = VALID.copy(), ANSWER_VALID.copy()
    valid[2] = answer_valid[1] = False
    assert np.isfinite(hidden(w, cfg, valid, answer_valid)).all()


@pytest.mark.parametrize(('buckets', 'distance'), [(32, 128), (16, 128), (8, 16), (7, 19), (32, 1000)])
def test_buckets_equal_torchs_at_every_distance(buckets, distance):
    want = T5Attention._relative_position_bucket(-torch.arange(distance + 1), False, buckets, distance)
    np.testing.assert_array_equal(t5.distance_buckets(buckets, distance), want.numpy())


def test_what_is_not_known_is_named():
    with pytest.raises(UnsupportedModelError, match="feed_forward_proj 'gated-mish' of t5"):
        t5.from_hf(T5Config(**SIZES, feed_forward_proj='gated-mish'))
