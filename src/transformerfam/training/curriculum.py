"""Short texts first, longer ones once their answers are said right.

A memory that holds over a few blocks learns to hold over a few more; of one that holds nothing yet,
long texts teach nothing, and one that is thrown into texts of four times its reach is unlearnt within
ten steps (LOG.md, 2026-11-26). Recurrent memories have been trained like this before, by their number
of segments (RMT, arXiv 2304.11062).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from transformerfam.data.rows import Mixture, Source
from transformerfam.training.inputs import PasskeySource
from transformerfam.training.recipe import Recipe

_TEXTS = 64  # the newest texts, by which it is judged
_LONGER = 1.5


class Curriculum:
    """How long texts that are made as needed may be now.

    Args:
        recipe: `data.begin_length`, `data.grow_at`, and the longest length of each source, or of what is
            put together of its texts and other blocks.
        source: what is read; texts that are made as needed in it obey.

    Attributes:
        longest: tokens; `data.length` where nothing grows.
    """

    def __init__(self, recipe: Recipe, source: Source) -> None:
        self._grow_at = recipe.data.grow_at
        self._grows = recipe.data.begin_length > 0
        sources: Sequence[Source] = source.sources if isinstance(source, Mixture) else [source]
        self._made = [s for s in sources if isinstance(s, PasskeySource)]
        shortest = min((min(s.texts.lengths) for s in self._made), default=0)
        self._limit = max((max(s.texts.lengths) for s in self._made), default=recipe.data.length)
        if recipe.replay.blocks and recipe.fam.has_feedback:
            lengths = [
                replayed_length(before, behind, recipe.fam.block_size)
                for before in recipe.replay.before
                for behind in recipe.replay.behind
            ]
            shortest, self._limit = min(lengths), max(lengths)
        self._right: deque[tuple[int, int]] = deque()
        self.longest = recipe.data.length
        if self._grows:
            self._set(max(recipe.data.begin_length, shortest))

    def state(self) -> dict[str, Any]:
        """Where it stands, fit for JSON."""
        return {"longest": self.longest, "right": list(self._right)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from a state of a curriculum that was made in the same way."""
        if self._grows and state:
            self._set(state["longest"])
            self._right.extend((right, texts) for right, texts in state["right"])

    def tell(self, right: int, texts: int) -> bool:
        """Of a step: how many of its texts had all answers right. Returns whether texts grow now."""
        if not self._grows:
            return False
        self._right.append((right, texts))
        while sum(n for _, n in self._right) - self._right[0][1] >= _TEXTS:
            self._right.popleft()
        seen = sum(n for _, n in self._right)
        grows = (
            self.longest < self._limit
            and seen >= _TEXTS
            and sum(r for r, _ in self._right) >= self._grow_at * seen
        )
        if grows:
            self._set(max(self.longest + 1, int(self.longest * _LONGER)))
        return grows

    def _set(self, longest: int) -> None:
        """Texts of so many tokens at most, or as many as the sources have."""
        self.longest = min(longest, self._limit)
        self._right.clear()
        for source in self._made:
            source.longest = self.longest


def replayed_length(before: int, behind: int, block_size: int) -> int:
    """Tokens of a text with so many blocks around its own (`replay`), and that in which it is asked."""
    return (before + behind + 2) * block_size


def answers_said(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """(2, R) bool: which rows have an answer (weight 1) here, and which of them say one wrong.

    Args:
        logits: (R, T, V).
        targets, weights: (R, T).
    """
    counts = weights == 1
    wrong = (logits.argmax(-1) != targets) & counts
    return torch.stack([counts.any(1), wrong.any(1)])
