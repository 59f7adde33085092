"""Score a model on tasks, and write the results into a folder; resumable after a kill."""

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from sparselora_jax.data.benchmarks import load
from sparselora_jax.data.benchmarks.discover import Discovery, discover
from sparselora_jax.data.benchmarks.items import Items
from sparselora_jax.data.processing import Processor
from sparselora_jax.data.task_format import TaskFormat
from sparselora_jax.data.text_format import TextFormat
from sparselora_jax.evaluation import task_runs
from sparselora_jax.evaluation.generate import GenerationError, check_new_tokens
from sparselora_jax.evaluation.task_runs import TaskResult
from sparselora_jax.evaluation.tasks import Task, find_task
from sparselora_jax.models.model import Model
from sparselora_jax.runtime import processes
from sparselora_jax.runtime.errors import DataError
from sparselora_jax.runtime.files import write_text
from sparselora_jax.runtime.progress import Progress

RESULTS = 'results.json'
PACKAGES = ('sparselora-jax', 'jax', 'numpy', 'transformers')


@dataclass(frozen=True)
class TaskRequest:
    """What to score, and on what.

    Attributes:
      tasks: names of tasks.
      data_root: folder under which the files of all benchmarks lie.
      output: folder for the results.
      batch: number of items that are answered at once.
      limit: maximum number of items of each task; None: all.
      offset: number of items of each task to leave out at the beginning.
      tolerance: largest share of images that may be missing; their items are left out.
      overrides: arguments of `generate` that replace those of the family.
      prompt: a template that replaces that of the family; None: that of the family.
    """

    tasks: tuple[str, ...]
    data_root: Path
    output: Path
    batch: int = 50
    limit: int | None = None
    offset: int = 0
    tolerance: float = 0.0
    overrides: Mapping[str, Any] | None = None
    prompt: str | None = None


def list_tasks(data_root: Path) -> list[str]:
    """Return a line for each benchmark: the files of it that are there, or what is missing.

    Args:
      data_root: folder under which the files lie.

    Raises:
      DataError: there is no such folder.
    """
    return load.summary(discover(data_root))


def evaluate_tasks(
    request: TaskRequest, model: Model, weights: dict, processor: Processor, *, name: str
) -> dict[str, TaskResult]:
    """Score a model on tasks; each task's files are written as soon as it is done.

    `results.json` holds all results so far, `samples_TASK.jsonl` each answer with its score, and `submission_TASK.json`
    what the server of the data set reads. A run that was killed continues after its last batch of answers.

    Args:
      request: what to do.
      model: the model.
      weights: its params, or the result of `bind`.
      processor: its processor.
      name: name of the model in the results.

    Returns:
      The result of each task.

    Raises:
      DataError: a task is not known; or its files are missing or broken.
    """
    # Names, files and lengths are checked before the first question: it may take hours to come to the last task.
    tasks = {task_name: find_task(task_name) for task_name in request.tasks}
    discovery = discover(request.data_root)
    prepared = {
        task_name: _prepare(request, task_name, task, discovery, model, processor) for task_name, task in tasks.items()
    }
    request.output.mkdir(parents=True, exist_ok=True)
    # Written again after each task, so that a run that is stopped keeps what it has.
    results: dict[str, TaskResult] = {}
    for task_name, task in tasks.items():
        items, asked, prompts = prepared[task_name]
        predictions = task_runs.ask(
            model,
            weights,
            processor,
            items,
            asked,
            batch=request.batch,
            answers_file=request.output / f'answers_{_label(task_name)}.jsonl',
            owner=_owner(request, name, task_name, task, asked),
            progress=Progress(task_name, len(items)),
        )
        results[task_name], scored = task_runs.score(task, predictions, items)
        # All processes hold the same answers.
        if processes.first():
            task_runs.write_samples(
                request.output / f'samples_{_label(task_name)}.jsonl', items, prompts, predictions, scored
            )
            task_runs.write_submission(
                request.output / f'submission_{_label(task_name)}.json', task, items, predictions
            )
            formats = {done: asdict(prepared[done].asked.text) for done in results}
            content = task_runs.results_json(results, config=_config(request, name, formats), versions=_versions(tasks))
            write_text(request.output / RESULTS, json.dumps(content, indent=1))
    return results


def _label(task_name: str) -> str:
    """Return a task's name as part of a file name: of a folder of a user's own, its last part."""
    return Path(task_name).resolve().name if Path(task_name).exists() else task_name


class _Prepared(NamedTuple):
    """What a task asks: its items, how they are asked, and the prompt of each."""

    items: Items
    asked: TaskFormat
    prompts: list[str]


def _prepare(
    request: TaskRequest, task_name: str, task: Task, discovery: Discovery, model: Model, processor: Processor
) -> _Prepared:
    """Find the items of a task and write their prompts.

    Raises:
      DataError: the files are missing or broken, or a prompt is longer than the model reads.
    """
    # All files were listed and recognised once, for all tasks.
    items = load.load(task.benchmark, discovery, tolerance=request.tolerance)
    items = task_runs.select(items, limit=request.limit, offset=request.offset)
    asked = _format(request, model, task)
    prompts = task_runs.prompts_of(items, asked)
    # A prompt that is cut would be another question.
    text = task_runs.fitted(asked.text, processor, prompts)
    try:
        check_new_tokens(model, *_lengths(model, processor, text))
    except GenerationError as error:
        raise DataError(f'{task_name}: {error}') from None
    return _Prepared(items, replace(asked, text=text), prompts)


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
    return replace(asked, text=replace(text, decoding={**text.decoding, **(request.overrides or {})}))


def _owner(request: TaskRequest, name: str, task_name: str, task: Task, asked: TaskFormat) -> str:
    """Return a text that tells whose answers a file has: whatever changes an answer changes it."""
    # The limit does not count: it may be raised later, as long as no new prompt is longer than those before.
    facts = [name, task_name, task.version, asdict(asked.text), asked.instruction, request.offset, request.batch]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _config(request: TaskRequest, name: str, formats: Mapping[str, Any]) -> dict[str, Any]:
    return {
        'model': name,
        'limit': request.limit,
        'offset': request.offset,
        'batch': request.batch,
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


def table(results: Mapping[str, TaskResult], headlines: Mapping[str, str]) -> Sequence[str]:
    """Return the lines of a table: a task, its headline value with its standard error, and the number of items.

    Args:
      results: the result of each task.
      headlines: name of the value to show, by task.
    """
    lines = []
    for name, result in results.items():
        headline = headlines[name]
        # Test splits have no references.
        if headline not in result.values:
            lines.append(f'{name:20} not scored: no references')
            continue
        value = f'{result.values[headline]:.2f} +- {result.stderr[headline]:.2f}'
        of_all = '' if result.expected is None else f' of {result.expected:,}'
        lines.append(f'{name:20} {headline:10} {value:18} {result.scored:,}{of_all} items')
    return lines
