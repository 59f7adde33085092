"""VQAv2 and OK-VQA as published: a file of questions, and a file of annotations with their answers.

The test splits of VQAv2 have no annotations. Schemas: visualqa.org/download and okvqa.allenai.org/download.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sparselora_jax.data.benchmarks import records
from sparselora_jax.data.benchmarks.items import ItemsBuilder
from sparselora_jax.data.benchmarks.json_stream import Entry, entries, for_each
from sparselora_jax.data.benchmarks.sniff import FileFacts, Head, facts
from sparselora_jax.data.benchmarks.source import Source, choose, with_marks
from sparselora_jax.runtime.errors import DataError

# Kinds of files, see `sniff.FileFacts`.
QUESTIONS = 'vqa_questions'
ANNOTATIONS = 'vqa_annotations'

# A question's id is its image's id times this number plus a count. VQA of 2015 and OK-VQA use 10.
_FACTORS = {'vqav2': 1000, 'ok_vqa': 10}
# OK-VQA codes its categories (arXiv 1906.00067, figure 3).
_OK_VQA_CATEGORIES = {
    'one': 'Vehicles and Transportation',
    'two': 'Brands, Companies and Products',
    'three': 'Objects, Material and Clothing',
    'four': 'Sports and Recreation',
    'five': 'Cooking and Food',
    'six': 'Geography, History, Language and Culture',
    'seven': 'People and Everyday life',
    'eight': 'Plants and Animals',
    'nine': 'Science and Technology',
    'ten': 'Weather and Climate',
    'other': 'Other',
}


def factor_of(question_id: object, image_id: object) -> str:
    """Return by which of the known factors a question's id follows from its image's id, as a text; '' if by none.

    Args:
      question_id: id of a question.
      image_id: id of its image.

    >>> factor_of(262148000, 262148), factor_of(2971475, 297147)
    ('1000', '10')
    """
    if not isinstance(question_id, int) or not isinstance(image_id, int):
        return ''
    return next((str(factor) for factor in _FACTORS.values() if question_id // factor == image_id), '')


def coco_image(image_id: int, subset: str) -> str:
    """Return the path of an image of COCO in the release of 2014 or 2015.

    Args:
      image_id: id of the image.
      subset: 'train2014', 'val2014', 'test2015' or 'test-dev2015'.

    Raises:
      DataError: the id has more digits than COCO's.

    >>> coco_image(42, 'test-dev2015')
    'test2015/COCO_test2015_000000000042.jpg'
    """
    if not 0 <= image_id < 10**12:
        raise DataError(f'image_id is {image_id}; ids of COCO have at most 12 digits')
    # Test-dev is a part of the test split, and has no folder of its own.
    folder = subset.replace('test-dev', 'test')
    return f'{folder}/COCO_{folder}_{image_id:012d}.jpg'


def recognise(head: Head) -> FileFacts | None:
    """Return the facts of a file of questions or annotations; None for other files.

    Args:
      head: the beginning of the file.
    """
    # Only the head is asked for these keys: files of other data sets would be searched to their end.
    for key, kind, needed in (('questions', QUESTIONS, 'question'), ('annotations', ANNOTATIONS, 'answers')):
        member = head.members.get(key)
        if member is None or not member.is_list or not isinstance(member.value, dict):
            continue
        record = member.value
        if not {'question_id', 'image_id', needed} <= record.keys():
            continue
        return facts(
            head.path,
            kind,
            subset=head.text('data_subtype'),
            factor=factor_of(record['question_id'], record['image_id']),
            first=str(record['question_id']),
            data_set=_data_set(record) if kind == ANNOTATIONS else '',
        )
    return None


def _data_set(annotation: dict) -> str:
    """Return which data set an annotation belongs to: only OK-VQA stores raw answers beside its stemmed answers."""
    answers = annotation['answers']
    is_raw = isinstance(answers, list) and any('raw_answer' in answer for answer in answers if isinstance(answer, dict))
    if is_raw:
        return 'ok_vqa'
    # VQA of 2015 has the keys of VQAv2, which replaced it.
    factor = factor_of(annotation['question_id'], annotation['image_id'])
    return 'vqa_of_2015' if factor == str(_FACTORS['ok_vqa']) else 'vqav2'


@dataclass(frozen=True)
class VqaPair:
    """Finds the published files of a split; see `source.Finder`.

    Attributes:
      data_set: 'vqav2' or 'ok_vqa'.
      subset: the `data_subtype` of the files.
      has_answers: whether the split has annotations.
    """

    data_set: str
    subset: str
    has_answers: bool = True

    def find(self, files: Sequence[FileFacts]) -> Source | None:
        """Return the files of the split; None if they are not there.

        Args:
          files: all data files that were recognised.

        Raises:
          DataError: several files could be meant.
        """
        what = f'{self.data_set}, {self.subset}'
        factor = str(_FACTORS[self.data_set])
        questions = with_marks(files, QUESTIONS, subset=self.subset, factor=factor)
        annotations = None
        # Annotations are chosen first, since only they tell the data sets apart.
        if self.has_answers:
            annotations = choose(
                with_marks(files, ANNOTATIONS, subset=self.subset, data_set=self.data_set), f'annotations of {what}'
            )
            # Without answers the split could be asked, but not scored, so another format is looked for.
            if annotations is None:
                return None
            # VQA of 2015 has files of questions that look like those of OK-VQA.
            same = [file for file in questions if file.mark('first') == annotations.mark('first')]
            questions = same or questions
        chosen = choose(questions, f'questions of {what}')
        if chosen is None:
            return None
        pair = (chosen.path,) if annotations is None else (chosen.path, annotations.path)
        return Source(pair, lambda builder: fill(builder, *pair, subset=self.subset), ('val2014', 'val2017'))


class _Annotation(NamedTuple):
    image_id: int
    answers: tuple[str, ...]
    groups: dict[str, str]


def fill(builder: ItemsBuilder, questions: Path, annotations: Path | None = None, *, subset: str | None = None) -> None:
    """Add the questions of a split, in the order of their file.

    Args:
      builder: where to add them.
      questions: the file of questions.
      annotations: the file of annotations; None for a test split.
      subset: where the images come from, such as 'val2014'. None: as the file says.

    Raises:
      DataError: a file is broken, or the two do not belong together.
    """
    answers: dict[int, _Annotation] = {}
    subset_of_annotations = ''
    if annotations is not None:
        subset_of_annotations = _read_annotations(annotations, answers)
    subset = subset or next((mark for mark in [subset_of_annotations, _read_subset(questions)] if mark), 'val2014')
    # Differences are collected and reported together: one may be a slip, but many mean the wrong file.
    without: list[int] = []  # questions that have no annotation
    other_images: list[int] = []  # questions whose annotation is about another image
    subset_of_questions = ''

    def add(entry: Entry) -> None:
        nonlocal subset_of_questions
        if entry.key == 'data_subtype' and isinstance(entry.value, str):
            subset_of_questions = entry.value
        if entry.key != 'questions':
            return
        question_id = records.integer(entry.value, 'question_id')
        image_id = records.integer(entry.value, 'image_id')
        # What is left in the end are annotations without a question.
        annotation = answers.pop(question_id, None)
        if annotation is None and annotations is not None and question_id not in builder:
            without.append(question_id)
        elif annotation is not None and annotation.image_id != image_id:
            other_images.append(question_id)
        builder.add(
            question_id,
            builder.image_file(coco_image(image_id, subset), image_id),
            question=records.text(entry.value, 'question'),
            references=annotation.answers if annotation else (),
            groups=annotation.groups if annotation else {},
        )

    for_each(entries(questions), questions, add)
    # A test split needs no agreement.
    if annotations is None:
        return
    # All differences in one message: one alone may mislead about which file is the wrong one.
    differences = []
    if subset_of_questions and subset_of_annotations and subset_of_questions != subset_of_annotations:
        differences.append(f'data_subtype is {subset_of_questions!r} and {subset_of_annotations!r}')
    if without:
        differences.append(f'{len(without):,} of {len(builder):,} questions have no annotation, such as {without[0]}')
    if answers:
        differences.append(f'{len(answers):,} annotations have no question, such as {next(iter(answers))}')
    if other_images:
        differences.append(f'{len(other_images):,} questions have other images, such as {other_images[0]}')
    if differences:
        raise DataError(f'{questions} and {annotations} do not belong together: {"; ".join(differences)}')


def groups_of(record: object) -> dict[str, str]:
    """Return the groups of a question: its answer type, its question type and, in OK-VQA, its category in words.

    Args:
      record: the annotation.

    Raises:
      DataError: a type is not a text.
    """
    groups = {name: records.optional_text(record, name) for name in ('answer_type', 'question_type')}
    # Types of VQAv2 are the first words of questions, and none of them is a code of OK-VQA.
    category = _OK_VQA_CATEGORIES.get(groups['question_type'])
    return groups | {'category': category} if category else groups


def _read_subset(questions: Path) -> str:
    """Return the `data_subtype` of a file of questions if it stands before the questions, otherwise ''."""
    for entry in entries(questions):
        if entry.key == 'data_subtype' and isinstance(entry.value, str):
            return entry.value
        if entry.key == 'questions':
            break
    return ''


def _read_annotations(path: Path, answers: dict[int, _Annotation]) -> str:
    """Read the annotations of all questions into a dict, and return the `data_subtype`."""
    subset = ''
    # Few answers and groups are different, and each is stored once.
    known_texts: dict[str, str] = {}
    known_groups: dict[tuple[str, str], dict[str, str]] = {}

    def add(entry: Entry) -> None:
        nonlocal subset
        if entry.key == 'data_subtype' and isinstance(entry.value, str):
            subset = entry.value
        if entry.key != 'annotations':
            return
        record = entry.value
        question_id = records.integer(record, 'question_id')
        # JSON allows it, and the later one would win without a word.
        if question_id in answers:
            raise DataError(f'question {question_id} has a second annotation')
        types = (records.optional_text(record, 'question_type'), records.optional_text(record, 'answer_type'))
        groups = known_groups.get(types)
        if groups is None:
            groups = groups_of(record)
            known_groups[types] = groups
        texts = tuple(known_texts.setdefault(text, text) for text in records.answer_texts(record))
        answers[question_id] = _Annotation(records.integer(record, 'image_id'), texts, groups)

    for_each(entries(path), path, add)
    return subset
