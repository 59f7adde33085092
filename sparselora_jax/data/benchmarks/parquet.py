"""Parquet files of Hugging Face data sets, as lmms-eval and others read them; each form is known by its columns.

The texts are read at once, and the images one by one when they are needed (`parquet_pictures.py`).
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from sparselora_jax.data.benchmarks.gqa import IMAGE_FOLDERS as GQA_FOLDERS
from sparselora_jax.data.benchmarks.items import ItemsBuilder, Picture
from sparselora_jax.data.benchmarks.parquet_forms import COCO, FORMS, GQA, IMAGE, Form
from sparselora_jax.data.benchmarks.parquet_pictures import damage_named, list_pictures, open_file, rows_without_image
from sparselora_jax.data.benchmarks.sniff import FileFacts, facts
from sparselora_jax.data.benchmarks.source import Source
from sparselora_jax.runtime.errors import DataError

ROWS_AT_A_TIME = 4096

# Schemas do not say which split a file belongs to, so that is the one thing that names tell here.
# A shard of a split: 'validation-00003-of-00068.parquet'.
_SHARD = re.compile(r'(?P<split>.+?)-(?P<number>\d{5})-of-(?P<count>\d{5})\.parquet')
# A shard that the server has converted: 'validation/0003.parquet'.
_CONVERTED = re.compile(r'\d{4}\.parquet')

# The images of GQA are in files of their own, so that they are not stored once for each question.
GQA_IMAGES = 'parquet_gqa_images'


def recognise(paths: Sequence[Path]) -> tuple[list[FileFacts], list[str]]:
    """Sort parquet files by what they hold; only footers are read.

    Args:
      paths: the files.

    Returns:
      (The sets of files, each with the shards of one split; a line for each file that is damaged or has other columns.)
    """
    sets: dict[tuple[str, Path, str], list[Path]] = {}
    problems = []
    for path in paths:
        try:
            columns = set(column_names(path))
        except DataError as error:
            problems.append(str(error))
            continue
        kind = _kind_of(columns)
        if not kind:
            names = ', '.join(sorted(columns)[:12])
            problems.append(f'{path}: a parquet with other columns than those of any known data set: {names}')
            continue
        # Shards of one split in one folder belong together; a file of another name is a set of its own.
        sets.setdefault((kind, path.parent, split_of(path)), []).append(path)
    found = []
    for (kind, folder, split), shards in sets.items():
        first, *more = sorted(shards)
        try:
            subset = _coco_subset(first, kind)
        except DataError as error:
            problems.append(str(error))
            continue
        marks = facts(first, kind, split=split, folder=folder.name, subset=subset).marks
        found.append(FileFacts(first, kind, marks, tuple(more)))
    return found, problems


def split_of(path: Path) -> str:
    """Return the split that a file belongs to by its name; of a file of another name, its stem.

    Args:
      path: the file.

    >>> split_of(Path('data/train-00003-of-00068.parquet')), split_of(Path('validation/0003.parquet'))
    ('train', 'validation')
    """
    shard = _SHARD.fullmatch(path.name)
    if shard:
        return shard['split']
    return path.parent.name if _CONVERTED.fullmatch(path.name) else path.stem


def _kind_of(columns: set[str]) -> str:
    if columns == {'id', IMAGE}:
        return GQA_IMAGES
    for form in FORMS:
        if form.columns <= columns and not form.without & columns:
            return form.kind
    return ''


def _coco_subset(path: Path, kind: str) -> str:
    """Return which part of COCO the first row of a file belongs to, such as 'val2014'; '' for other data sets."""
    if kind != COCO.kind:
        return ''
    for row in read_rows(path, ['coco_url']):
        folders = re.findall(r'(?:train|val|test)20\d\d', str(row['coco_url']))
        return folders[0] if folders else ''
    return ''


def column_names(path: Path) -> list[str]:
    """Return the names of a file's columns.

    Args:
      path: the file.

    Raises:
      DataError: the file is damaged, or not a parquet file.
    """
    with damage_named(str(path)):
        return open_file(path).schema_arrow.names


def read_rows(path: Path, columns: Iterable[str]) -> Iterator[dict[str, object]]:
    """Yield the rows of a file.

    Args:
      path: the file.
      columns: the columns to read; those that the file lacks are left out. A list of answers of VQA becomes a list of
        their texts.

    Raises:
      DataError: the file is damaged.
    """
    names = [name for name in column_names(path) if name in set(columns)]
    with damage_named(str(path)):
        for batch in open_file(path).iter_batches(ROWS_AT_A_TIME, columns=names):
            lists = [_values(batch.column(name)) for name in names]
            for values in zip(*lists, strict=True):
                yield dict(zip(names, values, strict=True))


def _values(column: pa.Array) -> list:
    is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    has_answers = is_list and pa.types.is_struct(column.type.value_type)
    if not has_answers or column.type.value_type.get_field_index('answer') < 0:
        return column.to_pylist()
    # Only the texts of the answers become Python objects; a dict for each answer would take most of the time.
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_pylist()
    texts = iter(pc.struct_field(column.flatten(), 'answer').to_pylist())
    return [[next(texts) for _ in range(length)] for length in lengths]


@dataclass(frozen=True)
class ParquetTables:
    """Finds the parquet files of a split; see `source.Finder`.

    Attributes:
      form: their form.
      splits: names that the split may have in the names of the files.
      subset: folder of COCO that the rows come from; '' for other data sets.
      column_split: value of the column `split` of the rows to read, if there is this column; '' to read all.
    """

    form: Form
    splits: tuple[str, ...]
    subset: str = ''
    column_split: str = ''

    def find(self, files: Sequence[FileFacts]) -> Source | None:
        """Return the files of the split; None if there are none.

        Args:
          files: all data files that were recognised.

        Raises:
          DataError: several sets of files could be meant, or shards are missing.
        """
        sets = [file for file in files if file.kind == self.form.kind and file.mark('subset') in ('', self.subset)]
        images = [file for file in files if file.kind == GQA_IMAGES]
        chosen = self._of_split(sets)
        if chosen is None:
            return None
        paths = (chosen.path, *chosen.more)
        check_shards(paths)
        # Without files of images, images are looked for in folders.
        image_set = self._of_split(images) if self.form is GQA else None
        image_paths = (image_set.path, *image_set.more) if image_set else ()
        check_shards(image_paths)
        return Source(
            paths + image_paths,
            lambda builder: fill(builder, self.form, paths, image_paths, self.column_split),
            GQA_FOLDERS if self.form is GQA else ('val2014', 'val2017'),
        )

    def _of_split(self, sets: Sequence[FileFacts]) -> FileFacts | None:
        """Return the set of the split by the names of its files or folder."""
        named = [file for file in sets if _is_split(file, self.splits)]
        # Files that a user has renamed: if there is one set only, it must be meant.
        candidates = named or ([file for file in sets if not _is_split(file, _ALL_SPLITS)] if len(sets) == 1 else [])
        if len(candidates) > 1:
            names = ', '.join(str(file.path) for file in candidates[:4])
            raise DataError(f'{self.form.kind}: {len(candidates)} sets could be meant: {names}; name a smaller folder')
        return candidates[0] if candidates else None


# A single set with one of these names is not taken for another split.
_ALL_SPLITS = ('train', 'validation', 'val', 'val2014', 'val2017', 'test', 'testdev', 'challenge', 'submission')


def _is_split(file: FileFacts, splits: Sequence[str]) -> bool:
    # The configurations of GQA are folders such as `testdev_balanced_instructions`.
    folder = file.mark('folder')
    if folder.endswith(('_instructions', '_images')):
        return folder.startswith(tuple(f'{split}_balanced_' for split in splits))
    return file.mark('split') in splits


def check_shards(paths: Sequence[Path]) -> None:
    """Check that all shards of a set are there.

    Args:
      paths: the files of the set.

    Raises:
      DataError: some are missing.
    """
    shards = [shard for path in paths if (shard := _SHARD.fullmatch(path.name))]
    if not shards:
        return
    # A missing shard would only be noticed as a smaller number of items.
    count = int(shards[0]['count'])
    missing = sorted(set(range(count)) - {int(shard['number']) for shard in shards})
    if missing:
        names = f'{len(missing)} of {count} files are missing, such as number {missing[0]}'
        raise DataError(f'{paths[0].parent}, {shards[0]["split"]}: {names}; download them')


def fill(
    builder: ItemsBuilder,
    form: Form,
    paths: Sequence[Path],
    image_paths: Sequence[Path] = (),
    column_split: str = '',
) -> Sequence[Picture] | None:
    """Add the rows of a set of files.

    Args:
      builder: where to add them.
      form: their form.
      paths: the files, in order.
      image_paths: files of the images, if they are separate.
      column_split: value of the column `split` of the rows to read, if there is this column; '' to read all.

    Returns:
      The images; None if they are files.

    Raises:
      DataError: a file is damaged, lacks columns, or a row is unusable.
    """
    number = 0  # of the row in all files together
    for path in paths:
        columns = column_names(path)
        missing = sorted(form.columns - set(columns))
        if missing:
            known = ', '.join(columns)
            raise DataError(f'{path}: no column {", ".join(missing)}; its columns are {known}')
        # As a set of numbers: there are few or none.
        empty = frozenset(rows_without_image(path, IMAGE).tolist()) if form.has_images else frozenset()
        first = number
        for row in read_rows(path, (form.columns | form.optional | {'split'}) - {IMAGE}):
            is_other_split = column_split and row.get('split', column_split) != column_split
            # Questions of ScienceQA may have no image.
            if is_other_split or number - first in empty:
                # Where rows hold images, the number of an image is that of its row, so this row has one too.
                if form.has_images:
                    builder.image_ids.append(number)
            else:
                try:
                    form.add(builder, row, number)
                except DataError as error:
                    raise DataError(f'{path}, row {number - first}: {error}') from None
            number += 1
    if image_paths:
        return _join_images(builder, image_paths)
    return list_pictures(paths, IMAGE) if form.has_images else None


def _join_images(builder: ItemsBuilder, paths: Sequence[Path]) -> Sequence[Picture]:
    """Return the images of the builder's items, found by their ids in files of images."""
    pictures = list_pictures(paths, IMAGE)
    rows = {}
    # Only the column of ids is read here.
    for path in paths:
        for row in read_rows(path, ['id']):
            rows[row['id']] = len(rows)
    missing = [image_id for image_id in builder.image_ids if image_id not in rows]
    if missing:
        known = f'{len(missing):,} of {len(builder.image_ids):,} images are missing, such as {missing[0]}'
        raise DataError(f'{paths[0].parent}: {known}; download all files of the images')
    return ChosenPictures(pictures, tuple(rows[image_id] for image_id in builder.image_ids))


@dataclass(frozen=True)
class ChosenPictures(Sequence):
    """Some of a sequence of images, in another order.

    Attributes:
      pictures: the images.
      numbers: which of them.
    """

    pictures: Sequence[Picture]
    numbers: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Picture:
        return self.pictures[self.numbers[index]]
