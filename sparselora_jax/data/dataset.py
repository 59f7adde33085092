"""The data set types that training and evaluation use, and the loader interface that a recipe names.

To add a data set, write a `Loader` and register it in `sparselora_jax/data/loaders.py`, or name it in a recipe as
`package.module:Name`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from sparselora_jax.data.caption_forms import CaptionForm
from sparselora_jax.runtime.registry import Registry


@runtime_checkable
class Records(Protocol):
    """Random access to records: `records[i]` is `{'image': uint8 [height, width, 3], 'question': str, 'answer': str}`.

    The image of a training record may be None: it is a text alone.

    Reading a record may raise `DataError`, for example where the pixels of an image are corrupt.
    """

    def __len__(self) -> int:
        """Return the number of records."""

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """Read one record."""


@dataclass(frozen=True)
class Split:
    """The training records or the test records of a data set.

    Attributes:
      source: the records.
      read_texts: returns (question, answer) of every record, without decoding images.
      read_image_names: returns a text for the image of every record that changes with the image, such as its path and
        `images.fingerprint`, without decoding images. None: changed images are not noticed when a run resumes.
      name_record: returns the place of a record for messages, such as a file and a line.
      draw_texts: returns (question, answer) of a record as drawn for one place in the order of training, by a generator
        that belongs to the place. None: the texts are those of `source` in each epoch.
    """

    source: Records | Sequence  # a list has the methods of `Records`, but wider types
    read_texts: Callable[[], list[tuple[str, str]]]
    read_image_names: Callable[[], list[str]] | None = None
    name_record: Callable[[int], str] = 'record {}'.format
    draw_texts: Callable[[int, np.random.Generator], tuple[str, str]] | None = None


class Dataset(NamedTuple):
    """A training and a test split, and the kinds of their answers.

    Attributes:
      train: records to prune and train with.
      test: records to evaluate with.
      kinds: names of the answer kinds. Accuracy is reported for each kind, and training batches mix the kinds.
      kind_of: maps an answer to its kind, one of `kinds`.
    """

    train: Split
    test: Split
    kinds: tuple[str, ...]
    kind_of: Callable[[str], str]


@dataclass(frozen=True)
class Mixture:
    """How the records of several sources are drawn and written; see `data.mixture`.

    Attributes:
      samples: number of training records that are drawn; 0: all records are used.
      weights: share of each source among them; (): the shares are equal.
      captions: form of the prompts of captions, see `data.caption_forms`.
      is_clean: whether captions are cleaned as public training code does, `caption_forms.clean_caption`.
      tolerance: largest share of a source's images that may be missing or unreadable; their records are left out.
      is_from_start: whether the training records are the first ones of the sources, in their order, and not drawn by
        the seed.
    """

    samples: int = 0
    weights: tuple[int | float, ...] = ()
    captions: CaptionForm = 'prefix'
    is_clean: bool = True
    tolerance: float = 0.0
    is_from_start: bool = False


@dataclass(frozen=True)
class DataRequest:
    """The facts about a run that a loader needs.

    Attributes:
      data: `config.data` of the recipe: the name or the path of the data set.
      data_dir: folder in which a loader may keep files that it prepares.
      misfit: maps (question, answer) to the reason why the model cannot use them, or ''. A loader skips records with
        a reason.
      mixture: how records are drawn from sources; loaders of named data sets do not use it.
      seed: seed of what a loader draws at random.
    """

    data: str
    data_dir: Path
    misfit: Callable[[str, str], str] = lambda question, answer: ''
    mixture: Mixture = Mixture()
    seed: int = 0


# Checkable at run time: if a config names an object that is not a `Loader`, it is refused before any work starts.
@runtime_checkable
class Loader(Protocol):
    """The interface for data sets: an object that loads the data set of a recipe.

    Attributes:
      kinds: the kinds of answers that training batches can be mixed by, in the order of the recipe's `restore.shares`.
        They are known before any file is read. (): batches cannot be mixed.
    """

    kinds: tuple[str, ...]

    def __call__(self, request: DataRequest) -> Dataset:
        """Load the data set; every process of a run calls this.

        Raises:
          DataError: the data are missing or unusable.
        """


# The names that `config.data` may have, besides folders and `package.module:Name`.
DATASETS: Registry[Loader] = Registry('data set')
