"""Compute VQA accuracy: VQAv2, OK-VQA, TextVQA, VizWiz.

An answer counts in full if at least three other annotators gave it (Antol et al., VQA: Visual Question Answering, 2015,
section 3.3). Each annotator is left out in turn, and the scores are averaged. Rules differ in how they normalise texts:

- `official` (VQAv2, OK-VQA): the evaluator GT-Vision-Lab/VQA. It normalises the prediction and the references, but only
  if the references differ.
- `lavis` (the paper): `vqa_eval.py` of LAVIS. It always normalises the prediction. Of references that differ, it only
  removes the punctuation.
- `evalai` (TextVQA, VizWiz): EvalAI, Pythia and LLaVA. They always normalise both (see `answer_text.evalai_text`).

Under `lavis`, the reference 'two' never equals the prediction 'two', which has become '2'.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Protocol

import numpy as np

from sparselora_jax.evaluation.metrics.answer_text import (
    Remembered,
    drop_punctuation,
    evalai_text,
    official_text,
    strip_lines,
)
from sparselora_jax.evaluation.metrics.lemmas import SPACY_MODEL, load_lemmatiser
from sparselora_jax.evaluation.metrics.scored import GroupedMeans, check_texts, grouped_means
from sparselora_jax.runtime.errors import DataError

# The number of other annotators who must agree for a full score.
ENOUGH = 3
NOT_LEMMATISED = (
    'predictions were not lemmatised, which usually lowers scores on OK-VQA: '
    f'install spaCy and its model {SPACY_MODEL} to compare with LAVIS'
)


class _Rule(Protocol):
    """Counts the references that equal a prediction."""

    def matches(self, prediction: str, references: Sequence[str]) -> int:
        """Return how many of the references equal the prediction."""


class _Official:
    """The rule of the official evaluator."""

    def __init__(self):
        self.stripped = Remembered(strip_lines)
        self.normalised = Remembered(official_text)

    def matches(self, prediction: str, references: Sequence[str]) -> int:
        predicted = self.stripped[prediction]
        answers = [self.stripped[reference] for reference in references]
        # References that all agree are compared as they are: the answer 'none' then does not equal '0'.
        if answers.count(answers[0]) < len(answers):
            predicted = self.normalised[predicted]
            answers = [self.normalised[answer] for answer in answers]
        return answers.count(predicted)


class _Lavis:
    """The rule of LAVIS, which normalises the two sides differently."""

    def __init__(self):
        self.predictions = Remembered(lambda text: official_text(strip_lines(text)))
        self.references = Remembered(drop_punctuation)

    def matches(self, prediction: str, references: Sequence[str]) -> int:
        answers = references
        # LAVIS applies step 1 to references, but not step 2: words keep their capitals, articles and apostrophes.
        # References keep line breaks and surrounding spaces, also where it is decided whether they differ.
        if references.count(references[0]) < len(references):
            answers = [self.references[reference] for reference in references]
        return answers.count(self.predictions[prediction])


class _EvalAI:
    """The rule of EvalAI and Pythia."""

    def __init__(self):
        self.normalised = Remembered(evalai_text)

    def matches(self, prediction: str, references: Sequence[str]) -> int:
        # Unlike the others, this rule does not look whether the references agree.
        return [self.normalised[reference] for reference in references].count(self.normalised[prediction])


# Classes and not instances: an instance remembers texts.
RULES: dict[str, type[_Rule]] = {'official': _Official, 'lavis': _Lavis, 'evalai': _EvalAI}


def vqa_accuracy(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    rule: str = 'official',
    groups: Mapping[str, Sequence[str]] | None = None,
    lemmatise: bool = False,
) -> GroupedMeans:
    """Score answers to visual questions against the answers of several annotators.

    Args:
      predictions: the generated answers.
      references: for each question, the answers of its annotators, usually 10. OK-VQA: `answer`, not `raw_answer`.
      rule: 'official', 'lavis' or 'evalai' (see the top of this module).
      groups: for each grouping, the group of every question. The official evaluator groups VQAv2 by 'answer_type' and
        'question_type', VizWiz is grouped by 'answer_type'.
      lemmatise: replace nouns and verbs of predictions by their lemmas first, as LAVIS does for OK-VQA. If spaCy or its
        model is missing, scores are computed without this step, and a note of the result says so.

    Returns:
      Scores from 0 to 1, and their means. `rounded(result.aggregate())` has the values that the official evaluator
      prints. (It adds scores such as 0.6000000000000001, so the last digit of a mean that lies exactly halfway between
      two rounded values may differ.)

    Raises:
      DataError: lists differ in length, an entry is not a text, a question has fewer than two references, or there is
        no such rule.

    >>> result = vqa_accuracy(['2 dogs', 'red'], [['two dogs'] * 3 + ['dogs'] * 7, ['red', 'blue'] * 5])
    >>> result.per_item
    array([0.9, 1. ])
    """
    if rule not in RULES:
        raise DataError(f'rule {rule!r}: expected one of {", ".join(RULES)}')
    # All input is checked before the first text is scored, so a mistake is reported at once.
    check_texts(predictions, 'prediction')
    _check_references(references, len(predictions))
    notes = _notes_on_counts(references)
    if lemmatise:
        lemmatiser = load_lemmatiser()
        if lemmatiser is None:
            notes.append(NOT_LEMMATISED)
        else:
            # spaCy takes milliseconds for a text, and a model gives the same short answers again and again.
            lemmas = Remembered(lemmatiser)
            predictions = [lemmas[prediction] for prediction in predictions]
    # A new instance, so that the remembered texts are freed with it.
    text_rule = RULES[rule]()
    scores = [
        leave_one_out(text_rule.matches(prediction, answers), len(answers))
        for prediction, answers in zip(predictions, references, strict=True)
    ]
    return grouped_means(np.array(scores, np.float64), groups, notes)


@cache
def leave_one_out(matches: int, references: int) -> float:
    """Return the mean score of an answer when each reference is left out in turn.

    With reference i left out, the answer scores min(1, m / 3), where m of the other references equal it. The official
    evaluator applies this to any number of references. So with two or three, even an answer that all annotators gave
    scores only 1/3 or 2/3.

    Args:
      matches: number of references that equal the answer.
      references: number of references, at least two.

    >>> [leave_one_out(matches, 10) for matches in range(5)]
    [0.0, 0.3, 0.6, 0.9, 1.0]
    """
    when_a_match_is_left_out = min(ENOUGH, matches - 1)
    when_another_is_left_out = min(ENOUGH, matches)
    total = matches * when_a_match_is_left_out + (references - matches) * when_another_is_left_out
    # One division of integers: a sum of thirds would give 0.6000000000000001.
    return total / (ENOUGH * references)


def _check_references(references: Sequence[Sequence[str]], items: int) -> None:
    """Check that each question has at least two references, and that all are texts.

    Raises:
      DataError: names the question.
    """
    if len(references) != items:
        raise DataError(f'{len(references):,} lists of references for {items:,} predictions: expected one for each')
    for index, answers in enumerate(references):
        # A text is a sequence of texts too: its characters.
        if not isinstance(answers, list | tuple):
            raise DataError(f'references {index} are {answers!r}: expected a list of texts')
        # The official evaluator would give 0 to every answer, because nothing is left to compare with.
        if len(answers) < 2:
            raise DataError(
                f'references {index} are {answers!r}: VQA accuracy leaves one out, so it needs at least two; '
                'use exact match for single references'
            )
        for answer in answers:
            if not isinstance(answer, str):
                raise DataError(f'references {index} contain {answer!r}: expected texts')


def _notes_on_counts(references: Sequence[Sequence[str]]) -> list[str]:
    """Return a note if some questions have too few references for a full score."""
    # Each question is looked at, because a data set of one's own may mix counts.
    counts = Counter(map(len, references))
    too_few = sum(number for count, number in counts.items() if count <= ENOUGH)
    if not too_few:
        return []
    return [f'{too_few:,} questions have fewer than {ENOUGH + 1} references, so no answer to them can score 1']
