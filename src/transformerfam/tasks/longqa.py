"""Questions about long documents, and their summaries (tables 1, 10, 11).

    narrativeqa, qasper     say the answer; ROUGE-L, and F1 over words
    quality                 which of four options; accuracy by rank
    xlsum                   say the summary; ROUGE-L in the article's language, see `rouge`
    longqa                  rows {input, instructions, outputs}, as those of L-Eval

Rows come from the hub or from a local file of the same columns: those of SCROLLS ({input, output}, the
question first; rows of the same input are one question with several references), for narrativeqa also
its own ({document, question, answers}), and of
XL-Sum ({text, summary}, perhaps with the language: {language} or {lang}).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, zip_longest
from typing import Any

from transformerfam.data.tables import open_table
from transformerfam.errors import UserError
from transformerfam.tasks import rouge
from transformerfam.tasks.cases import Case, Wanted
from transformerfam.tasks.questions import Choose, Metrics, Question, Say
from transformerfam.text import start_tokens

VERSION = 3
_ENGLISH = "english"
_OPTION = re.compile(r"^\s*\(([A-D])\)\s*(.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Asked:
    """A document and a question about it.

    Attributes:
        before: stands before the document: what is to be done.
        document: the long text.
        after: stands behind it: the question, up to where the answer begins.
        answers: any of these is right.
        choices: options of which one is right; empty: the answer is said freely.
        language: of the answers, see `rouge.LANGUAGES`; empty: that which was wanted.
    """

    before: str
    document: str
    after: str
    answers: Sequence[str]
    choices: Sequence[str] = ()
    language: str = _ENGLISH


@dataclass(frozen=True)
class Source:
    """Where the rows of a task come from, and what they are.

    Attributes:
        hub: (name, configuration, split) on the hub; None: a path must be given. A configuration of
            "{language}" is that of the language that was wanted.
        read: a row -> its questions.
        most: most tokens of an answer.
        metric: the one for the table.
    """

    hub: tuple[str, str | None, str] | None
    read: Callable[[Mapping[str, Any]], list[Asked]]
    most: int
    metric: str


def cases(name: str, wanted: Wanted) -> list[Case]:
    """One case: the first question about each document, then the second, up to `samples`.

    Questions about one document are right or wrong together, and standard errors would not know it.
    """
    source = SOURCES[name]
    asked = _questions(name, source, wanted)
    setting: dict[str, Any] = {**wanted.given(name), "most_tokens": wanted.most_tokens}
    languages = sorted({one.language for one in asked} - {_ENGLISH})
    words = {language: rouge.Words(language) for language in languages}
    if words:
        # What another way of cutting words scores is not mixed with this.
        setting["words"] = ", ".join(cut.how for cut in words.values())
    return [
        Case(
            task=name,
            version=VERSION,
            setting=setting,
            count=len(asked),
            make=lambda number: _question(
                asked[number], source, wanted, words.get(asked[number].language)
            ),
            metric=source.metric,
            axis="",
        )
    ]


def _questions(name: str, source: Source, wanted: Wanted) -> list[Asked]:
    if name not in wanted.data and source.hub is None:
        wanted.path(name)  # says what to give
    hub = source.hub
    if hub is not None and hub[1] is not None:
        hub = (hub[0], hub[1].format(language=rouge.language_named(wanted.language)), hub[2])
    rows = open_table(wanted.data.get(name), hub=hub)
    found: dict[str, list[Asked]] = {}  # document -> its questions
    for number, row in enumerate(rows, 1):
        try:
            read = source.read(row)
        except UserError as error:
            raise UserError(f"Row {number} of {wanted.data.get(name, name)}: {error}") from None
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise UserError(
                f"Row {number} of {wanted.data.get(name, name)} is none of {name}: "
                f"{type(error).__name__} {error}."
            ) from None
        for one in read:
            _add(_in_a_language(one, wanted), found.setdefault(one.document, []))
        if len(found) > wanted.samples:  # those before the last have no more questions
            break
    if not found:
        raise UserError(f"{wanted.data.get(name, name)} has no question.")
    in_turns = chain.from_iterable(zip_longest(*found.values()))
    return [asked for asked in in_turns if asked is not None][: wanted.samples]


def _add(asked: Asked, found: list[Asked]) -> None:
    """One more question about a document, or one more reference of the last: SCROLLS has a row for each.

    `found`: what was asked about the document before; all of it shares one copy of the text.
    """
    if found:
        asked = replace(asked, document=found[0].document)
    if found and replace(found[-1], answers=asked.answers) == asked:
        found[-1] = replace(asked, answers=[*found[-1].answers, *asked.answers])
    else:
        found.append(asked)


def _in_a_language(asked: Asked, wanted: Wanted) -> Asked:
    return replace(asked, language=asked.language or rouge.language_named(wanted.language))


def _question(asked: Asked, source: Source, wanted: Wanted, words: rouge.Words | None) -> Question:
    encode = wanted.encoder.encode
    before = encode(f"{asked.before}\n\n", first=True)
    after = encode(f"\n\n{asked.after}", first=False)
    document = encode(asked.document, first=False) if asked.document else []
    facts: dict[str, Any] = {"document_tokens": len(document)}
    if wanted.most_tokens is not None and len(document) > wanted.most_tokens:
        document = document[: wanted.most_tokens]
        facts["cut"] = True
    text = [*start_tokens(wanted.tokenizer), *before, *document]
    if asked.choices:
        choices = [encode(f" {choice}", first=False) for choice in asked.choices]
        gold = asked.choices.index(asked.answers[0])
        sizes = [len(choice) for choice in asked.choices]
        return Choose(after, choices, gold, sizes, facts, text=text)
    newline = encode("\n", first=False)
    stop = [t for t in (wanted.tokenizer.eos_token_id, *newline[-1:]) if t is not None]
    score = partial(_score, tuple(asked.answers), words)
    return Say(after, source.most, score, wanted.tokenizer.decode, stop, facts, text=text)


# ---- scores


def _score(answers: Sequence[str], words: rouge.Words | None, said: str) -> Metrics:
    """The best over the references, as the tasks' authors do; of the first line that was said."""
    said = said.strip().partition("\n")[0]
    return {
        "rougeL": rouge.rouge_l(answers, said, words),
        "f1": max(f1(answer, said) for answer in answers),
    }


