"""A disk that is nearly full."""

import resource
from contextlib import contextmanager


@contextmanager
def files_of_at_most(size):
    """The kernel refuses larger ones, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
