"""Parity of both Q-Formers with torch transformers, text and its pads included; what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import Blip2QFormerConfig, Blip2QFormerModel, InstructBlipQFormerConfig, InstructBlipQFormerModel

from sparselora_jax.models import qformer
from sparselora_jax.runtime.errors import BatchError, UnsupportedModelError

SIZES = {
    'vocab_size': 20,
    'hidden_size': 16,
    'num_hidden_layers': 4,
    'num_attention_heads': 2,
    'intermediate_size': 28,
    'encoder_hidden_size': 24,
    'max_position_embeddings': 9,
}
QUERIES = 5


def image():
    return np.random.default_rng(1).normal(size=(3, 17, 24)).astype(np.float32)


def state_of(module, queries):
    return {f'qformer.{name}': value for name, value in module.state_dict().items()} | {'query_tokens': queries}


def queries():
    return torch.randn(1, QUERIES, 16, generator=torch.Generator().manual_seed(1))


def params_of(module, cfg, from_torch):
    state, shapes = state_of(module, queries()), qformer.shapes(cfg)
    params = from_torch(state, qformer.keys(cfg), shapes)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count == sum(value.numel() for value in state.values())  # every tensor is read
    return params


@pytest.fixture(scope='module')
def instruct(from_torch, perturbed):
    hf = InstructBlipQFormerConfig(**SIZES)
    torch.manual_seed(0)
    module, cfg = perturbed(InstructBlipQFormerModel(hf)), qformer.from_hf(hf, QUERIES)
    return module, cfg, params_of(module, cfg, from_torch)


def test_blip2s_queries_equal_torch(from_torch, perturbed):
    hf = Blip2QFormerConfig(**SIZES)
    torch.manual_seed(0)
    module, cfg = perturbed(Blip2QFormerModel(hf)), qformer.from_hf(hf, QUERIES)
    params = params_of(module, cfg, from_torch)
    with torch.no_grad():
        want = module(queries().expand(3, -1, -1), encoder_hidden_states=torch.asarray(image()))[0].numpy()
    np.testing.assert_allclose(qformer.forward(params, cfg, jnp.asarray(image()), {}), want, atol=1e-4)
    _, ctx = qformer.embed(params, cfg, jnp.asarray(image()), {})
    assert set(ctx) == {'cross'}


@pytest.mark.parametrize('padded', [False, True])
def test_instructblips_queries_equal_torch(padded, instruct):
    module, cfg, params = instruct
    ids = np.random.default_rng(2).integers(0, 20, (3, 7))
    mask = np.ones((3, 7), np.int64)
    batch = {'qformer_input_ids': jnp.asarray(ids)}
    if padded:
        mask[0, 4:], mask[1, :3], mask[2] = 0, 0, 0  # the last has no text at all
        batch['qformer_attention_mask'] = jnp.asarray(mask)
    with torch.no_grad():
        want = module(
            torch.asarray(ids),
            attention_mask=torch.asarray(np.pad(mask, ((0, 0), (QUERIES, 0)), constant_values=1)),
            query_embeds=queries().expand(3, -1, -1),
            encoder_hidden_states=torch.asarray(image()),
        )[0][:, :QUERIES].numpy()
    np.testing.assert_allclose(qformer.forward(params, cfg, jnp.asarray(image()), batch), want, atol=1e-4)


def test_context_says_which_rows_are_pads(instruct):
    _, cfg, params = instruct
    mask = jnp.array([[1, 0], [1, 1], [0, 0]])
    batch = {'qformer_input_ids': jnp.zeros((3, 2), jnp.int32), 'qformer_attention_mask': mask}
    x, ctx = qformer.embed(params, cfg, jnp.asarray(image()), batch)
    assert x.shape == (3, QUERIES + 2, 16)
    np.testing.assert_array_equal(ctx['valid'], np.pad(mask == 1, ((0, 0), (QUERIES, 0)), constant_values=True))
    np.testing.assert_array_equal(ctx['text_valid'], mask == 1)
    assert ctx['query_valid'].shape == (3, QUERIES)
    assert bool(ctx['query_valid'].all())
    assert 'cross_valid' not in ctx  # images have no pads


def test_an_instruction_that_does_not_fit_is_named(instruct):
    _, cfg, params = instruct
    with pytest.raises(BatchError, match='qformer_input_ids are absent'):
        qformer.forward(params, cfg, jnp.asarray(image()), {})
    with pytest.raises(BatchError, match='have 10 columns: the Q-Former reads an instruction of 1 to 9'):
        qformer.forward(params, cfg, jnp.asarray(image()), {'qformer_input_ids': jnp.zeros((3, 10), jnp.int32)})


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'cross_attention_frequency': 3}, 'cross_attention_frequency 3'),
        ({'num_hidden_layers': 3}, 'num_hidden_layers 3'),
        ({'use_qformer_text_input': True}, 'use_qformer_text_input'),
        ({'position_embedding_type': 'relative_key'}, "position_embedding_type 'relative_key'"),
        ({'hidden_act': 'mish'}, "activation 'mish' of blip_2_qformer"),
    ],
)
def test_what_is_not_known_is_refused(changes, message):
    with pytest.raises(UnsupportedModelError, match=message):
        qformer.from_hf(Blip2QFormerConfig(**SIZES | changes), QUERIES)
