"""Digests recognise a file that has changed, and read it only where they have to."""

import os

import pytest

from sparselora_jax.runtime import digests
from sparselora_jax.runtime.files import StorageError


@pytest.fixture
def file(tmp_path):
    path = tmp_path / 'a.bin'
    path.write_bytes(bytes(range(100)))
    return path


def flip(path, *, keeps_time):
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[50] ^= 1
    path.write_bytes(data)
    times = (status.st_atime_ns, status.st_mtime_ns + (not keeps_time))
    os.utime(path, ns=times)


def test_a_file_that_looks_the_same_is_not_read_again(file, monkeypatch):
    known = digests.take({'a': file})
    monkeypatch.setattr(digests, 'sha256', lambda path: pytest.fail(f'{path} is read'))
    assert digests.take({'a': file}, known) == known
    assert digests.difference(file, known['a'], reads=False) == ''


def test_a_copy_with_another_time_is_the_same_file(file):
    known = digests.take({'a': file})
    os.utime(file, ns=(1, 1))
    assert digests.difference(file, known['a'], reads=False) == ''
    assert digests.take({'a': file}, known)['a'].sha256 == known['a'].sha256


@pytest.mark.parametrize(('keeps_time', 'reads'), [(False, False), (False, True), (True, True)])
def test_a_flipped_bit_is_noticed_by_its_time_or_when_the_file_is_read(file, keeps_time, reads):
    digest = digests.take({'a': file})['a']
    flip(file, keeps_time=keeps_time)
    assert 'damaged' in digests.difference(file, digest, reads=reads)


def test_a_missing_or_shorter_file_is_noticed(file):
    digest = digests.take({'a': file})['a']
    file.write_bytes(b'short')
    assert digests.difference(file, digest, reads=False) == 'has 5 bytes, 100 were written'
    file.unlink()
    assert digests.difference(file, digest, reads=False) == 'is missing'


def test_a_stamped_file_is_read_back_and_its_changes_are_refused(tmp_path):
    path = tmp_path / 'a.json'
    values = {'score': 0.1 + 0.2, 'names': ('é', 'b'), 'nested': {'nan': float('inf'), 'none': None}}
    path.write_text(digests.stamp(values, 'me'))
    assert digests.read_stamped(path, 'x', 'me') == values | {'names': ['é', 'b']}
    with pytest.raises(StorageError, match=r'a.json: has changed since it was written, or is a file of another run; x'):
        digests.read_stamped(path, 'x', 'you')
    path.write_text(path.read_text().replace('0.3', '0.4'))
    with pytest.raises(StorageError, match=r'a.json: has changed since it was written, .*; delete it'):
        digests.read_stamped(path, 'delete it', 'me')


@pytest.mark.parametrize('text', [b'', b'[1]', b'{"a": 1}', b'\xff\xfe', b'[' * 100_000, b'{"sha256": []}'])
def test_what_is_no_stamped_file_is_refused(tmp_path, text):
    (tmp_path / 'a.json').write_bytes(text)
    with pytest.raises(StorageError, match=r'a.json: .*; delete it'):
        digests.read_stamped(tmp_path / 'a.json', 'delete it', 'me')
