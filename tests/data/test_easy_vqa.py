"""The builder's records are the package's own, read without TensorFlow; what texts say of an image, the image shows."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import easy_vqa as package
import numpy as np
import pytest
from PIL import Image

from sparselora_jax.data import easy_vqa

PALETTE = {
    'black': (0, 0, 0),
    'gray': (128, 128, 128),
    'red': (255, 0, 0),
    'green': (0, 255, 0),
    'blue': (0, 0, 255),
    'yellow': (255, 255, 0),
    'teal': (0, 128, 128),
    'brown': (165, 42, 42),
}
WITHOUT_TENSORFLOW = """
import sys
from sparselora_jax.data import easy_vqa, pipeline
source = easy_vqa.prepare(sys.argv[1]).as_data_source('train')
data = pipeline.batches(source, lambda r: {'image': r['image']}, batch=2, seed=0, groups=[range(9)], shares=[1])
print(data[0]['image'].shape, [name for name in sys.modules if name.split('.')[0] == 'tensorflow'])
"""


@pytest.fixture(scope='module')
def texts(easy_vqa_builder):
    return easy_vqa.read_texts(easy_vqa_builder, 'test')


@pytest.mark.parametrize(('split', 'count'), [pytest.param('train', 38575, marks=pytest.mark.slow), ('test', 9673)])
def test_a_split_holds_every_question(easy_vqa_builder, split, count):
    assert len(easy_vqa_builder.as_data_source(split)) == count
    assert easy_vqa_builder.info.splits[split].num_examples == count


def test_texts_are_those_of_the_package_in_its_order(texts):
    assert texts == list(zip(*package.get_test_questions(), strict=True))


def test_a_record_holds_the_image_and_its_question(easy_vqa_builder):
    questions, answers, image_ids = package.get_train_questions()
    source, files = easy_vqa_builder.as_data_source('train'), package.get_train_image_paths()
    for index in (0, 17, 38574):
        record = source[index]
        assert record.keys() == {'image', 'image_id', 'question', 'answer'}
        assert record['question'].decode() == questions[index]
        assert record['answer'].decode() == answers[index]
        assert record['image_id'] == image_ids[index]
        assert record['image'].dtype == np.uint8
        want = np.asarray(Image.open(files[image_ids[index]]).convert('RGB'))
        np.testing.assert_array_equal(record['image'], want)


def test_the_data_set_is_two_splits_of_records_with_text_as_text(easy_vqa_builder):
    dataset = easy_vqa.load(Path(easy_vqa_builder.data_dir).parents[1])
    questions, answers, _ = package.get_test_questions()
    assert len(dataset.test.source) == len(questions)
    assert len(dataset.train.source) == 38575
    record = dataset.test.source[5]
    assert (record['question'], record['answer']) == (questions[5], answers[5]) == dataset.test.read_texts()[5]
    assert {dataset.kind_of(answer) for answer in answers} == set(dataset.kinds)


def test_preparing_again_reuses_the_records(easy_vqa_builder):
    folder = Path(easy_vqa_builder.data_dir)
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    easy_vqa.prepare(folder.parents[1])
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before


@pytest.mark.slow
def test_a_batch_is_read_without_tensorflow(easy_vqa_builder):
    folder = Path(easy_vqa_builder.data_dir).parents[1]
    command = [sys.executable, '-c', WITHOUT_TENSORFLOW, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == '(2, 64, 64, 3) []'


def test_every_answer_has_a_kind():
    kinds = {answer: easy_vqa.kind_of(answer) for answer in package.get_answers()}
    assert {answer for answer, kind in kinds.items() if kind == 'yes/no'} == {'yes', 'no'}
    assert {answer for answer, kind in kinds.items() if kind == 'shape'} == {'rectangle', 'circle', 'triangle'}
    assert {answer for answer, kind in kinds.items() if kind == 'colour'} == set(PALETTE)


def looks(pixels):
    """(colour, shape) of a picture: its commonest pure colour, and how much of that area's bounding box it fills."""
    distance = np.abs(pixels.astype(int)[:, :, None] - np.array(list(PALETTE.values()))).max(-1)
    areas = distance <= 60
    colour = int(areas.sum((0, 1)).argmax())
    rows, columns = np.nonzero(areas[:, :, colour])
    fill = len(rows) / ((np.ptp(rows) + 1) * (np.ptp(columns) + 1))
    return list(PALETTE)[colour], 'rectangle' if fill > 0.93 else 'circle' if fill > 0.67 else 'triangle'


def test_what_texts_say_of_an_image_the_image_shows(texts):
    facts, files = easy_vqa.image_facts(texts), package.get_test_image_paths()
    told = 0
    for image_id in range(0, 1000, 4):
        colour, shape = looks(np.asarray(Image.open(files[image_id]).convert('RGB')))
        said = facts[image_id]
        assert said[0] in (-1, easy_vqa.COLOURS.index(colour))
        assert said[1] in (-1, easy_vqa.SHAPES.index(shape))
        told += min(said) >= 0
    assert told > 200  # an empty answer would agree with anything


@pytest.mark.slow
def test_two_runs_may_prepare_the_records_at_once(tmp_path):
    with ThreadPoolExecutor(2) as pool:
        builders = list(pool.map(easy_vqa.prepare, [tmp_path, tmp_path]))
    assert [len(builder.as_data_source('test')) for builder in builders] == [9673, 9673]
