"""What a data set is to everything that trains or evaluates: two splits of records, and the kinds of its answers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Split:
    """Records by index: `source[i] -> {'image': uint8 [height, width, 3], 'question': str, 'answer': str}`.

    `read_texts` returns (question, answer) of every record, without decoding images.
    """

    source: Any
    read_texts: Callable[[], list[tuple[str, str]]]


class Dataset(NamedTuple):
    """`kind_of(answer)` is one of `kinds`: what accuracy is reported by and what training batches are mixed by."""

    train: Split
    test: Split
    kinds: tuple[str, ...]
    kind_of: Callable[[str], str]
