"""Parity of PaliGemma with torch transformers: its prefix reads both ways, its suffix does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import GemmaConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration, SiglipVisionConfig

from sparselora_jax.evaluation.generate import generate
from sparselora_jax.models.model import Generation, Model, from_hf
from sparselora_jax.runtime.errors import BatchError

PATCHES = 16
LOGITS = jax.jit(Model.logits, static_argnums=0)


def build(image_token, perturbed, from_torch):
    """(torch's model, ours, our params)."""
    vision = SiglipVisionConfig(
        hidden_size=24,
        intermediate_size=43,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
        vision_use_head=False,
    )
    text = GemmaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,  # not hidden_size / heads
        max_position_embeddings=64,
        hidden_act='gelu_pytorch_tanh',
    )
    hf = PaliGemmaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token,
        projection_dim=32,
        hidden_size=32,
    )
    torch.manual_seed(0)
    module = perturbed(PaliGemmaForConditionalGeneration(hf))
    model = Model(from_hf(hf), Generation(eos=(1,), pad=0))
    return module, model, from_torch(module.state_dict(), model.family.keys(model.cfg), model.shapes())


@pytest.fixture(scope='module')
def oracle(perturbed, from_torch):
    return build(38, perturbed, from_torch)


def batch(image_token=38, pads=(0, 0, 0)):
    """Images, five words of the prefix and four of the suffix, pads before all of them."""
    rng = np.random.default_rng(0)
    kinds = np.zeros((3, PATCHES + 9), np.int64)
    kinds[:, -4:] = 1
    ids = np.concatenate([np.full((3, PATCHES), image_token), rng.integers(3, 38, (3, 9))], axis=1)
    widest = max(pads)
    rows = {'input_ids': ids, 'token_type_ids': kinds, 'attention_mask': np.ones_like(ids)}
    rows = {
        name: np.stack([np.pad(row, (n, widest - n))[: row.size + widest] for row, n in zip(array, pads, strict=True)])
        for name, array in rows.items()
    }
    return rows | {'pixel_values': rng.normal(size=(3, 3, 16, 16)).astype(np.float32)}


def logits(module, given):
    with torch.no_grad():
        return module(**{name: torch.asarray(array) for name, array in given.items()}).logits.numpy()


@pytest.mark.parametrize('pads', [(0, 0, 0), (0, 2, 4)])  # pads are on both sides of the last rows
def test_logits_equal_torch(pads, oracle):
    module, model, params = oracle
    given = batch(pads=pads)
    valid = given['attention_mask'] == 1
    np.testing.assert_allclose(LOGITS(model, params, given)[valid], logits(module, given)[valid], atol=1e-4)


def test_without_token_types_it_is_refused(oracle):
    """Torch then reads all both ways or none, as its kind of attention and the pads happen to be."""
    _, model, params = oracle
    given = batch()
    del given['token_type_ids']
    for call in (LOGITS, generate):
        with pytest.raises(BatchError, match='token_type_ids'):
            call(model, params, given)


def test_the_suffix_is_causal(oracle):
    _, model, params = oracle
    given = batch()
    changed = given | {'input_ids': given['input_ids'].copy()}
    changed['input_ids'][:, -1] = 3
    got, want = (LOGITS(model, params, either) for either in (changed, given))
    np.testing.assert_array_equal(got[:, :-1], want[:, :-1])


@pytest.mark.slow
def test_an_image_token_beyond_the_vocabulary(perturbed, from_torch):
    module, model, params = build(45, perturbed, from_torch)
    given = batch(45)
    np.testing.assert_allclose(LOGITS(model, params, given), logits(module, given), atol=1e-4)
    model.logits(params, given)  # not under jit: its tokens are looked at
    generate(model, params, given, max_new_tokens=1)


def test_a_row_of_pads_is_finite(oracle):
    _, model, params = oracle
    given = batch()
    given['attention_mask'][1] = 0
    assert bool(jnp.isfinite(LOGITS(model, params, given)).all())


def test_every_parameter_is_accounted_for(oracle):
    module, _, params = oracle
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == sum(p.numel() for p in module.parameters())
