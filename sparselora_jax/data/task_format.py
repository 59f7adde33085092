"""How a family of models is asked: the prompt and the decoding of each kind of task."""

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from sparselora_jax.data.text_format import TextFormat

# Free text about an image, a description of it, the letter of a choice, yes or no; or which texts and images belong
# together.
TaskKind = Literal['answer', 'caption', 'choice', 'yes_no', 'retrieval']

# Characters that LAVIS's processors of BLIP-2 remove from a question; '?' and ',' stay.
_PUNCTUATION = '.!"()*#:;~'
_REMOVED = str.maketrans('', '', _PUNCTUATION)
_SPACED = str.maketrans(dict.fromkeys(_PUNCTUATION, ' '))
LAVIS_WORDS = 50  # words of a question that LAVIS keeps


def _unchanged(question: str) -> str:
    return question


def clean_question(question: str) -> str:
    """Return a question as LAVIS prepares it for BLIP-2 (`blip_question`): lower case, less punctuation, 50 words.

    Args:
      question: the question of a data set.

    >>> clean_question('What is *this*?  A cat.')
    'what is this?  a cat'
    """
    cleaned = question.lower().translate(_REMOVED).rstrip(' ')
    # Two spaces enclose an empty word, which counts, as in LAVIS.
    words = cleaned.split(' ')
    return cleaned if len(words) <= LAVIS_WORDS else ' '.join(words[:LAVIS_WORDS])


def clean_caption(caption: str) -> str:
    """Return a caption as LAVIS prepares it for BLIP-2 (`blip_caption`): lower case, less punctuation, 50 words.

    Args:
      caption: the caption of a data set.

    >>> clean_caption('Two dogs (brown)  run.')
    'two dogs brown run'
    """
    # Unlike in a question, a space takes the place of punctuation, and runs of white space become one space.
    words = caption.lower().translate(_SPACED).split()
    return ' '.join(words[:LAVIS_WORDS])


@dataclass(frozen=True)
class TaskFormat:
    """How a family is asked in one kind of task.

    Attributes:
      text: the prompt and the arguments of `generate`. Prompts that are longer than its limit raise the limit.
      instruction: what stands in the place of the question where a task has none: captions.
      clean: prepares a question.
      read_words: line behind a question with the words that an OCR system has read in the image, which stand in the
        place of {}; '': the words stand before the question, as any context does.
    """

    text: TextFormat
    instruction: str = ''
    clean: Callable[[str], str] = _unchanged
    read_words: str = ''

    def question(
        self, question: str | None, choices: Sequence[str] = (), context: str = '', *, has_read_words: bool = False
    ) -> str:
        """Return what stands in the place of the question: with its context before, and its choices after it.

        Args:
          question: the question; None: the instruction.
          choices: texts to choose from; each gets a letter.
          context: text that belongs to the question.
          has_read_words: whether the context is words that an OCR system has read in the image.

        >>> TaskFormat(TextFormat()).question('Which one melts?', ['ice', 'stone']).splitlines()
        ['Which one melts?', 'A. ice', 'B. stone']
        >>> asked = TaskFormat(TextFormat(), read_words='Reference OCR token: {}')
        >>> asked.question('Which brand?', context='nokia, 5G', has_read_words=True).splitlines()
        ['Which brand?', 'Reference OCR token: nokia, 5G']
        """
        if question is None:
            return self.instruction
        lines = [self.clean(question)]
        if context and has_read_words and self.read_words:
            lines.append(self.read_words.replace('{}', context))
        elif context:
            lines.insert(0, context)
        lines += [f'{letter}. {choice}' for letter, choice in zip(string.ascii_uppercase, choices, strict=False)]
        return '\n'.join(lines)
