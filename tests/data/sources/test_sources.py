"""Every layout of data: its records in order, with their own images; what is missing or broken is named."""

import contextlib
import fcntl
import gzip
import json
import os
import pickle
import re
import tarfile

import miniature_sources as miniature
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from miniature_benchmarks import image, write
from miniature_sources import LAYOUTS, add_member
from PIL import Image
from small_disk import files_of_at_most

from sparselora_jax.data.images import read_image
from sparselora_jax.data.loaders import is_path
from sparselora_jax.data.sources.catalog import open_source
from sparselora_jax.data.sources.pictures import StoredImage, needed_tolerance
from sparselora_jax.data.sources.place import SourceName, absolute_names, split_names
from sparselora_jax.data.sources.source import SOURCES, OpenedSource, SourceFormat
from sparselora_jax.runtime.errors import DataError


def opened(name, **options):
    (source_name,) = split_names(str(name))
    return open_source(source_name, **options)


@pytest.mark.parametrize('layout', LAYOUTS)
def test_records_are_those_of_the_layout_in_its_order(layout, tmp_path):
    name, expected = LAYOUTS[layout](tmp_path / 'data')
    source = opened(name)
    assert isinstance(source, OpenedSource)
    assert len(source) == len(expected)
    assert source.notes == ()
    for index, want in enumerate(expected):
        record = source[index]
        assert (record.question, record.answer) == (want.question, want.answer)
        assert source.name_record(index).startswith(str(tmp_path))
        if want.image is None:
            assert record.image is None
            assert source.image_name(index) == ''
            continue
        assert isinstance(record.image, StoredImage)
        record.image.check()
        np.testing.assert_array_equal(record.image.read(), want.pixels)
        assert source.image_name(index)


@pytest.mark.parametrize('layout', LAYOUTS)
def test_records_of_one_image_share_its_name_and_others_do_not(layout, tmp_path):
    name, expected = LAYOUTS[layout](tmp_path / 'data')
    source = opened(name)
    with_image = [index for index, want in enumerate(expected) if want.image is not None]
    images = {expected[index].image for index in with_image}
    # The miniature of files has the same picture in no two folders.
    assert len({source.image_name(index) for index in with_image}) == len(images)
    prints = {source.image_name(index): source[index].image.fingerprint() for index in with_image}
    assert len(set(prints.values())) == len(images)


def test_every_format_fits_the_protocol():
    assert all(isinstance(SOURCES.find(name), SourceFormat) for name in SOURCES)


def test_names_are_split_and_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert split_names('a, b::c') == [SourceName('a'), SourceName('b', 'c')]
    for text in ('a,,b', 'a,', '::c'):
        with pytest.raises(DataError, match='on each side of a comma'):
            split_names(text)
    assert absolute_names('a,b::c') == f'{tmp_path}/a,{tmp_path}/b::{tmp_path}/c'
    (tmp_path / 'a,b').mkdir()
    assert split_names('a,b') == [SourceName('a,b')]
    assert absolute_names('a,b') == f'{tmp_path}/a,b'


@pytest.mark.parametrize('folder', ['a,b', 'a::b', 'a:b', 'a b', 'a,b::c, d'])
def test_paths_with_any_characters_are_among_several_sources(folder, tmp_path, monkeypatch):
    (tmp_path / folder / 'x').mkdir(parents=True)
    (tmp_path / 'y').mkdir()
    for root in ('', f'{tmp_path}/'):
        monkeypatch.chdir(tmp_path)
        x = f'{root}{folder}/x'
        assert split_names(f'{x},{root}y') == [SourceName(x), SourceName(f'{root}y')]
        assert split_names(f'{root}y, {x}::{root}y') == [SourceName(f'{root}y'), SourceName(x, f'{root}y')]
        assert is_path(f'{x},{root}y')
        # The folder of a run may have such a name too.
        monkeypatch.chdir(tmp_path / folder)
        absolute = absolute_names('x,nothing')
        assert split_names(absolute)[0] == SourceName(f'{tmp_path}/{folder}/x')


