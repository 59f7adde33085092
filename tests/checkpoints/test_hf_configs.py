"""What our configs say, transformers' say too; what theirs cannot say is refused."""

from dataclasses import replace

import pytest

from sparselora_jax.checkpoints import hf_configs
from sparselora_jax.models import llama
from sparselora_jax.models.model import Generation
from sparselora_jax.runtime.errors import UnsupportedModelError

GENERATION = Generation(eos=(2,), pad=1, bos=0)
CFG = llama.LlamaConfig(vocab=40, width=32, depth=2, heads=4, kv_heads=2, mlp_width=48, rope_base=500.0)
STRETCH = llama.Llama3Rope(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=16)


@pytest.mark.parametrize(
    'changes',
    [
        {},
        {'rope_linear': 2.5},
        {'rope_llama3': STRETCH},
        {'tied': False, 'head_dim': 12, 'attention_bias': True, 'mlp_bias': True, 'activation': 'gelu'},
    ],
)
def test_a_llama_comes_back(changes):
    cfg = replace(CFG, **changes)
    assert llama.from_hf(hf_configs.llama_config(cfg, GENERATION)) == cfg


@pytest.mark.parametrize(
    'changes',
    [{'norm_offset': 1.0}, {'embed_scale': 32**0.5}, {'window': 16}, {'rope_linear': 2.0, 'rope_llama3': STRETCH}],
)
def test_what_a_llama_config_cannot_say_is_named(changes):
    with pytest.raises(UnsupportedModelError, match=f'{next(iter(changes))} .*LlamaConfig'):
        hf_configs.llama_config(replace(CFG, **changes), GENERATION)
