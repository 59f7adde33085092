"""What packing refuses."""

from sparselora_jax.runtime.errors import SparseloraError


class PackingError(SparseloraError, ValueError):
    """A kernel that a format cannot hold, or packed arrays that contradict it."""
