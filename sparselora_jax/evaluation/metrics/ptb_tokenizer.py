"""Split captions into words as the evaluation code of COCO captions does, without Java."""

import html
import re

from sparselora_jax.evaluation.metrics.ptb_rules import RULES, SPLIT_WORDS, WORDS_WITH_STOP

# How whole tokens are written: brackets by their Penn Treebank names, typographic marks by their ASCII forms.
_SPELLINGS = {
    '[': '-lsb-',
    ']': '-rsb-',
    '{': '-lcb-',
    '}': '-rcb-',
    '\x80': '$',  # the sign of the euro in Windows-1252
    '\u20ac': '$',  # the sign of the euro
    '\u20a0': '$',
    '\xa4': '$',
    '\xa3': '#',  # pounds
    '\xa2': 'cents',
    '\xbc': '1/4',
    '\xbd': '1/2',
    '\xbe': '3/4',
    '\u2153': '1/3',
    '\u2154': '2/3',
}
# Inside a token too, such as the bracket of a face, ':-rrb-', or the space of '1 1/2'.
_INNER_SPELLINGS = str.maketrans({'(': '-lrb-', ')': '-rrb-', ' ': '\xa0', '\u2044': '/'})

# Typographic quotes have ASCII forms in the parts of contractions and in runs of quotes only: a name such as O'Neill
# keeps its apostrophe as it is.
_QUOTED = re.compile(
    r'[\u0091-\u0094\u2018\u2019\u201c\u201d]+|[\u0092\u2019](?:[msd]|re|ve|ll)|n[\u0091\u0092\u2018\u2019]t',
    re.IGNORECASE,
)
_QUOTES = str.maketrans(
    {
        '\u0091': '`',
        '\u2018': '`',
        '\u0092': "'",
        '\u2019': "'",
        '\u0093': '``',
        '\u201c': '``',
        '\u0094': "''",
        '\u201d': "''",
    }
)
_PUNCTUATION = ("''", '``')  # what a run of quotes may become

_ENTITIES = re.compile('&(?:amp|lt|gt|quot|apos|nbsp|mdash|ndash);', re.IGNORECASE)
_SPACES = re.compile(r'\s+')
# The most frequent case: a word of ASCII letters before a space, a comma and a space, or a stop at the end.
_PLAIN_WORD = re.compile(r'([A-Za-z]+)(?:,?\s|(\.)\s*\Z)')


def tokenize(caption: str) -> str:
    """Return the words of a caption in lower case, without punctuation.

    The result equals that of Stanford's PTBTokenizer (CoreNLP 3.4.1, options `preserveLines` and `lowerCase`), from
    which COCO's evaluation code removes punctuation (`pycocoevalcap.tokenizer.ptbtokenizer`). Two differences are
    intended. That program reads all captions as one text, so the next caption decides whether a last word 'x.' keeps
    its stop. Here each caption is read alone, as if the next one began with 'A' or 'The'. And characters that end a
    line, other than a line feed, are spaces here.

    Args:
      caption: a caption as people or a model wrote it.

    Returns:
      The words, separated by one space. A word that contains a space, such as the number '1 1/2', contains a no-break
      space instead. COCO's CIDEr and BLEU split words there, its ROUGE-L does not, and so do those of this package.

    >>> tokenize("A dog's bowl (blue) isn't on the T-shirt!")
    "a dog 's bowl -lrb- blue -rrb- is n't on the t-shirt"
    """
    text = _prepare(caption)
    words: list[str] = []
    position = 0
    while position < len(text):
        if text[position].isspace():
            position += 1
            continue
        plain = _PLAIN_WORD.match(text, position)
        if plain is not None and _is_one_token(plain):
            words.append(plain[1])
            position = plain.end()
            continue
        tokens, position = _read(text, position)
        words.extend(word for word in map(_spell, tokens) if word not in _PUNCTUATION)
    return ' '.join(words).lower()


def _prepare(caption: str) -> str:
    """Return a caption as one line without entities and soft hyphens, and with the line feed that ends it."""
    line = _SPACES.sub(' ', caption.replace('\xad', ''))
    return _ENTITIES.sub(lambda entity: html.unescape(entity[0].lower()), line) + '\n'


def _is_one_token(plain: re.Match[str]) -> bool:
    """Return whether a word of letters is one token, and a stop behind it ends the sentence."""
    word = plain[1].lower()
    if word in SPLIT_WORDS:
        return False
    has_stop = plain[2] is not None
    # 'st.' keeps its stop, and rules decide about 'x.'.
    return not has_stop or (len(word) > 1 and word not in WORDS_WITH_STOP)


def _read(text: str, position: int) -> tuple[list[str], int]:
    """Return the tokens of the longest rule at a position, and the position behind them."""
    longest: re.Match[str] | None = None
    for rule in RULES:
        match = rule.match(text, position)
        if match is not None and (longest is None or match.end() > longest.end()):
            longest = match
    if longest is None:
        return [], position + 1
    if longest.lastindex is None:
        return [], longest.end()
    return [token for token in longest.groups() if token], longest.end(longest.lastindex)


def _spell(token: str) -> str:
    """Return a token as the Penn Treebank writes it."""
    if _QUOTED.fullmatch(token):
        return token.translate(_QUOTES)
    return _SPELLINGS.get(token, token).translate(_INNER_SPELLINGS)
