"""Errors that a user can act on: scripts print them as one line and exit with a non-zero code."""


class SparseloraError(Exception):
    """The base class of these errors. Each message says what is wrong, where, and what to do."""


class UnsupportedModelError(SparseloraError, ValueError):
    """A model, or a field of its config, that no model family supports."""


class BatchError(SparseloraError, ValueError):
    """A batch whose shapes or contents do not fit the model."""


class DataError(SparseloraError, ValueError):
    """A question, an answer or an image that cannot be processed."""
