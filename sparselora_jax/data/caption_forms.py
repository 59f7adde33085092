"""Turn a caption or a text into a prompt and the text to learn: the two forms of the paper's restoration data.

- prefix: the caption is cut at a random character of its first half; the beginning is the prompt, the rest is learned.
  The public code of ECoFLaP cuts like this, in words too.
- instruct: the prompt is one of `INSTRUCTIONS`, and the caption is learned. Those of the public code are not published.

As there, another cut or instruction is drawn each time that a record is read in training (`mixture`).
"""

import re
from typing import Literal

import numpy as np

CaptionForm = Literal['prefix', 'instruct']
FORMS: tuple[CaptionForm, ...] = ('prefix', 'instruct')

# Short requests for a caption, in our own words. One is drawn each time.
INSTRUCTIONS = (
    'A short image caption:',
    'Write a short caption for the image.',
    'Describe the image in one sentence.',
    'Say briefly what the image shows.',
    'What does the picture show?',
    'Give the picture a short description.',
    'Sum up the picture in a few words.',
    'A one-sentence description of the photo:',
)
SHORTEST = 2  # characters that can be divided
LONGEST_WORDS = 50  # words of a caption that the public code keeps

# Characters that LAVIS's `blip_caption` replaces by a space; "'", '?', ',' and '-' stay.
_REMOVED = re.compile(r'[.!"()*#:;~]')


def clean_caption(caption: str) -> str:
    """Return a caption as LAVIS prepares it (`blip_caption`): lower case, less punctuation, at most 50 words.

    Args:
      caption: the caption of a data set.

    >>> clean_caption('A "Red" bus;  parked. ')
    'a red bus parked'
    """
    words = _REMOVED.sub(' ', caption.lower()).split()
    return ' '.join(words[:LONGEST_WORDS])


def divide(caption: str, form: CaptionForm, rng: np.random.Generator) -> tuple[str, str]:
    """Return the prompt and the text to learn; the text is '' if the caption is too short.

    Args:
      caption: a caption or a text, cleaned.
      form: see the module's docstring.
      rng: draws the place, or the instruction.

    >>> divide('a red bus', 'prefix', np.random.default_rng(0))
    ('a re', 'd bus')
    >>> divide('a red bus', 'instruct', np.random.default_rng(3))[1]
    'a red bus'
    """
    if form == 'instruct':
        return INSTRUCTIONS[rng.integers(len(INSTRUCTIONS))], caption
    if len(caption) < SHORTEST:
        return caption, ''
    place = int(rng.integers(1, len(caption) // 2 + 1))
    return caption[:place], caption[place:]
