"""Score a model on tasks, and write the results into a folder; resumable after a kill.

`launch/evaluate.py` scores one model. A job scores each of its models (`evaluate.score_on_tasks`).
"""

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sparselora_jax.data.benchmarks import load
from sparselora_jax.data.benchmarks.discover import discover
from sparselora_jax.data.benchmarks.items import Items
from sparselora_jax.data.processing import Processor
from sparselora_jax.data.task_format import TaskFormat
from sparselora_jax.data.text_format import TextFormat
from sparselora_jax.evaluation import retrieval, task_runs
from sparselora_jax.evaluation.generate import GenerationError, check_new_tokens
from sparselora_jax.evaluation.task_runs import TaskResult
from sparselora_jax.evaluation.tasks import (
    RETRIEVAL,
    LoadedTask,
    Predictions,
    Task,
    check_name,
    is_own_data,
    load_task,
)
from sparselora_jax.jobs import inputs, names
from sparselora_jax.jobs.inputs import RecordsDigest
from sparselora_jax.models.family import Family, RetrievalFamily, no_language
from sparselora_jax.models.model import Model
from sparselora_jax.runtime import digests, processes
from sparselora_jax.runtime.digests import Digest
from sparselora_jax.runtime.errors import DataError, UnsupportedModelError
from sparselora_jax.runtime.files import hold, write_text
from sparselora_jax.runtime.progress import Progress

RESULTS = 'results.json'
INPUTS = 'inputs.json'  # digests of the model's files and of the items, see `begin`
REMEDY = 'put them back, or use another folder for the results'
PACKAGES = ('sparselora-jax', 'jax', 'numpy', 'transformers')


@dataclass(frozen=True)
class TaskRequest:
    """What to score, and how.

    Attributes:
      tasks: names of tasks.
      data_root: folder under which the files of all benchmarks lie; None: all tasks are folders of a user's own.
      batch: number of items that are answered at once.
      limit: maximum number of items of each task; None: all.
      offset: number of items of each task to leave out at the beginning.
      tolerance: largest share of images that may be missing; their items are left out.
      overrides: arguments of `generate` that replace those of the family.
      prompt: a template that replaces that of the family; None: that of the family.
      candidates: of retrieval, number of candidates of each search that are scored again by reading image and text
        together.
      vision_from: the model whose vision tower is in the place of the model's own (`checkpoints.graft`); None: its own.
    """

    tasks: tuple[str, ...]
    data_root: Path | None
    batch: int = 50
    limit: int | None = None
    offset: int = 0
    tolerance: float = 0.0
    overrides: Mapping[str, Any] | None = None
    prompt: str | None = None
    candidates: int = retrieval.CANDIDATES
    vision_from: str | None = None


class PreparedTask(NamedTuple):
    """A task, the items that are asked, how they are asked, and the prompt of each."""

    task: Task
    items: Items
    asked: TaskFormat
    prompts: list[str]


def list_tasks(data_root: Path) -> list[str]:
    """Return a line for each benchmark: the files of it that are there, or what is missing.

    Args:
      data_root: folder under which the files lie.

    Raises:
      DataError: there is no such folder.
    """
    return load.summary(discover(data_root))


def load_tasks(request: TaskRequest) -> dict[str, LoadedTask]:
    """Return the tasks with all of their items, by name; no model is needed.

    Args:
      request: what to score.

    Raises:
      DataError: a task is not known; its files are missing or broken; or two tasks would write the same files.
    """
    by_title: dict[str, str] = {}
    # All names are checked before any file is read, which may take minutes.
    for name in request.tasks:
        check_name(name)
        title = names.task_title(name)
        other = by_title.setdefault(title, name)
        if other != name:
            raise DataError(f'tasks {other} and {name}: both write answers_{title}.jsonl; rename one of them')
    # All files are listed and recognised once, for all tasks.
    discovery = None if request.data_root is None else discover(request.data_root)
    return {name: load_task(name, discovery, tolerance=request.tolerance) for name in request.tasks}


