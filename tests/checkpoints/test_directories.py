"""Which files of a directory hold the model: as transformers chooses, and said where others lie beside them."""

import json
import shutil

import jax
import numpy as np
import pytest
import torch_models
from safetensors.numpy import load_file, save_file

import sparselora_jax as sl
from sparselora_jax.checkpoints.checkpoint_files import open_checkpoint
from sparselora_jax.checkpoints.export import export_model
from sparselora_jax.checkpoints.load import load_model, open_model
from sparselora_jax.checkpoints.packed import export_packed
from sparselora_jax.models.model import Model

LOGITS = jax.jit(Model.logits, static_argnums=0)


@pytest.fixture(scope='module')
def saved(tmp_path_factory, perturbed):
    """(torch's model, its directory in one file, its directory in shards)."""
    module = torch_models.build('tied llama', perturbed)
    single, sharded = (tmp_path_factory.mktemp(name) for name in ('single', 'sharded'))
    module.save_pretrained(single)
    module.save_pretrained(sharded, max_shard_size='30KB')
    return module, single, sharded


@pytest.fixture
def both(saved, tmp_path):
    """A directory of shards, and beside them, saved later, other weights in a single file."""
    _, single, sharded = saved
    folder = shutil.copytree(sharded, tmp_path / 'both')
    tensors = load_file(single / 'model.safetensors')
    save_file(
        {name: 1.5 * array for name, array in tensors.items()},
        folder / 'model.safetensors',
        metadata={'format': 'pt'},
    )
    return folder


def test_of_a_single_file_and_shards_the_single_file_is_read_as_transformers_does(both, saved, capsys):
    model, params = load_model(both)
    said = capsys.readouterr().err
    assert said.count('\n') == 1
    assert f'{both}: reads model.safetensors, as transformers does' in said
    assert 'model.safetensors.index.json' in said
    theirs = type(saved[0]).from_pretrained(both).eval()
    given = torch_models.batch(model)
    np.testing.assert_allclose(LOGITS(model, params, given), torch_models.logits(theirs, given), atol=1e-4)


def test_one_kind_of_weights_is_read_without_a_word(saved, capsys):
    for folder in saved[1:]:
        open_model(folder)
    assert capsys.readouterr().err == ''


def test_what_was_ignored_is_not_exported(both, tmp_path):
    model, params = load_model(both)
    export_model(tmp_path / 'new', model, params)
    names = {path.name for path in (tmp_path / 'new').iterdir()}
    assert {name for name in names if 'safetensors' in name} == {'model.safetensors'}


@pytest.mark.parametrize('text', ['', '{"weight_map": {"a": "gone.safetensors"}}'])
def test_a_stale_index_beside_a_complete_file_is_ignored(text, saved, tmp_path):
    folder = shutil.copytree(saved[1], tmp_path / 'model')
    (folder / 'model.safetensors.index.json').write_text(text)
    assert open_checkpoint(folder).files == (folder / 'model.safetensors',)
    load_model(folder)


def edit_index(folder, change):
    path = folder / 'model.safetensors.index.json'
    index = json.loads(path.read_text())
    change(index['weight_map'])
    path.write_text(json.dumps(index))


def test_an_index_may_list_a_tied_head_that_was_dropped(saved, tmp_path):
    folder = shutil.copytree(saved[2], tmp_path / 'model')
    embedding = 'model.embed_tokens.weight'
    edit_index(folder, lambda names: names.update({'lm_head.weight': names[embedding]}))
    model, params = load_model(folder)
    given = torch_models.batch(model)
    want = torch_models.logits(type(saved[0]).from_pretrained(folder).eval(), given)
    np.testing.assert_allclose(LOGITS(model, params, given), want, atol=1e-4)
    export_model(tmp_path / 'new', model, params)
    load_model(tmp_path / 'new')


def test_a_head_that_the_model_needs_is_missing_although_the_index_lists_it(perturbed, tmp_path):
    module = torch_models.build('llama', perturbed)
    module.save_pretrained(tmp_path, max_shard_size='30KB')
    index = json.loads((tmp_path / 'model.safetensors.index.json').read_text())['weight_map']
    file = tmp_path / index['lm_head.weight']
    tensors = load_file(file)
    del tensors['lm_head.weight']
    save_file(tensors or {'model.other.rotary_emb.inv_freq': np.zeros(1)}, file)
    with pytest.raises(sl.StorageError, match=r'1 tensors are missing: lm_head.weight'):
        load_model(tmp_path)


def add_adapter(folder):
    (folder / 'adapter_config.json').write_text('{"peft_type": "LORA"}')
    save_file({'base_model.model.x.lora_A.weight': np.zeros((2, 2))}, folder / 'adapter_model.safetensors')


def test_an_adapter_beside_a_model_is_refused_with_the_remedy(saved, tmp_path):
    folder = shutil.copytree(saved[1], tmp_path / 'model')
    model, params = load_model(folder)
    add_adapter(folder)
    message = rf'{folder}: adapter_config.json: .*merge_and_unload\(\).*sparselora_jax.merge'
    for call in (load_model, open_model, open_checkpoint):
        with pytest.raises(sl.StorageError, match=message):
            call(folder)
    with pytest.raises(sl.StorageError, match=message):
        export_model(tmp_path / 'new', model, params)
    with pytest.raises(sl.StorageError, match=message):
        export_packed(tmp_path / 'packed', model, params)
    for name in ('new', 'packed'):
        assert not (tmp_path / name).exists()


def test_an_adapter_alone_is_no_model(tmp_path):
    add_adapter(tmp_path)
    with pytest.raises(sl.StorageError, match=r'adapter_config.json: .*merge_and_unload'):
        load_model(tmp_path)
