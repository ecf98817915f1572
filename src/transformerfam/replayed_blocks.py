"""One layer over blocks whose keys and values are known: its memory goes on, and no token is computed.

See `replay` for what that is good for.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        before = self._before(block(0))
        fam, extra, made = before.fam, before.extra, list[KeyValue]()
        if self.config.has_feedback:
            recurrence = Recurrence(
                self.call, self.layer, self.reenter, block, extra, own_frames=True
            )
            fam, made = recurrence.run(fam)
            extra = recurrence.extra
        anchors = given.anchors(self.layer)
        blocks = [block(j) for j in range(self.plan.blocks)]
        tokens = self._led(before, blocks, anchors, made)
        self.call.after[self.layer] = self._after(tokens, anchors, fam, extra)
        return torch.zeros_like(query).transpose(1, 2)

    def _led(
        self,
        before: LayerMemory,
        blocks: Sequence[KeyValue],
        anchors: KeyValue,
        made: Sequence[KeyValue],
    ) -> KeyValue:
        """Keys and values of the memory after the call: [past | anchors | FAMs | begun block]."""
        P, A, N, B = (
            self.plan.past_length,
            self.anchors,
            self.config.fam_length,
            self.config.block_size,
        )
        n = self.plan.finished[0]
        old = before.tokens
        past = [(old.cut(at, at + B), 0) for at in range(0, P, B)]
        past += [(block, j) for j, block in enumerate(blocks[:n])]
        fams = [(old.cut(at, at + N), 0) for at in range(P + A, P + A + self.fam_slots, N)]
        fams += [(fam, j + 1) for j, fam in enumerate(made)]
        kept = [
            *(self._turned(piece, n - j) for piece, j in past[len(past) - P // B :]),
            anchors,
            *(
                self._turned(piece, n - j)
                for piece, j in fams[len(fams) - self.config.previous_fams :]
            ),
        ]
        begun = blocks[n] if n < len(blocks) else blocks[0].cut(0, 0)
        kept.append(begun.map(lambda x: pad(x, (0, 0, 0, B - x.shape[2]))))
        tokens = KeyValue.cat(kept)
        return KeyValue(self._with_anchors(tokens.keys, anchors.keys, moved=True), tokens.values)

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
