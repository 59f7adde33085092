"""Answers and references that look like those of VQA, and many that break careless normalisation."""

import random
from typing import NamedTuple

USUAL = ('yes', 'no', 'red', 'blue', 'teddy bear', '2')
# 'hes', 'Im', "yall'd've" and the like are changed by the evaluators; '٣' is a digit of another script; 'İ' grows
# when it is lower-cased. In `SPACES`, not every function knows the last ones.
_WORDS = """
yes no red blue cat dogs surfing frisbee skateboard pizza street white black teddy bear none zero one two three five
ten eleven Two TEN a an the A The don't hes Im I'm ive shes she's lets let's somebody'd couldn't've
couldnt've yall yall'd've y'alld've 'ow'sat o'clock man's McDonald's café naïve İstanbul ÉCOLE ß № 東京 emoji😀
1 2 10 1,000 12,345,678 2.5 3. .5 U.S. a.m. 10:30 3-4 1/2 50% $5 #1 T-shirt black-and-white and/or e_mail @home x=y
(left) [1] {2} "quoted" 'single' “curly” \u2018so\u2019 it… 5,a a,5 ٣ ٣,٤ v1.2.3 ... ?! www.a.com C++ a;b back\\slash
`tick` <b> ~ ^ & *
"""
WORDS = _WORDS.split()
# Without apostrophes, as many people type: most of these are keys of the evaluators' contractions.
WORDS += [word.replace("'", '') for word in WORDS if "'" in word]
MARKS = [*';/[]"{}()=+\\_-><@`,?!.', "'", ':', '&', '…', '\u2013', "'s", '...', '.' * 33, '. ' * 40]
SPACES = [' ', ' ', ' ', ' ', '  ', '\n', '\t', '\r', '\xa0', '\u2028', '']
ANSWER_TYPES = ('yes/no', 'number', 'other')


class Pairs(NamedTuple):
    """A prediction, ten references and two types for each question."""

    predictions: list[str]
    references: list[list[str]]
    answer_types: list[str]
    question_types: list[str]


def text(rng):
    """One answer: empty, a usual one, or up to five words and marks in any order."""
    kind = rng.random()
    if kind < 0.03:
        return rng.choice(['', ' ', '\n', 'a', 'the a', '.', ','])
    if kind < 0.4:
        return rng.choice(WORDS)
    pieces = []
    for _ in range(rng.randint(1, 5)):
        pieces.append(rng.choice(MARKS) if rng.random() < 0.3 else rng.choice(WORDS))
        pieces.append(rng.choice(SPACES))
    return ''.join(pieces)


def variant(rng, answer):
    """An answer that means the same to some evaluators, and differs for others."""
    changes = (
        lambda: answer,
        lambda: answer.upper(),
        lambda: answer.capitalize(),
        lambda: f'a {answer}',
        lambda: f'The {answer}.',
        lambda: f' {answer}\n',
        lambda: answer.replace(' ', rng.choice(['-', '/', ', ', '\n'])),
        lambda: answer.replace("'", ''),
        lambda: answer.replace('2', 'two').replace('10', 'ten'),
        lambda: answer + rng.choice(MARKS),
        lambda: rng.choice(MARKS) + answer,
    )
    return rng.choice(changes)()


def pairs(count, seed, references=10):
    """Draw questions; a third have references that all agree, and most predictions equal some reference."""
    rng = random.Random(seed)
    drawn = Pairs([], [], [], [])
    for _ in range(count):
        answers = [text(rng) for _ in range(rng.randint(1, 3))]
        kind = rng.random()
        if kind < 0.3:
            listed = [rng.choice(USUAL[:4]) for _ in range(references)]
        elif kind < 0.6:
            listed = [answers[0] if kind < 0.5 else rng.choice(USUAL)] * references
        else:
            listed = [variant(rng, rng.choice(answers)) for _ in range(references)]
        prediction = rng.choice(listed) if rng.random() < 0.9 else text(rng)
        drawn.predictions.append(variant(rng, prediction) if rng.random() < 0.5 else prediction)
        drawn.references.append(listed)
        drawn.answer_types.append(rng.choice(ANSWER_TYPES))
        drawn.question_types.append(rng.choice(('what is', 'is the', 'how many', 'none of the above')))
    return drawn
