"""Score answers to visual questions: generate them in batches, then compare them as text with the true answers."""

import contextlib
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from sparselora_jax.data.dataset import Split
from sparselora_jax.data.processing import Inputs, Picture, Processor
from sparselora_jax.data.text_format import TextFormat
from sparselora_jax.evaluation.generate import generate
from sparselora_jax.evaluation.metric import EXACT_MATCH, Metric, score
from sparselora_jax.models.model import Model
from sparselora_jax.runtime import processes
from sparselora_jax.runtime.ahead import map_ahead
from sparselora_jax.runtime.files import StorageError, write_text


class Answers(NamedTuple):
    """Generated and true answers of the same questions, in order."""

    predicted: list[str]
    true: list[str]

    def scores(self, metric: Metric) -> Float[np.ndarray, ' questions']:
        """Return the metric's score of each answer.

        Args:
          metric: metric that compares an answer with the true one.
        """
        pairs = zip(self.predicted, self.true, strict=True)
        return np.array([score(metric, predicted, true) for predicted, true in pairs], np.float64)

    def accuracy(self, kind_of: Callable[[str], str], metric: Metric = EXACT_MATCH) -> dict[str, float]:
        """Return the mean score: overall, and for each kind of true answer.

        Args:
          kind_of: returns the kind of a true answer, e.g. 'yes/no'.
          metric: metric that compares an answer with the true one.

        Returns:
          Means by name: 'overall', then the kinds in the order in which they first appear.
        """
        scores = self.scores(metric)
        kinds = np.array([kind_of(answer) for answer in self.true])
        # `dict.fromkeys` drops repetitions and, unlike a set, keeps the order.
        by_kind = {str(kind): float(scores[kinds == kind].mean()) for kind in dict.fromkeys(kinds)}
        return {'overall': float(scores.mean())} | by_kind


def generate_answers(
    model: Model,
    weights: dict,
    processor: Processor,
    text: TextFormat,
    images: Sequence[Any],
    questions: Sequence[str],
    **decoding: Any,
) -> list[str]:
    """Answer questions about images.

    Args:
      model: the model.
      weights: its params, or the result of `bind`.
      processor: turns an image and a prompt into arrays, and tokens into text (see `data.processing`).
      text: format of a question. Prompts are padded to `text.prompt_tokens`, so that one shape is compiled.
      images: one per question.
      questions: one per image.
      **decoding: arguments of `generate`: num_beams, max_new_tokens, ...

    Returns:
      One answer per question.
    """
    pairs = zip(images, questions, strict=True)
    examples = [question_example(processor, text, image, question) for image, question in pairs]
    return answer_examples(model, weights, processor, examples, **decoding)


def question_example(processor: Processor, text: TextFormat, image: Picture, question: str) -> Inputs:
    """Return the arrays of a question about an image, for `answer_examples`.

    Args:
      processor: see `generate_answers`.
      text: format of a question.
      image: the image.
      question: the question.

    Raises:
      DataError: the prompt does not fit, or the image cannot be processed.
    """
    # `answer_tokens=1` leaves no room for an answer behind the prompt, since the answer is generated.
    return processor.example(image, text.write(question), prompt_tokens=text.prompt_tokens, answer_tokens=1)


def answer_examples(
    model: Model, weights: dict, processor: Processor, examples: Sequence[Inputs], **decoding: Any
) -> list[str]:
    """Answer a batch of questions.

    Args:
      model: the model.
      weights: see `generate_answers`.
      processor: turns tokens into text.
      examples: results of `question_example`.
      **decoding: arguments of `generate`.

    Returns:
      One answer per question.
    """
    # These arrays hold the answer to train on. Generation begins without one.
    names = examples[0].keys() - {'targets', 'answer', 'decoder_input_ids'}
    batch = {name: np.stack([example[name] for example in examples]) for name in names}
    tokens = generate(model, weights, batch, **decoding)
    # The output repeats the prompt: all of `input_ids`, or the start token of an encoder-decoder.
    prompt_length = 1 if model.is_encoder_decoder else batch['input_ids'].shape[1]
    return processor.decode(tokens[:, prompt_length:])


