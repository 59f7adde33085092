"""From records to batches: where tokens, targets and masks lie; a batch is a function of seed and step alone."""

import numpy as np
import pytest
from PIL import Image

from sparselora_jax.data import easy_vqa, pipeline

TEXT = pipeline.TextFormat()


@pytest.mark.parametrize('answer', ['yes', 'teal', 'rectangle'])
def test_valid_tokens_are_prompt_and_answer_and_targets_are_the_next_ones(tokenizer, answer):
    example = pipeline.encode(tokenizer, TEXT, 'what is the blue shape?', answer)
    prompt = tokenizer('Question: what is the blue shape? Short answer:')['input_ids']
    target = [*tokenizer(' ' + answer)['input_ids'], tokenizer.eos_token_id]
    assert example['tokens'][example['valid']].tolist() == prompt + target[:-1]
    assert example['targets'][example['answer']].tolist() == target
    # The prompt ends at its slot whatever its length, and the last positions predict the answer.
    assert example['tokens'].shape == (TEXT.prompt_tokens + TEXT.answer_tokens - 1,)
    assert example['valid'][TEXT.prompt_tokens - len(prompt) : TEXT.prompt_tokens].all()
    assert not example['valid'][: TEXT.prompt_tokens - len(prompt)].any()
    inputs = example['tokens'][-TEXT.answer_tokens :]
    assert inputs[0] == prompt[-1]
    np.testing.assert_array_equal(inputs[1:], example['targets'][:-1])


def test_a_question_alone_has_the_same_prompt_and_no_answer(tokenizer):
    alone, answered = (pipeline.encode(tokenizer, TEXT, 'is there a circle?', *answer) for answer in ([], ['yes']))
    for name in ('tokens', 'valid'):
        np.testing.assert_array_equal(alone[name][: TEXT.prompt_tokens], answered[name][: TEXT.prompt_tokens])
    assert not alone['answer'].any() and not alone['valid'][TEXT.prompt_tokens :].any()


def test_every_question_and_answer_of_the_data_fits(tokenizer, easy_vqa_builder):
    pairs = {(q, a) for split in ('train', 'test') for q, a, _ in pipeline.read_texts(easy_vqa_builder, split)}
    assert len(pairs) > 200
    for question, answer in pairs:
        pipeline.encode(tokenizer, TEXT, question, answer)


@pytest.mark.parametrize('question', ['', '  ', '\n'])
def test_an_empty_question_is_an_error(tokenizer, question):
    with pytest.raises(pipeline.DataError, match='the question is empty'):
        pipeline.encode(tokenizer, TEXT, question)


def test_what_does_not_fit_is_named_with_its_length(tokenizer):
    with pytest.raises(pipeline.DataError, match=r'question of \d\d tokens, at most 16 fit: .*circle'):
        pipeline.encode(tokenizer, TEXT, 'is there a circle ' * 5, 'yes')
    with pytest.raises(pipeline.DataError, match=r'answer of \d+ tokens, at most 3 fit: .*anticonstitution'):
        pipeline.encode(tokenizer, TEXT, 'what is it?', 'anticonstitutionnellement')


def test_a_record_becomes_pixels_from_minus_one_to_one_and_an_encoded_question(tokenizer):
    pixels = np.array([[[0, 255, 51]]], np.uint8)
    record = {'image': pixels, 'question': b'is there a circle?', 'answer': b'no', 'image_id': 3}
    example = pipeline.vqa_transform(tokenizer, TEXT)(record)
    np.testing.assert_allclose(example.pop('image'), [[[-1, 1, -0.6]]], atol=1e-6)
    want = pipeline.encode(tokenizer, TEXT, 'is there a circle?', 'no')
    assert example.keys() == want.keys()
    assert all(np.array_equal(example[name], want[name]) for name in want)


@pytest.mark.parametrize('mode, suffix', [('RGB', 'png'), ('RGBA', 'png'), ('L', 'png'), ('P', 'gif'), ('RGB', 'jpg')])
def test_an_image_of_any_kind_becomes_square_rgb(tmp_path, mode, suffix):
    path = tmp_path / f'image.{suffix}'
    Image.new('RGB', (30, 20), (255, 0, 0)).convert(mode).save(path)
    pixels = pipeline.read_image(path, 8)
    assert pixels.shape == (8, 8, 3) and pixels.dtype == np.uint8
    want = (76, 76, 76) if mode == 'L' else (255, 0, 0)
    np.testing.assert_allclose(pixels.astype(int), np.broadcast_to(want, (8, 8, 3)), atol=2)


def test_an_image_of_the_right_size_keeps_its_pixels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'image.png')
    np.testing.assert_array_equal(pipeline.read_image(tmp_path / 'image.png', 8), pixels)


def test_a_file_that_is_no_image_is_named(tmp_path):
    with pytest.raises(pipeline.DataError, match='absent.png: no such file'):
        pipeline.read_image(tmp_path / 'absent.png', 8)
    (tmp_path / 'text.png').write_text('no image')
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / 'whole.png')
    (tmp_path / 'cut.png').write_bytes((tmp_path / 'whole.png').read_bytes()[:5000])
    (tmp_path / 'folder.png').mkdir()
    broken = bytearray((tmp_path / 'whole.png').read_bytes())
    broken[5000:5200] = bytes(200)
    (tmp_path / 'broken.png').write_bytes(broken)
    for name in ('text.png', 'cut.png', 'folder.png', 'broken.png'):
        with pytest.raises(pipeline.DataError, match=f'{name}: not a readable image'):
            pipeline.read_image(tmp_path / name, 8)


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
    assert not np.array_equal(first, second) and not np.array_equal(first, np.arange(40))


def test_augmentation_is_a_function_of_seed_and_position():
    def jitter(example, rng):
        return example | {'noise': rng.normal()}

    data, again, other = (numbers(seed, augment=jitter) for seed in (0, 0, 1))
    for step in (5, 0, 2):
        np.testing.assert_array_equal(data[step]['noise'], again[step]['noise'])
    assert len(set(np.concatenate([data[0]['noise'], data[1]['noise'], other[0]['noise']]))) == 48


def test_an_empty_group_is_named():
    with pytest.raises(pipeline.DataError, match=r'empty; sizes \[40, 0, 7\]'):
        numbers(groups=(GROUPS[0], (), GROUPS[2]))


def test_groups_hold_every_question_once_by_kind(easy_vqa_builder):
    texts = pipeline.read_texts(easy_vqa_builder, 'test')
    groups = pipeline.groups_by_kind(texts)
    assert sorted(sum(groups, [])) == list(range(len(texts)))
    for kind, group in zip(easy_vqa.KINDS, groups, strict=True):
        assert {easy_vqa.kind_of(texts[index][1]) for index in group} == {kind}
