"""What lies in a Hugging Face directory, old or damaged: completed from config.json, or refused with the reason."""

import json
import shutil

import numpy as np
import pytest
import transformers
from tiny_processors import LAYOUT, PICTURES, TEXTS, edit, llama_tokenizer, make, prompts

from sparselora_jax.data.processing import load_processor
from sparselora_jax.runtime.errors import DataError, UnsupportedModelError
from sparselora_jax.runtime.files import StorageError

KINDS = ['blip2-opt', 'instructblip-t5', 'llava-default', 'llava-full', 'paligemma']


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """{kind: (directory, its transformers processor)}"""
    folder = tmp_path_factory.mktemp('models')
    return {kind: (folder / kind, make(kind, folder / kind)) for kind in KINDS}


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
    ('kind', 'damage', 'message'),
    [
        ('blip2-opt', lambda f: (f / 'config.json').unlink(), 'no config.json'),
        ('blip2-opt', lambda f: (f / 'config.json').write_text('{'), 'config.json: not JSON .*char 1'),
        ('blip2-opt', lambda f: (f / 'tokenizer.json').unlink(), 'no tokenizer .none of tokenizer.json'),
        ('blip2-opt', lambda f: (f / 'tokenizer.json').write_text('{}'), 'its processor cannot be read'),
        ('blip2-opt', lambda f: (f / 'processor_config.json').unlink(), 'no preprocessor_config.json'),
        ('blip2-opt', lambda f: (f / 'processor_config.json').write_text('{}'), 'no preprocessor_config.json'),
        ('instructblip-t5', lambda f: shutil.rmtree(f / 'qformer_tokenizer'), 'qformer_tokenizer: no tokenizer'),
        (
            'llava-default',
            lambda f: edit(f / 'config.json', lambda d: d.update(image_token_index=32000)),
            '<image> has id 4 in the tokenizer, 32000 in config.json',
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
    with pytest.raises((DataError, StorageError), match=message) as caught:
        load_processor(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize('is_nested', [True, False])
@pytest.mark.parametrize(
    ('name', 'value', 'expected'),
    [
        ('image_std', [0, 0, 0], 'three numbers above 0'),
        ('image_std', [0.5, 0.5, -0.5], 'three numbers above 0'),
        ('image_std', [0.5, 0.5], 'three numbers above 0'),
        ('image_mean', [0.5, 0.5], 'three numbers'),
        ('image_mean', [0.5, 0.5, float('nan')], 'three numbers'),
        ('image_mean', ['x', 0, 0], 'three numbers'),
        ('rescale_factor', 0, 'a number above 0'),
        ('rescale_factor', float('inf'), 'a number above 0'),
        ('resample', 99, 'the number of a filter of Pillow'),
        ('do_normalize', 'yes', 'true or false'),
        ('size', {'height': 0, 'width': 28}, 'whole numbers above 0'),
        ('size', {'height': -28, 'width': 28}, 'whole numbers above 0'),
    ],
)
def test_an_impossible_setting_of_images_is_named(made, tmp_path, name, value, expected, is_nested):
    folder = tmp_path / 'model'
    shutil.copytree(made['blip2-opt'][0], folder)
    file = folder / 'processor_config.json'
    if is_nested:
        edit(file, lambda fields: fields['image_processor'].update({name: value}))
    else:
        settings = json.loads(file.read_text())
        images = settings['image_processor'] | {'processor_class': settings['processor_class'], name: value}
        file.unlink()
        file = folder / 'preprocessor_config.json'
        file.write_text(json.dumps(images))
    with pytest.raises(StorageError, match=f'{file.name}: {name} .*: expected {expected}'):
        load_processor(folder)


def test_another_family_is_refused(tmp_path):
    transformers.LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="no image processing for model_type 'llama'"):
        load_processor(tmp_path)
