"""Recognise a run whose model or records have changed since it began, before it goes on with them.

`inputs.json` in the workdir holds digests of the model's files and of the records. The content of the model's files is
hashed once, when the run begins. A resumed run reads a file again only if its size or time has changed. Records are
compared by their texts and the names and fingerprints of their images, as reading all images would take minutes.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from sparselora_jax.checkpoints.checkpoint_files import settings_files
from sparselora_jax.checkpoints.layout import Piece
from sparselora_jax.data.benchmarks.items import Items, Picture
from sparselora_jax.data.benchmarks.picture_files import PictureFile
from sparselora_jax.data.dataset import Dataset, Split
from sparselora_jax.data.images import fingerprint
from sparselora_jax.jobs import names
from sparselora_jax.jobs.stored import Stored
from sparselora_jax.models.model import Model
from sparselora_jax.recipe import CONFIG_REMEDY, ConfigError
from sparselora_jax.runtime import digests
from sparselora_jax.runtime.digests import Digest

REMEDY = 'use another workdir, or put them back'
FIELDS = ('question', 'answer', 'image')
SPLITS = ('train', 'test', 'calibration')
DIGITS = 6  # hexadecimal digits kept of each field of a record, to name a record that has changed
SHOWN = 3  # most files that a message names


class RecordsDigest(NamedTuple):
    """The records of a split as they were at some time.

    Attributes:
      count: number of records.
      sha256: hash of all records, in order.
      fields: the first `DIGITS` digits of the hash of each field of each record, one after the other.
    """

    count: int
    sha256: str
    fields: str

    def rows(self) -> list[tuple[str, ...]]:
        """Return the digits of the fields, by record."""
        width = DIGITS * len(FIELDS)
        rows = [self.fields[start : start + width] for start in range(0, self.count * width, width)]
        return [tuple(row[start : start + DIGITS] for start in range(0, width, DIGITS)) for row in rows]


class Inputs(NamedTuple):
    """Digests of everything that a run reads.

    Attributes:
      model: digest of each file of the model, by name.
      train: the training records.
      test: the test questions.
      tasks: the items of each task.
      calibration: the calibration samples; None: they are training records.
    """

    model: dict[str, Digest]
    train: RecordsDigest
    test: RecordsDigest
    tasks: dict[str, RecordsDigest]
    calibration: RecordsDigest | None = None

    def store(self, stored: Stored) -> None:
        """Write `inputs.json`.

        Args:
          stored: the files of the run.
        """
        splits = {name: getattr(self, name) for name in SPLITS}
        records = digests.to_json({name: digest for name, digest in splits.items() if digest is not None})
        model = digests.to_json(self.model)
        stored.write(names.INPUTS, {'model': model, 'tasks': digests.to_json(self.tasks)} | records)


def load(stored: Stored) -> Inputs | None:
    """Read `inputs.json`; None: the run has not begun.

    Args:
      stored: the files of the run.

    Raises:
      StorageError: the file is damaged.
    """
    values = stored.read(names.INPUTS, CONFIG_REMEDY)
    if values is None:
        return None
    records = digests.from_json({name: values[name] for name in SPLITS if name in values}, RecordsDigest)
    # Runs of older versions had no tasks.
    tasks = digests.from_json(values.get('tasks', {}), RecordsDigest)
    return Inputs(digests.from_json(values['model'], Digest), **records, tasks=tasks)


def model_files(model: Model, pieces: Iterable[Piece]) -> dict[str, Path]:
    """Return the files that decide what a model on disk computes, by name.

    Args:
      model: the model.
      pieces: where its weights are, see `open_model`.
    """
    return files_of_directory(Path(model.source), {piece.entry.file for piece in pieces})


def files_of_directory(folder: Path, weights: Iterable[Path]) -> dict[str, Path]:
    """Return the files of a directory that decide what its model computes, by name: weights and settings.

    Args:
      folder: the directory.
      weights: its files of weights.
    """
    relative = {file.relative_to(folder) for file in weights}
    return {str(name): folder / name for name in sorted(relative | set(settings_files(folder)))}


def take(
    model_files: Mapping[str, Path],
    dataset: Dataset,
    tasks: Mapping[str, RecordsDigest],
    known: Inputs | None,
    *,
    calibration: Split | None = None,
) -> Inputs:
    """Return the digests of the inputs as they are now.

    Args:
      model_files: the files of the model, by name.
      dataset: the records.
      tasks: digest of the items of each task.
      known: the digests when the run began; files that look the same are not read again.
      calibration: the calibration samples; None: they are training records.
    """
    return Inputs(
        digests.take(model_files, None if known is None else known.model),
        digest_records(dataset.train),
        digest_records(dataset.test),
        dict(tasks),
        None if calibration is None else digest_records(calibration),
    )


def digest_records(split: Split) -> RecordsDigest:
    """Return the digest of the records of a split.

    Args:
      split: its texts are read, not its images.
    """
    texts = split.read_texts()
    images = [''] * len(texts) if split.read_image_names is None else split.read_image_names()
    whole = hashlib.sha256()
    digits = []
    for (question, answer), image in zip(texts, images, strict=True):
        for field in (question, answer, image):
            # 'surrogatepass': a text of any origin can be hashed. The end mark keeps 'ab', 'c' apart from 'a', 'bc'.
            of_field = hashlib.sha256(field.encode('utf-8', 'surrogatepass'))
            digits.append(of_field.hexdigest()[:DIGITS])
            whole.update(of_field.digest())
    return RecordsDigest(len(texts), whole.hexdigest(), ''.join(digits))


def digest_items(items: Items, *, is_published: bool) -> RecordsDigest:
    """Return the digest of the items of a benchmark.

    Args:
      items: the items.
      is_published: images count by their ids alone, since their content is published. Otherwise, their files count too.
    """
    texts = []
    images = []
    # Only the texts of an item are kept: hundreds of thousands of items take much more memory.
    for index in range(len(items)):
        item = items[index]
        texts.append(('\n'.join([item.context, item.question or '', *item.choices]), '\n'.join(item.references)))
        of_file = '' if is_published else _fingerprint(item.image)
        images.append(f'{item.id} {item.image_id} {of_file}'.rstrip())
    return digest_records(Split(items, lambda: texts, lambda: images))


def _fingerprint(picture: Picture) -> str:
    """Return the fingerprint of an image that is a file and is not missing, otherwise ''."""
    return fingerprint(picture.path) if isinstance(picture, PictureFile) else ''


def change_of_items(old: RecordsDigest, new: RecordsDigest) -> str:
    """Describe how the items of a task have changed; '' if they have not.

    Args:
      old: their earlier digest.
      new: their digest now.
    """
    return '' if old.sha256 == new.sha256 else describe_change(old.rows(), new.rows(), 'item {}'.format)


def refuse_changed(
    begun: Inputs,
    now: Inputs,
    *,
    workdir: Path,
    model: str,
    data: str,
    dataset: Dataset,
    calibration: Split | None = None,
) -> None:
    """Check that a run still has the inputs with which it began.

    Args:
      begun: the digests when the run began.
      now: the digests now.
      workdir: the folder of the run.
      model: the model, as the recipe names it.
      data: the data set, as the recipe names it.
      dataset: the records now, to name the place of one that has changed.
      calibration: the calibration samples now; None: they are training records.

    Raises:
      ConfigError: a file or a record has changed; the message names it.
    """
    changes = changed_files(begun.model, now.model)
    if changes:
        more = f' and {len(changes) - SHOWN} more' if len(changes) > SHOWN else ''
        raise ConfigError(
            f'{workdir}: the files of {model} are not those that this run began with '
            f'({", ".join(changes[:SHOWN])}{more}); {REMEDY}'
        )
    for kind, old, new, split in (
        ('test questions', begun.test, now.test, dataset.test),
        ('training records', begun.train, now.train, dataset.train),
        ('calibration samples', begun.calibration, now.calibration, calibration),
    ):
        if old is None or new is None or split is None:
            continue
        if old.sha256 != new.sha256:
            change = describe_change(old.rows(), new.rows(), split.name_record)
            raise ConfigError(
                f'{workdir}: the {kind} of {data} are not those that this run began with ({change}); {REMEDY}'
            )
    for task in begun.tasks.keys() & now.tasks.keys():
        change = change_of_items(begun.tasks[task], now.tasks[task])
        if change:
            raise ConfigError(
                f'{workdir}: the items of {task} are not those that this run began with ({change}); {REMEDY}'
            )


def changed_files(old: Mapping[str, Digest], new: Mapping[str, Digest]) -> list[str]:
    """List the files that have changed, each with what has happened to it.

    Args:
      old: earlier digests by name.
      new: the digests now.
    """
    changes = []
    for name in sorted(old.keys() | new.keys()):
        if name not in new:
            changes.append(f'{name} is gone')
        elif name not in old:
            changes.append(f'{name} is new')
        elif old[name].sha256 != new[name].sha256:
            changes.append(f'{name} has changed')
    return changes


def describe_change(
    old: Sequence[tuple[str, ...]], new: Sequence[tuple[str, ...]], name_record: Callable[[int], str]
) -> str:
    """Describe how records have changed, and name the first place.

    Args:
      old: the fields of the earlier records.
      new: the fields of the records now.
      name_record: returns the place of a record of today.
    """
    pairs = enumerate(zip(old, new, strict=False))
    first = next((index for index, (before, after) in pairs if before != after), min(len(old), len(new)))
    gone = Counter(old) - Counter(new)
    added = Counter(new) - Counter(old)
    if not gone and not added:
        return f'their order has changed, first at {name_record(first)}'
    counts = f'{len(new):,} instead of {len(old):,}' if len(old) != len(new) else f'{sum(added.values()):,} changed'
    if first < len(new) and new[first] in added:
        if len(old) == len(new):
            fields = [name for name, *pair in zip(FIELDS, old[first], new[first], strict=True) if pair[0] != pair[1]]
            return f'{counts}; {name_record(first)}: its {" and ".join(fields)}'
        return f'{counts}; {name_record(first)} is new'
    after = f'after {name_record(first - 1)}' if first else f'before {name_record(0)}'
    return f'{counts}; one is gone {after}'