def test_names_of_sources_may_be_longer_together_than_the_name_of_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [f'part_{number:03d}.tar' for number in range(40)]
    assert [name.path for name in split_names(','.join(names))] == names
    with pytest.raises(DataError, match='File name too long'):
        opened('a' * 300)


# Tar files.


def test_the_index_of_a_tar_file_is_kept_until_the_file_changes(tmp_path, monkeypatch):
    name, expected = miniature.tar_shards(tmp_path / 'data')
    first = opened(name, index_dir=tmp_path / 'kept')
    assert not (tmp_path / 'kept').exists()
    first.keep_index()
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, 'open', lambda *args: pytest.fail('the headers were read again'))
        again = opened(name, index_dir=tmp_path / 'kept')
    assert [again[index].answer for index in range(len(again))] == [want.answer for want in expected]
    assert [again.image_name(index) for index in range(9)] == [first.image_name(index) for index in range(9)]
    miniature.tar_shards(tmp_path / 'data', (6, 4))
    assert len(opened(name, index_dir=tmp_path / 'kept')) == 10
    # A damaged index is written again.
    for file in (tmp_path / 'kept' / 'tar_index').glob('*.npz'):
        file.write_bytes(b'nothing')
    assert len(opened(name, index_dir=tmp_path / 'kept')) == 10
    # A folder that cannot be written to is no error.
    opened(name, index_dir=tmp_path / 'data' / '00000.tar').keep_index()


@pytest.mark.parametrize('problem', ['disk full', 'locked', 'a file'])
def test_an_index_that_cannot_be_kept_costs_only_time(problem, tmp_path):
    source = opened(miniature.tar_shards(tmp_path / 'data')[0], index_dir=tmp_path / 'kept')
    index_dir = tmp_path / 'kept' / 'tar_index'
    if problem == 'a file':
        write(index_dir, b'')
    else:
        index_dir.mkdir(parents=True)
    with files_of_at_most(100) if problem == 'disk full' else contextlib.nullcontext():
        if problem == 'locked':
            with (index_dir / 'lock').open('w') as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                source.keep_index()
        else:
            source.keep_index()
    assert not list(tmp_path.glob('kept/*/*.npz'))
    assert source[0].answer


def test_records_can_be_sent_to_another_process(tmp_path):
    name, expected = miniature.tar_shards(tmp_path / 'data')
    source = opened(name)
    source[0].image.read()
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy[7].image.read(), expected[7].pixels)


@pytest.mark.parametrize('size', [100, 1000, 3000, 5200])
def test_a_tar_file_that_is_cut_off_is_refused(size, tmp_path):
    name, _ = miniature.tar_shards(tmp_path / 'data')
    os.truncate(tmp_path / 'data' / '00001.tar', size)
    with pytest.raises(DataError, match=r'00001\.tar: not a tar file, or cut off.*; download it again'):
        opened(name)


def test_a_tar_file_that_is_cut_off_after_it_was_indexed_is_named(tmp_path):
    name, _ = miniature.tar_shards(tmp_path / 'data')
    source = opened(name)
    os.truncate(tmp_path / 'data' / '00001.tar', 700)
    with pytest.raises(DataError, match=r'00001\.tar: the file ends before byte'):
        source[8].image.read()


def tar(path, members):
    with tarfile.open(path, 'w') as archive:
        for member, data in members:
            add_member(archive, member, data)
    return path


def test_samples_without_image_or_caption_are_counted(tmp_path):
    members = [('a.jpg', image(0)), ('a.txt', b'a'), ('b.jpg', image(1)), ('c.txt', b'c'), ('__index__', b'')]
    source = opened(tar(tmp_path / '0.tar', members))
    assert len(source) == 1
    assert source.notes == ('2 samples without image or caption are left out, such as b of 0.tar, c of 0.tar',)


def test_files_that_a_mac_adds_to_an_archive_are_no_samples(tmp_path):
    members = [('./._a.jpg', b'\0\x05\xff'), ('./a.jpg', image(0)), ('./._a.txt', b'\0\x05\xff'), ('./a.txt', b'a cat')]
    source = opened(tar(tmp_path / '0.tar', members))
    assert [source[index].answer for index in range(len(source))] == ['a cat']
    assert source.notes == ()


