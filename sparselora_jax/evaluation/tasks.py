"""Tasks: a benchmark, how its answers are scored, and what its server wants to read.

Names are those of lmms-eval. How a model is asked is known by its family (`Family.task_format`). To add a task, write a
`Task` and register it, or name it as `package.module:Name`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from sparselora_jax.data.benchmarks import load, user_jsonl
from sparselora_jax.data.benchmarks.catalog import BENCHMARKS, find_benchmark
from sparselora_jax.data.benchmarks.discover import Discovery
from sparselora_jax.data.benchmarks.items import Item, Items
from sparselora_jax.data.task_format import TaskKind
from sparselora_jax.evaluation.metric import EXACT_MATCH
from sparselora_jax.evaluation.metric import score as score_answer
from sparselora_jax.evaluation.metrics.captions import ENTIRE, CaptionScores, score_captions, score_nocaps
from sparselora_jax.evaluation.metrics.gqa import gqa_accuracy
from sparselora_jax.evaluation.metrics.pope import pope
from sparselora_jax.evaluation.metrics.retrieval import RetrievalRanks, retrieval_ranks
from sparselora_jax.evaluation.metrics.science_qa import science_qa_accuracy
from sparselora_jax.evaluation.metrics.scored import Scored, grouped_means
from sparselora_jax.evaluation.metrics.vqa_accuracy import vqa_accuracy
from sparselora_jax.evaluation.retrieval import Search
from sparselora_jax.runtime.errors import DataError
from sparselora_jax.runtime.registry import Registry, UnknownNameError

RETRIEVAL = 'retrieval'  # the kind of tasks that compare images with texts

# What a model predicts: an answer to each item, or for retrieval the scores of all images and texts.
Predictions = Sequence[str] | Search
# Scores predictions of items whose references are known.
Score = Callable[[Predictions, Items], Scored]
# One entry of the file for the data set's server.
Entry = Callable[[Item, str], dict[str, Any]]


@dataclass(frozen=True)
class Task:
    """A way to score models.

    Attributes:
      benchmark: name of its items, see `data.benchmarks`.
      kind: how models are asked.
      headline: the value that tables show.
      score: scores predictions.
      entry: an item's entry of the file for the server; None: there is no server.
      version: raised whenever a score may change, so that scores of two versions are not compared.
    """

    benchmark: str
    kind: TaskKind
    headline: str
    score: Score
    entry: Entry | None = None
    version: int = 1


TASKS: Registry[Task] = Registry('task')


def references_of(items: Items) -> list[tuple[str, ...]]:
    """Return the references of all items.

    Args:
      items: the items.
    """
    # Without an `Item` for each, which would read more columns than references.
    return [tuple(items.texts[code] for code in items.references[int(row)]) for row in items.rows]


def groups_of(items: Items, names: Sequence[str]) -> dict[str, list[str]]:
    """Return the groups of all items, of the kinds that they have; an item without a group is in 'none'.

    Args:
      items: the items.
      names: kinds of groups.
    """
    groups = {}
    # Formats of the same benchmark differ in what they say about a question.
    for name in names:
        if name in items.groups:
            codes = items.groups[name][items.rows]
            groups[name] = [items.texts[code] if code >= 0 else 'none' for code in codes]
    return groups


def _vqa(rule: str = 'official', *, lemmatise: bool = False) -> Score:
    def score(predictions: Sequence[str], items: Items) -> Scored:
        groups = groups_of(items, ('answer_type', 'question_type'))
        return vqa_accuracy(predictions, references_of(items), rule=rule, groups=groups, lemmatise=lemmatise)

    return score


def _gqa(predictions: Sequence[str], items: Items) -> Scored:
    # GQA has one answer to a question.
    answers = [references[0] for references in references_of(items)]
    return gqa_accuracy(predictions, answers, groups=groups_of(items, ('question_type',)))


def _science_qa(predictions: Sequence[str], items: Items) -> Scored:
    # The reader gives the letter of the right choice; the metric wants its index.
    letters = [ord(references[0]) - ord('A') for references in references_of(items)]
    choices = items.choices.lengths[items.rows].tolist()
    return science_qa_accuracy(predictions, letters, choices, [True] * len(items))


def _pope(predictions: Sequence[str], items: Items) -> Scored:
    labels = [references[0] for references in references_of(items)]
    return pope(predictions, labels, groups_of(items, ('category',)).get('category'))


def _captions(predictions: Sequence[str], items: Items) -> Scored:
    return score_captions(predictions, references_of(items), with_meteor=True)


@dataclass(frozen=True)
class _NoCapsScored:
    """The scores of nocaps: of each domain, and of all images.

    Attributes:
      entire: scores of all images.
      of_domains: scores of the images of each domain, in the order of `rows`.
      rows: for each domain, the place of each image among those of the domain; -1: the image is of another domain.
    """

    entire: CaptionScores
    of_domains: Mapping[str, CaptionScores]
    rows: Mapping[str, Int[np.ndarray, ' images']]

    @property
    def per_item(self) -> Float[np.ndarray, ' images']:
        """Return CIDEr of each image, with the document frequencies of all images."""
        return self.entire.per_item

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what is left out, which is the same for all domains."""
        return self.entire.notes

    def aggregate(self, indices: Int[np.ndarray, ' sample'] | None = None) -> dict[str, float]:
        """Return the scores of all images, and of each domain as 'domain/name'; see `Scored`.

        Args:
          indices: the images; None: all.
        """
        # One draw of images serves all domains, so a domain has more images in some resamples than in others.
        values = self.entire.aggregate(indices)
        for domain, scores in self.of_domains.items():
            rows = self.rows[domain] if indices is None else self.rows[domain][indices]
            rows = rows[rows >= 0]
            of_domain = scores.aggregate(rows) if rows.size else dict.fromkeys(values, math.nan)
            values |= {f'{domain}/{name}': value for name, value in of_domain.items()}
        return values


