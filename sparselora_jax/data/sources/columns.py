"""Texts in one array of bytes: millions of captions as Python objects would take gigabytes."""

from array import array
from collections.abc import Iterable

from sparselora_jax.runtime.errors import DataError


def check_text(text: str) -> None:
    """Check that a text can be written as UTF-8.

    Args:
      text: the text.

    Raises:
      DataError: it cannot.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        # JSON can encode half of a surrogate pair, but files and tokenizers cannot represent it.
        raise DataError(f'{text[:60]!r} holds half of a surrogate pair') from None


class TextColumn:
    """A list of texts that only grows.

    >>> column = TextColumn(['red', 'teal'])
    >>> len(column), column[1]
    (2, 'teal')
    """

    def __init__(self, texts: Iterable[str] = ()):
        """Begin with some texts.

        Args:
          texts: the texts.
        """
        self._bytes = bytearray()
        # Ends alone are enough: a text begins where the one before it ends.
        self._ends = array('q')
        for text in texts:
            self.append(text)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        start = self._ends[index - 1] if index else 0
        return self._bytes[start : self._ends[index]].decode()

    def append(self, text: str) -> None:
        """Add a text.

        Args:
          text: the text.

        Raises:
          DataError: it cannot be written as UTF-8.
        """
        check_text(text)
        self._bytes += text.encode()
        self._ends.append(len(self._bytes))