def test_a_caption_may_be_in_json_alone(tmp_path):
    source = opened(tar(tmp_path / '0.tar', [('a.png', image(0, '.png')), ('a.json', b'{"caption": "a cat"}')]))
    assert source[0].answer == 'a cat'


@pytest.mark.parametrize(
    ('members', 'message'),
    [
        ([('a.jpg', b''), ('a.jpg', b''), ('a.txt', b'')], r'two members a\.jpg'),
        ([('a.jpg', b'')], 'no sample with an image and a caption'),
        ([], 'no sample with an image and a caption'),
    ],
)
def test_tar_files_with_other_members_are_refused(members, message, tmp_path):
    with pytest.raises(DataError, match=message):
        opened(tar(tmp_path / '0.tar', members))


@pytest.mark.parametrize(
    ('name', 'data', 'message'),
    [
        ('a.txt', b'\xff', r'sample a: no caption in its \.txt'),
        ('a.json', b'{"caption": 3}', r'sample a: no caption in its \.json \(caption is 3'),
        ('a.json', b'{', r'sample a: no caption in its \.json'),
    ],
)
def test_a_broken_caption_is_named(name, data, message, tmp_path):
    source = opened(tar(tmp_path / '0.tar', [('a.jpg', image(0)), (name, data)]))
    with pytest.raises(DataError, match=message):
        source[0]


@pytest.mark.parametrize('data', [b'', b'no image', image(0)[:40]])
def test_an_image_that_cannot_be_opened_is_named(data, tmp_path):
    source = opened(tar(tmp_path / '0.tar', [('a.jpg', data), ('a.txt', b'a cat')]))
    with pytest.raises(DataError, match=r'0\.tar, image a: not a readable image'):
        source[0].image.check()


# Annotations.


@pytest.mark.parametrize('layout', ['coco_annotations', 'lavis_coco', 'llava_mix', 'table_of_addresses'])
def test_missing_images_are_counted_and_left_out_if_asked(layout, tmp_path):
    name, expected = LAYOUTS[layout](tmp_path / 'data')
    # The first of the images that the records name.
    gone = next(path for path in sorted((tmp_path / 'data').rglob('*.jpg')) if path.read_bytes() == expected[0].image)
    gone.unlink()
    with pytest.raises(DataError, match=r'1 of \d images are missing under .*mixture\.tolerance=0\.\d+') as error:
        opened(name)
    needed = float(str(error.value).rpartition('=')[2])
    source = opened(name, tolerance=needed)
    left = [want for want in expected if want.image != expected[0].image]
    assert [source[index].answer for index in range(len(source))] == [want.answer for want in left]
    assert 'images are missing' in source.notes[0]


@pytest.mark.parametrize(('count', 'total', 'share'), [(1, 3, 0.334), (1, 1000, 0.001), (99_999, 100_000, 0.99999)])
def test_the_tolerance_that_a_message_names_is_enough_and_legal(count, total, share):
    assert needed_tolerance(count, total) == f'leave them out by mixture.tolerance={share}'
    assert count / total <= share < 1
    assert needed_tolerance(total, total) == 'none is left'


def test_if_all_images_are_missing_their_folder_is_asked_for(tmp_path):
    path = write(tmp_path / 'a' / 'b' / 'captions.json', [{'image': 'x/1.jpg', 'caption': 'a cat'}])
    with pytest.raises(DataError, match=r'1 of 1 images are missing .*name their folder: .*captions\.json::FOLDER'):
        opened(path)
    with pytest.raises(DataError, match='no such folder; name the folder of the images after ::'):
        opened(f'{path}::{tmp_path}/absent')
    # Images of other layouts lie where the records are.
    with pytest.raises(DataError, match='no data of a layout that is known'):
        opened(f'{miniature.user_folder(tmp_path / "c")[0]}::{tmp_path}')


def test_a_folder_with_several_files_for_training_is_refused(tmp_path):
    name, _ = miniature.coco_train(tmp_path)
    miniature.karpathy_coco(tmp_path)
    with pytest.raises(DataError, match=r'2 files could be meant: .*captions_train2014\.json, .*; name one of them'):
        opened(name)


