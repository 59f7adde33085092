"""Dropout of LoRA's inputs: which entries a step drops, from the seed, the step, the row, the kernel and the layer.

A draw does not depend on the mesh, on the number of processes or on micro-batches, and nothing of it is stored: the
backward draws it again.
"""

import dataclasses
import math
import zlib
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from sparselora_jax.runtime.errors import SparseloraError

# With JAX's other generators, the numbers of a row would depend on which rows are drawn together.
GENERATOR = 'threefry2x32'
# Keeps these keys apart from those of other draws with the same seed, such as LoRA's initial factors.
STREAM = 1


class DropoutError(SparseloraError, ValueError):
    """An input of a kernel that has no rows of a batch."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dropout:
    """Which entries of its input a low-rank update does not see.

    Attributes:
      rate: probability that an entry is dropped, 0 to below 1.
      keys: a key for each row of the batch: `[rows]` for a model, `[*layers, rows]` for one kernel.
    """

    rate: float = field(metadata={'static': True})
    keys: Any  # JAX unflattens placeholders into the field, so it carries no shape check

    def of_kernel(self, path: str, layers: tuple[int, ...]) -> 'Dropout':
        """Return the dropout of one kernel, whose draws are independent of those of all other kernels.

        Args:
          path: the path of the kernel.
          layers: sizes of its axes of layers.
        """
        # A number of the path alone: a kernel draws the same, whichever others are adapted.
        number = zlib.crc32(path.encode())

        def key_of(layer: Int[Array, ''], row: Key[Array, '']) -> Key[Array, '']:
            return jax.random.fold_in(jax.random.fold_in(row, number), layer)

        of_rows = jax.vmap(key_of, in_axes=(None, 0))
        keys = jax.vmap(of_rows, in_axes=(0, None))(jnp.arange(math.prod(layers)), self.keys)
        return dataclasses.replace(self, keys=keys.reshape(*layers, *self.keys.shape))


def row_keys(seed: int, step: Int[Array, ''], rows: int) -> Key[Array, ' {rows}']:
    """Return a key for each row of the batch of one step.

    Args:
      seed: seed of the run.
      step: number of steps done before this one.
      rows: number of rows of the whole batch.
    """
    of_step = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed, impl=GENERATOR), STREAM), step)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(of_step, jnp.arange(rows))


def kept_entries(dropout: Dropout, shape: tuple[int, ...]) -> Bool[Array, '...']:
    """Return which entries of a kernel's input are kept.

    Args:
      dropout: that of one kernel and layer, with keys `[rows]`.
      shape: shape of the input. Its leading axes are the rows of the batch, or the rows and further axes.

    Raises:
      DropoutError: the input has no rows of the batch.

    >>> dropout = Dropout(0.5, row_keys(0, jnp.array(3), 2))
    >>> kept_entries(dropout, (2, 4)).shape
    (2, 4)
    """
    rows = dropout.keys.shape[0]
    if math.prod(shape[:-1]) % rows:
        raise DropoutError(
            f'dropout: a kernel reads an input of shape {shape}, which has no axis of the {rows} rows of the batch; '
            'give this kernel no LoRA, or set dropout to 0'
        )
    of_row = (math.prod(shape[:-1]) // rows, shape[-1])
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - dropout.rate, of_row))(dropout.keys)
    return kept.reshape(shape)


def drop(x: Float[Array, '*batch inputs'], kept: Bool[Array, '*batch inputs']) -> Float[Array, '*batch inputs']:
    """Return an input with zeros in the place of what is dropped.

    The kept entries are not scaled: the update is, whose sum is in float32.

    Args:
      x: the input.
      kept: from `kept_entries`.
    """
    return jnp.where(kept, x, jnp.zeros((), x.dtype))