def evaluate(
    model: Model,
    weights: dict,
    processor: Processor,
    text: TextFormat,
    split: Split,
    indices: Sequence[int],
    *,
    batch: int = 50,
    shuffle_images: bool = False,
    answers_file: Path | None = None,
    answers_owner: str = '',
    threads: int = 1,
    progress: Callable[[int], None] = lambda done: None,
    **decoding: Any,
) -> Answers:
    """Answer the questions `indices` of a split.

    Args:
      model: the model.
      weights: its params, or the result of `bind`.
      processor: see `generate_answers`.
      text: format of a question.
      split: holds the questions, images and true answers.
      indices: which questions, in order.
      batch: number of questions that are answered at once.
      shuffle_images: pair each question with the image of the question half a list further on. The score is then what
        the model reaches without seeing the image.
      answers_file: file to which each answer is appended as a line of JSON. If it exists, the evaluation continues
        after the answers in it.
      answers_owner: whose answers these are; part of the hash in each line, so that a file of another run is noticed.
      threads: number of threads that read records and prepare questions. More than one ask the source for several
        records at once.
      progress: called with the number of answered questions after each batch.
      **decoding: arguments of `generate`.
    """
    source = split.source
    # All processes must continue from the same batch, so they use what the first process reads.
    predicted = processes.agreed(lambda: _read_answers(answers_file, batch, answers_owner))
    # An earlier evaluation may have answered more questions than this one asks.
    predicted = predicted[: len(indices)]
    # The images of answered questions need not be read again, only their answers.
    texts = split.read_texts() if predicted else []
    true = [texts[index][1] for index in indices[: len(predicted)]]

    def read(place: int) -> tuple[Inputs, str]:
        record = source[indices[place]]
        image = record['image']
        if shuffle_images:
            image = source[indices[(place + len(indices) // 2) % len(indices)]]['image']
        return question_example(processor, text, image, record['question']), record['answer']

    lines = _AnswerLines(answers_owner)
    lines.following(predicted)
    remaining = range(len(predicted), len(indices))
    # While the model answers a batch, the next one is read and prepared, and no more: images are large.
    questions = map_ahead(read, remaining, ahead=batch, threads=threads)
    with contextlib.closing(questions):
        while len(predicted) < len(indices):
            examples, true_answers = zip(*islice(questions, batch), strict=True)
            true += true_answers
            # The last batch is padded with its last question, so that one shape is compiled.
            padded = examples + examples[-1:] * (batch - len(examples))
            answers = answer_examples(model, weights, processor, padded, **decoding)[: len(examples)]
            predicted += answers
            # Written after each batch, so that a killed process loses no more than one.
            if answers_file is not None and processes.first():
                with answers_file.open('a') as file:
                    file.writelines(lines.following(answers))
            progress(len(predicted))
    return Answers(predicted, true)


class _AnswerLines:
    """Writes the lines of a file of answers: each answer, and a hash of all answers up to it."""

    def __init__(self, owner: str):
        self._so_far = hashlib.sha256(owner.encode())

    def following(self, answers: Sequence[str]) -> list[str]:
        """Return the lines of the next answers."""
        lines = []
        for answer in answers:
            # As JSON, since a model may answer with half of a surrogate pair, and so that 'ab', 'c' is not 'a', 'bc'.
            self._so_far.update(json.dumps(answer).encode())
            lines.append(json.dumps([answer, self._so_far.hexdigest()[:16]]) + '\n')
        return lines


def _read_answers(answers_file: Path | None, batch: int, owner: str) -> list[str]:
    """Read the whole batches of answers in a file, and remove the rest from the file.

    A killed process may leave half a batch or half a line. Continuing from a whole batch gives the same batches, and so
    the same answers, as an uninterrupted run.

    Raises:
      StorageError: a whole line is damaged, or is an answer of another run; names it.
    """
    if answers_file is None or not answers_file.exists():
        return []
    lines = [line for line in answers_file.read_bytes().splitlines(keepends=True) if line.endswith(b'\n')]
    incomplete = len(lines) % batch
    if incomplete:
        note = f'{incomplete} answers after the last whole batch are computed again'
        print(f'note: {answers_file}: {note}', file=sys.stderr, flush=True)
    lines = lines[: len(lines) - incomplete]
    answers = []
    for line in lines:
        answer = _parse_answer(line)
        if answer is None:
            break
        answers.append(answer)
    # After the last answer there may be a line that is none.
    expected = zip_longest(lines, _AnswerLines(owner).following(answers), fillvalue='')
    for number, (line, of_answer) in enumerate(expected, start=1):
        if line != of_answer.encode():
            what = 'damaged, or an answer of another run, with another batch, prompt or decoding'
            raise StorageError(f'{answers_file}, line {number}: {what}; delete the file to answer all again')
    write_text(answers_file, b''.join(lines).decode())
    return answers


def _parse_answer(line: bytes) -> str | None:
    """Return the answer in a line, or None if the line is damaged."""
    try:
        answer, _ = json.loads(line)
    except (ValueError, TypeError, RecursionError):  # thousands of brackets exhaust the stack
        return None
    return answer if isinstance(answer, str) else None


def blind_floor(train: Sequence[tuple[str, str]], test: Sequence[tuple[str, str]]) -> Answers:
    """Answer each question with its most frequent training answer, which needs no image.

    This is the best score that a model without the image can reach. A question that does not occur in training gets the
    most frequent answer overall.

    Args:
      train: pairs of question and answer.
      test: pairs of question and answer.
    """
    counts: dict[str, dict[str, int]] = {}
    overall: dict[str, int] = {}
    for question, answer in train:
        counts_of_question = counts.setdefault(question, {})
        counts_of_question[answer] = counts_of_question.get(answer, 0) + 1
        overall[answer] = overall.get(answer, 0) + 1
    # Sorted, so that ties are broken alphabetically and not by the order of the training records.
    fallback = max(sorted(overall), key=overall.get)
    guesses = {question: max(sorted(answers), key=answers.get) for question, answers in counts.items()}
    return Answers([guesses.get(question, fallback) for question, _ in test], [answer for _, answer in test])


def sample(count: int, total: int, *, seed: int) -> list[int]:
    """Return the indices of `count` of `total` questions, the same ones for every model.

    Args:
      count: number of questions to choose; all if `total` is not larger.
      total: number of questions to choose from.
      seed: seed of the choice.
    """
    if count >= total:
        return list(range(total))
    return sorted(np.random.default_rng(seed).choice(total, count, replace=False).tolist())
