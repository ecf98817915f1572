"""ROUGE-L in many languages: words by hand in several scripts, scores by hand, English as before."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rouge_score.rouge_scorer import RougeScorer
from test_text import TOKENIZERS

from transformerfam.errors import UserError
from transformerfam.tasks import TASKS, Wanted, rouge
from transformerfam.tasks.cases import Case
from transformerfam.tasks.questions import Say

BENGALI = ("তোমার সাথে দেখা হয়ে ভালো লাগলো।", "আপনার সাথে দেখা হয়ে ভালো লাগলো।")


def cut(text: str) -> list[str]:
    return rouge.plain_words(" ".join(rouge.bare_parts(text)))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("L'Été, 2e «jour»!", ["l", "été", "2", "e", "jour"]),
        ("cafe\u0301 noir", ["cafe\u0301", "noir"]),
        ("£5bn + 20°C", ["£", "5", "bn", "20", "°", "c"]),  # ASCII symbols count as punctuation
        ("हिन्दी में ५०किमी।", ["हिन्दी", "में", "५०", "किमी"]),
        (BENGALI[0], ["তোমার", "সাথে", "দেখা", "হয়ে", "ভালো", "লাগলো"]),
        ("بِكُم، مرحبا ٢٠", ["بِكُم", "مرحبا", "٢٠"]),
        ("می\u200cروم؟", ["میروم"]),  # a joiner is a control character
        ("ሰላም፡ለዓለም", ["ሰላም", "ለዓለም"]),
        ("Москва, 2-й", ["москва", "2", "й"]),
        ("한국어 2020년", ["한국어", "2020", "년"]),
        ("東京へ2020年", ["東", "京", "へ", "2020", "年"]),
        ("ที่นี่ ๒๐", ["ที่", "นี่", "๒๐"]),
        ("ພາສາ", ["ພ", "າ", "ສ", "າ"]),
        ("ភាសា", ["ភា", "សា"]),
        ("👍🏽 ok\ufffd", ["👍", "🏽", "ok"]),
        ("...", []),
    ],
)
def test_words_by_hand(text: str, words: list[str]) -> None:
    assert cut(text) == words


@pytest.mark.parametrize(
    ("text", "syllables"),
    [
        ("မြန်မာ", ["မြန်", "မာ"]),  # a killed letter belongs to the one before
        ("မန္တလေး မြို့။", ["မ", "န္တ", "လေး", "မြို့"]),  # stacked letters stay together
        ("အင်္ဂလိပ်", ["အင်္ဂ", "လိပ်"]),  # both at once
        ("တော်", ["တော်"]),  # au is no killed letter
        ("၂၀ BBC", ["၂", "၀", "b", "b", "c"]),
        ("နို\u1037\u103a", ["နို\u103a\u1037"]),  # one order of marks
    ],
)
def test_burmese_syllables_by_hand(text: str, syllables: list[str]) -> None:
    assert rouge.Words("burmese").tokenize(text) == syllables


def test_scores_by_hand() -> None:
    bengali = rouge.Words("bengali")
    assert rouge.rouge_l([BENGALI[0]], BENGALI[1], bengali) == pytest.approx(5 / 6)
    assert rouge.rouge_l([BENGALI[0]], BENGALI[1]) == 0.0  # rouge-score alone drops every word
    # Of 3 and 2 letters 2 are common: precision 1, recall 2/3.
    letters = rouge.Words("burmese")
    assert rouge.rouge_l(["ကခဂ"], "ကဂ", letters) == pytest.approx(0.8)
    assert rouge.rouge_l(["nada", "ഒന്ന്"], "ഒന്ന്", bengali) == 1.0  # the best over the references
    assert rouge.rouge_l([""], "", bengali) == 0.0


@pytest.mark.parametrize(
    ("language", "one", "other"),
    [("spanish", "gatos negros", "gato negro"), ("russian", "новая книга", "новую книгу")],
)
def test_five_languages_are_stemmed(language: str, one: str, other: str) -> None:
    assert rouge.rouge_l([one], other, rouge.Words(language)) == 1.0
    assert rouge.rouge_l([one], other, rouge.Words("ukrainian")) == 0.0


def test_words_of_three_letters_are_not_stemmed() -> None:
    assert rouge.Words("french").tokenize("les mangeons") == ["les", "mangeon"]


def test_english_is_scored_by_rouge_score_as_it_comes() -> None:
    pairs = [
        ("The cats' 2nd café isn't running", "cat ran a 2 nd caf"),
        ("Ministers say £5bn was spent", "The minister says 5bn is being spent."),
    ]
    plain = RougeScorer(["rougeL"], use_stemmer=True)
    for answer, said in pairs:
        expected = plain.score(answer, said)["rougeL"].fmeasure
        assert 0 < rouge.rouge_l([answer], said) == expected < 1


# ---- languages that packages cut

FAKE = {
    "jieba": "def setLogLevel(level): pass\ndef cut(text): return iter([text[:2], text[2:]])\n",
    "fugashi": (
        "class Tagger:\n"
        "    def __init__(self, options): assert options == '-O wakati -b 50000'\n"
        "    def parse(self, text): return ' '.join([text[:2], text[2:]]) + '\\n'\n"
    ),
    "pythainlp": (
        "import sys\ntokenize = sys.modules['pythainlp.tokenize'] = sys.modules[__name__]\n"
        "__path__ = []\n"
        "def word_tokenize(text, engine): assert engine == 'newmm'; return [text[:2], text[2:]]\n"
    ),
}


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to put packages in."""
    names = [*FAKE, "pythainlp.tokenize"]
    hidden = {name: sys.modules.pop(name, None) for name in names}
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update({name: module for name, module in hidden.items() if module is not None})


