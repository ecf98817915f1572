"""PassKey texts: a number, a lot of irrelevant text, and the question what the number was (figure 10).

Texts are put together from parts that were tokenised once. Knows a tokenizer, no model and no files.
"""

from __future__ import annotations

import bisect
import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformerfam.data.examples import Example, continued
from transformerfam.data.haystack import Haystack
from transformerfam.errors import UserError
from transformerfam.text import Encoder, start_tokens
from transformerfam.turns import Turns

DEFAULT_SENTENCES = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)

INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)

NAMES = (
    *("Alice", "Bob", "Carol", "David", "Emma", "Frank", "Grace", "Henry", "Irene", "Jack"),
    *("Karen", "Louis", "Maria", "Nathan", "Olivia", "Peter", "Quentin", "Rachel", "Simon"),
    *("Teresa", "Ursula", "Victor", "Wendy", "Xavier", "Yvonne", "Zachary", "Anna", "Boris"),
    *("Clara", "Daniel", "Esther", "Felix"),
)


@dataclass(frozen=True)
class Told:
    """What a text tells and is asked about.

    Attributes:
        sentence: tells it.
        question: asks for it.
        stem: how the answer begins, and
        key: how it ends: what had to be remembered.
    """

    sentence: str
    question: str
    stem: str
    key: str


@dataclass(frozen=True)
class PasskeySample:
    """A PassKey text and what is known about it.

    Attributes:
        example: its tokens; those of the answer, at its end, and of answers before it weigh 1.
        key: what is asked for, the number in digits.
        depth: share of the filler that stands before that key, 0 to 1.
        answer: the tokens of the answer.
    """

    example: Example
    key: str
    depth: float
    answer: slice


