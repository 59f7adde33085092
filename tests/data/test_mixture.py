"""Data drawn from several sources: which records, how often, in which order, and what is left out."""

import collections
import dataclasses
import os
import tarfile
from pathlib import Path

import miniature_sources as miniature
import numpy as np
import pytest
from miniature_benchmarks import image, write
from PIL import Image

from sparselora_jax.data import pipeline
from sparselora_jax.data.augment import crop_and_flip
from sparselora_jax.data.caption_forms import INSTRUCTIONS, clean_caption
from sparselora_jax.data.checked import load_dataset
from sparselora_jax.data.dataset import DataRequest, Mixture
from sparselora_jax.data.mixture import MixtureLoader, apportion, is_test_image
from sparselora_jax.runtime.errors import DataError


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Two sources of captions with 60 and 40 images, and one of 30 texts."""
    root = tmp_path_factory.mktemp('data')
    miniature.tar_shards(root / 'cc3m', (30, 30))
    rows = [{'image': f'{number}.jpg', 'caption': f'region {number}'} for number in range(40)]
    for row in rows:
        write(root / 'vg' / row['image'], image(int(row['image'][:-4])))
    write(root / 'vg' / 'vg_caption.json', rows)
    write(root / 'texts' / 'a.txt', '\n\n'.join(f'paragraph {number}' for number in range(30)).encode())
    return root


def load(data, names, tmp_path=None, seed=3, misfit=lambda question, answer: '', **mixture):
    names = ','.join(str(data / name) for name in names)
    request = DataRequest(names, Path(tmp_path or data / 'kept'), misfit, Mixture(**mixture), seed)
    return load_dataset(MixtureLoader(), request)


def sources_of(split):
    return collections.Counter(
        Path(split.name_record(index).partition(',')[0]).parent.name for index in range(len(split.source))
    )


def test_all_records_but_those_for_tests_are_drawn_without_a_number(data):
    dataset = load(data, ['cc3m', 'vg', 'texts'])
    train, test = sources_of(dataset.train), sources_of(dataset.test)
    assert train['cc3m'] + test['cc3m'] == 60
    assert train['vg'] + test['vg'] == 40
    assert train['texts'] == 30
    # A text has no image to ask about.
    assert test['texts'] == 0
    assert test['cc3m'] > 0
    assert not set(dataset.train.read_image_names()) & set(dataset.test.read_image_names())


@pytest.mark.parametrize(('weights', 'counts'), [((), (8, 8, 8)), ((2, 1, 1), (12, 6, 6)), ((2.5, 1, 0.5), (15, 6, 3))])
def test_a_number_of_records_is_drawn_evenly_or_by_weights(weights, counts, data):
    train = load(data, ['cc3m', 'vg', 'texts'], samples=24, weights=weights).train
    assert tuple(sources_of(train).values()) == counts
    places = [train.name_record(index) for index in range(24)]
    assert len(set(places)) == 24


def test_a_source_with_too_few_records_is_told(data, capsys):
    train = load(data, ['cc3m', 'vg'], samples=60, weights=(1, 9)).train
    (line,) = [line for line in capsys.readouterr().err.splitlines() if 'fewer' in line]
    drawn = sources_of(train)['vg']
    assert line == f'{data / "vg"}: {drawn} training records, fewer than the 54 of its share: it has no more'
    load(data, ['cc3m', 'vg'], samples=30)
    assert 'fewer' not in capsys.readouterr().err


def test_what_is_drawn_is_a_function_of_the_seed(data):
    texts = load(data, ['cc3m', 'vg'], samples=20).train.read_texts()
    assert load(data, ['cc3m', 'vg'], samples=20).train.read_texts() == texts
    other = load(data, ['cc3m', 'vg'], samples=20, seed=4).train
    assert other.read_texts() != texts
    # The test images stay the same, since hashes of names choose them.
    assert load(data, ['cc3m'], seed=4).test.read_image_names() == load(data, ['cc3m']).test.read_image_names()


def test_shares_add_up():
    for count in range(50):
        shares = apportion(count, (3, 0.1, 1))
        assert sum(shares) == count
        assert all(abs(share - count * weight / 4.1) < 1 for share, weight in zip(shares, (3, 0.1, 1), strict=True))


@pytest.mark.parametrize('weights', [(1e308, 1e308, 1e308), (5e-324, 5e-324, 5e-324), (10**400, 10**400, 10**400)])
def test_shares_of_extreme_weights_add_up(weights):
    assert apportion(10, weights) == [4, 3, 3]


def test_a_record_has_its_image_and_a_caption_that_is_cut(data):
    train = load(data, ['cc3m'], samples=10).train
    for index in range(10):
        record = train.source[index]
        key = train.name_record(index).rpartition(' ')[2]
        number = 100 * int(key[:5]) + int(key[5:])
        want = clean_caption(miniature.caption_of(number))
        assert record['question'] + record['answer'] == want
        assert (record['question'], record['answer']) == train.read_texts()[index]
        np.testing.assert_array_equal(record['image'], miniature.Expected(image(number), '').pixels)


def test_captions_are_asked_for_by_instructions_and_left_as_they_are_if_asked(data):
    train = load(data, ['cc3m', 'texts'], samples=20, captions='instruct', is_clean=False).train
    for place, (question, answer) in enumerate(train.read_texts()):
        record = train.source[place]
        if record['image'] is None:
            assert (question + answer).startswith('paragraph')
        else:
            assert question in INSTRUCTIONS
            assert answer.endswith(', \u00e9t\u00e9')


def test_the_first_records_are_those_of_the_first_file(data):
    train = load(data, ['cc3m', 'vg'], samples=7, is_from_start=True).train
    assert [train.name_record(index).rpartition(' ')[2] for index in range(7)] == [f'00000{n:04d}' for n in range(7)]
    train = load(data, ['texts', 'vg'], samples=40, is_from_start=True).train
    assert tuple(sources_of(train).values()) == (30, 10)


def test_records_that_do_not_fit_are_left_out_and_counted(data, capsys):
    def misfit(question, answer):
        return 'it is even' if answer[-1] in '02468' else ''

    train = load(data, ['vg'], samples=15, misfit=misfit).train
    assert {answer[-1] for _, answer in train.read_texts()} <= set('13579')
    assert len(train.source) == 15
    err = capsys.readouterr().err
    assert 'fewer than' not in err
    assert 'records left out: ' in err
    assert 'text.prompt_tokens and text.answer_tokens say how many tokens fit' in err
    message = r'no record can be used for training: .*vg_caption\.json.*: never; text\.prompt_tokens and text\.answer'
    with pytest.raises(DataError, match=message):
        load(data, ['vg'], samples=15, misfit=lambda question, answer: 'never')


def test_a_source_that_has_fewer_records_than_are_asked_for_is_told(data, capsys):
    train = load(data, ['vg'], samples=25_000).train
    err = capsys.readouterr().err
    assert f'{len(train.source):,} training records, fewer than the 25,000 of its share: it has no more' in err
    train = load(data, ['vg'], samples=25_000, is_from_start=True).train
    assert f'25,000 records are asked for, and {len(train.source):,} can be drawn' in capsys.readouterr().err


def test_images_that_cannot_be_read_are_refused_or_left_out(tmp_path, capsys):
    root = tmp_path / 'data'
    with tarfile.open(root.with_suffix('.tar'), 'w') as archive:
        for number in range(20):
            miniature.add_member(archive, f'{number:02d}.jpg', b'broken' if number == 7 else image(number))
            miniature.add_member(archive, f'{number:02d}.txt', b'a caption')
    with pytest.raises(DataError, match=r'1 of \d+ images cannot be read: .*image 07: not a readable image') as error:
        load(tmp_path, ['data.tar'], tmp_path)
    needed = float(str(error.value).rpartition('=')[2])
    dataset = load(tmp_path, ['data.tar'], tmp_path, tolerance=needed)
    assert len(dataset.train.source) + len(dataset.test.source) == 19
    assert '1 left out: ' in capsys.readouterr().err


def test_a_summary_of_what_is_left_out_stays_short(tmp_path):
    with tarfile.open(tmp_path / 'a.tar', 'w') as archive:
        for number in range(40):
            miniature.add_member(archive, f'{number:02d}.jpg', b'broken')
            miniature.add_member(archive, f'{number:02d}.txt', b'a caption')
    with pytest.raises(DataError, match='no record can be used for training') as error:
        load(tmp_path, ['a.tar'], tmp_path, tolerance=1.0)
    assert str(error.value).count('not a readable image') == 3


def test_a_text_that_cannot_be_written_is_named(tmp_path):
    with tarfile.open(tmp_path / 'a.tar', 'w') as archive:
        miniature.add_member(archive, '07.jpg', image(0))
        miniature.add_member(archive, '07.json', b'{"caption": "a \\ud800 cat"}')
    # Tokenizers refuse such a text, each with an error of its own.
    with pytest.raises(DataError, match=r'a\.tar, sample 07: .* holds half of a surrogate pair'):
        load(tmp_path, ['a.tar'], tmp_path, is_from_start=True, samples=1, misfit=lambda q, a: a.encode() and '')


def test_an_image_that_is_cut_off_is_named_when_it_is_read(tmp_path):
    rows = [{'image': f'{number}.jpg', 'caption': 'a cat'} for number in range(8)]
    for row in rows:
        path = tmp_path / row['image']
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
        # The head is whole, and half of the pixels are gone.
        os.truncate(path, path.stat().st_size // 2)
    write(tmp_path / 'a.json', rows)
    train = load(tmp_path, ['a.json'], tmp_path).train
    with pytest.raises(DataError, match=r'a\.json, caption of \d\.jpg: .*\d\.jpg: not a readable image'):
        train.source[0]


def test_a_tenth_of_the_images_is_for_tests():
    shares = sum(is_test_image(f'{number}.jpg') for number in range(5000)) / 5000
    assert 0.08 < shares < 0.12
    assert not is_test_image('')


@pytest.mark.parametrize(
    'names',
    [
        # An image of COCO, as both releases, LAVIS and LLaVA name it.
        ('COCO_train2014_{:012d}.jpg', '{:012d}.jpg', 'val2014/COCO_val2014_{:012d}.jpg', 'coco/train2017/{:012d}.jpg'),
        ('{}.jpg', 'VG_100K/{}.jpg', 'VG_100K_2/{}.jpg', 'vg/VG_100K/{}.jpg', 'gqa/images/{}.jpg'),
        ('{}.jpg', 'flickr30k-images/{}.jpg', 'flickr30k/flickr30k_images/{}.jpg'),
    ],
)
def test_all_names_of_an_image_are_for_the_same_use(names):
    uses = [[is_test_image(name.format(number)) for number in range(60)] for name in names]
    assert any(uses[0])
    assert all(of_name == uses[0] for of_name in uses)
    # Other folders are different images.
    assert [is_test_image(f'cats/{number}.jpg') for number in range(60)] != uses[0]


def test_a_test_image_of_one_source_is_no_training_image_of_another(tmp_path):
    names = [f'COCO_train2014_{number:012d}.jpg' for number in range(40)]
    for number, name in enumerate(names):
        write(tmp_path / 'train2014' / name, image(number))
    write(tmp_path / 'lavis.json', [{'image': f'train2014/{name}', 'caption': 'a cat'} for name in names])
    turns = [{'from': 'human', 'value': '<image>\nWhat?'}, {'from': 'gpt', 'value': 'A cat.'}]
    rows = [{'id': name, 'image': f'coco/train2017/{name[-16:]}', 'conversations': turns} for name in names]
    write(tmp_path / 'llava.json', rows)
    dataset = load(tmp_path, ['lavis.json', 'llava.json'], tmp_path)
    assert len(dataset.test.source) >= 2
    assert not set(dataset.train.read_image_names()) & set(dataset.test.read_image_names())


def test_the_test_images_do_not_depend_on_the_folders_in_which_images_are_found(tmp_path):
    rows = [{'image': f'parrots/{number}.jpg', 'caption': f'parrot {number}'} for number in range(40)]
    answers = []
    for folder in ('parrots', 'downloads'):
        for number in range(40):
            write(tmp_path / folder / 'all' / folder / f'{number}.jpg', image(number))
        write(tmp_path / folder / 'rows.json', rows)
        test = load(tmp_path / folder, ['rows.json'], tmp_path, is_clean=False).test
        answers.append([question + answer for question, answer in test.read_texts()])
    assert answers[0] == answers[1]
    assert answers[0]


# The order of batches.


def batches(data, rows=None, augment=None):
    train = load(data, ['cc3m', 'vg', 'texts'], samples=40).train
    return pipeline.batches(
        train.source,
        as_arrays,
        batch=8,
        seed=1,
        groups=[range(40)],
        shares=(1,),
        rows=rows,
        augment_image=augment,
    )


def as_arrays(record):
    """Stand in for a model's processor: the sum of an image's levels, and the texts as bytes."""
    text = f'{record["question"]}|{record["answer"]}'.encode()
    pixels = record['image']
    return {
        'sum': np.int64(0 if pixels is None else pixels.sum()),
        'shape': np.int64([0, 0] if pixels is None else pixels.shape[:2]),
        'text': np.frombuffer(text.ljust(99), np.uint8),
    }


def assert_equal_batches(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize('augment', [None, crop_and_flip])
def test_a_run_that_resumes_at_a_step_reads_the_same_batches(augment, data):
    straight = [batches(data, augment=augment)[step] for step in range(12)]
    resumed = batches(data, augment=augment)
    for step in (9, 4, 11):
        assert_equal_batches(resumed[step], straight[step])
    assert not np.array_equal(straight[0]['text'], straight[1]['text'])


@pytest.mark.parametrize('augment', [None, crop_and_flip])
@pytest.mark.parametrize('processes', [2, 4])
def test_processes_together_read_the_rows_of_one(processes, augment, data):
    whole = batches(data, augment=augment)
    parts = [batches(data, rows=range(first, 8, processes), augment=augment) for first in range(processes)]
    for step in (0, 5, 13):
        for first, part in enumerate(parts):
            own = {name: values[first::processes] for name, values in whole[step].items()}
            assert_equal_batches(part[step], own)


@pytest.mark.parametrize('captions', ['prefix', 'instruct'])
def test_prompts_change_from_epoch_to_epoch(captions, data):
    train = load(data, ['cc3m'], samples=20, captions=captions).train
    whole = {clean_caption(source_caption(train, index)): index for index in range(20)}
    read = collections.defaultdict(list)
    for step in range(30):
        for question, answer in drawn_texts(train, step):
            read[whole[answer if captions == 'instruct' else question + answer]].append(question)
    assert {len(prompts) for prompts in read.values()} == {6}
    assert len(read) == 20
    assert sum(len(set(prompts)) > 2 for prompts in read.values()) >= 18


def source_caption(train, index):
    key = train.name_record(index).rpartition(' ')[2]
    return miniature.caption_of(100 * int(key[:5]) + int(key[5:]))


def drawn_texts(train, step, augment=None):
    """Return the texts in a batch of four."""
    batch = pipeline.batches(
        train.source,
        as_arrays,
        batch=4,
        seed=1,
        groups=[range(20)],
        shares=(1,),
        augment_image=augment,
        draw_texts=train.draw_texts,
    )[step]
    return [tuple(bytes(row).decode().rstrip().split('|')) for row in batch['text']]


def test_prompts_are_a_function_of_the_seed_and_the_step(data):
    train = load(data, ['cc3m', 'texts'], samples=20).train
    again = load(data, ['cc3m', 'texts'], samples=20).train
    straight = [drawn_texts(train, step) for step in range(12)]
    for step in (9, 4, 11):
        assert drawn_texts(again, step) == straight[step]


def test_a_prompt_that_does_not_fit_is_replaced_by_the_one_that_was_checked(data):
    def misfit(question, answer):
        return 'too long' if len(question) > 5 else ''

    train = load(data, ['cc3m'], samples=20, misfit=misfit).train
    checked = train.read_texts()
    for index in range(len(checked)):
        texts = [train.draw_texts(index, np.random.default_rng(seed)) for seed in range(20)]
        assert all(len(question) <= 5 for question, _ in texts)
        assert checked[index] in texts


def test_questions_are_the_same_in_each_epoch(tmp_path):
    _, expected = miniature.llava_pretrain(tmp_path / 'data')
    train = load(tmp_path, ['data'], tmp_path, samples=3, is_from_start=True).train
    for index, want in enumerate(expected):
        assert train.draw_texts(index, np.random.default_rng(index)) == (want.question, want.answer)
    # Test questions are drawn once.
    assert load(tmp_path, ['data'], tmp_path).test.draw_texts is None


def test_every_record_comes_once_in_an_epoch(data):
    read = [bytes(row) for step in range(5) for row in batches(data)[step]['text']]
    assert len(set(read)) == 40


def test_crops_change_from_epoch_to_epoch_and_texts_stay(data):
    augmented = batches(data, augment=crop_and_flip)
    shapes = collections.defaultdict(set)
    for step in range(25):
        for row, shape in zip(augmented[step]['text'], augmented[step]['shape'], strict=True):
            shapes[bytes(row)].add(tuple(shape.tolist()))
    assert len(shapes) == 40
    assert sum(len(of_record) > 1 for of_record in shapes.values()) >= 15
    assert {(0, 0)} in shapes.values()


def test_a_request_without_a_mixture_reads_a_folder_as_before(tmp_path):
    miniature.user_folder(tmp_path / 'data')
    request = DataRequest(str(tmp_path / 'data'), tmp_path)
    # Hashes put one of the three images into the test split, as `data.folder` says.
    dataset = MixtureLoader()(request)
    assert (len(dataset.train.source), len(dataset.test.source)) == (2, 1)
    drawn = MixtureLoader()(dataclasses.replace(request, mixture=Mixture(samples=2, is_from_start=True)))
    assert drawn.train.read_texts() == [('what is it?', 'a cat 0'), ('what is it?', 'a cat 1')]