def _nocaps(predictions: Sequence[str], items: Items) -> Scored:
    domains = groups_of(items, ('domain',)).get('domain')
    # Some releases do not say to which domain an image belongs.
    if domains is None:
        return _captions(predictions, items)
    scores = score_nocaps(predictions, references_of(items), domains, with_meteor=True)
    rows = {}
    for domain in scores.keys() - {ENTIRE}:
        is_in = np.array([of_image == domain for of_image in domains])
        rows[domain] = np.where(is_in, np.cumsum(is_in) - 1, -1)
    return _NoCapsScored(scores[ENTIRE], {name: scores[name] for name in sorted(rows)}, rows)


# The names that tables of papers use, by those of LAVIS.
_RECALLS = {
    'txt_r1': 'text_R@1',
    'txt_r5': 'text_R@5',
    'txt_r10': 'text_R@10',
    'img_r1': 'image_R@1',
    'img_r5': 'image_R@5',
    'img_r10': 'image_R@10',
    'txt_r_mean': 'text_R_mean',
    'img_r_mean': 'image_R_mean',
    'r_mean': 'R_mean',
}


@dataclass(frozen=True)
class _Recalls:
    """The recalls of both directions of a search.

    Attributes:
      ranks: the rank of each right answer.
    """

    ranks: RetrievalRanks

    @property
    def per_item(self) -> Float[np.ndarray, ' images']:
        """Return 1 for each image whose best text is its own, otherwise 0."""
        return self.ranks.per_item

    @property
    def notes(self) -> tuple[str, ...]:
        """Return nothing: the scores are those of the benchmark."""
        return ()

    def aggregate(self, indices: Int[np.ndarray, ' sample'] | None = None) -> dict[str, float]:
        """Return recalls at 1, 5 and 10 in percent, and their means; see `RetrievalRanks.aggregate`.

        Args:
          indices: the images, with their texts; None: all.
        """
        values = self.ranks.aggregate(indices)
        return {name: values[of_lavis] for of_lavis, name in _RECALLS.items()}


def _retrieval(found: Search, items: Items) -> Scored:
    del items
    return _Recalls(retrieval_ranks(found.of_images, found.image_of_text, text_similarity=found.of_texts))


def _answer_entry(item: Item, prediction: str) -> dict[str, Any]:
    return {'question_id': item.id, 'answer': prediction}


# GQA's evaluator compares ids as texts.
def _gqa_entry(item: Item, prediction: str) -> dict[str, Any]:
    return {'questionId': str(item.id), 'prediction': prediction}


def _vizwiz_entry(item: Item, prediction: str) -> dict[str, Any]:
    return {'image': str(item.image_id), 'answer': prediction}


def _caption_entry(item: Item, prediction: str) -> dict[str, Any]:
    return {'image_id': item.image_id, 'caption': prediction}


def _register(name: str, headline: str, score: Score, entry: Entry | None = None, *, version: int = 1) -> None:
    """Register the task of a benchmark, under the same name; the benchmark says its kind."""
    TASKS.register(name, Task(name, BENCHMARKS.find(name).task, headline, score, entry, version))


for _name in ('vqav2_val', 'vqav2_testdev', 'vqav2_test'):
    _register(_name, 'accuracy', _vqa(), _answer_entry)
