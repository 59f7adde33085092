"""Keep activations in the memory of the host while no program reads them.

They stay arrays of JAX, with the sharding that they have. Only the kind of memory changes, so each device copies its
own part, and no other.
"""

from collections.abc import Iterable, MutableSequence

import jax
from jaxtyping import PyTree

# Page-locked memory: devices copy from it without a second copy on the host.
HOST = 'pinned_host'


def to_host(tree: PyTree) -> PyTree:
    """Return a tree whose arrays lie in the memory of the host.

    Args:
      tree: any tree; what is no array of JAX, or lies there already, stays as it is.
    """

    def move(leaf):
        if not isinstance(leaf, jax.Array) or leaf.sharding.memory_kind == HOST:
            return leaf
        return jax.device_put(leaf, leaf.sharding.with_memory_kind(HOST))

    return jax.tree.map(move, tree)


def to_device(tree: PyTree) -> PyTree:
    """Return a tree whose arrays lie in the memory of their devices, where programs read them.

    Args:
      tree: any tree; what is not in the memory of the host stays as it is.
    """

    def move(leaf):
        if not isinstance(leaf, jax.Array) or leaf.sharding.memory_kind != HOST:
            return leaf
        kind = next(iter(leaf.sharding.device_set)).default_memory().kind
        return jax.device_put(leaf, leaf.sharding.with_memory_kind(kind))

    return jax.tree.map(move, tree)


class OnHost(MutableSequence):
    """A list of trees of arrays in the memory of the host; an item is copied to its devices when it is read."""

    def __init__(self, items: Iterable[PyTree] = ()):
        """Create the list; items are moved one by one, so `items` may be a generator.

        Args:
          items: the first items.
        """
        self._items = [to_host(item) for item in items]

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> PyTree:
        return to_device(self._items[index])

    def __setitem__(self, index: int, item: PyTree) -> None:
        self._items[index] = to_host(item)

    def __delitem__(self, index: int) -> None:
        del self._items[index]

    def insert(self, index: int, value: PyTree) -> None:
        """Insert an item before an index."""
        self._items.insert(index, to_host(value))


def held(items: Iterable[PyTree], *, offload: bool) -> MutableSequence[PyTree]:
    """Return a list of items: on their devices or, if asked for, on the host.

    Args:
      items: trees of arrays.
      offload: whether they are kept on the host.
    """
    return OnHost(items) if offload else list(items)
