"""POPE (arXiv 2305.10355): JSON lines {"question_id", "image", "text": "Is there a dog in the image?", "label": "yes"}.

There are three files, of objects that are absent at random, popular, or adversarial. The name of a file is all that
tells which it is. Their question ids begin at 1 each, so the ids of the items are texts such as 'random/1'.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sparselora_jax.data.benchmarks import records
from sparselora_jax.data.benchmarks.items import ItemsBuilder
from sparselora_jax.data.benchmarks.json_stream import Entry, for_each, lines
from sparselora_jax.data.benchmarks.lavis import id_of_image
from sparselora_jax.data.benchmarks.sniff import FileFacts, Head, facts, subset_in_name
from sparselora_jax.data.benchmarks.source import Source, choose, with_marks
from sparselora_jax.runtime.errors import DataError

KIND = 'pope_questions'  # see `sniff.FileFacts`
# In the order in which papers report them.
CATEGORIES = ('random', 'popular', 'adversarial')


def recognise(head: Head) -> FileFacts | None:
    """Return the facts of a file of questions of POPE; None for other files.

    Args:
      head: the beginning of the file.
    """
    if head.form == 'list' or not {'question_id', 'image', 'text', 'label'} <= head.members.keys():
        return None
    return facts(
        head.path,
        KIND,
        category=subset_in_name(head.path, CATEGORIES),
        # The same questions exist about other data sets, whose names the files have.
        images=subset_in_name(head.path, ('coco', 'aokvqa', 'gqa')),
        first=str(head.members['image'].value),
    )


@dataclass(frozen=True)
class Pope:
    """Finds the files of the three categories; see `source.Finder`."""

    def find(self, files: Sequence[FileFacts]) -> Source | None:
        """Return the files of all categories that are there; None if there is none.

        Args:
          files: all data files that were recognised.

        Raises:
          DataError: several files could be meant, or the name of one does not say its category.
        """
        paths = {}
        for category in CATEGORIES:
            named = [file for file in files if file.kind == KIND and file.mark('category') == category]
            chosen = choose(with_marks(named, KIND, images='coco'), f'questions of POPE, {category}')
            if chosen is not None:
                paths[category] = chosen.path
        others = [file for file in files if file.kind == KIND and not file.mark('category')]
        if not paths and others:
            expected = ', '.join(CATEGORIES)
            raise DataError(f'{others[0].path}: the name of a file of POPE must say its category, one of {expected}')
        if not paths:
            return None
        return Source(tuple(paths.values()), lambda builder: fill(builder, paths), ('val2014', 'val2017'))


def fill(builder: ItemsBuilder, paths: dict[str, Path]) -> None:
    """Add the questions of all categories.

    Args:
      builder: where to add them.
      paths: the file of each category.

    Raises:
      DataError: a file is broken, or a label is neither 'yes' nor 'no'.
    """
    for category, path in paths.items():
        # The category is a default value, because the function outlives its round of the loop.
        def add(entry: Entry, category: str = category) -> None:
            image = records.text(entry.value, 'image')
            builder.add(
                f'{category}/{records.integer(entry.value, "question_id")}',
                builder.image_file(image, id_of_image(image)),
                question=records.text(entry.value, 'text'),
                references=(yes_or_no(entry.value, 'label'),),
                groups={'category': category},
            )

        for_each(lines(path), path, add)
    # One category alone is a result too.
    absent = [category for category in CATEGORIES if category not in paths]
    if absent:
        builder.notes.append(f'no file of the categories {", ".join(absent)}')


def yes_or_no(record: object, name: str) -> str:
    """Return a field that must be 'yes' or 'no'.

    Args:
      record: a decoded record.
      name: the field.

    Raises:
      DataError: it is something else.
    """
    answer = records.text(record, name)
    if answer not in ('yes', 'no'):
        raise DataError(f"{name} is {records.quote(answer)}, neither 'yes' nor 'no'")
    return answer
