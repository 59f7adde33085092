"""Parity with torch transformers on SmolLM2's real weights: logits to 1e-3, greedy generation token for token."""

import functools

import gguf as gguf_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from sparselora_jax.checkpoints import gguf
from sparselora_jax.evaluation.generate import generate
from sparselora_jax.models import causal, llama
from sparselora_jax.models.model import Generation, Model

PROMPTS = np.array([[504, 3575, 282, 4649, 314], [1348, 2443, 2744, 253, 4461]])  # any ten words of the vocabulary


@pytest.fixture(scope='module')
def model(smollm2_file):
    return gguf.load_llama(smollm2_file)


@pytest.fixture(scope='module')
def oracle(smollm2_file):
    with pytest.MonkeyPatch.context() as patch:  # it reads the header twice, and a table of names for each tensor
        for name in ('GGUFReader', 'get_tensor_name_map'):
            patch.setattr(gguf_files, name, functools.cache(getattr(gguf_files, name)))
        return AutoModelForCausalLM.from_pretrained(
            smollm2_file.parent, gguf_file=smollm2_file.name, dtype=torch.float32
        ).eval()


def test_logits_equal_torch(model, oracle):
    cfg, w = model
    tokens = jnp.asarray(PROMPTS, jnp.int32)

    @jax.jit
    def logits(w, tokens):
        x = llama.embed_tokens(w, cfg, tokens)
        return llama.head(w, cfg, llama.forward(w, cfg, x, jnp.ones(tokens.shape, bool)))

    with torch.no_grad():
        want = oracle(torch.asarray(PROMPTS)).logits.numpy()
    np.testing.assert_allclose(logits(w, tokens), want, atol=1e-3)


@pytest.mark.slow
def test_greedy_generation_equals_torch(model, oracle):
    cfg, w = model
    ids, mask = (np.pad(array, ((0, 0), (3, 0))) for array in (PROMPTS, np.ones_like(PROMPTS)))  # change nothing
    whole = Model(causal.CausalConfig(cfg), Generation(eos=(2,), pad=2))
    new = generate(whole, {'language': w}, {'input_ids': ids, 'attention_mask': mask}, max_new_tokens=12)
    with torch.no_grad():
        want = oracle.generate(torch.asarray(PROMPTS), max_new_tokens=12, do_sample=False, eos_token_id=2)
    np.testing.assert_array_equal(new[:, 3:], want)
