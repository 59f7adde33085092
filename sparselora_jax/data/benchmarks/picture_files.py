"""Find the image files of a benchmark under a folder, whatever folders they lie in.

COCO's images have two names: `COCO_val2014_000000391895.jpg` in the release of 2014 and `000000391895.jpg` in that of
2017, where the training and validation folders hold other images too. The ids and the pixels are the same, so an image
is looked for under both names.
"""

import os
import re
from collections import Counter
from collections.abc import KeysView, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import Int32, UInt8

from sparselora_jax.data import images
from sparselora_jax.runtime import os_errors
from sparselora_jax.runtime.errors import DataError

# Other files are not listed, so that a folder of features or videos costs no memory.
IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.gif', '.tif', '.tiff')
DATA_SUFFIXES = ('.json', '.jsonl', '.parquet')
MISSING = -1  # folder of an image that was not found

_COCO_NAME = re.compile(r'(?:COCO_(?:train|val|test)20\d\d_)?(\d{12})\.jpg')
# Validation images first, which most benchmarks use. The last one is that of 2017.
_COCO_PREFIXES = ('COCO_val2014_', 'COCO_train2014_', 'COCO_test2015_', 'COCO_test2014_', '')


@dataclass(frozen=True)
class FileTree:
    """The files under a folder, listed once.

    Attributes:
      root: the folder.
      image_folders: for each folder with images, its path relative to the root ('' is the root) and the files' names.
      data_files: files that may hold records, sorted.
      archives: zip files, sorted; they are not opened.
      problems: folders that cannot be listed, one line each.
    """

    root: Path
    image_folders: dict[str, frozenset[str]] = field(repr=False)
    data_files: tuple[Path, ...]
    archives: tuple[Path, ...] = ()
    problems: tuple[str, ...] = ()


