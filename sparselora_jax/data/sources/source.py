"""The interface of the readers of single layouts: a source of records, whose images are not read yet."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from sparselora_jax.data.sources.pictures import StoredImage
from sparselora_jax.data.sources.place import Place
from sparselora_jax.runtime.registry import Registry


@dataclass(frozen=True, slots=True)
class SourceRecord:
    """An image with a caption, an image with a question and its answer, or a text alone.

    Attributes:
      image: the image, which is not read yet; None: there is none.
      answer: the caption, the text, or the answer.
      question: the question; None: the record is a caption or a text, and `caption_forms` writes its prompt.
    """

    image: StoredImage | None
    answer: str
    question: str | None = None


@runtime_checkable
class OpenedSource(Protocol):
    """Random access to the records of a source, in the order of its files.

    Attributes:
      notes: what a user should know, one line each.
    """

    notes: tuple[str, ...]

    def __len__(self) -> int:
        """Return the number of records."""

    def __getitem__(self, index: int) -> SourceRecord:
        """Return a record; its image is not read.

        Raises:
          DataError: its text cannot be read.
        """

    def image_name(self, index: int) -> str:
        """Return a text that is the same for all records of an image; '' if there is no image.

        Args:
          index: which record.
        """

    def name_record(self, index: int) -> str:
        """Return the place of a record for messages, such as a file and an element.

        Args:
          index: which record.
        """


@runtime_checkable
class IndexedSource(Protocol):
    """A source that opens faster the next time if its index is kept."""

    def keep_index(self) -> None:
        """Write the index; called once the records have been drawn, so that data that are refused leave nothing."""


@runtime_checkable
class SourceFormat(Protocol):
    """Opens sources of one layout.

    Attributes:
      title: the layout in words.
      takes_images: whether the images may lie in another folder, which the name of a source gives.
    """

    title: str
    takes_images: bool

    def open(self, place: Place) -> OpenedSource | None:
        """Return the source at a place; None if its files have another layout.

        Args:
          place: a file or a folder.

        Raises:
          DataError: the layout is this one, and the files are broken or incomplete.
        """


# In the order in which they are tried: the first that knows the files opens them.
SOURCES: Registry[SourceFormat] = Registry('layout of data')