def test_a_file_for_validation_is_read_only_if_it_is_named(tmp_path):
    expected = miniature.benchmarks.coco_captions(tmp_path, 'val2014')
    with pytest.raises(DataError, match=r'no file for training, only .*captions_val2014\.json'):
        opened(tmp_path)
    source = opened(tmp_path / 'annotations' / 'captions_val2014.json')
    assert source[0].answer == expected[0].references[0]


ROW = {'id': 'a', 'image': 'a.jpg', 'conversations': miniature.conversation('hello', 'yes')}


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ([ROW, {'id': 'b'}], r"element \[1\]: no field 'conversations'"),
        ([ROW, {**ROW, 'conversations': 'hello'}], r"element \[1\]: conversations is 'hello', not a list"),
        ([ROW, {**ROW, 'conversations': [{'from': 'bot', 'value': 'a'}]}], r"element \[1\]: from is 'bot', expected"),
        ([ROW, {**ROW, 'conversations': [{'from': 'gpt', 'value': 3}]}], r'element \[1\]: value is 3, not a text'),
        ([ROW, {**ROW, 'image': 3}], r'element \[1\]: image is 3, not a text'),
        ([{'id': 'a', 'conversations': []}], "no turn of 'human' with an answer of 'gpt'"),
        ([{'image': 'a.jpg', 'caption': 'a'}, {'image': 'a.jpg'}], r"element \[1\]: no field 'caption'"),
        ([{'image': 'a.jpg', 'caption': 'a'}, {'image': 'a.jpg', 'caption': [3]}], 'caption holds 3'),
        ([{'id': 1, 'regions': [{'phrase': 'a'}]}, {'id': 1, 'regions': []}], r'element \[1\]: the id 1 occurs twice'),
        ({'questions': []}, 'no data of a layout that is known: .*LAVIS'),
        ([{'image': 'a.jpg'}], 'no data of a layout that is known'),
    ],
)
def test_broken_records_are_named(content, message, tmp_path):
    write(tmp_path / 'a.jpg', image(0))
    path = tmp_path / 'a.json'
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        opened(path)


def test_broken_json_is_named_with_the_byte(tmp_path):
    write(tmp_path / 'a.jpg', image(0))
    path = tmp_path / 'a.json'
    path.write_text(json.dumps([ROW, ROW])[:-20])
    with pytest.raises(DataError, match=r'a\.json: the file is cut off: it ends at byte \d+; download it again'):
        opened(path)
    path.write_text(json.dumps([ROW, ROW]).replace('}, {"id"', '} {"id"'))
    with pytest.raises(DataError, match=r"a\.json: broken JSON at byte \d+: expected ',' or '\]'"):
        opened(path)


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (b'caption\turl\n', r'the columns are caption, url; expected'),
        (b'', 'the columns are none'),
        (b'a cat\thttp://a/b\nonly one\n', r'line 2: 1 columns, and 2 in the first line'),
        (b'a cat\thttp://a/b\n\xff\thttp://a/b\n', 'line 2: not UTF-8'),
        (b'1.jpg#0\ta cat\n1.jpg\ta dog\n', "line 2: '1.jpg' is not the name of an image and the number"),
        (b'caption\tpath\n', 'no row'),
    ],
)
def test_broken_tables_are_named(content, message, tmp_path):
    with pytest.raises(DataError, match=message):
        opened(write(tmp_path / 'a.tsv', content))


@pytest.mark.parametrize('start', [b'', b'\n', b'\xef\xbb\xbf', b'\xef\xbb\xbf\r\n \n'])
def test_a_head_is_the_first_line_that_is_not_blank(start, tmp_path):
    write(tmp_path / '0.jpg', image(0))
    source = opened(write(tmp_path / 'a.tsv', start + b'image\tcaption\n\n0.jpg\ta cat\n'))
    assert [source[index].answer for index in range(len(source))] == ['a cat']


def test_a_compressed_table_that_is_cut_off_is_named(tmp_path):
    miniature.table_with_head(tmp_path)
    path = tmp_path / 'downloaded_cc3m_report.tsv.gz'
    os.truncate(path, path.stat().st_size - 20)
    with pytest.raises(DataError, match='damaged or cut off'):
        opened(path)


