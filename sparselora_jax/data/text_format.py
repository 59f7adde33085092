"""How a model's questions are written, as tokens of fixed room; it lies beside an exported model."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparselora_jax.runtime.errors import DataError


@dataclass(frozen=True)
class TextFormat:
    """The prompt is left-padded, the answer right-padded, so each has its own slots.

    Attributes:
      prompt: the template; `{}` stands for the question, other braces for themselves.
      prompt_tokens: room for template and question, image tokens not counted.
      answer_tokens: room for an answer, the end of text included.
      decoding: arguments of `generate` that the model's answers are scored with.
    """

    prompt: str = 'Question: {} Short answer:'
    prompt_tokens: int = 16
    answer_tokens: int = 3
    decoding: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.prompt.count('{}') != 1:
            raise DataError(f'prompt {self.prompt!r}: expected {{}} once, for the question')

    def write(self, question: str) -> str:
        """The prompt of a question."""
        return self.prompt.replace('{}', question)


FILE = 'text_format.json'
OF_FAMILY = {  # by transformers' model_type, for directories without the file
    'blip-2': TextFormat(prompt_tokens=32, answer_tokens=8),
    'instructblip': TextFormat('{}', prompt_tokens=32, answer_tokens=8),
    'llava': TextFormat('USER: <image>\n{} ASSISTANT:', prompt_tokens=64, answer_tokens=8),
    'paligemma': TextFormat('answer en {}', prompt_tokens=32, answer_tokens=8),
}


def dump(text: TextFormat) -> str:
    """What the file holds."""
    return json.dumps(dataclasses.asdict(text), indent=1)


def load(folder: str | Path, family: str) -> TextFormat:
    """The text format beside a model; of a directory that names none, its family's.

    Raises:
      DataError: the file is there and is no text format.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return OF_FAMILY[family]
    try:
        return TextFormat(**json.loads(path.read_text()))
    except (TypeError, ValueError, AttributeError) as error:
        raise DataError(f'{path}: not a text format ({error})') from None
