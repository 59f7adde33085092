"""Turns records into batches: processes images and texts, and builds a grain pipeline indexed by the step.

`batches(...)[step]` is the batch of a global step. So a checkpoint stores the position in the data as one integer.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import grain
import numpy as np

from sparselora_jax.data.dataset import Dataset, Records, Split
from sparselora_jax.data.text_format import TextFormat
from sparselora_jax.runtime.errors import DataError


@runtime_checkable
class ExampleProcessor(Protocol):
    """The methods of `processing.Processor` used here, declared again so that its module is not imported."""

    def example(
        self, image: np.ndarray | None, prompt: str, answer: str, *, prompt_tokens: int, answer_tokens: int
    ) -> dict[str, np.ndarray]:
        """Return the arrays of one example; see `processing.Processor.example`."""

    def misfit(self, prompt: str, answer: str, *, prompt_tokens: int, answer_tokens: int | None) -> str:
        """Return why the tokens do not fit, or '' if they do; see `processing.Processor.misfit`."""


def vqa_transform(processor: ExampleProcessor, text: TextFormat) -> Callable[[dict], dict]:
    """Return a function that turns a record into the arrays of one example: a model's inputs and its targets.

    Args:
      processor: the model's processor.
      text: the prompt template, and the token limits of prompt and answer.
    """

    def transform(record):
        return processor.example(
            record['image'],
            text.write(record['question']),
            record['answer'],
            prompt_tokens=text.prompt_tokens,
            answer_tokens=text.answer_tokens,
        )

    return transform


def misfit(processor: ExampleProcessor, text: TextFormat, *, answers: bool = True) -> Callable[[str, str], str]:
    """Return a function that maps (question, answer) to the reason why their tokens do not fit, or ''.

    Args:
      processor: the model's processor.
      text: the prompt template, and the token limits of prompt and answer.
      answers: whether answers must fit too. Answers that are only compared as text need not fit.
    """
    answer_tokens = text.answer_tokens if answers else None

    def reason(question, answer):
        return processor.misfit(
            text.write(question), answer, prompt_tokens=text.prompt_tokens, answer_tokens=answer_tokens
        )

    return reason


def batches(
    source: Records | Sequence,
    transform: Callable[[dict], dict],
    *,
    batch: int,
    seed: int,
    groups: Sequence[Sequence[int]],
    shares: Sequence[int | float],
    rows: Sequence[int] | None = None,
    augment: Callable[[dict, np.random.Generator], dict] | None = None,
    augment_image: Callable[[np.ndarray, np.random.Generator], np.ndarray] | None = None,
    draw_texts: Callable[[int, np.random.Generator], tuple[str, str]] | None = None,
) -> grain.MapDataset:
    """Return an endless dataset whose item `step` is the stacked batch of that step.

    Args:
      source: the records.
      transform: maps a record to the arrays of one example.
      batch: number of examples in a batch.
      seed: seed of the order of records, and of the generators of `augment`.
      groups: lists of indices into `source`. Each group is shuffled separately, and reshuffled in each of its epochs.
      shares: the weight of each group in a batch, for example (2, 1, 1) for half, a quarter, a quarter.
      rows: indices of the batch rows to produce; records of other rows are not read. None: all rows.
      augment: applied to each example, with a generator that is a function of seed and position.
      augment_image: applied to the image of each record before `transform`, with such a generator.
      draw_texts: returns the question and the answer of a record, with such a generator; see `dataset.Split`.

    Raises:
      DataError: a group is empty.
    """
    # grain cannot shuffle and repeat an empty group, and its error does not name the group.
    if not all(len(group) for group in groups):
        raise DataError(f'a group of the training data is empty; sizes {[len(group) for group in groups]}')
    # Indices are shuffled and mixed, not records: only drawn records are read.
    shuffled = [
        grain.MapDataset.source(list(group)).seed(seed + number).shuffle().repeat()
        for number, group in enumerate(groups)
    ]
    mixed = grain.MapDataset.mix(shuffled, weights=shares)
    # `random_map` derives a generator for each position from its seed, so a resumed run draws the same numbers.
    if augment_image is None and draw_texts is None:
        examples = mixed.map(lambda index: transform(source[index]))
    else:
        records = mixed.seed(seed).random_map(lambda index, rng: _vary(source, index, augment_image, draw_texts, rng))
        examples = records.map(transform)
    if augment is not None:
        examples = examples.seed(seed).random_map(augment)
    # `examples` is endless, and its item i depends on i only, so batches can be requested in any order.
    if rows is None or len(rows) == batch:
        return examples.batch(batch)
    # One process of several: item i of `own_examples` is row `rows[i % len(rows)]` of the global batch.
    own_examples = grain.MapDataset.range(len(examples) // batch * len(rows))
    own_examples = own_examples.map(lambda i: examples[i // len(rows) * batch + rows[i % len(rows)]])
    return own_examples.batch(len(rows))


def _vary(
    source: Records | Sequence,
    index: int,
    augment_image: Callable[[np.ndarray, np.random.Generator], np.ndarray] | None,
    draw_texts: Callable[[int, np.random.Generator], tuple[str, str]] | None,
    rng: np.random.Generator,
) -> dict:
    """Return a record with the image and the texts that are drawn for one place in the order of training."""
    record = dict(source[index])
    # A text has no image.
    if augment_image is not None and record['image'] is not None:
        record['image'] = augment_image(record['image'], rng)
    # One generator draws both, one after the other, so that crop and text are independent.
    if draw_texts is not None:
        record['question'], record['answer'] = draw_texts(index, rng)
    return record


def groups_by_kind(split: Split, dataset: Dataset) -> list[list[int]]:
    """Return one list of record indices for each kind, in the order of `dataset.kinds`.

    Args:
      split: the split to group; only its texts are read.
      dataset: defines the kinds.
    """
    kinds = [dataset.kind_of(answer) for _, answer in split.read_texts()]
    return [[index for index, kind in enumerate(kinds) if kind == name] for name in dataset.kinds]
