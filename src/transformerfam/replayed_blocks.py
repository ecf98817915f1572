"""One layer over blocks whose keys and values are known: its memory goes on, and no token is computed.

See `replay` for what that is good for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from transformerfam.attention import AttentionStyle
from transformerfam.blocks import TokenPass
from transformerfam.feedback import Recurrence
from transformerfam.layer_memory import KeyValue, LayerMemory
from transformerfam.rotary import rotate


class ReplayPass(TokenPass):
    """One layer over blocks whose keys and values are given: its memory goes on, and nobody asks.

    Blocks stay in their own frames, where FAM is turned to them. Only what is kept of them turns to the
    frame of the block behind them.
    """

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, style: AttentionStyle) -> Tensor:
        """An `AttentionPass` for rows that stand for nothing, and get nothing."""
        given = self.call.given
        assert given is not None
        block = cache(lambda j: given.block(self.layer, j))
        before = self._before(self._of_each(block(0)))
        recurrence = Recurrence(
            self.call, self.layer, self.reenter, block, before.extra, own_frames=True
        )
        fam, made = recurrence.run(before.fam)
        anchors = self._of_each(given.anchors(self.layer))
        parts = [
            *self._past(before, block),
            anchors,
            *self._fams(before, made),
            self._begun(before, block),
        ]
        tokens = KeyValue.cat([self._of_each(part) for part in parts])
        keys = self._with_anchors(tokens.keys, anchors.keys, moved=True)
        after = KeyValue(keys, tokens.values)
        self.call.leave(self.layer, self._after(after, anchors, fam, recurrence.extra))
        return value.new_zeros(*query.shape[:3], value.shape[-1]).transpose(1, 2)

    def _of_each(self, part: KeyValue) -> KeyValue:
        """What streams share, for each of them."""
        return part.map(lambda x: x.expand(self.plan.rows, -1, -1, -1))

    # ---- the memory after the call

    def _past(self, before: LayerMemory, block: Callable[[int], KeyValue]) -> list[KeyValue]:
        """The newest blocks that are whole, as many as the windows keep."""
        n, B = self.plan.finished[0], self.config.block_size
        kept = self.plan.past_length // B
        older = [before.tokens.cut(at * B, (at + 1) * B) for at in range(min(n, kept), kept)]
        newer = range(max(0, n - kept), n)
        return [
            *(self._turned(piece, n) for piece in older),
            *(self._turned(block(j), n - j) for j in newer),
        ]

    def _fams(self, before: LayerMemory, made: Sequence[KeyValue]) -> list[KeyValue]:
        """The newest FAMs."""
        n, N = self.plan.finished[0], self.config.fam_length
        start = self.plan.past_length + self.anchors
        old = [before.tokens.cut(at, at + N) for at in range(start, start + self.fam_slots, N)]
        both = [
            *(self._turned(piece, n) for piece in old),
            *(self._turned(piece, n - 1 - j) for j, piece in enumerate(made)),
        ]
        return both[len(both) - self.config.previous_fams :]

    def _begun(self, before: LayerMemory, block: Callable[[int], KeyValue]) -> KeyValue:
        """What is given of the block behind the last whole one, and free slots."""
        n, B = self.plan.finished[0], self.config.block_size
        begun = block(n) if n < self.plan.blocks else before.tokens.cut(0, 0)
        return begun.map(lambda x: pad(x, (0, 0, 0, B - x.shape[2])))

    def _turned(self, piece: KeyValue, blocks: int) -> KeyValue:
        """Keys in the frame that is so many blocks further on."""
        if not blocks:
            return piece
        moved = -float(blocks * self.config.block_size)
        tables = self._tables(
            f"{blocks} blocks on",
            lambda: torch.tensor([[moved]], dtype=torch.float64),
            piece.keys,
        )
        return KeyValue(rotate(piece.keys, tables), piece.values)
