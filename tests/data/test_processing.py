"""Hugging Face directories of every family: what is read equals what the saved processor makes, and lies in place."""

import dataclasses
import pickle
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_processors import KINDS, LAYOUT, PICTURES, SIDE, TEXTS, edit, make, prompts
from tokenizers import processors

from sparselora_jax.data.processing import Processor, load_processor
from sparselora_jax.runtime.errors import DataError


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """{kind: (directory, its transformers processor)}"""
    folder = tmp_path_factory.mktemp('models')
    return {kind: (folder / kind, make(kind, folder / kind)) for kind in KINDS}


def test_tokens_that_the_model_does_not_know_are_named(made):
    processor = load_processor(made['instructblip-llama'][0])
    sizes = {'prompt_tokens': 40, 'answer_tokens': 40}
    image = np.zeros((4, 4, 3), np.uint8)
    assert processor.misfit('a red circle', 'blue', **sizes) == ''
    assert not processor.has_unknown_tokens
    tokens = processor.hf.tokenizer('a red circle')['input_ids']
    answer = max(processor.hf.tokenizer('blue', add_special_tokens=False)['input_ids'])
    for few, told in (
        (
            dataclasses.replace(processor, vocab=max(tokens)),
            f'prompt has token {max(tokens)}, and the model knows 0 to',
        ),
        (dataclasses.replace(processor, vocab=answer), f'(prompt|answer) has token .* 0 to {answer - 1}; use'),
        (dataclasses.replace(processor, qformer_vocab=3), 'as the Q-Former reads it. has token .* knows 0 to 2'),
    ):
        assert re.search(told, few.misfit('a red circle', 'blue', **sizes))
        with pytest.raises(DataError, match=told):
            few.example(image, 'a red circle', 'blue', **sizes)
    assert dataclasses.replace(processor, vocab=5).has_unknown_tokens


@pytest.mark.parametrize('kind', ['llava-default', 'paligemma'])
def test_an_image_token_may_lie_outside_the_vocabulary(made, kind):
    processor = load_processor(made[kind][0])
    image = processor.hf.tokenizer.convert_tokens_to_ids(str(processor.hf.image_token))
    (text,) = prompts(kind)[:1]
    words = [token for token in processor.hf.tokenizer(text)['input_ids'] if token != image]
    known = dataclasses.replace(processor, vocab=max(*words, processor.end) + 1)
    assert known.misfit(text, '', prompt_tokens=40) == ''


def test_a_deep_picture_is_scaled_and_an_array_of_floats_refused(made):
    processor = load_processor(made['blip2-opt'][0])
    levels = np.linspace(0, 2**16 - 1, 64).reshape(8, 8).astype(np.uint16)
    grey = np.rint(levels / 257).astype(np.uint8)
    deep = processor.prompt([Image.fromarray(levels)], ['a'])['pixel_values']
    np.testing.assert_array_equal(deep, processor.prompt([Image.fromarray(grey)], ['a'])['pixel_values'])
    with pytest.raises(DataError, match='an image is an array of float64, expected uint8'):
        processor.prompt([np.zeros((4, 4, 3))], ['a'])


def oracle(kind, hf, images, texts):
    """What transformers makes, its own way, of the same images and texts; the padding sides of the real directories."""
    hf.tokenizer.padding_side = 'right' if kind.endswith('t5') else 'left'
    texts = ['<image>' + text for text in texts] if kind == 'paligemma' else texts
    return dict(hf(images=images, text=texts, padding=True, return_tensors='np'))


@pytest.mark.parametrize('kind', KINDS)
def test_a_prompt_equals_what_transformers_makes(made, kind):
    folder, hf = made[kind]
    got, want = load_processor(folder).prompt(PICTURES, prompts(kind)), oracle(kind, hf, PICTURES, prompts(kind))
    want.pop('labels', None)  # PaliGemma's, all masked
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=0, atol=1e-5, err_msg=name)
    assert got['pixel_values'].dtype == np.float32
    assert got['pixel_values'].shape == (3, 3, SIDE, SIDE)
    assert all(got[name].dtype == np.int32 for name in got.keys() - {'pixel_values'})


