"""Whole documents: how well each token is predicted, by its place (PG-19, Isabelle; table 1).

Any folder of texts, file of rows {text}, or data set of the hub (NAME:SPLIT) will do.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from transformerfam.data.examples import BadRow
from transformerfam.data.files import Rows, open_rows
from transformerfam.errors import UserError
from transformerfam.tasks.cases import Case, Wanted
from transformerfam.tasks.questions import Follow
from transformerfam.text import READ_BYTES, TokenIds

VERSION = 2
PAPERS_CUT = 262_144
_FIRST_EDGE = 1024


def cases(wanted: Wanted) -> list[Case]:
    """One case; metric `accuracy`: share of tokens that were the likeliest."""
    path = wanted.path("documents")
    name, _, split = path.partition(":")
    rows = open_rows(path) if Path(path).exists() else open_rows(name, split=split or "test")
    return [
        Case(
            task="documents",
            version=VERSION,
            setting={**wanted.given("documents"), "most_tokens": wanted.most_tokens},
            count=min(wanted.samples, len(rows)),
            make=partial(_question, wanted, rows),
            metric="accuracy",
            axis="",
        )
    ]


def _question(wanted: Wanted, rows: Rows, number: int) -> Follow:
    place = rows.places(number)
    try:
        text = rows[number]["text"]
    except BadRow as bad:
        raise UserError(f"{place} cannot be used: {bad.reason}.") from None
    except KeyError:
        raise UserError(f"{place} has no column text.") from None
    parts = (text[i : i + READ_BYTES] for i in range(0, len(text), READ_BYTES))
    stream = TokenIds(wanted.tokenizer, parts)
    ids: list[int] = []
    bytes_before, done = [0.0], 0.0  # bytes before each part, and before the next token
    for token in stream:
        if len(ids) == wanted.most_tokens:
            break
        if len(ids) == _edge(len(bytes_before)):
            bytes_before.append(done)
        ids.append(token)
        done = stream.bytes_done
    ends = [*bytes_before[1:], done]
    nbytes = [end - begin for begin, end in zip(bytes_before, ends, strict=True)]
    edges = [_edge(n) for n in range(len(nbytes))]
    return Follow(ids, nbytes, edges, {"document": place})


def _edge(part: int) -> int:
    """First token of a part: 0, 1,024, and then each part is twice as long as the one before."""
    return _FIRST_EDGE << part - 1 if part else 0
