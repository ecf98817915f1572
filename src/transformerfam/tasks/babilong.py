"""BABILong-style: facts of a small story scattered through long prose, and a question about them.

After BABILong (arXiv 2406.10149). The stories are those of the bAbI tasks (arXiv 1502.05698), read
from their files, or of the kinds qa1 and qa2 made here: people move about, and take things along.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from transformerfam.errors import UserError
from transformerfam.tasks.cases import Case, Wanted, by_length
from transformerfam.tasks.questions import Metrics, Say
from transformerfam.text import start_tokens

VERSION = 2
MOST_NEW_TOKENS = 12
_PEOPLE = ("Mary", "John", "Sandra", "Daniel")
_PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
_THINGS = ("apple", "football", "milk")
_MOVES = ("moved to", "went to", "journeyed to", "travelled to", "went back to")
_TAKES = ("got", "took", "picked up", "grabbed")


@dataclass(frozen=True)
class Story:
    """Facts in order, a question, its answer, and the numbers of the facts that tell it."""

    facts: Sequence[str]
    question: str
    answer: str
    supporting: Sequence[int]


def cases(kind: str, wanted: Wanted) -> list[Case]:
    """A case for each length; metric `accuracy`: the answer is said, and no other."""
    stories, answers = _stories(kind, wanted)
    files = wanted.given("babilong") if "babilong" in wanted.data else {}
    return by_length(
        f"babilong-{kind}",
        VERSION,
        wanted,
        partial(_question, kind, wanted, stories, answers),
        "accuracy",
        **files,
    )


def _question(
    kind: str,
    wanted: Wanted,
    stories: Callable[[int], Story],
    answers: frozenset[str],
    length: int,
    number: int,
) -> Say:
    story = stories(number)
    encode = wanted.encoder.encode
    rng = wanted.rng("babilong", kind, length, number)
    beginning = [
        *start_tokens(wanted.tokenizer),
        *encode(
            "Facts about people and things are hidden in the text below. Answer the question at its "
            "end with one word.\n\n",
            first=True,
        ),
    ]
    asked = encode(f"\n\nQuestion: {story.question}\nAnswer:", first=False)
    needles = [encode(f" {fact}", first=False) for fact in story.facts]
    budget = length - len(beginning) - len(asked) - MOST_NEW_TOKENS
    hidden, depths = wanted.haystack.hide(rng, needles, budget)
    return Say(
        text=[*beginning, *hidden],
        ids=asked,
        most=MOST_NEW_TOKENS,
        score=partial(_score, story, answers),
        decode=wanted.tokenizer.decode,
        facts={"depths": [round(depths[n], 4) for n in story.supporting], "answer": story.answer},
    )


def _score(story: Story, answers: frozenset[str], said: str) -> Metrics:
    """Right if the first sentence names the answer and none of the task's other answers.

    Words of the question do not count, since they may be said again.
    """
    first = re.split(r"[.\n]", said.strip(), maxsplit=1)[0]
    words = set(re.findall(r"\w+", first.lower()))
    asked = set(re.findall(r"\w+", story.question.lower()))
    named = {a for a in answers if a in words and (a not in asked or a == story.answer)}
    return {"accuracy": float(named == {story.answer})}


# ---- stories


def _stories(kind: str, wanted: Wanted) -> tuple[Callable[[int], Story], frozenset[str]]:
    """Number of a question -> its story; and all answers of the kind."""
    if "babilong" in wanted.data:
        read = read_babi(Path(wanted.data["babilong"]), kind)
        order = list(range(len(read)))
        random.Random(f"{wanted.seed}/babilong/{kind}").shuffle(order)
        return lambda n: read[order[n % len(order)]], frozenset(s.answer for s in read)
    makers = {"qa1": _where_is_someone, "qa2": _where_is_something}
    if kind not in makers:
        raise UserError(
            f"The stories of babilong-{kind} come from the bAbI files; give --data babilong=FOLDER."
        )
    make = makers[kind]
    return lambda n: make(wanted.rng("story", kind, n)), frozenset(_PLACES)


def read_babi(folder: Path, kind: str) -> list[Story]:
    """The questions of `qaN_..._test.txt` in a folder, each with the facts before it.

    Raises:
        UserError: there is no such file, or it is not of the form of bAbI.
    """
    found = sorted(folder.glob(f"{kind}_*_test.txt"))
    if not found:
        raise UserError(f"The folder {folder} has no file {kind}_..._test.txt of bAbI.")
    stories: list[Story] = []
    numbers: list[int] = []
    facts: list[str] = []
    for place, line in enumerate(found[0].read_text(encoding="utf-8").splitlines(), 1):
        number, _, rest = line.partition(" ")
        if not number.isdigit():
            raise UserError(f"{found[0]}:{place} does not begin with a number, as bAbI has it.")
        if number == "1":
            numbers, facts = [], []
        if "\t" not in rest:
            numbers.append(int(number))
            facts.append(rest.strip())
            continue
        question, answer, supporting = (part.strip() for part in rest.split("\t"))
        told = [numbers.index(int(n)) for n in supporting.split()]
        stories.append(Story(tuple(facts), question, answer.lower(), told))
    return stories


def _where_is_someone(rng: random.Random) -> Story:
    """qa1: where someone is now, who has been elsewhere before."""
    facts: list[str] = []
    at: dict[str, tuple[int, str]] = {}
    for n in range(rng.randint(4, 8)):
        person = rng.choice(_PEOPLE)
        at[person] = (n, rng.choice([p for p in _PLACES if p != at.get(person, (0, ""))[1]]))
        facts.append(f"{person} {rng.choice(_MOVES)} the {at[person][1]}.")
    person = rng.choice(sorted(at))
    return Story(facts, f"Where is {person}?", at[person][1], [at[person][0]])


def _where_is_something(rng: random.Random) -> Story:
    """qa2: where a thing is now, which someone took and carried on."""
    thing = rng.choice(_THINGS)
    carrier = rng.choice(_PEOPLE)
    others = [p for p in _PEOPLE if p != carrier]
    facts = []

    def someone_moves(who: Sequence[str]) -> str:
        place = rng.choice(_PLACES)
        facts.append(f"{(person := rng.choice(list(who)))} {rng.choice(_MOVES)} the {place}.")
        assert person
        return place

    for _ in range(rng.randint(1, 3)):
        someone_moves(_PEOPLE)
    facts.append(f"{carrier} {rng.choice(_TAKES)} the {thing} there.")
    took = len(facts) - 1
    for _ in range(rng.randint(0, 2)):
        someone_moves(others)
    place = someone_moves([carrier])
    moved = len(facts) - 1
    for _ in range(rng.randint(0, 2)):
        someone_moves(others)
    return Story(facts, f"Where is the {thing}?", place, [took, moved])
