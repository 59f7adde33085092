"""Errors that a user can act on: scripts print them as one line and exit with a code that is not 0."""


class SparseloraError(Exception):
    """The base of these errors. A message says what was wrong, where, and what to do."""


class UnsupportedModelError(SparseloraError, ValueError):
    """A model, or a field of its config, that no family here knows."""


class BatchError(SparseloraError, ValueError):
    """A batch that does not fit the model it is given to."""


class DataError(SparseloraError, ValueError):
    """A question, an answer or an image that cannot be processed."""
