"""The prompt template of a model and its token limits, saved beside an exported model."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparselora_jax.runtime.errors import DataError
from sparselora_jax.runtime.files import read_json

FILE = 'text_format.json'
# The lowest values of the arguments of `generate` that are counts.
_LOWEST = {'num_beams': 1, 'max_new_tokens': 1, 'min_length': 0, 'min_new_tokens': 0, 'eos_token_id': 0}


@dataclass(frozen=True)
class TextFormat:
    """A prompt template, and the numbers of tokens that prompt and answer are padded to.

    The prompt is padded on the left and the answer on the right, so each always occupies the same positions.

    Attributes:
      prompt: the template; `{}` stands for the question, and other braces are literal.
      prompt_tokens: number of tokens each prompt is padded to, without image tokens.
      answer_tokens: number of tokens each answer is padded to, including its end token.
      decoding: arguments of `generate` for evaluating this model.
    """

    prompt: str = 'Question: {} Short answer:'
    prompt_tokens: int = 16
    answer_tokens: int = 3
    decoding: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.prompt.count('{}') != 1:
            raise DataError(f'prompt {self.prompt!r}: expected {{}} once, in the place of the question')
        # A shell passes on a backslash and an n as they are.
        if r'\n' in self.prompt:
            raise DataError(rf"prompt {self.prompt!r}: a backslash and an n are no new line; in a shell, write $'\n'")
        for name in ('prompt_tokens', 'answer_tokens'):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise DataError(f'{name} {value!r}: expected 1 or more')
        for name, value in dict(self.decoding).items():
            _check_decoding(name, value)

    def write(self, question: str) -> str:
        """Return the prompt of a question."""
        return self.prompt.replace('{}', question)  # not str.format: a template may contain other braces


def _check_decoding(name: str, value: Any) -> None:
    """Check one argument of `generate`.

    Raises:
      DataError: it is not known, or its value is not legal.
    """
    if name == 'length_penalty':
        is_legal = isinstance(value, int | float) and math.isfinite(value)
        expected = 'a number'
    elif name == 'repetition_penalty':
        is_legal = isinstance(value, int | float) and 0 < value < math.inf
        expected = 'a number above 0'
    elif name in _LOWEST:
        is_legal = isinstance(value, int) and not isinstance(value, bool) and value >= _LOWEST[name]
        expected = f'{_LOWEST[name]} or more'
    else:
        raise DataError(f'decoding {name!r}: expected length_penalty, repetition_penalty, {", ".join(_LOWEST)}')
    if not is_legal:
        raise DataError(f'decoding {name} {value!r}: expected {expected}')


def dump(text: TextFormat) -> str:
    """Return the content of a `text_format.json`."""
    return json.dumps(dataclasses.asdict(text), indent=1)


def load(folder: str | Path, default: TextFormat) -> TextFormat:
    """Read the text format beside a model.

    Args:
      folder: the model's directory.
      default: returned if the directory has no such file; for a family, use its `ProcessorSpec.text`.

    Returns:
      The text format of this model.

    Raises:
      DataError, StorageError: the file exists but is not a text format.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return default
    fields = read_json(path, 'put back a copy, or delete it')
    try:
        return TextFormat(**fields)
    # A wrong field is a TypeError, a wrong value a ValueError, a prompt that is not a string an AttributeError.
    except (TypeError, ValueError, AttributeError) as error:
        raise DataError(f'{path}: not a text format ({error})') from None
