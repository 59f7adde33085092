"""Run tasks: ask a model about the items of a benchmark, score its answers, and write the files that others read."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float32

from sparselora_jax.data.benchmarks.items import Item, Items
from sparselora_jax.data.dataset import Split
from sparselora_jax.data.processing import Processor
from sparselora_jax.data.task_format import TaskFormat
from sparselora_jax.data.text_format import TextFormat
from sparselora_jax.evaluation import intervals, vqa
from sparselora_jax.evaluation.metrics.scored import Scored, resampled_values, rounded, spreads
from sparselora_jax.evaluation.retrieval import Search
from sparselora_jax.evaluation.tasks import Predictions, Task, expected_items
from sparselora_jax.models.model import Model
from sparselora_jax.runtime.ahead import READING_THREADS
from sparselora_jax.runtime.errors import DataError
from sparselora_jax.runtime.files import write_text

RESAMPLES = 200  # of a bootstrap: enough for two digits of a standard error
SHOWN = 10  # best candidates of a search that are written, as many as the recalls look at
# Prompts are padded to a multiple of this, so that few shapes are compiled.
STEP = 8
Value = TypeVar('Value')


class TaskResult(NamedTuple):
    """What a model reached in a task. All fields are values that JSON can hold.

    Attributes:
      headline: name of the value that tables show.
      values: each value of the metric; None: it has no value, and a note says so. Empty if an item has no references.
      stderr: the standard error of each value, by bootstrap over the items; None: it is not known.
      scored: number of items that were scored.
      expected: number of items that published scores are about; None: not known.
      notes: what a reader of the values must know.
      is_right: 1 for each item that is right, otherwise 0; empty unless the headline is the share of right items.
      draws: the headline in each draw of the bootstrap, which is the same for all models; empty if there is none.
    """

    headline: str
    values: dict[str, float | None]
    stderr: dict[str, float | None]
    scored: int
    expected: int | None
    notes: tuple[str, ...]
    is_right: tuple[int, ...] = ()
    draws: tuple[float, ...] = ()


@dataclass(frozen=True)
class _AskedItems:
    """Records of `vqa.evaluate`: images are read when they are needed."""

    items: Items
    asked: TaskFormat

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        item = self.items[index]
        return {'image': item.image.read(), 'question': _question(item, self.items, self.asked), 'answer': ''}


def _question(item: Item, items: Items, asked: TaskFormat) -> str:
    """Return what stands in the place of the question in the prompt of an item."""
    return asked.question(item.question, item.choices, item.context, has_read_words=items.has_read_words)


def prompts_of(items: Items, asked: TaskFormat) -> list[str]:
    """Return the prompt of each item; no image is read.

    Args:
      items: the items.
      asked: how the model is asked.
    """
    # `items[index]` makes an item from columns and reads no image.
    return [asked.text.write(_question(items[index], items, asked)) for index in range(len(items))]


def fitted(text: TextFormat, processor: Processor, prompts: Sequence[str]) -> TextFormat:
    """Return a text format whose prompts all fit: none is cut.

    Args:
      text: the text format.
      processor: tokenizes the prompts.
      prompts: all prompts.

    Raises:
      DataError: a prompt has the wrong number of '<image>'.
    """
    # Many questions occur again and again.
    longest = max(map(processor.prompt_length, dict.fromkeys(prompts)))
    return replace(text, prompt_tokens=math.ceil(longest / STEP) * STEP)


def ask(
    model: Model,
    weights: dict,
    processor: Processor,
    items: Items,
    asked: TaskFormat,
    *,
    batch: int,
    answers_file: Path,
    owner: str,
    progress: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """Return the model's answer to each item; continue after the answers that the file has.

    Args:
      model: the model.
      weights: its params, or the result of `bind`.
      processor: its processor.
      items: the items.
      asked: how the model is asked; all prompts fit (`fitted`).
      batch: number of items that are answered at once.
      answers_file: see `vqa.evaluate`.
      owner: see `vqa.evaluate`.
      progress: called with the number of answered items after each batch.

    Raises:
      DataError: an image cannot be read.
      StorageError: the file of answers is damaged, or holds answers of another run.
    """
    source = _AskedItems(items, asked)
    # Answers are scored by the task, so the records have none.
    split = Split(source, read_texts=lambda: [('', '')] * len(items))
    answers = vqa.evaluate(
        model,
        weights,
        processor,
        asked.text,
        split,
        range(len(items)),
        batch=min(batch, len(items)),
        answers_file=answers_file,
        answers_owner=owner,
        threads=READING_THREADS,
        progress=progress,
        **asked.text.decoding,
    )
    return answers.predicted


def score(task: Task, predictions: Predictions, items: Items) -> tuple[TaskResult, Scored | None]:
    """Return the values of a task with their standard errors, and the scores of the items.

    Args:
      task: the task.
      predictions: an answer for each item, or the result of a search.
      items: the items.

    Returns:
      The result, and the scores; None if an item has no references, as in test splits.

    Raises:
      DataError: a reference is not what the metric expects.
    """
    expected = expected_items(task)
    notes = items.notes
    if (items.references.lengths[items.rows] == 0).any():
        unknown = 'some items have no references, as in a test split: scores are left out'
        return TaskResult(task.headline, {}, {}, 0, expected, (*notes, unknown)), None
    scored = task.score(predictions, items)
    aggregate = scored.aggregate()
    resampled = resampled_values(scored, resamples=RESAMPLES)
    # 'overall' is the mean of all items, which is the headline then. Items that are right or wrong are told, because
    # their share has a better interval than the bootstrap's.
    is_share = 'overall' in aggregate and bool(np.isin(scored.per_item, (0.0, 1.0)).all())
    values = _named(aggregate, task)
    # POPE has no headline without its categories.
    draws = _named(resampled, task).get(task.headline, np.zeros(0))
    without = sorted(name for name, value in values.items() if not math.isfinite(value))
    if without:
        notes = (*notes, f'no value, because no scored item has one: {", ".join(without)}')
    result = TaskResult(
        task.headline,
        _finite(values),
        _finite(_named(spreads(resampled), task)),
        len(items),
        expected,
        (*notes, *scored.notes),
        is_right=tuple(scored.per_item.astype(int).tolist()) if is_share else (),
        draws=tuple(draws.tolist()) if np.isfinite(draws).all() else (),
    )
    return result, scored


def score_text(score: float | None, stderr: float | None = None) -> str:
    """Return a task's value as a reader sees it, with its standard error.

    Args:
      score: the value; None: there is none.
      stderr: its standard error; None: it is not known, or not shown.

    >>> score_text(61.234, 0.5), score_text(61.234), score_text(None)
    ('61.23 ± 0.50', '61.23', 'not scored')
    """
    if score is None:
        return 'not scored'
    return f'{score:.2f}' if stderr is None else f'{score:.2f} ± {stderr:.2f}'


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    """Return values with None in place of NaN and infinity, which JSON cannot hold."""
    return {name: _finite_or_none(value) for name, value in values.items()}


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def paired_interval(first: TaskResult, second: TaskResult) -> tuple[float, float] | None:
    """Return the 95 % confidence interval of a task's headline of one model minus that of another.

    Args:
      first: result of one model.
      second: result of another model on the same items.

    Returns:
      The lower and the upper end, in the unit of the headline; None if one of the models has no headline.
    """
    if first.is_right and second.is_right:
        low, high = intervals.paired_interval(np.array(first.is_right, float), np.array(second.is_right, float))
        return 100 * low, 100 * high
    if not first.draws or not second.draws:
        return None
    difference = first.values[first.headline] - second.values[second.headline]
    return intervals.normal_interval(difference, np.array(first.draws) - np.array(second.draws))


def _named(values: Mapping[str, Value], task: Task) -> dict[str, Value]:
    """Return values under the names that readers know: the mean of all items has the task's headline."""
    named = {}
    for name, value in values.items():
        if name == 'overall':
            named[task.headline] = value
        elif task.headline == 'accuracy' and '/' in name:
            named[f'accuracy/{name}'] = value
        else:
            named[name] = value
    return named


