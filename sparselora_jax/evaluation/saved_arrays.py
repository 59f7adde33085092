"""Keep the arrays of a long computation in a file, from which a run that was killed continues.

The computation is a sequence of steps in a fixed order, each of which gives an array. The file has a line for each step
that is done: the array as base64, its shape, and a hash by which a line of another run is recognised.
"""

import base64
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from sparselora_jax.runtime import processes
from sparselora_jax.runtime.files import StorageError, write_text

Array = Float32[np.ndarray, '...']


class SavedArrays:
    """The arrays of the steps that are done, and a place to add the next.

    Args:
      file: the file; it need not exist.
      owner: what the arrays depend on: model, data, options.

    Raises:
      StorageError: a whole line is damaged, or is of another run; names it.
    """

    def __init__(self, file: Path, owner: str):
        self._file = file
        self._owner = owner
        # All processes must continue from the same step, so they use what the first process reads.
        lines = processes.agreed(self._read_lines)
        self._saved = [_decode(line) for line in lines]
        self._next = 0

    @property
    def is_next_saved(self) -> bool:
        """Return whether the next step is done already."""
        return self._next < len(self._saved)

    def count_saved(self, steps: int) -> int:
        """Return how many of the next steps are done already.

        Args:
          steps: number of steps that follow.
        """
        return min(max(len(self._saved) - self._next, 0), steps)

    def step(self, compute: Callable[[], Array]) -> Array:
        """Return the array of the next step: the saved one, or the one that `compute` gives, which is then saved.

        Args:
          compute: does the work of the step.
        """
        number = self._next
        self._next += 1
        if number < len(self._saved):
            # Not kept in memory once it is used.
            array, self._saved[number] = self._saved[number], None
            return array
        array = np.ascontiguousarray(compute(), np.float32)
        # Written after each step, so that a killed process loses no more than one.
        if processes.first():
            with self._file.open('a') as file:
                file.write(self._encode(number, array))
        return array

    def _encode(self, number: int, array: Array) -> str:
        text = base64.b64encode(array.astype('<f4').tobytes()).decode()
        return json.dumps([text, list(array.shape), self._hash(number, text, array.shape)]) + '\n'

    def _hash(self, number: int, text: str, shape: tuple[int, ...]) -> str:
        """Return the hash of a line, which depends on its place."""
        facts = json.dumps([self._owner, number, text, list(shape)])
        return hashlib.sha256(facts.encode()).hexdigest()[:16]

    def _read_lines(self) -> list[str]:
        """Read the whole lines of the file, and remove half a line, as a killed process leaves it.

        Raises:
          StorageError: a whole line is damaged, or is of another run.
        """
        if not self._file.exists():
            return []
        data = self._file.read_bytes()
        lines = [line for line in data.splitlines(keepends=True) if line.endswith(b'\n')]
        for number, line in enumerate(lines):
            if not self._is_own(number, line):
                what = 'damaged, or of another run'
                raise StorageError(f'{self._file}, line {number + 1}: {what}; delete the file to compute all again')
        texts = [line.decode() for line in lines]
        if sum(map(len, lines)) != len(data):
            write_text(self._file, ''.join(texts))
        return texts

    def _is_own(self, number: int, line: bytes) -> bool:
        """Return whether a line is that of a step of this run."""
        try:
            text, shape, of_line = json.loads(line)
            return of_line == self._hash(number, text, tuple(shape))
        except (ValueError, TypeError, RecursionError):  # thousands of brackets exhaust the stack
            return False


def _decode(line: str) -> Array:
    """Return the array in a line that has been checked."""
    text, shape, _ = json.loads(line)
    return np.frombuffer(base64.b64decode(text), '<f4').astype(np.float32).reshape(shape)