@pytest.mark.parametrize('kind', KINDS)
def test_placeholders_and_pads_lie_where_the_family_has_them(made, kind):
    processor = load_processor(made[kind][0])
    got, count = (
        processor.prompt(PICTURES, prompts(kind)),
        {'llava-full': 5, 'llava-default': 4, 'paligemma': 4}.get(kind, 5),
    )
    image = processor.hf.tokenizer.convert_tokens_to_ids('<image>')
    assert processor.image_tokens == count
    np.testing.assert_array_equal((got['input_ids'] == image).sum(1), count)
    assert len(set(got['attention_mask'].sum(1))) == 3
    assert not got['attention_mask'].all(1)[1]
    for row, mask in zip(got['input_ids'], got['attention_mask'], strict=True):
        if 'blip' in kind:
            assert (row[:count] == image).all()
            assert mask[:count].all()
            row, mask = row[count:], mask[count:]
        assert (np.diff(mask) <= 0).all() if kind.endswith('t5') else (np.diff(mask) >= 0).all()
        text = row[mask == 1]
        first = {'opt': '</s>', 'llama': '<s>', 't5': None}.get(kind.rsplit('-')[-1], '<s>')
        if kind == 'paligemma':
            assert (text[:count] == image).all()
            text, first = text[count:], '<bos>'
            assert processor.hf.tokenizer.decode(text[-1:]) == '\n'
        assert first is None or text[0] == processor.hf.tokenizer.convert_tokens_to_ids(first)
    if 'qformer_input_ids' in got:
        assert (np.diff(got['qformer_attention_mask'], axis=1) <= 0).all()
        assert (got['qformer_input_ids'][:, 0] == 1).all()


def test_pixels_are_scaled_as_the_directory_says(made):
    colour = np.full((50, 20, 3), (255, 0, 51), np.uint8)
    pixels = load_processor(made['paligemma'][0]).prompt([colour], ['a'])['pixel_values'][0]
    np.testing.assert_allclose(
        pixels, np.broadcast_to(np.array([1, -1, -0.6])[:, None, None], (3, SIDE, SIDE)), atol=1e-5
    )
    pixels = load_processor(made['blip2-opt'][0]).prompt([colour], ['a'])['pixel_values'][0, :, 0, 0]
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    np.testing.assert_allclose(pixels, ([1, 0, 0.2] - mean) / std, atol=1e-5)


@pytest.mark.parametrize('kind', ['blip2-opt', 'llava-default', 'paligemma'])
def test_arrays_of_any_shape_are_images_too(made, kind):
    processor = load_processor(made[kind][0])
    arrays = [np.asarray(picture) for picture in PICTURES]
    got = processor.prompt([*arrays, arrays[0][:3], arrays[1][:4, :3]], [prompts(kind)[0]] * 5)['pixel_values']
    pictures = [*PICTURES[:2], arrays[2], *(Image.fromarray(a) for a in (arrays[0][:3], arrays[1][:4, :3]))]
    want = processor.prompt(pictures, [prompts(kind)[0]] * 5)['pixel_values']
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_grey_images_of_a_directory_that_leaves_them_grey_become_rgb(made, tmp_path):
    shutil.copytree(made['paligemma'][0], tmp_path / 'grey')
    edit(tmp_path / 'grey' / 'processor_config.json', lambda d: d['image_processor'].update(do_convert_rgb=None))
    got = load_processor(tmp_path / 'grey').prompt(PICTURES, TEXTS)['pixel_values']
    np.testing.assert_array_equal(got, load_processor(made['paligemma'][0]).prompt(PICTURES, TEXTS)['pixel_values'])


def expected_answer(kind, hf, answer):
    """The tokens of an answer by a way of its own: all tokenizers here put a space's mark on the word after it."""
    marked = {'opt': ' ' + answer, 'paligemma': answer}.get(kind.rsplit('-')[-1], answer)
    ids = hf.tokenizer(marked, add_special_tokens=False)['input_ids']
    return [*ids, hf.tokenizer.eos_token_id]