def write_samples(
    file: Path, items: Items, prompts: Sequence[str], predictions: Sequence[str], scored: Scored | None
) -> None:
    """Write a line of JSON for each item: id, prompt, prediction, references and score.

    Args:
      file: the file.
      items: the items.
      prompts: the prompt of each.
      predictions: the answer to each.
      scored: the scores; None: there are none.
    """
    lines = []
    for index, (prompt, prediction) in enumerate(zip(prompts, predictions, strict=True)):
        item = items[index]
        line = {'id': item.id, 'prompt': prompt, 'prediction': prediction, 'references': list(item.references)}
        line['score'] = None if scored is None else _finite_or_none(float(scored.per_item[index]))
        lines.append(json.dumps(line) + '\n')
    write_text(file, ''.join(lines))


def write_searches(file: Path, items: Items, found: Search, scored: Scored) -> None:
    """Write a line of JSON for each image: its best texts, its own texts, and the images found for these.

    Args:
      file: the file.
      items: the images.
      found: the scores of all images and texts.
      scored: the scores of the images.
    """
    lines = []
    for index in range(len(items)):
        item = items[index]
        # For each text of this image, the images that its search finds.
        own_texts = np.flatnonzero(found.image_of_text == index)
        images = [[items[image].image_id for image in _best(found.of_texts[text])] for text in own_texts]
        line = {
            'id': item.id,
            'predictions': [found.texts[text] for text in _best(found.of_images[index])],
            'references': list(item.references),
            'score': float(scored.per_item[index]),
            'images_of_references': images,
        }
        lines.append(json.dumps(line) + '\n')
    write_text(file, ''.join(lines))


