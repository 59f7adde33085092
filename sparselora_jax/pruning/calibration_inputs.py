"""Check what a user gives to calibration: a forward, params, batches, and weights of tokens."""

import inspect
import os
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, Shaped

from sparselora_jax.pruning.tracing.program import is_array
from sparselora_jax.runtime import processes
from sparselora_jax.runtime.errors import SparseloraError, calling
from sparselora_jax.sparse.rules import leaves_by_path

# The name of an entry of each batch, or a function batch -> array; None or a function that returns None: all count.
TokenWeights = str | Callable[[Any], Any] | None

EXPECTED_WEIGHTS = "expected the name of an entry of each batch, such as 'attention_mask', or a function of a batch"

# Errors of JAX where Python needs a value: `if x > 0`, `float(x)`, `np.asarray(x)`, `x[x > 0]`, `range(n)`.
_READS_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.NonConcreteBooleanIndexError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerBoolConversionError,
    jax.errors.TracerIntegerConversionError,
)

_JAX = os.path.dirname(jax.__file__)
# Code that is not the user's: an error's line is better named where the user calls it.
_LIBRARIES = (
    _JAX,
    os.path.dirname(os.path.dirname(__file__)),
    *(sysconfig.get_path(name) for name in ('stdlib', 'purelib', 'platlib')),
    '<',
)


class CalibrationError(SparseloraError, ValueError):
    """An empty calibration set, values that are not finite, or a statistic that is missing or of the wrong kind."""


def check_forward(forward: object, *arguments: str) -> None:
    """Check that an object is a function that runs a model.

    Args:
      forward: what a user gave as a forward.
      *arguments: names of what it is called with, in order.

    Raises:
      CalibrationError: it cannot be called so.
    """
    expected = f'expected a function of ({", ".join(arguments)}), such as model.hidden'
    if not callable(forward):
        raise CalibrationError(f'forward is a {type(forward).__name__}: {expected}')
    try:
        inspect.signature(forward).bind(*arguments)
    except TypeError as error:
        raise CalibrationError(f'forward: {error}: {expected}') from None
    except ValueError:
        # Some functions that are not written in Python have no signature; calling them will tell.
        return


def naming_lines(forward: Callable[[PyTree, Any], Any]) -> Callable[[PyTree, Any], Any]:
    """Return a forward whose errors are one line, which names the line of the user's code.

    Args:
      forward: `forward(params, batch)`.

    Returns:
      A function that raises `CalibrationError`. Errors that are one line already are passed on unchanged.
    """

    def run(params, batch):
        try:
            return forward(params, batch)
        except SparseloraError:
            raise
        except _READS_VALUES as error:
            raise CalibrationError(
                f'forward{_place(error)}: Python reads the value of an array, which a traced program does not have '
                'yet: replace if, float(), int(), range() and numpy by jnp.where, jax.lax.cond, jax.lax.fori_loop, jnp'
            ) from error
        except Exception as error:  # a forward is anybody's code
            # `calling` writes the line, and keeps the error itself as its cause.
            with calling(f'forward{_place(error)}', CalibrationError):
                raise

    return run


def _place(error: Exception) -> str:
    """Return ` (file:line)` of the user's code that an error came from; nothing where there is none."""
    # The first frame is that of this file.
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__.tb_next)]
    users = [frame for frame in frames if not frame[0].startswith(_LIBRARIES)]
    # The whole forward may be a library's.
    candidates = users or [frame for frame in frames if not frame[0].startswith(_JAX)]
    return f' ({candidates[-1][0]}:{candidates[-1][1]})' if candidates else ''


def check_params(params: PyTree) -> None:
    """Check the leaves of params: what looks like an array is one of numbers, and anything else can be hashed.

    Args:
      params: any tree.

    Raises:
      CalibrationError: a leaf is neither; names its path.
    """
    for path, leaf in leaves_by_path(params).items():
        # Weights on disk, and shapes, look like arrays.
        if is_array(leaf) and not _holds_numbers(leaf):
            raise CalibrationError(f'params: {path} is {_kind(leaf)}: expected an array of numbers')
        # A program is compiled once for the same functions and texts, so these are the key of a cache.
        if not is_array(leaf) and not _is_hashable(leaf):
            raise CalibrationError(
                f'params: {path} is {_kind(leaf)}: expected an array, or an object that can be hashed'
            )


