"""From records to batches: where tokens, targets and masks lie; a batch is a function of seed and step alone."""

import functools
import operator

import numpy as np
import pytest

from sparselora_jax.checkpoints import embedded
from sparselora_jax.data import easy_vqa, pipeline
from sparselora_jax.data.dataset import Dataset, Split
from sparselora_jax.data.text_format import TextFormat
from sparselora_jax.runtime.errors import DataError

TEXT = TextFormat()


@pytest.fixture(scope='module')
def processor(tiny_blip2):
    return embedded.load_processor(tiny_blip2[0].cfg)


@pytest.mark.slow
def test_every_question_and_answer_of_the_data_fits(processor, easy_vqa_builder):
    pairs = {(q, a) for split in ('train', 'test') for q, a, _ in easy_vqa.read_texts(easy_vqa_builder, split)}
    assert len(pairs) > 200
    transform = pipeline.vqa_transform(processor, TEXT)
    for question, answer in sorted(pairs)[::3]:
        transform({'image': np.zeros((64, 64, 3), np.uint8), 'question': question, 'answer': answer})


def test_a_record_becomes_an_example_with_its_question_written_as_the_format_says(processor):
    record = {'image': np.full((64, 64, 3), 51, np.uint8), 'question': 'is there a circle?', 'answer': 'no'}
    example = pipeline.vqa_transform(processor, TEXT)(record)
    prompt = 'Question: is there a circle? Short answer:'
    want = processor.example(record['image'], prompt, 'no', prompt_tokens=16, answer_tokens=3)
    assert example.keys() == want.keys()
    assert all(np.array_equal(example[name], want[name]) for name in want)


GROUPS = (range(0, 40), range(40, 52), range(52, 59))


def numbers(seed=0, batch=16, groups=GROUPS, **options):
    """Batches of records that are their own index."""
    source = [{'index': np.int32(index)} for index in range(59)]
    return pipeline.batches(source, dict, batch=batch, seed=seed, groups=groups, shares=(2, 1, 1), **options)


def test_a_batch_is_a_function_of_seed_and_step_alone():
    in_order = [numbers()[step]['index'] for step in range(12)]
    fresh = numbers()
    for step in (11, 3, 7, 3, 0):
        np.testing.assert_array_equal(fresh[step]['index'], in_order[step])
    assert not np.array_equal(numbers(seed=1)[0]['index'], in_order[0])
    assert not np.array_equal(in_order[0], in_order[1])


def test_steps_go_on_past_the_end_of_the_data():
    assert numbers()[10_000]['index'].shape == (16,)


def test_each_group_has_its_share_of_every_batch():
    data = numbers()
    for step in range(20):
        kinds = np.searchsorted([40, 52], data[step]['index'], side='right')
        assert np.bincount(kinds, minlength=3).tolist() == [8, 4, 4]


def test_a_group_comes_whole_and_in_another_order_every_epoch():
    drawn = np.concatenate([numbers()[step]['index'] for step in range(10)])
    drawn = drawn[drawn < 40]
    first, second = drawn[:40], drawn[40:80]
    assert sorted(first) == sorted(second) == list(range(40))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, np.arange(40))


def test_augmentation_is_a_function_of_seed_and_position():
    def jitter(example, rng):
        return example | {'noise': rng.normal()}

    data, again, other = (numbers(seed, augment=jitter) for seed in (0, 0, 1))
    for step in (5, 0, 2):
        np.testing.assert_array_equal(data[step]['noise'], again[step]['noise'])
    assert len(set(np.concatenate([data[0]['noise'], data[1]['noise'], other[0]['noise']]))) == 48


def test_an_empty_group_is_named():
    with pytest.raises(DataError, match=r'empty; sizes \[40, 0, 7\]'):
        numbers(groups=(GROUPS[0], (), GROUPS[2]))


def test_groups_hold_every_question_once_by_kind(easy_vqa_builder):
    texts = [text[:2] for text in easy_vqa.read_texts(easy_vqa_builder, 'test')]
    split = Split([], lambda: texts)
    groups = pipeline.groups_by_kind(split, Dataset(split, split, easy_vqa.KINDS, easy_vqa.kind_of))
    assert sorted(functools.reduce(operator.iadd, groups, [])) == list(range(len(texts)))
    for kind, group in zip(easy_vqa.KINDS, groups, strict=True):
        assert {easy_vqa.kind_of(texts[index][1]) for index in group} == {kind}
