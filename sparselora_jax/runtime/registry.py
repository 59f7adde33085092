"""Names of exchangeable parts: families, pruning methods, allocations, data sets, metrics, packed formats.

A registry maps the names that a config may use to objects. A config may also name an object that is registered nowhere,
as `package.module:Name`.
"""

import difflib
import importlib
from collections.abc import Iterator
from typing import Generic, TypeVar

from sparselora_jax.runtime.errors import SparseloraError

Part = TypeVar('Part')


class UnknownNameError(SparseloraError, ValueError):
    """A name that is not registered, or a `package.module:Name` that cannot be imported."""


class Registry(Generic[Part]):
    """Objects of one kind, by name.

    >>> metrics = Registry('metric')
    >>> metrics.register('length', len)
    <built-in function len>
    >>> metrics.find('length') is len, metrics.find('math:sqrt')(4.0)
    (True, 2.0)
    """

    def __init__(self, kind: str):
        """Begin with no names.

        Args:
          kind: what the objects are, for errors: 'metric'.
        """
        self.kind = kind
        self._parts: dict[str, Part] = {}

    def register(self, name: str, part: Part) -> Part:
        """Give an object a name, and return the object.

        Args:
          name: as a config names it.
          part: the object.

        Raises:
          ValueError: the name is taken.
        """
        if name in self._parts:
            raise ValueError(f'{self.kind} {name!r} is registered already')
        self._parts[name] = part
        return part

    def find(self, name: str) -> Part:
        """Return the object with this name, or import the one that `package.module:Name` names.

        Args:
          name: as a config names it.

        Raises:
          UnknownNameError: no such name, with the nearest one; or an object that cannot be imported.
        """
        if name in self._parts:
            return self._parts[name]
        module, colon, attribute = name.partition(':')
        if not colon:  # a plain name, of which the nearest may be what was meant
            nearest = difflib.get_close_matches(name, self._parts, 1)
            hint = f' (did you mean {nearest[0]!r}?)' if nearest else ''
            raise UnknownNameError(
                f'{self.kind} {name!r}: expected one of {", ".join(self._parts)}, or package.module:Name{hint}'
            )
        # ValueError: importlib's, of an empty module name.
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise UnknownNameError(f'{self.kind} {name!r} cannot be imported ({error})') from None

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)
