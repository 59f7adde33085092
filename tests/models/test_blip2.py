"""Parity of BLIP-2 and InstructBLIP with torch transformers, over their language models; what is refused."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    LlamaConfig,
    OPTConfig,
    T5Config,
)

from sparselora_jax.models.model import Generation, Model, from_hf
from sparselora_jax.runtime.errors import BatchError, UnsupportedModelError

QUERIES, IMAGE = 5, 38
LOGITS = jax.jit(Model.logits, static_argnums=0)
SIZES = {'hidden_size': 24, 'intermediate_size': 40, 'num_hidden_layers': 2, 'num_attention_heads': 4}
QFORMER = {'hidden_size': 16, 'intermediate_size': 28, 'num_hidden_layers': 4, 'num_attention_heads': 2}
LANGUAGE = {
    'opt': lambda: OPTConfig(
        vocab_size=40,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    ),
    't5': lambda: T5Config(
        vocab_size=40,
        d_model=32,
        d_kv=6,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj='gated-gelu',
        decoder_start_token_id=0,
    ),
    'llama': lambda: LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    ),
    'tied llama': lambda: LlamaConfig(  # the embedded model's kind
        vocab_size=40,
        hidden_size=30,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=5,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    ),
}
CASES = [
    ('blip-2', 'opt'),
    ('blip-2', 't5'),
    ('blip-2', 'tied llama'),
    ('instructblip', 't5'),
    ('instructblip', 'untied t5'),  # as FLAN-T5's checkpoints are, though transformers' config ties every T5
    ('instructblip', 'llama'),
]


def config(family, language, **changes):
    parts = {
        'vision_config': SIZES | {'image_size': 16, 'patch_size': 4},
        'qformer_config': QFORMER | {'vocab_size': 20, 'max_position_embeddings': 12, 'encoder_hidden_size': 24},
        'text_config': LANGUAGE[language.removeprefix('untied ')]().to_dict(),
        'num_query_tokens': QUERIES,
        'image_token_index': IMAGE,
    }
    return {'blip-2': Blip2Config, 'instructblip': InstructBlipConfig}[family](**parts | changes)


@pytest.fixture(scope='module', params=CASES, ids=' '.join)
def oracle(request, perturbed, from_torch):
    """(torch's model, ours, our params)."""
    hf = config(*request.param)
    build = {'blip-2': Blip2ForConditionalGeneration, 'instructblip': InstructBlipForConditionalGeneration}
    torch.manual_seed(0)
    module, cfg = build[hf.model_type](hf), from_hf(hf)
    if request.param[1] == 'untied t5':
        module.language_model.lm_head.weight = torch.nn.Parameter(module.language_model.lm_head.weight.detach().clone())
        cfg = replace(cfg, language=replace(cfg.language, tied=False))
    module, model = perturbed(module), Model(cfg, Generation(eos=(1,), pad=0, start=0))
    return module, model, from_torch(module.state_dict(), model.family.keys(model.cfg), model.shapes())


def batch(model, *pads):
    """Images, then so many pads, then words: eight in all. Of the instruction, so many pads come last."""
    rng = np.random.default_rng(0)
    ids = np.concatenate([np.full((3, QUERIES), IMAGE), rng.integers(3, 38, (3, 8))], axis=1)
    made = {'pixel_values': rng.normal(size=(3, 3, 16, 16)).astype(np.float32), 'input_ids': ids}
    made['attention_mask'] = np.ones_like(ids)
    for row, count in enumerate(pads):
        made['attention_mask'][row, QUERIES : QUERIES + count] = 0
    if model.cfg.qformer.vocab:
        made['qformer_input_ids'] = rng.integers(0, 20, (3, 7))
        made['qformer_attention_mask'] = np.ones((3, 7), ids.dtype)
        for row, count in enumerate(pads):
            made['qformer_attention_mask'][row, 7 - count :] = 0
    if model.is_encoder_decoder:
        made['decoder_input_ids'] = np.concatenate([np.zeros((3, 1), ids.dtype), rng.integers(3, 38, (3, 4))], axis=1)
    return made


def logits(module, model, given):
    given = dict(given)
    if module.config.text_config.model_type == 'llama':
        # As generate() derives them; forward() alone would count pads, and here they lie between words.
        given['position_ids'] = np.maximum(np.cumsum(given['attention_mask'], axis=1) - 1, 0)
    with torch.no_grad():
        return module(**{name: torch.asarray(array) for name, array in given.items()}).logits.numpy()


@pytest.mark.parametrize('pads', [pytest.param((), marks=pytest.mark.slow), (0, 3, 5)])
def test_logits_equal_torch(pads, oracle):
    module, model, params = oracle
    given = batch(model, *pads)
    valid = np.ones_like(given['decoder_input_ids']) if model.is_encoder_decoder else given['attention_mask']
    got, want = LOGITS(model, params, given), logits(module, model, given)
    np.testing.assert_allclose(got[valid == 1], want[valid == 1], atol=1e-4)


def test_a_row_of_pads_is_finite(oracle):
    _, model, params = oracle
    given = batch(model)
    given['attention_mask'][1] = 0
    if 'qformer_attention_mask' in given:
        given['qformer_attention_mask'][1] = 0
    assert bool(jnp.isfinite(LOGITS(model, params, given)).all())


@pytest.mark.parametrize(('name', 'vocab'), [('input_ids', 40), ('qformer_input_ids', 20), ('decoder_input_ids', 40)])
def test_an_id_outside_its_vocabulary_is_named(name, vocab, oracle):
    _, model, params = oracle
    given = batch(model)
    for wrong in (vocab, -1) if name in given else ():
        ids = given[name].copy()
        ids[1, -2] = wrong
        with pytest.raises(BatchError, match=f'row 1 of {name} has {wrong}: expected 0 to {vocab - 1}'):
            model.logits(params, given | {name: ids})


def test_every_parameter_is_accounted_for(oracle):
    module, _, params = oracle
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == sum(p.numel() for p in module.parameters())


def test_a_config_without_an_image_token_is_refused():
    with pytest.raises(UnsupportedModelError, match='blip-2 without image_token_index'):
        from_hf(config('blip-2', 'llama', image_token_index=None))
