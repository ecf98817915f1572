"""Prose to hide things in: sentences, tokenised once, as many tokens of them as are wanted.

Knows a tokenizer, no model and no files.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator, Sequence

from transformerfam.errors import UserError
from transformerfam.text import Encoder

_SENTENCE = re.compile(r".+?(?:[.!?…]+[\"'”’»)\]]*(?=\s|$)|[。！？]+[”’」』）]*|$)")
_AHEAD = 64  # sentences that are tokenised together
_PARAGRAPH = re.compile(r"\n\s*\n")


class Haystack:
    """Sentences of some texts, each tokenised when it is first needed.

    Args:
        encoder: of the tokenizer.
        texts: where the sentences come from.
        without: leave out sentences that hold this.
        kind: which sentences are left, for a message, such as "without a number".

    Attributes:
        texts: where the sentences come from.

    Raises:
        UserError: there is no sentence, or the tokenizer has no tokens for them.
    """

    def __init__(
        self,
        encoder: Encoder,
        texts: Sequence[str],
        without: re.Pattern[str] | None = None,
        kind: str = "that can be used",
    ) -> None:
        self.texts = (texts,) if isinstance(texts, str) else tuple(texts)
        self._sentences = [
            s
            for t in self.texts
            for s in sentences_of(t)
            if without is None or not without.search(s)
        ]
        if not self._sentences:
            raise UserError(f"The filler has no sentence {kind}; give more text.")
        self._encoder = encoder
        self._ids: dict[int, list[int]] = {}
        if not any(self._encode(n) for n in range(len(self._sentences))):
            raise UserError("This tokenizer has no tokens for the filler.")

    def __len__(self) -> int:
        return len(self._sentences)

    def take(self, start: int, budget: int) -> list[list[int]]:
        """Sentences of `budget` tokens together from one on; the last is cut if it must be.

        Behind the last sentence the first comes again.
        """
        taken: list[list[int]] = []
        sentences = self._from(start)
        while budget > 0:  # nothing is tokenised that is not taken
            ids = next(sentences)
            taken.append(ids[:budget])
            budget -= len(ids)
        return taken

    def hide(
        self, rng: random.Random, needles: Sequence[Sequence[int]], budget: int
    ) -> tuple[list[int], list[float]]:
        """`needles`, in their order, between sentences of a random part of the prose.

        Args:
            rng: chooses the part and the places.
            needles: token ids of what is hidden.
            budget: tokens of all together; without room for prose the needles stand alone.

        Returns:
            Token ids, and for each needle the share of the prose that stands before it.
        """
        room = max(0, budget - sum(map(len, needles)))
        sentences = self.take(rng.randrange(len(self)), room)
        places = sorted(rng.randrange(len(sentences) + 1) for _ in needles)
        ids: list[int] = []
        depths, prose, done = [], 0, 0
        for border in range(len(sentences) + 1):
            while done < len(needles) and places[done] == border:
                ids += needles[done]
                depths.append(prose / max(1, room))
                done += 1
            if border < len(sentences):
                ids += sentences[border]
                prose += len(sentences[border])
        return ids, depths

    # ---- parts

    def _from(self, start: int) -> Iterator[list[int]]:
        """Token ids of the sentences from one on, and again from the first, without end."""
        for n in itertools.count(start):
            if ids := self._encode(n % len(self)):
                yield ids

    def _encode(self, n: int) -> list[int]:
        if n not in self._ids:
            # Prose is read in its order: those behind it are wanted next.
            ahead = [m for m in range(n, min(n + _AHEAD, len(self))) if m not in self._ids]
            found = self._encoder.encode_all([f" {self._sentences[m]}" for m in ahead])
            self._ids.update(zip(ahead, found, strict=True))
        return self._ids[n]


def sentences_of(text: str) -> list[str]:
    """The sentences of a text, each on one line; the end of a paragraph ends a sentence too."""
    paragraphs = (" ".join(paragraph.split()) for paragraph in _PARAGRAPH.split(text))
    return [s.strip() for paragraph in paragraphs for s in _SENTENCE.findall(paragraph)]
