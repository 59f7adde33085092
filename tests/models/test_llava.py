"""Parity of LLaVA and its parts with torch transformers; names of three layouts; what is refused."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import CLIPVisionConfig, GPT2Config, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from sparselora_jax.models import llava
from sparselora_jax.models.model import Generation, Model, from_hf
from sparselora_jax.runtime.errors import BatchError, UnsupportedModelError

IMAGE, PATCHES = 38, 16
LOGITS = jax.jit(Model.logits, static_argnums=0)


def config(**changes):
    vision = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
        projection_dim=12,
    )
    text = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        rms_norm_eps=1e-5,
        max_position_embeddings=64,
    )
    defaults = {'image_token_index': IMAGE, 'image_seq_length': PATCHES, 'vision_config': vision, 'text_config': text}
    return LlavaConfig(**defaults | changes)


def build(hf, perturbed, from_torch):
    """(torch's model, ours, our params)."""
    torch.manual_seed(0)
    module = perturbed(LlavaForConditionalGeneration(hf))
    model = Model(from_hf(hf), Generation(eos=(2,), pad=0))
    return module, model, from_torch(module.state_dict(), model.family.keys(model.cfg), model.shapes())


@pytest.fixture(scope='module')
def oracle(perturbed, from_torch):
    return build(config(), perturbed, from_torch)


def batch(images=PATCHES):
    rng = np.random.default_rng(0)
    ids = np.concatenate(
        [rng.integers(3, 38, (3, 2)), np.full((3, images), IMAGE), rng.integers(3, 38, (3, 6))], axis=1
    )
    return {
        'pixel_values': rng.normal(size=(3, 3, 16, 16)).astype(np.float32),
        'input_ids': ids,
        'attention_mask': np.ones_like(ids),
    }


def logits(module, given):
    with torch.no_grad():
        return module(**{name: torch.asarray(array) for name, array in given.items()}).logits.numpy()


def left_padded(given, *pads):
    """Rows moved to the right by so many pads, their last tokens lost."""
    ids, mask = np.zeros_like(given['input_ids']), np.zeros_like(given['input_ids'])
    for row, count in enumerate(pads):
        ids[row, count:], mask[row, count:] = given['input_ids'][row, : ids.shape[1] - count], 1
    return given | {'input_ids': ids, 'attention_mask': mask}


@pytest.mark.parametrize(
    ('changes', 'tokens'),
    [
        ({}, PATCHES),
        ({'vision_feature_select_strategy': 'full', 'multimodal_projector_bias': False}, PATCHES + 1),
        ({'vision_feature_layer': 1, 'projector_hidden_act': 'relu', 'tie_word_embeddings': True}, PATCHES),
    ],
)
def test_logits_equal_torch(changes, tokens, perturbed, from_torch):
    module, model, params = build(config(**changes), perturbed, from_torch)
    given = batch(tokens)
    np.testing.assert_allclose(LOGITS(model, params, given), logits(module, given), atol=1e-4)


def test_logits_of_padded_rows_equal_torch(oracle):
    module, model, params = oracle
    given = left_padded(batch(), 0, 3, 5)
    valid = given['attention_mask'] == 1
    np.testing.assert_allclose(LOGITS(model, params, given)[valid], logits(module, given)[valid], atol=1e-4)
    given['attention_mask'][2] = 0
    assert bool(jnp.isfinite(LOGITS(model, params, given)).all())


def test_every_parameter_is_accounted_for(oracle):
    module, _, params = oracle
    unused = [n for n in module.state_dict() if re.search(r'vision_tower\.(encoder\.layers\.2|post_layernorm)\.', n)]
    unread = sum(module.state_dict()[name].numel() for name in unused)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) + unread == sum(p.numel() for p in module.parameters())
    assert all(any(re.fullmatch(pattern, name) for pattern in llava.FAMILY.ignored) for name in unused)


@pytest.mark.parametrize(
    ('name', 'module_name'),
    [
        ('language_model.model.layers.0.mlp.up_proj.weight', 'model.language_model.layers.0.mlp.up_proj.weight'),
        ('language_model.lm_head.weight', 'lm_head.weight'),
        ('multi_modal_projector.linear_1.bias', 'model.multi_modal_projector.linear_1.bias'),
        ('vision_tower.vision_model.pre_layrnorm.bias', 'model.vision_tower.pre_layrnorm.bias'),
        ('vision_tower.pre_layrnorm.bias', 'model.vision_tower.pre_layrnorm.bias'),
        ('model.vision_tower.vision_model.pre_layrnorm.bias', 'model.vision_tower.pre_layrnorm.bias'),
    ],
)
def test_older_names_become_the_modules_own(name, module_name):
    for given in (name, module_name):  # today's names stay
        for pattern, replacement in llava.RENAMES:
            given = re.sub(pattern, replacement, given)
        assert given == module_name


def test_a_saved_file_is_renamed_to_what_the_table_names(tmp_path, oracle):
    module, *_ = oracle
    for original in (True, False):
        module.save_pretrained(tmp_path / str(original), save_original_format=original)
        with safe_open(tmp_path / str(original) / 'model.safetensors', 'numpy') as file:
            stored = list(file.keys())
        for pattern, replacement in llava.RENAMES:
            stored = [re.sub(pattern, replacement, name) for name in stored]
        assert set(stored) == set(module.state_dict())


def test_images_and_their_tokens_must_fit(oracle):
    _, model, params = oracle
    given = batch()
    given['input_ids'][1, 4] = 5
    with pytest.raises(BatchError, match=r'row 1 of input_ids has 15 image tokens \(38\): expected 16'):
        model.logits(params, given)
    with pytest.raises(BatchError, match='2 pixel_values for 3 input_ids'):
        model.logits(params, given | {'pixel_values': given['pixel_values'][:2]})


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'vision_feature_layer': [-2, -1]}, 'vision_feature_layer'),
        ({'projector_hidden_act': 'mish'}, "activation 'mish' of the projector"),
    ],
)
def test_what_is_not_known_is_refused(changes, message):
    with pytest.raises(UnsupportedModelError, match=message):
        from_hf(config(**changes))


def test_unknown_families_and_language_models_are_refused():
    with pytest.raises(UnsupportedModelError, match="model_type 'clip_vision_model': expected one of blip-2"):
        from_hf(CLIPVisionConfig())
    with pytest.raises(UnsupportedModelError, match="language model 'gpt2': expected one of llama"):
        from_hf(config(text_config=GPT2Config(n_embd=32)))
