"""The interface between the readers of single formats and the catalogue: where a benchmark's records come from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from sparselora_jax.data.benchmarks.items import ItemsBuilder, Picture
from sparselora_jax.data.benchmarks.sniff import FileFacts
from sparselora_jax.runtime.errors import DataError


@dataclass(frozen=True)
class Source:
    """Files that hold the records of a benchmark.

    Attributes:
      paths: the files.
      fill: adds the items to a builder. It returns their images, or None if these are files, which the builder names.
      usual_folders: names of the folders in which users usually keep the images, the best first.
      is_by_path: whether file names alone do not tell images apart (`picture_files.locate_by_path`).
    """

    paths: tuple[Path, ...]
    fill: Callable[[ItemsBuilder], Sequence[Picture] | None]
    usual_folders: tuple[str, ...] = ()
    is_by_path: bool = False


@runtime_checkable
class Finder(Protocol):
    """Finds the files of one benchmark in one format."""

    def find(self, files: Sequence[FileFacts]) -> Source | None:
        """Return the files of the benchmark; None if they are not there.

        Args:
          files: all data files that were recognised.

        Raises:
          DataError: several files could be meant.
        """


def with_marks(files: Sequence[FileFacts], kind: str, **marks: str) -> list[FileFacts]:
    """Return the files of a kind that have these marks, or lack a mark because it cannot be told.

    Args:
      files: the files to choose from.
      kind: form of their records.
      **marks: the marks to have.

    Returns:
      Of the files that contradict no mark, those that have the most marks.
    """
    possible = [
        file for file in files if file.kind == kind and all(file.mark(name) in ('', marks[name]) for name in marks)
    ]
    # A file that tells less may be meant too, but one that tells more is surely meant.
    counts = [sum(bool(file.mark(name)) for name in marks) for file in possible]
    return [file for file, count in zip(possible, counts, strict=True) if count == max(counts)]


def choose(files: Sequence[FileFacts], what: str) -> FileFacts | None:
    """Return the only file, or the first of several copies of the same file; None if there is no file.

    Args:
      files: the files that could be meant.
      what: what is looked for, for messages.

    Raises:
      DataError: the files differ.
    """
    if not files:
        return None
    sizes = {file.path.stat().st_size for file in files}
    # Sizes and first records are compared, and not contents, which may have gigabytes.
    # Copies lie in several folders if several tools have downloaded the same file.
    if len(sizes) > 1 or len({file.mark('first') for file in files}) > 1:
        names = ', '.join(str(file.path) for file in files[:4])
        raise DataError(f'{what}: {len(files)} files could be meant: {names}; name a folder that holds only one')
    return files[0]


def one_file(
    files: Sequence[FileFacts],
    what: str,
    fill: Callable[[ItemsBuilder, Path], None],
    usual_folders: tuple[str, ...],
) -> Source | None:
    """Return the source of a benchmark whose records are in one file; None if there is no file.

    Args:
      files: the files that could be meant.
      what: what is looked for, for messages.
      fill: adds the items of the file to a builder.
      usual_folders: see `Source`.

    Raises:
      DataError: several files could be meant.
    """
    chosen = choose(files, what)
    if chosen is None:
        return None
    return Source((chosen.path,), lambda builder: fill(builder, chosen.path), usual_folders)
