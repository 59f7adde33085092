"""The name of a source, `PATH` or `ANNOTATIONS::IMAGES`, and what lies there."""

import functools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from sparselora_jax.data.benchmarks.picture_files import FileTree, list_files
from sparselora_jax.data.benchmarks.sniff import Head, read_head
from sparselora_jax.runtime.errors import DataError

IMAGES_MARK = '::'  # between the annotations and the images, where these are not in one folder
JSON_SUFFIXES = ('.json', '.jsonl')
SEPARATOR = ','  # between the names of several sources


class SourceName(NamedTuple):
    """The parts of the name of a source.

    Attributes:
      path: a file or a folder.
      images: folder of the images; '' if they are found from `path`.
    """

    path: str
    images: str = ''


def split_names(data: str) -> list[SourceName]:
    """Return the sources that a text names.

    Args:
      data: names of sources, separated by commas.

    Raises:
      DataError: a name is empty.

    >>> split_names('coco/captions_train2014.json::coco, vg')
    [SourceName(path='coco/captions_train2014.json', images='coco'), SourceName(path='vg', images='')]
    """
    parts = data.split(SEPARATOR)
    names = []
    while parts:
        name, count = _first_name(parts)
        # An empty path would be the current folder.
        if not name.path:
            raise DataError(f'{data}: expected the name of a file or folder on each side of a comma')
        names.append(name)
        parts = parts[count:]
    return names


def _first_name(parts: Sequence[str]) -> tuple[SourceName, int]:
    """Return the source that the first parts of a text name, and how many parts its name has."""
    # A path may hold the marks, so the longest name that exists is meant as it is.
    for count in range(len(parts), 0, -1):
        text = SEPARATOR.join(parts[:count])
        for candidate in dict.fromkeys((text, text.strip())):
            name = _existing(candidate)
            if name is not None:
                return name, count
    path, _, images = parts[0].strip().partition(IMAGES_MARK)
    return SourceName(path, images), 1


def _existing(text: str) -> SourceName | None:
    """Return the source that a text names if its paths exist."""
    # `os.path.exists` is False for names that are too long, where `Path.exists` raises an error.
    if os.path.exists(text):
        return SourceName(text)
    pieces = text.split(IMAGES_MARK)
    for place in range(1, len(pieces)):
        name = SourceName(IMAGES_MARK.join(pieces[:place]), IMAGES_MARK.join(pieces[place:]))
        if all(map(os.path.exists, name)):
            return name
    return None


def absolute_names(data: str) -> str:
    """Return names of sources with absolute paths.

    Args:
      data: names of sources, separated by commas.
    """
    parts = []
    for path, images in split_names(data):
        absolute = [str(Path(part).absolute()) for part in (path, images) if part]
        parts.append(IMAGES_MARK.join(absolute))
    return SEPARATOR.join(parts)


@dataclass(frozen=True)
class Place:
    """A file or a folder that holds a source.

    Attributes:
      path: the file, or the folder.
      images: folder of the images; None: they are near `path`.
      index_dir: folder in which a format may keep an index of large files; None: it keeps none.
      tolerance: largest share of the images that may be missing; their records are left out.
    """

    path: Path
    images: Path | None = None
    index_dir: Path | None = field(default=None, compare=False)
    tolerance: float = 0.0

    # Listed once, although several formats ask.
    @functools.cached_property
    def tree(self) -> FileTree:
        """Return the images and data files under the folder, or around the file."""
        return list_files(self.path if self.path.is_dir() else self.path.parent)

    @functools.cached_property
    def heads(self) -> tuple[Head, ...]:
        """Return the beginnings of the JSON files under the folder, or of the file; broken files are left out."""
        paths = self.tree.data_files if self.path.is_dir() else (self.path,)
        heads = []
        for path in paths:
            if path.suffix.lower() not in JSON_SUFFIXES:
                continue
            try:
                heads.append(read_head(path))
            except DataError:
                # A broken file of something else must not be in the way. The file that was named is.
                if not self.path.is_dir():
                    raise
        return tuple(heads)

    def image_trees(self) -> Iterator[FileTree]:
        """Yield the folders in which images are looked for, the best first."""
        if self.images is not None:
            yield list_files(self.images)
            return
        yield self.tree
        # Annotations often lie in a folder of their own, beside those of the images.
        if self.path.is_file():
            yield list_files(self.path.parent.absolute().parent)
