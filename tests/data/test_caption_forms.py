"""Captions as prompts: cut into a beginning and a rest, or asked for by an instruction."""

import numpy as np
import pytest

from sparselora_jax.data.caption_forms import INSTRUCTIONS, LONGEST_WORDS, clean_caption, divide


def test_captions_are_cleaned_as_the_public_code_does():
    # By the rules of `blip_caption`: ~ and the others of its list become spaces, runs of spaces one.
    caption = '  "Two" dogs (and\ta cat): run.  It\'s 5~6, no-one? #1*; '
    assert clean_caption(caption) == "two dogs and a cat run it's 5 6, no-one? 1"
    assert clean_caption('A ' * 60) == ' '.join(['a'] * LONGEST_WORDS)


@pytest.mark.parametrize('caption', ['ab', 'abc', 'a red bus on a road', 'caf\u00e9 \u6c34\u6c34'])
def test_a_prefix_ends_in_the_first_half_and_nothing_is_lost(caption):
    rng = np.random.default_rng(0)
    cuts = set()
    for _ in range(300):
        head, tail = divide(caption, 'prefix', rng)
        assert head + tail == caption
        cuts.add(len(head))
    assert cuts == set(range(1, len(caption) // 2 + 1))


@pytest.mark.parametrize('caption', ['', 'a'])
def test_what_cannot_be_cut_has_nothing_to_learn(caption):
    assert divide(caption, 'prefix', np.random.default_rng(0)) == (caption, '')


def test_every_instruction_is_drawn_and_the_caption_is_whole():
    rng = np.random.default_rng(0)
    drawn = {divide('a cat', 'instruct', rng) for _ in range(300)}
    assert drawn == {(instruction, 'a cat') for instruction in INSTRUCTIONS}