# The paper lemmatises the answers of OK-VQA only.
_register('ok_vqa_val2014', 'accuracy', _vqa(lemmatise=True), _answer_entry)
# In version 1, the words in the image stood before the question for LLaVA too.
_register('textvqa_val', 'accuracy', _vqa('evalai'), _answer_entry, version=2)
_register('vizwiz_vqa_val', 'accuracy', _vqa('evalai'), _vizwiz_entry)
for _name in ('gqa', 'gqa_val'):
    _register(_name, 'accuracy', _gqa, _gqa_entry)
# Letters and yes or no are scored here; their benchmarks have no server.
_register('scienceqa_img', 'accuracy', _science_qa)
_register('pope', 'mean_f1', _pope)
# CIDEr is what captioning papers compare.
for _name in ('coco_karpathy_test', 'coco_karpathy_val', 'coco2014_cap_val', 'coco2017_cap_val', 'flickr30k_test'):
    _register(_name, 'CIDEr', _captions, _caption_entry)
_register('nocaps_val', 'CIDEr', _nocaps, _caption_entry)
for _name in ('flickr30k_test_retrieval', 'coco_karpathy_test_retrieval'):
    _register(_name, 'text_R@1', _retrieval)


def _exact_match(predictions: Sequence[str], items: Items) -> Scored:
    # Right if it is one of the references.
    scores = [
        max(score_answer(EXACT_MATCH, prediction, reference) for reference in references)
        for prediction, references in zip(predictions, references_of(items), strict=True)
    ]
    return grouped_means(np.array(scores, np.float64), groups_of(items, tuple(items.groups)))


# What the `metric` of a user's own data may be: the kind of task, the value that tables show, and the scores.
USER_METRICS: dict[str, tuple[TaskKind, str, Score]] = {
    'exact_match': ('answer', 'accuracy', _exact_match),
    'vqa': ('answer', 'accuracy', _vqa()),
    'vqa_lavis': ('answer', 'accuracy', _vqa('lavis')),
    'vqa_evalai': ('answer', 'accuracy', _vqa('evalai')),
    'captions': ('caption', 'CIDEr', _captions),
    'retrieval': (RETRIEVAL, 'text_R@1', _retrieval),
}


class LoadedTask(NamedTuple):
    """A task with its items.

    Attributes:
      task: the task.
      items: all of its items.
    """

    task: Task
    items: Items


def check_name(name: str) -> None:
    """Check that there is a task of a name; no file of data is read.

    Args:
      name: a registered name, `package.module:Name`, or a folder with a `data.jsonl`.

    Raises:
      DataError: there is no such task; the message suggests the nearest name.
    """
    if _own_file(name) is None:
        find_task(name)


def find_task(name: str) -> Task:
    """Return a task by its name.

    Args:
      name: a registered name, or `package.module:Name`.

    Raises:
      DataError: there is no such task; the message suggests the nearest name.

    >>> find_task('gqa').headline
    'accuracy'
    """
    try:
        task = TASKS.find(name)
    except UnknownNameError as error:
        raise DataError(str(error)) from None
    if not isinstance(task, Task):
        raise DataError(f'task {name!r}: expected a tasks.Task, not a {type(task).__name__}')
    return task


def load_task(name: str, discovery: Discovery | None, *, tolerance: float = 0.0) -> LoadedTask:
    """Return a task by its name, with its items; each file is read once.

    Args:
      name: see `check_name`.
      discovery: the files of all benchmarks; None: there is no folder of them, only users' own data.
      tolerance: largest share of images that may be missing; their items are left out.

    Raises:
      DataError: there is no such task; its files are missing or broken; or a user's file names no known metric.
    """
    file = _own_file(name)
    if file is None:
        task = find_task(name)
        if discovery is None:
            raise DataError(f'{name}: no folder is given that holds its files')
        return LoadedTask(task, load.load(task.benchmark, discovery, tolerance=tolerance))
    items = load.load_user_file(file, tolerance=tolerance)
    # Only the file says by which metric it is scored.
    metric = items.metric or 'exact_match'
    if metric not in USER_METRICS:
        raise DataError(f'{file}: metric {metric!r}: expected one of {", ".join(USER_METRICS)}')
    kind, headline, score_of_metric = USER_METRICS[metric]
    return LoadedTask(Task(str(file), kind, headline, score_of_metric), items)


def _own_file(name: str) -> Path | None:
    """Return the file of a user's own data that a name means; None: it means something else."""
    # A folder that happens to have the name of a task does not hide it.
    return None if name in TASKS else user_jsonl.find_file(name)


def is_own_data(name: str) -> bool:
    """Return whether a name means a folder of a user's own, which needs no files of benchmarks.

    Args:
      name: see `check_name`.
    """
    return _own_file(name) is not None


def expected_items(task: Task) -> int | None:
    """Return the number of items that published scores are about; None: not known.

    Args:
      task: the task.
    """
    return find_benchmark(task.benchmark).count if task.benchmark in BENCHMARKS else None
