"""A working directory is locked by one process, until that ends."""

import errno
import fcntl
import json
import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
from ml_collections import ConfigDict

import sparselora_jax as sl
from sparselora_jax import recipe
from sparselora_jax.runtime import files


@contextmanager
def held_by_another(folder):
    """Yields the process that holds it."""
    script = 'import sys; from pathlib import Path; from sparselora_jax.runtime import files; '
    script += 'files.hold(Path(sys.argv[1])); print(1, flush=True); sys.stdin.read()'
    other = [sys.executable, '-c', script, str(folder)]
    with subprocess.Popen(other, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b'1\n'
        yield holder
        holder.kill()


@pytest.mark.slow
def test_two_processes_cannot_hold_a_folder(tmp_path):
    with held_by_another(tmp_path) as holder:
        message = rf'another run is in it \(process {holder.pid} on .*\); use another'
        for _ in range(2):  # who was refused leaves the holder's name as it is
            with pytest.raises(sl.StorageError, match=message):
                files.hold(tmp_path)
    files.hold(tmp_path)
    files.hold(tmp_path)  # a process may hold it twice


@pytest.mark.slow
def test_a_folder_that_another_process_holds_is_left_as_it_is(tmp_path):
    config = ConfigDict({'seed': 0, 'mesh': {'data': 2}})
    with held_by_another(tmp_path):
        with pytest.raises(sl.StorageError, match='another run is in it'):
            recipe.claim(tmp_path, config)
        assert not (tmp_path / 'config.json').exists()
    recipe.claim(tmp_path, config)
    assert json.loads((tmp_path / 'config.json').read_text())['seed'] == 0


def test_a_file_system_without_locks_prints_a_line(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOLCK, 'No locks available')

    monkeypatch.setattr(fcntl, 'flock', flock)
    files.hold(tmp_path)
    files.hold(tmp_path)
    assert capsys.readouterr().err.count('cannot be locked ([Errno') == 1


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.EROFS, 'Read-only file system')

    monkeypatch.setattr(fcntl, 'flock', flock)
    with pytest.raises(OSError, match='Read-only'):
        files.hold(tmp_path)


def test_a_loop_of_links_is_an_error_with_its_path(tmp_path):
    loop = tmp_path / 'loop'
    loop.symlink_to(loop)
    with pytest.raises(OSError, match=r'loop'):
        files.hold(loop)
    with pytest.raises(OSError, match=r'loop'):
        files.hold(loop / 'run')


@pytest.mark.parametrize('content', [b'', b'{', b'[1]', b'\xff', b'[' * 10**5])
def test_a_file_that_is_no_json_object_is_named_with_the_remedy(tmp_path, content):
    (tmp_path / 'a.json').write_bytes(content)
    with pytest.raises(files.StorageError, match=r'a.json: not .*; put back a copy'):
        files.read_json(tmp_path / 'a.json', 'put back a copy')


def test_the_message_names_the_position_of_the_fault(tmp_path):
    (tmp_path / 'a.json').write_text('{"a": 1,\n "b": }')
    with pytest.raises(files.StorageError, match=r'line 2 column 7 \(char 15\)'):
        files.read_json(tmp_path / 'a.json', 'put back a copy')


def test_a_name_that_occurs_twice_is_refused_where_names_are_unique(tmp_path):
    (tmp_path / 'a.json').write_text('{"a": 1, "a": 2}')
    assert files.read_json(tmp_path / 'a.json', '') == {'a': 2}
    with pytest.raises(files.StorageError, match='it names a twice'):
        files.read_json(tmp_path / 'a.json', '', has_unique_names=True)


def test_a_pipe_in_place_of_a_json_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / 'config.json')
    with pytest.raises(files.StorageError, match=r'config\.json: not a file; put it back'):
        files.read_json(tmp_path / 'config.json', 'put it back')


def test_a_written_file_may_be_read_by_others_as_the_umask_says(tmp_path):
    with files.whole(tmp_path / 'new') as partial:
        descriptor = os.open(partial, os.O_CREAT | os.O_WRONLY, 0o600)
        os.close(descriptor)
    (tmp_path / 'plain').touch()
    assert (tmp_path / 'new').stat().st_mode == (tmp_path / 'plain').stat().st_mode
