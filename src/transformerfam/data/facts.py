"""Texts with everyday facts hidden in prose, and questions about them in the words people use.

A pass key is always told and asked in the same words. Facts are not: a memory that is to hold what
someone may ask about has to hold names, places, things and numbers, told in a sentence of their own.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformerfam.data.passkey import NAMES, PasskeyTexts, Told
from transformerfam.errors import UserError

_PEOPLE = (
    *NAMES,
    *("Mr Abbott", "Mrs Lindqvist", "Dr Okafor", "Captain Reyes", "Professor Tanaka"),
    *("the gardener", "the old sailor", "the librarian", "the night porter", "my neighbour"),
)
_PLACES = (
    *("Lisbon", "Oslo", "Cairo", "Boston", "Kyoto", "Lima", "Dublin", "Vienna", "Nairobi"),
    *("Toronto", "Athens", "Prague", "Seville", "Bergen", "Havana", "Geneva", "Mumbai", "Riga"),
    "Denver",
)
_THINGS = (
    *("lantern", "violin", "map", "telescope", "silver coin", "letter", "umbrella", "compass"),
    *("pocket watch", "teapot", "red scarf", "ladder", "camera", "sword", "diary", "ring"),
)
_HIDING_PLACES = (
    *("under the oak tree", "behind the mirror", "in the cellar", "inside the piano"),
    *("under the bridge", "in the blue box", "behind the stove", "on the roof", "in the well"),
    *("beneath the stairs", "in the attic", "behind the third shelf", "in the stable"),
)
_JOBS = (
    *("baker", "carpenter", "surgeon", "pilot", "tailor", "painter", "teacher", "blacksmith"),
    *("lawyer", "farmer", "translator", "watchmaker", "nurse", "diver", "printer", "beekeeper"),
)
_COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black", "brown", "pink")
_ANIMALS = (
    *("parrot", "tortoise", "goat", "rabbit", "falcon", "donkey", "hedgehog", "monkey", "snake"),
    *("pony", "canary", "ferret", "goose", "lizard"),
)
_WORDS = (
    *("marigold", "thunder", "cinnamon", "timber", "velvet", "granite", "sparrow", "cobalt"),
    *("copper", "meadow", "saffron", "glacier", "walnut", "ember", "orchid", "pepper", "juniper"),
)
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MONTHS = (
    *("January", "February", "March", "April", "May", "June", "July", "August", "September"),
    *("October", "November", "December"),
)
_SUBJECTS = (
    *("the harvest", "the railway", "the new school", "the lost ship", "the wedding"),
    *("the harbour", "the church roof", "the flood", "the election", "the theatre"),
)


@dataclass(frozen=True)
class Kind:
    """One kind of fact, with slots in braces.

    Attributes:
        told: the sentence that tells it.
        question: what is asked.
        stem: how the answer begins.
        key: what the answer ends with: what has to be remembered.
    """

    told: str
    question: str
    stem: str
    key: str


KINDS = (
    Kind("{person} lives in {place}.", "Where does {person} live?", "{person} lives in", "{place}"),
    Kind(
        "{person} was born in {place}.",
        "Where was {person} born?",
        "{person} was born in",
        "{place}",
    ),
    Kind("{person} works as a {job}.", "What is {person}'s job?", "{person} works as a", "{job}"),
    Kind(
        "{person} keeps a {animal} at home.",
        "What animal does {person} keep?",
        "{person} keeps a",
        "{animal}",
    ),
    Kind(
        "The favourite colour of {person} is {colour}.",
        "What is the favourite colour of {person}?",
        "The favourite colour of {person} is",
        "{colour}",
    ),
    Kind(
        "The {thing} is hidden {hiding}.",
        "Where is the {thing} hidden?",
        "The {thing} is hidden",
        "{hiding}",
    ),
    Kind(
        "{person} left the {thing} {hiding}.",
        "Where did {person} leave the {thing}?",
        "{person} left the {thing}",
        "{hiding}",
    ),
    Kind(
        "{person} bought a {thing} for {amount} dollars.",
        "How much did {person} pay for the {thing}?",
        "{person} paid",
        "{amount} dollars",
    ),
    Kind(
        "The secret word of {person} is {word}.",
        "What is the secret word of {person}?",
        "The secret word of {person} is",
        "{word}",
    ),
    Kind(
        "The door code of {person} is {code}.",
        "What is the door code of {person}?",
        "The door code of {person} is",
        "{code}",
    ),
    Kind(
        "The meeting about {subject} is on {day} at {hour} o'clock.",
        "When is the meeting about {subject}?",
        "The meeting about {subject} is on",
        "{day} at {hour} o'clock",
    ),
    Kind(
        "The birthday of {person} is on {month} {number}.",
        "When is the birthday of {person}?",
        "The birthday of {person} is on",
        "{month} {number}",
    ),
    Kind(
        "{person} gave the {thing} to {other}.",
        "Who has the {thing} of {person}?",
        "The {thing} of {person} is with",
        "{other}",
    ),
    Kind(
        "The ship of {person} is called the {word}.",
        "What is the ship of {person} called?",
        "The ship of {person} is called the",
        "{word}",
    ),
)

_POOLS: dict[str, tuple[str, ...]] = {
    "place": _PLACES,
    "thing": _THINGS,
    "hiding": _HIDING_PLACES,
    "job": _JOBS,
    "colour": _COLOURS,
    "animal": _ANIMALS,
    "word": _WORDS,
    "day": _DAYS,
    "month": _MONTHS,
    "subject": _SUBJECTS,
}
_NUMBERS = {"amount": (12, 980), "code": (1000, 9999), "hour": (1, 12), "number": (1, 28)}
MOST = min(len(_PEOPLE) // 2, len(_THINGS), len(_SUBJECTS))  # whatever their kinds are
_DRAWS = 300
_SLOT = re.compile(r"{(\w+)}")


class FactTexts(PasskeyTexts):
    """Endless texts with facts in them, as `PasskeyTexts`: each made from (seed, number) alone.

    What a pass key is there is a fact here, of one of `KINDS`; no two of a text share a person or a
    thing, so that each question has one answer. Nothing says beforehand that there is something to
    find.

    Args:
        tokenizer: a tokenizer of transformers.
        keys: how many facts there are, at most MOST.
        options: as in `PasskeyTexts`; `asked` counts facts.

    Raises:
        UserError: no text can be made like this.
    """

    introduction = ""

    def __init__(self, tokenizer: Any, *, keys: int = 1, **options: Any) -> None:
        if not 1 <= keys <= MOST:
            raise UserError(f"A text has 1 to {MOST} facts, not {keys}.")
        super().__init__(tokenizer, keys=keys, **options)

    @property
    def bare_length(self) -> int:
        """Tokens of the longest of some hundred texts without filler: facts are of many lengths."""
        draws = (self.sample(random.Random(number), 0) for number in range(_DRAWS))
        return max(len(sample.example.ids) for sample in draws)

    def _things(self, rng: random.Random) -> list[Told]:
        people, things, subjects = (
            iter(rng.sample(pool, len(pool))) for pool in (_PEOPLE, _THINGS, _SUBJECTS)
        )
        own = {"person": people, "other": people, "thing": things, "subject": subjects}

        def value(slot: str) -> str:
            if slot in own:
                return next(own[slot])
            if slot in _NUMBERS:
                return str(rng.randint(*_NUMBERS[slot]))
            return rng.choice(_POOLS[slot])

        return [self._thing(rng.choice(KINDS), value) for _ in range(self.keys)]

    @staticmethod
    def _thing(kind: Kind, value: Callable[[str], str]) -> Told:
        slots = dict.fromkeys(_SLOT.findall(kind.told + kind.question + kind.stem + kind.key))
        filled = {slot: value(slot) for slot in slots}
        told, question, stem, key = (
            text.format(**filled) for text in (kind.told, kind.question, kind.stem, kind.key)
        )
        return Told(_capital(told), _capital(question), _capital(stem), key)


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
