"""Captions in JSON files: of COCO, NoCaps and Flickr30k as published, lists of LAVIS, regions of Visual Genome.

- COCO's and Karpathy's forms are those of `benchmarks.coco_captions`; of Karpathy's, the splits for training are read
- a list of LAVIS: {"image": "VG_100K/2.jpg", "caption": a text or a list of texts}, for COCO, Flickr30k, CC3M and VG
- `region_descriptions.json` of Visual Genome: [{"id": 2, "regions": [{"image_id": 2, "phrase": ...}]}]

Each caption is a record: an image with five captions is five records, as in the lists of LAVIS for training.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from sparselora_jax.data.benchmarks import coco_captions, lavis, records
from sparselora_jax.data.benchmarks.items import Items, ItemsBuilder
from sparselora_jax.data.benchmarks.json_stream import Entry, entries, for_each
from sparselora_jax.data.benchmarks.picture_files import PictureFiles
from sparselora_jax.data.benchmarks.sniff import FileFacts, Head, facts
from sparselora_jax.data.sources.pictures import ImageFile, check_missing, find_images
from sparselora_jax.data.sources.place import Place
from sparselora_jax.data.sources.source import SourceRecord
from sparselora_jax.runtime.errors import DataError

REGIONS = 'vg_regions'  # kind of file, see `sniff.FileFacts`
TRAIN = 'train'

_FOLDERS = {
    coco_captions.COCO: ('train2014', 'train2017', 'val2014'),
    coco_captions.NOCAPS: ('val', 'validation', 'images'),
    coco_captions.KARPATHY: ('train2014', 'val2014', 'flickr30k-images', 'flickr30k_images'),
    lavis.CAPTIONS: ('train2014', 'val2014', 'flickr30k-images'),
    REGIONS: ('VG_100K', 'VG_100K_2', 'images'),
}


class CaptionItems:
    """The captions of a file, whose images are files; see `source.OpenedSource`."""

    def __init__(self, path: Path, items: Items, names: Sequence[str], pictures: PictureFiles, notes: tuple[str, ...]):
        """Take items with their captions, each of which becomes a record.

        Args:
          path: the file.
          items: its items; their references are the captions.
          names: names of the images as the file has them.
          pictures: their images.
          notes: what a user should know.
        """
        self.path = path
        self.notes = notes
        self._items = items
        # Not those of `pictures`, which depend on the folders in which the images were found.
        self._names = names
        self._pictures = pictures
        is_missing = np.zeros(len(pictures), bool)
        is_missing[pictures.missing] = True
        # References are stored one after the other, so a caption is known by its place among all of them.
        self._item_of_caption = np.repeat(np.arange(len(items), dtype=np.int32), items.references.lengths)
        self._captions = np.flatnonzero(~is_missing[items.images[self._item_of_caption]])

    def __len__(self) -> int:
        return len(self._captions)

    def __getitem__(self, index: int) -> SourceRecord:
        caption = self._captions[index]
        text = self._items.texts[self._items.references.codes[caption]]
        picture = self._pictures[self._image(index)]
        return SourceRecord(ImageFile(picture.path), text)

    def _image(self, index: int) -> int:
        return int(self._items.images[self._item_of_caption[self._captions[index]]])

    def image_name(self, index: int) -> str:
        """Return the name of an image as the file has it.

        Args:
          index: which record.
        """
        return self._names[self._image(index)]

    def name_record(self, index: int) -> str:
        """Return the file and the image of a record.

        Args:
          index: which record.
        """
        return f'{self.path}, caption of {self.image_name(index)}'


def recognise(head: Head) -> FileFacts | None:
    """Return the facts of a file of captions; None for other files. The mark `subset` says what it is for.

    Args:
      head: the beginning of the file.
    """
    record = head.records[0] if head.form == 'list' and head.records else None
    if isinstance(record, dict) and isinstance(record.get('regions'), list):
        has_phrases = all(isinstance(region, dict) and 'phrase' in region for region in record['regions'])
        return facts(head.path, REGIONS, subset=TRAIN) if has_phrases else None
    known = coco_captions.recognise(head)
    if known is not None and known.kind == coco_captions.KARPATHY:
        return facts(head.path, known.kind, subset=TRAIN, data_set=known.mark('data_set'))
    if known is not None:
        # NoCaps has no training split, and its files without captions have nothing to learn.
        return known if known.mark('captions') != 'no' else None
    # Rows with a conversation are read elsewhere.
    if isinstance(record, dict) and 'conversations' in record:
        return None
    known = lavis.recognise(head)
    return known if known is not None and known.kind == lavis.CAPTIONS else None


def open_captions(chosen: FileFacts, place: Place) -> CaptionItems:
    """Return the captions of a file.

    Args:
      chosen: the file, as `recognise` describes it.
      place: where its images are looked for.

    Raises:
      DataError: the file is broken, or too many images are missing.
    """
    builder = ItemsBuilder(str(chosen.path))
    _FILLERS[chosen.kind](builder, chosen.path)
    names = builder.image_names
    pictures = find_images(place.image_trees(), names, _FOLDERS[chosen.kind])
    notes = check_missing(chosen.path, pictures, place.tolerance)
    source = CaptionItems(chosen.path, builder.build(pictures), names, pictures, notes)
    if not len(source):
        raise DataError(f'{chosen.path}: no captions')
    return source


def _fill_karpathy(builder: ItemsBuilder, path: Path) -> None:
    coco_captions.fill_karpathy(builder, path, TRAIN)
    # The part of COCO's validation images that Karpathy uses for training; Flickr30k has no such split.
    coco_captions.fill_karpathy(builder, path, 'restval')


def _fill_list(builder: ItemsBuilder, path: Path) -> None:
    def add(entry: Entry) -> None:
        image = records.text(entry.value, 'image')
        caption = records.field(entry.value, 'caption')
        captions = (caption,) if isinstance(caption, str) else records.texts(entry.value, 'caption')
        # The lists have no ids of captions, and several rows have the same image.
        builder.add(entry.index, builder.image_file(image, image), references=captions)

    for_each(entries(path), path, add)


def _fill_regions(builder: ItemsBuilder, path: Path) -> None:
    def add(entry: Entry) -> None:
        image_id = records.integer(entry.value, 'id')
        phrases = [records.text(region, 'phrase') for region in records.items(entry.value, 'regions')]
        builder.add(image_id, builder.image_file(f'{image_id}.jpg', image_id), references=phrases)

    for_each(entries(path), path, add)


_FILLERS: dict[str, Callable[[ItemsBuilder, Path], None]] = {
    coco_captions.COCO: coco_captions.fill,
    coco_captions.NOCAPS: coco_captions.fill,
    coco_captions.KARPATHY: _fill_karpathy,
    lavis.CAPTIONS: _fill_list,
    REGIONS: _fill_regions,
}
