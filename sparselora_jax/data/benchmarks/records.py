"""Read fields of records of JSON and parquet files; an error says what the field holds and what was expected."""

import reprlib
from collections.abc import Sequence

from sparselora_jax.runtime.errors import DataError

LONGEST_QUOTE = 60  # most characters of a value that a message quotes
_REPR = reprlib.Repr()
_REPR.maxstring = LONGEST_QUOTE
_LARGEST = 2**63  # ids are stored as integers of 64 bits


def quote(value: object) -> str:
    """Return a value as it stands in a file, on one line and shortened.

    Args:
      value: any value of a record.

    >>> quote({'a': 1}), quote(['x'] * 1000)
    ("{'a': 1}", "['x', 'x', 'x', 'x', 'x', 'x', ...]")
    """
    if isinstance(value, int) and not -_LARGEST <= value < _LARGEST:
        return f'an integer of {value.bit_length()} bits'
    # `reprlib` looks at the beginning of long lists only; a record may have megabytes.
    text = _REPR.repr(value)
    return text if len(text) <= LONGEST_QUOTE else text[: LONGEST_QUOTE - 3] + '...'


def field(record: object, name: str) -> object:
    """Return a field that must be there.

    Args:
      record: a decoded record, which should be an object.
      name: the field.

    Raises:
      DataError: the record is not an object, or lacks the field.
    """
    if not isinstance(record, dict):
        raise DataError(f'{quote(record)} is not an object')
    if name not in record:
        known = ', '.join(str(key) for key in list(record)[:8])
        raise DataError(f'no field {name!r}, only {quote(known)}')
    return record[name]


def text(record: object, name: str) -> str:
    """Return a field that holds a text.

    Args:
      record: a decoded record.
      name: the field.

    Raises:
      DataError: the field is missing, or holds no text.

    >>> text({'question': 'Is it red?'}, 'question')
    'Is it red?'
    """
    value = field(record, name)
    if not isinstance(value, str):
        raise DataError(f'{name} is {quote(value)}, not a text')
    return value


def optional_text(record: object, name: str) -> str:
    """Return a field that holds a text, or '' if it is missing or null.

    Args:
      record: a decoded record.
      name: the field.

    Raises:
      DataError: the field holds something else.
    """
    if isinstance(record, dict) and record.get(name) is None:
        return ''
    return text(record, name)


def integer(record: object, name: str) -> int:
    """Return a field that holds an integer of 64 bits.

    Args:
      record: a decoded record.
      name: the field.

    Raises:
      DataError: the field is missing, or holds no such integer.
    """
    value = field(record, name)
    # True is an integer to Python.
    if not isinstance(value, int) or isinstance(value, bool):
        raise DataError(f'{name} is {quote(value)}, not an integer')
    if not -_LARGEST <= value < _LARGEST:
        raise DataError(f'{name} is {quote(value)}, which does not fit into 64 bits')
    return value


def number_or_text(record: object, name: str) -> int | str:
    """Return a field that holds an id: an integer, or a text.

    Args:
      record: a decoded record.
      name: the field.

    Raises:
      DataError: the field is missing, or holds neither.
    """
    value = field(record, name)
    return value if isinstance(value, str) else integer(record, name)


def whole_number(record: object, name: str) -> int:
    """Return a field that holds an integer, or a text of digits.

    Args:
      record: a decoded record.
      name: the field.

    Raises:
      DataError: the field is missing, or holds neither.

    >>> whole_number({'question_id': '2971475'}, 'question_id')
    2971475
    """
    value = field(record, name)
    # 18 digits always fit into 64 bits.
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 18:
        return int(value)
    return integer(record, name)


def items(record: object, name: str) -> list:
    """Return a field that holds a list.

    Args:
      record: a decoded record.
      name: the field.

    Raises:
      DataError: the field is missing, or holds no list.
    """
    value = field(record, name)
    if not isinstance(value, list):
        raise DataError(f'{name} is {quote(value)}, not a list')
    return value


def texts(record: object, name: str) -> tuple[str, ...]:
    """Return a field that holds a list of texts.

    Args:
      record: a decoded record.
      name: the field.

    Raises:
      DataError: the field is missing, or holds no list of texts.
    """
    return all_texts(items(record, name), name)


def optional_texts(record: object, name: str) -> tuple[str, ...]:
    """Return a field that holds a list of texts, or () if it is missing or null, as answers are in test splits.

    Args:
      record: a decoded record.
      name: the field.

    Raises:
      DataError: the field holds something else.
    """
    if isinstance(record, dict) and record.get(name) is None:
        return ()
    return texts(record, name)


def all_texts(values: Sequence[object], name: str) -> tuple[str, ...]:
    """Return values that must be texts.

    Args:
      values: decoded values.
      name: what they are, for messages.

    Raises:
      DataError: one of them is not a text.
    """
    for value in values:
        if not isinstance(value, str):
            raise DataError(f'{name} holds {quote(value)}, which is not a text')
    return tuple(values)


def answer_texts(record: object, name: str = 'answers') -> tuple[str, ...]:
    """Return the answers of a question in the form of VQA: a list of objects with a field `answer`.

    Args:
      record: a decoded record.
      name: the field of the answers.

    Raises:
      DataError: the field is missing, or has another form.
    """
    answers = items(record, name)
    try:
        texts_of_answers = [answer['answer'] for answer in answers]
    except (TypeError, KeyError):
        # The quick way has failed; this one finds the first bad answer.
        texts_of_answers = [text(answer, 'answer') for answer in answers]
    return all_texts(texts_of_answers, name)