def test_images_without_a_text_are_counted(tmp_path):
    name, expected = miniature.image_text_files(tmp_path)
    (tmp_path / '00000' / '000000001.txt').unlink()
    source = opened(name)
    assert len(source) == len(expected) - 1
    assert source.notes == ('1 images without a .txt are left out, such as 00000/000000001.png',)


def test_texts_are_cut_at_spaces_and_lose_nothing(tmp_path):
    words = [f'word{number}' for number in range(200)]
    source = opened(write(tmp_path / 'a.txt', ' '.join(words).encode()))
    parts = [source[index].answer for index in range(len(source))]
    assert ' '.join(parts).split() == words
    assert max(map(len, parts)) <= 200
    assert source.name_record(1) == f'{tmp_path}/a.txt, part 2'
    with pytest.raises(DataError, match='not UTF-8 at byte 3'):
        opened(write(tmp_path / 'b.txt', b'abc\xff'))
    with pytest.raises(DataError, match='no text of 2 characters'):
        opened(write(tmp_path / 'c.txt', b' \n'))


def test_long_words_are_cut_too(tmp_path):
    # Chinese and Japanese have no spaces.
    text = '\u4e2d\u6587' * 500
    source = opened(write(tmp_path / 'a.txt', f'a b {text} cd'.encode()))
    parts = [source[index].answer for index in range(len(source))]
    assert max(map(len, parts)) <= 200
    assert ''.join(parts).replace(' ', '') == f'ab{text}cd'