@pytest.mark.parametrize(
    ("language", "package"),
    [("chinese_traditional", "jieba"), ("japanese", "fugashi"), ("thai", "pythainlp")],
)
def test_a_package_cuts_where_it_is_and_letters_where_it_is_not(
    language: str, package: str, packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (packages / f"{package}.py").write_text(FAKE[package])
    words = rouge.Words(language)
    assert words.how == f"{language} by {package}"
    assert words.tokenize("東京都民。") == ["東京", "都民"]
    monkeypatch.setattr(rouge, "find_spec", lambda name: None)
    words = rouge.Words(language)
    assert words.how == f"{language} by letters"
    assert words.tokenize("東京都民。") == ["東", "京", "都", "民"]


def test_fugashi_without_a_dictionary_says_what_to_install(packages: Path) -> None:
    (packages / "fugashi.py").write_text(
        "def Tagger(options): raise RuntimeError('no dictionary')\n"
    )
    with pytest.raises(UserError, match=r"^fugashi, .* pip install unidic-lite$"):
        rouge.Words("japanese")


# ---- the task


def test_languages_have_names_and_codes() -> None:
    for name, language in {
        "Scottish Gaelic": "scottish_gaelic",
        "zh-Hant": "chinese_traditional",
    }.items():
        assert rouge.language_named(name) == language
    assert rouge.language_named("fr") == rouge.language_named(" French") == "french"
    assert len(set(rouge.LANGUAGES.values())) == 45
    with pytest.raises(UserError, match="no language 'klingon'; it has amharic, arabic,"):
        rouge.language_named("klingon")


def xlsum(tmp_path: Path, *rows: dict[str, Any], language: str = "english") -> Case:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": "An article.", **row}) + "\n" for row in rows))
    wanted = Wanted(TOKENIZERS["gpt2"], data={"xlsum": str(file)}, language=language)
    (case,) = TASKS["xlsum"].cases(wanted)
    return case


def score(case: Case, number: int, said: str) -> float:
    question = case.make(number)
    assert isinstance(question, Say)
    return float(question.score(said)["rougeL"])


def test_rows_are_scored_in_their_language(tmp_path: Path) -> None:
    rows = [
        {"summary": BENGALI[0], "language": "Bengali"},
        {"summary": "gatos negros", "lang": "es"},
        {"summary": "cats running"},
    ]
    case = xlsum(tmp_path, *rows)
    assert case.setting["words"] == "bengali, spanish"
    assert score(case, 0, BENGALI[1]) == pytest.approx(5 / 6)
    assert score(case, 1, "gato negro") == 1.0
    assert score(case, 2, "cat run") == 1.0


def test_the_language_that_was_wanted_is_that_of_rows_that_name_none(tmp_path: Path) -> None:
    row = {"summary": "gatos negros"}
    case = xlsum(tmp_path, row, language="es")
    assert case.setting["words"] == "spanish"
    assert score(case, 0, "gato negro") == 1.0
    assert "words" not in xlsum(tmp_path, row).setting
    with pytest.raises(UserError, match="no language 'spanisch'"):
        xlsum(tmp_path, row, language="spanisch")
    with pytest.raises(UserError, match=r"^Row 2 of .*rows\.jsonl: XL-Sum has no language 'xx'"):
        xlsum(tmp_path, row, {**row, "language": "xx"})


def test_the_hub_is_asked_for_the_language(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def opened(path: str | None, *, hub: Any) -> Any:
        asked.append((path, hub))
        return iter([{"text": "An article.", "summary": "Short."}])

    monkeypatch.setattr("transformerfam.tasks.longqa.open_table", opened)
    for name in ("english", "hi"):
        TASKS["xlsum"].cases(Wanted(TOKENIZERS["gpt2"], language=name))
    assert asked == [(None, ("csebuetnlp/xlsum", n, "test")) for n in ("english", "hindi")]
