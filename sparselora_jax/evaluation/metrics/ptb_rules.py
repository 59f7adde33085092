r"""Define the tokens of the Penn Treebank tokenizer as regular expressions (`ptb_tokenizer` reads them).

Each rule is tried at the same place of the text. The longest match wins, and the first of equally long ones. Groups say
what to do with a match:

- Each group is one token. So `(can)(not)` makes two.
- Reading goes on after the last group. What a rule matches behind it is context: it counts for the length of the match
  and is read again.
- An empty group only marks the place where reading goes on. A rule without any group drops its match.

The rules describe the observed output of `edu.stanford.nlp.process.PTBTokenizer` of Stanford CoreNLP 3.4.1. That is the
version in the evaluation code of COCO captions (Chen et al., Microsoft COCO Captions, arXiv 1504.00325, section 3).
"""

import re


def _words(text: str) -> list[str]:
    return text.split()


# Abbreviations in front of a name: 'St.John' is one token.
_TITLES = _words(
    'adj adm adv assoc atty attys ave brig capt cf cie cmdr col comdr cpl dept det dr drs ens ft gen gov govs hon insp '
    'jos lieut lt maj messrs mfg mlle mme mr mrs ms msgr mt mtg natl pfc ph '
    'pres prof profs pvt rep reps rev sen sens sfc sgt spc st ste supt supts treas vs wm'  # codespell:ignore pres
)
# Abbreviations behind a name, and others: 'etc.a' is two tokens.
_ABBREVIATIONS = _words(
    'al ala apr ariz assn aug bancorp bhd bldg blvd bros calif co colo conn corp cos ct dak dec esq est etc ext feb '
    'fla fri ga inc ind intl jan jr jul jun kan kans ky ltd mar md mich minn mo mon mont neb nev nov oct okla penn plc '
    'pte pty ptys rd rt sep sept seq sq sr sys tel tenn thu thurs tue tues univ va vt wed wis wisc wyo'
)
# These are words too, so only the capital tells the abbreviation: 'La.' but 'la'.
_CAPITAL_ABBREVIATIONS = _words('Ark Az Del Ill La Mass Miss Ore Pa Tex Wash')  # codespell:ignore ore
# Abbreviations only before a number: 'no. 5' but 'he said no.'
_ABBREVIATIONS_OF_NUMBERS = _words('art ca fig figs no nos op pp prop')

# After 'x.', these begin a new sentence, so the stop is not the stop of an initial: 'plan B. The man' but 'J. Smith'.
_SENTENCE_STARTS = _words(
    'A About According Additionally After An As At But Earlier He Her Here However If In It Last Many More Mr. Ms. Now '
    'Once One Other Our She Since So Some Such That The Their Then There These They This We What When While Yet You'
)

_FILE_ENDINGS = _words(
    'bat bmp c cgi class cpp dll doc docx exe gif gz h htm html jar java jpeg jpg mov mp3 pdf php pl png ppt ps py sql '
    'tar txt wav x xml zip'
)


def _any_of(words: list[str]) -> str:
    """Return a pattern that matches one of some words, the longest that fits."""
    return '(?:' + '|'.join(re.escape(word) for word in sorted(words, key=len, reverse=True)) + ')'


_ANY_STATE = '(?:' + '|'.join(f'{word[0]}(?i:{word[1:]})' for word in _CAPITAL_ABBREVIATIONS) + ')'
_ANY_START = _any_of(_SENTENCE_STARTS + [word.upper() for word in _SENTENCE_STARTS])

# Superscripts, subscripts, fractions and Roman numerals: parts of words for Python, but not for this tokenizer.
_NUMERALS = r'\xb2\xb3\xb9\xbc-\xbe\u2070-\u209f\u2150-\u2189\u2460-\u249b'
_ACCENT = r'[\u0300-\u036f]'  # combining characters, which follow their letter
_LETTER = rf'(?:[^\W\d_{_NUMERALS}]|{_ACCENT})'
_ALNUM = rf'(?:[^\W_{_NUMERALS}]|{_ACCENT})'  # a letter or a digit
_HYPHEN = r'[-\u058a\u2010\u2011]'
_CURLY = r'\u0092\u2019'  # a typographic apostrophe
_APOSTROPHE = rf"['{_CURLY}]"
_QUOTE = rf"['\u0091\u2018\u201b{_CURLY}]"  # an apostrophe, or an opening quote that some use as one
_SPACE = r'[ \t\xa0\u2000-\u200a\u3000]'

