"""Registries of replaceable parts: families, pruning methods, allocations, data sets, metrics, packed formats.

A registry maps names, as a config gives them, to objects. A config may also name an unregistered object, as
`package.module:Name`.
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
        """Create an empty registry.

        Args:
          kind: what the objects are, such as 'metric'; used in error messages.
        """
        self.kind = kind
        self._parts: dict[str, Part] = {}

    def register(self, name: str, part: Part) -> Part:
        """Register an object under a name, and return the object.

        Args:
          name: the name used in a config.
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
          name: the name used in a config.

        Raises:
          UnknownNameError: the name is not registered (the message suggests the nearest one), or the import fails.
        """
        if not isinstance(name, str):
            known = ', '.join(self._parts)
            raise UnknownNameError(f'{self.kind} is a {type(name).__name__}: expected a name, one of {known}')
        if name in self._parts:
            return self._parts[name]
        module, colon, attribute = name.partition(':')
        if not colon:  # a plain name, which may be misspelt
            nearest = difflib.get_close_matches(name, self._parts, 1)
            hint = f' (did you mean {nearest[0]!r}?)' if nearest else ''
            raise UnknownNameError(
                f'{self.kind} {name!r}: expected one of {", ".join(self._parts)}, or package.module:Name{hint}'
            )
        try:
            return getattr(importlib.import_module(module), attribute)
        except Exception as error:  # a user's module may raise anything when it is imported
            kind = '' if isinstance(error, ImportError | AttributeError) else f'{type(error).__name__}: '
            raise UnknownNameError(f'{self.kind} {name!r} cannot be imported ({kind}{error})') from error

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)