def prepare(
    request: TaskRequest, loaded: Mapping[str, LoadedTask], model: Model, processor: Processor
) -> dict[str, PreparedTask]:
    """Choose the items of each task, and write their prompts.

    Lengths are checked before the first question: it may take hours to come to the last task.

    Args:
      request: what to do.
      loaded: result of `load_tasks`.
      model: the model, without its weights.
      processor: its processor.

    Raises:
      DataError: no item is left, or a prompt is longer than the model reads.
      UnsupportedModelError: the model cannot do a task.
    """
    check_kinds({name: task.task for name, task in loaded.items()}, model.family)
    return {name: _prepare(request, name, task, model, processor) for name, task in loaded.items()}


def begin(output: Path, model_files: Mapping[str, Path], loaded: Mapping[str, LoadedTask]) -> str:
    """Check that an evaluation goes on with the model and the items with which it began, and return whose it is.

    `inputs.json` holds the digests of both. A file of the model is read again only if its size or time has changed. Of
    several processes, the first one calls this.

    Args:
      output: folder of the results.
      model_files: the files that decide what the model computes, by name.
      loaded: result of `load_tasks`.

    Returns:
      The `owner` of the answers, for `evaluate_tasks`.

    Raises:
      DataError: the model or the items have changed; the message says what.
      StorageError: another process writes into the folder, it cannot be written, or `inputs.json` is damaged.
    """
    # Two runs would append their answers to the same files.
    hold(output)
    file = output / INPUTS
    begun = digests.read_stamped(file, 'delete this folder of results', INPUTS) if file.exists() else None
    known = None if begun is None else digests.from_json(begun['model'], Digest)
    model = digests.take(model_files, known)
    changes = [] if known is None else inputs.changed_files(known, model)
    if changes:
        raise DataError(
            f'{output}: the files of the model are not those that its answers are from '
            f'({", ".join(changes[: inputs.SHOWN])}); {REMEDY}'
        )
    # Another run may have scored other tasks into this folder.
    records = {} if begun is None else digests.from_json(begun['tasks'], RecordsDigest)
    now = digest_items(loaded)
    for name in now.keys() & records.keys():
        change = inputs.change_of_items(records[name], now[name])
        if change:
            raise DataError(
                f'{output}: the items of {name} are not those that its answers are for ({change}); {REMEDY}'
            )
    values = {'model': digests.to_json(model), 'tasks': digests.to_json(records | now)}
    write_text(file, digests.stamp(values, INPUTS))
    # The hashes alone: a copy of a file has another time.
    return json.dumps({name: digest.sha256 for name, digest in model.items()}, sort_keys=True)


def digest_items(loaded: Mapping[str, LoadedTask]) -> dict[str, RecordsDigest]:
    """Return the digest of the items of each task.

    Args:
      loaded: result of `load_tasks`.
    """
    return {name: inputs.digest_items(task.items, is_published=not is_own_data(name)) for name, task in loaded.items()}


def evaluate_tasks(
    request: TaskRequest,
    prepared: Mapping[str, PreparedTask],
    model: Model,
    weights: dict,
    processor: Processor,
    *,
    output: Path,
    name: str,
    owner: str,
    label: str = '',
) -> dict[str, TaskResult]:
    """Score a model on tasks; each task's files are written as soon as it is done.

    `results.json` holds all results so far, `samples_TASK.jsonl` each answer with its score, and `submission_TASK.json`
    what the server of the data set reads. A run that was killed continues after its last batch of answers.

    Args:
      request: what to do.
      prepared: result of `prepare`.
      model: the model.
      weights: its params, or the result of `bind`.
      processor: its processor.
      output: folder for the results.
      name: name of the model in the results.
      owner: a text that tells the weights and the items from others.
      label: which model it is, for the lines of progress.

    Returns:
      The result of each task.

    Raises:
      DataError: an image cannot be read.
      StorageError: answers in the folder are damaged, or are those of another run.
    """
    # Only the first process writes: the others may not see its disk.
    if processes.first():
        output.mkdir(parents=True, exist_ok=True)
    # Written again after each task, so that a run that is stopped keeps what it has.
    results: dict[str, TaskResult] = {}
    for task_name, task in prepared.items():
        predictions = _predict(
            request, task_name, task, model, weights, processor, output=output, owner=owner, label=label
        )
        results[task_name], scored = task_runs.score(task.task, predictions, task.items)
        if request.vision_from is not None:
            results[task_name] = _with_note(results[task_name], grafted(name, request.vision_from))
        # All processes hold the same answers.
        if processes.first():
            samples_file = output / f'samples_{names.task_title(task_name)}.jsonl'
            if task.task.kind == RETRIEVAL:
                task_runs.write_searches(samples_file, task.items, predictions, scored)
            else:
                task_runs.write_samples(samples_file, task.items, task.prompts, predictions, scored)
                submission_file = output / f'submission_{names.task_title(task_name)}.json'
                task_runs.write_submission(submission_file, task.task, task.items, predictions)
            formats = {done: asdict(prepared[done].asked.text) for done in results}
            versions = _versions({done: prepared[done].task for done in results})
            content = task_runs.results_json(results, config=_config(request, name, formats), versions=versions)
            # Other programs read this file, and JSON has no NaN.
            write_text(output / RESULTS, json.dumps(content, indent=1, allow_nan=False))
    return results