@pytest.mark.parametrize('answer', ['teal', 'a red circle'])
@pytest.mark.parametrize('kind', KINDS)
def test_an_example_is_the_prompt_and_the_answer_but_its_last_token(made, kind, answer):
    folder, hf = made[kind]
    processor, prompt, count = load_processor(folder), prompts(kind)[1], LAYOUT['answer_tokens']
    alone = processor.prompt(PICTURES[:1], [prompt])
    example = processor.example(PICTURES[0], prompt, answer, **LAYOUT)
    target = expected_answer(kind, hf, answer)
    assert example['targets'].shape == example['answer'].shape == (count,)
    assert example['targets'][example['answer']].tolist() == target
    assert example['answer'].sum() == len(target) <= count
    read = example['input_ids'][example['attention_mask'] == 1].tolist()
    width = processor.image_tokens + LAYOUT['prompt_tokens']
    if kind.endswith('t5'):
        assert read == alone['input_ids'][0].tolist()
        assert len(example['input_ids']) == width
        assert example['decoder_input_ids'].tolist()[: len(target)] == [0, *target[:-1]]
        assert example['decoder_input_ids'].shape == (count,)
    else:
        assert read == [*alone['input_ids'][0], *target[:-1]]
        assert len(example['input_ids']) == width + count - 1
        assert 'decoder_input_ids' not in example
        # The prompt ends where generation starts, and every target comes after what it is predicted from.
        assert example['attention_mask'][width - 1]
        assert example['input_ids'][width - 1] == alone['input_ids'][0, -1]
        assert example['input_ids'][-count:][1 : len(target)].tolist() == target[:-1]
    # All the rest is pads; where the processor pads the text alone, they come after the image.
    assert set(example['input_ids'][example['attention_mask'] == 0]) == {hf.tokenizer.pad_token_id}
    assert example['attention_mask'][: processor.image_tokens].all() == ('blip' in kind)
    np.testing.assert_array_equal(example['pixel_values'], alone['pixel_values'][0])
    assert ('token_type_ids' in example) == (kind == 'paligemma')
    for name in ('qformer_input_ids', 'qformer_attention_mask') if 'instruct' in kind else ():
        np.testing.assert_array_equal(example[name][: alone[name].shape[1]], alone[name][0])
        assert example[name].shape == (LAYOUT['prompt_tokens'],)
        assert not example[name][alone[name].shape[1] :].any()


def test_an_example_of_paligemma_equals_transformers_with_a_suffix(made):
    folder, hf = made['paligemma']
    want = hf(images=PICTURES[:1], text=['<image>' + TEXTS[0]], suffix=['a red circle'], return_tensors='np')
    example = load_processor(folder).example(PICTURES[0], TEXTS[0], 'a red circle', **LAYOUT)
    assert example['targets'][example['answer']].tolist() == want['labels'][0][want['labels'][0] != -100].tolist()
    for name in ('input_ids', 'token_type_ids'):
        assert example[name][example['attention_mask'] == 1].tolist() == want[name][0, :-1].tolist()


@pytest.mark.parametrize('kind', KINDS)
def test_shapes_do_not_depend_on_the_text_and_no_answer_leaves_the_same_prompt(made, kind):
    processor = load_processor(made[kind][0])
    examples = [processor.example(PICTURES[0], text, 'teal', **LAYOUT) for text in prompts(kind)]
    alone = processor.example(PICTURES[0], prompts(kind)[0], **LAYOUT)
    assert len({tuple((name, x.shape, x.dtype) for name, x in example.items()) for example in [*examples, alone]}) == 1
    assert not alone['answer'].any()
    width = processor.image_tokens + LAYOUT['prompt_tokens']
    for name in ('input_ids', 'attention_mask'):
        np.testing.assert_array_equal(alone[name][:width], examples[0][name][:width])
    assert not alone['attention_mask'][width:].any()


@pytest.mark.parametrize('kind', KINDS)
def test_decode_gives_the_answer_back(made, kind):
    processor = load_processor(made[kind][0])
    example = processor.example(PICTURES[0], prompts(kind)[0], 'a red circle', **LAYOUT)
    assert processor.decode(example['targets'][None]) == ['a red circle']


def test_what_does_not_fit_is_named(made):
    processor = load_processor(made['instructblip-llama'][0])
    with pytest.raises(DataError, match=r'^prompt of \d\d tokens, at most 9 fit: .*colour'):
        processor.example(PICTURES[0], TEXTS[0], 'teal', prompt_tokens=9, answer_tokens=8)
    with pytest.raises(DataError, match=r"^answer of \d+ tokens, at most 2 fit: .*'a red circle'"):
        processor.example(PICTURES[0], TEXTS[0], 'a red circle', prompt_tokens=40, answer_tokens=2)
    with pytest.raises(DataError, match='0 images for 1 texts'):
        processor.prompt([], ['a'])
    with pytest.raises(DataError, match='<image> stands for the image'):
        processor.prompt(PICTURES[:1], ['<image> a'])
    with pytest.raises(DataError, match=r'cannot be processed'):
        processor.prompt([np.zeros((8, 8, 2), np.uint8)], ['a'])
    with pytest.raises(DataError, match=r'a prompt of this model holds <image> once'):
        load_processor(made['llava-full'][0]).prompt(PICTURES[:1], ['a'])


