"""The script that compiles a recipe for chips that are not there: for CPUs, by the same way; `compilers`: for chips."""

import json
from types import SimpleNamespace

import jax
import pytest
import transformers
from jax.experimental import topologies

CFG = {'hidden_size': 16, 'intermediate_size': 32, 'num_hidden_layers': 2, 'num_attention_heads': 2}


def save(folder, depth=2):
    """A config alone, of a tiny LLaVA with so many layers in its language tower."""
    text = CFG | {'model_type': 'llama', 'vocab_size': 64, 'num_key_value_heads': 1, 'intermediate_size': 48}
    text |= {'num_hidden_layers': depth}
    vision = CFG | {'model_type': 'clip_vision_model', 'image_size': 28, 'patch_size': 14}
    transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=60).save_pretrained(folder)
    return folder


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A directory with a config alone, and a topology of four chips."""

    def describe(platform, topology_name):
        if topology_name != 'v5e:2x2':
            raise RuntimeError(f'no topology {topology_name}')
        return SimpleNamespace(devices=jax.devices())

    monkeypatch.setattr(topologies, 'get_topology_desc', describe)
    return save(tmp_path)


FIELDS = ['--config=configs/llava_lang_only.py', '--config.restore.batch=4', '--config.prune.samples=8']
FIELDS += ['--config.prune.chunk=1']


def check(found, samples, price):
    """What holds of the figures of any program."""
    line = found['roofline']
    assert found['fits']
    assert sum(found['bytes'].values()) <= found['total'] + 64
    assert line['seconds'] == max(line['matmuls'], line['memory'], line['links']) > 0
    assert found['samples_s'] == pytest.approx(samples / line['seconds'])
    assert found['dollars_25k'] == pytest.approx(25_000 / found['samples_s'] / 3600 * found['chips'] * price)


@pytest.mark.slow
def test_it_prints_and_writes_what_a_step_asks_for(script, model, tmp_path):
    mesh = ['--config.restore.kd=0', '--config.mesh.fsdp=4', '--price=2', f'--workdir={tmp_path}']
    code, out, err = script('compile.py', model, *FIELDS, *mesh)
    assert code == 0, err
    assert 'mesh: data=1, fsdp=4, tensor=1' in out
    assert 'fits into 16.0' in out
    assert 'all-gather' in out
    (file,) = tmp_path.glob('*-restore-v5e-2x2.json')
    kept = json.loads(file.read_text())
    (found,) = kept['tried']
    assert kept['price'] == 2
    assert found['chips'] == 4
    assert found['mesh']['fsdp'] == 4
    check(found, 4, 2)
    assert found['total'] == pytest.approx(sum(found['bytes'].values()), abs=64)
    assert f'written to {file}' in out


@pytest.mark.slow
def test_the_best_mesh_is_kept_and_a_pass_counts_layers_and_chunks(script, model, tmp_path):
    best = ['--program=calibrate', '--mesh=best', '--tries=2', f'--workdir={tmp_path}']
    code, out, err = script('compile.py', model, *FIELDS, *best)
    assert code == 0, err
    (file,) = tmp_path.glob('*-calibrate-v5e-2x2.json')
    tried = json.loads(file.read_text())['tried']
    fastest = min(tried, key=lambda found: found['roofline']['seconds'])
    assert len(tried) == 2
    assert out.count('GiB by shapes, ') >= 2
    assert f'mesh: {", ".join(f"{axis}={n}" for axis, n in fastest["mesh"].items())}' in out
    for found in tried:
        check(found, 8, 1.2)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--topology=v5e:3x3'], '--topology=v5e:3x3: no topology v5e:3x3; is requirements-tpu.txt installed?'),
        (
            ['--config=configs/llava_lang_only.py', '--config.mesh.fsdp=8'],
            'the mesh of the config needs 8 chips, v5e:2x2 has 4',
        ),
        (['another'], "unknown argument 'another': see python launch/compile.py --help"),
    ],
)
def test_what_cannot_be_compiled_is_one_line(script, model, arguments, message):
    code, _, err = script('compile.py', model, *arguments)
    assert code == 1, err
    assert err.startswith('error: '), err
    assert message in err, err
    assert err.count('\n') == 1, err


@pytest.mark.compilers
@pytest.mark.parametrize('topology', ['v5e:2x2', 'h100:4'])
def test_programs_for_chips_ask_in_proportion_to_layers(topology, script, tmp_path):
    """FLOPs, what is sent and how often, by the chips' own compilers, which peel and count loops in their own ways."""
    fields = [*FIELDS, f'--workdir={tmp_path}', f'--topology={topology}', '--price=2']
    asked = []
    for depth in (2, 4, 6):
        model = save(tmp_path / 'model', depth)
        code, out, err = script('compile.py', model, *fields, '--config.restore.kd=0', '--config.mesh.fsdp=4')
        assert code == 0, err
        (file,) = tmp_path.glob(f'*-restore-{topology.replace(":", "-")}.json')
        (found,) = json.loads(file.read_text())['tried']
        check(found, 4, 2)
        assert found['collectives'].keys() == {'all-gather', 'all-reduce'}
        counts = [of_kind[what] for of_kind in found['collectives'].values() for what in ('runs', 'bytes')]
        asked.append([found['flops'], *counts])
    two, four, six = asked
    assert all(few < more for few, more in zip(two, four, strict=True))
    assert [b - a for a, b in zip(two, four, strict=True)] == [b - a for a, b in zip(four, six, strict=True)]
    code, out, err = script('compile.py', model, *fields, '--program=calibrate', '--mesh=best', '--tries=1')
    assert code == 0, err
    assert 'seconds a pass of 8' in out, err