@pytest.mark.parametrize('name', ['0.tar.gz', '0.tgz', '0.tar.zst', '0.tar'])
def test_compressed_tar_files_are_named_with_what_to_do(name, tmp_path):
    write(tmp_path / name, gzip.compress(tar(tmp_path / 'whole', [('a.jpg', image(0))]).read_bytes()))
    for place in (tmp_path, tmp_path / name):
        with pytest.raises(DataError, match=rf'{re.escape(name)}: .*unpack it'):
            opened(place)


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('absent', 'no such file or folder'),
        ('a\0b', 'no such file or folder'),
        ('a' * 300, 'not a path'),
        ('.', 'no data of a layout that is known'),
    ],
)
def test_what_is_not_there_is_named(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        open_source(SourceName(name))


def test_prepared_data_sets_with_other_fields_or_files_are_refused(tmp_path):
    name, _ = miniature.tfds_captions(tmp_path / 'one')
    miniature.tfds_questions(tmp_path / 'one')
    with pytest.raises(DataError, match=r'2 data sets could be meant: .*; name one of them'):
        opened(name)
    features = {'image': miniature.tfds.features.Image(encoding_format='jpeg'), 'label': np.int64}
    rows = [{'image': image(0), 'label': 3}]
    other = miniature._prepare(tmp_path / 'two', 'LabelLike', features, {'train': rows})
    with pytest.raises(DataError, match='the fields are image, label; expected image, and captions or a question'):
        opened(other)
    features = {'image': features['image'], 'caption': miniature.tfds.features.Text()}
    rows = [{'image': image(0), 'caption': 'a'}]
    other = miniature._prepare(tmp_path / 'three', 'NoTrain', features, {'val': rows})
    with pytest.raises(DataError, match='the splits are val; expected train'):
        opened(other)


@pytest.mark.parametrize(
    ('question', 'captions', 'message'),
    [([], 'a', 'train 0: question is empty'), (None, {'raw': ['a']}, 'train 0: captions has the fields raw; expected')],
)
def test_texts_of_prepared_data_sets_that_are_not_there_are_named(question, captions, message, tmp_path):
    texts = miniature.tfds.features.Sequence(miniature.tfds.features.Text())
    features = {'image': miniature.tfds.features.Image(encoding_format='jpeg')}
    if question is None:
        features['captions'] = miniature.tfds.features.Sequence({'raw': miniature.tfds.features.Text()})
        row = {'image': image(0), 'captions': captions}
    else:
        features |= {'question': texts, 'answer': miniature.tfds.features.Text()}
        row = {'image': image(0), 'question': question, 'answer': captions}
    source = opened(miniature._prepare(tmp_path, 'TextsLike', features, {'train': [row]}))
    with pytest.raises(DataError, match=message):
        source[0]


def test_images_of_a_users_folder_are_read_as_if_it_were_the_only_source(tmp_path):
    levels = np.random.default_rng(0).integers(0, 2**16, (5, 6), np.uint16)
    Image.fromarray(levels).save(tmp_path / '0.png')
    Image.fromarray(levels.view(np.uint8).reshape(5, 3, 4)).save(tmp_path / '1.png')
    lines = [{'image': f'{number}.png', 'prompt': 'what?', 'answer': 'a cat'} for number in range(2)]
    write(tmp_path / 'data.jsonl', lines)
    source = opened(tmp_path)
    for number in range(2):
        np.testing.assert_array_equal(source[number].image.read(), read_image(tmp_path / f'{number}.png'))


# Parquet files.


def parquet(path, rows, **columns):
    """Write one file, with rows whose images are structs of bytes and path."""
    (written,) = miniature.benchmarks.table(path.parent, 'x', [row | columns for row in rows], shards=1)
    return written.rename(path)


PAIR = {'image': {'bytes': image(0), 'path': 'a.jpg'}, 'caption': 'a cat'}


@pytest.mark.parametrize('order', ['backwards', 'shuffled'])
def test_images_of_parquet_files_are_read_in_any_order(order, tmp_path):
    name, expected = miniature.parquet_cc3m(tmp_path)
    # Records are sent to the processes that load data.
    source = pickle.loads(pickle.dumps(opened(name)))
    indices = np.arange(len(expected))[::-1]
    if order == 'shuffled':
        indices = np.random.default_rng(0).permutation(len(expected))
    for index in map(int, indices):
        np.testing.assert_array_equal(source[index].image.read(), expected[index].pixels)


def test_images_of_parquet_files_have_the_names_that_other_data_sets_give_them(tmp_path):
    source = opened(miniature.parquet_coco(tmp_path / 'coco')[0])
    assert source.image_name(3) == 'COCO_train2014_000000000001.jpg'
    rows = [PAIR | {'image': {'bytes': image(number), 'path': None}, 'cocoid': number} for number in range(2)]
    assert opened(parquet(tmp_path / 'a.parquet', rows)).image_name(1) == '000000000001.jpg'
    # One path for all images names none.
    source = opened(parquet(tmp_path / 'b.parquet', [PAIR, PAIR]))
    assert source.image_name(0) != source.image_name(1)


def test_a_changed_parquet_file_has_other_fingerprints(tmp_path):
    path = parquet(tmp_path / 'a.parquet', [PAIR])
    before = opened(path)[0].image.fingerprint()
    assert opened(path)[0].image.fingerprint() == before
    parquet(path, [PAIR | {'image': {'bytes': image(5), 'path': 'a.jpg'}}])
    assert opened(path)[0].image.fingerprint() != before


def test_rows_of_parquet_files_without_image_are_counted(tmp_path):
    source = opened(parquet(tmp_path / 'a.parquet', [PAIR, PAIR | {'image': None, 'caption': 'a dog'}, PAIR]))
    assert [source[index].answer for index in range(len(source))] == ['a cat', 'a cat']
    assert source.notes == ('1 rows without an image are left out',)


def test_answers_of_one_prompt_are_captions(tmp_path):
    columns = dict.fromkeys(('question_id', 'id', 'file_name', 'coco_url'), 'a.jpg')
    row = {'image': PAIR['image'], 'question': 'Describe the image.', 'answer': ['a cat', 'a pet']}
    source = opened(parquet(tmp_path / 'a.parquet', [row], **columns))
    assert [(source[index].question, source[index].answer) for index in range(2)] == [(None, 'a cat'), (None, 'a pet')]


@pytest.mark.parametrize(
    ('rows', 'message'),
    [
        ([{'image': PAIR['image'], 'label': 3}], 'the columns are image, label; expected image with bytes, and'),
        ([{'url': 'http://a/b', 'caption': 'a cat'}], 'the columns are url, caption; expected image with bytes, and'),
        ([PAIR, PAIR | {'caption': None}, PAIR | {'image': None}], None),
        ([PAIR | {'image': None}], 'no row with an image and a text, for training'),
        ([PAIR | {'split': 'test'}], 'no row with an image and a text, for training'),
        ([PAIR | {'caption': 3}], r'row 0: caption holds 3, which is not a text'),
        ([{'image': PAIR['image'], 'conversations': [{'from': 'bot', 'value': 'a'}]}], "row 0: from is 'bot', expect"),
        ([{'image': PAIR['image'], 'conversations': 'a'}], "row 0: conversations is 'a', not a list"),
        ([{'image': PAIR['image'], 'question': None, 'answer': 'a'}], 'row 0: question is '),
    ],
)
def test_parquet_files_with_other_columns_or_rows_are_named(rows, message, tmp_path):
    path = parquet(tmp_path / 'a.parquet', rows)
    if message is None:
        assert len(opened(path)) == 1
        return
    with pytest.raises(DataError, match=rf'^{re.escape(str(path))}.*{message}') as error:
        opened(path)
    assert len(str(error.value).splitlines()) == 1
    with pytest.raises(DataError, match=message):
        opened(tmp_path)


def test_damaged_parquet_files_are_named(tmp_path):
    path = write(tmp_path / 'a.parquet', b'PAR1')
    for name in (path, tmp_path):
        with pytest.raises(DataError, match=r'a\.parquet: not a parquet file, or damaged; download it again'):
            opened(name)
    parquet(path, [PAIR | {'image': {'bytes': b'no image', 'path': None}}])
    with pytest.raises(DataError, match=r'a\.parquet, row group 0, row 0: not a readable image'):
        opened(path)[0].image.check()


def test_parquet_files_of_which_a_shard_is_missing_are_refused(tmp_path):
    name, _ = miniature.parquet_cc3m(tmp_path)
    (tmp_path / 'data' / 'train-00001-of-00003.parquet').unlink()
    with pytest.raises(DataError, match='train: 1 of 3 files are missing, such as number 1; download them'):
        opened(name)


@pytest.mark.parametrize(
    ('row', 'message'),
    [
        ({'image': PAIR['image'], 'label': 3}, 'no column caption; its columns are image, label'),
        ({'caption': 'a cat'}, 'no column image; its columns are caption'),
    ],
)
def test_shards_with_other_columns_are_named(row, message, tmp_path):
    parquet(tmp_path / 'a.parquet', [PAIR])
    parquet(tmp_path / 'b.parquet', [row])
    with pytest.raises(DataError, match=rf'b\.parquet: {message}'):
        opened(tmp_path)


def test_a_shard_with_names_in_place_of_images_is_named(tmp_path):
    parquet(tmp_path / 'a.parquet', [PAIR])
    pq.write_table(pa.table({'image': ['1.jpg'], 'caption': ['a cat']}), tmp_path / 'b.parquet')
    with pytest.raises(DataError, match=r"b\.parquet: the column 'image' holds string, expected the bytes of images"):
        opened(tmp_path)


def test_parquet_files_for_training_are_chosen_or_asked_for(tmp_path):
    parquet(tmp_path / 'validation.parquet', [PAIR])
    with pytest.raises(DataError, match=r'no files for training, only .*validation\*; name a file if it is meant'):
        opened(tmp_path)
    assert len(opened(tmp_path / 'validation.parquet')) == 1
    parquet(tmp_path / 'train.parquet', [PAIR, PAIR])
    assert len(opened(tmp_path)) == 2
    (tmp_path / 'more').mkdir()
    parquet(tmp_path / 'more' / 'train.parquet', [PAIR])
    with pytest.raises(DataError, match=r'2 sets of files could be meant: .*; name one of their folders'):
        opened(tmp_path)
    assert len(opened(tmp_path / 'more')) == 1


def test_prepared_data_sets_in_files_of_tensorflow_are_refused(tmp_path):
    name, _ = miniature.tfds_questions(tmp_path)
    (file,) = tmp_path.rglob('dataset_info.json')
    file.write_text(file.read_text().replace('array_record', 'tfrecord'))
    message = r"cannot be read without TensorFlow .*; prepare it with file_format='array_record'"
    with pytest.raises(DataError, match=message):
        opened(name)
