"""VizWiz-VQA (arXiv 1802.08218): a list of {"image", "question", "answers", "answer_type", "answerable"}.

The questions have no ids: the server of the challenge takes the names of the images. The test split has no answers.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sparselora_jax.data.benchmarks import records
from sparselora_jax.data.benchmarks.items import ItemsBuilder
from sparselora_jax.data.benchmarks.json_stream import Entry, entries, for_each
from sparselora_jax.data.benchmarks.sniff import FileFacts, Head, facts, subset_in_name
from sparselora_jax.data.benchmarks.source import Source, one_file, with_marks

KIND = 'vizwiz_questions'


def recognise(head: Head) -> FileFacts | None:
    """Return the facts of a file of questions of VizWiz; None for other files.

    Args:
      head: the beginning of the file.
    """
    record = head.records[0] if head.records else None
    if not isinstance(record, dict) or not {'image', 'question'} <= record.keys() or 'question_id' in record:
        return None
    # Names of images say the split. A copy with other names must have all the keys of VizWiz.
    image = str(record['image'])
    name = re.search(r'VizWiz_(train|val|test)_', image)
    if not name and not {'answers', 'answer_type', 'answerable'} <= record.keys():
        return None
    subset = name[1] if name else subset_in_name(head.path, ('train', 'val', 'test'))
    return facts(head.path, KIND, subset=subset, first=image)


@dataclass(frozen=True)
class VizWiz:
    """Finds the file of a split; see `source.Finder`.

    Attributes:
      subset: 'val', for example.
    """

    subset: str

    def find(self, files: Sequence[FileFacts]) -> Source | None:
        """Return the file; None if there is none.

        Args:
          files: all data files that were recognised.

        Raises:
          DataError: several files could be meant.
        """
        candidates = with_marks(files, KIND, subset=self.subset)
        # A folder `val` alone may be that of another data set.
        folders = (f'vizwiz/{self.subset}', self.subset, 'images')
        return one_file(candidates, f'questions of VizWiz, {self.subset}', fill, folders)


def fill(builder: ItemsBuilder, path: Path) -> None:
    """Add the questions of a file.

    Args:
      builder: where to add them.
      path: the file.

    Raises:
      DataError: the file is broken.
    """

    def add(entry: Entry) -> None:
        image = records.text(entry.value, 'image')
        has_answers = entry.value.get('answers') is not None
        groups = {'answer_type': records.optional_text(entry.value, 'answer_type')}
        if entry.value.get('answerable') is not None:
            groups['answerable'] = 'yes' if records.integer(entry.value, 'answerable') else 'no'
        # Each image has one question, so the name of the image is an id.
        builder.add(
            image,
            builder.image_file(image, image),
            question=records.text(entry.value, 'question'),
            references=records.answer_texts(entry.value) if has_answers else (),
            groups=groups,
        )

    for_each(entries(path), path, add)
