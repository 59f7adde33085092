"""Run tasks: ask a model about the items of a benchmark, score its answers, and write the files that others read."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from sparselora_jax.data.benchmarks.items import Item, Items
from sparselora_jax.data.dataset import Split
from sparselora_jax.data.processing import Processor
from sparselora_jax.data.task_format import TaskFormat
from sparselora_jax.data.text_format import TextFormat
from sparselora_jax.evaluation import vqa
from sparselora_jax.evaluation.metrics.scored import Scored, rounded, standard_errors
from sparselora_jax.evaluation.tasks import Task, expected_items
from sparselora_jax.models.model import Model
from sparselora_jax.runtime.errors import DataError
from sparselora_jax.runtime.files import write_text

RESAMPLES = 200  # of a bootstrap: enough for two digits of a standard error
# Prompts are padded to a multiple of this, so that few shapes are compiled.
STEP = 8


class TaskResult(NamedTuple):
    """What a model reached in a task.

    Attributes:
      values: each value of the metric; empty if no item has references.
      stderr: its standard error, by bootstrap over the items.
      scored: number of items that were scored.
      expected: number of items that published scores are about; None: not known.
      notes: what a reader of the values must know.
    """

    values: dict[str, float]
    stderr: dict[str, float]
    scored: int
    expected: int | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _AskedItems:
    """Records of `vqa.evaluate`: images are read when they are needed."""

    items: Items
    asked: TaskFormat

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        item = self.items[index]
        return {'image': item.image.read(), 'question': _question(item, self.asked), 'answer': ''}


def _question(item: Item, asked: TaskFormat) -> str:
    """Return what stands in the place of the question in the prompt of an item."""
    return asked.question(item.question, item.choices, item.context)


def prompts_of(items: Items, asked: TaskFormat) -> list[str]:
    """Return the prompt of each item; no image is read.

    Args:
      items: the items.
      asked: how the model is asked.
    """
    # `items[index]` makes an item from columns and reads no image.
    return [asked.text.write(_question(items[index], asked)) for index in range(len(items))]


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
        progress=progress,
        **asked.text.decoding,
    )
    return answers.predicted


def score(task: Task, predictions: Sequence[str], items: Items) -> tuple[TaskResult, Scored | None]:
    """Return the values of a task with their standard errors, and the scores of the items.

    Args:
      task: the task.
      predictions: an answer for each item.
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
        return TaskResult({}, {}, 0, expected, (*notes, unknown)), None
    scored = task.score(predictions, items)
    values = _named(scored.aggregate(), task)
    stderr = _named(standard_errors(scored, resamples=RESAMPLES), task)
    return TaskResult(values, stderr, len(predictions), expected, (*notes, *scored.notes)), scored


def _named(values: Mapping[str, float], task: Task) -> dict[str, float]:
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
        line['score'] = None if scored is None else float(scored.per_item[index])
        lines.append(json.dumps(line) + '\n')
    write_text(file, ''.join(lines))


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
        errors = {f'{name}_stderr': value for name, value in result.stderr.items()}
        values[task] = rounded(result.values | errors)
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