def _best(scores: Float32[np.ndarray, ' candidates']) -> list[int]:
    """Return the candidates with the highest scores, the best first."""
    order = np.argsort(-scores, kind='stable')[:SHOWN]
    return [int(place) for place in order if np.isfinite(scores[place])]


def write_submission(file: Path, task: Task, items: Items, predictions: Sequence[str]) -> None:
    """Write the file that the server of the data set reads; nothing if there is no server.

    Args:
      file: the file.
      task: the task.
      items: the items.
      predictions: the answer to each.
    """
    if task.entry is None:
        return
    # Servers want every item of the split; with a limit, the file shows only its form.
    entries = [task.entry(items[index], prediction) for index, prediction in enumerate(predictions)]
    write_text(file, json.dumps(entries))


def results_json(results: Mapping[str, TaskResult], *, config: Mapping[str, Any], versions: Mapping[str, str]) -> dict:
    """Return the content of `results.json`.

    Args:
      results: the result of each task.
      config: how they were obtained: model, prompts, decoding, limits.
      versions: versions of packages and of tasks.
    """
    values = {}
    for task, result in results.items():
        every = result.values | {f'{name}_stderr': value for name, value in result.stderr.items()}
        known = rounded({name: value for name, value in every.items() if value is not None})
        values[task] = every | known
    return {
        'results': values,
        'n': {task: {'scored': result.scored, 'expected': result.expected} for task, result in results.items()},
        'notes': {task: list(result.notes) for task, result in results.items() if result.notes},
        'versions': dict(versions),
        'config': dict(config),
    }


def select(items: Items, *, limit: int | None, offset: int) -> Items:
    """Return some of the items, in their order.

    Args:
      items: all items.
      limit: maximum number of items; None: all.
      offset: number of items to leave out at the beginning.

    Raises:
      DataError: nothing is left.
    """
    chosen = range(offset, len(items) if limit is None else min(offset + limit, len(items)))
    if not chosen:
        raise DataError(f'{items.name}: offset {offset} leaves none of {len(items):,} items')
    return items.take(chosen)
