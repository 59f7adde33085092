"""A workdir belongs to one config, in which a path means the same in every folder."""

import json
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from configs import blip2_lang_only, demo_pretrain
from sparselora_jax.recipe import ConfigError, absolute_paths, check_values, claim, override, refuse_other


def recipe(**fields):
    config = blip2_lang_only.get_config('data=photos')
    override(config, {name.replace('__', '.'): value for name, value in fields.items()})
    return config


@pytest.fixture
def start(tmp_path, monkeypatch):
    """The folder where a run is started, with a model and data; it is the current one."""
    folder = tmp_path / 'start'
    for name in ('model', 'photos'):
        (folder / name).mkdir(parents=True)
    monkeypatch.chdir(folder)
    return folder


def stored(workdir):
    return json.loads((workdir / 'config.json').read_text())


def test_the_paths_of_a_stored_config_are_absolute(start):
    claim(Path('run'), recipe(model='model'))
    fields = stored(start / 'run')
    assert fields['model'] == str(start / 'model')
    assert fields['data'] == str(start / 'photos')
    assert fields['data_dir'] == str(start / 'runs/data')


@pytest.mark.parametrize(
    'names',
    [
        {'model': 'embedded', 'data': 'easy_vqa'},
        {'model': 'Salesforce/blip2-opt-2.7b', 'data': 'my_parts:PLAIN_COLOURS'},
    ],
)
def test_names_that_are_no_paths_stay_as_they_are(start, names):
    config = absolute_paths(recipe(**names))
    assert {name: config[name] for name in names} == names


def test_a_hub_id_that_is_a_folder_here_is_this_folder(start):
    (start / 'owner/name').mkdir(parents=True)
    assert absolute_paths(recipe(model='owner/name')).model == str(start / 'owner/name')


def test_the_config_that_is_made_absolute_is_a_copy(start):
    config = recipe(model='model')
    absolute_paths(config)
    assert config.model == 'model'


def test_the_paths_of_a_sweep_are_those_of_its_base(start):
    sweep = ConfigDict({'name': 'grid', 'base': recipe(model='model')})
    claim(Path('run'), sweep)
    assert stored(start / 'run')['base']['model'] == str(start / 'model')


def test_the_paths_of_a_pretraining_are_absolute(start):
    claim(Path('run'), demo_pretrain.get_config())
    assert stored(start / 'run')['data_dir'] == str(start / 'runs/data')


@pytest.mark.parametrize('spelling', ['photos', 'photos/', './photos', '../start/photos', 'link', 'absolute'])
def test_another_spelling_of_a_folder_is_no_other_config(start, spelling):
    (start / 'link').symlink_to('photos')
    claim(Path('run'), recipe())
    refuse_other(start / 'run', recipe(data=str(start / 'photos') if spelling == 'absolute' else spelling))


def test_a_stored_config_is_that_of_its_own_run_from_another_folder(start, tmp_path, monkeypatch):
    claim(Path('run'), recipe(model='model'))
    monkeypatch.chdir(tmp_path)
    refuse_other(start / 'run', ConfigDict(stored(start / 'run')))
    # The folder of prepared data decides no result.
    refuse_other(start / 'run', recipe(model=str(start / 'model'), data=str(start / 'photos')))


def test_another_folder_of_the_same_name_is_another_config(start, tmp_path, monkeypatch):
    claim(Path('run'), recipe())
    (tmp_path / 'other/photos').mkdir(parents=True)
    monkeypatch.chdir(tmp_path / 'other')
    with pytest.raises(
        ConfigError, match=f"data is '{tmp_path}/other/photos' here and '{start}/photos' in the workdir"
    ):
        refuse_other(start / 'run', recipe())


def test_the_refusal_names_what_differs_and_how_to_continue(start):
    claim(Path('a run'), recipe())
    said = r"seed is 3 here and 42 in the workdir\); continue it with --config='a run/config.json', or use another"
    with pytest.raises(ConfigError, match=said):
        refuse_other(Path('a run'), recipe(seed=3))


def test_the_refusal_of_a_quite_different_config_is_short(start):
    claim(Path('run'), recipe())
    with pytest.raises(ConfigError, match=r'; and \d+ more\); continue it with its own command') as raised:
        refuse_other(Path('run'), demo_pretrain.get_config())
    assert len(str(raised.value)) < 1000


def test_a_folder_for_the_default_data_is_refused_with_the_way_that_works(start):
    config = blip2_lang_only.get_config()
    config.data = 'photos'
    with pytest.raises(ConfigError, match=r'--config=configs/NAME\.py:data=photos'):
        check_values(config)
    check_values(blip2_lang_only.get_config('data=photos'))