def check_kinds(tasks: Mapping[str, Task], family: Family) -> None:
    """Check that a model can do all tasks: retrieval, or those that ask for text.

    Args:
      tasks: the tasks, by name.
      family: the family of the model.

    Raises:
      UnsupportedModelError: it cannot do one; names it, and a model or tasks that fit.
    """
    compares = isinstance(family, RetrievalFamily)
    for task_name, task in tasks.items():
        if task.kind == RETRIEVAL and not compares:
            raise UnsupportedModelError(
                f'{task_name}: {family.name} models answer in text; this task compares images with texts: give a '
                'retrieval model, such as Salesforce/blip2-itm-vit-g-coco, or leave the task out'
            )
        if task.kind != RETRIEVAL and compares:
            raise UnsupportedModelError(f'{task_name}: {no_language(family)}')


def _predict(
    request: TaskRequest,
    task_name: str,
    prepared: PreparedTask,
    model: Model,
    weights: dict,
    processor: Processor,
    *,
    output: Path,
    owner: str,
    label: str,
) -> Predictions:
    """Return the answers of the model to a task, or the result of its search."""
    answers_file = output / f'answers_{names.task_title(task_name)}.jsonl'
    owner = _owner(request, owner, task_name, prepared.task, prepared.asked)
    full_label = f'{task_name} {label}'.rstrip()
    if prepared.task.kind != RETRIEVAL:
        return task_runs.ask(
            model,
            weights,
            processor,
            prepared.items,
            prepared.asked,
            batch=request.batch,
            answers_file=answers_file,
            owner=owner,
            progress=Progress(full_label, len(prepared.items)),
        )
    return retrieval.search(
        model,
        weights,
        processor,
        prepared.items,
        prepared.asked,
        batch=request.batch,
        answers_file=answers_file,
        # Unlike answers to questions, scores depend on which other items there are.
        owner=json.dumps([owner, request.candidates, len(prepared.items)]),
        candidates=request.candidates,
        name=full_label,
    )


def grafted(name: str, vision_from: str) -> str:
    """Return what a reader must know of a score with the vision tower of another model.

    Args:
      name: the model.
      vision_from: the model whose vision tower is in its place.
    """
    return (
        f'the vision tower is that of {vision_from}, all else is {name}: so this is no score of {vision_from} as a '
        'whole, and pruning its language tower cannot change it'
    )


def _with_note(result: TaskResult, note: str) -> TaskResult:
    return result._replace(notes=(*result.notes, note))


def _prepare(
    request: TaskRequest, task_name: str, loaded: LoadedTask, model: Model, processor: Processor
) -> PreparedTask:
    """Choose the items of a task and write their prompts.

    Raises:
      DataError: no item is left, or a prompt is longer than the model reads.
    """
    task, all_items = loaded
    items = task_runs.select(all_items, limit=request.limit, offset=request.offset)
    asked = _format(request, model, task)
    # Texts of all items are compared, and none is an answer.
    if task.kind == RETRIEVAL:
        _check_retrieval(task_name, request, items)
        return PreparedTask(task, items, asked, [])
    prompts = task_runs.prompts_of(items, asked)
    # A prompt that is cut would be another question.
    text = task_runs.fitted(asked.text, processor, prompts)
    try:
        check_new_tokens(model, *_lengths(model, processor, text))
    except GenerationError as error:
        raise DataError(f'{task_name}: {error}') from None
    return PreparedTask(task, items, replace(asked, text=text), prompts)


