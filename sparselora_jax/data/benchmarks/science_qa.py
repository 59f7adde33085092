"""ScienceQA (arXiv 2209.09513): `problems.json`, an object of questions by their ids, and `pid_splits.json`.

The reference of a question is the letter of its choice, and its hint is the context. The image of question 11 of the
test split is `test/11/image.png`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparselora_jax.data.benchmarks import records
from sparselora_jax.data.benchmarks.items import ItemsBuilder
from sparselora_jax.data.benchmarks.json_stream import Entry, entries, for_each
from sparselora_jax.data.benchmarks.sniff import FileFacts, Head, facts
from sparselora_jax.data.benchmarks.source import Source, choose, with_marks
from sparselora_jax.runtime.errors import DataError

# Kinds of files, see `sniff.FileFacts`.
PROBLEMS = 'science_qa_problems'
SPLITS = 'science_qa_splits'
LETTERS = 'ABCDEFGHIJKLMNOPQRSTUVWXYZ'
GROUPS = ('subject', 'topic', 'category', 'grade')


def recognise(head: Head) -> FileFacts | None:
    """Return the facts of the file of problems or of splits; None for other files.

    Args:
      head: the beginning of the file.
    """
    if head.form != 'object' or not head.members:
        return None
    # All members of either file are alike, so the first says what they are.
    name, first = next(iter(head.members.items()))
    if isinstance(first.value, dict) and {'question', 'choices', 'answer', 'hint'} <= first.value.keys():
        return facts(head.path, PROBLEMS, first=name)
    # A file of splits holds lists of ids; the small splits have names that no other data set uses. They stand behind
    # the long list of training ids, and so behind the head.
    if name in ('train', 'val', 'test') and first.is_list and isinstance(first.value, str) and head.first('minival'):
        return facts(head.path, SPLITS, first=name)
    return None


@dataclass(frozen=True)
class ScienceQa:
    """Finds the files of ScienceQA; see `source.Finder`.

    Attributes:
      subset: 'train', 'val' or 'test'; only its questions with an image are read.
    """

    subset: str

    def find(self, files: Sequence[FileFacts]) -> Source | None:
        """Return the file of problems, and that of splits if it is there; None if there are no problems.

        Args:
          files: all data files that were recognised.

        Raises:
          DataError: several files could be meant.
        """
        problems = choose(with_marks(files, PROBLEMS), 'problems of ScienceQA')
        if problems is None:
            return None
        splits = choose(with_marks(files, SPLITS), 'splits of ScienceQA')
        splits_path = splits.path if splits else None
        paths = (problems.path,) if splits_path is None else (problems.path, splits_path)
        return Source(
            paths,
            lambda builder: fill(builder, problems.path, self.subset, splits_path),
            is_by_path=True,
        )


def fill(builder: ItemsBuilder, problems: Path, subset: str, splits: Path | None = None) -> None:
    """Add the questions of a split that have an image.

    Args:
      builder: where to add them.
      problems: the file of problems.
      subset: 'train', 'val' or 'test'.
      splits: the file of splits. None: each problem says its split.

    Raises:
      DataError: a file is broken, or the two do not belong together.
    """
    members: dict[str, None] = {}

    def read_split(entry: Entry) -> None:
        if entry.key == subset:
            members[records.text({'id': entry.value}, 'id')] = None

    def add(entry: Entry) -> None:
        if entry.index is not None:
            raise DataError('a list, expected a problem')
        # A problem says its split too, which is enough if there is no file of splits.
        is_member = entry.key in members if splits else records.text(entry.value, 'split') == subset
        # What is left at the end names problems that are not there.
        members.pop(entry.key, None)
        image = records.field(entry.value, 'image')
        if not is_member or image is None:
            return
        choices = records.texts(entry.value, 'choices')
        # Every image is called image.png, so its folders are part of its name.
        image_path = f'{subset}/{entry.key}/{records.text(entry.value, "image")}'
        builder.add(
            entry.key,
            builder.image_file(image_path, entry.key),
            question=records.text(entry.value, 'question'),
            references=(letter_of(entry.value, choices),),
            choices=choices,
            context=records.optional_text(entry.value, 'hint'),
            groups=groups_of(entry.value),
        )

    if splits is not None:
        for_each(entries(splits), splits, read_split)
        if not members:
            raise DataError(f'{splits}: no split {subset!r}')
    for_each(entries(problems), problems, add)
    if members:
        count = f'{len(members):,} ids of {subset!r} are no problems, such as {next(iter(members))}'
        raise DataError(f'{problems} and {splits} do not belong together: {count}')


def letter_of(record: object, choices: Sequence[str]) -> str:
    """Return the letter of the right choice.

    Args:
      record: the question; its field `answer` is the index of the choice.
      choices: the choices.

    Raises:
      DataError: there is no such choice.

    >>> letter_of({'answer': 1}, ['iron', 'gold'])
    'B'
    """
    # A negative index would silently count from the end.
    answer = records.integer(record, 'answer')
    if not 0 <= answer < min(len(choices), len(LETTERS)):
        raise DataError(f'answer is {answer}, but there are {len(choices)} choices')
    return LETTERS[answer]


def groups_of(record: Mapping) -> dict[str, str]:
    """Return the groups of a question: its subject, topic, category and grade.

    Args:
      record: the question.

    Raises:
      DataError: one of them is not a text.
    """
    return {name: records.optional_text(record, name) for name in GROUPS}