# A stop or another mark may join two words: 'end.start' is one token, since captions forget the space.
_WORD = rf'{_LETTER}{_ALNUM}*(?:[.!?]{_LETTER}{_ALNUM}*)*'
_CLITIC = rf'{_APOSTROPHE}(?i:[msd]|re|ve|ll)'  # he's, I'm, they're
_NOT = rf'(?i:n){_QUOTE}(?i:t)'  # the end of "isn't"
_HYPHENATED = rf'{_ALNUM}+(?:(?:{_HYPHEN}|_){_ALNUM}+)*'

_WORD_RULES = (
    # Words written as one.
    r'(?i:(can)(not)|(gon|wan)(na)|(got)(ta)|(lem|gim)(me))',
    # Tags and letters of HTML.
    r"""(<(?:[!?][A-Za-z-][^>\n]*|/?NAME(?: +NAME(?: *= *(?:"[^"\n]*"|'[^'\n]*'))?)* *[/?]?)>)""".replace(
        'NAME', r'[A-Za-z][A-Za-z0-9_:.-]*'
    ),
    r'(&(?:(?i:[aeiou])(?:acute|grave|uml)|#\d+);)',
    # Words, and the parts of contractions: "they'll" -> "they" "'ll", "isn't" -> "is" "n't".
    rf'({_WORD}){_CLITIC}',
    rf'([A-Za-z]*[A-MO-Za-mo-z]){_NOT}',
    rf'({_CLITIC})[^A-Za-z]',
    rf'([{_CURLY}](?i:[msd]|re|ve|ll))',  # a typographic apostrophe does not open a quote
    rf'({_NOT})[^A-Za-z]',
    rf'({_WORD})',
)

_URL_END = r'[^ \t\n"<>|.!?(){},-]'  # an address does not end in the punctuation of its sentence
_URL_PATH = rf'/[^ \t\n"<>|()]+{_URL_END}'
_HOST_PART = r'[^ \t\n"<>|.!?(){},]+'
_BARE_HOST_PART = r'[^ \t\n"`\'|!(){}$,-_]+'  # no capitals and no digits, which are between ',' and '_' in Unicode

_ADDRESS_RULES = (
    rf'((?i:https?)://[^ \t\n"<>|()]+{_URL_END})',
    rf'(www\.(?:{_HOST_PART}\.)+[a-zA-Z]{{2,4}}(?:{_URL_PATH})?)',
    rf'((?:{_BARE_HOST_PART}\.)+(?i:com|net|org|edu)(?:{_URL_PATH})?)',
    r'(<?[a-zA-Z0-9][^ \t\n"<>|()]*@(?:[^ \t\n"<>|().]+\.)*[^ \t\n"<>|().]+>?)',
    r'(@[a-zA-Z_][a-zA-Z_0-9]*)',
    rf'(#{_LETTER}+)',
)

# A space in a number is a part of the token.
_NUMBER_RULES = (
    r'(\d{1,2}[-/]\d{1,2}[-/]\d{2,4})',  # a date
    r'([-+]?(?:\d*(?:[.:,]\d+)+|\d+))',  # 5, .5, 1,000, 5:30
    r'((?:\d{1,4}[- ])?\d{1,4}[/\u2044]\d{1,4})',  # 1 1/2
    r'((?:\(\d{3}\) ?|\d{3}[- ])\d{3}[- ]\d{4})',  # a telephone number
    r'([\xbc-\xbe\u2153\u2154])',  # one character for a fraction
    r'([A-Z]*\$)',
)

# Several words in one token.
_FIGURES = r'[A-Za-z0-9][A-Za-z0-9.,]*'
_COMPOUND_RULES = (
    r'([A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2})',  # black/white
    rf'((?:[dDoOlL]{_QUOTE}{_ALNUM})?{_HYPHENATED})',  # well-known, o'clock
    rf'({_FIGURES}(?:-(?:[A-Za-z](?:\.[A-Za-z])+\.|[A-Za-z0-9]+))+)',  # 3,000-foot
    r'([A-Z]+(?:[+&][A-Z]+)+)',  # AT&T
    r'((?i:c\+\+|[cf]#|s&p-500|pro-|anti-))',
)

