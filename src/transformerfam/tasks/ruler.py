"""RULER-style tasks (arXiv 2404.06654), made here with its published parameters and wording.

    niah            one needle: the magic number of a word, hidden in prose
    niah-multikey   four words with numbers, one is asked for
    niah-multivalue one word with four numbers, all are asked for
    vt              variable tracking: one chain of four assignments
    cwe             common words: 10 words come 30 times, all others, or pairs of them, 3 times

Scored as RULER does: the share of the references that are in what was said.
"""

from __future__ import annotations

import bisect
import itertools
import random
import string
from collections.abc import Sequence
from functools import partial

from transformerfam.errors import UserError
from transformerfam.tasks.cases import Case, Wanted, by_length
from transformerfam.tasks.questions import Metrics, Say
from transformerfam.text import start_tokens

VERSION = 2
KINDS = ("niah", "niah-multikey", "niah-multivalue", "vt", "cwe")
MOST_NEW_TOKENS = {"vt": 30, "cwe": 120}  # 128 for needles
_NEEDLES = {
    "niah": (1, 1),
    "niah-multikey": (4, 1),
    "niah-multivalue": (1, 4),
}  # keys, values of each
_HOPS = 4
_COMMON, _COMMON_TIMES, _OTHER_TIMES = 10, 30, 3
_LEAST_TOKENS = 3  # of an entry of a list: its number, a point, a word


def cases(kind: str, wanted: Wanted) -> list[Case]:
    """A case for each length; metric `recall`: share of the references that are said."""
    return by_length(f"ruler-{kind}", VERSION, wanted, partial(_question, kind, wanted), "recall")


def _question(kind: str, wanted: Wanted, length: int, number: int) -> Say:
    rng = wanted.rng("ruler", kind, length, number)
    make = {"vt": _variables, "cwe": _common_words}.get(kind, partial(_needles, kind))
    most = MOST_NEW_TOKENS.get(kind, 128)
    text, asked, references = make(wanted, rng, length - most)
    return Say(
        text=text,
        ids=asked,
        most=most,
        score=partial(_score, references),
        decode=wanted.tokenizer.decode,
        stop=[wanted.tokenizer.eos_token_id] if wanted.tokenizer.eos_token_id is not None else [],
        facts={"references": list(references)},
    )


def _score(references: Sequence[str], said: str) -> Metrics:
    found = [reference.lower() in said.lower() for reference in references]
    return {"recall": sum(found) / len(found)}


def _between(
    wanted: Wanted, rng: random.Random, before: str, needles: Sequence[str], after: str, length: int
) -> tuple[list[int], list[int]]:
    """Token ids of prose with needles in it behind a text, and of what is asked then."""
    encode = wanted.encoder.encode
    start = [*start_tokens(wanted.tokenizer), *encode(before, first=True)]
    end = encode(after, first=False)
    hidden = [encode(f" {needle}", first=False) for needle in needles]
    ids, _ = wanted.haystack.hide(rng, hidden, length - len(start) - len(end))
    return [*start, *ids], end


def _needles(
    kind: str, wanted: Wanted, rng: random.Random, length: int
) -> tuple[list[int], list[int], list[str]]:
    keys, values = _NEEDLES[kind]
    words = rng.sample(wanted.words, keys)
    numbers = [[str(rng.randrange(1_000_000, 10_000_000)) for _ in range(values)] for _ in words]
    needles = [
        f"One of the special magic numbers for {word} is: {number}."
        for word, of_word in zip(words, numbers, strict=True)
        for number in of_word
    ]
    rng.shuffle(needles)
    several = values > 1
    what = "all the special magic numbers" if several else "the special magic number"
    before = (
        f"{'Some' if several else 'A'} special magic number{'s are' if several else ' is'} hidden "
        "within the following text. Make sure to memorize it. I will quiz you about the "
        f"number{'s' if several else ''} afterwards.\n"
    )
    be = "are" if several else "is"
    after = (
        f"\nWhat {be} {what} for {words[0]} mentioned in the provided text? "
        f"The special magic number{'s' if several else ''} for {words[0]} mentioned in the provided "
        f"text {be}"
    )
    return *_between(wanted, rng, before, needles, after, length), numbers[0]


def _variables(
    wanted: Wanted, rng: random.Random, length: int
) -> tuple[list[int], list[int], list[str]]:
    names: list[str] = []
    while len(names) <= _HOPS:
        name = "".join(rng.choices(string.ascii_uppercase, k=5))
        names += [name] if name not in names else []
    value = str(rng.randrange(10_000, 100_000))
    needles = [f"VAR {names[0]} = {value}"]
    needles += [f"VAR {new} = VAR {old}" for old, new in itertools.pairwise(names)]
    before = (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    )
    after = (
        f"\nQuestion: Find all variables that are assigned the value {value} in the text above. "
        "Answer: According to the chain(s) of variable assignment in the text above, "
        f"{len(names)} variables are assigned the value {value}, they are:"
    )
    return *_between(wanted, rng, before, needles, after, length), names


def _common_words(
    wanted: Wanted, rng: random.Random, length: int
) -> tuple[list[int], list[int], list[str]]:
    encode = wanted.encoder.encode
    before = (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        "Memorize the ones that appear most often.\n"
    )
    after = (
        f"\nQuestion: What are the {_COMMON} most common words in the above list? "
        f"Answer: The top {_COMMON} words that appear most often in the list are:"
    )
    start = [*start_tokens(wanted.tokenizer), *encode(before, first=True)]
    end = encode(after, first=False)
    words = wanted.words
    order = rng.sample(words, len(words))
    common, others = order[:_COMMON], order[_COMMON:]
    # Long lists want more words than a text has: pairs of them.
    while len(others) * _OTHER_TIMES * _LEAST_TOKENS < length:
        others = list(dict.fromkeys([*others, *("-".join(rng.sample(words, 2)) for _ in words)]))

    def listed(count: int) -> list[int]:
        shown = [*common * _COMMON_TIMES, *others[:count] * _OTHER_TIMES]
        random.Random(count).shuffle(shown)
        lines = " ".join(f"{n}. {word}" for n, word in enumerate(shown, 1))
        return encode(lines, first=False)

    # As many other words as there is room for.
    room = length - len(start) - len(end)
    count = bisect.bisect_right(range(len(others) + 1), room, key=lambda n: len(listed(n))) - 1
    if count < 0:
        least = len(start) + len(listed(0)) + len(end) + MOST_NEW_TOKENS["cwe"]
        raise UserError(f"The common words of ruler-cwe alone take {least:,} tokens; ask at more.")
    return [*start, *listed(count)], end, common
