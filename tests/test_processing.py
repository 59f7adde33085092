"""Hugging Face directories of every family: what is read equals what the saved processor makes, and lies in place."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from sparselora_jax.data.pipeline import DataError
from sparselora_jax.data.processing import Processor, load_processor
from sparselora_jax.errors import UnsupportedModel

CORPUS = ['Question: what is the colour of the cat? Short answer: teal', 'USER: is it a red circle? ASSISTANT: yes'] * 9
SIDE, PATCH = 28, 14
RNG = np.random.default_rng(0)
PICTURES = [
    Image.fromarray(RNG.integers(0, 256, (40, 61, 3), np.uint8)),
    Image.fromarray(RNG.integers(0, 256, (70, 31), np.uint8)),
    Image.fromarray(RNG.integers(0, 256, (30, 30, 4), np.uint8)),
]
TEXTS = ['Question: what is the colour of the cat? Short answer:', 'is it red?', 'a cat of the colour teal']
LAYOUT = {'prompt_tokens': 40, 'answer_tokens': 8}


def bpe(bos, eos, pad, *, image, template=None, spaces='bytes'):
    """A tokenizer like OPT's (`bytes`: a space belongs to its word) or LLaMA's (`first`: one is put in front)."""
    tokenizer = Tokenizer(models.BPE(unk_token='<unk>'))
    if spaces == 'bytes':
        tokenizer.pre_tokenizer, tokenizer.decoder = (
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
        )
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=spaces)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme=spaces)
        alphabet = list('\n')
    special = list(dict.fromkeys([pad, bos, eos, '<unk>', *(['<image>'] if image else [])]))
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    ids = [(token, tokenizer.token_to_id(token)) for token in (bos, eos)]
    if template:
        pair = template + ' $B'
        tokenizer.post_processor = processors.TemplateProcessing(single=template, pair=pair, special_tokens=ids)
    tokens = dict(bos_token=bos, eos_token=eos, pad_token=pad, unk_token='<unk>')
    names = ['input_ids', 'attention_mask']
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=names, **tokens)


def opt_tokenizer():
    return bpe('</s>', '</s>', '<pad>', image=False, template='</s> $A')


def t5_tokenizer():
    return bpe('<s>', '</s>', '<pad>', image=False, template='$A </s>', spaces='always')


def llama_tokenizer(image=True):
    return bpe('<s>', '</s>', '<pad>', image=image, template='<s> $A', spaces='first')


def bert_tokenizer():
    words = ['[PAD]', '[CLS]', '[SEP]', '[UNK]', *sorted({w for line in CORPUS for w in line.lower().split()})]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token='[UNK]'))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.WhitespaceSplit()
    ids = [('[CLS]', 1), ('[SEP]', 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single='[CLS] $A [SEP]', special_tokens=ids)
    tokens = dict(cls_token='[CLS]', sep_token='[SEP]', pad_token='[PAD]', unk_token='[UNK]')
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)


def square():
    return {'height': SIDE, 'width': SIDE}


def make(name, folder):
    """A directory of the kind, as transformers saves it; the processor that it holds."""
    vision = {'image_size': SIDE, 'patch_size': PATCH}
    if name.startswith(('blip2', 'instructblip')):
        instruct, language = name.startswith('instructblip'), name.rsplit('-')[-1]
        blip = transformers.BlipImageProcessorPil(size=square())
        tokenizer = {'opt': opt_tokenizer, 't5': t5_tokenizer, 'llama': lambda: llama_tokenizer(False)}[language]()
        if instruct:
            hf = transformers.InstructBlipProcessor(blip, tokenizer, bert_tokenizer(), num_query_tokens=5)
        else:
            hf = transformers.Blip2Processor(blip, tokenizer, num_query_tokens=5)
        kind = transformers.InstructBlipConfig if instruct else transformers.Blip2Config
        text = {'model_type': language, 'eos_token_id': tokenizer.eos_token_id}
        text |= {'decoder_start_token_id': 0} if language == 't5' else {}
        image = tokenizer.convert_tokens_to_ids('<image>')
        config = kind(vision_config=vision, text_config=text, num_query_tokens=5, image_token_index=image)
    elif name.startswith('llava'):
        clip = transformers.CLIPImageProcessorPil(size={'shortest_edge': SIDE}, crop_size=square())
        tokenizer, strategy = llama_tokenizer(), name.rsplit('-')[-1]
        settings = {'patch_size': PATCH, 'num_additional_image_tokens': 1, 'vision_feature_select_strategy': strategy}
        hf = transformers.LlavaProcessor(clip, tokenizer, **settings)
        text = {'model_type': 'llama', 'eos_token_id': tokenizer.eos_token_id}
        vision |= {'model_type': 'clip_vision_model'}
        image = {'image_token_index': hf.image_token_id, 'vision_feature_select_strategy': strategy}
        config = transformers.LlavaConfig(vision_config=vision, text_config=text, **image)
    else:
        siglip = transformers.SiglipImageProcessorPil(size=square(), image_seq_length=4)
        tokenizer = bpe('<bos>', '<eos>', '<pad>', image=False, spaces='never')
        hf = transformers.PaliGemmaProcessor(siglip, tokenizer)
        text = {'model_type': 'gemma', 'eos_token_id': tokenizer.eos_token_id}
        vision |= {'model_type': 'siglip_vision_model'}
        config = transformers.PaliGemmaConfig(
            vision_config=vision, text_config=text, image_token_index=hf.image_token_id
        )
    hf.save_pretrained(folder)
    config.save_pretrained(folder)
    return hf


KINDS = ['blip2-opt', 'blip2-t5', 'instructblip-llama', 'instructblip-t5', 'llava-default', 'llava-full', 'paligemma']


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """{kind: (directory, its transformers processor)}"""
    folder = tmp_path_factory.mktemp('models')
    return {kind: (folder / kind, make(kind, folder / kind)) for kind in KINDS}


def prompts(kind):
    return [f'USER: <image>\n{text} ASSISTANT:' for text in TEXTS] if kind.startswith('llava') else TEXTS


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
    assert got['pixel_values'].dtype == np.float32 and got['pixel_values'].shape == (3, 3, SIDE, SIDE)
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
    assert len(set(got['attention_mask'].sum(1))) == 3 and not got['attention_mask'].all(1)[1]
    for row, mask in zip(got['input_ids'], got['attention_mask'], strict=True):
        if 'blip' in kind:
            assert (row[:count] == image).all() and mask[:count].all()
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
        assert read == alone['input_ids'][0].tolist() and len(example['input_ids']) == width
        assert example['decoder_input_ids'].tolist()[: len(target)] == [0, *target[:-1]]
        assert example['decoder_input_ids'].shape == (count,)
    else:
        assert read == [*alone['input_ids'][0], *target[:-1]] and len(example['input_ids']) == width + count - 1
        assert 'decoder_input_ids' not in example
        # The prompt ends where generation starts, and every target comes after what it is predicted from.
        assert example['attention_mask'][width - 1] and example['input_ids'][width - 1] == alone['input_ids'][0, -1]
        assert example['input_ids'][-count:][1 : len(target)].tolist() == target[:-1]
    np.testing.assert_array_equal(example['pixel_values'], alone['pixel_values'][0])
    assert ('token_type_ids' in example) == (kind == 'paligemma')
    for name in ('qformer_input_ids', 'qformer_attention_mask') if 'instruct' in kind else ():
        np.testing.assert_array_equal(example[name][: alone[name].shape[1]], alone[name][0])
        assert example[name].shape == (LAYOUT['prompt_tokens'],) and not example[name][alone[name].shape[1] :].any()


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
    with pytest.raises(DataError, match='<image> stands for an image'):
        processor.prompt(PICTURES[:1], ['<image> a'])
    with pytest.raises(DataError, match=r'cannot be processed'):
        processor.prompt([np.zeros((8, 8, 2), np.uint8)], ['a'])
    with pytest.raises(DataError, match=r'a LLaVA prompt holds <image> once'):
        load_processor(made['llava-full'][0]).prompt(PICTURES[:1], ['a'])


def test_a_caption_needs_no_prompt_but_an_example_needs_a_token_before_the_answer(made):
    processor = load_processor(made['blip2-opt'][0])
    ids = processor.prompt(PICTURES[:1], [''])['input_ids'][0].tolist()
    assert ids[5:] == [processor.hf.tokenizer.bos_token_id] and len(set(ids[:5])) == 1
    assert processor.example(PICTURES[0], '', 'teal', **LAYOUT)['attention_mask'].sum() >= 6
    processor.hf.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single='$A')
    with pytest.raises(DataError, match='the prompt is empty'):
        processor.example(PICTURES[0], '', 'teal', **LAYOUT)


def test_a_processor_can_be_sent_to_a_data_worker(made):
    processor = load_processor(made['llava-default'][0])
    again = pickle.loads(pickle.dumps(processor))
    assert isinstance(again, Processor)
    want, got = (p.prompt(PICTURES[:1], prompts('llava')[:1])['input_ids'] for p in (processor, again))
    np.testing.assert_array_equal(got, want)


def edit(file, change):
    settings = json.loads(file.read_text())
    change(settings)
    file.write_text(json.dumps(settings))


def test_settings_that_old_directories_lack_come_from_config(made, tmp_path):
    """Their image settings lie in preprocessor_config.json, and the model itself made room for the image."""
    for kind in ('blip2-opt', 'llava-default', 'llava-full'):
        folder = tmp_path / kind
        shutil.copytree(made[kind][0], folder)
        settings = json.loads((folder / 'processor_config.json').read_text())
        (folder / 'processor_config.json').unlink()
        images = settings['image_processor'] | {'processor_class': settings['processor_class']}
        (folder / 'preprocessor_config.json').write_text(json.dumps(images))
        got, want = (load_processor(f).prompt(PICTURES, prompts(kind)) for f in (folder, made[kind][0]))
        for name in want:
            np.testing.assert_array_equal(got[name], want[name])


def test_answers_end_with_what_generation_stops_at(made, tmp_path):
    for kind, want in (('blip2-opt', 7), ('paligemma', 9)):
        folder = tmp_path / kind
        shutil.copytree(made[kind][0], folder)
        edit(folder / 'config.json', lambda d: d['text_config'].update(eos_token_id=7))
        (folder / 'generation_config.json').write_text('{"eos_token_id": [9, 8]}')
        example = load_processor(folder).example(PICTURES[0], TEXTS[0], 'teal', **LAYOUT)
        assert example['targets'][example['answer']][-1] == want


@pytest.mark.parametrize(
    'kind, damage, message',
    [
        ('blip2-opt', lambda f: (f / 'config.json').unlink(), 'no config.json'),
        ('blip2-opt', lambda f: (f / 'config.json').write_text('{'), 'config.json cannot be read'),
        ('blip2-opt', lambda f: (f / 'tokenizer.json').unlink(), 'no tokenizer .none of tokenizer.json'),
        ('blip2-opt', lambda f: (f / 'tokenizer.json').write_text('{}'), 'its processor cannot be read'),
        ('blip2-opt', lambda f: (f / 'processor_config.json').unlink(), 'no preprocessor_config.json'),
        ('blip2-opt', lambda f: (f / 'processor_config.json').write_text('{}'), 'no preprocessor_config.json'),
        ('instructblip-t5', lambda f: shutil.rmtree(f / 'qformer_tokenizer'), 'qformer_tokenizer: no tokenizer'),
        (
            'llava-default',
            lambda f: edit(f / 'config.json', lambda d: d.update(image_token_index=32000)),
            '<image> is 4 to the tokenizer, 32000 in config.json',
        ),
        (
            'llava-default',
            lambda f: edit(f / 'processor_config.json', lambda d: d.update(num_additional_image_tokens=0)),
            r'makes 3 image tokens of 28x28 pixels, the model reads\s+4 of 28x28',
        ),
        (
            'paligemma',
            lambda f: edit(f / 'processor_config.json', lambda d: d['image_processor']['size'].update(height=14)),
            'makes 4 image tokens of 14x28 pixels',
        ),
        ('llava-default', lambda f: llama_tokenizer(False).save_pretrained(f), 'no image token'),
    ],
)
def test_a_directory_that_cannot_work_is_named_with_the_reason(made, tmp_path, kind, damage, message):
    folder = tmp_path / 'broken'
    shutil.copytree(made[kind][0], folder)
    damage(folder)
    with pytest.raises(DataError, match=message) as caught:
        load_processor(folder)
    assert str(folder) in str(caught.value)


def test_another_family_is_refused(tmp_path):
    transformers.LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="no image processing for model_type 'llama'"):
        load_processor(tmp_path)


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