def _check_retrieval(task_name: str, request: TaskRequest, items: Items) -> None:
    """Check that nothing is asked for that a search does not have.

    Raises:
      DataError: there is a prompt or an argument of `generate`; or an image has no caption, or is in two items.
    """
    given = list(request.overrides or {}) + (['prompt'] if request.prompt is not None else [])
    if given:
        raise DataError(f'{task_name}: {given[0]} is for models that answer in text, and a search has no use for it')
    retrieval.texts_of(items)
    # A search counts each item as an image of its own, and would take a caption of the other item for a wrong one.
    images, counts = np.unique(items.images[items.rows], return_counts=True)
    if counts.max() > 1:
        twice = items.image_ids[images[counts.argmax()]]
        raise DataError(f'{task_name}: image {twice} is in {counts.max()} lines; put all its captions into one')


def _lengths(model: Model, processor: Processor, text: TextFormat) -> tuple[int, int]:
    """Return the numbers of tokens that a decoder reads before an answer, and of an answer at most."""
    new = text.decoding['max_new_tokens']
    # The prompt of an encoder-decoder has another table of positions, or none.
    return (1, new) if model.is_encoder_decoder else (processor.image_tokens + text.prompt_tokens, new)


def _format(request: TaskRequest, model: Model, task: Task) -> TaskFormat:
    """Return how the model is asked, with what the user wants otherwise."""
    asked = model.family.task_format(model.cfg, task.kind)
    text = asked.text
    if request.prompt is not None:
        text = replace(text, prompt=request.prompt)
    overrides = request.overrides or {}
    decoding = dict(text.decoding)
    # `generate` prefers this minimum of the family, so the user's would have no effect.
    if 'min_length' in overrides:
        decoding.pop('min_new_tokens', None)
    return replace(asked, text=replace(text, decoding={**decoding, **overrides}))


def _owner(request: TaskRequest, owner: str, task_name: str, task: Task, asked: TaskFormat) -> str:
    """Return a text that tells whose answers a file has: whatever changes an answer changes it."""
    # The limit does not count: it may be raised later. Nor does the length that prompts are padded to, which a longer
    # prompt behind the limit raises: no prompt is cut, so padding changes an answer by rounding at most.
    text = asdict(asked.text)
    del text['prompt_tokens']
    title = names.task_title(task_name)
    facts = [owner, title, task.version, text, asked.instruction, asked.read_words, request.offset, request.batch]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _config(request: TaskRequest, name: str, formats: Mapping[str, Any]) -> dict[str, Any]:
    return {
        'model': name,
        'limit': request.limit,
        'offset': request.offset,
        'batch': request.batch,
        'candidates': request.candidates,
        'vision_from': request.vision_from,
        'formats': dict(formats),
    }


def _versions(tasks: Mapping[str, Task]) -> dict[str, str]:
    packages = {package: _version(package) for package in PACKAGES}
    return packages | {'python': platform.python_version()} | {name: str(t.version) for name, t in tasks.items()}


def _version(package: str) -> str:
    # A clone that was never installed has no version of its own.
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return 'not installed'


def table(results: Mapping[str, TaskResult]) -> Sequence[str]:
    """Return the lines of a table: a task, its headline value with its standard error, and the number of items.

    Args:
      results: the result of each task.
    """
    lines = []
    for name, result in results.items():
        value = result.values.get(result.headline)
        # Test splits have no references.
        if value is None:
            lines.append(f'{name:20} not scored: {"; ".join(result.notes)}')
            continue
        score = task_runs.score_text(value, result.stderr[result.headline])
        of_all = '' if result.expected is None else f' of {result.expected:,}'
        lines.append(f'{name:20} {result.headline:10} {score:18} {result.scored:,}{of_all} items')
    return lines
