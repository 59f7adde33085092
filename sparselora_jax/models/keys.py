"""How a checkpoint's tensors are named: what a key table may say besides a name."""

from typing import NamedTuple


class Part(NamedTuple):
    """Slice `index` of `of` equal slices of a fused tensor, along its first axis."""

    name: str
    index: int
    of: int
