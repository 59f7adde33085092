"""Images with a text file beside each: `cat.jpg` and `cat.txt`, in any folders, as img2dataset writes `files`.

The caption is the first line of the text file.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from sparselora_jax.data.sources.pictures import ImageFile
from sparselora_jax.data.sources.place import Place
from sparselora_jax.data.sources.source import SourceRecord
from sparselora_jax.runtime import os_errors
from sparselora_jax.runtime.errors import DataError

SUFFIX = '.txt'
SHOWN = 3  # images that a note names


class ImageTextFiles:
    """Pairs of files; see `source.OpenedSource`."""

    def __init__(self, root: Path, names: Sequence[str], without_text: Sequence[str] = ()):
        """Take the pairs of a folder.

        Args:
          root: the folder.
          names: paths of the images below it.
          without_text: images that have no text beside them.
        """
        self.root = root
        self.notes = ()
        if without_text:
            some = ', '.join(without_text[:SHOWN])
            self.notes = (f'{len(without_text):,} images without a {SUFFIX} are left out, such as {some}',)
        self._names = names

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> SourceRecord:
        path = self.root / self._names[index]
        # A pipe would be waited for, for ever.
        if not path.with_suffix(SUFFIX).is_file():
            raise DataError(f'{path.with_suffix(SUFFIX)}: no such file, or no file')
        try:
            text = path.with_suffix(SUFFIX).read_bytes().decode('utf-8-sig')
        except UnicodeDecodeError:
            raise DataError(f'{path.with_suffix(SUFFIX)}: not UTF-8; convert the file') from None
        except OSError as error:
            raise DataError(os_errors.describe(error)) from None
        caption, _, _ = text.strip().partition('\n')
        return SourceRecord(ImageFile(path), caption.strip())

    def image_name(self, index: int) -> str:
        """Return the path of an image below the folder.

        Args:
          index: which record.
        """
        return self._names[index]

    def name_record(self, index: int) -> str:
        """Return the path of an image.

        Args:
          index: which record.
        """
        return str(self.root / self._names[index])


class ImageTextFormat:
    """Opens folders of images with texts; see `source.SourceFormat`."""

    title = 'a folder of images with a .txt beside each'
    takes_images = False

    def open(self, place: Place) -> ImageTextFiles | None:
        """Return the pairs; None if there are none.

        Args:
          place: the folder.
        """
        if not place.path.is_dir():
            return None
        names = []
        without_text = []
        for folder, images in sorted(place.tree.image_folders.items()):
            directory = place.path / folder
            # One listing for a folder, and not a question to the disk for each image.
            texts = {entry for entry in os.listdir(directory) if entry.endswith(SUFFIX)}
            for image in sorted(images):
                path = f'{folder}/{image}' if folder else image
                stem, _ = os.path.splitext(image)
                (names if stem + SUFFIX in texts else without_text).append(path)
        return ImageTextFiles(place.path, names, without_text) if names else None
