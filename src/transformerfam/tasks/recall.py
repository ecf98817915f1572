"""Recall: say a segment again that stood somewhere in a long text (the repeat task of B.2, asked)."""

from __future__ import annotations

from functools import partial

from transformerfam.data.examples import repeat_marker
from transformerfam.tasks.cases import Case, Wanted, by_length
from transformerfam.tasks.questions import Recite
from transformerfam.text import start_tokens

VERSION = 1
SEGMENT, GIVEN = 64, 16  # tokens of the segment, and how many of them are given as its beginning


def cases(wanted: Wanted) -> list[Case]:
    """A case for each length; metric `tokens`: share of the segment's other tokens said right."""
    return by_length("recall", VERSION, wanted, partial(_question, wanted), "tokens")


def _question(wanted: Wanted, length: int, number: int) -> Recite:
    rng = wanted.rng("recall", length, number)
    start = start_tokens(wanted.tokenizer)
    marker = repeat_marker(wanted.tokenizer)
    room = max(SEGMENT, length - len(start) - len(marker) - SEGMENT)
    sentences = wanted.haystack.take(rng.randrange(len(wanted.haystack)), room)
    prose = [token for ids in sentences for token in ids]
    place = rng.randrange(len(prose) - SEGMENT + 1)
    segment = prose[place : place + SEGMENT]
    asked = [*marker, *segment[:GIVEN]]
    facts = {"depth": round(place / len(prose), 4)}
    return Recite(asked, segment[GIVEN:], facts, text=[*start, *prose])
