"""What a packed format is: the protocols of formats and of packed kernels, and the registry of formats.

A new format is a module of its own and a line in `packing/__init__.py`, which registers it. The format says which
patterns it takes, packs a kernel, and gives the packed kernel by shapes. The packed kernel says how it becomes an
array, a mask and the arrays of a file. In `sparse/dense.py` and `sparse/linear.py` it can register faster ways.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Num, Shaped

from sparselora_jax.runtime.errors import SparseloraError
from sparselora_jax.runtime.registry import Registry, UnknownNameError
from sparselora_jax.sparse.patterns import Pattern

ShapeLike = jax.ShapeDtypeStruct | Array


class PackingError(SparseloraError, ValueError):
    """A kernel that a format cannot hold, or packed arrays that contradict their format."""


@runtime_checkable
class Stored(Protocol):
    """A leaf that is several arrays, which a file holds by name (docs/formats.md).

    Attributes:
      stored_as: the name that the header of a file gives to this kind of leaf.
      required_arrays: names of the arrays that are always there.
      optional_arrays: names of arrays that may be there.
      inputs: number of inputs of the kernel or mask; the arrays may hold a few more, which fill their last row.
    """

    # `load_safetensors` finds the class by `stored_as`; `optional_arrays` are read where they are there.
    stored_as: ClassVar[str]
    required_arrays: ClassVar[tuple[str, ...]]
    optional_arrays: ClassVar[tuple[str, ...]] = ()
    inputs: int

    def to_arrays(self) -> dict[str, Array]:
        """Return the arrays by name."""
        ...

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array], inputs: int) -> 'Stored':
        """Return the leaf that has these arrays, which were read from a file, and check it.

        Raises:
          PackingError: arrays that contradict each other.
        """
        ...


@runtime_checkable
class PackedKernel(Stored, Protocol):
    """A kernel `[*layers, inputs, outputs]` without its zeros, which brings its own mask.

    It is a registered dataclass of arrays, each with the leading axes of the kernel, so `jax.lax.scan` slices it. A
    class that inherits from this protocol need not define `nbytes` and `stack`.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the kernel."""
        ...

    @property
    def ndim(self) -> int:
        """Return the number of axes of the kernel."""
        ...

    @property
    def dtype(self) -> Any:
        """Return the dtype of the kernel when it is unpacked."""
        ...

    @property
    def nbytes(self) -> int:
        """Return the number of bytes of all arrays."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))  # of arrays, on a device or not; not of shapes

    def unpack(self, dtype: DTypeLike | None = None) -> Num[Array, '*layers inputs outputs']:
        """Return the kernel as an array, with its zeros."""
        ...

    def unpack_mask(self) -> Bool[Array, '*layers inputs outputs']:
        """Return the mask, True where a weight is kept."""
        ...

    @staticmethod
    def stack(layers: Sequence[Any]) -> Any:
        """Return one stacked kernel, on the host, from the kernels of single layers."""
        return jax.tree.map(lambda *arrays: np.stack(arrays), *layers)


@runtime_checkable
class PackedFormat(Protocol):
    """One way to store pruned kernels in fewer bytes.

    Attributes:
      kernel_type: the class of its packed kernels.
      brings_mask: whether its kernels are `PackedKernel`s, which store their masks. Else masks stay beside them.
      levels: the levels to which it rounds values, one of `four_bits.LEVELS`; None: it is lossless.
    """

    # Each is said of the format, not asked of its kernels: recipes and estimates are made before any is packed.
    kernel_type: type
    brings_mask: bool
    levels: str | None

    def takes(self, pattern: Pattern) -> bool:
        """Return whether it can hold every mask of this pattern."""
        ...

    def pack(self, kernel: Shaped[Array, '*layers inputs outputs'], mask: Bool[Array, '*layers inputs outputs']) -> Any:
        """Return the packed kernel.

        Raises:
          PackingError: a mask that it cannot hold; names layer and first group.
        """
        ...

    def pack_shapes(self, kernel: ShapeLike, density: float) -> Any:
        """Return the packed kernel by shapes, without packing: to count memory and to compile programs.

        Args:
          kernel: the kernel or its shape.
          density: the share of weights that each layer keeps.
        """
        ...


@runtime_checkable
class RoundingFormat(PackedFormat, Protocol):
    """A format that rounds: GPTQ asks it for the grid, on which it then chooses better values than the nearest."""

    def inputs_per_scale(self, inputs: int) -> int:
        """Return how many inputs of an output share a scale.

        Args:
          inputs: of the kernel.
        """
        ...


# The order counts: `format_for` takes the first that fits.
FORMATS: Registry[PackedFormat] = Registry('format')


def find_format(name: str) -> PackedFormat:
    """Return the format with this name, or that `package.module:Name` names.

    Args:
      name: one of `FORMATS`, or `package.module:Name`.

    Raises:
      PackingError: there is no such format.
    """
    try:
        return FORMATS.find(name)
    except UnknownNameError as error:  # callers catch one kind of error for a format and for what it cannot hold
        raise PackingError(str(error)) from None


def format_for(pattern: Pattern, *, four_bits: bool = False) -> str:
    """Return the name of the first registered format that takes a pattern and whose kernels bring their masks.

    Args:
      pattern: of the masks.
      four_bits: prefer a format that rounds values to four bits; where none takes the pattern, a lossless one.

    Raises:
      PackingError: no format takes the pattern.

    >>> from sparselora_jax.sparse.packing import format_for
    >>> from sparselora_jax.sparse.patterns import parse_pattern
    >>> [format_for(parse_pattern(pattern), four_bits=True) for pattern in ('2:4', '4:8')]
    ['packed24_int4', 'bitmask']
    """
    formats = {name: FORMATS.find(name) for name in FORMATS}
    fitting = [name for name, form in formats.items() if form.brings_mask and form.takes(pattern)]
    # Rounding is lossy, so it is only chosen when asked for.
    rounding = [name for name in fitting if formats[name].levels is not None]
    lossless = [name for name in fitting if formats[name].levels is None]
    preferred = [*rounding, *lossless] if four_bits else lossless
    if not preferred:
        raise PackingError(f'no format takes pattern {pattern}; there are {", ".join(FORMATS)}')
    return preferred[0]


def rounding_formats() -> list[str]:
    """Return the names of the registered formats that round values."""
    return [name for name in FORMATS if FORMATS.find(name).levels is not None]


def is_packed(kernel: object) -> bool:
    """Return whether a kernel is stored packed, and so brings its own mask."""
    return isinstance(kernel, PackedKernel)
