"""Feedback memory segments (FM, table 9): what a layer sees of past blocks are its own outputs.

    K_τ,  V_τ  = KV(PreLN(I_τ))        of the block being read, as in TransformerBSWA
    K'_τ, V'_τ = KV(PreLN(O_τ))        of the same layer, by the same weights
    token t of block τ attends  [ K'_{τ-M} .. K'_{τ-1} ; K_τ up to t ]

K'_τ stands at the positions of block τ's tokens. So a layer is a recurrence over blocks: O_τ is
needed before block τ + 1 can attend. O_τ comes from re-entrance, as FAM does: the layer is run once
more on the block's rows, with its attention given. Knows one layer; nothing of families.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from transformerfam.attention import AttentionMask, AttentionStyle
from transformerfam.blocks import TokenPass
from transformerfam.feedback import projections
from transformerfam.indexing import place
from transformerfam.layer_memory import KeyValue, LayerMemory
from transformerfam.rotary import rotate


class FeedbackSegmentsPass(TokenPass):
    """One layer over the new tokens of a call, block after block.

    The layer's memory holds K' and V' in its slots of the past, and as `extra` those of the outputs
    of the block being read: `output_keys`, `output_values`, (R, Hk, B, D) and (R, Hk, B, Dv).
    Sinks keep the keys of their inputs: they are what a pretrained model looks at for nothing.
    """

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, style: AttentionStyle) -> Tensor:
        """An `AttentionPass`: (R, H, T, D) queries to (R, T, H, Dv)."""
        before, anchors, new = self._arrive(KeyValue(key, value))
        query = self._rotated(query)
        plan, P = self.plan, self.plan.past_length
        past = before.tokens.cut(0, P)
        own = before.tokens.cut(P + self.anchors, None).zip(new, self._grid)
        unfinished = KeyValue(before.extra["output_keys"], before.extra["output_values"])
        queries, hidden = self._to_grid(query), self._to_grid(self.hidden[:, None])
        masks = self._masks(style.sliding_window, query)
        read: list[Tensor] = []
        segments = [past]
        for j in range(plan.blocks):
            seen = self._seen(past, anchors, own, j)
            read.append(
                self.call.attend(
                    self.layer, None, queries[:, j], seen.keys, seen.values, masks[j], style
                )
            )
            if j + 1 < plan.blocks or self.call.keep:
                made = self._project_output(hidden[:, j, 0], read[j], j)
                segments.append(made.zip(unfinished, partial(self._placed, j)))
                past = KeyValue.cat([past, segments[-1]]).cut(self.config.block_size, None)
        if self.call.keep:
            after = self._state(KeyValue.cat(segments), own, anchors, before)
            self.call.leave(self.layer, after)
        return self._from_grid(torch.stack(read, 1))

    def _empty(self, new: KeyValue) -> LayerMemory:
        empty = super()._empty(new)
        B = self.config.block_size
        keys, values = (x.new_zeros(*x.shape[:2], B, x.shape[3]) for x in (new.keys, new.values))
        return replace(empty, extra={"output_keys": keys, "output_values": values})

    # ---- what block j sees

    def _seen(self, past: KeyValue, anchors: KeyValue, own: KeyValue, j: int) -> KeyValue:
        """[ K' of the past | anchors | own block ] for block j, (R, Hk, keys, D)."""
        plan, B = self.plan, self.config.block_size
        tables = self._tables(
            f"anchors of block {j}", lambda: self.call.anchor_positions(j), own.keys
        )
        anchors = KeyValue(rotate(anchors.keys, tables), anchors.values)
        before = KeyValue.cat([past.cut(plan.past_length - plan.past_used, None), anchors])
        if self.config.stop_gradient:
            before = before.map(Tensor.detach)
        return KeyValue.cat([before, own.cut(j * B, j * B + plan.own_used)])

    def _masks(self, window: int | None, like: Tensor) -> list[AttentionMask]:
        """What the queries of each block see."""
        nb = self.plan.blocks

        def make() -> list[AttentionMask]:
            seen = self.plan.visible(window).to(like.device)
            if len(seen) == 1:
                return [AttentionMask(seen)] * nb
            return [AttentionMask(each) for each in seen.unflatten(0, (-1, nb)).unbind(1)]

        masks: list[AttentionMask] = self.call.once(("masks", window, like.device), make)
        return masks

    # ---- what block j leaves

    def _project_output(self, hidden: Tensor, attended: Tensor, j: int) -> KeyValue:
        """K' (rotated) and V' of the new tokens of block j, from their input and attention.

        Shapes: (R, L, d) and (R, H, L, Dv) to (R, Hk, L, D).
        """
        output = self.reenter(hidden, lambda *_: attended.transpose(1, 2))
        _, key, value = projections(self.reenter, output)
        places = self._tables(
            f"block {j}", lambda: self.call.in_frame(self.plan.grid_slots[0][:, j]), key
        )
        return KeyValue(rotate(key, places), value)

    def _placed(self, j: int, made: Tensor, unfinished: Tensor) -> Tensor:
        """(R, Hk, B, D): the new tokens' rows of block j in their slots, beside those from before."""
        plan, B = self.plan, self.config.block_size
        if plan.whole_blocks:
            return made

        def slots() -> Tensor:
            place_of, taken = (grid[:, j] for grid in plan.grid_slots)
            return (place_of - j * B).masked_fill(~taken, B)  # one slot more takes what is no token

        index = self.call.index(f"slots of block {j}", slots, made)
        kept = torch.zeros_like(unfinished) if j else unfinished
        return place(pad(kept, (0, 0, 0, 1)), index, made)[:, :, :-1]

    def _state(
        self, segments: KeyValue, own: KeyValue, anchors: KeyValue, before: LayerMemory
    ) -> LayerMemory:
        """The memory after the call, relative to each row's new current block.

        Args:
            segments: K' and V' of the past and of the call's blocks, (R, Hk, P + nb·B, D).
            own: K and V of the call's blocks, (R, Hk, nb·B, D).
        """
        P, B = self.plan.past_length, self.config.block_size

        def kept(made: Tensor, read: Tensor, anchors: Tensor) -> Tensor:
            """[ past | anchors | own block | outputs of the own block ]"""
            # Zeros on the right for a block that is not begun.
            made = self._cut(pad(made, (0, 0, 0, B)), 0, B, P + B)
            read = self._cut(pad(read, (0, 0, 0, B)), 0, B, B)
            return torch.cat([made[:, :, :P], anchors, read, made[:, :, P:]], dim=2)

        keys = kept(segments.keys, own.keys, anchors.keys)
        keys = rotate(keys, self._tables("moved", self.call.frame_shift, keys))
        values = kept(segments.values, own.values, anchors.values)
        slots = KeyValue(self._with_anchors(keys[:, :, :-B], anchors.keys, True), values[:, :, :-B])
        extra = {"output_keys": keys[:, :, -B:], "output_values": values[:, :, -B:]}
        return self._after(slots, anchors, before.fam, extra)
