"""LoRA factors are an adapter that peft loads: the same logits as plain LoRA here; merged as its README says, the same
holes."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_models
from peft import PeftModel
from safetensors.numpy import load_file

import sparselora_jax as sl
from sparselora_jax.checkpoints.export import export_model
from sparselora_jax.checkpoints.layout import Place
from sparselora_jax.checkpoints.load import load_model
from sparselora_jax.checkpoints.peft import _fuse, save_peft
from sparselora_jax.models.model import Model
from sparselora_jax.sparse import rules

LOGITS = jax.jit(Model.logits, static_argnums=0)
# Ranks and scales that differ between towers, within fused weights, and from the default.
RULES = [
    ('vision/blocks/attn/k/kernel', None),
    ('vision/blocks/attn/v/kernel', (3, 12)),
    ('vision/blocks/.*', (2, 3)),
    ('qformer/.*', (3, 3)),
    ('language/.*/(o|down|fc2)/kernel', (5, 4)),
    ('language/.*blocks/.*', (2, 8)),
    ('.*', None),
]


def rules_for(params):
    kernels = rules.kernels(params)
    return [rule for rule in RULES if rule[0] == '.*' or any(re.fullmatch(rule[0], path) for path in kernels)]


def random_lora(params):
    """By numpy: nothing compiles."""
    like = jax.eval_shape(lambda params: sl.init_lora(jax.random.key(0), params, rules_for(params)), params)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.15, leaf.shape), jnp.float32), like)


@pytest.fixture(
    params=[
        'tied llama',
        *(pytest.param(name, marks=pytest.mark.slow) for name in ('blip2 opt', 'instructblip t5')),
        'llava',
    ]
)
def adapted(request, perturbed, tmp_path):
    """(torch's module, our model, params, lora whose B is not zero)."""
    module = torch_models.build(request.param, perturbed)
    module.save_pretrained(tmp_path / 'base')
    model, params = load_model(tmp_path / 'base')
    return module, model, params, random_lora(params)


def test_peft_computes_plain_lora(adapted, tmp_path):
    module, model, params, lora = adapted
    save_peft(tmp_path / 'adapter', model, lora)
    given = torch_models.batch(model)
    before = torch_models.logits(module, given)
    peft = PeftModel.from_pretrained(module, tmp_path / 'adapter').eval()
    got = LOGITS(model, sl.bind(params, None, lora, gradient='plain'), given)
    want = torch_models.logits(peft, given)
    assert np.abs(want - before).max() > 0.1
    np.testing.assert_allclose(got, want, atol=1e-4)
    learnt = {name for name, _ in peft.named_parameters() if 'lora_' in name}
    names = load_file(tmp_path / 'adapter' / 'adapter_model.safetensors').keys()
    assert {name.replace('.default', '') for name in learnt} == set(names)


@pytest.fixture
def llama(perturbed, tmp_path):
    """(torch's pruned model, our model, pruned params, masks, lora)."""
    torch_models.build('llama', perturbed).save_pretrained(tmp_path / 'base')
    model, params = load_model(tmp_path / 'base')
    params, masks = sl.prune_tree(params, None, [('.*/blocks/.*', '2:4'), ('.*', 'dense')], method=sl.Magnitude())
    lora = random_lora(params)
    export_model(tmp_path / 'pruned', model, params)
    module = torch_models.load(tmp_path / 'pruned', torch_models.CLASSES[type(torch_models.CONFIGS['llama']())])
    return module, model, params, masks, lora


def test_the_readmes_merge_keeps_the_holes_and_pefts_own_fills_them(llama, tmp_path):
    module, model, params, masks, lora = llama
    save_peft(tmp_path / 'adapter', model, lora)
    (code,) = re.findall(r'```python\n(.*?)```', (tmp_path / 'adapter' / 'README.md').read_text(), re.DOTALL)
    weights = module.model.layers[1].mlp.up_proj.weight
    assert (weights == 0).float().mean() == 0.5
    names = {'model': module, 'adapter': tmp_path / 'adapter', 'PeftModel': PeftModel}
    lines = code.splitlines(keepends=True)
    exec(''.join(lines[:2]), names)  # until PEFT has merged
    assert (names['merged'].model.layers[1].mlp.up_proj.weight == 0).float().mean() < 0.01
    exec(''.join(lines[2:]), names)
    want = rules.flatten(sl.merge(params, masks, lora))['language/blocks/mlp/up/kernel'][1]
    got = names['merged'].model.layers[1].mlp.up_proj.weight.detach().numpy().T
    np.testing.assert_array_equal(got != 0, want != 0)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_the_config_names_the_model_and_what_differs(llama, tmp_path):
    _, model, _, _, lora = llama
    save_peft(tmp_path / 'adapter', model, lora)
    config = json.loads((tmp_path / 'adapter' / 'adapter_config.json').read_text())
    assert config['base_model_name_or_path'] is None
    assert config['task_type'] == 'CAUSAL_LM'
    assert (config['r'], config['lora_alpha']) == (2, 8)
    assert len(config['target_modules']) == 21
    assert set(config['rank_pattern'].values()) == {5}
    assert set(config['alpha_pattern'].values()) == {4}
    save_peft(tmp_path / 'adapter', model, lora, base='owner/pruned')
    assert (
        json.loads((tmp_path / 'adapter' / 'adapter_config.json').read_text())['base_model_name_or_path']
        == 'owner/pruned'
    )


def test_factors_of_something_else_are_named(llama, tmp_path, perturbed):
    _, model, _, _, lora = llama
    lora['language']['blocks']['mlp']['other'] = lora['language']['blocks']['mlp']['up']
    with pytest.raises(sl.StorageError, match='language/blocks/mlp/other/kernel: LoRA factors of no kernel'):
        save_peft(tmp_path / 'adapter', model, lora)
    torch_models.build('blip2 opt', perturbed).save_pretrained(tmp_path / 'blip2')
    model, params = load_model(tmp_path / 'blip2')
    lora = sl.init_lora(jax.random.key(0), params, [('vision/patch/kernel', (2, 2)), ('.*', None)])
    with pytest.raises(sl.StorageError, match='vision/patch/kernel: a convolution'):
        save_peft(tmp_path / 'adapter', model, lora)
    assert not (tmp_path / 'adapter').exists()


def test_a_fused_factor_is_the_slices_side_by_side():
    place = Place('vision/blocks/attn/q/kernel', (1, 4, 2), 0, 0, 3)
    rng = np.random.default_rng(0)

    def lora(scale):
        return sl.Lora(jnp.asarray(rng.normal(size=(1, 4, 2))), jnp.asarray(rng.normal(size=(1, 2, 2))), scale)

    q, v = lora(2.0), lora(3.0)
    a, b, scale = _fuse([(place, q), (place._replace(index=2), v)])
    want = np.concatenate([2 * (q.a[0] @ q.b[0]).T, np.zeros((2, 4)), 3 * (v.a[0] @ v.b[0]).T])
    np.testing.assert_allclose(scale * b @ a, want, rtol=1e-5)
    assert torch.from_numpy(b).shape == (6, 4)
