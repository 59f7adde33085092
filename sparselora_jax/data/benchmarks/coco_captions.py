"""Captions of COCO, NoCaps and Flickr30k as published.

- COCO's form: {"images": [{"id", "file_name", ...}], "annotations": [{"image_id", "id", "caption"}]}. NoCaps has it
  too, with `open_images_id` and, in current downloads, `domain` in each image; its test split has no annotations.
- Karpathy's form (arXiv 1412.2306), `dataset_coco.json` and `dataset_flickr30k.json`: {"images": [{"filename", "split",
  "sentences": [{"raw"}], ...}], "dataset"}, where images of COCO also have `filepath` and `cocoid`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sparselora_jax.data.benchmarks import records
from sparselora_jax.data.benchmarks.items import ItemsBuilder
from sparselora_jax.data.benchmarks.json_stream import Entry, entries, for_each
from sparselora_jax.data.benchmarks.lavis import id_of_image
from sparselora_jax.data.benchmarks.sniff import FileFacts, Head, facts, subset_in_name
from sparselora_jax.data.benchmarks.source import Source, one_file, with_marks
from sparselora_jax.runtime.errors import DataError

# Kinds of files, see `sniff.FileFacts`.
COCO = 'coco_captions'
NOCAPS = 'nocaps'
KARPATHY = 'karpathy'

_SUBSETS = ('train2014', 'val2014', 'test2014', 'test2015', 'train2017', 'val2017', 'test2017')
# Users unpack the images of NoCaps by many names, since the release only lists their addresses.
_IMAGE_FOLDERS = {
    'val2014': ('val2014',),
    'val2017': ('val2017',),
    'nocaps': ('nocaps/images', 'nocaps/val', 'val', 'validation', 'val_imgs', 'images'),
    'coco': ('val2014', 'val2017', 'train2017'),
    'flickr30k': ('flickr30k-images', 'flickr30k_images', 'images'),
}


def recognise(head: Head) -> FileFacts | None:
    """Return the facts of a file of captions in COCO's or Karpathy's form; None for other files.

    Args:
      head: the beginning of the file.
    """
    # COCO has many files of this form, which differ in their annotations: boxes, key points, captions.
    is_candidate = {'images', 'annotations'} & head.members.keys()
    image = head.first('images') if head.form == 'object' and is_candidate else None
    if not isinstance(image, dict):
        return None
    if {'sentences', 'split', 'filename'} <= image.keys():
        # The name of the data set stands at the end of the file, behind megabytes of captions.
        data_set = 'coco' if 'cocoid' in image else head.text('dataset')
        return facts(head.path, KARPATHY, data_set=data_set, first=str(image['filename']))
    # Behind the images, and so usually behind the head.
    annotation = head.first('annotations')
    has_captions = isinstance(annotation, dict) and {'image_id', 'caption'} <= annotation.keys()
    if 'open_images_id' in image:
        subset = 'val' if has_captions else subset_in_name(head.path, ('val', 'test'))
        return facts(
            head.path, NOCAPS, captions='yes' if has_captions else 'no', subset=subset, first=str(image.get('id'))
        )
    if has_captions and 'file_name' in image:
        return facts(head.path, COCO, subset=_subset(image, head.path), first=str(image.get('id')))
    return None


def _subset(image: dict, path: Path) -> str:
    """Return the subset of COCO that an image belongs to, or 'other' if it is no image of COCO."""
    # The addresses of the release of 2017 have its folders; its file names have none.
    for name in ('file_name', 'coco_url'):
        words = set(re.findall(r'(?:train|val|test)20\d\d', str(image.get(name, ''))))
        for subset in _SUBSETS:
            if subset in words:
                return subset
    if not re.fullmatch(r'\d{12}\.jpg', str(image['file_name'])):
        return 'other'
    return next((subset for subset in _SUBSETS if subset in path.stem), '')


@dataclass(frozen=True)
class CocoCaptions:
    """Finds a file in COCO's form; see `source.Finder`.

    Attributes:
      kind: `COCO` or `NOCAPS`.
      subset: 'val2014' or 'val2017' of COCO, 'val' of NoCaps.
    """

    kind: str
    subset: str

    def find(self, files: Sequence[FileFacts]) -> Source | None:
        """Return the file; None if there is none.

        Args:
          files: all data files that were recognised.

        Raises:
          DataError: several files could be meant.
        """
        # A folder may hold the files of all splits, which look alike.
        marks = {'subset': self.subset}
        if self.kind == NOCAPS:
            # The splits also have files without captions, for those who only need the images.
            marks['captions'] = 'yes'
        candidates = with_marks(files, self.kind, **marks)
        folders = _IMAGE_FOLDERS['nocaps' if self.kind == NOCAPS else self.subset]
        return one_file(candidates, f'captions of {self.kind}, {self.subset}', fill, folders)


def fill(builder: ItemsBuilder, path: Path) -> None:
    """Add the images of a file in COCO's form and their captions, in the order of the images.

    Args:
      builder: where to add them.
      path: the file.

    Raises:
      DataError: the file is broken, or a caption belongs to none of its images.
    """
    # Images and captions may come in either order, so both are read before the first item is added.
    images: dict[int, tuple[str, str]] = {}  # id -> file name, domain
    captions: dict[int, list[str]] = {}

    def read(entry: Entry) -> None:
        if entry.key == 'images':
            image_id = records.integer(entry.value, 'id')
            if image_id in images:
                raise DataError(f'the id {image_id} occurs twice; each image needs its own')
            domain = records.optional_text(entry.value, 'domain')
            images[image_id] = (records.text(entry.value, 'file_name'), domain)
        elif entry.key == 'annotations':
            image_id = records.integer(entry.value, 'image_id')
            captions.setdefault(image_id, []).append(records.text(entry.value, 'caption'))

    for_each(entries(path), path, read)
    # Files of two releases have the same form, and mixed they would lose captions without a word.
    strangers = captions.keys() - images.keys()
    if strangers:
        which = f'{len(strangers):,} images that are not in the file, such as {min(strangers)}'
        raise DataError(f'{path}: images and annotations do not belong together: captions of {which}')
    for image_id, (file_name, domain) in images.items():
        # An image without captions has no references, as in a test split.
        # Popped, so that a caption is not stored twice at any time.
        builder.add(
            image_id,
            builder.image_file(file_name, image_id),
            references=captions.pop(image_id, ()),
            groups={'domain': domain},
        )


@dataclass(frozen=True)
class KarpathySplit:
    """Finds a file in Karpathy's form; see `source.Finder`.

    Attributes:
      data_set: 'coco' or 'flickr30k'.
      subset: 'val' or 'test'.
    """

    data_set: str
    subset: str

    def find(self, files: Sequence[FileFacts]) -> Source | None:
        """Return the file; None if there is none.

        Args:
          files: all data files that were recognised.

        Raises:
          DataError: several files could be meant.
        """
        candidates = with_marks(files, KARPATHY, data_set=self.data_set)

        def fill_subset(builder: ItemsBuilder, path: Path) -> None:
            fill_karpathy(builder, path, self.subset)

        return one_file(candidates, f"Karpathy's splits of {self.data_set}", fill_subset, _IMAGE_FOLDERS[self.data_set])


def fill_karpathy(builder: ItemsBuilder, path: Path, subset: str) -> None:
    """Add the images of one split of a file in Karpathy's form, and their captions.

    Args:
      builder: where to add them.
      path: the file.
      subset: 'train', 'restval', 'val' or 'test'.

    Raises:
      DataError: the file is broken, or has no image of this split.
    """
    subsets: dict[str, None] = {}

    def add(entry: Entry) -> None:
        if entry.key != 'images':
            return
        subset_of_image = records.text(entry.value, 'split')
        subsets[subset_of_image] = None  # as a dict, which keeps the order for the message
        if subset_of_image != subset:
            return
        name = records.text(entry.value, 'filename')
        # Flickr30k has no ids but the numbers in its file names.
        is_coco = 'cocoid' in entry.value
        folder = records.optional_text(entry.value, 'filepath')
        # `imgid` only counts the images of this file.
        identifier = records.integer(entry.value, 'cocoid') if is_coco else id_of_image(name)
        builder.add(
            identifier,
            builder.image_file(f'{folder}/{name}' if folder else name, identifier),
            references=[records.text(sentence, 'raw') for sentence in records.items(entry.value, 'sentences')],
        )

    for_each(entries(path), path, add)
    if not len(builder):
        raise DataError(f'{path}: no image of the split {subset!r}, only of {", ".join(subsets) or "none"}')
