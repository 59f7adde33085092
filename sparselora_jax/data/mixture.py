"""Files of captions, conversations and texts as a data set: draws records of one or several sources by a seed.

A recipe names the sources by their paths, separated by commas, see `sources.place`. A tenth of the images, chosen by a
hash of their names, is for testing, and the others are for training. Which records are drawn is a function of the seed
alone. How a caption is divided, or which instruction it gets, is a function of the seed and of the place in the order
of training. So both are the same in each process and after each restart.
"""

import functools
import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from sparselora_jax.data import folder
from sparselora_jax.data.caption_forms import clean_caption, divide
from sparselora_jax.data.dataset import DataRequest, Dataset, Split
from sparselora_jax.data.sources.catalog import open_source
from sparselora_jax.data.sources.columns import TextColumn, check_text
from sparselora_jax.data.sources.pictures import needed_tolerance, same_image_name
from sparselora_jax.data.sources.place import SourceName, split_names
from sparselora_jax.data.sources.source import IndexedSource, OpenedSource, SourceRecord
from sparselora_jax.runtime.errors import DataError

TEST_SHARE = 0.1  # share of the images that are for testing
MOST_TEST = 1000  # records for testing: as many questions as a recipe evaluates on by default
MOST_PROBLEMS = 10_000  # images of a source that are tried and cannot be read
SHOWN = 3  # records left out that a summary names
LENGTHS = 'text.prompt_tokens and text.answer_tokens say how many tokens fit'


@dataclass
class DrawnRecords:
    """Random access to the records that were drawn; see `dataset.Records`.

    Attributes:
      sources: the sources.
      numbers: which source each record is from.
      indices: its place in that source.
      questions: its prompt, as it was drawn when the record was checked.
      answers: its text to learn, drawn with the prompt.
    """

    sources: Sequence[OpenedSource]
    numbers: list[int] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    questions: TextColumn = field(default_factory=TextColumn)
    answers: TextColumn = field(default_factory=TextColumn)

    def __len__(self) -> int:
        return len(self.numbers)

    # grain passes numpy's integers, hence `SupportsIndex`.
    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        """Read a record and its image; the image of a text is None.

        Raises:
          DataError: the pixels of the image are corrupt; the message names the record.
        """
        place = index.__index__()
        image = self.stored(place).image
        try:
            pixels = None if image is None else image.read()
        except DataError as error:
            raise DataError(f'{self.name_record(place)}: {error}') from error
        return {'image': pixels, 'question': self.questions[place], 'answer': self.answers[place]}

    def stored(self, place: int) -> SourceRecord:
        """Return a record as its source has it.

        Args:
          place: which record.
        """
        return self.sources[self.numbers[place]][self.indices[place]]

    def add(self, number: int, index: int, question: str, answer: str) -> None:
        """Add a record.

        Args:
          number: which source it is from.
          index: its place there.
          question: its prompt.
          answer: its text to learn.
        """
        self.questions.append(question)
        self.answers.append(answer)
        self.numbers.append(number)
        self.indices.append(index)

    def name_record(self, index: int) -> str:
        """Return the place of a record in its source.

        Args:
          index: which record.
        """
        return self.sources[self.numbers[index]].name_record(self.indices[index])

    def read_texts(self) -> list[tuple[str, str]]:
        """Return the prompt and the text to learn of each record."""
        return [(self.questions[index], self.answers[index]) for index in range(len(self))]

    def read_image_names(self) -> list[str]:
        """Return the name of each record's image, with a fingerprint of it."""

        def describe(place: int) -> str:
            image = self.stored(place).image
            return '' if image is None else f'{image.name}, {image.fingerprint()}'

        with ThreadPoolExecutor(8) as pool:  # waits for the disk, not for the processor
            return list(pool.map(describe, range(len(self))))

    def as_split(self, draw_texts: Callable[[int, np.random.Generator], tuple[str, str]] | None = None) -> Split:
        """Return the records as a split of a data set.

        Args:
          draw_texts: draws the texts of a record for one place in the order of training; see `dataset.Split`.
        """
        return Split(self, self.read_texts, self.read_image_names, self.name_record, draw_texts)