def check_batches(batches: object) -> None:
    """Check that an object can hold calibration batches.

    Args:
      batches: what a user gave as batches.

    Raises:
      CalibrationError: it is one batch, or cannot be iterated.
    """
    # A dict can be iterated too, over its keys.
    if isinstance(batches, Mapping | str) or not isinstance(batches, Iterable):
        raise CalibrationError(f'batches is a {type(batches).__name__}: expected a list of batches, such as [batch]')


def check_weights(weights: object) -> None:
    """Check that an object says how much each token counts.

    Args:
      weights: what a user gave as weights.

    Raises:
      CalibrationError: it is neither a name nor a function.
    """
    if not (weights is None or isinstance(weights, str) or callable(weights)):
        raise CalibrationError(f'weights is a {type(weights).__name__}: {EXPECTED_WEIGHTS}')


class WeightedBatch(NamedTuple):
    """A batch, and the weight of each of its tokens; None: all of them count once."""

    batch: Any
    weights: Shaped[Array | np.ndarray, '...'] | None


@dataclass(frozen=True)
class CheckedBatches:
    """Batches that are checked one by one as they are read, each with the weights of its tokens if there are any.

    Attributes:
      batches: what a user gave.
      weights: see `TokenWeights`.
    """

    batches: Iterable[Any]
    weights: TokenWeights

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the batches, whose numbers are arrays then; a `WeightedBatch` each if there are weights.

        Raises:
          CalibrationError: a batch holds no arrays, or its weights are none.
        """
        for number, batch in enumerate(self.batches):
            _check_batch(number, batch)
            arrays = jax.tree.map(_as_array, batch)
            yield arrays if self.weights is None else WeightedBatch(arrays, self._weights_of(number, batch))

    def _weights_of(self, number: int, batch: Any) -> Shaped[Array | np.ndarray, '...'] | None:
        if not isinstance(self.weights, str):
            with calling(f'function weights (of batch {number})', CalibrationError):
                weights = self.weights(batch)
        elif not isinstance(batch, Mapping):
            raise CalibrationError(
                f'weights={self.weights!r}: batch {number} is a {type(batch).__name__}, not a dict; give a function of '
                'a batch'
            )
        elif self.weights not in batch:
            entries = ', '.join(sorted(map(str, batch)))
            raise CalibrationError(f'weights={self.weights!r}: batch {number} has no such entry; it has {entries}')
        else:
            weights = batch[self.weights]
        if weights is not None:
            _check_weights(f'weights of batch {number}', weights)
        return weights


def _check_batch(number: int, batch: Any) -> None:
    leaves = leaves_by_path(batch)
    # Else JAX would name an argument of a function that the user never wrote.
    if not leaves:
        raise CalibrationError(f'batch {number} holds no array: expected arrays of numbers')
    for path, leaf in leaves.items():
        if not _holds_numbers(leaf):
            place = f'batch {number}: {path}' if path else f'batch {number}'
            raise CalibrationError(f'{place} is {_kind(leaf)}: expected arrays of numbers')


def _check_weights(name: str, weights: object) -> None:
    if not is_array(weights):
        raise CalibrationError(f'{name}: {_kind(weights)}; expected an array')
    if not any(jnp.issubdtype(weights.dtype, kind) for kind in (jnp.bool_, jnp.integer, jnp.floating)):
        raise CalibrationError(f'{name}: {_kind(weights)}; expected booleans or numbers')
    if not weights.shape:
        raise CalibrationError(f'{name}: shape (); expected one number a token')
    # Most weights are masks. Then nothing waits for the device.
    if jnp.issubdtype(weights.dtype, jnp.bool_):
        return
    values = processes.on_host(weights)
    is_wrong = ~((values >= 0) & (values < np.inf))
    if is_wrong.any():
        index = np.argwhere(is_wrong)[0].tolist()
        raise CalibrationError(f'{name}: {values[tuple(index)].item()} at {index}; expected numbers of 0 or more')


def _holds_numbers(leaf: object) -> bool:
    """Return whether a leaf has a value that JAX can compute with; the shape of an array has none."""
    try:
        jax.typeof(leaf)
    except TypeError:
        return False
    return not isinstance(leaf, jax.ShapeDtypeStruct)


def _as_array(leaf: Any) -> Any:
    """Return a leaf of a batch as an array: a program must read each batch's own numbers, not those of the first."""
    return leaf if is_array(leaf) else jnp.asarray(leaf)


def _is_hashable(leaf: object) -> bool:
    try:
        hash(leaf)
    except TypeError:
        return False
    return True


def _kind(leaf: object) -> str:
    return f'an array of {leaf.dtype}' if isinstance(leaf, np.ndarray | jax.Array) else f'a {type(leaf).__name__}'
