"""Load a benchmark by its name from a folder that holds its files.

>>> from sparselora_jax.data.benchmarks.load import load
>>> items = load('vqav2_val', '/data')  # doctest: +SKIP
>>> items[0].question, items[0].references  # doctest: +SKIP
>>> pixels = items[0].image.read()  # doctest: +SKIP
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from sparselora_jax.data.benchmarks import user_jsonl
from sparselora_jax.data.benchmarks.catalog import BENCHMARKS, Benchmark, find_benchmark
from sparselora_jax.data.benchmarks.discover import Discovery, discover
from sparselora_jax.data.benchmarks.items import Items, ItemsBuilder
from sparselora_jax.data.benchmarks.picture_files import (
    PictureFiles,
    list_files,
    locate,
    locate_by_path,
    not_located,
)
from sparselora_jax.data.benchmarks.source import Source
from sparselora_jax.runtime.errors import DataError

SHOWN = 3  # missing images that a message names


def load(name: str, data: str | Path | Discovery, *, tolerance: float = 0.0, needs_images: bool = True) -> Items:
    """Return the items of a benchmark; images are found, but not read.

    Args:
      name: a registered name, `package.module:Name`, or the path of a folder with a `data.jsonl` (`user_jsonl`).
      data: the folder under which the files lie, or what `discover` has found there.
      tolerance: largest share of the images that may be missing; their items are left out.
      needs_images: False: images are not looked for, so answers can be scored without them.

    Returns:
      The items. Their `notes` say what a user should know; they are also logged as warnings.

    Raises:
      DataError: there is no such benchmark, its files are missing or broken, or too many images are missing.
    """
    # A folder that happens to have the name of a benchmark does not hide it.
    file = None if name in BENCHMARKS else user_jsonl.find_file(name)
    if file is not None:
        return load_user_file(file, tolerance=tolerance, needs_images=needs_images)
    # An unknown name is found before the folder is searched, which may take minutes.
    benchmark = find_benchmark(name)
    discovery = data if isinstance(data, Discovery) else discover(data)
    source = find_source(name, benchmark, discovery)
    builder = ItemsBuilder(name)
    pictures = source.fill(builder)
    places = ', '.join(str(path) for path in source.paths[:2])
    if not len(builder):
        raise DataError(f'{name}: no items in {places}; download the files again')
    # Not an error: a part of a benchmark is useful while one tries things out.
    if len(builder) != benchmark.count:
        difference = f'{len(builder):,} items in {places}, but the benchmark has {benchmark.count:,}'
        builder.notes.append(f'{difference}: scores are not comparable with published ones')
    if pictures is None and not needs_images:
        pictures = not_located(discovery.tree.root, builder.image_names)
    elif pictures is None and source.is_by_path:
        pictures = locate_by_path(discovery.tree, builder.image_names)
    elif pictures is None:
        pictures = locate(discovery.tree, builder.image_names, source.usual_folders)
    items = builder.build(pictures)
    if needs_images:
        items = _without_missing(items, tolerance, source.usual_folders)
    return _logged(items)


def load_user_file(file: str | Path, *, tolerance: float = 0.0, needs_images: bool = True) -> Items:
    """Return the items of a user's own benchmark; see `user_jsonl`.

    Args:
      file: the file of JSON lines; the images are in its folder.
      tolerance: see `load`.
      needs_images: see `load`.

    Raises:
      DataError: a line is broken, or too many images are missing.
    """
    file = Path(file)
    builder = ItemsBuilder(str(file))
    user_jsonl.fill(builder, file)
    if not needs_images:
        return _logged(builder.build(not_located(file.parent, builder.image_names)))
    # Paths count from the folder of the file and nowhere else: users may have several images of the same name.
    pictures = locate_by_path(list_files(file.parent), builder.image_names, base='')
    return _logged(_without_missing(builder.build(pictures), tolerance, ()))


def _without_missing(items: Items, tolerance: float, folders: Sequence[str]) -> Items:
    """Leave out items whose images are missing.

    Raises:
      DataError: too many images are missing.
    """
    pictures = items.pictures
    # Images in parquet files are never missing.
    missing = pictures.missing if isinstance(pictures, PictureFiles) else ()
    if not len(missing):
        return items
    is_missing = np.zeros(len(pictures), bool)
    is_missing[missing] = True
    with_image = np.flatnonzero(~is_missing[items.images])
    names = ', '.join(pictures.names[number] for number in missing[:SHOWN])
    images = f'{len(missing):,} of {len(pictures):,} images are missing under {pictures.root}, such as {names}'
    lost = f'{len(items) - len(with_image):,} of {len(items):,} items'
    if len(missing) > tolerance * len(pictures):
        place = f' in a folder {folders[0]}' if folders else ''
        # Rounded up, so that the tolerance that the message names is enough.
        share = math.ceil(1000 * len(missing) / len(pictures)) / 1000
        raise DataError(f'{items.name}: {images}; put them there{place}, or leave out {lost} by tolerance={share}')
    if not len(with_image):
        raise DataError(f'{items.name}: {images}: no item is left')
    items = items.take(with_image)
    return replace(items, notes=(*items.notes, f'{images}: {lost} are left out'))


def _logged(items: Items) -> Items:
    """Log the notes."""
    for note in items.notes:
        logging.getLogger(__name__).warning('%s: %s', items.name, note)
    return items


def find_source(name: str, benchmark: Benchmark, discovery: Discovery) -> Source:
    """Return the files of a benchmark.

    Args:
      name: its name, for messages.
      benchmark: the benchmark.
      discovery: the files that are there.

    Raises:
      DataError: they are not there, or several could be meant.
    """
    # In their order: the first format that is there wins, even if its images are missing.
    for finder in benchmark.finders:
        source = finder.find(discovery.files)
        if source is not None:
            return source
    reasons = [f'put {benchmark.needs} there']
    if discovery.tree.archives:
        reasons.append(f'unpack {discovery.tree.archives[0].name} if it holds them')
    # One of the files that cannot be read may be the one.
    reasons += discovery.problems[:SHOWN]
    raise DataError(f'{name}: no files of {benchmark.title} under {discovery.tree.root}: {"; ".join(reasons)}')


def summary(discovery: Discovery) -> list[str]:
    """Return a line for each known benchmark: the files that were found, or why there are none; then unreadable files.

    Args:
      discovery: the files that are there.
    """
    # All names, so that a user sees what could be there.
    lines = []
    for name in BENCHMARKS:
        try:
            source = find_source(name, BENCHMARKS.find(name), replace(discovery, problems=()))
            found = ', '.join(str(path.relative_to(discovery.tree.root)) for path in source.paths[:2])
            rest = len(source.paths) - 2
            lines.append(f'{name}: {found}' + (f' and {rest} more' if rest > 0 else ''))
        except DataError as error:
            lines.append(str(error))
    return lines + [f'cannot be read: {problem}' for problem in discovery.problems]
