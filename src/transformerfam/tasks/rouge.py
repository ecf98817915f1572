"""ROUGE-L in the languages of XL-Sum (arXiv 2106.13822), words as its authors take them.

Knows languages, scripts and the packages that cut texts without spaces into words; no rows and no
questions. English is scored by `rouge-score` as it comes, like the English of all other tasks. In other
languages words are made as in the authors' `multilingual_rouge_scoring`:

1. Text is lower-cased. Control characters go, joiners among them; punctuation is a space.
2. A run of letters, a run of digits, and every other character is a word; marks (vowel signs, accents)
   belong to the letter before them.
3. Chinese is cut by jieba, Japanese by fugashi, Thai by pythainlp (newmm), Burmese into syllables;
   then step 2 is not done, and jieba's and pythainlp's spaces count as words.
4. Words of more than three characters are stemmed by Snowball, in the languages of `_SNOWBALL`.

Here it is otherwise than there: English (theirs is cut by step 2 and stemmed by Snowball). A language
whose package is not installed is cut into single letters with their marks, and so is everything in a
script without spaces that step 2 meets; theirs does this to Chinese characters alone. Stop words are
stemmed like other words. Bengali, Hindi and Turkish are not stemmed.
"""

from __future__ import annotations

import logging
import string
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from transformerfam.errors import UserError
from transformerfam.extras import require

Cut = Callable[[str], list[str]]

# The languages of XL-Sum as its configurations on the hub are called, by what codes they have.
LANGUAGES = {
    **{"am": "amharic", "ar": "arabic", "az": "azerbaijani", "bn": "bengali", "my": "burmese"},
    **{"zh": "chinese_simplified", "zh_hans": "chinese_simplified"},
    **{"zh_hant": "chinese_traditional", "en": "english", "fr": "french", "gu": "gujarati"},
    **{"ha": "hausa", "hi": "hindi", "ig": "igbo", "id": "indonesian", "ja": "japanese"},
    **{"rn": "kirundi", "ko": "korean", "ky": "kyrgyz", "mr": "marathi", "ne": "nepali"},
    **{"om": "oromo", "ps": "pashto", "fa": "persian", "pcm": "pidgin", "pt": "portuguese"},
    **{"pa": "punjabi", "ru": "russian", "gd": "scottish_gaelic", "sr": "serbian_cyrillic"},
    **{"sr_cyrl": "serbian_cyrillic", "sr_latn": "serbian_latin", "si": "sinhala"},
    **{"so": "somali", "es": "spanish", "sw": "swahili", "ta": "tamil", "te": "telugu"},
    **{"th": "thai", "ti": "tigrinya", "tr": "turkish", "uk": "ukrainian", "ur": "urdu"},
    **{"uz": "uzbek", "vi": "vietnamese", "cy": "welsh", "yo": "yoruba"},
}
_SNOWBALL = ("arabic", "french", "portuguese", "russian", "spanish")
_SHORTEST_STEMMED = 4
# How Unicode's names of letters begin in scripts that put no space between words.
_WITHOUT_SPACES = (
    *("CJK ", "HIRAGANA ", "KATAKANA", "HALFWIDTH KATAKANA"),
    *("THAI ", "LAO ", "MYANMAR ", "KHMER "),
)
_ASAT, _DOT_BELOW, _STACK = "\u103a", "\u1037", "\u1039"


def language_named(name: str) -> str:
    """A language of XL-Sum, by its name or code, in any case: "Scottish Gaelic", "zh-Hant", "fr".

    Raises:
        UserError: if XL-Sum has no such language.
    """
    plain = name.strip().lower().replace("-", "_").replace(" ", "_")
    found = LANGUAGES.get(plain, plain)
    if found not in LANGUAGES.values():
        known = ", ".join(sorted(set(LANGUAGES.values())))
        raise UserError(f"XL-Sum has no language {name!r}; it has {known}.")
    return found


class Words:
    """What `rouge_score.RougeScorer` takes for a tokenizer, for one language other than English.

    Attributes:
        how: the language and, where there is a choice, what cuts it: scores of two ways must not be
            mixed.

    Raises:
        UserError: if the package for the language is there and cannot be used.
    """

    def __init__(self, language: str) -> None:
        self._cut, by = _cut_of(language)
        self.how = f"{language} {by}".strip()
        self._stemmer: Any = None
        if language in _SNOWBALL:
            self._stemmer = require("nltk.stem", "eval").SnowballStemmer(language)

    def tokenize(self, text: str) -> list[str]:
        """The words of a text, as they are compared."""
        words = self._cut(" ".join(bare_parts(text)))
        if self._stemmer is None:
            return words
        return [self._stemmer.stem(w) if len(w) >= _SHORTEST_STEMMED else w for w in words]