@pytest.mark.parametrize('kind', KINDS)
def test_texts_that_an_example_refuses_are_known_without_an_image(made, kind):
    processor = load_processor(made[kind][0])
    refused, answer = set(), 'a cat of the colour teal'
    for prompt in [*prompts(kind), '<image> <image> twice']:
        for room in ((40, 8), (14, 8), (9, 8), (40, 3)):
            size = dict(zip(('prompt_tokens', 'answer_tokens'), room, strict=True))
            reason = processor.misfit(prompt, answer, **size)
            if not reason:
                processor.example(PICTURES[0], prompt, answer, **size)
                continue
            with pytest.raises(DataError) as error:
                processor.example(PICTURES[0], prompt, answer, **size)
            assert str(error.value).startswith(reason)
            refused.add(reason.split(' of ')[0])
    assert {'prompt', 'answer'} <= refused


def test_a_caption_needs_no_prompt_but_an_example_needs_a_token_before_the_answer(made):
    processor = load_processor(made['blip2-opt'][0])
    ids = processor.prompt(PICTURES[:1], [''])['input_ids'][0].tolist()
    assert ids[5:] == [processor.hf.tokenizer.bos_token_id]
    assert len(set(ids[:5])) == 1
    assert processor.example(PICTURES[0], '', 'teal', **LAYOUT)['attention_mask'].sum() >= 6
    processor.hf.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single='$A')
    with pytest.raises(DataError, match='the prompt is empty'):
        processor.example(PICTURES[0], '', 'teal', **LAYOUT)


@pytest.mark.parametrize('kind', KINDS)
def test_threads_share_a_processor(made, kind):
    """transformers switches the padding of a tokenizer on and off, while other threads read and decode with it."""
    processor = load_processor(made[kind][0])
    texts = [text for text in prompts(kind) for _ in range(30)]
    images = [np.full((8 + number % 9, 12, 3), number, np.uint8) for number in range(len(texts))]

    def convert(number):
        example = processor.example(images[number], texts[number], prompt_tokens=64, answer_tokens=1)
        return example, processor.decode(example['input_ids'][None])

    numbers = range(len(texts))
    want = [convert(number) for number in numbers]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(convert, numbers))
    for (example, decoded), (want_example, want_decoded) in zip(got, want, strict=True):
        assert decoded == want_decoded
        for name, array in want_example.items():
            np.testing.assert_array_equal(example[name], array)


def test_a_processor_can_be_sent_to_a_data_worker(made):
    processor = load_processor(made['llava-default'][0])
    again = pickle.loads(pickle.dumps(processor))
    assert isinstance(again, Processor)
    want, got = (p.prompt(PICTURES[:1], prompts('llava')[:1])['input_ids'] for p in (processor, again))
    np.testing.assert_array_equal(got, want)


WITHOUT_TORCH = """
import importlib.machinery, sys, numpy
find = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = lambda name, *rest: (
    None if name.split('.')[0] in ('torch', 'torchvision') else find(name, *rest))
from sparselora_jax.data.processing import load_processor
image = numpy.arange(30 * 50 * 3, dtype=numpy.uint8).reshape(30, 50, 3)
for kind in sys.argv[2:]:
    processor = load_processor(sys.argv[1] + '/' + kind)
    text = '<image> is it red?' if 'llava' in kind else 'is it red?'
    example = processor.example(image, text, 'teal', prompt_tokens=40, answer_tokens=8)
    numpy.savez(sys.argv[1] + '/' + kind + '.npz', **example)
    assert processor.decode(example['targets'][None]) == ['teal']
import transformers
assert not transformers.utils.is_torch_available() and 'torch' not in sys.modules
"""


@pytest.mark.slow
def test_all_of_it_works_where_torch_is_not_installed(made):
    folder = made['blip2-opt'][0].parent
    run = subprocess.run([sys.executable, '-c', WITHOUT_TORCH, folder, *KINDS], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    image = np.arange(30 * 50 * 3, dtype=np.uint8).reshape(30, 50, 3)
    for kind in KINDS:
        text = '<image> is it red?' if 'llava' in kind else 'is it red?'
        want = load_processor(folder / kind).example(image, text, 'teal', **LAYOUT)
        got = np.load(Path(folder) / f'{kind}.npz')
        assert set(got) == set(want)
        for name in want:
            np.testing.assert_array_equal(got[name], want[name], err_msg=f'{kind} {name}')