class PasskeyTexts:
    """Endless PassKey texts, each made from (seed, number) alone; a source of examples.

    One key makes the text of figure 10. Of several keys each belongs to a name, and one or more are
    asked for.

    Args:
        tokenizer: a tokenizer of transformers.
        lengths: in tokens, the answer and the tokenizer's start tokens among them. One: always that;
            two: the shortest and the longest; more: one of these. A text that has no room for its keys
            and the question is as long as they are, with no filler.
        steps_of: with two lengths, those between that are multiples of this.
        digits: of a key; its first is not 0.
        keys: how many there are.
        where: "start": all keys before the filler; "anywhere": each behind a random one of its
            sentences, or before the first; a number from 0 to 1: the one asked for at that depth of
            the filler, the others anywhere.
        filler: sentences, or texts to cut sentences from. The default ones come again and again in
            their order; others from a random place on, as prose. Sentences with a number as long as a
            key are left out, since they might tell another key. What `prose` made of them once may
            serve several sources.
        filler_share: how much all tokens that are not of an answer count, together, as a share of
            what the answers do.
        asked_prose: so many tokens before the question are asked too (`FamConfig.fam_seen`), and of
            what is no answer these and the question are all that counts.
        asked: how many of the keys are asked for, one question behind the other. `where` and what is
            said of a sample are about the last of them.
        within: all keys stand in the first so many tokens, and `where` is about those; 0: anywhere.
        chat: questions are put in the model's chat template, as `fam read --ask` does, and each
            answer is a sentence and the end of the turn; of several they make one conversation.
        seed: of the draws.

    Raises:
        UserError: no text can be made like this.

    Attributes:
        introduction: what a text begins with.
    """

    introduction = INTRODUCTION

    def __init__(
        self,
        tokenizer: Any,
        *,
        lengths: Sequence[int],
        steps_of: int = 1,
        digits: int = 5,
        keys: int = 1,
        where: str | float = "start",
        filler: Sequence[str] | Haystack = DEFAULT_SENTENCES,
        filler_share: float = 0.0,
        asked_prose: int = 0,
        asked: int = 1,
        within: int = 0,
        chat: bool = False,
        seed: int = 0,
    ) -> None:
        _check(lengths, digits, keys, where, asked)
        self.lengths = _choices(lengths, steps_of)
        self.digits = digits
        self.keys = keys
        self.where = where
        self.filler_share = filler_share
        self.asked_prose = asked_prose
        self.asked = asked
        self.within = within
        self._turns = Turns(tokenizer) if chat else None
        self.seed = seed
        self._tokenizer = tokenizer
        self._encoder = Encoder(tokenizer)
        numbers = {tuple(self._encoder.encode(digit, first=True)) for digit in "0123456789"}
        if len(numbers - {()}) < 10:
            raise UserError("This tokenizer has no tokens for digits, so it cannot say a pass key.")
        self._beginning = list(start_tokens(tokenizer))
        if self.introduction:
            self._beginning += self._encoder.encode(self.introduction, first=True)
        if not isinstance(filler, Haystack):
            filler = prose(tokenizer, filler, digits)
        self._filler = filler

    @property
    def bare_length(self) -> int:
        """Tokens of a text without filler, to within a token or two a key."""
        return len(self.sample(random.Random(0), 0).example.ids)

    def draw(self, number: int) -> Example:
        """The `number`-th example, a pure function of seed and number."""
        return self.example(random.Random(f"{self.seed}/passkey/{number}"))

    def example(self, rng: random.Random, length: int | None = None) -> Example:
        """A text of `length` tokens, or of one of the lengths."""
        return self.sample(rng, length).example

    def sample(self, rng: random.Random, length: int | None = None) -> PasskeySample:
        """A text of `length` tokens, or of one of the lengths, with what is known about it."""
        length = rng.choice(self.lengths) if length is None else length
        things = self._things(rng)
        asked = rng.randrange(self.keys)
        told = [self._encoder.encode(f" {thing.sentence}", first=False) for thing in things]
        before = rng.sample([k for k in range(self.keys) if k != asked], self.asked - 1)
        questions = self._questions([things[k] for k in (*before, asked)])
        fixed = sum(map(len, (self._beginning, *told, *itertools.chain(*questions))))
        sentences = self._take(rng, max(0, length - fixed))
        # Tokens of filler up to each border between sentences.
        borders = [0, *itertools.accumulate(map(len, sentences))]
        places = self._places(rng, self._within(borders, told), asked)
        ids, ends = list(self._beginning), [0] * self.keys
        for border in range(len(borders)):
            ids += sentences[border - 1] if border else []
            for key in _shuffled(rng, [k for k, place in enumerate(places) if place == border]):
                ids += told[key]
                ends[key] = len(ids)
        counted = sum(len(answer) for _, answer in questions)
        asked_from = max(0, len(ids) - self.asked_prose)
        # The first token that is asked is itself predicted by one that is not.
        passed_over = min(asked_from + 1, len(ids)) if self.asked_prose and asked_from else 0
        others = len(ids) - passed_over + sum(len(question) for question, _ in questions)
        each = self.filler_share * counted / others
        weights = [0.0] * passed_over + [each] * (len(ids) - passed_over)
        question_from = len(ids)
        for question, answer in questions:
            ids += question + answer
            weights += [each] * len(question) + [1.0] * len(answer)
        return PasskeySample(
            example=Example(
                tuple(ids),
                tuple(weights),
                asked_from,
                max(ends[k] for k in (*before, asked)),
                question_from,
            ),
            key=things[asked].key,
            depth=borders[places[asked]] / max(1, borders[-1]),
            answer=slice(len(ids) - len(answer), len(ids)),
        )

    def prose(self, rng: random.Random, tokens: int) -> list[int]:
        """So many tokens of the filler alone."""
        return list(itertools.chain(*self._take(rng, tokens)))

    # ---- parts

    def _things(self, rng: random.Random) -> list[Told]:
        """Different keys, each with a name of its own unless there is one alone."""
        found: dict[str, None] = {}
        while len(found) < self.keys:
            found[str(rng.randrange(10 ** (self.digits - 1), 10**self.digits))] = None
        names: list[str | None] = [None] if self.keys == 1 else [*rng.sample(NAMES, self.keys)]
        return [pass_key(key, name) for name, key in zip(names, found, strict=True)]

    def _questions(self, things: Sequence[Told]) -> list[tuple[list[int], list[int]]]:
        """Token ids of each question and of its answer, in the order in which they are asked."""
        if self._turns is not None:
            return self._conversation(self._turns, things)
        made = []
        for place, thing in enumerate(things):
            asked = f"{thing.question} {thing.stem}"
            # Only the last answer is left open: the text ends with its key.
            end = "" if place == len(things) - 1 else "."
            _, answer = continued(self._tokenizer, asked, f" {thing.key}{end}")
            made.append((self._encoder.encode(f" {asked}", first=False), answer))
        return made

    def _conversation(
        self, turns: Turns, things: Sequence[Told]
    ) -> list[tuple[list[int], list[int]]]:
        """The same in the model's chat template."""
        made, closing = [], turns.closing()
        for place, thing in enumerate(things):
            opening = turns.opening(thing.question, first=not place, fresh=False)
            said = self._encoder.encode(f"{thing.stem} {thing.key}.", first=True)
            # The token that ends a turn is part of the answer; what stands behind it is not.
            made.append(([*(closing[1:] if place else ()), *opening], said + closing[:1]))
        return made

    def _take(self, rng: random.Random, budget: int) -> list[list[int]]:
        """Sentences of `budget` tokens together; the last is cut if it must be."""
        start = 0 if self._filler.texts == DEFAULT_SENTENCES else rng.randrange(len(self._filler))
        return self._filler.take(start, budget)

    def _within(self, borders: list[int], told: Sequence[Sequence[int]]) -> list[int]:
        """The borders at which all keys may stand."""
        if not self.within:
            return borders
        room = self.within - len(self._beginning) - sum(map(len, told))
        return borders[: max(1, bisect.bisect_right(borders, room))]

    def _places(self, rng: random.Random, borders: list[int], asked: int) -> list[int]:
        """At which border between sentences each key stands."""
        if self.where == "start":
            return [0] * self.keys
        places = [rng.randrange(len(borders)) for _ in range(self.keys)]
        if not isinstance(self.where, str):
            wanted = self.where * borders[-1]
            right = bisect.bisect_left(borders, wanted)
            left = max(0, right - 1)
            nearer = wanted - borders[left] < borders[right] - wanted
            places[asked] = left if nearer else right
        return places


