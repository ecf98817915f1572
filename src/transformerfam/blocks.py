"""Block attention of one layer over the new tokens of a call, all blocks at once (sections 2, 3).

A `TokenPass` stands in a layer's attention mask. It places the new keys in their blocks, has the
feedback recurrence run over the blocks that are complete, lets all queries attend, and leaves the
layer's next memory with the `Call`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from transformerfam.attention import AttentionMask, AttentionStyle
from transformerfam.auxiliary import diversity, reconstruction
from transformerfam.call import Call, Read, Reenter
from transformerfam.feedback import Recurrence, fam_keys
from transformerfam.indexing import columns_of, place, sliding, unsqueeze
from transformerfam.layer_memory import KeyValue, LayerMemory
from transformerfam.rotary import Tables, rotate


@dataclass(frozen=True)
class _Crossed:
    """What one layer has of a call that completes blocks.

    Attributes:
        tokens: keys and values of the past and of the call's blocks, (R, Hk, past window + nb·B, D).
        fams: those of FAM, of the blocks before the call and of its own, (R, Hk, (k + nb)·N, D).
        grid: those of the call's blocks alone.
        each, made: F and its keys and values after each block, see `Recurrence`.
    """

    tokens: KeyValue
    fams: KeyValue
    grid: KeyValue
    each: Sequence[Tensor]
    made: Sequence[KeyValue]


class TokenPass:
    """One layer over the new tokens of a call: (R, H, T, D) queries to (R, T, H, Dv).

    Keys keep the layout of `LayerMemory`: [ past (P) | anchors (A) | FAMs (k·N) | block (B) ].
    """

    def __init__(self, call: Call, layer: int, hidden: Tensor, reenter: Reenter) -> None:
        self.call = call
        self.layer = layer
        self.hidden = hidden
        self.reenter = reenter
        self.config = call.config
        self.plan = call.plan
        self.anchors = len(self.config.anchor_positions)
        self.fam_slots = self.config.previous_fams * self.config.fam_length

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, style: AttentionStyle) -> Tensor:
        """An `AttentionPass`: (R, H, T, D) queries to (R, T, H, Dv)."""
        before, anchors, new = self._arrive(KeyValue(key, value))
        query = self._rotated(query)
        if self.plan.blocks == 1 and not any(self.plan.finished):
            seen, after = self._within_block(before, new, anchors)
        else:
            crossed, after = self._over_blocks(before, new, anchors)
            self._add_losses(crossed, query, style)
            seen = self._windows(crossed.tokens, crossed.fams, anchors)
        self.call.leave(self.layer, after)
        return self._attend(query, seen, style)

    def _rotated(self, tokens: Tensor) -> Tensor:
        """Queries or keys (R, H, T, D) of the call's tokens, turned to where they stand."""
        return rotate(tokens, self._tables("tokens", self.call.token_positions, tokens))

    def _arrive(self, new: KeyValue) -> tuple[LayerMemory, KeyValue, KeyValue]:
        """The memory before the call, the anchors, and the call's keys, rotated, and values."""
        before = self._before(new)
        anchors = self._gather_anchors(before, new)
        new = KeyValue(self._rotated(new.keys), new.values)
        self.call.tell(Read(self.layer, anchors, new))
        return before, anchors, new

    def _before(self, new: KeyValue) -> LayerMemory:
        """The memory before the call, for tokens of such keys and values."""
        before = self.call.before[self.layer]
        if before is None:
            before = self._empty(new)
        if self.call.first_fams is not None:
            before = self._begin(before, self.call.first_fams[self.layer].to(self.hidden))
        return before.fit(new.keys, new.values, self.hidden)

    def _empty(self, new: KeyValue) -> LayerMemory:
        """The memory of a stream that has read nothing."""
        return LayerMemory.empty(self.config, new.keys, new.values, self.hidden)

    def _begin(self, before: LayerMemory, fam: Tensor) -> LayerMemory:
        """`before` with F_{-1}, of another stream or a prefix, in the rows that begin with it."""
        fam = fam.expand(self.plan.rows, -1, -1)
        newest = fam_keys(self.call, self.layer, self.reenter, fam, block=0)
        B, N = self.config.block_size, self.config.fam_length
        rows = self.call.index("beginning", lambda: torch.tensor(self.call.beginning), fam)

        def chosen(begun: Tensor, old: Tensor) -> Tensor:
            return torch.where(rows.view(-1, *(1,) * (old.dim() - 1)), begun, old)

        tokens = before.tokens.zip(
            newest,
            lambda old, new: torch.cat(
                [old[:, :, : -B - N], chosen(new, old[:, :, -B - N : -B]), old[:, :, -B:]], dim=2
            ),
        )
        extra = {name: chosen(fam, old) for name, old in before.extra.items()}
        fam = chosen(fam, before.fam)
        return LayerMemory(tokens.keys, tokens.values, before.anchor_keys, fam, extra=extra)

    # ---- no block is completed: the memory only fills up, and is itself what the queries see

    def _within_block(
        self, before: LayerMemory, new: KeyValue, anchors: KeyValue
    ) -> tuple[KeyValue, LayerMemory]:
        plan, P, A = self.plan, self.plan.past_length, self.anchors
        block = before.keys.shape[2] - self.config.block_size
        # Slots past the end of what was read are free: until the memory advances nobody looks at
        # them, so writing there in place loses nothing if the call fails.
        in_place = before.owned and not torch.is_grad_enabled()
        kept = before.tokens.zip(new, lambda old, fresh: self._fill(old, fresh, block, in_place))
        if anchors.keys is not before.anchor_keys:
            values = torch.cat(
                [kept.values[:, :, :P], anchors.values, kept.values[:, :, P + A :]], dim=2
            )
            kept = KeyValue(self._with_anchors(kept.keys, anchors.keys, moved=False), values)
        after = self._after(kept, anchors, before.fam, before.extra)
        seen = kept.cut(P - plan.past_used, block + plan.own_used)
        if self.fam_slots and not plan.shows_fam:
            before_fams = seen.cut(0, plan.past_used + A)
            seen = KeyValue.cat([before_fams, seen.cut(plan.past_used + A + self.fam_slots, None)])
        if self.config.stop_gradient:
            old = seen.cut(0, plan.past_used + A).map(lambda x: self._as_past(x[:, None])[:, 0])
            seen = KeyValue.cat([old, seen.cut(plan.past_used + A, None)])
        return seen, after

    def _fill(self, kept: Tensor, new: Tensor, block: int, in_place: bool) -> Tensor:
        """`kept` with the new tokens in the slots of the block being read."""
        if self.plan.aligned:
            start = block + self.plan.offsets[0]
            if in_place:
                kept[:, :, start : start + new.shape[2]] = new
                return kept
            return torch.cat([kept[:, :, :start], new, kept[:, :, start + new.shape[2] :]], dim=2)
        # One slot more takes the padding.
        slots = self.call.index("block slots", lambda: block + self.plan.slots, new)
        return place(pad(kept, (0, 0, 0, 1)), slots, new)[:, :, :-1]

    # ---- blocks are completed: advance FAM, and cut what the queries of each block see

    def _over_blocks(
        self, before: LayerMemory, new: KeyValue, anchors: KeyValue
    ) -> tuple[_Crossed, LayerMemory]:
        P, A, kN = self.plan.past_length, self.anchors, self.fam_slots
        past, fams = before.tokens.cut(0, P), before.tokens.cut(P + A, P + A + kN)
        grid = before.tokens.cut(P + A + kN, None).zip(new, self._grid)
        fam, extra, each, made = before.fam, before.extra, list[Tensor](), list[KeyValue]()
        if self.config.has_feedback:
            B = self.config.block_size
            recurrence = Recurrence(
                self.call,
                self.layer,
                self.reenter,
                lambda j: grid.cut(j * B, (j + 1) * B),
                extra,
            )
            fam, made = recurrence.run(fam)
            fams, extra, each = KeyValue.cat([fams, *made]), recurrence.extra, recurrence.each
        # Where everything is kept the past grows within the call: room for it on the left.
        past = past.map(lambda x: pad(x, (0, 0, self.plan.past_window - P, 0)))
        tokens = KeyValue.cat([past, grid])  # (R, Hk, past window + nb·B, D)
        after = self._carry(tokens, fams, anchors, fam, extra) if self.call.keep else before
        return _Crossed(tokens, fams, grid, each, made), after

    def _add_losses(self, crossed: _Crossed, query: Tensor, style: AttentionStyle) -> None:
        """Auxiliary losses (C.4, C.5) of the blocks that each row completes, if they are wanted."""
        losses, plan, B = self.call.losses, self.plan, self.config.block_size
        if losses is None or not crossed.each:
            return
        finished = torch.tensor(plan.finished, device=query.device)
        taken = self.call.index("queries taken", lambda: plan.query_columns[1], query)
        taken = taken.unflatten(1, (plan.blocks, -1))
        queries = self._to_grid(query)
        total = torch.zeros((), device=query.device)
        for j, (fam, keys) in enumerate(zip(crossed.each, crossed.made, strict=True)):
            found = torch.zeros_like(total)
            if losses.diversity:
                found = found + losses.diversity * diversity(fam)
            if losses.reconstruction:
                block = crossed.grid.cut(j * B, (j + 1) * B)
                found = found + losses.reconstruction * reconstruction(
                    queries[:, j], taken[:, j], keys, block, style, self.config.backend
                )
            total = total + torch.where(finished > j, found, 0)
        losses.add(self.layer, total / finished.clamp(min=1))

    def _grid(self, block: Tensor, new: Tensor) -> Tensor:
        """(R, H, nb·B, D): the block being read and the new tokens, each in its slot."""
        plan, size = self.plan, self.plan.blocks * self.config.block_size
        if plan.whole_blocks:
            return new
        if plan.aligned:
            grid = torch.cat([block[:, :, : plan.offsets[0]], new], dim=2)
            return pad(grid, (0, 0, 0, size - grid.shape[2]))
        # One slot more takes the padding.
        grid = pad(block, (0, 0, 0, size + 1 - block.shape[2]))
        slots = self.call.index("slots", lambda: plan.slots, new)
        return place(grid, slots, new)[:, :, :-1]

    def _windows(self, tokens: KeyValue, fams: KeyValue, anchors: KeyValue) -> KeyValue:
        """(R·nb, Hk, keys, D): for each block [past | anchors | fams | own block]."""
        nb = self.plan.blocks
        places = partial(self.call.anchor_positions_of_blocks, nb)
        tables = unsqueeze(
            self.call.tables(self.layer, "anchors of blocks", places, tokens.keys), 2
        )
        each = anchors.map(lambda x: x[:, None].expand(-1, nb, -1, -1, -1))
        each = KeyValue(rotate(each.keys, tables), each.values)
        return KeyValue(
            self._window(tokens.keys, fams.keys, each.keys),
            self._window(tokens.values, fams.values, each.values),
        )

    def _window(self, tokens: Tensor, fams: Tensor, anchors: Tensor) -> Tensor:
        plan, B = self.plan, self.config.block_size
        past = sliding(
            tokens[:, :, plan.past_window - plan.past_used :], plan.past_used, B, plan.blocks
        )
        if self.config.stop_gradient:
            past, anchors = self._as_past(past), self._as_past(anchors)
        own = tokens[:, :, plan.past_window :].unflatten(2, (plan.blocks, B)).transpose(1, 2)
        shown = []
        if plan.shows_fam:
            shown = [sliding(fams, self.fam_slots, self.config.fam_length, plan.blocks)]
        parts = [past, anchors, *shown, own[:, :, :, : plan.own_used]]
        return torch.cat([p for p in parts if p.shape[3]], dim=3).flatten(0, 1)

    def _as_past(self, x: Tensor) -> Tensor:
        """Past and anchors of each block, (R, nb, H, keys, D), as constants.

        But in a stream's first block, which has no past: anchors are tokens of that block itself.
        """
        first = self.call.index(
            "in block 0", lambda: torch.tensor([n == 0 for n in self.plan.first_blocks]), x
        )
        first = first[:, None, None, None, None]
        begun, later = x[:, :1], x[:, 1:].detach()
        return torch.cat([torch.where(first, begun, begun.detach()), later], dim=1)

    # ---- attention

    def _attend(self, query: Tensor, seen: KeyValue, style: AttentionStyle) -> Tensor:
        """Queries (R, H, T, D) against each block's keys; back to (R, T, H, Dv)."""
        window = style.sliding_window
        mask = self.call.once(
            ("mask", window, query.device),
            lambda: self._mask(window, query),
        )
        if self.call.asked is not None:
            mask = self._asked(mask, self.call.asked)
        grid = self._to_grid(query).flatten(0, 1)  # (R·nb, H, L, D)
        out = self.call.attend(self.layer, None, grid, seen.keys, seen.values, mask, style)
        return self._from_grid(out.unflatten(0, (-1, self.plan.blocks)))

    @property
    def _is_grid(self) -> bool:
        """Whether the tokens of the call, as they come, are those of one block after another."""
        return self.plan.whole_blocks or (self.plan.blocks == 1 and self.plan.valid is None)

    def _to_grid(self, x: Tensor) -> Tensor:
        """(R, nb, H, L, D): the new tokens of each block, from (R, H, T, D)."""
        if not self._is_grid:
            columns = self.call.index("query columns", lambda: self.plan.query_columns[0], x)
            x = columns_of(x, columns)
        return x.unflatten(2, (self.plan.blocks, self.plan.queries)).transpose(1, 2)

    def _from_grid(self, out: Tensor) -> Tensor:
        """(R, T, H, Dv): each token's row of (R, nb, H, L, Dv); zeros for padding."""
        plan, nb, L = self.plan, self.plan.blocks, self.plan.queries
        out = out.transpose(2, 3).flatten(1, 2)  # (R, nb·L, H, Dv)
        if self._is_grid:
            return out
        places = self.call.index("query places", lambda: plan.query_places, out)
        real = (places < nb * L)[..., None, None]
        places = places.clamp(max=nb * L - 1)[..., None, None].expand(len(out), -1, *out.shape[2:])
        return out.gather(1, places) * real

    def _mask(self, window: int | None, like: Tensor) -> AttentionMask:
        bias = self.plan.key_bias()
        seen = self.plan.visible(window).to(like.device)
        return AttentionMask(seen, None if bias is None else bias.to(like.device))

    def _asked(self, mask: AttentionMask, asked: Tensor) -> AttentionMask:
        """`mask` for tokens of which only those that are `asked`, (R, T), see FAM."""
        made = self.call.asked_masks
        if mask not in made:
            made[mask] = self._hidden_from_others(mask, asked)
        return made[mask]

    @torch.no_grad()
    def _hidden_from_others(self, mask: AttentionMask, asked: Tensor) -> AttentionMask:
        seen = mask.seen.expand(self.plan.rows * self.plan.blocks, -1, -1, -1).clone()
        each = self._to_grid(asked.to(seen.device)[:, None, :, None])  # (R, nb, 1, L, 1)
        fams = seen[..., self.plan.key_regions["fams"]]
        fams &= each.flatten(0, 1)
        # A place of the grid without a token may be left with nothing to see.
        seen |= ~seen.any(-1, keepdim=True)
        return AttentionMask(seen, mask.bias)

    # ---- anchors, the tokens kept for ever

    def _gather_anchors(self, before: LayerMemory, new: KeyValue) -> KeyValue:
        """Anchor keys (unrotated) and values, with those that this call brings."""
        P = self.plan.past_length
        kept = KeyValue(before.anchor_keys, before.values[:, :, P : P + self.anchors])
        if not self.anchors or min(self.plan.starts) > max(self.config.anchor_positions):
            return kept
        columns = self.call.index("anchor columns", lambda: self.plan.anchor_columns[0], new.keys)
        here = self.call.index("anchors here", lambda: self.plan.anchor_columns[1], new.keys)
        here = here[:, None, :, None]
        return kept.zip(new, lambda old, fresh: torch.where(here, columns_of(fresh, columns), old))

    def _with_anchors(self, keys: Tensor, anchor_keys: Tensor, moved: bool) -> Tensor:
        """`keys` of a memory with the anchors where the block being read sees them.

        `moved`: that block is the one after the call, not the first of the call.
        """
        if not self.anchors:
            return keys
        tables = self._tables(f"anchors {moved}", lambda: self._anchor_places(moved), keys)
        P = keys.shape[2] - self.anchors - self.fam_slots - self.config.block_size
        return torch.cat(
            [keys[:, :, :P], rotate(anchor_keys, tables), keys[:, :, P + self.anchors :]], dim=2
        )

    def _anchor_places(self, moved: bool) -> Tensor:
        places = self.call.anchor_positions(0)
        # Sinks move along with the window; global tokens stay behind.
        return (
            places + self.call.frame_shift() if moved and self.config.global_positions else places
        )

    # ---- the memory after the call

    def _carry(
        self,
        tokens: KeyValue,
        fams: KeyValue,
        anchors: KeyValue,
        fam: Tensor,
        extra: Mapping[str, Tensor],
    ) -> LayerMemory:
        """The state at the end of the call, relative to each row's new current block."""
        keys = self._kept(tokens.keys, fams.keys, anchors.keys)
        if self.call.frame_moves:
            keys = rotate(keys, self._tables("moved", self.call.frame_shift, keys))
        keys = self._with_anchors(keys, anchors.keys, moved=True)
        values = self._kept(tokens.values, fams.values, anchors.values)
        return self._after(KeyValue(keys, values), anchors, fam, extra)

    def _after(
        self, tokens: KeyValue, anchors: KeyValue, fam: Tensor, extra: Mapping[str, Tensor]
    ) -> LayerMemory:
        owned = not torch.is_grad_enabled()
        if owned:
            # What is carried on unchanged would keep the graph of the call that made it.
            anchors = anchors.map(Tensor.detach)
            fam, extra = fam.detach(), {name: x.detach() for name, x in extra.items()}
        return LayerMemory(tokens.keys, tokens.values, anchors.keys, fam, extra=extra, owned=owned)

    def _kept(self, tokens: Tensor, fams: Tensor, anchors: Tensor) -> Tensor:
        """(R, Hk, W', D): the new [past | anchors | fams | block], not moved yet."""
        plan, B = self.plan, self.config.block_size
        grown = max(plan.finished) * B if self.config.past_length is None else 0
        past = plan.past_length + grown
        # Zeros on the right for a block that is not begun.
        tokens = self._cut(pad(tokens, (0, 0, 0, B)), plan.past_window - past, B, past + B)
        fams = self._cut(fams, 0, self.config.fam_length, self.fam_slots)
        return torch.cat([tokens[:, :, :past], anchors, fams, tokens[:, :, past:]], dim=2)

    def _cut(self, x: Tensor, start: int, step: int, length: int) -> Tensor:
        """(R, Hk, length, D) of x from `start`, and `step` further per block that a row finished."""
        finished = self.plan.finished
        if len(set(finished)) == 1:
            start += finished[0] * step
            return x[:, :, start : start + length]
        starts = start + torch.tensor(finished, device=x.device)[:, None] * step
        return columns_of(x, starts + torch.arange(length, device=x.device))

    def _tables(self, name: str, positions: Callable[[], Tensor], like: Tensor) -> Tables | None:
        """cos and sin that broadcast over heads: (R or 1, 1, L, 2n)."""
        return unsqueeze(self.call.tables(self.layer, name, positions, like), 1)
