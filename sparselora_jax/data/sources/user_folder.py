"""A folder of images with a `data.jsonl`, see `data.folder`, as one source of several. All lines are its records."""

import numpy as np
from jaxtyping import UInt8

from sparselora_jax.data import images
from sparselora_jax.data.folder import Folder, read_folder
from sparselora_jax.data.sources.pictures import ImageFile
from sparselora_jax.data.sources.place import Place
from sparselora_jax.data.sources.source import SourceRecord

FILE = 'data.jsonl'


class UserImage(ImageFile):
    """An image of a user; see `pictures.StoredImage`."""

    def read(self) -> UInt8[np.ndarray, 'height width 3']:
        """Read the file as RGB, as `data.folder` does: upright, on white, and with its levels scaled.

        Raises:
          DataError: the file is missing or damaged.
        """
        return images.read_image(self.path)


class UserFolder:
    """The usable lines of a folder; see `source.OpenedSource`."""

    def __init__(self, folder: Folder):
        """Take a folder that has been read.

        Args:
          folder: its lines.
        """
        self.folder = folder
        # Broken lines are counted and named there.
        self.notes = (folder.summary(),) if folder.problems else ()

    def __len__(self) -> int:
        return len(self.folder.records)

    def __getitem__(self, index: int) -> SourceRecord:
        record = self.folder.records[index]
        return SourceRecord(UserImage(self.folder.path / record.image), record.answer, record.prompt)

    def image_name(self, index: int) -> str:
        """Return the path of an image, as the line has it.

        Args:
          index: which record.
        """
        return self.folder.records[index].image

    def name_record(self, index: int) -> str:
        """Return the file and the line of a record.

        Args:
          index: which record.
        """
        return f'{self.folder.path}/{FILE}, line {self.folder.records[index].line}'


class UserFolderFormat:
    """Opens folders with a `data.jsonl`; see `source.SourceFormat`."""

    title = 'a folder of images with a data.jsonl'
    takes_images = False

    def open(self, place: Place) -> UserFolder | None:
        """Return the lines; None if there is no `data.jsonl`.

        Args:
          place: the folder.

        Raises:
          DataError: too many lines cannot be used.
        """
        if not (place.path / FILE).is_file():
            return None
        return UserFolder(read_folder(place.path))
