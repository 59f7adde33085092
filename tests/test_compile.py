"""The script that compiles a recipe for chips that are not there; here for CPUs, by the same way."""

import json
from types import SimpleNamespace

import jax
import pytest
import transformers
from jax.experimental import topologies

CFG = {'hidden_size': 16, 'intermediate_size': 32, 'num_hidden_layers': 2, 'num_attention_heads': 2}


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A directory with a config alone, and a topology of four chips."""

    def describe(platform, topology_name):
        if topology_name != 'v5e:2x2':
            raise RuntimeError(f'no topology {topology_name}')
        return SimpleNamespace(devices=jax.devices())

    monkeypatch.setattr(topologies, 'get_topology_desc', describe)
    text = CFG | {'model_type': 'llama', 'vocab_size': 64, 'num_key_value_heads': 1, 'intermediate_size': 48}
    vision = CFG | {'model_type': 'clip_vision_model', 'image_size': 28, 'patch_size': 14}
    transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=60).save_pretrained(tmp_path)
    return tmp_path


def test_it_prints_and_writes_what_a_step_asks_for(script, model, tmp_path):
    arguments = [model, '--config=configs/llava_lang_only.py', '--config.restore.batch=4', f'--workdir={tmp_path}']
    mesh = ['--config.mesh.fsdp=4']
    code, out, err = script('compile.py', *arguments, *mesh, '--price=2')
    assert code == 0, err
    assert '4 of v5e:2x2' in out and 'fits into 16.0' in out and 'all-gather' in out
    (file,) = tmp_path.glob('*-v5e-2x2.json')
    found = json.loads(file.read_text())
    assert found['chips'] == 4 and found['fits'] and found['config']['mesh']['fsdp'] == 4
    assert found['total'] == pytest.approx(sum(found['bytes'].values()), abs=64)
    line = found['roofline']
    assert line['seconds'] == max(line['matmuls'], line['memory'], line['links']) > 0
    assert found['samples_s'] == pytest.approx(4 / line['seconds'])
    assert found['dollars_25k'] == pytest.approx(25_000 / found['samples_s'] / 3600 * 4 * 2)
    assert f'written to {file}' in out


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--topology=v5e:3x3'], '--topology=v5e:3x3: no topology v5e:3x3; is jax[tpu] installed?'),
        (
            ['--config=configs/llava_lang_only.py', '--config.mesh.fsdp=8'],
            'the mesh of the config needs 8 chips, v5e:2x2 has 4',
        ),
        (['--topology=h100:8'], '--topology=h100:8: expected one of v5e, v5p, v6e, then :4x4'),
        (['another'], 'expected one model: python launch/compile.py MODEL'),
    ],
)
def test_what_cannot_be_compiled_is_one_line(script, model, arguments, message):
    code, _, err = script('compile.py', model, *arguments)
    assert code == 1 and err.startswith('error: ') and message in err and err.count('\n') == 1, err
