"""Tensors are read where the header says; files that are damaged, pickled or elsewhere are named, never read."""

import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import sparselora_jax as sl
from sparselora_jax.checkpoints.checkpoint_files import open_checkpoint
from sparselora_jax.checkpoints.safetensors_format import DTYPES, read

RNG = np.random.default_rng(0)
TENSORS = {
    'a': RNG.normal(size=(5, 3)).astype(np.float32),
    'b': RNG.normal(size=(4, 2, 2)).astype(np.float16),
    'c': RNG.normal(size=(7,)).astype(ml_dtypes.bfloat16),
    'd': RNG.normal(size=(2, 2)),
    'e': RNG.integers(-9, 9, (3,)),
    'f': RNG.integers(-9, 9, (3,)).astype(np.int32),
    'g': RNG.integers(0, 9, (3,)).astype(np.uint8),
    'h': RNG.integers(0, 2, (3,)).astype(bool),
    'i': np.array(3.5, np.float32),
    'j': np.zeros((0, 4), np.float32),
}


@pytest.fixture
def folder(tmp_path):
    """A directory of one file."""
    (tmp_path / 'config.json').write_text('{}')
    save_file(TENSORS, tmp_path / 'model.safetensors', metadata={'format': 'pt'})
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    """A directory of two shards."""
    names = list(TENSORS)
    parts = {'model-1.safetensors': names[:4], 'model-2.safetensors': names[4:]}
    for file, part in parts.items():
        save_file({name: TENSORS[name] for name in part}, tmp_path / file)
    (tmp_path / 'config.json').write_text('{}')
    write_index(tmp_path, {name: file for file, part in parts.items() for name in part})
    return tmp_path


def write_index(folder, weight_map):
    (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': weight_map}))


def edit_index(folder, **changes):
    write_index(folder, json.loads((folder / 'model.safetensors.index.json').read_text())['weight_map'] | changes)


@pytest.mark.parametrize('kind', ['folder', 'sharded'])
def test_every_dtype_and_shape_comes_back(kind, request):
    checkpoint = open_checkpoint(request.getfixturevalue(kind))
    assert checkpoint.entries.keys() == TENSORS.keys()
    assert len(checkpoint.files) == (1 if kind == 'folder' else 2)
    for name, want in TENSORS.items():
        got = read(checkpoint.entries[name])
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)


def test_rows_are_read_alone(folder):
    entries = open_checkpoint(folder).entries
    np.testing.assert_array_equal(read(entries['a'], (1, 4)), TENSORS['a'][1:4])
    np.testing.assert_array_equal(read(entries['b'], (3, 4)), TENSORS['b'][3:])
    np.testing.assert_array_equal(read(entries['c'], (2, 2)), TENSORS['c'][2:2])


def test_what_torch_writes_is_read(folder):
    from safetensors.torch import save_file as save_torch

    tensor = torch.randn(6, 5).to(torch.bfloat16)
    save_torch({'x': tensor}, folder / 'model.safetensors')
    got = read(open_checkpoint(folder).entries['x'])
    np.testing.assert_array_equal(got.astype(np.float32), tensor.float().numpy())


def test_a_file_cut_while_it_is_read_is_named(folder):
    entry = open_checkpoint(folder).entries['a']
    (folder / 'model.safetensors').write_bytes((folder / 'model.safetensors').read_bytes()[: entry.start + 7])
    with pytest.raises(sl.StorageError, match=r'model.safetensors: a ends early \(7 of 60 bytes\)'):
        read(entry)


def test_missing_directories_configs_and_weights_are_named(tmp_path):
    with pytest.raises(sl.StorageError, match='absent: no such directory'):
        open_checkpoint(tmp_path / 'absent')
    with pytest.raises(sl.StorageError, match=r'no config.json'):
        open_checkpoint(tmp_path)
    (tmp_path / 'config.json').write_text('{}')
    with pytest.raises(sl.StorageError, match=r'neither model.safetensors nor model.safetensors.index.json'):
        open_checkpoint(tmp_path)


@pytest.mark.slow
def test_pickles_are_refused_with_a_command_that_converts_them(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {'hidden_size': 8, 'intermediate_size': 8, 'num_hidden_layers': 1, 'num_attention_heads': 2}
    module = LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes, architectures=['LlamaForCausalLM']))
    module.config.save_pretrained(tmp_path / 'model')
    torch.save(module.state_dict(), tmp_path / 'model' / 'pytorch_model.bin')
    with pytest.raises(sl.StorageError, match=r'pickled \(pytorch_model.bin\), and unpickling runs') as error:
        open_checkpoint(tmp_path / 'model')
    command = str(error.value).split('too: ')[1]
    subprocess.run(command.replace('python', sys.executable, 1), shell=True, check=True, capture_output=True)
    converted = open_checkpoint(f'{tmp_path}/model-safetensors')
    name = 'model.layers.0.mlp.up_proj.weight'
    np.testing.assert_array_equal(read(converted.entries[name]), module.state_dict()[name].numpy())


@pytest.mark.parametrize('lost', [1, 40])
def test_a_truncated_shard_is_named_with_its_sizes(lost, sharded):
    path = sharded / 'model-2.safetensors'
    whole = path.read_bytes()
    path.write_bytes(whole[:-lost])
    message = f'model-2.safetensors: truncated: {len(whole) - lost} bytes, but its header promises {len(whole)}'
    with pytest.raises(sl.StorageError, match=message):
        open_checkpoint(sharded)