def prose(tokenizer: Any, texts: Sequence[str], digits: int = 5) -> Haystack:
    """Sentences to hide keys of so many digits in: a number as long as a key might tell another."""
    number = re.compile(rf"\d{{{digits}}}")
    return Haystack(Encoder(tokenizer), texts, number, f"without a number of {digits} digits")


def pass_key(key: str, name: str | None = None) -> Told:
    """How a key, maybe someone's, is told and asked for (figure 10)."""
    what = "pass key" if name is None else f"pass key of {name}"
    return Told(
        sentence=f"The {what} is {key}. Remember it. {key} is the {what}.",
        question=f"What is the {what}?",
        stem=f"The {what} is",
        key=key,
    )


def _shuffled(rng: random.Random, items: list[int]) -> list[int]:
    rng.shuffle(items)
    return items


def _choices(lengths: Sequence[int], steps_of: int) -> Sequence[int]:
    if len(lengths) != 2:
        return tuple(lengths)
    shortest, longest = lengths
    multiples = range(-(-shortest // steps_of) * steps_of, longest + 1, steps_of)
    if not multiples:
        raise UserError(
            f"No multiple of {steps_of:,} lies between the lengths {shortest:,} and {longest:,}."
        )
    return multiples


def _check(lengths: Sequence[int], digits: int, keys: int, where: str | float, asked: int) -> None:
    if not lengths or min(lengths) < 1:
        raise UserError(f"Lengths of PassKey texts are at least one token, not {list(lengths)}.")
    if digits < 1:
        raise UserError(f"A pass key has at least one digit, not {digits}.")
    most = min(len(NAMES), 9 * 10 ** (digits - 1))
    if not 1 <= keys <= most:
        raise UserError(f"A text has 1 to {most} pass keys of {digits} digits, not {keys}.")
    if not 1 <= asked <= keys:
        raise UserError(f"Of {keys} pass keys 1 to {keys} can be asked for, not {asked}.")
    good = where in ("start", "anywhere") if isinstance(where, str) else 0 <= where <= 1
    if not good:
        raise UserError(
            f"A pass key stands at the start, anywhere, or at a depth of 0 to 1, not {where}."
        )
