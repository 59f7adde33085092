"""Parity with torch transformers over what the configs of LLaMA, Mistral and Gemma may say: logits to 1e-4."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from sparselora_jax.models import layers, llama
from sparselora_jax.models.runners import unrolled_blocks, unstack
from sparselora_jax.runtime.errors import BatchError, UnsupportedModelError
from sparselora_jax.sparse import rules

SIZES = {
    'vocab_size': 37,
    'hidden_size': 32,
    'intermediate_size': 48,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'max_position_embeddings': 64,
    'attn_implementation': 'eager',
}
ROPE_LLAMA3 = {
    'rope_type': 'llama3',
    'rope_theta': 500.0,
    'factor': 8.0,
    'low_freq_factor': 1,
    'high_freq_factor': 4,
    'original_max_position_embeddings': 16,
}
ROPE_LINEAR = {'rope_type': 'linear', 'rope_theta': 500.0, 'factor': 2.5}
CASES = {
    'tied, biases': (
        LlamaConfig,
        LlamaForCausalLM,
        {
            'tie_word_embeddings': True,
            'attention_bias': True,
            'mlp_bias': True,
            'num_key_value_heads': None,
            'hidden_act': 'gelu',
        },
    ),
    'linear rope, one key head': (
        LlamaConfig,
        LlamaForCausalLM,
        {'rope_parameters': ROPE_LINEAR, 'head_dim': 12, 'num_key_value_heads': 1, 'rms_norm_eps': 1e-3},
    ),
    'llama3 rope': (LlamaConfig, LlamaForCausalLM, {'rope_parameters': ROPE_LLAMA3, 'head_dim': 16}),
    'mistral': (MistralConfig, MistralForCausalLM, {'sliding_window': None}),
    'mistral, a window as long as the text': (MistralConfig, MistralForCausalLM, {'sliding_window': 12}),
    'gemma': (GemmaConfig, GemmaForCausalLM, {'head_dim': 256, 'num_key_value_heads': 1, 'attention_bias': True}),
}
TOKENS = np.random.default_rng(0).integers(0, 37, (3, 12))
VALID = np.ones((3, 12), bool)
VALID[0, :4] = VALID[1, 3:7] = False  # pads before, and between


@pytest.fixture(scope='module', params=CASES.values(), ids=CASES)
def model(request, from_torch, perturbed):
    """(cfg, params, the torch module)."""
    config, kind, options = request.param
    hf = config(**(SIZES | options))
    module = perturbed(kind(hf))
    cfg = llama.from_hf(hf)
    names = {path: f'model.{name}' for path, name in llama.keys(cfg).items()}
    names |= {} if cfg.tied else {'head/kernel': 'lm_head.weight'}
    return cfg, from_torch(module.state_dict(), names, llama.shapes(cfg)), module


def logits(w, cfg, tokens, valid):
    x = llama.embed_tokens(w, cfg, jnp.asarray(tokens, jnp.int32))
    return llama.head(w, cfg, llama.forward(w, cfg, x, jnp.asarray(valid)))


def test_logits_equal_torch(model):
    cfg, w, module = model
    positions = np.maximum(VALID.cumsum(1) - 1, 0)
    for valid in (np.ones_like(VALID), VALID):
        where = torch.asarray(positions) if valid is VALID else None
        with torch.no_grad():
            want = module(torch.asarray(TOKENS), attention_mask=torch.asarray(valid).long(), position_ids=where).logits
        np.testing.assert_allclose(logits(w, cfg, TOKENS, valid)[valid], want.numpy()[valid], atol=1e-4)


def test_every_parameter_is_known(model):
    cfg, _w, module = model
    sizes = [np.prod(shape) for shape in rules.flatten(llama.shapes(cfg)).values()]
    assert sum(sizes) == sum(parameter.numel() for parameter in module.parameters())


def test_tokens_one_by_one_have_the_logits_of_the_whole(model):
    cfg, w, _ = model
    tokens, valid = jnp.asarray(TOKENS, jnp.int32), jnp.asarray(VALID)
    view = layers.causal_view(valid)
    x, caches, out = llama.embed_tokens(w, cfg, tokens), llama.caches(cfg, 3, 12, jnp.float32), []
    blocks = unstack(w['blocks'])

    @jax.jit
    def step(x, view, caches):
        x, ctx = llama.embed(w, cfg, x, view)
        return unrolled_blocks('language', lambda w, *args: llama.block(w, cfg, *args), blocks, x, ctx, caches)

    for i in range(12):
        here = view._replace(positions=view.positions[:, i : i + 1], mask=view.mask[:, i : i + 1])
        y, caches = step(x[:, i : i + 1], here, caches)
        out.append(llama.head(w, cfg, llama.finish(w, cfg, y)))
    want = logits(w, cfg, TOKENS, VALID)
    np.testing.assert_allclose(jnp.concatenate(out, axis=1)[valid], want[valid], atol=1e-4)


def test_a_fully_padded_row_is_finite(model):
    cfg, w, _ = model
    valid = VALID.copy()
    valid[2] = False
    assert np.isfinite(logits(w, cfg, TOKENS, valid)).all()


def test_a_text_longer_than_the_window_is_refused(from_torch, perturbed):
    """Torch's last token does not read the first one then: full attention gives it other logits."""
    module = perturbed(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=11)))
    cfg, valid = llama.from_hf(module.config), np.ones_like(VALID)
    names = {path: f'model.{name}' for path, name in llama.keys(cfg).items()} | {'head/kernel': 'lm_head.weight'}
    w = from_torch(module.state_dict(), names, llama.shapes(cfg))
    with pytest.raises(BatchError, match=r'12 tokens: .* at most 11'):
        logits(w, cfg, TOKENS, valid)
    with torch.no_grad():
        want = module(torch.asarray(TOKENS)).logits.numpy()
    np.testing.assert_allclose(logits(w, cfg, TOKENS[:, :11], valid[:, :11]), want[:, :11], atol=1e-4)
    full = logits(w, replace(cfg, window=None), TOKENS, valid)
    assert (np.abs(full[:, 11] - want[:, 11]).max(axis=1) > 1e-2).all()


def test_the_old_name_of_gemmas_activation_means_its_tanh_form():
    assert llama.from_hf(GemmaConfig(**SIZES, hidden_act='gelu')).activation == 'gelu_pytorch_tanh'


def test_what_is_not_known_is_named():
    yarn = {'rope_type': 'yarn', 'rope_theta': 500.0, 'factor': 2.0, 'original_max_position_embeddings': 32}
    with pytest.raises(UnsupportedModelError, match="rope_type 'yarn' of llama"):
        llama.from_hf(LlamaConfig(**SIZES, rope_parameters=yarn))
    with pytest.raises(UnsupportedModelError, match="hidden_act 'mish' of llama"):
        llama.from_hf(LlamaConfig(**SIZES, hidden_act='mish'))
