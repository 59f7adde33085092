"""Annotation files of LAVIS (github.com/salesforce/LAVIS): lists of questions or captions, each with an image's path.

- questions: {"question_id", "question", "answer": ten texts, or none in a test split, "image": "val2014/COCO_...jpg"}
- captions: {"image", "caption": a list of texts}, for COCO and Flickr30k by the splits of Karpathy

GQA's lists are read in `gqa.py`. The list of NoCaps has no captions, so the published file is needed anyway.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sparselora_jax.data.benchmarks import records
from sparselora_jax.data.benchmarks.items import ItemsBuilder
from sparselora_jax.data.benchmarks.json_stream import Entry, entries, for_each
from sparselora_jax.data.benchmarks.sniff import FileFacts, Head, count_bytes, facts, subset_in_name
from sparselora_jax.data.benchmarks.source import Source, one_file, with_marks
from sparselora_jax.data.benchmarks.vqa_pair import factor_of
from sparselora_jax.runtime.errors import DataError

# Kinds of files, see `sniff.FileFacts`.
QUESTIONS = 'lavis_questions'
CAPTIONS = 'lavis_captions'

# Both splits have 5,000 images of the same folder, so only the whole file tells them apart.
_KARPATHY_DIGESTS = {
    'b273847456ef5580e33713b1f7de52a0': 'val',
    '3ff34b0ef2db02d01c37399f6a2a6cd1': 'test',
}
# How ids of questions follow from ids of images, see `vqa_pair.factor_of`.
_FACTORS = {'vqav2': '1000', 'ok_vqa': '10'}


def id_of_image(name: str) -> int | str:
    """Return the id that an image's file name contains: the number behind the last '_', or the name before the dot.

    Args:
      name: path of the image.

    >>> id_of_image('val2014/COCO_val2014_000000391895.jpg'), id_of_image('flickr30k-images/1007129816.jpg')
    (391895, 1007129816)
    >>> id_of_image('val/0013ea2087020901.jpg')
    '0013ea2087020901'
    """
    stem = PurePosixPath(name).stem
    number = stem.rpartition('_')[2]
    # 18 digits fit into 64 bits.
    return int(number) if number.isascii() and number.isdigit() and len(number) <= 18 else stem


def recognise(head: Head) -> FileFacts | None:
    """Return the facts of a list of LAVIS; None for other files.

    Args:
      head: the beginning of the file.
    """
    record = head.records[0] if head.records else None
    if head.form != 'list' or not isinstance(record, dict) or not isinstance(record.get('image'), str):
        return None
    image = record['image']
    folder = PurePosixPath(image).parent.name
    # The answer of GQA is one text, see `gqa.py`.
    if {'question_id', 'question'} <= record.keys() and not isinstance(record.get('answer'), str):
        return facts(
            head.path,
            QUESTIONS,
            subset=folder or _subset_of_name(image),
            factor=factor_of(record['question_id'], id_of_image(image)),
            first=str(record['question_id']),
        )
    if 'caption' in record and 'question' not in record:
        # Names of Flickr30k are numbers.
        data_set = 'coco' if image.rpartition('/')[2].startswith('COCO_') else 'flickr30k'
        # The lists of training data have one caption per record.
        subset = _captions_subset(head.path) if isinstance(record['caption'], list) else 'train'
        return facts(head.path, CAPTIONS, data_set=data_set, subset=subset, first=image)
    return None


def _subset_of_name(image: str) -> str:
    """Return the subset that a file name of COCO says, or ''."""
    parts = image.split('_')
    return parts[1] if len(parts) == 3 and parts[0] == 'COCO' else ''


def _captions_subset(path: Path) -> str:
    # The file has two megabytes, and reading it is the only certain way.
    with path.open('rb') as file:
        digest = hashlib.file_digest(file, 'md5').hexdigest()
    return _KARPATHY_DIGESTS.get(digest) or subset_in_name(path, ('train', 'val', 'test'))


@dataclass(frozen=True)
class LavisQuestions:
    """Finds LAVIS's list of questions of a split; see `source.Finder`.

    Attributes:
      data_set: 'vqav2' or 'ok_vqa'.
      subset: folder of the images, such as 'val2014'.
    """

    data_set: str
    subset: str

    def find(self, files: Sequence[FileFacts]) -> Source | None:
        """Return the list with the most questions; None if there is none.

        Args:
          files: all data files that were recognised.

        Raises:
          DataError: several files could be meant.
        """
        candidates = with_marks(files, QUESTIONS, subset=self.subset, factor=_FACTORS[self.data_set])
        if len(candidates) > 1:
            # `vqa_val.json` has a part of the questions, and `vqa_val_eval.json` all of them.
            counts = [count_bytes(file.path, b'"question_id"') for file in candidates]
            candidates = [file for file, count in zip(candidates, counts, strict=True) if count == max(counts)]
        what = f"LAVIS's questions of {self.data_set}, {self.subset}"
        return one_file(candidates, what, fill_questions, ('val2014', 'val2017'))


def fill_questions(builder: ItemsBuilder, path: Path) -> None:
    """Add the questions of a list.

    Args:
      builder: where to add them.
      path: the file.

    Raises:
      DataError: the file is broken.
    """

    def add(entry: Entry) -> None:
        image = records.text(entry.value, 'image')
        builder.add(
            records.whole_number(entry.value, 'question_id'),
            builder.image_file(image, id_of_image(image)),
            question=records.text(entry.value, 'question'),
            # The list of the test split has no answers.
            references=records.optional_texts(entry.value, 'answer'),
        )

    for_each(entries(path), path, add)


@dataclass(frozen=True)
class LavisCaptions:
    """Finds LAVIS's list of captions of a split; see `source.Finder`.

    Attributes:
      data_set: 'coco' or 'flickr30k'.
      subset: 'val' or 'test'.
    """

    data_set: str
    subset: str

    def find(self, files: Sequence[FileFacts]) -> Source | None:
        """Return the list; None if there is none.

        Args:
          files: all data files that were recognised.

        Raises:
          DataError: several files could be meant.
        """
        candidates = with_marks(files, CAPTIONS, data_set=self.data_set, subset=self.subset)
        folders = ('val2014', 'val2017') if self.data_set == 'coco' else ('flickr30k-images', 'flickr30k_images')
        return one_file(candidates, f"LAVIS's captions of {self.data_set}, {self.subset}", fill_captions, folders)


def fill_captions(builder: ItemsBuilder, path: Path) -> None:
    """Add the images of a list and their captions.

    Args:
      builder: where to add them.
      path: the file.

    Raises:
      DataError: the file is broken.
    """

    def add(entry: Entry) -> None:
        image = records.text(entry.value, 'image')
        if not isinstance(records.field(entry.value, 'caption'), list):
            raise DataError('caption is one text: a list for training; expected the list of a val or test split')
        identifier = id_of_image(image)
        builder.add(
            identifier,
            builder.image_file(image, identifier),
            references=records.texts(entry.value, 'caption'),
        )

    for_each(entries(path), path, add)
