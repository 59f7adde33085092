"""Accuracy on visual questions: answers are generated, then compared as text."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sparselora_jax.data.dataset import Split
from sparselora_jax.data.text_format import TextFormat
from sparselora_jax.evaluation.generate import generate
from sparselora_jax.models.model import Model
from sparselora_jax.runtime import processes
from sparselora_jax.runtime.files import write_text


class Answers(NamedTuple):
    """Generated and true answers of the same questions, in order."""

    predicted: list[str]
    true: list[str]

    @property
    def correct(self) -> np.ndarray:
        """True where the whole answer is right; upper and lower case are the same."""
        return np.array([p.lower() == t.lower() for p, t in zip(self.predicted, self.true, strict=True)])

    def accuracy(self, kind_of: Callable[[str], str]) -> dict[str, float]:
        """Share of right answers: overall and per kind of true answer, in the order in which kinds appear."""
        kinds = np.array([kind_of(answer) for answer in self.true])
        by_kind = {str(kind): float(self.correct[kinds == kind].mean()) for kind in dict.fromkeys(kinds)}
        return {'overall': float(self.correct.mean())} | by_kind


def generate_answers(
    model: Model,
    weights: dict,
    processor: Any,
    text: TextFormat,
    images: Sequence[Any],
    questions: Sequence[str],
    **settings: Any,
) -> list[str]:
    """Answers to questions about images.

    Args:
      text: how a question is written; prompts are padded to its `prompt_tokens`, so that one shape is compiled.
      settings: of `generate`: num_beams, max_new_tokens, ...
    """
    size = {'prompt_tokens': text.prompt_tokens, 'answer_tokens': 1}  # room for no token of an answer
    rows = [
        processor.example(image, text.write(question), **size)
        for image, question in zip(images, questions, strict=True)
    ]
    read = rows[0].keys() - {'targets', 'answer', 'decoder_input_ids'}
    batch = {name: np.stack([row[name] for row in rows]) for name in read}
    new = generate(model, weights, batch, **settings)
    start = 1 if model.is_encoder_decoder else batch['input_ids'].shape[1]
    return processor.decode(new[:, start:])


def evaluate(
    model: Model,
    weights: dict,
    processor: Any,
    text: TextFormat,
    split: Split,
    indices: Sequence[int],
    *,
    batch: int = 50,
    shuffle_images: bool = False,
    kept: Path | None = None,
    progress: Callable[[int], None] = lambda done: None,
    **settings: Any,
) -> Answers:
    """Answers the questions `indices` of a split.

    Args:
      shuffle_images: each question gets the image of the question half the list further on; what is then still right
        is the image-blind floor.
      kept: a file of the answers so far, a line each: an evaluation that was cut off goes on after them.
      settings: of `generate`.
    """
    source = split.source
    predicted = processes.agreed(lambda: _read_answers(kept, batch))
    true = [source[index]['answer'] for index in indices[: len(predicted)]]
    for first in range(len(predicted), len(indices), batch):
        records = [source[index] for index in indices[first : first + batch]]
        true += [record['answer'] for record in records]
        if shuffle_images:
            others = [indices[(first + i + len(indices) // 2) % len(indices)] for i in range(len(records))]
            records = [r | {'image': source[other]['image']} for r, other in zip(records, others, strict=True)]
        rows = records + records[-1:] * (batch - len(records))  # the last batch is filled up: one shape is compiled
        images, questions = ([row[name] for row in rows] for name in ('image', 'question'))
        new = generate_answers(model, weights, processor, text, images, questions, **settings)[: len(records)]
        predicted += new
        if kept is not None and processes.first():
            with kept.open('a') as file:
                file.writelines(json.dumps(answer) + '\n' for answer in new)
        progress(len(predicted))
    return Answers(predicted, true)


def _read_answers(kept: Path | None, batch: int) -> list[str]:
    """The whole batches of answers in a file; what a killed process left behind them is cut off."""
    if kept is None or not kept.exists():
        return []
    lines = [line for line in kept.read_text().splitlines(keepends=True) if line.endswith('\n')]
    lines = lines[: len(lines) // batch * batch]
    write_text(kept, ''.join(lines))
    return [json.loads(line) for line in lines]


def blind_floor(train: Sequence[tuple[str, str]], test: Sequence[tuple[str, str]]) -> Answers:
    """What a model that never sees an image can reach: the most frequent training answer of each (question, answer)."""
    counts: dict[str, dict[str, int]] = {}
    overall: dict[str, int] = {}
    for question, answer in train:
        of_question = counts.setdefault(question, {})
        of_question[answer] = of_question.get(answer, 0) + 1
        overall[answer] = overall.get(answer, 0) + 1
    most_frequent = max(sorted(overall), key=overall.get)
    guess = {question: max(sorted(answers), key=answers.get) for question, answers in counts.items()}
    return Answers([guess.get(question, most_frequent) for question, _ in test], [answer for _, answer in test])


def sample(count: int, total: int, *, seed: int) -> list[int]:
    """`count` of `total` questions, the same ones for every model; all of them if `count` is not smaller."""
    if count >= total:
        return list(range(total))
    return sorted(np.random.default_rng(seed).choice(total, count, replace=False).tolist())
