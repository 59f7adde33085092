"""From records to batches: image and text processing, and a grain pipeline where a batch is a function of its step.

`batches(...)[step]` is the batch of a global step: a position in the data is one integer, which a checkpoint stores.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from sparselora_jax.data import easy_vqa
from sparselora_jax.errors import SparseloraError


class DataError(SparseloraError, ValueError):
    """A question, an answer or an image that cannot be processed."""


@dataclass(frozen=True)
class TextFormat:
    """How a question becomes tokens: the prompt is left-padded, the answer right-padded, so each has its own slots."""

    prompt: str = 'Question: {} Short answer:'
    prompt_tokens: int = 16
    answer_tokens: int = 3  # the end of text included


def normalise(image: UInt8[np.ndarray, 'height width 3']) -> Float[np.ndarray, 'height width 3']:
    """Pixels 0..255 -> -1..1."""
    return image.astype(np.float32) / 127.5 - 1.0


def read_image(path: str | Path, size: int) -> UInt8[np.ndarray, 'size size 3']:
    """An image file as RGB pixels, resized to a square.

    Raises:
      DataError: the file is missing or no image.
    """
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert('RGB').resize((size, size), Image.Resampling.BICUBIC))
    except FileNotFoundError:
        raise DataError(f'{path}: no such file') from None
    except OSError as error:
        raise DataError(f'{path}: not a readable image ({error})') from None


def encode(tokenizer: Any, text: TextFormat, question: str, answer: str = '') -> dict[str, np.ndarray]:
    """A question and its answer as what a language model reads and predicts.

    Returns:
      `tokens`, `valid` [prompt_tokens + answer_tokens - 1]: the prompt, then the answer but for its last token;
      `targets`, `answer` [answer_tokens]: what the last `answer_tokens` positions predict, and which of them count.

    Raises:
      DataError: an empty question, or one that does not fit.
    """
    if not question.strip():
        raise DataError('the question is empty')
    prompt = tokenizer(text.prompt.format(question))['input_ids']
    target = [*tokenizer(' ' + answer)['input_ids'], tokenizer.eos_token_id] if answer else []
    for name, tokens, limit in (('question', prompt, text.prompt_tokens), ('answer', target, text.answer_tokens)):
        if len(tokens) > limit:
            raise DataError(f'{name} of {len(tokens)} tokens, at most {limit} fit: {question!r} -> {answer!r}')
    before, after = text.prompt_tokens - len(prompt), text.answer_tokens - len(target)
    pad = tokenizer.eos_token_id
    padded = [pad] * before + prompt + target + [pad] * after
    valid = np.arange(len(padded) - 1)
    return {
        'tokens': np.asarray(padded[:-1], np.int32),
        'valid': (valid >= before) & (valid < text.prompt_tokens + max(len(target) - 1, 0)),
        'targets': np.asarray(padded[text.prompt_tokens :], np.int32),
        'answer': np.arange(text.answer_tokens) < len(target),
    }


def read_texts(builder: Any, split: str) -> list[tuple[str, str, int]]:
    """(question, answer, image_id) of every record, images not decoded."""
    from tensorflow_datasets import decode

    source = builder.as_data_source(split, decoders={'image': decode.SkipDecoding()})
    records = (source[index] for index in range(len(source)))
    return [(r['question'].decode(), r['answer'].decode(), int(r['image_id'])) for r in records]


def vqa_transform(tokenizer: Any, text: TextFormat) -> Callable[[dict], dict]:
    """A record -> `image` and what `encode` makes of its question and answer."""

    def transform(record):
        image = {'image': normalise(record['image'])}
        return image | encode(tokenizer, text, record['question'].decode(), record['answer'].decode())

    return transform


def batches(
    source: Any,
    transform: Callable[[dict], dict],
    *,
    batch: int,
    seed: int,
    groups: Sequence[Sequence[int]],
    shares: Sequence[int | float],
    augment: Callable[[dict, np.random.Generator], dict] | None = None,
) -> grain.MapDataset:
    """An endless dataset whose item `step` is the batch of that step, stacked.

    Args:
      source: random access to records.
      groups: indices into `source`, each group shuffled anew every epoch of its own.
      shares: the weight of each group in a batch, e.g. (2, 1, 1) for half, a quarter, a quarter.
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
    return examples.batch(batch)


def groups_by_kind(texts: Sequence[tuple[str, str, int]]) -> list[list[int]]:
    """Indices of the questions of each kind, in the order of `easy_vqa.KINDS`."""
    kinds = [easy_vqa.kind_of(answer) for _, answer, _ in texts]
    return [[i for i, kind in enumerate(kinds) if kind == name] for name in easy_vqa.KINDS]
