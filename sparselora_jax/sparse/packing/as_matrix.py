"""Holds a packed or four-bit kernel whose axes have other roles than `[*layers, inputs, outputs]`."""

from dataclasses import dataclass, field
from typing import Any

import jax
from jaxtyping import Array, Bool

from sparselora_jax.sparse.axes import KernelAxes
from sparselora_jax.sparse.packing.format import is_packed


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ReducedMatrix:
    """A kernel with any axes whose matrix form is stored in fewer bytes.

    Formats store `[*layers, inputs, outputs]`, so the kernel was brought into this form first. It lives in memory only:
    no file format stores the roles of its axes.

    Attributes:
      matrix: the packed or four-bit kernel `[*layers, inputs, outputs]`.
      axes: the roles of the kernel's axes.
      shape: shape of the kernel.
    """

    matrix: Any  # JAX unflattens placeholders into the fields, so they carry no shape check
    axes: KernelAxes = field(metadata={'static': True})
    shape: tuple[int, ...] = field(metadata={'static': True})

    @property
    def ndim(self) -> int:
        """Return the number of axes of the kernel."""
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        """Return the dtype of the kernel when it is unpacked."""
        return self.matrix.dtype

    # Counted like that of packed kernels: the roles take no memory.
    @property
    def nbytes(self) -> int:
        """Return the number of bytes of all arrays."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def unpack_mask(self) -> Bool[Array, '...'] | None:
        """Return the mask in the kernel's layout; None: the format does not store it."""
        # Four-bit kernels of qwix store their zeros, and their masks lie beside them.
        return self.axes.from_matrix(self.matrix.unpack_mask(), self.shape) if is_packed(self.matrix) else None
