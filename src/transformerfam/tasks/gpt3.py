"""Tasks of GPT-3's paper (table 12), from files in the columns of llm-foundry.

    {query, choices, gold}                  which of the choices; accuracy by rank
    {context_options, continuation, gold}   after which text the continuation; accuracy by rank
    {context, continuation}                 the last word, said exactly
    {context, answer, aliases}              the answer, said freely; exact match

All are asked without examples before them. The other data sets of the table are tasks of
lm-evaluation-harness, see `HARNESS`.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from transformerfam.data.tables import open_table
from transformerfam.errors import UserError
from transformerfam.tasks.cases import Case, Wanted
from transformerfam.tasks.questions import Choose, Fit, Metrics, Question, Recite, Say
from transformerfam.text import start_tokens

VERSION = 1
_MOST_NEW_TOKENS = 24
_PUNCTUATION = frozenset(string.punctuation + "‘’´")

# Row of table 12 -> task of lm-evaluation-harness. Its `race` is RACE-H; RACE-M it has not. The table's
# Winograd is `gpt3-winograd` here.
HARNESS = {
    "ANLI R1": "anli_r1",
    "ANLI R2": "anli_r2",
    "ANLI R3": "anli_r3",
    "ARC Challenge": "arc_challenge",
    "ARC Easy": "arc_easy",
    "BoolQ": "boolq",
    "CB": "cb",
    "COPA": "copa",
    "HellaSwag": "hellaswag",
    "MultiRC": "multirc",
    "OpenbookQA": "openbookqa",
    "PIQA": "piqa",
    "RACE-H": "race",
    "ReCoRD": "record",
    "RTE": "sglue_rte",
    "StoryCloze": "storycloze_2016",
    "WiC": "wic",
    "Winogrande": "winogrande",
    "WSC273": "wsc273",
    "LAMBADA": "lambada_openai",
    "Natural Questions": "nq_open",
    "SQuADv2.0": "squadv2",
    "TriviaQA": "triviaqa",
    "WebQuestions": "webqs",
}


def cases(name: str, wanted: Wanted) -> list[Case]:
    """One case: the first `samples` rows."""
    path = wanted.path(name)
    make, metric = _KINDS[name]
    questions: list[Question] = []
    for number, row in enumerate(open_table(path, hub=None), 1):
        if len(questions) == wanted.samples:
            break
        try:
            questions.append(make(row, wanted))
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise UserError(
                f"Row {number} of {path} is none of {name}: {type(error).__name__} {error}."
            ) from None
    if not questions:
        raise UserError(f"{path} has no question.")
    return [
        Case(
            name,
            VERSION,
            wanted.given(name),
            len(questions),
            questions.__getitem__,
            metric,
            axis="",
        )
    ]


# ---- rows to questions


def _choose(before_answer: str, row: Mapping[str, Any], wanted: Wanted) -> Choose:
    choices, gold = row["choices"], int(row["gold"])
    choices[gold]
    return Choose(
        ids=_text(row["query"].strip() + before_answer, wanted),
        choices=[_after(choice, wanted) for choice in choices],
        gold=gold,
        lengths=[len(choice) for choice in choices],
    )


def _fit(row: Mapping[str, Any], wanted: Wanted) -> Fit:
    contexts, gold = row["context_options"], int(row["gold"])
    contexts[gold]
    return Fit(
        contexts=[_text(context.strip(), wanted) for context in contexts],
        continuation=_after(row["continuation"], wanted),
        gold=gold,
    )


def _recite(row: Mapping[str, Any], wanted: Wanted) -> Recite:
    return Recite(_text(row["context"].strip(), wanted), _after(row["continuation"], wanted))


def _say(row: Mapping[str, Any], wanted: Wanted) -> Say:
    newline = wanted.encoder.encode("\n", first=False)
    stop = [t for t in (wanted.tokenizer.eos_token_id, *newline[-1:]) if t is not None]
    score = partial(_exact_match, [row["answer"], *row.get("aliases", [])])
    ids = _text(row["context"].strip(), wanted)
    return Say(ids, _MOST_NEW_TOKENS, score, wanted.tokenizer.decode, stop)


def _text(text: str, wanted: Wanted) -> list[int]:
    return [*start_tokens(wanted.tokenizer), *wanted.encoder.encode(text, first=True)]


def _after(text: str, wanted: Wanted) -> list[int]:
    return wanted.encoder.encode(f" {text.strip()}", first=False)


# ---- scores


def _exact_match(answers: Sequence[str], said: str) -> Metrics:
    """Whether the first line is one of the answers, compared as TriviaQA's authors do."""
    plain = _plain(said.strip().partition("\n")[0])
    return {"exact_match": float(plain in {_plain(answer) for answer in answers})}


def _plain(text: str) -> str:
    """Without case, punctuation, articles and blanks that are more than one."""
    bare = "".join(" " if c in _PUNCTUATION else c for c in text.lower())
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


_Make = Callable[[Mapping[str, Any], Wanted], Question]
# Name -> (row to question, metric of table 12). What stands before an answer is llm-foundry's.
_KINDS: dict[str, tuple[_Make, str]] = {
    "gpt3-arc-challenge": (partial(_choose, "\nAnswer:"), "accuracy"),
    "gpt3-arc-easy": (partial(_choose, "\nAnswer:"), "accuracy"),
    "gpt3-openbookqa": (partial(_choose, ""), "accuracy"),
    "gpt3-piqa": (partial(_choose, "\nAnswer:"), "accuracy"),
    "gpt3-winograd": (_fit, "accuracy"),
    "gpt3-winogrande": (_fit, "accuracy"),
    "gpt3-lambada": (_recite, "exact"),
    "gpt3-triviaqa": (_say, "exact_match"),
}
