r"""Normalise answers as the public evaluators of visual question answering do, before they compare them as texts.

`official_text` follows the official evaluator of VQA (GT-Vision-Lab/VQA, PythonEvaluationTools). Its oddities are part
of published scores, so they are kept:

- One comma between two digits changes how every punctuation mark of the text is treated.
- A full stop is deleted unless a digit *follows*. A digit before it does not protect it.
- At most 32 full stops are deleted.
- Some contractions are spelled like other words: 'hes' becomes "he's", 'wont' becomes "won't".
- Contractions of 'I' never apply, because words are lower-cased first.

`evalai_text` is the variant of the EvalAI server and of Pythia (now MMF), for TextVQA and VizWiz.

>>> official_text('Two black-and-white T-shirts.'), official_text('1,000'), official_text('U.S.')
('2 black and white t shirts', '1000', 'us')
>>> official_text("it's a dog"), evalai_text("it's a dog")
("it's dog", "it 's dog")
"""

import re
from collections.abc import Callable

# What the evaluator writes with an apostrophe if an answer omits it.
_ONE_APOSTROPHE = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's I'm I've
isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't
somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd
they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd
who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
# Each of these is recognised if exactly one of its apostrophes is missing.
_SEVERAL_APOSTROPHES = """
couldn't've hadn't've he'd've I'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've
there'd've they'd've we'd've who'd've wouldn't've you'd've y'all'll y'all'd've 'ow's'at
"""
# Two entries of the evaluator change nothing, and one deletes the apostrophe: probably slips, but part of the rule.
_IRREGULAR = {"let's": "let's", "she's": "she's", "somebody'd": 'somebodyd'}


def _contractions() -> dict[str, str]:
    """Return the evaluator's table: a word without an apostrophe -> the same word with it."""
    table = {word.replace("'", ''): word for word in _ONE_APOSTROPHE.split()}
    for word in _SEVERAL_APOSTROPHES.split():
        for match in re.finditer("'", word):
            # The other apostrophes stay: a word that lacks two of them is not recognised.
            table[word[: match.start()] + word[match.end() :]] = word
    return table | _IRREGULAR


CONTRACTIONS = _contractions()
ARTICLES = frozenset({'a', 'an', 'the'})
_UP_TO_TEN = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine', 'ten')
# 'none' answers 'how many?', so it counts as a number. Words above ten stay words.
NUMBERS = {'none': '0'} | {word: str(number) for number, word in enumerate(_UP_TO_TEN)}
# The evaluator passes a flag of `re` as the count of replacements. The number of that flag is 32.
MOST_FULL_STOPS = 32

# Not in this set: the full stop, which has a rule of its own, and apostrophes, which contractions need.
_MARK = re.compile(r'[;/\[\]"{}()=+\\_\-><@`,?!]')
# Digits of any script, as `re` in Python 3 has it. The official tool ran in Python 2, where they were 0 to 9.
_COMMA_IN_NUMBER = re.compile(r'\d,\d')
_FULL_STOP = re.compile(r'\.(?!\d)')


def strip_lines(text: str) -> str:
    r"""Replace line breaks and tabs by spaces, and remove surrounding whitespace.

    Args:
      text: an answer.

    >>> strip_lines(' red\nbus ')
    'red bus'
    """
    return text.replace('\n', ' ').replace('\t', ' ').strip()


def drop_punctuation(text: str) -> str:
    """Remove punctuation: step 1 of the official evaluator.

    A mark is deleted if a space is beside it anywhere in the text, or if the text has a comma between two digits.
    Otherwise it becomes a space. Apostrophes, colons and other marks that the evaluator does not list stay.

    Args:
      text: an answer.

    >>> drop_punctuation('T-shirt'), drop_punctuation('black / white'), drop_punctuation('2:30, 3.5.')
    ('T shirt', 'black  white', '2:30 3.5')
    """
    has_comma_in_number = _COMMA_IN_NUMBER.search(text) is not None
    replacements = {}
    for mark in set(_MARK.findall(text)):
        # All decisions depend on the original text, so the order of the marks does not matter.
        has_space_beside = f'{mark} ' in text or f' {mark}' in text
        replacements[ord(mark)] = '' if has_space_beside or has_comma_in_number else ' '
    return _FULL_STOP.sub('', text.translate(replacements), count=MOST_FULL_STOPS)


def unify_words(text: str) -> str:
    """Unify the words of an answer: step 2 of the official evaluator.

    Words become lower case, number words up to ten become digits, articles are dropped, contractions get their
    apostrophe.

    Args:
      text: an answer.

    >>> unify_words('The  two dogs dont bark'), unify_words('none')
    ("2 dogs don't bark", '0')
    """
    words = []
    # `split` also drops repeated spaces, which deleted marks leave behind.
    for word in text.lower().split():
        number_or_word = NUMBERS.get(word, word)
        # An answer of articles alone becomes empty, and then equals other such answers.
        if number_or_word not in ARTICLES:
            words.append(CONTRACTIONS.get(number_or_word, number_or_word))
    return ' '.join(words)


def official_text(text: str) -> str:
    """Normalise an answer like the official evaluator of VQA, which first strips lines (`strip_lines`).

    Args:
      text: an answer without line breaks.
    """
    return unify_words(drop_punctuation(text))


def evalai_text(text: str) -> str:
    """Normalise an answer like EvalAI and Pythia's `EvalAIAnswerProcessor`.

    Commas and question marks are deleted, and "'s" becomes a word. Then the steps of the official evaluator follow.

    Args:
      text: an answer.

    >>> evalai_text("McDonald's, inc."), official_text("McDonald's, inc.")
    ("mcdonald 's inc", "mcdonald's inc")
    """
    # Commas go first, so the rule of a comma between digits never applies here.
    spaced = text.lower().replace(',', '').replace('?', '').replace("'s", " 's")
    return official_text(strip_lines(spaced))


class Remembered(dict[str, str]):
    """A function of a text that is called once for each different text: `remembered[text]`.

    Annotators repeat each other: the two million answers of VQAv2 are about a hundred thousand different texts. A dict
    that fills itself finds a known text faster than a function with a cache.

    Args:
      function: the function to remember.

    >>> Remembered(str.upper)['yes']
    'YES'
    """

    def __init__(self, function: Callable[[str], str]):
        super().__init__()
        self.function = function

    def __missing__(self, text: str) -> str:
        """Compute and keep the value of a new text."""
        value = self.function(text)
        # Kept as long as the dict lives: the caller makes one for each data set.
        self[text] = value
        return value
