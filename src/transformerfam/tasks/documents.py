"""Whole documents: how well each token is predicted, by its place (PG-19, Isabelle; table 1).

Any folder of texts, file of rows {text}, or data set of the hub will do.
"""

from __future__ import annotations

from functools import partial

from transformerfam.data.examples import BadRow
from transformerfam.data.files import Rows, open_rows
from transformerfam.errors import UserError
from transformerfam.tasks.cases import Case, Wanted
from transformerfam.tasks.questions import Follow
from transformerfam.text import READ_BYTES, TokenIds

VERSION = 1
PAPERS_CUT = 262_144
_FIRST_EDGE, _DOUBLINGS = 1024, 14


def cases(wanted: Wanted) -> list[Case]:
    """One case; metric `accuracy`: share of tokens that were the likeliest."""
    path = wanted.path("documents")
    rows = open_rows(path)
    return [
        Case(
            task="documents",
            version=VERSION,
            setting={"data": path, "most_tokens": wanted.most_tokens},
            count=min(wanted.samples, len(rows)),
            make=partial(_question, wanted, rows),
            metric="accuracy",
            axis="",
        )
    ]


def edges(tokens: int) -> list[int]:
    """Parts by which sums are kept: 0 to 1,023, 1,024 to 2,047, then each twice as long."""
    marks = [0, *(_FIRST_EDGE << n for n in range(_DOUBLINGS))]
    return [mark for mark in marks if mark < tokens]


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
    for token in stream:
        if wanted.most_tokens is not None and len(ids) == wanted.most_tokens:
            break
        ids.append(token)
    return Follow(ids, max(1, round(stream.bytes_done)), edges(len(ids)), {"document": place})
