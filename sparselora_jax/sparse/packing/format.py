"""The protocols of packed formats and packed kernels, and the registry of formats.

To add a format, write a module and register it by a line in `packing/__init__.py`. The format defines which patterns it
accepts, packs a kernel, and returns the shapes of a packed kernel. The packed kernel converts itself to an array, a
mask, and the arrays of a file. It can register faster functions in `sparse/dense.py` and `sparse/linear.py`.
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
    """A kernel that a format cannot store, or packed arrays that contradict their format."""


@runtime_checkable
class Stored(Protocol):
    """A leaf of a tree that a file stores as several named arrays (docs/formats.md).

    Attributes:
      stored_as: name of this kind of leaf in the header of a file.
      required_arrays: names of the arrays that are always present.
      optional_arrays: names of the arrays that may be present.
      inputs: number of inputs of the kernel or mask; the last row of the arrays may be padded beyond it.
    """

    # `load_safetensors` finds the class by `stored_as`; `optional_arrays` are read if they are present.
    stored_as: ClassVar[str]
    required_arrays: ClassVar[tuple[str, ...]]
    optional_arrays: ClassVar[tuple[str, ...]] = ()
    inputs: int

    def to_arrays(self) -> dict[str, Array]:
        """Return the arrays by name."""
        ...

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array], inputs: int) -> 'Stored':
        """Build a leaf from these arrays of a file, and check it.

        Raises:
          PackingError: the arrays contradict each other.
        """
        ...


@runtime_checkable
class PackedKernel(Stored, Protocol):
    """A kernel `[*layers, inputs, outputs]` without its zeros, which stores its own mask.

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
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))  # works for host and device arrays, not for shapes

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
      brings_mask: whether its kernels have the type `PackedKernel`, which stores its mask; otherwise masks stay
        separate.
      levels: the levels to which it rounds values, a key of `four_bits.LEVELS`; None: it is lossless.
    """

    # These are attributes of the format, not of its kernels: recipes and estimates need them before packing.
    kernel_type: type
    brings_mask: bool
    levels: str | None

    def takes(self, pattern: Pattern) -> bool:
        """Return whether the format can store every mask of this pattern."""
        ...

    def pack(self, kernel: Shaped[Array, '*layers inputs outputs'], mask: Bool[Array, '*layers inputs outputs']) -> Any:
        """Return the packed kernel.

        Raises:
          PackingError: the format cannot store the mask; names the layer and the first wrong group.
        """
        ...

    def pack_shapes(self, kernel: ShapeLike, density: float) -> Any:
        """Return the shapes of the packed kernel, to count memory and to compile programs.

        Args:
          kernel: the kernel or its shape.
          density: the share of weights that each layer keeps.
        """
        ...


@runtime_checkable
class RoundingFormat(PackedFormat, Protocol):
    """A format that rounds: GPTQ uses its grid, and picks better grid values than the nearest ones."""

    def inputs_per_scale(self, inputs: int) -> int:
        """Return how many inputs of an output share a scale.

        Args:
          inputs: number of inputs of the kernel.
        """
        ...


# The order matters: `format_for` returns the first format that fits.
FORMATS: Registry[PackedFormat] = Registry('format')


def find_format(name: str) -> PackedFormat:
    """Return the format with this name, or import it from `package.module:Name`.

    Args:
      name: one of `FORMATS`, or `package.module:Name`.

    Raises:
      PackingError: there is no such format, or the object is none.
    """
    try:
        form = FORMATS.find(name)
    except UnknownNameError as error:  # callers catch one error type for all packing problems
        raise PackingError(str(error)) from None
    # An import by name may return any object; a class has the attributes of its objects.
    if isinstance(form, type) or not isinstance(form, PackedFormat):
        raise PackingError(f'format {name!r}: expected an object of the protocol PackedFormat, not {form!r}')
    return form


def format_for(pattern: Pattern, *, four_bits: bool = False) -> str:
    """Return the name of the first registered format that accepts a pattern and stores masks in its kernels.

    Args:
      pattern: the pattern of the masks.
      four_bits: prefer a format that rounds values to four bits; if none accepts the pattern, use a lossless one.

    Raises:
      PackingError: no format accepts the pattern.

    >>> from sparselora_jax.sparse.packing import format_for
    >>> from sparselora_jax.sparse.patterns import parse_pattern
    >>> [format_for(parse_pattern(pattern), four_bits=True) for pattern in ('2:4', '4:8')]
    ['packed24_int4', 'bitmask']
    """
    formats = {name: FORMATS.find(name) for name in FORMATS}
    fitting = [name for name, form in formats.items() if form.brings_mask and form.takes(pattern)]
    # Rounding is lossy, so it is only chosen on request.
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
    """Return whether a kernel is packed, and so stores its own mask."""
    return isinstance(kernel, PackedKernel)
