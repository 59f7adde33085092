"""Images of sources that are not read yet: files, and parts of tar files."""

import functools
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from sparselora_jax.data import images
from sparselora_jax.data.benchmarks.items import Picture
from sparselora_jax.data.benchmarks.picture_files import (
    FileTree,
    PictureFile,
    PictureFiles,
    locate,
    locate_by_path,
)
from sparselora_jax.data.sources.place import IMAGES_MARK
from sparselora_jax.runtime import os_errors
from sparselora_jax.runtime.errors import DataError

SHOWN = 3  # missing images that a message names
OPEN_FILES = 64  # tar files that stay open in a process

# Names under which data sets refer to images of the same collection: a number of 12 digits in COCO, and a file in these
# folders of Visual Genome (whose images GQA uses) and Flickr30k.
_COCO_IMAGE = re.compile(r'(?:.*/)?(?:COCO_(?:train|val|test)20\d\d_)?(\d{12}\.jpg)', re.DOTALL)
_KNOWN_FOLDER = re.compile(r'(?:.*/)?(?:VG_100K(?:_2)?|gqa/images|flickr30k[-_]images)/([^/]+)', re.DOTALL)


@runtime_checkable
class StoredImage(Picture, Protocol):
    """An image that is not read yet, which can be checked and compared without reading its pixels."""

    def check(self) -> None:
        """Check that the image can be opened; its pixels are not decoded.

        Raises:
          DataError: it cannot; the message names it.
        """

    def fingerprint(self) -> str:
        """Return a text that changes with the image."""


class ImageFile(PictureFile):
    """An image in a file of its own; see `StoredImage`."""

    def check(self) -> None:
        """Check that the file can be opened as an image.

        Raises:
          DataError: it cannot.
        """
        try:
            with images.open_image(self.path):
                pass
        except FileNotFoundError:
            raise DataError(f'{self.path}: no such file') from None
        except DataError as error:
            raise DataError(f'{self.path}: not a readable image ({error})') from None

    def fingerprint(self) -> str:
        """Return a hash of its size and of some of its blocks."""
        return images.fingerprint(self.path)


@dataclass(frozen=True, slots=True)
class FilePart:
    """Bytes of a file, such as a member of a tar file.

    Attributes:
      path: the file.
      offset: where the bytes begin.
      size: number of bytes.
    """

    path: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """Read the bytes.

        Raises:
          DataError: the file is shorter, or cannot be read.
        """
        try:
            # `pread` moves no position, so threads can share the file.
            data = os.pread(_open_file(self.path).fileno(), self.size, self.offset)
        except OSError as error:
            raise DataError(os_errors.describe(error)) from None
        if len(data) < self.size:
            raise DataError(f'{self.path}: the file ends before byte {self.offset + self.size:,}; download it again')
        return data


# Cached for each process: a file that is open cannot be sent to another process.
@functools.lru_cache(maxsize=OPEN_FILES)
def _open_file(path: Path):
    return path.open('rb', buffering=0)


@dataclass(frozen=True, slots=True)
class ImagePart:
    """An image that is a part of a file; see `StoredImage`.

    Attributes:
      part: its bytes.
      name: where it is, for messages.
    """

    part: FilePart
    name: str

    def read(self) -> UInt8[np.ndarray, 'height width 3']:
        """Read the image as RGB.

        Raises:
          DataError: it is damaged.
        """
        return images.decode_image(self.part.read(), self.name, is_benchmark=True)

    def check(self) -> None:
        """Check that the bytes can be opened as an image.

        Raises:
          DataError: they cannot.
        """
        images.check_bytes(self.part.read(), self.name)

    def fingerprint(self) -> str:
        """Return a hash of its bytes."""
        return sha256(self.part.read()).hexdigest()


def same_image_name(name: str) -> str:
    """Return one name for all names that data sets give an image of COCO, Visual Genome or Flickr30k.

    Args:
      name: name of an image, as a data set writes it. Other names are returned as they are.

    >>> same_image_name('val2014/COCO_val2014_000000000042.jpg'), same_image_name('vg/VG_100K_2/7.jpg')
    ('000000000042.jpg', '7.jpg')
    """
    match = _COCO_IMAGE.fullmatch(name) or _KNOWN_FOLDER.fullmatch(name)
    return match[1] if match else name


def find_images(trees: Iterable[FileTree], names: Sequence[str], usual_folders: Sequence[str] = ()) -> PictureFiles:
    """Find images in the first of some folders that holds any of them: by their paths, or by the names of their files.

    Args:
      trees: the folders, the best first.
      names: names of the images, possibly with folders, as the data set writes them.
      usual_folders: names of the folders in which users usually keep these images, the best first.
    """
    pictures = None
    for tree in trees:
        # Different data sets use the same numbers as names, so names count only where no path is right.
        if any('/' in name for name in names):
            pictures = locate_by_path(tree, names)
            if len(pictures.missing) < len(names):
                return pictures
        pictures = locate(tree, names, usual_folders)
        if len(pictures.missing) < len(names):
            return pictures
    return pictures


def needed_tolerance(count: int, total: int) -> str:
    """Return what a user can do to leave some images out.

    Args:
      count: number of images that cannot be used.
      total: number of images.
    """
    if count == total:
        return 'none is left'
    # Rounded up, so that the tolerance is enough; with more digits where it would be 1, which is not legal.
    shares = (math.ceil(10**digits * count / total) / 10**digits for digits in (3, 6, 9))
    return f'leave them out by mixture.tolerance={next(share for share in shares if share < 1)}'


def check_missing(path: Path, pictures: PictureFiles, tolerance: float) -> tuple[str, ...]:
    """Return a note about missing images; nothing if there are none.

    Args:
      path: the annotations, for messages.
      pictures: the images.
      tolerance: largest share of them that may be missing.

    Raises:
      DataError: more are missing.
    """
    missing = pictures.missing
    if not len(missing):
        return ()
    names = ', '.join(pictures.names[number] for number in missing[:SHOWN])
    images = f'{len(missing):,} of {len(pictures):,} images are missing under {pictures.root}, such as {names}'
    if len(missing) == len(pictures):
        raise DataError(f'{path}: {images}; name their folder: {path}{IMAGES_MARK}FOLDER')
    if len(missing) > tolerance * len(pictures):
        raise DataError(f'{path}: {images}; put them there, or {needed_tolerance(len(missing), len(pictures))}')
    return (f'{images}: their records are left out',)