def header(tensors, data=0):
    text = tensors if isinstance(tensors, bytes) else json.dumps(tensors).encode()
    return len(text).to_bytes(8, 'little') + text + bytes(data)


def item(begin, end, shape=(2,), dtype='F32'):
    return {'dtype': dtype, 'shape': shape, 'data_offsets': [begin, end]}


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (b'', 'not a safetensors file'),
        (b'1234567', 'not a safetensors file'),
        (b'\xff' * 64, 'not a safetensors file'),
        (b'\x00\x01' + bytes(6) + b'{}', 'truncated: 10 bytes, but its header alone takes 264'),
        (header(b'{"a": '), 'its header does not parse'),
        (header(b'\xff\xfe{}'), 'its header does not parse'),
        (header(b'[]'), 'its header does not parse'),
        (header(b'{"a": 1}'), 'its header does not parse'),
        (header({'a': {'dtype': 'F32'}}), 'its header does not parse'),
        (header({'a': item(0, 8, dtype='F8_E4M3')}, 8), 'a has dtype F8_E4M3; known are'),
        (header({'a': item(0, 12)}, 12), r'a of shape \(2,\) takes 8 bytes, not 12'),
        (header({'a': item(-8, 0)}, 8), r'a has shape \(2,\) at -8:0'),
        (header({'a': item(0, 8, (-1, -2))}, 8), r'a has shape \(-1, -2\)'),
        (header({'a': item(0, 8), 'b': item(4, 12)}, 12), 'b starts at byte .*; damaged'),
        (header({'a': item(0, 8), 'b': item(12, 20)}, 20), 'b starts at byte .*; damaged'),
        (header({'a': item(0, 8)}, 9), 'bytes, but its header promises'),
        (header(b'{"a": %b, "a": %b}' % ((json.dumps(item(0, 8)).encode(),) * 2), 8), 'it names a twice'),
    ],
    ids=range(17),
)
def test_damaged_files_are_named(content, message, folder):
    (folder / 'model.safetensors').write_bytes(content)
    with pytest.raises(sl.StorageError, match='model.safetensors: ' + '.*' + message):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    'name', ['/etc/model.safetensors', '../model.safetensors', 'x/../../m.safetensors', 'c:\\m.safetensors']
)
def test_an_index_that_points_outside_is_refused(name, sharded):
    save_file(TENSORS, sharded.parent / 'model.safetensors')
    edit_index(sharded, a=name)
    with pytest.raises(sl.StorageError, match=r'index.json: it names .*, outside the directory'):
        open_checkpoint(sharded)


@pytest.mark.parametrize('name', [3, 'model-1.bin', None])
def test_an_index_that_names_no_safetensors_is_refused(name, sharded):
    edit_index(sharded, a=name)
    with pytest.raises(sl.StorageError, match=r'expected the name of a .safetensors file'):
        open_checkpoint(sharded)


def test_a_hub_cache_of_links_is_read(sharded, tmp_path_factory):
    snapshot = tmp_path_factory.mktemp('snapshot')
    for path in sharded.iterdir():
        (snapshot / path.name).symlink_to(path)
    assert open_checkpoint(snapshot).entries.keys() == TENSORS.keys()


def test_a_missing_shard_is_named(sharded):
    (sharded / 'model-2.safetensors').unlink()
    with pytest.raises(sl.StorageError, match=r'shard model-2.safetensors \(6 tensors\) is missing'):
        open_checkpoint(sharded)


def test_a_tensor_that_its_shard_lacks_is_named(sharded):
    edit_index(sharded, z='model-1.safetensors')
    with pytest.raises(sl.StorageError, match=r'index.json: z should lie in model-1.safetensors, which has no such'):
        open_checkpoint(sharded)
    edit_index(sharded, z='model-1.safetensors', a='model-2.safetensors')
    with pytest.raises(sl.StorageError, match=r'a should lie in model-2.safetensors'):
        open_checkpoint(sharded)


def test_a_tensor_in_two_shards_is_named(sharded):
    save_file({name: TENSORS[name] for name in [*list(TENSORS)[4:], 'a']}, sharded / 'model-2.safetensors')
    with pytest.raises(sl.StorageError, match=r'model-2.safetensors: a also lies in model-1.safetensors'):
        open_checkpoint(sharded)


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('', r'not JSON \(.*char 0\)'),
        ('[]', 'not a JSON object'),
        ('{}', 'weight_map None: expected the file of each tensor'),
        ('{"weight_map": 3}', 'weight_map 3: expected the file of each tensor'),
        ('{"weight_map": {"a": "x", "a": "y"}}', r'not JSON \(it names a twice\)'),
        ('{"weight_map": {"a": [1]}}', r'it names \[1\]; expected the name of a .safetensors file'),
    ],
)
def test_an_index_that_is_none_is_named(text, message, sharded):
    (sharded / 'model.safetensors.index.json').write_text(text)
    with pytest.raises(sl.StorageError, match=f'index.json: {message}'):
        open_checkpoint(sharded)


def test_an_empty_index_is_named(sharded):
    write_index(sharded, {})
    with pytest.raises(sl.StorageError, match='it names no tensor'):
        open_checkpoint(sharded)


def test_nothing_is_mapped_or_kept(folder):
    entry = open_checkpoint(folder).entries['a']
    array = read(entry)
    assert array.flags.writeable
    assert array.base.base is None
    array[:] = 0
    np.testing.assert_array_equal(read(entry), TENSORS['a'])
    assert DTYPES['BF16'].itemsize == 2
