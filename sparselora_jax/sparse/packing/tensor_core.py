"""Positions in the order in which NVIDIA's sparse tensor cores read them, and back.

Of two-byte values the metadata are words of 16 bits for 16 elements of a row: half a byte a group of four, the first
value's place in its low two bits, as in `Packed24.positions` (PTX ISA, "Sparse matrix storage"). A thread of
`mma.sp.m16n8k32` holds the words of two rows that are eight apart in one register (same document, "Matrix fragments for
sparse mma"), so a GEMM wants them side by side. This is the order of CUTLASS's sparse GEMMs and of torch's
`SparseSemiStructuredTensor`: the sparse operand is `[outputs, inputs]`; with a row's number written as a block of 32
and bits b4 b3 b2 b1 b0, and a word's as a pair and a bit c, it is, from slowest to fastest: pair, block, b2 b1 b0, b4,
c, b3.
"""

import numpy as np
from jaxtyping import UInt8, UInt16

from sparselora_jax.sparse.packing.errors import PackingError

_ORDER = (4, 0, 3, 1, 5, 2)  # of the axes: block, b4, b3, b2 b1 b0, pair, c


def to_tensor_core(positions: UInt8[np.ndarray, 'bytes outputs']) -> UInt16[np.ndarray, 'outputs words']:
    """The metadata operand of a sparse GEMM whose sparse operand is the kernel transposed.

    Raises:
      PackingError: 32 does not divide the outputs or the inputs.
    """
    rows, outputs = positions.shape
    if outputs % 32 or rows % 4:
        raise PackingError(f'{8 * rows} inputs, {outputs} outputs: expected multiples of 32')
    low, high = positions[0::2].T.astype(np.uint16), positions[1::2].T.astype(np.uint16)
    words = low | high << 8
    return words.reshape(-1, 2, 2, 8, rows // 4, 2).transpose(_ORDER).reshape(outputs, rows // 2)


def from_tensor_core(metadata: UInt16[np.ndarray, 'outputs words']) -> UInt8[np.ndarray, 'bytes outputs']:
    """The inverse of `to_tensor_core`."""
    outputs, words = metadata.shape
    back = tuple(int(i) for i in np.argsort(_ORDER))
    found = metadata.reshape(words // 2, outputs // 32, 8, 2, 2, 2).transpose(back).reshape(outputs, words)
    return np.stack([found & 255, found >> 8], axis=2).astype(np.uint8).reshape(outputs, 2 * words).T
