"""The items of a benchmark: questions or images with their references, stored in columns.

The validation split of VQAv2 has 214,354 questions with ten answers each. As Python objects they take a gigabyte. Here
each different text is stored once, and the columns hold its number, so all of it takes some tens of megabytes.
"""

import operator
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, SupportsIndex, runtime_checkable

import numpy as np
from jaxtyping import Int, Int32, Int64, UInt8

from sparselora_jax.data.benchmarks.records import quote
from sparselora_jax.runtime.errors import DataError

ABSENT = -1  # code of a text that an item does not have


@runtime_checkable
class Picture(Protocol):
    """An image that is not read yet.

    Attributes:
      name: where it is, for messages.
    """

    name: str

    def read(self) -> UInt8[np.ndarray, 'height width 3']:
        """Read the image as RGB, as the public evaluation code does: not turned by EXIF, alpha dropped.

        Raises:
          DataError: the image is missing or damaged; the message names it.
        """


@dataclass(frozen=True, slots=True)
class Item:
    """A question about an image, or an image to describe.

    Attributes:
      id: the id by which results are reported: of the question, or of the image where there is no question.
      image: the image, which is not read yet.
      image_id: id of the image in the data set.
      question: the question; None for captions.
      references: answers or captions of people; () where a test split has none. Of multiple choice, the letter.
      choices: texts to choose from, in order; () if the answer is free.
      context: more text that belongs to the question: the hint of ScienceQA, or the words in the image; '' if none.
      groups: names of the groups that scores are also reported for, such as {'answer_type': 'number'}.
    """

    id: int | str
    image: Picture
    image_id: int | str
    question: str | None
    references: tuple[str, ...]
    choices: tuple[str, ...] = ()
    context: str = ''
    groups: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TextLists:
    """A list of texts for each item, as codes: item i has `codes[ends[i - 1]:ends[i]]`."""

    codes: Int32[np.ndarray, ' texts']
    ends: Int64[np.ndarray, ' items']

    # Ends, and not starts and lengths: one number for each item is enough.
    def __getitem__(self, index: int) -> Int32[np.ndarray, ' texts_of_item']:
        start = self.ends[index - 1] if index else 0
        return self.codes[start : self.ends[index]]

    @property
    def lengths(self) -> Int64[np.ndarray, ' items']:
        """Count the texts of each item."""
        return np.diff(self.ends, prepend=0)


@dataclass(frozen=True, repr=False)
class Items:
    """Random access to the items of a benchmark: `items[i]` is an `Item`.

    Attributes:
      name: the benchmark.
      rows: which rows of the columns are the items, in order.
      ids: id of each row.
      images: number of each row's image.
      image_ids: id of each image.
      pictures: the images; reading happens later, see `Picture`.
      texts: every different text once.
      questions: code of each row's question, its place in `texts`; -1 for captions.
      references: codes of each row's references.
      choices: codes of each row's choices.
      contexts: code of each row's context; -1 if it has none.
      groups: for each kind of group, the code of each row's group; -1 if it has none.
      notes: what a user should know, one line each, such as a number of items other than the benchmark has.
      metric: name of the metric that the data ask for; '' if they name none.
      has_read_words: whether the contexts are words that an OCR system has read in the images.
    """

    name: str
    rows: Int[np.ndarray, ' items']
    ids: Int64[np.ndarray, ' rows'] | list
    images: Int32[np.ndarray, ' rows']
    image_ids: Sequence[int | str]
    pictures: Sequence[Picture]
    texts: list[str]
    questions: Int32[np.ndarray, ' rows']
    references: TextLists
    choices: TextLists
    contexts: Int32[np.ndarray, ' rows']
    groups: Mapping[str, Int32[np.ndarray, ' rows']]
    notes: tuple[str, ...] = ()
    metric: str = ''
    has_read_words: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f'<{len(self):,} items of {self.name}>'

    # grain passes numpy's integers, hence `SupportsIndex`.
    def __getitem__(self, index: SupportsIndex) -> Item:
        """Return an item; its image is not read.

        Raises:
          IndexError: there is no such item.
        """
        # numpy raises IndexError, by which a loop over the items ends.
        row = int(self.rows[operator.index(index)])
        image = int(self.images[row])
        # numpy's integers cannot be written as JSON, in which results are reported.
        identifier = self.ids[row]
        return Item(
            id=identifier if isinstance(identifier, str) else int(identifier),
            image=self.pictures[image],
            image_id=self.image_ids[image],
            question=None if self.questions[row] == ABSENT else self.texts[self.questions[row]],
            references=tuple(self.texts[code] for code in self.references[row]),
            choices=tuple(self.texts[code] for code in self.choices[row]),
            context='' if self.contexts[row] == ABSENT else self.texts[self.contexts[row]],
            groups={name: self.texts[codes[row]] for name, codes in self.groups.items() if codes[row] != ABSENT},
        )

    # Columns are not copied, so items without a few images cost no memory.
    def take(self, indices: Sequence[int] | Int[np.ndarray, ' chosen']) -> 'Items':
        """Return some of the items, which share the columns.

        Args:
          indices: which items, in order.
        """
        return replace(self, rows=self.rows[np.asarray(indices, np.int64)])

    @property
    def nbytes(self) -> int:
        """Count the bytes of the columns, without the texts."""
        columns = [self.rows, self.images, self.questions, self.contexts, *self.groups.values()]
        lists = [self.references.codes, self.references.ends, self.choices.codes, self.choices.ends]
        return sum(column.nbytes for column in columns + lists)


