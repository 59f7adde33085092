"""Errors that a user can act on: scripts print them as one line and exit with a non-zero code."""

import contextlib
from collections.abc import Iterator


class SparseloraError(Exception):
    """The base class of these errors. Each message says what is wrong, where, and what to do."""


class UnsupportedModelError(SparseloraError, ValueError):
    """A model, or a field of its config, that no model family supports."""


class BatchError(SparseloraError, ValueError):
    """A batch whose shapes or contents do not fit the model."""


class DataError(SparseloraError, ValueError):
    """A question, an answer or an image that cannot be processed."""


@contextlib.contextmanager
def calling(part: str, error_type: type[SparseloraError]) -> Iterator[None]:
    """Turn any error of code that a user wrote into one line that names the part; use it around each such call.

    Args:
      part: what is called, such as 'pruning method SameNorm'.
      error_type: the error to raise instead. A `SparseloraError` is passed on unchanged.

    Raises:
      SparseloraError: the part raises.
    """
    try:
        yield
    except SparseloraError:
        raise
    except Exception as error:  # a part may be anybody's code
        # Errors of JAX have many lines; the first one says what is wrong.
        reason = ' '.join(str(error).strip().splitlines()[:1])
        kind = type(error).__name__
        raise error_type(f'{part} fails: {kind}: {reason}' if reason else f'{part} fails: {kind}') from error
