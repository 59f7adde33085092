"""The words of a caption are those of Stanford's PTBTokenizer after COCO's removal of punctuation."""

import random
import re
from pydoc_data.topics import topics

import pytest
from coco_oracle import needs_java, scorer
from ptb_cases import CASES

from sparselora_jax.evaluation.metrics.ptb_tokenizer import tokenize

# What COCO's evaluation code removes. Its list has brackets in capitals, which lower-casing keeps it from finding.
PUNCTUATION = {"''", "'", '``', '`', '.', '?', '!', ',', ':', '-', '--', '...', ';'}
SPACED_PIECES = (
    "a A I the man The two dogs Foo FOO well-known T-shirt e-mail can't cannot gonna isn't 's ' n't 'n' d' o' y' 12 5 "
    '1990s \'90s 1,000 3.5 5:30 pm p.m. a.m. 1/2 3/4 $ % # & @ * + = _ - -- / . . . , , : ; ! ? ( ) [ ] " " ... U.S. '
    'D.C. St. st. Mr. Dr. no. No. ft. etc. vs. J. K. fig. Wash. La. la. ave. .com www. .jpg in. \u2019 \u201c \u201d '
    '\u2013 é café \xbd \xb0'
)
PIECES = SPACED_PIECES.split(' ')


def stanford_words(captions):
    """Return the words of each caption from the program itself."""
    tokenizer = scorer('tokenizer.ptbtokenizer', 'PTBTokenizer')
    # The program reads ahead into the next line, which is always the same here.
    lines = {image: [{'caption': caption}, {'caption': 'A photo.'}] for image, caption in enumerate(captions)}
    return [pair[0] for pair in tokenizer.tokenize(lines).values()]


@pytest.mark.parametrize(('caption', 'words'), CASES)
def test_words_are_those_that_the_program_printed(caption, words):
    assert tokenize(caption) == words


@pytest.mark.parametrize('caption', [caption for caption, _ in CASES])
def test_words_are_in_lower_case_without_punctuation_and_apart_by_one_space(caption):
    words = tokenize(caption)
    assert words == words.lower() == words.strip(' ')
    assert '' not in words.split(' ') or words == ''
    assert not PUNCTUATION & set(words.split(' '))


def test_a_caption_is_read_alone():
    """The words do not depend on spaces around a caption, and a line feed inside is a space."""
    for caption, words in CASES:
        assert tokenize(f' {caption}\n') == words
        assert tokenize('first words\n' + caption) == f'first words {words}'.strip()


def test_plain_words_are_read_like_words_that_every_rule_is_tried_on(monkeypatch):
    """Most words take a shortcut."""
    monkeypatch.setattr('sparselora_jax.evaluation.metrics.ptb_tokenizer._is_one_token', lambda plain: False)
    for caption, words in CASES:
        assert tokenize(caption) == words


@needs_java
@pytest.mark.slow
def test_the_committed_words_are_those_of_the_program(monkeypatch):
    monkeypatch.setenv('JAVA_TOOL_OPTIONS', '-Dfile.encoding=UTF-8')
    # pycocoevalcap replaces line feeds only; the program also takes other characters for the end of a line.
    cases = [(' '.join(caption.splitlines()), words) for caption, words in CASES]
    assert stanford_words([caption for caption, _ in cases]) == [words for _, words in cases]


@needs_java
@pytest.mark.slow
def test_random_texts_have_the_words_of_the_program(monkeypatch):
    """Pieces of captions in any order, with and without spaces, are far odder than captions."""
    monkeypatch.setenv('JAVA_TOOL_OPTIONS', '-Dfile.encoding=UTF-8')
    generator = random.Random(0)
    captions = [
        ''.join(generator.choice(PIECES) + generator.choice(['', ' ', ' ']) for _ in range(generator.randint(2, 7)))
        for _ in range(5000)
    ]
    different = [
        (caption, tokenize(caption), words)
        for caption, words in zip(captions, stanford_words(captions), strict=True)
        if tokenize(caption) != words
    ]
    assert len(different) <= len(captions) / 1000, different


def sentences_of_pythons_help():
    """English prose that many people wrote, and that no rule here was written for."""
    text = ' '.join(' '.join(topics[name].split()) for name in sorted(topics))
    sentences = (sentence.strip() for sentence in re.split(r'(?<=[.!?])\s+', text))
    return list(dict.fromkeys(sentence for sentence in sentences if 20 < len(sentence) < 200))


@needs_java
@pytest.mark.slow
def test_sentences_that_were_set_aside_have_the_words_of_the_program(monkeypatch):
    monkeypatch.setenv('JAVA_TOOL_OPTIONS', '-Dfile.encoding=UTF-8')
    sentences = sentences_of_pythons_help()
    assert len(sentences) > 2000
    words = stanford_words(sentences)
    different = [pair for pair in zip(sentences, words, strict=True) if tokenize(pair[0]) != pair[1]]
    assert len(different) <= len(sentences) / 1000, different