class MixtureLoader:
    """The `Loader` of files and folders: `request.data` is the names of the sources, separated by commas."""

    # Batches are not mixed by kind of answer, but by source.
    kinds = ()

    def __call__(self, request: DataRequest) -> Dataset:
        """Open the sources and draw the records.

        Args:
          request: its `data`, `mixture`, `seed` and `misfit` are used; an index of tar files is kept in its `data_dir`.

        Raises:
          DataError: a source is missing or broken, too many images are missing, or no record is left.
        """
        names = split_names(request.data)
        mixture = request.mixture
        if _is_user_folder(names) and not mixture.samples:
            return folder.load(names[0].path, request.misfit)
        sources = [open_source(name, index_dir=Path(request.data_dir), tolerance=mixture.tolerance) for name in names]
        draw = _Draw(names, sources, request)
        train = draw.training()
        test = draw.testing()
        draw.check_images(train, test)
        for line in draw.summary(train, test):
            print(line, file=sys.stderr)
        if not len(train):
            raise DataError(f'{request.data}: no record can be used for training: {draw.reasons() or "it is empty"}')
        for source in sources:
            if isinstance(source, IndexedSource):
                source.keep_index()
        draw_texts = functools.partial(draw.draw_texts, train)
        return Dataset(train.as_split(draw_texts), test.as_split(), folder.KINDS, folder.kind_of)


def _is_user_folder(names: Sequence[SourceName]) -> bool:
    """Return whether the data are one folder with a data.jsonl, or do not exist."""
    path = Path(names[0].path)
    return len(names) == 1 and not names[0].images and (not os.path.exists(path) or (path / 'data.jsonl').exists())


def apportion(count: int, weights: Sequence[int | float]) -> list[int]:
    """Divide a number by weights: each share is rounded down, and the largest remainders get one more.

    Args:
      count: the number.
      weights: the weights.

    >>> apportion(25_000, (1, 1, 1)), apportion(10, (3, 1))
    ([8334, 8333, 8333], [8, 2])
    """
    # As fractions: the sum of large floats is infinite.
    total = sum(map(Fraction, weights))
    exact = [count * Fraction(weight) / total for weight in weights]
    shares = [int(share) for share in exact]
    # Sorting is stable: of equal remainders, the first source gets one more.
    by_remainder = sorted(range(len(weights)), key=lambda number: shares[number] - exact[number])
    for number in by_remainder[: count - sum(shares)]:
        shares[number] += 1
    return shares


def is_test_image(name: str) -> bool:
    """Return whether an image is for testing: by a hash of its name, so that more images change nothing for others.

    An image that several data sets name differently is for the same use in all of them, see `same_image_name`.

    Args:
      name: name of the image; '' for a text, which is never for testing.
    """
    digest = hashlib.sha256(same_image_name(name).encode('utf-8', 'surrogateescape')).digest()
    return bool(name) and int.from_bytes(digest[:8]) < TEST_SHARE * 2**64


