"""Questions put to a model, and what comes of them as numbers.

Every question is read as one stream with one `Memory`, in chunks: it may be as long as one likes, and
costs the memory of a window. Five kinds cover all tasks:

    Recite   say exactly these tokens        {"exact": 0 or 1, "tokens": share of them}
    Choose   which of these is the likeliest {"accuracy": 0 or 1, "accuracy_norm": 0 or 1}
    Fit      after which text is this        {"accuracy": 0 or 1}
    Say      speak freely, and be scored     whatever the task's score gives
    Follow   predict a whole text            sums by place in the text

Knows models and memories; nothing of tasks, files and results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from transformerfam.memory import Memory
from transformerfam.report import bits_per_byte
from transformerfam.side_by_side import absorb_rows, hits_of_rows, score_each
from transformerfam.stream import absorb, generate, read

Metrics = dict[str, Any]


class Question(Protocol):
    """Something to put to a model."""

    @property
    def tokens(self) -> int:
        """Most tokens of its stream: what it reads and what it may say."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """What is worth knowing about it in the results, such as where a key stands."""

    def ask(self, model: Any) -> Metrics:
        """Read, answer, score. No gradients."""


@dataclass(frozen=True)
class Recite:
    """Say exactly some tokens after a text: greedy decoding, without decoding.

    Greedy decoding says exactly the answer if every token of it is the likeliest after the text and
    the answer's tokens before it, so one pass over both tells.

    Attributes:
        ids: what is asked, a text before it or not.
        answer: tokens to say.
        text: what is read before `ids`, see `_behind`.
    """

    ids: Sequence[int]
    answer: Sequence[int]
    facts: Mapping[str, Any] = field(default_factory=dict)
    text: Sequence[int] = ()

    @property
    def tokens(self) -> int:
        """See `Question`."""
        return len(self.text) + len(self.ids) + len(self.answer)

    def ask(self, model: Any) -> Metrics:
        """`exact`: all of it right. `tokens`: share of its tokens that are the likeliest."""
        memory = _behind(model, self.text, self.ids)
        hits = torch.cat([chunk.hits for chunk in read(model, self.answer, memory)])
        return _recited(hits)


@dataclass(frozen=True)
class Choose:
    """Which of several continuations is the likeliest.

    Attributes:
        ids: what is asked, a text before it or not.
        choices: tokens of each continuation.
        gold: index of the right one.
        lengths: length of each for `accuracy_norm`, mostly in characters; empty: in tokens.
        text: what is read before `ids`, see `_behind`.
    """

    ids: Sequence[int]
    choices: Sequence[Sequence[int]]
    gold: int
    lengths: Sequence[int] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    text: Sequence[int] = ()

    @property
    def tokens(self) -> int:
        """See `Question`."""
        return len(self.text) + len(self.ids) + max(map(len, self.choices))

    def ask(self, model: Any) -> Metrics:
        """`accuracy`: by log p. `accuracy_norm`: by log p over length."""
        memory = _behind(model, self.text, self.ids)
        scores = [-each.nats for each in score_each(model, self.choices, memory)]
        lengths = self.lengths or [len(ids) for ids in self.choices]
        normed = [score / length for score, length in zip(scores, lengths, strict=True)]
        return {
            "accuracy": float(scores.index(max(scores)) == self.gold),
            "accuracy_norm": float(normed.index(max(normed)) == self.gold),
        }


@dataclass(frozen=True)
class Fit:
    """After which of several texts a continuation is the likeliest: partial evaluation.

    For Winograd schemas: who of two is meant shows in what follows (GPT-3, section 3.4).

    Attributes:
        contexts: tokens of each text.
        continuation: tokens that follow.
        gold: index of the right text.
    """

    contexts: Sequence[Sequence[int]]
    continuation: Sequence[int]
    gold: int
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """See `Question`."""
        return max(map(len, self.contexts)) + len(self.continuation)

    def ask(self, model: Any) -> Metrics:
        """`accuracy`: by log p of the continuation alone."""
        memories = (_behind(model, (), ids) for ids in self.contexts)
        scores = [-sum(c.nats for c in read(model, self.continuation, m)) for m in memories]
        return {"accuracy": float(scores.index(max(scores)) == self.gold)}


@dataclass(frozen=True)
class Say:
    """Speak freely after a text; the task scores what was said.

    Attributes:
        ids: what is asked, a text before it or not.
        most: most tokens to say.
        score: text that was said -> metrics.
        decode: token ids -> text.
        stop: token ids that end the answer.
        text: what is read before `ids`, see `_behind`.
    """

    ids: Sequence[int]
    most: int
    score: Callable[[str], Metrics]
    decode: Callable[[list[int]], str]
    stop: Sequence[int] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    text: Sequence[int] = ()

    @property
    def tokens(self) -> int:
        """See `Question`."""
        return len(self.text) + len(self.ids) + self.most

    def ask(self, model: Any) -> Metrics:
        """What `score` gives, and the text itself as `said`."""
        memory = absorb(model, self.text)
        ids = generate(model, self.ids, memory, max_new_tokens=self.most, stop=self.stop)
        said = self.decode(list(ids))
        return {**self.score(said), "said": said}


@dataclass(frozen=True)
class Follow:
    """Predict every token of a text but its first.

    Attributes:
        ids: the text.
        nbytes: bytes of each part, for bits per byte.
        edges: first token of each part by which sums are kept, in ascending order from 0.
    """

    ids: Sequence[int]
    nbytes: Sequence[float]
    edges: Sequence[int]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """See `Question`."""
        return len(self.ids)

    def ask(self, model: Any) -> Metrics:
        """Over all `accuracy`, `loss` and `bits_per_byte`; by part sums.

        By part `scored` tokens, their `nats`, how many were `right`, and its `bytes`; `edges` are as
        given. A text of one token has nothing to score, and is 0 in all.
        """
        parts = [0] * len(self.edges), [0.0] * len(self.edges), [0] * len(self.edges)
        scored, nats, right = parts
        edges = torch.tensor(self.edges)
        for chunk in read(model, self.ids):
            places = torch.arange(chunk.position - chunk.scored, chunk.position)
            part = torch.bucketize(places, edges, right=True) - 1
            for index in part.unique().tolist():
                here = part == index
                scored[index] += int(here.sum())
                nats[index] += float(chunk.losses[here].sum(dtype=torch.float64))
                right[index] += int(chunk.hits[here].sum())
        count = max(1, sum(scored))
        return {
            "accuracy": sum(right) / count,
            "loss": sum(nats) / count,
            "bits_per_byte": bits_per_byte(sum(nats), sum(self.nbytes)),
            "edges": list(self.edges),
            "bytes": [round(n, 1) for n in self.nbytes],
            "scored": scored,
            "nats": nats,
            "right": right,
        }


def ask_together(model: Any, questions: Sequence[Question]) -> list[Metrics]:
    """What each of several questions brings; such as are as long as each other are read side by side.

    Those are `Recite` alone. A GPU mostly waits while it reads one stream of a small model.
    """
    found: dict[int, Metrics] = {}
    recited: dict[tuple[int, int, int], dict[int, Recite]] = {}
    for number, q in enumerate(questions):
        if isinstance(q, Recite):
            recited.setdefault((len(q.text), len(q.ids), len(q.answer)), {})[number] = q
        else:
            found[number] = q.ask(model)
    for alike in recited.values():
        found.update(zip(alike, _recite_together(model, list(alike.values())), strict=True))
    return [found[number] for number in range(len(questions))]


def _recite_together(model: Any, questions: Sequence[Recite]) -> list[Metrics]:
    if len(questions) == 1:
        return [questions[0].ask(model)]
    memory = absorb_rows(model, [question.text for question in questions])
    said = [[*question.ids, *question.answer] for question in questions]
    with memory.asked():
        hits = hits_of_rows(model, said, memory, last=len(questions[0].answer))
    return [_recited(row) for row in hits]


def _recited(hits: Tensor) -> Metrics:
    return {"exact": float(hits.all()), "tokens": float(hits.float().mean())}


def _behind(model: Any, text: Sequence[int], ids: Sequence[int]) -> Memory:
    """A memory that has read `text` and then `ids`, and sees FAM from `ids` on.

    It matters where tokens see FAM only if they are asked (`FamConfig.fam_seen`).
    """
    memory = absorb(model, text)
    memory.asking = True
    return absorb(model, ids, memory)
