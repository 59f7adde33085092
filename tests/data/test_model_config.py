"""Values that no model can have are refused where config.json is read, with file, field, value and expectation."""

import json
import re

import pytest
import transformers

from sparselora_jax.data import model_config
from sparselora_jax.models import family
from sparselora_jax.runtime.files import StorageError

NAN = float('nan')
INF = float('inf')
WRONG = {
    'intermediate_size': (0, -4, 1.5, 'x', True, 2**31, NAN),
    'num_hidden_layers': (0, -1, 10**9),
    'vocab_size': (0, -1, 10**12),
    'num_attention_heads': (0, -4),
    'num_key_value_heads': (0, 3),
    'head_dim': (-8, 7),
    'rms_norm_eps': (-1, 0, NAN, INF, 1.0, 'x'),
    'rope_theta': (0, -1.0, NAN, INF),
    'rope_scaling': ({'rope_type': 'linear', 'factor': 0.0}, {'rope_type': 'linear', 'factor': NAN}),
    'attention_dropout': (-0.1, 1.5, NAN),
    'tie_word_embeddings': ('yes', 1),
    'eos_token_id': (40, -1, 1.5, [2, 40]),
    'pad_token_id': (40, -2),
    'bos_token_id': (10**9,),
}
LLAMA = {
    'vocab_size': 40,
    'hidden_size': 32,
    'intermediate_size': 48,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
}


def write(folder, fields):
    (folder / 'config.json').write_text(json.dumps(fields))
    return folder


def llama(**fields):
    return json.loads(transformers.LlamaConfig(**LLAMA).to_json_string()) | fields


@pytest.mark.parametrize(('name', 'value'), [(name, value) for name, values in WRONG.items() for value in values])
def test_an_impossible_value_is_named(tmp_path, name, value):
    fields = llama(**{name: value})
    # Newer files keep the base of the rotary positions in a group of its own.
    if name.startswith('rope_'):
        del fields['rope_parameters']
    with pytest.raises(StorageError) as error:
        model_config.parse(write(tmp_path, fields))
    assert str(error.value).startswith(f'{tmp_path / "config.json"}: ')
    shown = re.escape(repr(value['factor'] if isinstance(value, dict) else value))
    named = f'(rope_scaling.factor|num_attention_heads|num_key_value_heads|{name}) .*({shown}|7|3)'
    assert re.search(f'{named}.*(expected|does not divide)', str(error.value))
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'image_token_index': -1}, 'image_token_index -1: expected a token, 0 or more'),
        ({'text_config': {'rms_norm_eps': -1}}, 'text_config.rms_norm_eps -1: expected a number between 0 and 1'),
        (
            {'text_config': {'num_attention_heads': 5}},
            'text_config.num_key_value_heads 2: does not divide num_attention',
        ),
        ({'vision_config': {'patch_size': 0}}, 'vision_config.patch_size 0: expected a whole number from 1 to '),
        ({'vision_config': {'layer_norm_eps': NAN}}, 'vision_config.layer_norm_eps nan: expected a number between'),
    ],
)
def test_a_field_of_a_tower_is_named_with_its_tower(tmp_path, change, message):
    fields = {'model_type': 'llava', 'image_token_index': 39, 'text_config': llama()}
    changed = {
        name: {**fields.get(name, {}), **value} if isinstance(value, dict) else value for name, value in change.items()
    }
    with pytest.raises(StorageError, match=f'config.json: {message}'):
        model_config.parse(write(tmp_path, fields | changed))


def test_the_image_token_may_lie_behind_the_vocabulary(tmp_path):
    fields = {'model_type': 'llava', 'image_token_index': 40, 'text_config': llama()}
    assert model_config.parse(write(tmp_path, fields)).image_token_id == 40


@pytest.mark.parametrize('name', sorted({name.partition('/')[0] for name in family.FAMILIES}))
def test_the_defaults_of_every_model_type_are_possible(tmp_path, name):
    config = transformers.AutoConfig.for_model(name)
    config.save_pretrained(tmp_path)
    assert model_config.parse(tmp_path).model_type == name


@pytest.mark.parametrize('text', ['', '{', '[]', '{"model_type": 3}', '{}', '[' * 200_000])
def test_a_damaged_config_is_named(tmp_path, text):
    (tmp_path / 'config.json').write_text(text)
    with pytest.raises(StorageError, match=r'config\.json: (not JSON|not a JSON object|model_type)'):
        model_config.parse(tmp_path)


def test_a_pad_of_minus_one_stands_for_none(tmp_path):
    assert model_config.parse(write(tmp_path, llama(pad_token_id=-1))).pad_token_id == -1