class _Draw:
    """Draws records from sources, and counts those that cannot be used."""

    def __init__(self, names: Sequence[SourceName], sources: Sequence[OpenedSource], request: DataRequest):
        self.names = names
        self.sources = sources
        self.request = request
        self.misfits = [0] * len(sources)
        self.image_problems: list[list[str]] = [[] for _ in sources]
        self.first_misfits: list[str] = []
        self.shares = [0] * len(sources)  # training records that a recipe asks for; 0: all that there are

    def training(self) -> DrawnRecords:
        """Draw the training records."""
        mixture = self.request.mixture
        drawn = DrawnRecords(self.sources)
        if mixture.is_from_start:
            for number, source in enumerate(self.sources):
                self._take(drawn, number, iter(range(len(source))), mixture.samples - len(drawn))
            return drawn
        shares = [len(source) for source in self.sources]
        if mixture.samples:
            shares = apportion(mixture.samples, mixture.weights or [1] * len(self.sources))
            self.shares = shares
        for number, share in enumerate(shares):
            self._take(drawn, number, self._in_random_order(number, is_test=False), share)
        return drawn

    def testing(self) -> DrawnRecords:
        """Draw the test records, as many from each source."""
        drawn = DrawnRecords(self.sources)
        if self.request.mixture.is_from_start:
            return drawn
        for number, share in enumerate(apportion(MOST_TEST, [1] * len(self.sources))):
            self._take(drawn, number, self._in_random_order(number, is_test=True), share)
        return drawn

    def _in_random_order(self, number: int, *, is_test: bool) -> Iterator[int]:
        """Yield the records of one split of a source in the order of the seed."""
        source = self.sources[number]
        rng = np.random.default_rng((self.request.seed, number))
        # As an array: a list of millions of Python's integers would take a hundred megabytes.
        for index in map(int, rng.permutation(len(source))):
            if is_test_image(source.image_name(index)) == is_test:
                yield index

    def _take(self, drawn: DrawnRecords, number: int, candidates: Iterator[int], share: int) -> None:
        """Add the first usable records of a source, in the order of the source."""
        taken: dict[int, tuple[str, str]] = {}
        # So many unreadable images are not exceptions; looking for others could take hours.
        while len(taken) < share and len(self.image_problems[number]) < MOST_PROBLEMS:
            index = next(candidates, None)
            if index is None:
                break
            texts = self._usable(number, index)
            if texts is not None:
                taken[index] = texts
        # In the order of the file, in which a disk reads fastest; batches are shuffled anyway.
        for index in sorted(taken):
            drawn.add(number, index, *taken[index])

    def check_images(self, train: DrawnRecords, test: DrawnRecords) -> None:
        """Check that not too many images of a source cannot be read.

        Raises:
          DataError: too many cannot.
        """
        for number, problems in enumerate(self.image_problems):
            tried = len(problems) + train.numbers.count(number) + test.numbers.count(number)
            if len(problems) <= self.request.mixture.tolerance * tried:
                continue
            raise DataError(
                f'{self.names[number].path}: {len(problems):,} of {tried:,} images cannot be read: '
                f'{"; ".join(problems[:SHOWN])}; {needed_tolerance(len(problems), tried)}'
            )

    def _usable(self, number: int, index: int) -> tuple[str, str] | None:
        """Return the texts of a record; None if it cannot be used.

        Raises:
          DataError: its text cannot be read, or written as UTF-8; the message names the record.
        """
        source = self.sources[number]
        record = source[index]
        question, answer = self._write(record, np.random.default_rng((self.request.seed, number, index)))
        try:
            check_text(question)
            check_text(answer)
        except DataError as error:
            raise DataError(f'{source.name_record(index)}: {error}') from None
        reason = 'there is no text to learn'
        if answer.strip():
            reason = self.request.misfit(question, answer)
        if reason:
            self.misfits[number] += 1
            if len(self.first_misfits) < SHOWN:
                self.first_misfits.append(f'{source.name_record(index)}: {reason}')
            return None
        try:
            if record.image is not None:
                record.image.check()
        except DataError as error:
            self.image_problems[number].append(str(error))
            return None
        return question, answer

    def draw_texts(self, drawn: DrawnRecords, place: int, rng: np.random.Generator) -> tuple[str, str]:
        """Return the prompt and the text to learn of a record for one place in the order of training.

        Args:
          drawn: the records.
          place: which of them.
          rng: draws the place of the cut, or the instruction.
        """
        first = drawn.questions[place], drawn.answers[place]
        record = drawn.stored(place)
        if record.question is not None:
            return first
        question, answer = self._write(record, rng)
        # Only the first texts are known to fit. A cut in a word can need more tokens than others.
        if not answer.strip() or self.request.misfit(question, answer):
            return first
        return question, answer

    def _write(self, record: SourceRecord, rng: np.random.Generator) -> tuple[str, str]:
        """Return the prompt and the text to learn of a record; `rng` draws the cut, or the instruction."""
        if record.question is not None:
            return record.question, record.answer
        mixture = self.request.mixture
        # A text without an image has nothing to describe, so only its own beginning can be its prompt.
        if record.image is None:
            return divide(record.answer, 'prefix', rng)
        caption = clean_caption(record.answer) if mixture.is_clean else record.answer
        return divide(caption, mixture.captions, rng)

    def reasons(self) -> str:
        """Return why records are left out, the first few by name."""
        lengths = [LENGTHS] if self.first_misfits else []
        problems = [problem for of_source in self.image_problems for problem in of_source]
        return '; '.join([*self.first_misfits, *lengths, *problems[:SHOWN]])

    def summary(self, train: DrawnRecords, test: DrawnRecords) -> list[str]:
        """Return a line for each source, and one for records that are left out."""
        lines = []
        for number, (name, source) in enumerate(zip(self.names, self.sources, strict=True)):
            lines.append(
                f'{name.path}: {train.numbers.count(number):,} training and {test.numbers.count(number):,} test '
                f'records of {len(source):,}'
            )
            count = train.numbers.count(number)
            if count < self.shares[number]:
                share = f'the {self.shares[number]:,} of its share'
                lines.append(f'{name.path}: {count:,} training records, fewer than {share}: it has no more')
            lines += [f'{name.path}: {note}' for note in source.notes]
            if self.image_problems[number]:
                problems = '; '.join(self.image_problems[number][:SHOWN])
                lines.append(f'{name.path}: {len(self.image_problems[number]):,} left out: {problems}')
        asked = self.request.mixture.samples
        # Without shares, no source has too few records by itself.
        if self.request.mixture.is_from_start and len(train) < asked:
            lines.append(f'{asked:,} records are asked for, and {len(train):,} can be drawn')
        if any(self.misfits):
            lines.append(f'{sum(self.misfits):,} records left out: {"; ".join([*self.first_misfits, LENGTHS])}')
        return lines