def f1(reference: str, said: str) -> float:
    """F1 of words, without case, punctuation and articles (SQuAD, Qasper)."""
    words = [_plain_words(text) for text in (reference, said)]
    if not all(words):
        return float(words[0] == words[1])
    common = sum((Counter(words[0]) & Counter(words[1])).values())
    return 2 * common / sum(map(len, words))


def _plain_words(text: str) -> list[str]:
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return [word for word in bare.split() if word not in ("a", "an", "the")]


# ---- rows


def _narrativeqa(row: Mapping[str, Any]) -> list[Asked]:
    """Rows of SCROLLS, or of the data set that it took them from."""
    if "document" not in row:
        return _scrolls(row)
    answers = [answer["text"] for answer in row["answers"]]
    question = row["question"]["text"]
    return [Asked(_READ, row["document"]["text"], _ask(question), answers)]


def _scrolls(row: Mapping[str, Any]) -> list[Asked]:
    question, _, document = row["input"].partition("\n\n")
    answers = row["output"] if isinstance(row["output"], list) else [row["output"]]
    return [Asked(_READ, document.strip(), _ask(question.strip()), answers)]


def _quality(row: Mapping[str, Any]) -> list[Asked]:
    """SCROLLS writes the question, then the options on lines of their own, then the document."""
    question, _, rest = row["input"].partition("\n\n")
    options, _, document = rest.lstrip().partition("\n\n")
    choices = [text.strip() for _, text in _OPTION.findall(options)]
    answer = row["output"][0] if isinstance(row["output"], list) else row["output"]
    if answer.strip() not in choices:
        raise ValueError("its output is none of its options")
    return [Asked(_READ, document.strip(), _ask(question.strip()), [answer.strip()], choices)]


def _xlsum(row: Mapping[str, Any]) -> list[Asked]:
    named = row.get("language") or row.get("lang")
    language = rouge.language_named(named) if isinstance(named, str) else ""
    article, summary = row["text"], row["summary"]
    return [Asked("Read the article.", article, "Summary:", [summary], language=language)]


def _leval(row: Mapping[str, Any]) -> list[Asked]:
    pairs = zip(row["instructions"], row["outputs"], strict=True)
    return [Asked(_READ, row["input"], _ask(question), [answer]) for question, answer in pairs]


_READ = "Read the text and answer the question about it."


def _ask(question: str) -> str:
    return f"Question: {question}\nAnswer:"


# SCROLLS is a program and zipped files beside it; the files will do.
_SCROLLS = (
    "zip://{0}/validation.jsonl::https://huggingface.co/datasets/tau/scrolls/resolve/main/{0}.zip"
)

SOURCES = {
    "narrativeqa": Source(
        (_SCROLLS.format("narrative_qa"), None, "validation"), _narrativeqa, 50, "rougeL"
    ),
    "qasper": Source((_SCROLLS.format("qasper"), None, "validation"), _scrolls, 80, "rougeL"),
    "quality": Source((_SCROLLS.format("quality"), None, "validation"), _quality, 1, "accuracy"),
    "xlsum": Source(("csebuetnlp/xlsum", "{language}", "test"), _xlsum, 80, "rougeL"),
    "longqa": Source(None, _leval, 100, "rougeL"),
}
