"""How families are asked in tasks: the prompts and the decoding of the paper's scripts and of the models' papers."""

from dataclasses import replace

import pytest
from tiny_families import FAMILIES

from sparselora_jax.models.model import from_hf
from sparselora_jax.runtime.errors import UnsupportedModelError

KINDS = ('answer', 'caption', 'choice', 'yes_no')
# Of the paper's scripts: prompt, and arguments of `generate`.
PAPER = {
    ('blip-2 t5', 'answer'): (
        'Question: {} Short answer:',
        {'num_beams': 5, 'max_new_tokens': 10, 'length_penalty': -1.0},
    ),
    ('blip-2 opt', 'answer'): (
        'Question: {} Short answer:',
        {'num_beams': 5, 'max_new_tokens': 10, 'length_penalty': 0.0, 'eos_token_id': 50118},
    ),
    ('instructblip t5', 'answer'): (
        'Question: {} Short answer:',
        {'num_beams': 5, 'max_new_tokens': 10, 'length_penalty': -1.0, 'repetition_penalty': 1.5},
    ),
    ('instructblip llama', 'answer'): (
        'Question: {} Short answer:',
        {'num_beams': 5, 'max_new_tokens': 9, 'length_penalty': 0.0, 'repetition_penalty': 1.5},
    ),
    ('blip-2 t5', 'caption'): ('{}', {'num_beams': 5, 'max_new_tokens': 30, 'min_length': 8, 'length_penalty': 1.0}),
}


def config(name):
    return from_hf(FAMILIES[name][1]())


@pytest.mark.parametrize(('name', 'kind'), PAPER)
def test_the_paper_s_models_are_asked_as_in_its_scripts(name, kind):
    cfg = config(name)
    # The published vocabulary; nothing else of the model matters.
    cfg = replace(cfg, language=replace(cfg.language, vocab=50272))
    asked = cfg.family.task_format(cfg, kind)
    assert (asked.text.prompt, asked.text.decoding) == PAPER[name, kind]


@pytest.mark.parametrize('name', [name for name in FAMILIES if name not in ('llama', 'opt')])
@pytest.mark.parametrize('kind', KINDS)
def test_every_family_of_images_is_asked_in_every_kind_of_task(name, kind):
    cfg = config(name)
    asked = cfg.family.task_format(cfg, kind)
    # A caption has no question; whatever stands in its place is part of the prompt.
    question = asked.question(None if kind == 'caption' else 'Is this a cat?')
    prompt = asked.text.write(question)
    assert ('a cat?' in prompt) == (kind != 'caption')
    assert prompt.count('<image>') == ('<image>' in cfg.family.processor.text.prompt)
    assert asked.text.decoding['max_new_tokens'] >= 9


def test_blip_2_reads_questions_as_lavis_prepares_them():
    cfg = config('blip-2 t5')
    asked = cfg.family.task_format(cfg, 'answer')
    assert asked.question('What is *this*: a "Cat"?') == 'what is this a cat?'
    assert len(asked.question('word ' * 99).split()) == 50


def test_choices_get_letters_and_their_context_comes_first():
    cfg = config('llava')
    asked = cfg.family.task_format(cfg, 'choice')
    assert asked.question('Which?', ['ice', 'fire'], 'It is cold.') == 'It is cold.\nWhich?\nA. ice\nB. fire'


def test_a_language_model_has_no_task_of_images():
    cfg = config('llama')
    with pytest.raises(UnsupportedModelError, match='read no images'):
        cfg.family.task_format(cfg, 'answer')


def test_words_that_were_read_in_the_image_stand_where_llava_was_evaluated_with_them():
    cfg = config('llava')
    asked = cfg.family.task_format(cfg, 'answer')
    question = asked.question('What brand?', context='nokia, 5{}G', has_read_words=True)
    assert question == 'What brand?\nReference OCR token: nokia, 5{}G'
    assert 'nokia, 5{}G\nAnswer the question using a single word or phrase. ASSISTANT:' in asked.text.write(question)
    # No line for an image without words, and none for a context of another kind.
    assert asked.question('What brand?', has_read_words=True) == 'What brand?'
    assert asked.question('What brand?', context='It is cold.') == 'It is cold.\nWhat brand?'
