"""What a run has stored is checked by stage: damage, files of another run and lost files are named with the remedy."""

import os

import pytest
from ml_collections import ConfigDict

from sparselora_jax.jobs import names
from sparselora_jax.jobs.stored import Stored, owner_of
from sparselora_jax.recipe import claim
from sparselora_jax.runtime.files import StorageError

WRITTEN = ('masks.safetensors', 'pruned/config.json', 'pruned/README.md')


def write(stored):
    """A stage that writes a file and a folder."""
    stored.begin()
    for name in WRITTEN:
        stored.writes(name.partition('/')[0])
        file = stored.workdir / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f'{name} of the stage')
    stored.write_result(names.PRUNE, {'tokens': 3})
    stored.write(names.INPUTS, {})


@pytest.fixture
def stored(tmp_path):
    stored = Stored(tmp_path, 'me')
    write(stored)
    return stored


def flip(file, *, keeps_time):
    status = file.stat()
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(0, status.st_mtime_ns + (not keeps_time)))


def again(stored):
    """As another process sees the same workdir."""
    return Stored(stored.workdir, stored.owner)


def test_a_result_is_read_back_without_the_digests_of_its_files(stored):
    again(stored).check(reads=True)
    assert stored.result(names.PRUNE) == {'tokens': 3}
    assert stored.results() == {names.PRUNE: {'tokens': 3}}
    assert stored.result(names.FLOOR) is None


@pytest.mark.parametrize('name', WRITTEN[:2])
@pytest.mark.parametrize('damage', ['flipped', 'cut', 'empty', 'missing', 'a folder'])
def test_a_damaged_file_of_a_stage_is_named_with_the_result_to_delete(stored, name, damage):
    file = stored.workdir / name
    if damage == 'flipped':
        flip(file, keeps_time=False)
    elif damage in ('cut', 'empty'):
        file.write_text('x' if damage == 'cut' else '')
    else:
        file.unlink()
        if damage == 'a folder':
            file.mkdir()
    with pytest.raises(StorageError, match=f'{name} .*; or delete prune.json, to run the stage again'):
        again(stored).check(reads=False)
    with pytest.raises(StorageError, match=name):
        again(stored).output(names.PRUNE, name)


def test_a_bit_that_flipped_on_the_disk_is_noticed_where_contents_are_read(stored):
    flip(stored.workdir / WRITTEN[0], keeps_time=True)
    again(stored).check(reads=False)
    with pytest.raises(StorageError, match=r'masks.safetensors is damaged'):
        again(stored).check(reads=True)


def test_of_a_text_that_users_edit_a_line_says_that_it_has_changed(stored, capsys):
    (stored.workdir / WRITTEN[2]).write_text('a licence')
    again(stored).check(reads=True)
    err = capsys.readouterr().err
    assert err.startswith('note: ')
    assert 'README.md has' in err
    assert 'delete prune.json to write it again' in err


def test_a_file_of_another_run_is_refused(stored, tmp_path):
    other = Stored(tmp_path / 'other', 'you')
    other.workdir.mkdir()
    write(other)
    for name in ('prune.json', names.INPUTS):
        before = (stored.workdir / name).read_bytes()
        (stored.workdir / name).write_bytes((other.workdir / name).read_bytes())
        with pytest.raises(StorageError, match=f'{name}: has changed .*, or is a file of another run; put back'):
            again(stored).check(reads=False)
        (stored.workdir / name).write_bytes(before)


def test_a_result_is_not_one_of_another_stage(stored):
    (stored.workdir / 'floor.json').write_bytes((stored.workdir / 'prune.json').read_bytes())
    with pytest.raises(StorageError, match=r'floor.json: has changed'):
        stored.check(reads=False)


def test_results_without_the_inputs_are_refused(stored):
    (stored.workdir / names.INPUTS).unlink()
    with pytest.raises(StorageError, match=r'inputs.json is missing, and stages are done; put back a copy'):
        stored.check(reads=False)


def test_a_file_that_a_stage_did_not_write_is_not_used(stored):
    (stored.workdir / names.KERNELS).write_text('of another run')
    with pytest.raises(StorageError, match=r'kernels.safetensors: the stage prune did not write it; delete it'):
        stored.output(names.PRUNE, names.KERNELS)


def test_a_file_that_another_stage_changed_is_renewed(stored):
    (stored.workdir / WRITTEN[1]).write_text('the base of an adapter')
    stored.renew(names.PRUNE, WRITTEN[1])
    again(stored).check(reads=True)


def test_another_run_adopts_a_stage_with_its_files(stored, tmp_path):
    other = Stored(tmp_path / 'other', 'you')
    other.adopt(names.PRUNE, stored)
    other.check(reads=True)
    assert other.result(names.PRUNE) == {'tokens': 3}
    other.adopt(names.FLOOR, stored)
    assert other.result(names.FLOOR) is None


def test_the_owner_is_the_recipe_without_what_changes_no_result(tmp_path):
    config = ConfigDict({'seed': 1, 'mesh': {'data': 1}, 'restore': {'steps': 3, 'extra': None}})
    same = ConfigDict({'restore': {'steps': 3}, 'seed': 1, 'mesh': {'data': 8}})
    assert owner_of(tmp_path, config) == owner_of(tmp_path, same)
    assert owner_of(tmp_path, config) != owner_of(tmp_path, ConfigDict({'restore': {'steps': 4}, 'seed': 1}))


def test_a_run_that_has_begun_owns_its_files_however_its_paths_are_written(tmp_path):
    config = ConfigDict({'seed': 1, 'data': str(tmp_path / 'photos')})
    owner = owner_of(tmp_path, config)
    claim(tmp_path, config)
    (tmp_path / 'link').symlink_to(tmp_path, target_is_directory=True)
    through_link = ConfigDict({'seed': 1, 'data': str(tmp_path / 'link' / 'photos')})
    assert owner_of(tmp_path, through_link) == owner


def test_a_run_may_be_moved_together_with_its_model_and_data(tmp_path):
    config = ConfigDict({'seed': 1, 'data': '/old/place/photos'})
    assert owner_of(tmp_path, config) == owner_of(tmp_path, ConfigDict({'seed': 1, 'data': '/new/place/photos'}))
    assert owner_of(tmp_path, config) != owner_of(tmp_path, ConfigDict({'seed': 1, 'data': '/old/place/others'}))
