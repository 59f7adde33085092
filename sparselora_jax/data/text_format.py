"""How a model's questions are written, and how many tokens they may have; saved beside an exported model."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparselora_jax.runtime.errors import DataError

FILE = 'text_format.json'


@dataclass(frozen=True)
class TextFormat:
    """How a question becomes a prompt, and how many tokens prompt and answer are padded to.

    The prompt is padded on the left and the answer on the right, so each keeps its own slots.

    Attributes:
      prompt: the template; `{}` stands for the question, other braces for themselves.
      prompt_tokens: number of tokens for template and question; image tokens are not counted.
      answer_tokens: number of tokens for an answer, its end token included.
      decoding: arguments of `generate` that the model's answers are scored with.
    """

    prompt: str = 'Question: {} Short answer:'
    prompt_tokens: int = 16
    answer_tokens: int = 3
    decoding: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.prompt.count('{}') != 1:
            raise DataError(f'prompt {self.prompt!r}: expected {{}} once, in the place of the question')

    def write(self, question: str) -> str:
        """Return the prompt of a question."""
        return self.prompt.replace('{}', question)  # not str.format: a template may hold other braces


def dump(text: TextFormat) -> str:
    """Return the content of a `text_format.json`."""
    return json.dumps(dataclasses.asdict(text), indent=1)


def load(folder: str | Path, default: TextFormat) -> TextFormat:
    """Read the text format beside a model.

    Args:
      folder: the model's directory.
      default: returned where the directory holds no such file; a family's own is `ProcessorSpec.text`.

    Returns:
      The text format to ask this model by.

    Raises:
      DataError: the file is there and is no text format.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return default
    try:
        return TextFormat(**json.loads(path.read_text()))
    # A wrong field is a TypeError, wrong JSON a ValueError, a prompt that is no text an AttributeError.
    except (TypeError, ValueError, AttributeError) as error:
        raise DataError(f'{path}: not a text format ({error})') from None