def rouge_l(answers: Iterable[str], said: str, words: Words | None = None) -> float:
    """ROUGE-L (F) of what was said, in [0, 1], the best over the references.

    Args:
        answers: the references.
        said: what was said.
        words: how the language is cut; None: English.
    """
    scorers = require("rouge_score.rouge_scorer", "eval")
    scorer = scorers.RougeScorer(["rougeL"], use_stemmer=True, tokenizer=words)
    return max(float(scorer.score(answer, said)["rougeL"].fmeasure) for answer in answers)


# ---- step 1


def bare_parts(text: str) -> list[str]:
    """What stands between spaces and punctuation, lower-cased, without control characters."""
    return "".join(map(_bare, text.lower())).split()


def _bare(char: str) -> str:
    kind = unicodedata.category(char)
    if char in "\t\n\r":
        return " "
    if kind[0] == "C" or char == "\ufffd":
        return ""
    return " " if kind[0] == "P" or char in string.punctuation else char


# ---- step 2


def plain_words(text: str) -> list[str]:
    """Runs of letters, runs of digits, and all other characters one by one.

    Letters of scripts without spaces stand alone, with their marks.
    """
    return [word for part in text.split() for word in _runs(part)]


def _runs(part: str) -> Iterator[str]:
    run, before = "", ""
    for char in part:
        kind = _kind(char)
        if run and (kind == "mark" or (kind == before and kind in ("letter", "digit"))):
            run += char
            continue
        if run:
            yield run
        run, before = char, kind
    if run:
        yield run


def _kind(char: str) -> str:
    category = unicodedata.category(char)
    if category[0] == "L":
        alone = unicodedata.name(char, "").startswith(_WITHOUT_SPACES)
        return "letter that stands alone" if alone else "letter"
    return "mark" if category[0] == "M" else "digit" if category == "Nd" else "other"


# ---- step 3


def burmese_syllables(text: str) -> list[str]:
    """Burmese in syllables, any other character alone (Ding et al. 2019, doi 10.1145/3325885).

    A syllable is a letter with its marks, with what is stacked below it, and with the letters after
    it that asat kills. Four characters with an asat are a vowel (au) and not a killed letter.
    """
    # Both orders of these marks are in use for the same syllable.
    text = "".join(text.split()).replace(_DOT_BELOW + _ASAT, _ASAT + _DOT_BELOW)
    found: list[str] = []
    for unit in _letters_with_marks(text):
        killed = _ASAT in unit and len(unit) < 4
        if found and (killed or found[-1].endswith(_STACK)):
            found[-1] += unit
        else:
            found.append(unit)
    return found


def _letters_with_marks(text: str) -> list[str]:
    found: list[str] = []
    for char in text:
        if found and unicodedata.category(char)[0] == "M":
            found[-1] += char
        else:
            found.append(char)
    return found


def _jieba() -> Cut:
    jieba = import_module("jieba")
    jieba.setLogLevel(logging.WARNING)  # it tells of its dictionary on standard error
    return lambda text: list(jieba.cut(text))


def _fugashi() -> Cut:
    try:
        tagger = import_module("fugashi").Tagger("-O wakati -b 50000")
    except RuntimeError as error:
        raise UserError(
            "fugashi, which cuts Japanese into words, has no dictionary; install one with: "
            "pip install unidic-lite"
        ) from error
    return lambda text: str(tagger.parse(text)).split()


def _pythainlp() -> Cut:
    tokenize = import_module("pythainlp.tokenize").word_tokenize
    return lambda text: list(tokenize(text, engine="newmm"))


_PACKAGES: Mapping[str, tuple[str, Callable[[], Cut]]] = {
    "chinese_simplified": ("jieba", _jieba),
    "chinese_traditional": ("jieba", _jieba),
    "japanese": ("fugashi", _fugashi),
    "thai": ("pythainlp", _pythainlp),
}


def _cut_of(language: str) -> tuple[Cut, str]:
    """What makes words of a language, and its name if it might have been another."""
    if language == "burmese":
        return burmese_syllables, ""
    if language not in _PACKAGES:
        return plain_words, ""
    package, made = _PACKAGES[language]
    if find_spec(package) is None:
        return plain_words, "by letters"
    return made(), f"by {package}"
