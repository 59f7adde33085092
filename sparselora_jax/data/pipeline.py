"""From records to batches: image and text processing, and a grain pipeline where a batch is a function of its step.

`batches(...)[step]` is the batch of a global step: a position in the data is one integer, which a checkpoint stores.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from sparselora_jax.data.dataset import Dataset, Split
from sparselora_jax.data.text_format import TextFormat
from sparselora_jax.runtime.errors import DataError

# What Pillow raises for a file that is there.
UNREADABLE = (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError)


def read_image(path: str | Path) -> UInt8[np.ndarray, 'height width 3']:
    """An image file as RGB pixels, turned as a camera says, on white where it is transparent.

    Raises:
      DataError: the file is missing or no image.
    """
    try:
        with Image.open(path) as image:
            return _rgb(image)
    except FileNotFoundError:
        raise DataError(f'{path}: no such file') from None
    except UNREADABLE as error:
        raise DataError(f'{path}: not a readable image ({error})') from None


def _rgb(image: Image.Image) -> np.ndarray:
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    return np.asarray(image.convert('RGB'))


def vqa_transform(processor: Any, text: TextFormat) -> Callable[[dict], dict]:
    """A record -> the arrays that a model reads and those that it is trained to predict."""
    size = {'prompt_tokens': text.prompt_tokens, 'answer_tokens': text.answer_tokens}

    def transform(record):
        return processor.example(record['image'], text.write(record['question']), record['answer'], **size)

    return transform


def misfit(processor: Any, text: TextFormat, *, answers: bool = True) -> Callable[[str, str], str]:
    """(question, answer) -> why their tokens do not fit the format, '' if they do; for `folder.load`.

    Args:
      answers: whether answers must fit too: those that are only compared as text need no room.
    """
    room = {'prompt_tokens': text.prompt_tokens, 'answer_tokens': text.answer_tokens if answers else None}
    return lambda question, answer: processor.misfit(text.write(question), answer, **room)


def batches(
    source: Any,
    transform: Callable[[dict], dict],
    *,
    batch: int,
    seed: int,
    groups: Sequence[Sequence[int]],
    shares: Sequence[int | float],
    rows: Sequence[int] | None = None,
    augment: Callable[[dict, np.random.Generator], dict] | None = None,
) -> grain.MapDataset:
    """An endless dataset whose item `step` is the batch of that step, stacked.

    Args:
      source: random access to records.
      groups: indices into `source`, each group shuffled anew every epoch of its own.
      shares: the weight of each group in a batch, e.g. (2, 1, 1) for half, a quarter, a quarter.
      rows: those of each batch that are made, others are not read; None: all.
      augment: applied to each example, with a generator that is a function of seed and position.
    """
    if not all(len(group) for group in groups):
        raise DataError(f'a group of the training data is empty; sizes {[len(group) for group in groups]}')
    mixed = grain.MapDataset.mix(
        [grain.MapDataset.source(list(group)).seed(seed + i).shuffle().repeat() for i, group in enumerate(groups)],
        weights=shares,
    )
    examples = mixed.map(lambda index: transform(source[index]))
    if augment is not None:
        examples = examples.seed(seed).random_map(augment)
    if rows is None or len(rows) == batch:
        return examples.batch(batch)
    steps = grain.MapDataset.range(len(examples) // batch * len(rows))
    return steps.map(lambda i: examples[i // len(rows) * batch + rows[i % len(rows)]]).batch(len(rows))


def groups_by_kind(split: Split, dataset: Dataset) -> list[list[int]]:
    """Indices of the split's records of each kind, in the order of `dataset.kinds`."""
    kinds = [dataset.kind_of(answer) for _, answer in split.read_texts()]
    return [[i for i, kind in enumerate(kinds) if kind == name] for name in dataset.kinds]
