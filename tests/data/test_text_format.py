"""A text format is a template with one place, and lies beside a model as a file that is read back."""

import pytest

from sparselora_jax.data import text_format
from sparselora_jax.data.processor_spec import PROCESSORS
from sparselora_jax.data.text_format import TextFormat
from sparselora_jax.runtime.errors import DataError
from sparselora_jax.runtime.files import StorageError


def test_a_backslash_and_an_n_are_no_new_line():
    with pytest.raises(DataError, match='a backslash and an n are no new line'):
        TextFormat(r'<image>\n{}')
    assert TextFormat('<image>\n{}').write('a') == '<image>\na'


def test_a_question_goes_into_its_place_and_braces_stay():
    assert TextFormat('a {x} {}?').write('{b} {}') == 'a {x} {b} {}?'
    for prompt in ('no place', '{} and {}'):
        with pytest.raises(DataError, match=r'expected {} once'):
            TextFormat(prompt)


def test_what_lies_beside_a_model_is_read_back(tmp_path):
    file, text = tmp_path / text_format.FILE, TextFormat('Q: {}', 9, 2, {'num_beams': 5})
    file.write_text(text_format.dump(text))
    assert text_format.load(tmp_path, TextFormat()) == text
    for damaged in ('', '{', '[]'):
        file.write_text(damaged)
        with pytest.raises(StorageError, match=f'{file.name}: not (JSON .*char|a JSON object)'):
            text_format.load(tmp_path, TextFormat())
    for damaged in ('{"prompts": 1}', '{"prompt": 3}', '{"prompt": "no place"}', '{"prompt_tokens": true}'):
        file.write_text(damaged)
        with pytest.raises(DataError, match=f'{file.name}: not a text format'):
            text_format.load(tmp_path, TextFormat())


def test_a_directory_without_the_file_is_written_to_as_its_family(tmp_path):
    for model_type, prompt in (('llava', 'USER: <image>\nwhy? ASSISTANT:'), ('instructblip', 'why?')):
        assert text_format.load(tmp_path, PROCESSORS.find(model_type).text).write('why?') == prompt