class Codes(dict):
    """Numbers texts in the order in which they first appear: `codes[text]` is the number.

    >>> codes = Codes()
    >>> codes['yes'], codes['no'], codes['yes'], list(codes)
    (0, 1, 0, ['yes', 'no'])
    """

    # Called for new texts only, so a text that is known costs one look-up of a dict.
    def __missing__(self, text: str) -> int:
        try:
            # JSON can encode half of a surrogate pair, but files and tokenizers cannot represent it.
            text.encode()
        except UnicodeEncodeError:
            raise DataError(f'{quote(text)} holds half of a surrogate pair') from None
        code = len(self)
        self[text] = code
        return code


class ItemsBuilder:
    """Collects items in columns.

    Args:
      name: the benchmark.
    """

    def __init__(self, name: str):
        self.name = name
        self.metric = ''
        self.has_read_words = False
        self.notes: list[str] = []
        self.image_ids: list[int | str] = []
        self._image_numbers: dict[str, int] = {}  # file name -> number of the image
        self._codes = Codes()
        self._ids: dict[int | str, None] = {}  # as a dict, which finds duplicates and keeps the order
        # Arrays of the standard library grow like lists, and a number takes four bytes.
        self._images = array('i')
        self._questions = array('i')
        self._contexts = array('i')
        self._references = _ListColumn()
        self._choices = _ListColumn()
        self._groups: dict[str, array] = {}

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, identifier: int | str) -> bool:
        return identifier in self._ids

    @property
    def image_names(self) -> list[str]:
        """Return the file names of the images, in the order of their numbers; empty if the images are not files."""
        return list(self._image_numbers)

    def image_file(self, name: str, image_id: int | str) -> int:
        """Return the number of an image that is a file; several items may have the same image.

        Args:
          name: file name, possibly with folders, as the data set writes it.
          image_id: id of the image in the data set.

        Raises:
          DataError: the name is empty or no name of a file.
        """
        number = self._image_numbers.get(name)
        if number is None:
            if not name.strip() or '\0' in name:
                raise DataError(f'{quote(name)} is not the name of an image')
            number = len(self._image_numbers)
            self._image_numbers[name] = number
            self.image_ids.append(image_id)
        return number

    def add(
        self,
        identifier: int | str,
        image: int,
        *,
        question: str | None = None,
        references: Iterable[str] = (),
        choices: Iterable[str] = (),
        context: str = '',
        groups: Mapping[str, str] | None = None,
    ) -> None:
        """Add an item.

        Args:
          identifier: its id.
          image: number of its image: of `image_file`, or of a row.
          question: see `Item`.
          references: see `Item`.
          choices: see `Item`.
          context: see `Item`.
          groups: see `Item`; empty names are left out.

        Raises:
          DataError: the id has been added before, or a text cannot be represented.
        """
        if identifier in self._ids:
            raise DataError(f'the id {quote(identifier)} occurs twice; each item needs its own')
        codes = self._codes
        # Coded before anything is stored, so that a refused item leaves nothing behind.
        question_code = ABSENT if question is None else codes[question]
        context_code = codes[context] if context else ABSENT
        reference_codes = [codes[reference] for reference in references]
        choice_codes = [codes[choice] for choice in choices]
        group_codes = {name: codes[group] for name, group in (groups or {}).items() if group}
        # From here on nothing can fail.
        row = len(self._ids)
        self._ids[identifier] = None
        self._images.append(image)
        self._questions.append(question_code)
        self._contexts.append(context_code)
        self._references.append(reference_codes)
        self._choices.append(choice_codes)
        for name, code in group_codes.items():
            # A kind of group may appear late: the items before it do not have it.
            column = self._groups.setdefault(name, array('i'))
            _pad(column, row)
            column.append(code)

    def build(self, pictures: Sequence[Picture]) -> Items:
        """Return the items.

        Args:
          pictures: the images, by their numbers.
        """
        count = len(self._ids)
        for column in self._groups.values():
            _pad(column, count)
        ids: Int64[np.ndarray, ' rows'] | list = list(self._ids)
        # Ids that are all numbers are stored as such; one text among them makes all of them objects.
        if all(isinstance(identifier, int) for identifier in ids):
            ids = np.array(ids, np.int64)
        return Items(
            name=self.name,
            rows=np.arange(count, dtype=np.int32),
            ids=ids,
            images=np.array(self._images, np.int32),
            image_ids=self.image_ids,
            pictures=pictures,
            texts=list(self._codes),
            questions=np.array(self._questions, np.int32),
            references=self._references.build(),
            choices=self._choices.build(),
            contexts=np.array(self._contexts, np.int32),
            groups={name: np.array(column, np.int32) for name, column in self._groups.items()},
            notes=tuple(self.notes),
            metric=self.metric,
            has_read_words=self.has_read_words,
        )


class _ListColumn:
    """Collects a list of codes for each item."""

    def __init__(self):
        self.codes = array('i')
        self.ends = array('q')

    def append(self, codes: list[int]) -> None:
        self.codes.extend(codes)
        self.ends.append(len(self.codes))

    def build(self) -> TextLists:
        return TextLists(np.array(self.codes, np.int32), np.array(self.ends, np.int64))


def _pad(column: array, length: int) -> None:
    """Append absent texts to a column until it has a length."""
    missing = length - len(column)
    if missing > 0:
        column.extend([ABSENT] * missing)
