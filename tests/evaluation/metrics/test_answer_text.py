"""Normalisation against LAVIS's functions, a naive version written from the rules, and cases computed by hand."""

import random

import answer_pairs
import lavis_evaluator
import pytest

from sparselora_jax.evaluation.metrics import answer_text


@pytest.mark.parametrize(
    ('text', 'want'),
    [
        ('1,000', '1000'),
        ('T-shirt', 't shirt'),
        ('black / white', 'black white'),
        ('2:30', '2:30'),
        ('U.S.', 'us'),
        ('3.', '3'),
        ('3.5', '3.5'),
        ('x.5', 'x.5'),
        ('none', '0'),
        ('None of the ten', '0 of 10'),
        ('eleven', 'eleven'),
        ('a', ''),
        ('', ''),
        ("hes at the oclock's", "he's at oclock's"),
        ('Im', 'im'),
        ("somebody'd", 'somebodyd'),
        ("couldnt've couldn'tve couldntve", "couldn't've couldn't've couldntve"),
        ("'ow'sat", "'ow's'at"),
        # A space beside one dash deletes both; without one, both become spaces.
        ('a-b -c', 'ab c'),
        ('x-y-z', 'x y z'),
        # A comma in a number deletes every mark.
        ('1,000-2,000/day', '10002000day'),
        # The 33rd full stop stays.
        ('.' * 33 + 'x', '.x'),
        ('٣,٤-٣', '٣٤٣'),
        ('naïve\u2028café\xa0\n ok', 'naïve café ok'),
    ],
)
def test_official_texts_computed_by_hand(text, want):
    assert answer_text.official_text(text) == want


@pytest.mark.parametrize(
    ('text', 'want'),
    [
        ("It's 1,000?", "it 's 1000"),
        # Commas are gone before a comma in a number is looked for, so the dash becomes a space.
        ('1,000-2', '1000 2'),
        ("McDonald's\n", "mcdonald 's"),
        ('Two', '2'),
        ("that's", "that 's"),
        ('thats', "that's"),
    ],
)
def test_evalai_texts_computed_by_hand(text, want):
    assert answer_text.evalai_text(text) == want


def test_there_are_120_contractions():
    assert len(answer_text.CONTRACTIONS) == 120
    assert answer_text.CONTRACTIONS['wont'] == "won't"
    assert answer_text.CONTRACTIONS["let's"] == "let's"


def naive_punctuation(text):
    """Step 1, character by character."""

    def at(position):
        return text[position] if 0 <= position < len(text) else 'x'

    positions = range(len(text))
    has_number = any(
        at(position) == ',' and at(position - 1).isdecimal() and at(position + 1).isdecimal() for position in positions
    )
    beside_a_space = {at(position) for position in positions if ' ' in (at(position - 1), at(position + 1))}
    spaced = ''
    for character in text:
        if character not in ';/[]"{}()=+\\_-><@`,?!':
            spaced += character
        elif not has_number and character not in beside_a_space:
            spaced += ' '
    without = ''
    deleted = 0
    for position, character in enumerate(spaced):
        if character == '.' and deleted < 32 and not spaced[position + 1 : position + 2].isdecimal():
            deleted += 1
        else:
            without += character
    return without


def test_punctuation_is_that_of_a_naive_version():
    rng = random.Random(0)
    for _ in range(3000):
        text = answer_pairs.text(rng)
        assert answer_text.drop_punctuation(text) == naive_punctuation(text), repr(text)


def test_the_tables_are_those_of_lavis():
    tool = lavis_evaluator.evaluator()
    assert tool.contractions == answer_text.CONTRACTIONS
    assert tool.manualMap == answer_text.NUMBERS
    assert set(tool.articles) == answer_text.ARTICLES


def test_texts_are_those_of_lavis():
    tool = lavis_evaluator.evaluator()
    rng = random.Random(1)
    changed = 0
    for _ in range(3000):
        text = answer_pairs.text(rng)
        without = tool.processPunctuation(text)
        assert answer_text.drop_punctuation(text) == without, repr(text)
        assert answer_text.unify_words(text) == tool.processDigitArticle(text), repr(text)
        assert answer_text.official_text(text) == tool.processDigitArticle(without), repr(text)
        changed += text != without
    assert changed > 1000  # the texts are such that there is something to compare


def test_a_remembered_function_is_called_once_for_each_text():
    calls = []
    remembered = answer_text.Remembered(lambda text: calls.append(text) or text.upper())
    assert [remembered[text] for text in ('yes', 'no', 'yes')] == ['YES', 'NO', 'YES']
    assert calls == ['yes', 'no']
