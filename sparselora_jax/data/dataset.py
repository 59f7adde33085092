"""What a data set is to training and evaluation, and the interface through which a recipe names one.

To add a data set, write a `Loader` and register it in `sparselora_jax/data/__init__.py`, or name it in a recipe as
`package.module:Name`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from sparselora_jax.runtime.registry import Registry


@runtime_checkable
class Records(Protocol):
    """Random access to records: `records[i]` is `{'image': uint8 [height, width, 3], 'question': str, 'answer': str}`.

    Reading a record may raise `DataError`, for example where the pixels of an image are broken.
    """

    def __len__(self) -> int:
        """Return the number of records."""

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """Read one record."""


@dataclass(frozen=True)
class Split:
    """The records that a model is trained on, or those that it is tested on.

    Attributes:
      source: the records.
      read_texts: returns (question, answer) of every record, without decoding images.
    """

    source: Records | Sequence  # a list has the methods of `Records`, with wider types
    read_texts: Callable[[], list[tuple[str, str]]]


class Dataset(NamedTuple):
    """Two splits, and the kinds of their answers.

    Attributes:
      train: records to prune and train with.
      test: records to evaluate with.
      kinds: what accuracy is reported by, and what training batches are mixed by.
      kind_of: answer -> its kind, one of `kinds`.
    """

    train: Split
    test: Split
    kinds: tuple[str, ...]
    kind_of: Callable[[str], str]


@dataclass(frozen=True)
class DataRequest:
    """What a loader needs to know about a run.

    Attributes:
      data: `config.data` of the recipe: the name of the data set, or where it lies.
      data_dir: folder in which a loader may keep files that it prepares.
      misfit: (question, answer) -> why the model cannot take them, '' if it can. A loader leaves such records out.
    """

    data: str
    data_dir: Path
    misfit: Callable[[str, str], str] = lambda question, answer: ''


# Checkable at run time, so that an object that a config names is refused before any work if it is none.
@runtime_checkable
class Loader(Protocol):
    """The interface of a data set: an object that loads the data set of a recipe.

    Attributes:
      kinds: the kinds of answers that training batches can be mixed by, in the order of the recipe's `restore.shares`.
        They are known before anything is read. (): batches cannot be mixed.
    """

    kinds: tuple[str, ...]

    def __call__(self, request: DataRequest) -> Dataset:
        """Load the data set; every process of a run calls this.

        Raises:
          DataError: the data are missing or unusable.
        """


# The names that `config.data` may have, besides folders and `package.module:Name`.
DATASETS: Registry[Loader] = Registry('data set')