# A stop that belongs to its token.
_STOP_RULES = (
    r'([A-Za-z](?:\.[A-Za-z])*\.)',
    rf'([A-Za-z])\.\s+{_ANY_START}\s',
    r'([A-Za-z])\.\s*\Z',  # as if the next caption began with 'A' or 'The', as most do
    rf'((?i:{_any_of(_TITLES + _ABBREVIATIONS)})\.)',
    rf'({_ANY_STATE}\.)',
    r'((?i:ed|ph)\.(?i:d)\.)',
    # Two characters of context make this rule longer than that of words joined by a stop, for 'etc.a'.
    rf'((?:(?i:{_any_of(_ABBREVIATIONS)})|{_ANY_STATE})\.)(?s:..)',
    rf'((?i:{_any_of(_ABBREVIATIONS_OF_NUMBERS)})\.){_SPACE}?\d',
    # Any word before a comma may be an abbreviation.
    rf'((?:{_WORD}|{_HYPHENATED})\.)[,;:]',
    rf'({_FIGURES}(?:-[A-Za-z0-9]+)+\.)[,;:]',
    # Names of files come after acronyms: 'D.C.' has no file ending.
    rf'({_ALNUM}+(?:\.{_ALNUM}+)*\.(?i:{_any_of(_FILE_ENDINGS)}))[\s.?!,]',
)

# An apostrophe inside a word or at its ends.
_APOSTROPHE_RULES = (
    rf'({_APOSTROPHE}(?i:n{_APOSTROPHE}?|em|till?|cause))',  # rock 'n' roll
    rf'({_APOSTROPHE}[tT])(?i:is|was)',
    rf'((?:[lLdDjJ]|[Dd]unkin|somethin|ol){_APOSTROPHE})',  # codespell:ignore somethin
    rf'([A-HJ-XZn]{_QUOTE}{_LETTER}{{2,}})',  # O'Neill
    rf'({_LETTER}+[aeiouyAEIOUY]{_QUOTE}[aeiouA-Z]{_LETTER}*)',  # Hawai'i
    r"((?i:c'mon|c'est|cap'n|e'er|s'mores|ev'ry|li'l|nat'l|nor'easter|cont'd\.|o'o))".replace("'", _APOSTROPHE),
    rf'([yY]{_APOSTROPHE}){_LETTER}',  # y'all
    rf'({_APOSTROPHE}[2-9]0s)',  # '90s
    rf'({_APOSTROPHE}\d\d)\s',
    r"'()[A-Za-z]\S",  # an opening quote
)

_MARK_RULES = (
    # Faces: ':)' is one token, which is written ':-rrb-'.
    r"([<>]?[:;=][o*'-]?[()DPdpO\\{@|\[\]])[^A-Za-z0-9]",
    r"([\^x=~<>]\.[\^x=~<>]|[\^x=~<>'-]_[\^x=~<>'-])",
    # Runs of a mark: '!!' is a token and counts as a word in COCO's evaluation, '!' is not.
    r'([\u0091-\u0094\u2018\u2019\u201c\u201d]{2})',
    r'([?!]{2,}|\*+|_+|@+|#+|-{5,}|<<|>>)',
    # Punctuation, which is dropped.
    r"(?:''|``|\.{3,5}|-{1,4}|[.,;:?!'`\"\u0091-\u0094\u0096\u0097\xab\xbb\u2013-\u2015\u2018-\u201d\u2026\u2039\u203a])",
    # Any other character that the tokenizer knows. It skips the rest, such as emoji and controls.
    r'([!-~\x80\xa1-\u017f\u2016-\u2023\u2030-\u2044\u2074-\u208e\u20a0\u20a4\u20ac\u2100-\u214f\u2190-\u2bff\u3001-\u9fff])',
)

# The order decides between rules of equal length.
RULES = tuple(
    re.compile(pattern)
    for pattern in (
        _WORD_RULES + _ADDRESS_RULES + _NUMBER_RULES + _COMPOUND_RULES + _STOP_RULES + _APOSTROPHE_RULES + _MARK_RULES
    )
)

# Words of letters alone that are not always one token. `ptb_tokenizer` reads all others without trying the rules.
SPLIT_WORDS = frozenset(_words('cannot gonna wanna gotta lemme gimme'))
WORDS_WITH_STOP = frozenset(_TITLES + _ABBREVIATIONS + [word.lower() for word in _CAPITAL_ABBREVIATIONS])
