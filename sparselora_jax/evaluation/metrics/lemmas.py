"""Lemmatise answers for OK-VQA, if spaCy and its English model are installed.

The references of OK-VQA are lemmatised ('dog' for 'dogs'). LAVIS, the code that the paper's is based on, therefore
lemmatises the generated answers before it scores them.
"""

import importlib
from collections.abc import Callable

SPACY_MODEL = 'en_core_web_sm'
# The parts of speech of which LAVIS takes the lemma. Other words stay as they are, so 'bigger' does not become 'big'.
LEMMATISED = ('NOUN', 'VERB')


def load_lemmatiser() -> Callable[[str], str] | None:
    """Load spaCy's English model; it takes about a second.

    Returns:
      A function that replaces the nouns and verbs of an answer by their lemmas, or None if spaCy or its model
      `en_core_web_sm` is not installed. Published scores of LAVIS used version 3.7.1 of the model.
    """
    try:
        # Not an import statement: spaCy is optional, and no extra of this package installs it.
        spacy = importlib.import_module('spacy')
        pipeline = spacy.load(SPACY_MODEL)
    except (ImportError, OSError):  # spaCy raises OSError if the model is missing
        # The caller decides whether this is an error: scores without lemmas are lower, but valid.
        return None

    def lemmatise(answer: str) -> str:
        # spaCy splits "don't" into two tokens. LAVIS joins them by a space, so this does too.
        words = [token.lemma_ if token.pos_ in LEMMATISED else token.text for token in pipeline(answer)]
        return ' '.join(words)

    return lemmatise
