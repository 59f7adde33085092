"""A folder as a data set: what is read, what is left out and why, and which split an image falls into."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from sparselora_jax.data import folder as module
from sparselora_jax.data import images
from sparselora_jax.data.folder import load, read_folder
from sparselora_jax.runtime.errors import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)


def line(image='a.png', prompt='what is it?', answer='a cat', **more):
    return json.dumps({'image': image, 'prompt': prompt, 'answer': answer, **more})


@pytest.fixture
def write(tmp_path):
    """`write(*lines)` makes the folder, with the image a.png in it."""
    folder = tmp_path / 'data'
    folder.mkdir()
    Image.fromarray(PIXELS).save(folder / 'a.png')

    def lines(*lines):
        joined = b'\n'.join(text.encode() if isinstance(text, str) else text for text in lines)
        (folder / 'data.jsonl').write_bytes(joined)
        return folder

    return lines


GOOD = [line(prompt=f'question {index}', split='train') for index in range(6)]


def test_records_are_random_access_to_images_and_texts(write):
    folder = read_folder(write(line(split='train'), line(prompt=' is it a cat? ', answer='yes', note=3, split='train')))
    source = folder.as_data_source('train')
    assert len(source) == 2
    assert folder.problems == ()
    assert folder.summary() == '2 examples'
    first, second = source[0], source[np.int64(1)]
    np.testing.assert_array_equal(first['image'], PIXELS)
    assert first['image'].dtype == np.uint8
    assert (first['question'], first['answer']) == ('what is it?', 'a cat')
    assert (second['question'], second['answer']) == ('is it a cat?', 'yes')
    train = load(write(*GOOD[:2], line(split='test'))).train
    assert train.read_texts() == [('question 0', 'a cat'), ('question 1', 'a cat')]
    assert train.read_image_names() == [f'a.png, {images.fingerprint(folder.path / "a.png")}'] * 2
    assert train.name_record(1) == f'{folder.path}/data.jsonl, line 2'


def test_the_example_of_the_docstring_is_read(write):
    lines = [text.strip() for text in module.__doc__.splitlines() if text.strip().startswith('{"image"')]
    path = write(*lines)
    (path / 'cats').mkdir()
    for name in ('1.png', '2.jpg'):
        Image.fromarray(PIXELS).save(path / 'cats' / name)
    folder = read_folder(path)
    assert folder.summary() == '3 examples'
    assert len(folder.as_data_source('test')) >= 1


def test_blank_lines_line_ends_and_a_byte_order_mark_are_no_problem(write):
    folder = read_folder(
        write(b'\xef\xbb\xbf' + line().encode() + b'\r', '', '  ', line(prompt='caf\u00e9 \u2028?'), '')
    )
    assert folder.problems == ()
    assert [record.line for record in folder.records] == [1, 4]
    assert folder.records[1].prompt == 'caf\u00e9 \u2028?'


@pytest.mark.parametrize(
    ('bad', 'reason'),
    [
        ('{"image": "a.png", ', 'not JSON .*char'),
        ('[' * 100_000, 'not JSON'),
        (b'{"image": "\xff"}', 'not UTF-8'),
        ('"a.png"', 'not a JSON object'),
        ('{"image": "a.png", "prompt": "what?"}', "no field 'answer'"),
        ('{"prompt": "what?", "answer": "a cat"}', "no field 'image'"),
        (line(prompt='  '), 'prompt is empty'),
        (line(answer=''), 'answer is empty'),
        (line(image=''), 'image is empty'),
        (line(answer=3), 'answer is 3, not a text'),
        (line(answer=['a', 'b']), r'answer is \["a", "b"\], not a text'),
        (line(prompt=None), 'prompt is null, not a text'),
        (line(answer='\ud800'), 'answer holds half of a surrogate pair'),
        (line(split='val'), "split is \"val\", neither 'train' nor 'test'"),
        (line(split=1), "split is 1, neither 'train' nor 'test'"),
        (line(prompt='question 3'), 'the same as line 4'),
        (line(image='cats/1.png'), 'image cats/1.png does not exist'),
        (line(image='text.png'), 'image text.png cannot be read: no image format that Pillow knows'),
        (line(image='empty.png'), 'image empty.png cannot be read'),
        (line(image='.'), 'image . cannot be read'),
        (line(image='a\0.png'), r"image 'a\\x00.png' cannot be read: embedded null byte"),
        (line(image='a' * 5000), r'image a{77}\.\.\. cannot be read: File name too long$'),
        (line(image='../outside.png'), r'image ../outside.png leads outside the folder'),
        (line(image='link.png'), 'image link.png leads outside the folder'),
        (line(image='{root}/outside.png'), 'image /.*leads outside the folder'),
    ],
)
def test_a_line_that_cannot_be_used_is_left_out_and_named(write, bad, reason):
    path = write()
    (path / 'text.png').write_text('no image')
    (path / 'empty.png').touch()
    Image.fromarray(PIXELS).save(path.parent / 'outside.png')
    os.symlink(path.parent / 'outside.png', path / 'link.png')
    bad = bad.replace('{root}', str(path.parent)) if isinstance(bad, str) else bad
    folder = read_folder(write(*GOOD, bad))
    assert len(folder.records) == 6
    assert [problem.line for problem in folder.problems] == [7]
    with pytest.raises(DataError, match='^' + reason):
        raise DataError(folder.problems[0].reason)
    assert folder.summary() == f'6 examples; 1 left out: line 7: {folder.problems[0].reason}'


def test_a_summary_counts_all_and_names_the_first(write, monkeypatch):
    bad = [line(answer='', prompt=str(index)) for index in range(4)]
    folder = read_folder(write(*GOOD, *bad))
    want = '6 examples; 4 left out: line 7: answer is empty; line 8: answer is empty; and 2 more'
    assert folder.summary().count('answer is empty') == 4
    assert 'more' not in folder.summary()
    monkeypatch.setattr(module, 'SHOWN_PROBLEMS', 2)
    assert folder.summary() == want
    assert read_folder(write(GOOD[0])).summary() == '1 example'
    assert read_folder(write(*(line(prompt=str(index)) for index in range(1204)))).summary() == '1,204 examples'


def test_too_many_bad_lines_are_an_error_that_names_them(write, monkeypatch):
    path = write(*GOOD[:2], *(line(answer='', prompt=str(index)) for index in range(3)))
    with pytest.raises(
        DataError, match='more than 50% of the lines cannot be used: 2 examples; 3 left out: line 3: answ'
    ):
        read_folder(path)
    monkeypatch.setattr(module, 'TOLERANCE', 0.7)
    assert len(read_folder(path).records) == 2


def test_nothing_to_use_is_an_error(write, tmp_path):
    with pytest.raises(DataError, match='absent: no such folder'):
        read_folder(tmp_path / 'absent')
    with pytest.raises(DataError, match=r'no data.jsonl in this folder'):
        read_folder(tmp_path)
    for lines in ((), ('', '')):
        with pytest.raises(DataError, match='no line that can be used: it is empty'):
            read_folder(write(*lines))
    with pytest.raises(DataError, match='no line that can be used: 0 examples; 1 left out: line 1: answer is empty'):
        read_folder(write(line(answer='')))


def test_an_image_that_breaks_off_is_named_when_it_is_read(write):
    path = write(line('cut.png', split='train'))
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path / 'whole.png')
    (path / 'cut.png').write_bytes((path / 'whole.png').read_bytes()[:5000])
    source = read_folder(path).as_data_source('train')
    with pytest.raises(DataError, match=r'data.jsonl, line 1: .*cut.png: not a readable image'):
        source[0]


def test_a_given_split_counts_and_the_others_follow_their_image(write, monkeypatch):
    path = write(*(line(f'{i}.png', f'question {j}') for i in range(200) for j in range(2)))
    for index in range(200):
        Image.new('L', (1, 1)).save(path / f'{index}.png')
    folder, again = read_folder(path), read_folder(path)
    assert folder == again
    train, test = ({record.image for record in folder.as_data_source(split).records} for split in ('train', 'test'))
    assert not train & test
    assert len(train | test) == 200
    assert 8 <= len(test) <= 35
    with monkeypatch.context() as patch:
        patch.setattr(module, 'TEST_SHARE', 0.5)
        more = read_folder(path)
    assert test < {record.image for record in more.as_data_source('test').records}
    moved = min(train)
    folder = read_folder(write(*(path / 'data.jsonl').read_text().splitlines(), line(moved, 'and now?', split='test')))
    assert [record.split for record in folder.records if record.image == moved] == ['test'] * 3


def test_a_split_of_no_example_is_an_error(write):
    with pytest.raises(DataError, match='no example of split \'test\'; mark some lines with "split": "test"'):
        read_folder(write(*GOOD)).as_data_source('test')


def test_images_of_any_kind_become_rgb_as_transformers_makes_them(write):
    from transformers.image_transforms import convert_to_rgb

    rgba = np.random.default_rng(1).integers(0, 256, (6, 9, 4), np.uint8)
    path = write(*(line(name, split='train') for name in ('rgba.png', 'grey.png', 'palette.gif', 'turned.jpg')))
    Image.fromarray(rgba).save(path / 'rgba.png')
    Image.fromarray(PIXELS[..., 0]).save(path / 'grey.png')
    Image.fromarray(PIXELS).convert('P').save(path / 'palette.gif')
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side
    Image.fromarray(PIXELS).save(path / 'turned.jpg', exif=exif)
    source = read_folder(path).as_data_source('train')
    for index, name in enumerate(('rgba.png', 'grey.png', 'palette.gif')):
        want = convert_to_rgb(Image.open(path / name), return_numpy=True)
        np.testing.assert_array_equal(source[index]['image'], want)
    assert source[3]['image'].shape == (9, 6, 3)


def test_texts_that_a_model_cannot_take_are_left_out_and_named(write):
    path = write(*GOOD, line(prompt='far too long'))
    found = read_folder(path, misfit=lambda prompt, answer: 'prompt of 9 tokens' if 'long' in prompt else '')
    assert found.summary() == '6 examples; 1 left out: line 7: prompt of 9 tokens'
