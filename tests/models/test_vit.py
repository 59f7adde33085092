"""Parity of the vision towers of BLIP-2, CLIP and SigLIP with torch transformers; what is refused."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    Blip2VisionConfig,
    Blip2VisionModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    InstructBlipVisionConfig,
    InstructBlipVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
)

from sparselora_jax.models import vit
from sparselora_jax.runtime.errors import BatchError, UnsupportedModelError
from sparselora_jax.sparse import rules

SIZES = {
    'hidden_size': 24,
    'intermediate_size': 40,
    'num_hidden_layers': 3,
    'num_attention_heads': 4,
    'image_size': 16,
    'patch_size': 4,
}


def pixels(size=16):
    return np.random.default_rng(0).normal(size=(3, 3, size, size)).astype(np.float32)


def run(module, from_torch, cfg, images):
    params = from_torch(module.state_dict(), vit.keys(cfg), vit.shapes(cfg))
    return vit.forward(params, cfg, jnp.asarray(images))


def read(state, cfg):
    """Names of the state that the key table reads."""
    names = {getattr(name, 'name', name) for name in vit.keys(cfg).values()}
    return {name.format(i=i) for name in names for i in range(cfg.depth)} & set(state)


@pytest.mark.parametrize(
    ('config', 'model', 'changes'),
    [
        (Blip2VisionConfig, Blip2VisionModel, {}),
        (Blip2VisionConfig, Blip2VisionModel, {'qkv_bias': False, 'layer_norm_eps': 1e-3}),
        (InstructBlipVisionConfig, InstructBlipVisionModel, {}),
        (CLIPVisionConfig, CLIPVisionModel, {}),
        (SiglipVisionConfig, SiglipVisionModel, {'vision_use_head': False}),
        (SiglipVisionConfig, SiglipVisionModel, {'image_size': 18}),  # the last two pixels are not read
    ],
)
def test_outputs_equal_torch(config, model, changes, from_torch, perturbed):
    hf = config(**SIZES | changes)
    torch.manual_seed(0)
    module = perturbed(model(hf))
    cfg, images = vit.from_hf(hf), pixels(hf.image_size)
    with torch.no_grad():
        want = module(torch.asarray(images)).last_hidden_state.numpy()
    np.testing.assert_allclose(run(module, from_torch, cfg, images), want, atol=1e-4)
    unread = set(module.state_dict()) - read(module.state_dict(), cfg)
    unused = ('head.', 'post_layernorm.') if config is CLIPVisionConfig else ('head.',)
    assert all(name.startswith(unused) for name in unread)


@pytest.mark.parametrize('layer', [-1, -2, -3, 1, 3])
@pytest.mark.parametrize(
    ('config', 'model'), [(CLIPVisionConfig, CLIPVisionModel), (SiglipVisionConfig, SiglipVisionModel)]
)
def test_a_chosen_hidden_state_equals_torch(layer, config, model, from_torch, perturbed):
    hf = config(**SIZES)
    torch.manual_seed(0)
    module = perturbed(model(hf))
    cfg = vit.from_hf(hf, layer=layer, drop_first=layer < 0)
    with torch.no_grad():
        want = module(torch.asarray(pixels()), output_hidden_states=True).hidden_states[layer].numpy()
    np.testing.assert_allclose(run(module, from_torch, cfg, pixels()), want[:, int(layer < 0) :], atol=1e-4)
    assert cfg.depth == range(4)[layer]
    assert 'norm' not in vit.shapes(cfg)


def test_a_patch_is_read_row_by_row_channels_last():
    """What the shipped weights mean."""
    cfg = vit.ViTConfig(image_size=4, patch_size=2, width=12, depth=1, heads=1, mlp_width=4)
    rows = np.arange(4 * 4 * 3, dtype=np.float32).reshape(4, 4, 3)
    zeros = {path: jnp.zeros(shape) for path, shape in rules.flatten(vit.shapes(cfg)).items()}
    w = rules.unflatten(zeros | {'patch/kernel': jnp.eye(12)})
    x, _ = vit.embed(w, cfg, jnp.asarray(rows.transpose(2, 0, 1)[None]))
    np.testing.assert_array_equal(x[0, 1], rows[:2, :2].ravel())
    np.testing.assert_array_equal(x[0, 2], rows[:2, 2:].ravel())


def test_todays_config_needs_no_new_field():
    cfg = vit.ViTConfig(image_size=64, patch_size=8, width=192, depth=6, heads=3, mlp_width=768, norm_eps=1e-06)
    assert cfg.tokens == 65
    assert {'patch', 'cls', 'positions', 'blocks', 'norm'} == set(vit.shapes(cfg))


def test_images_of_another_size_are_named():
    cfg = vit.from_hf(Blip2VisionConfig(**SIZES))
    with pytest.raises(BatchError, match='20x20 pixels, the vision tower reads 16x16'):
        vit.embed({}, cfg, jnp.zeros((1, 3, 20, 20)))


@pytest.mark.parametrize(
    ('hf', 'layer', 'message'),
    [
        (ViTConfig(**SIZES), None, "vision model 'vit'"),
        (CLIPVisionConfig(**SIZES | {'image_size': [16, 20]}), None, 'image_size'),
        (CLIPVisionConfig(**SIZES, num_channels=1), None, 'num_channels 1'),
        (CLIPVisionConfig(**SIZES, hidden_act='mish'), None, "activation 'mish' of clip_vision_model"),
        (CLIPVisionConfig(**SIZES), 4, 'hidden state 4 of 3 vision layers'),
        (CLIPVisionConfig(**SIZES), 0, 'hidden state 0'),
        (CLIPVisionConfig(**SIZES), -5, 'hidden state -5'),
    ],
)
def test_what_is_not_known_is_refused(hf, layer, message):
    with pytest.raises(UnsupportedModelError, match=message):
        vit.from_hf(hf, layer=layer)


@pytest.mark.parametrize(('side', 'new_side'), [(16, 26), (4, 7), (6, 3)])
def test_positions_are_interpolated_as_torch_does(side, new_side):
    cfg = vit.ViTConfig(image_size=14 * side, patch_size=14, width=3, depth=1, heads=1, mlp_width=4)
    positions = np.random.default_rng(0).normal(size=(1, side**2 + 1, 3)).astype(np.float32)
    grid = torch.asarray(positions[0, 1:].reshape(side, side, 3)).permute(2, 0, 1)[None]
    want = torch.nn.functional.interpolate(grid, size=(new_side, new_side), mode='bicubic', align_corners=False)
    got = vit.resize_positions(jnp.asarray(positions), cfg, replace(cfg, image_size=14 * new_side))
    np.testing.assert_allclose(got[0, 1:], want[0].permute(1, 2, 0).reshape(-1, 3).numpy(), atol=1e-5)
    np.testing.assert_array_equal(got[0, 0], positions[0, 0])
    np.testing.assert_array_equal(vit.resize_positions(jnp.asarray(positions), cfg, cfg), positions)
