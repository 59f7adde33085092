"""GQA (arXiv 1902.09506): an object of questions by their ids, as published, or a list of them, as LAVIS has it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sparselora_jax.data.benchmarks import records
from sparselora_jax.data.benchmarks.items import ItemsBuilder
from sparselora_jax.data.benchmarks.json_stream import Entry, entries, for_each
from sparselora_jax.data.benchmarks.sniff import FileFacts, Head, count_bytes, facts, subset_in_name
from sparselora_jax.data.benchmarks.source import Source, one_file, with_marks

KIND = 'gqa_questions'
# Many data sets have a folder `images`, so one of GQA's own is preferred.
IMAGE_FOLDERS = ('gqa/images', 'images')

# Number of questions of the balanced files. Images of the training and validation splits have the same kind of ids, so
# without a telling name only the counts tell these splits apart.
_SUBSETS = {943_000: 'train', 132_062: 'val', 12_578: 'testdev'}
_TYPES = ('structural', 'semantic', 'detailed')


def recognise(head: Head) -> FileFacts | None:
    """Return the facts of a file of questions of GQA; None for other files.

    Args:
      head: the beginning of the file.
    """
    # A list is LAVIS's.
    if head.form == 'object':
        questions = [member.value for member in head.members.values()]
        needed = {'question', 'imageId'}
        image_key = 'imageId'
    else:
        questions = head.records
        needed = {'question', 'question_id', 'image'}
        image_key = 'image'
    first = questions[0] if questions else None
    if head.form == 'lines' or not isinstance(first, dict) or not needed <= first.keys():
        return None
    # LAVIS's lists of VQA have lists of answers.
    if head.form == 'list' and not isinstance(first.get('answer'), str):
        return None
    return facts(
        head.path,
        KIND,
        subset=_subset(head.path, str(first[image_key]), image_key),
        balance=_balance(head.path, questions),
        first=str(first[image_key]),
        form=head.form,
    )


def _subset(path: Path, image: str, image_key: str) -> str:
    # Images of testdev have ids of their own, such as n161313.
    if re.match(r'n\d', image):
        return 'testdev'
    by_name = subset_in_name(path, ('train', 'val', 'testdev', 'test', 'challenge', 'submission'))
    return by_name or _SUBSETS.get(count_bytes(path, f'"{image_key}"'.encode()), '')


def _balance(path: Path, questions: list[object]) -> str:
    """Return 'balanced' or 'all'; '' if it cannot be told."""
    if any(isinstance(question, dict) and question.get('isBalanced') is False for question in questions):
        return 'all'
    # A file with all questions may begin with some balanced ones.
    return subset_in_name(path, ('balanced', 'all'))


@dataclass(frozen=True)
class GqaQuestions:
    """Finds the balanced questions of a split; see `source.Finder`.

    Attributes:
      subset: 'testdev' or 'val'.
    """

    subset: str

    def find(self, files: Sequence[FileFacts]) -> Source | None:
        """Return the file of questions; None if there is none.

        Args:
          files: all data files that were recognised.

        Raises:
          DataError: several files could be meant.
        """
        candidates = with_marks(files, KIND, subset=self.subset, balance='balanced')
        # The published file tells the types of questions, LAVIS's list does not.
        published = [file for file in candidates if file.mark('form') == 'object']
        what = f'questions of GQA, {self.subset}, balanced'
        return one_file(published or candidates, what, fill, IMAGE_FOLDERS)


def fill(builder: ItemsBuilder, path: Path) -> None:
    """Add the questions of a file. Ids are texts, as the published evaluation script expects them.

    Args:
      builder: where to add them.
      path: the file.

    Raises:
      DataError: the file is broken.
    """

    def add(entry: Entry) -> None:
        record = entry.value
        if entry.index is None:
            question_id = entry.key
            image_id = records.text(record, 'imageId')
            image = f'{image_id}.jpg'
        else:
            question_id = str(records.number_or_text(record, 'question_id'))
            image = records.text(record, 'image')
            # The published files call the image by this part of its name.
            image_id = image.rpartition('/')[2].removesuffix('.jpg')
        # The test and challenge splits have no answers.
        answer = records.optional_text(record, 'answer')
        builder.add(
            question_id,
            builder.image_file(image, image_id),
            question=records.text(record, 'question'),
            references=(answer,) if answer else (),
            groups=groups_of(record.get('types')),
        )

    for_each(entries(path), path, add)


def groups_of(types: object) -> dict[str, str]:
    """Return the groups of a question: its structural, semantic and detailed type.

    Args:
      types: the field `types` of a question; None if it has none.

    Raises:
      DataError: a type is not a text.
    """
    return {} if types is None else {name: records.optional_text(types, name) for name in _TYPES}