def list_files(root: str | Path) -> FileTree:
    """List the images and data files under a folder; each folder is scanned once, and no file is opened.

    Args:
      root: the folder. Links to folders are followed, because images often lie on another disk. Hidden folders are
        skipped.

    Raises:
      DataError: there is no such folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f'{root}: no such folder; name the folder that holds the data of the benchmarks')
    image_folders = {}
    data_files = []
    archives = []
    problems = []
    seen: set[tuple[int, int]] = set()
    # Not `os.walk`: it would list the names of files that nobody asks for, and it does not follow links safely.
    waiting = ['']
    while waiting:
        folder = waiting.pop()
        try:
            status = os.stat(root / folder)
            # Links may lead to a folder twice, or in a circle.
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            subfolders = []
            names = []
            with os.scandir(root / folder) as listing:
                for entry in listing:
                    suffix = os.path.splitext(entry.name)[1].lower()
                    # The kind of an image is not looked up: on some disks that takes a millisecond for each file.
                    if suffix in IMAGE_SUFFIXES:
                        names.append(entry.name)
                    elif suffix in DATA_SUFFIXES and entry.is_file():
                        data_files.append(root / folder / entry.name)
                    elif suffix == '.zip':
                        archives.append(root / folder / entry.name)
                    # Archives made on a Mac have a folder of the first name, with files that are no images.
                    elif entry.name != '__MACOSX' and not entry.name.startswith('.') and entry.is_dir():
                        subfolders.append(f'{folder}/{entry.name}' if folder else entry.name)
        except OSError as error:
            problems.append(os_errors.describe(error))
            continue
        if names:
            image_folders[folder] = frozenset(names)
        # Sorted, and the first is visited first, so that the result does not depend on the file system.
        waiting.extend(sorted(subfolders, reverse=True))
    return FileTree(root, image_folders, tuple(sorted(data_files)), tuple(sorted(archives)), tuple(problems))


@dataclass(frozen=True)
class PictureFile:
    """An image file that is not read yet; see `items.Picture`."""

    path: Path

    @property
    def name(self) -> str:
        """Return the path."""
        return str(self.path)

    def read(self) -> UInt8[np.ndarray, 'height width 3']:
        """Read the file as RGB, as public evaluation code does.

        Raises:
          DataError: the file is missing or damaged.
        """
        return images.read_image(self.path, is_benchmark=True)


@dataclass(frozen=True)
class MissingPicture:
    """An image that was not found; see `items.Picture`."""

    name: str

    def read(self) -> UInt8[np.ndarray, 'height width 3']:
        """Raise an error.

        Raises:
          DataError: always.
        """
        raise DataError(f'image {self.name} is missing')


@dataclass(frozen=True)
class PictureFiles(Sequence):
    """The image files of a benchmark, by the numbers of the images.

    Attributes:
      root: the folder under which they lie.
      folders: folders relative to the root.
      folder_numbers: which of `folders` each image lies in; -1 if it is missing.
      names: path of each image relative to its folder; of a missing one, its name in the data set.
    """

    root: Path
    folders: tuple[str, ...]
    folder_numbers: Int32[np.ndarray, ' images']
    names: list[str] = field(repr=False)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> PictureFile | MissingPicture:
        folder = self.folder_numbers[index]
        if folder == MISSING:
            return MissingPicture(self.names[index])
        return PictureFile(self.root / self.folders[folder] / self.names[index])

    @property
    def missing(self) -> np.ndarray:
        """Return the numbers of the images that were not found."""
        return np.flatnonzero(self.folder_numbers == MISSING)


def not_located(root: Path, names: Sequence[str]) -> PictureFiles:
    """Return images that nobody looks for; reading one raises an error.

    Args:
      root: the folder of the data.
      names: names of the images.
    """
    return PictureFiles(root, (), np.full(len(names), MISSING, np.int32), list(names))


def locate(tree: FileTree, names: Sequence[str], usual_folders: Sequence[str] = ()) -> PictureFiles:
    """Find images by the names of their files, in any folder; a name of COCO is also looked for in its other forms.

    If several folders hold an image, the one that fits best is taken: first the folders that `names` or
    `usual_folders` give, then those that hold the most of the images. Different sets of images use the same names, for
    example numbers, and only the right folder holds all of them.

    Args:
      tree: the files.
      names: names of the images, possibly with folders, as the data set writes them.
      usual_folders: names of the folders in which users usually keep these images, the best first.

    >>> tree = FileTree(Path('data'), {'coco/val2017': frozenset(['000000000042.jpg'])}, ())
    >>> locate(tree, ['val2014/COCO_val2014_000000000042.jpg'])[0].path.as_posix()
    'data/coco/val2017/000000000042.jpg'
    """
    wanted = {}  # every name under which an image may be found -> None, in order
    alternatives = []
    for name in names:
        forms = file_names(PurePosixPath(name).name)
        alternatives.append(forms)
        wanted.update(dict.fromkeys(forms))
    hints = [*dict.fromkeys(str(PurePosixPath(name).parent) for name in names), *usual_folders]
    ranked = _rank(tree, wanted.keys(), hints)
    # A dict of names, and not a search through the folders for each image: data sets may have thousands of folders.
    # From the worst folder to the best: a better one overwrites what a worse one holds.
    folder_of: dict[str, int] = {}
    for number, folder in reversed(list(enumerate(ranked))):
        folder_of.update(dict.fromkeys(tree.image_folders[folder] & wanted.keys(), number))
    numbers = np.full(len(names), MISSING, np.int32)
    # Missing images keep the name that the data set gives them, for messages.
    file_names_found = list(names)
    for index, forms in enumerate(alternatives):
        for form in forms:
            if form in folder_of:
                numbers[index] = folder_of[form]
                file_names_found[index] = form
                break
    return PictureFiles(tree.root, tuple(ranked), numbers, file_names_found)


def file_names(name: str) -> tuple[str, ...]:
    """Return the names that an image file may have: one, or the names of an image of COCO in its releases.

    Args:
      name: a file name, without folders.

    >>> file_names('n42.jpg')
    ('n42.jpg',)
    >>> file_names('COCO_val2014_000000000042.jpg')[-1]
    '000000000042.jpg'
    """
    coco = _COCO_NAME.fullmatch(name)
    if not coco:
        return (name,)
    return tuple(dict.fromkeys((name, *(f'{prefix}{coco[1]}.jpg' for prefix in _COCO_PREFIXES))))


def _rank(tree: FileTree, wanted: KeysView[str], hints: Sequence[str]) -> list[str]:
    """Return the folders that hold wanted images, the best first."""
    # The intersection of two sets takes the time of the smaller one.
    hits = {folder: len(names & wanted) for folder, names in tree.image_folders.items()}
    places = {hint: place for place, hint in reversed(list(enumerate(hints)))}

    def order(folder: str) -> tuple[int, int, str]:
        # A hint may have several parts, such as 'gqa/images'.
        parts = folder.split('/')
        ends = ['/'.join(parts[first:]) for first in range(len(parts))]
        return min(places.get(end, len(hints)) for end in ends), -hits[folder], folder

    return sorted((folder for folder in hits if hits[folder]), key=order)


def locate_by_path(tree: FileTree, names: Sequence[str], base: str | None = None) -> PictureFiles:
    """Find images by their whole paths, for data sets in which file names alone do not tell images apart.

    Args:
      tree: the files.
      names: paths of the images relative to a common folder, as the data set writes them.
      base: the common folder, relative to the root of the tree. None: the one under which most of the images lie.
    """
    if base is None:
        base = _common_folder(tree, names)
    numbers = np.full(len(names), MISSING, np.int32)
    for index, name in enumerate(names):
        path = PurePosixPath(base, name)
        folder = '' if str(path.parent) == '.' else str(path.parent)
        # Only files that were listed count, so a name with '..' cannot lead out of the tree.
        if path.name in tree.image_folders.get(folder, ()):
            numbers[index] = 0
    return PictureFiles(tree.root, (base,), numbers, list(names))


def _common_folder(tree: FileTree, names: Sequence[str]) -> str:
    """Return the folder under which most of the paths exist; '' if none does."""
    folders_by_last_part: dict[str, list[str]] = {}
    for folder in tree.image_folders:
        folders_by_last_part.setdefault(PurePosixPath(folder).name, []).append(folder)
    # Each image votes for the folders under which its path exists.
    votes = Counter()
    for name in names:
        path = PurePosixPath(name)
        parent = '' if str(path.parent) == '.' else f'/{path.parent}'
        for folder in folders_by_last_part.get(path.parent.name, tree.image_folders if not parent else ()):
            if f'/{folder}'.endswith(parent) and path.name in tree.image_folders[folder]:
                votes[f'/{folder}'.removesuffix(parent)[1:]] += 1
    # The first of equal ones in alphabetical order.
    return min(votes, key=lambda folder: (-votes[folder], folder), default='')
