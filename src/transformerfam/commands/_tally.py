"""What `fam read` has read: how much, how well, and by what name the same text is known again."""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformerfam import report

if TYPE_CHECKING:
    from transformerfam.stream import Chunk


@dataclass
class Tally:
    """Sums over the chunks read so far."""

    tokens: int = 0
    scored: int = 0
    nats: float = 0.0
    last: float | None = None
    seconds: float = 0.0
    resident: int | None = None

    def add(self, chunk: Chunk) -> None:
        """Count one more chunk."""
        self.tokens += chunk.tokens
        self.scored += chunk.scored
        self.nats += chunk.nats
        self.last = chunk.loss
        resident = report.resident_bytes()
        self.resident = max(self.resident or 0, resident) if resident is not None else None

    @property
    def loss(self) -> float | None:
        """Mean over all scored tokens."""
        return self.nats / self.scored if self.scored else None

    @property
    def perplexity(self) -> float:
        """Its exponential."""
        return math.nan if self.loss is None else report.perplexity(self.loss)

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds if self.seconds else 0.0


class TextRead:
    """A fingerprint of the tokens of a text as far as it was read.

    The last of them does not count: where a text was broken off within a word it is another one.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._last: list[int] = []

    def add(self, tokens: Sequence[int]) -> None:
        """The next ones."""
        known = [*self._last, *tokens]
        self._digest.update(array("q", known[:-1]).tobytes())
        self._last = known[-1:]

    def fingerprint(self) -> str:
        """Of all so far."""
        return self._digest.hexdigest()
