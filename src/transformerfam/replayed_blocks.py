"""One layer over blocks whose keys and values are known: its memory goes on, and no token is computed.

See `replay` for what that is good for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from transformerfam.attention import AttentionStyle
from transformerfam.blocks import TokenPass
from transformerfam.call import ReadBefore
from transformerfam.feedback import Recurrence, fam_keys
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
        if self.call.keep:
            self._keep(given, block)
        elif self._has_fam_alone:
            self._led(block, self._beginning(), {})
        else:
            before = self._before(self._of_each(block(0)))
            self._led(block, before.fam, before.extra)
        return value.new_zeros(*query.shape[:3], value.shape[-1]).transpose(1, 2)

    def _led(
        self, block: Callable[[int], KeyValue], fam: Tensor, extra: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[int, KeyValue], Mapping[str, Tensor]]:
        """F after the blocks, its keys and values after each of them, and what else is kept."""
        recurrence = Recurrence(self.call, self.layer, self.reenter, block, extra, own_frames=True)
        fam, made = recurrence.run(fam)
        return fam, dict(enumerate(made)), recurrence.extra

    @property
    def _has_fam_alone(self) -> bool:
        """Whether F is all that streams bring, alike in all rows."""
        beginning = set(self.call.beginning) if self.call.first_fams is not None else {False}
        empty = self.call.before[self.layer] is None
        return empty and len(beginning) == 1 and not self.config.is_static

    def _beginning(self) -> Tensor:
        """F before the call, of streams that have no other memory: not even an empty one is made."""
        first = self.call.first_fams
        if first is None:
            return self.hidden.new_zeros(
                self.plan.rows, self.config.fam_length, self.hidden.shape[-1]
            )
        return first[self.layer].to(self.hidden).expand(self.plan.rows, -1, -1)

    def _keep(self, given: ReadBefore, block: Callable[[int], KeyValue]) -> None:
        """Leave the memory after the call."""
        before = self._before(self._of_each(block(0)))
        if given.fams is None:
            fam, made, extra = self._led(block, before.fam, before.extra)
        else:
            fam, made = self._known(given.fams, before)
            extra = before.extra
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
        self.call.leave(self.layer, self._after(after, anchors, fam, extra))

    def _known(
        self, fams: Callable[[int, int], Tensor], before: LayerMemory
    ) -> tuple[Tensor, dict[int, KeyValue]]:
        """F after the last block, and keys and values of the newest, where all of them are given."""
        n, k = self.plan.finished[0], self.config.previous_fams
        newest = {j: fams(self.layer, j) for j in range(max(0, n - k), n)}
        made = {
            j: fam_keys(self.call, self.layer, self.reenter, fam, j + 1, frame=j + 1)
            for j, fam in newest.items()
        }
        return newest.get(n - 1, before.fam), made

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

    def _fams(self, before: LayerMemory, made: Mapping[int, KeyValue]) -> list[KeyValue]:
        """The newest FAMs."""
        n, N = self.plan.finished[0], self.config.fam_length
        start = self.plan.past_length + self.anchors
        old = [before.tokens.cut(at, at + N) for at in range(start, start + self.fam_slots, N)]
        both = [
            *(self._turned(piece, n) for piece in old),
            *(self._turned(piece, n - 1 - j) for j, piece in made.items()),
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
