"""Parity of language models alone with torch transformers; names of files without the head."""

import functools
import re

import jax
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    OPTConfig,
    OPTModel,
)

from sparselora_jax.evaluation.generate import generate
from sparselora_jax.models import causal
from sparselora_jax.models.model import Generation, Model, from_hf
from sparselora_jax.runtime.errors import BatchError, UnsupportedModelError

SIZES = {
    'vocab_size': 40,
    'hidden_size': 32,
    'intermediate_size': 48,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'max_position_embeddings': 64,
}
OPT = {name: SIZES[name] for name in SIZES if name not in ('intermediate_size', 'num_key_value_heads')}
CONFIGS = {
    'llama': LlamaConfig(**SIZES),
    'mistral': MistralConfig(**SIZES, sliding_window=None),
    'gemma': GemmaConfig(**SIZES, head_dim=16),
    'opt': OPTConfig(**OPT, ffn_dim=48, word_embed_proj_dim=32),
}


@pytest.mark.parametrize('name', CONFIGS)
def test_logits_equal_torch(name, perturbed, from_torch):
    hf = CONFIGS[name]
    torch.manual_seed(0)
    module, model = perturbed(AutoModelForCausalLM.from_config(hf)), Model(from_hf(hf), Generation(eos=(1,), pad=0))
    params = from_torch(module.state_dict(), model.family.keys(model.cfg), model.shapes())
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == sum(p.numel() for p in module.parameters())
    ids = np.random.default_rng(0).integers(3, 40, (3, 8))
    mask = (np.arange(8) >= np.array([[0], [2], [5]])).astype(ids.dtype)
    with torch.no_grad():
        want = module(torch.asarray(ids), attention_mask=torch.asarray(mask)).logits.numpy()
    got = model.logits(params, {'input_ids': ids, 'attention_mask': mask})
    np.testing.assert_allclose(got[mask == 1], want[mask == 1], atol=1e-4)


@pytest.mark.parametrize(('name', 'base'), [('llama', LlamaModel), ('opt', OPTModel)])
def test_files_without_the_head_are_renamed(name, base):
    ((pattern, replacement),) = causal.FAMILY.renames
    whole = set(AutoModelForCausalLM.from_config(CONFIGS[name]).state_dict()) - {'lm_head.weight'}
    assert {re.sub(pattern, replacement, key) for key in base(CONFIGS[name]).state_dict()} == whole
    assert {re.sub(pattern, replacement, key) for key in whole} == whole


def test_an_absent_mask_is_ones(random_params):
    model = Model(from_hf(CONFIGS['llama']), Generation(eos=(1,), pad=0))
    params, ids = random_params(model.shapes()), np.random.default_rng(0).integers(3, 40, (3, 8))
    got = model.logits(params, {'input_ids': ids})
    np.testing.assert_array_equal(got, model.logits(params, {'input_ids': ids, 'attention_mask': np.ones_like(ids)}))


@pytest.mark.parametrize('wrong', [40, -1])
def test_an_id_outside_the_vocabulary_is_named(wrong, random_params):
    model = Model(from_hf(CONFIGS['llama']), Generation(eos=(1,), pad=0))
    params, ids = random_params(model.shapes()), np.full((3, 4), 5)
    ids[2, 1] = wrong
    for call in (model.logits, functools.partial(generate, model)):
        with pytest.raises(BatchError, match=f'row 2 of input_ids has {wrong}: expected 0 to 39'):
            call(params, {'input_ids': ids})


def test_attention_both_ways_is_refused():
    with pytest.raises(UnsupportedModelError, match='use_bidirectional_attention of gemma'):
        from_hf(GemmaConfig(**SIZES, head_dim=16, use_bidirectional_attention=True))
