"""Records are read from JSON one by one, as `json.load` reads them all at once."""

import json
import random

import pytest

from sparselora_jax.data.benchmarks import json_stream
from sparselora_jax.data.benchmarks.json_stream import CutError, Entry, entries, for_each, lines
from sparselora_jax.runtime.errors import DataError


def flattened(value):
    """The entries that `entries` must give for a decoded file."""
    if isinstance(value, list):
        return [Entry('', index, element) for index, element in enumerate(value)]
    result = []
    for key, member in value.items():
        if isinstance(member, list):
            result += [Entry(key, index, element) for index, element in enumerate(member)]
        else:
            result.append(Entry(key, None, member))
    return result


def random_value(rng, depth=0):
    kind = rng.randrange(9 if depth < 3 else 6)
    if kind == 6:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind >= 7:
        return {random_text(rng): random_value(rng, depth + 1) for _ in range(rng.randrange(4))}
    return (None, True, rng.randrange(-(10**12), 10**12), rng.random() * 1e-7, random_text(rng), '')[kind]


def random_text(rng):
    return ''.join(rng.choice('ab "\\/\n\u00e9\u6c34\U0001f600{}[],:') for _ in range(rng.randrange(9)))


@pytest.mark.parametrize('window', [1, 2, 7, 64, 2**20])
def test_records_are_those_of_json_load(tmp_path, monkeypatch, window):
    """Whatever the size of the window: texts, numbers and characters of several bytes lie across its end."""
    monkeypatch.setattr(json_stream, 'WINDOW', window)
    rng = random.Random(window)
    path = tmp_path / 'a.json'
    for number in range(60):
        value = [random_value(rng) for _ in range(3)] if number % 3 else {random_text(rng): random_value(rng)}
        if number % 3 == 2:
            value = {'a': value, 'b': 12345, 'c': []}
        indent = rng.choice([None, 0, 1, 4])
        path.write_text(json.dumps(value, ensure_ascii=rng.random() < 0.5, indent=indent), encoding='utf-8')
        assert list(entries(path)) == flattened(json.loads(path.read_bytes()))


@pytest.mark.parametrize('window', [1, 5, 2**20])
@pytest.mark.parametrize('text', ['[{"a": "\u00e9\u6c34"}, {"b": 12}]', '{"k": [1, "x"], "m": {"n": 3.5}, "o": null}'])
@pytest.mark.slow
def test_every_truncation_and_every_changed_byte_is_refused_as_by_json_load(tmp_path, monkeypatch, window, text):
    monkeypatch.setattr(json_stream, 'WINDOW', window)
    path = tmp_path / 'a.json'
    content = text.encode()
    broken = [content[:length] for length in range(len(content))]
    broken += [content[:at] + b'%' + content[at + 1 :] for at in range(len(content))]
    for case in broken:
        path.write_bytes(case)
        try:
            want = flattened(json.loads(case))
        except ValueError:
            with pytest.raises(DataError, match=r'a\.json: ') as error:
                list(entries(path))
            assert len(str(error.value).splitlines()) == 1
        else:
            assert list(entries(path)) == want


def test_a_truncated_file_says_where_it_ends(tmp_path):
    path = tmp_path / 'a.json'
    path.write_text('{"questions": [{"a": 1}, {"a": ')
    with pytest.raises(DataError, match='the file is cut off: it ends at byte 31; download it again'):
        list(entries(path))


def test_a_broken_record_does_not_make_the_reader_take_the_rest_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(json_stream, 'WINDOW', 64)
    monkeypatch.setattr(json_stream, 'LARGEST_RECORD', 256)
    path = tmp_path / 'a.json'
    path.write_text('[{"a": "no end }, ' + 10_000 * 'x')
    with path.open('rb') as file:
        window = json_stream._Window(path, file, None)
        window.peek()
        window.advance()
        with pytest.raises(DataError, match='broken JSON at byte 7: Unterminated string'):
            window.value()
        assert window.bytes_read < 1024


def test_reading_stops_at_a_limit(tmp_path):
    path = tmp_path / 'a.json'
    path.write_text(json.dumps([{'number': number} for number in range(1000)]))
    records = entries(path, most_bytes=1000)
    whole = path.read_text()[:1000].count('}')
    assert [next(records).value['number'] for _ in range(whole)] == list(range(whole))
    with pytest.raises(CutError):
        next(records)
    assert len(list(entries(path, most_bytes=10**6))) == 1000


def test_lines_are_numbered(tmp_path):
    path = tmp_path / 'a.jsonl'
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n  {"a": "\xc3\xa9"}\r\n{"a": 3}')
    assert [(entry.index, entry.value['a']) for entry in lines(path)] == [(1, 1), (3, '\u00e9'), (4, 3)]
    path.write_bytes(b'{"a": "\xc3\xa9"}\n{"a": "\xc3\xa9" 7}')
    # Two bytes each of the letter e with an accent, and the line break, are before the 7.
    with pytest.raises(DataError, match=r'a.jsonl, line 2: broken JSON at byte 23: '):
        list(lines(path))
    path.write_bytes(b'{"a": 1}\n{"a": "\xe9"}')
    with pytest.raises(DataError, match=r'a.jsonl, line 2: not UTF-8 at byte 16'):
        list(lines(path))


def test_an_error_names_the_record(tmp_path):
    path = tmp_path / 'a.json'
    path.write_text('{"k": [1, 2], "m": 3}')

    def refuse(number):
        def use(entry):
            if entry.value == number:
                raise DataError('no good')

        return use

    for number, place in ((2, r'k\[1\]'), (3, "member 'm'")):
        with pytest.raises(DataError, match=f'a.json, {place}: no good'):
            for_each(entries(path), path, refuse(number))


@pytest.mark.parametrize('read', [entries, lines])
def test_a_file_that_is_not_there(tmp_path, read):
    with pytest.raises(DataError, match='nothing: no such file or folder'):
        list(read(tmp_path / 'nothing'))
    with pytest.raises(DataError, match='a folder, expected a file'):
        list(read(tmp_path))
