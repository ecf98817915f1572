"""The TransformerFAM layer: block attention and the feedback recurrence (algorithm 2), layer-major.

A decoder layer of any family runs as it is. In place of its attention mask it carries a `TokenPass`,
which the registered attention function hands the layer's queries, keys and values. The pass

1. places the new keys in their blocks,
2. runs the recurrence F_τ = layer(F_{τ-1} | block τ) over the blocks that are now complete, by sending
   the FAM rows through the very same layer (*re-entrance*) with a `FamPass` in place of the mask,
3. lets the queries of all blocks attend at once,
4. leaves the layer's next memory with the `Call`.

So a layer needs no weight of its own for FAM, and no code of its own per family. State goes in as a
`Memory` and comes out as new `LayerMemory`s; nothing is kept on modules.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from transformerfam.attention import AttentionStyle, attend
from transformerfam.config import FamConfig
from transformerfam.memory import LayerMemory, Memory
from transformerfam.plan import CallPlan
from transformerfam.rotary import Rotary, Tables, rotate

ATTENTION_NAME = "transformerfam"

# Sends rows (R', N, d) through a layer with the given pass in place of the attention mask.
Reenter = Callable[[Tensor, "AttentionPass"], Tensor]


class AttentionPass(Protocol):
    """What stands in a layer's attention mask: it answers the layer's call to attention."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, style: AttentionStyle) -> Tensor:
        """(R, H, L, D) queries and (R, Hk, L, D) keys, unrotated -> (R, L, H, Dv)."""


def fam_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention function registered with transformers under `ATTENTION_NAME`."""
    if not callable(attention_mask):
        raise RuntimeError("Attention of a TransformerFAM was called outside of its decoder.")
    style = AttentionStyle(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        dropout=dropout,
        softcap=softcap,
        sink_logits=s_aux,
        sliding_window=sliding_window,
    )
    return attention_mask(query, key, value, style), None


class Call:
    """One call of the decoder: R rows, T new tokens each, on an existing or a new memory.

    Args:
        config: geometry.
        plan: where the new tokens stand.
        before: each layer's memory before the call; None for a new stream.
        rotaries: each layer's rotary positions.
        prompt: (N, d), the FAM input of layer 0 in block 0; None without feedback.
        keep: whether the memories after the call are wanted.
    """

    def __init__(
        self,
        config: FamConfig,
        plan: CallPlan,
        before: list[LayerMemory | None],
        rotaries: tuple[Rotary, ...],
        prompt: Tensor | None,
        keep: bool,
    ) -> None:
        self.config = config
        self.plan = plan
        self.before = before
        self.rotaries = rotaries
        self.keep = keep
        self.after: list[LayerMemory | None] = [None] * len(before)
        # rising[l]: the FAM input of layer l in block 0 (B.1), (R, N, d): the prompt rises once.
        self.rising: list[Tensor | None] = [None] * (len(before) + 1)
        if prompt is not None:
            self.rising[0] = prompt.expand(plan.rows, -1, -1)
        self._cache: dict[Any, Any] = {}

    def enter(self, layer: int, hidden: Tensor, reenter: Reenter) -> AttentionPass:
        """The pass of one layer over the new tokens, whose input is `hidden` (R, T, d)."""
        return TokenPass(self, layer, hidden, reenter)

    def commit(self, memory: Memory) -> None:
        """Advance `memory` to after the call."""
        layers = [layer for layer in self.after if layer is not None]
        assert len(layers) == len(self.after), "a layer did not run"
        memory.advance(layers, self.plan.counts)

    # ---- made once for all layers

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """A value shared by the layers of this call."""
        if key not in self._cache:
            with torch.no_grad():
                self._cache[key] = make()
        return self._cache[key]

    def tables(self, layer: int, name: str, positions: Callable[[], Tensor], like: Tensor) -> Tables | None:
        """Rotation by `positions`, shared by the layers of the same rotary."""
        rotary = self.rotaries[layer]
        return self.once((id(rotary), name), lambda: rotary.tables(positions(), like))

    def index(self, name: str, make: Callable[[], Tensor], like: Tensor) -> Tensor:
        """An index tensor of the plan, on the device of `like`."""
        return self.once(name, lambda: make().to(like.device))

    # ---- positions in the frame

    def frame_starts(self) -> Tensor:
        """(R or 1, 1) position in the stream of the start of the frame."""
        B = self.config.block_size
        starts = [b * B for b in self.plan.first_blocks]
        return torch.tensor(starts[:1] if len(set(starts)) == 1 else starts, dtype=torch.float64)[:, None]

    def fam_positions(self, block: int) -> Tensor:
        """(R or 1, N) frame position of F_{j-1}, the FAM that block j of the call reads (B.2.1)."""
        B, N = self.config.block_size, self.config.fam_length
        slot = torch.arange(N, dtype=torch.float64)[None]
        if self.config.fam_position == "zero":
            return (-self.frame_starts()).expand(-1, N)
        if self.config.fam_position == "float":
            return block * B - 1 + (slot + 1) / (N + 1)
        return block * B - N + slot

    def anchor_positions(self, block: int) -> Tensor:
        """(R or 1, A) frame position at which block j of the call sees the anchors."""
        anchors = torch.tensor(self.config.anchor_positions, dtype=torch.float64)[None]
        if self.config.global_positions:
            return anchors - self.frame_starts()
        S, P = self.config.sink_tokens, self.plan.past_length
        return block * self.config.block_size - P - S + anchors

    def anchor_positions_of_blocks(self, blocks: int) -> Tensor:
        """(R or 1, nb, A): the same for each of the first `blocks` blocks."""
        return torch.stack([self.anchor_positions(j) for j in range(blocks)], dim=1)


class TokenPass:
    """One layer over the new tokens of a call: (R, H, T, D) queries to (R, T, H, Dv)."""

    def __init__(self, call: Call, layer: int, hidden: Tensor, reenter: Reenter) -> None:
        self.call = call
        self.layer = layer
        self.hidden = hidden
        self.reenter = reenter
        self.config = call.config
        self.plan = call.plan

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, style: AttentionStyle) -> Tensor:
        plan = self.plan
        before = self.call.before[self.layer]
        if before is None:
            before = LayerMemory.empty(self.config, key, value, self.hidden)
        anchor_keys, anchor_values = self._anchors(before, key, value)
        token_tables = self._tables("tokens", lambda: plan.slots, query)
        query = rotate(query, token_tables)
        key = rotate(key, token_tables)
        self.style = style
        if plan.blocks == 1 and not any(plan.finished):
            keys, values, after = self._within_block(before, key, value, anchor_keys, anchor_values)
        else:
            keys, values, after = self._over_blocks(before, key, value, anchor_keys, anchor_values)
        if self.call.keep:
            self.call.after[self.layer] = after
        return self._attend(query, keys, values)

    # ---- the new keys, placed

    def _anchors(self, before: LayerMemory, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Anchor keys (unrotated) and values, with those that this call brings."""
        A, P = len(self.config.anchor_positions), self.plan.past_length
        values = before.values[:, :, P : P + A]
        if not A or min(self.plan.starts) > max(self.config.anchor_positions):
            return before.anchor_keys, values
        columns, present = self.call.once("anchors", self._anchor_columns)
        columns, present = columns.to(key.device), present.to(key.device)
        return (
            torch.where(present, _columns(key, columns), before.anchor_keys),
            torch.where(present, _columns(value, columns), values),
        )

    def _anchor_columns(self) -> tuple[Tensor, Tensor]:
        """(R or 1, A) column of each anchor in this call, and (R or 1, 1, A, 1) whether it is there."""
        B = self.config.block_size
        starts = torch.tensor(self.plan.first_blocks[: 1 if self.plan.alike else None])[:, None] * B
        positions = (starts + self.plan.slots)[:, None]  # (R or 1, 1, T)
        wanted = torch.tensor(self.config.anchor_positions)[None, :, None]
        real = (self.plan.slots < self.plan.blocks * B)[:, None]
        hit = (positions == wanted) & real  # (R or 1, A, T)
        return hit.int().argmax(-1), hit.any(-1)[:, None, :, None]

    def _within_block(
        self, before: LayerMemory, key: Tensor, value: Tensor, anchor_keys: Tensor, anchor_values: Tensor
    ) -> tuple[Tensor, Tensor, LayerMemory]:
        """No block is completed: the memory only fills up, and is itself what the queries see."""
        plan = self.plan
        W = before.keys.shape[2]
        block = W - self.config.block_size
        keys, values = (self._fill(kept, new, block) for kept, new in ((before.keys, key), (before.values, value)))
        if anchor_keys is not before.anchor_keys:
            A, P = len(self.config.anchor_positions), plan.past_length
            values = torch.cat([values[:, :, :P], anchor_values, values[:, :, P + A :]], dim=2)
            keys = self._with_anchors(keys, anchor_keys, 0)
        after = LayerMemory(keys, values, anchor_keys, before.fam)
        seen = slice(plan.past_length - plan.past_used, block + plan.own_used)
        keys, values = keys[:, :, seen], values[:, :, seen]
        if self.config.stop_gradient:
            past = plan.past_used + len(self.config.anchor_positions)
            keys, values = _stop_gradient(keys, past), _stop_gradient(values, past)
        return keys, values, after

    def _fill(self, kept: Tensor, new: Tensor, block: int) -> Tensor:
        """`kept` with the new tokens in the slots of the block being read."""
        if self.plan.aligned:
            start = block + self.plan.offsets[0]
            if _may_write(kept, new):
                # Slots past the end of what was read are free: until the memory advances nobody
                # looks at them, so writing there in place loses nothing if the call fails.
                kept[:, :, start : start + new.shape[2]] = new
                return kept
            return torch.cat([kept[:, :, :start], new, kept[:, :, start + new.shape[2] :]], dim=2)
        slots = self.call.index("block slots", lambda: block + self.plan.slots, new)
        return _place(pad(kept, (0, 0, 0, 1)), slots, new)[:, :, :-1]

    def _over_blocks(
        self, before: LayerMemory, key: Tensor, value: Tensor, anchor_keys: Tensor, anchor_values: Tensor
    ) -> tuple[Tensor, Tensor, LayerMemory]:
        """Blocks are completed: advance FAM over them, and cut what the queries of each block see."""
        plan = self.plan
        A, P, kN = len(self.config.anchor_positions), plan.past_length, self._fam_slots
        grid_k = self._grid(before.keys[:, :, P + A + kN :], key)
        grid_v = self._grid(before.values[:, :, P + A + kN :], value)
        # Under full attention the past grows within the call: room for it on the left.
        room = (0, 0, plan.past_window - P, 0)
        past_k, past_v = pad(before.keys[:, :, :P], room), pad(before.values[:, :, :P], room)
        fams_k = [before.keys[:, :, P + A : P + A + kN]]
        fams_v = [before.values[:, :, P + A : P + A + kN]]
        fam = before.fam
        if self.config.has_feedback:
            fam, new_k, new_v = self._recur(fam, grid_k, grid_v)
            fams_k, fams_v = fams_k + new_k, fams_v + new_v
        long = _Long(
            torch.cat([past_k, grid_k], 2), torch.cat([past_v, grid_v], 2), torch.cat(fams_k, 2), torch.cat(fams_v, 2)
        )
        keys, values = self._windows(long, anchor_keys, anchor_values)
        after = self._carry(long, anchor_keys, anchor_values, fam) if self.call.keep else before
        return keys, values, after

    @property
    def _fam_slots(self) -> int:
        return self.config.previous_fams * self.config.fam_length

    def _grid(self, block: Tensor, new: Tensor) -> Tensor:
        """(R, H, nb·B, D): the block being read and the new tokens, each in its slot."""
        plan, size = self.plan, self.plan.blocks * self.config.block_size
        if plan.whole_blocks:
            return new
        if plan.aligned:
            start = plan.offsets[0]
            grid = torch.cat([block[:, :, :start], new], dim=2)
            return pad(grid, (0, 0, 0, size - grid.shape[2]))
        # One slot more takes the padding.
        grid = pad(block, (0, 0, 0, size + 1 - block.shape[2]))
        slots = self.call.index("slots", lambda: plan.slots, new)
        return _place(grid, slots, new)[:, :, :-1]

    # ---- the feedback recurrence

    def _recur(self, fam: Tensor, grid_k: Tensor, grid_v: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """F over the completed blocks, and the keys and values of every F made, in the frame.

        Returns:
            F after the last block that each row completes (R, N, d), and for j = 0, 1, .. the keys and
            values (R, Hk, N, D) of the F that compresses block j.
        """
        B, finished = self.config.block_size, self.plan.finished
        made_k: list[Tensor] = []
        made_v: list[Tensor] = []
        for j in range(max(finished)):
            rows = self.plan.rows_finishing(j)
            block = slice(j * B, (j + 1) * B)
            read = (_take(grid_k[:, :, block], rows), _take(grid_v[:, :, block], rows))
            first = [r for r in _members(rows, self.plan.rows) if self.plan.first_blocks[r] + j == 0]
            updated, own_k, own_v = self._update(_take(fam, rows), j, rows, read, first)
            if j:
                made_k.append(_put(own_k, rows, self.plan.rows))
                made_v.append(_put(own_v, rows, self.plan.rows))
            fam = _merge(fam, rows, updated)
        if max(finished):
            self._project_last(fam, made_k, made_v)
        return fam, made_k, made_v

    def _update(
        self, fam: Tensor, j: int, rows: Tensor | None, read: tuple[Tensor, Tensor], first: list[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """F_τ from F_{τ-1} and block j, and the keys and values of F_{τ-1}; `rows` of the batch."""
        members = _members(rows, self.plan.rows)
        if not first:
            return self._update_rows(fam, j, rows, read)
        start = torch.tensor([members.index(r) for r in first], device=fam.device)
        if len(first) == len(members):
            return self._first_update(j, rows, read)
        later = torch.tensor([i for i, r in enumerate(members) if r not in first], device=fam.device)
        whole = torch.tensor(members, device=fam.device)
        parts = [
            self._first_update(j, whole[start].cpu(), tuple(t[start] for t in read)),
            self._update_rows(fam[later], j, whole[later].cpu(), tuple(t[later] for t in read)),
        ]
        order = torch.cat([start, later]).argsort()
        updated, own_k, own_v = (torch.cat(p)[order] for p in zip(*parts, strict=True))
        return updated, own_k, own_v

    def _update_rows(
        self, fam: Tensor, j: int, rows: Tensor | None, read: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        fam_pass = self._fam_pass(j, rows, read)
        updated = self._bounded(self.reenter(fam, fam_pass))
        return updated, *fam_pass.own

    def _first_update(
        self, j: int, rows: Tensor | None, read: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Block 0 of the stream: the FAM input is the prompt as it has risen to this layer (B.1)."""
        risen = self.call.rising[self.layer]
        assert risen is not None
        risen = _take(risen, rows)
        fam_pass = self._fam_pass(j, rows, read)
        if self.config.first_residual == "zero":
            # Af = attention: the layer gets a row of zeros for its residual, and attention the
            # queries, keys and values of the prompt.
            prompt = Projection()
            self.reenter(risen, prompt)
            fam_pass = self._fam_pass(j, rows, read, given=prompt.own)
            risen = torch.zeros_like(risen)
        updated = self._bounded(self.reenter(risen, fam_pass))
        if self.call.rising[self.layer + 1] is None:
            # Recomputation under activation checkpointing comes here again; the first stays.
            self.call.rising[self.layer + 1] = _put(updated, rows, self.plan.rows)
        return updated, *fam_pass.own

    def _project_last(self, fam: Tensor, made_k: list[Tensor], made_v: list[Tensor]) -> None:
        """Keys and values of each row's newest F, which no update has projected yet."""
        finished = self.plan.finished
        latest = Projection()
        self.reenter(fam, latest)
        _, key, value = latest.own
        for blocks in sorted(set(finished) - {0}):
            tables = self._tables(f"fam {blocks}", partial(self.call.fam_positions, blocks), key)
            rows = self.plan.rows_having_finished(blocks)
            for made, new in ((made_k, rotate(key, tables)), (made_v, value)):
                if blocks > len(made):
                    made.append(new)
                else:
                    made[blocks - 1] = _merge(made[blocks - 1], rows, _take(new, rows))

    def _fam_pass(
        self,
        j: int,
        rows: Tensor | None,
        read: tuple[Tensor, Tensor],
        given: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> FamPass:
        make = partial(self.call.fam_positions, j)
        key_tables = _take_tables(self._tables(f"fam {j}", make, read[0]), rows)
        query_tables = key_tables
        if self.config.fam_query_position == "block_end":
            # The position of the F that is produced; with `zero` that is the same place.
            make = partial(self.call.fam_positions, j + 1)
            query_tables = _take_tables(self._tables(f"fam {j + 1}", make, read[0]), rows)
        return FamPass(read, query_tables, key_tables, given, self.config)

    def _bounded(self, fam: Tensor) -> Tensor:
        """`feedback_norm` applied to a new F, (R', N, d)."""
        norm = self.config.feedback_norm
        if norm == "none":
            return fam
        rms = fam.pow(2).mean(-1, keepdim=True).add(1e-6).sqrt()
        if norm == "rms":
            return fam / rms
        cap = torch.as_tensor(norm, dtype=fam.dtype, device=fam.device).reshape(-1, 1)
        return fam * (cap / rms).clamp(max=1.0)

    # ---- what the queries see

    def _windows(self, long: _Long, anchor_keys: Tensor, anchor_values: Tensor) -> tuple[Tensor, Tensor]:
        """(R·nb, Hk, keys, D): for each block [past | anchors | fams | own block]."""
        nb, P = self.plan.blocks, self.plan.past_window
        places = partial(self.call.anchor_positions_of_blocks, nb)
        tables = _unsqueeze(self.call.tables(self.layer, "anchors of blocks", places, long.keys), 2)
        anchor_k = rotate(anchor_keys[:, None].expand(-1, nb, -1, -1, -1), tables)
        anchor_v = anchor_values[:, None].expand(-1, nb, -1, -1, -1)
        windows = []
        for tokens, fams, anchors in ((long.keys, long.fam_keys, anchor_k), (long.values, long.fam_values, anchor_v)):
            past = self._past_windows(tokens)
            if self.config.stop_gradient:
                past, anchors = past.detach(), anchors.detach()
            own = tokens[:, :, P:].unflatten(2, (nb, -1)).transpose(1, 2)[:, :, :, : self.plan.own_used]
            parts = [past, anchors, _sliding(fams, self._fam_slots, self.config.fam_length, nb), own]
            windows.append(torch.cat([p for p in parts if p.shape[3]], dim=3).flatten(0, 1))
        return windows[0], windows[1]

    def _past_windows(self, tokens: Tensor) -> Tensor:
        """(R, nb, Hk, P', D): the kept past of each block, as far as any token can see."""
        P, used = self.plan.past_window, self.plan.past_used
        return _sliding(tokens[:, :, P - used :], used, self.config.block_size, self.plan.blocks)

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Queries (R, H, T, D) against each block's keys; back to (R, T, H, Dv)."""
        plan, nb, L = self.plan, self.plan.blocks, self.plan.queries
        window = self.style.sliding_window
        mask = self.call.index(f"mask {window}", lambda: plan.visible(window), query)
        direct = plan.whole_blocks or (nb == 1 and plan.valid is None)
        if not direct:
            columns = self.call.index("query columns", lambda: plan.query_columns[0], query)
            query = _columns(query, columns)
        grid = query.unflatten(2, (nb, L)).transpose(1, 2).flatten(0, 1)  # (R·nb, H, L, D)
        out = attend(grid, keys, values, mask, self.style, self.config.backend)
        out = out.unflatten(0, (-1, nb)).transpose(2, 3).flatten(1, 2)  # (R, nb·L, H, Dv)
        if direct:
            return out
        places = self.call.index("query places", lambda: plan.query_places, query)
        real = (places < nb * L)[..., None, None]
        places = places.clamp(max=nb * L - 1)[..., None, None].expand(len(out), -1, *out.shape[2:])
        return out.gather(1, places) * real

    # ---- the memory after the call

    def _carry(self, long: _Long, anchor_keys: Tensor, anchor_values: Tensor, fam: Tensor) -> LayerMemory:
        """The state at the end of the call, in the frame of each row's new current block."""
        moved = self._tables("moved", self._frame_shift, long.keys)
        keys = rotate(self._kept(long.keys, long.fam_keys, anchor_keys), moved)
        keys = self._with_anchors(keys, anchor_keys, None)
        values = self._kept(long.values, long.fam_values, anchor_values)
        return LayerMemory(keys, values, anchor_keys, fam)

    def _frame_shift(self) -> Tensor:
        """(R or 1, 1): how far everything moves back when the frame moves on."""
        shift = -torch.tensor(self.plan.finished, dtype=torch.float64)[:, None] * self.config.block_size
        return shift[:1] if len(set(self.plan.finished)) == 1 else shift

    def _kept(self, tokens: Tensor, fams: Tensor, anchors: Tensor) -> Tensor:
        """(R, Hk, W', D): the new [past | anchors | fams | block] in the old frame."""
        plan, B = self.plan, self.config.block_size
        grown = max(plan.finished) * B if self.config.past_length is None else 0
        past = plan.past_length + grown
        # Zeros on the right for a block that is not begun.
        tokens = self._cut(pad(tokens, (0, 0, 0, B)), plan.past_window - past, B, past + B)
        fams = self._cut(fams, 0, self.config.fam_length, self._fam_slots)
        return torch.cat([tokens[:, :, :past], anchors, fams, tokens[:, :, past:]], dim=2)

    def _cut(self, x: Tensor, start: int, step: int, length: int) -> Tensor:
        """(R, Hk, length, D) of x from `start`, and `step` further for every block that a row finished."""
        finished = self.plan.finished
        if len(set(finished)) == 1:
            start += finished[0] * step
            return x[:, :, start : start + length]
        starts = start + torch.tensor(finished, device=x.device)[:, None] * step
        columns = starts + torch.arange(length, device=x.device)
        return _columns(x, columns)

    def _with_anchors(self, keys: Tensor, anchor_keys: Tensor, finished: int | None) -> Tensor:
        """`keys` of a memory with the anchors where the current block of each row sees them."""
        A = anchor_keys.shape[2]
        if not A:
            return keys
        tables = self._tables(f"anchors {finished}", lambda: self._anchor_places(finished), keys)
        P = keys.shape[2] - A - self._fam_slots - self.config.block_size
        return torch.cat([keys[:, :, :P], rotate(anchor_keys, tables), keys[:, :, P + A :]], dim=2)

    def _anchor_places(self, finished: int | None) -> Tensor:
        places = self.call.anchor_positions(0)
        if finished is None and self.config.global_positions:
            return places + self._frame_shift()
        return places

    def _tables(self, name: str, positions: Callable[[], Tensor], like: Tensor) -> Tables | None:
        """cos and sin that broadcast over heads: (R or 1, 1, L, 2n)."""
        return _unsqueeze(self.call.tables(self.layer, name, positions, like), 1)


class FamPass:
    """The FAM rows of a layer compress one block: they attend [ Kf ; K_τ ] without a mask."""

    def __init__(
        self,
        read: tuple[Tensor, Tensor],
        query_tables: Tables | None,
        key_tables: Tables | None,
        given: tuple[Tensor, Tensor, Tensor] | None,
        config: FamConfig,
    ) -> None:
        self.read = read
        self.query_tables = query_tables
        self.key_tables = key_tables
        self.given = given
        self.config = config
        self.own: tuple[Tensor, Tensor]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, style: AttentionStyle) -> Tensor:
        if self.given is not None:
            query, key, value = self.given
        query = rotate(query, self.query_tables)
        key = rotate(key, self.key_tables)
        self.own = (key, value)
        block_k, block_v = self.read
        keys, values = torch.cat([key, block_k], 2), torch.cat([value, block_v], 2)
        return attend(query, keys, values, None, style, self.config.backend).transpose(1, 2)


class Projection:
    """Takes a layer's queries, keys and values of some rows and lets nothing through."""

    def __init__(self) -> None:
        self.own: tuple[Tensor, Tensor, Tensor]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, style: AttentionStyle) -> Tensor:
        self.own = (query, key, value)
        rows, heads, length, _ = query.shape
        return query.new_zeros(rows, length, heads, value.shape[-1])


class _Long:
    """Keys and values of [past | all blocks of the call] and of [kept FAMs | new FAMs]."""

    def __init__(self, keys: Tensor, values: Tensor, fam_keys: Tensor, fam_values: Tensor) -> None:
        self.keys, self.values = keys, values  # (R, Hk, past window + nb·B, D)
        self.fam_keys, self.fam_values = fam_keys, fam_values  # (R, Hk, (k + made)·N, D)


# ---- small index helpers; `rows` None means all rows


def _members(rows: Tensor | None, count: int) -> list[int]:
    return list(range(count)) if rows is None else rows.tolist()


def _take(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x.index_select(0, rows.to(x.device))


def _put(x: Tensor, rows: Tensor | None, count: int) -> Tensor:
    """`x` of some rows among zeros for the others."""
    if rows is None:
        return x
    return x.new_zeros(count, *x.shape[1:]).index_copy(0, rows.to(x.device), x)


def _merge(old: Tensor, rows: Tensor | None, new: Tensor) -> Tensor:
    return new if rows is None else old.index_copy(0, rows.to(old.device), new)


def _take_tables(tables: Tables | None, rows: Tensor | None) -> Tables | None:
    if tables is None or rows is None or tables.cos.shape[0] == 1:
        return tables
    return Tables(_take(tables.cos, rows), _take(tables.sin, rows), tables.interleaved)


def _unsqueeze(tables: Tables | None, dim: int) -> Tables | None:
    if tables is None:
        return None
    return Tables(tables.cos.unsqueeze(dim), tables.sin.unsqueeze(dim), tables.interleaved)


def _columns(x: Tensor, columns: Tensor) -> Tensor:
    """x (R, H, T, D) at `columns` (R or 1, C) of its third dimension."""
    if columns.shape[0] == 1:
        return x.index_select(2, columns[0])
    return x.gather(2, columns[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _place(x: Tensor, slots: Tensor, new: Tensor) -> Tensor:
    """x (R, H, C, D) with new (R, H, T, D) at `slots` (R, T) of its third dimension."""
    index = slots.expand(len(new), -1)[:, None, :, None].expand_as(new)
    return x.scatter(2, index, new)


def _sliding(x: Tensor, size: int, step: int, count: int) -> Tensor:
    """(R, count, H, size, D): windows of x (R, H, C, D), `step` apart, as views."""
    if not size:
        return x.new_zeros(x.shape[0], count, x.shape[1], 0, x.shape[3])
    windows = x[:, :, : (count - 1) * step + size].unfold(2, size, step)  # (R, H, count, D, size)
    return windows.permute(0, 2, 1, 4, 3)


def _stop_gradient(x: Tensor, length: int) -> Tensor:
    """No gradient through the first `length` of the third dimension."""
    return torch.cat([x[:, :, :length].detach(), x[:, :, length:]], dim=2)


def _may_write(kept: Tensor, new: Tensor) -> bool:
    """Whether `kept` can be written in place: no gradient needs it, and torch allows it."""
    if torch.is_grad_enabled() and (kept.requires_grad or new.requires_grad):
        return False
    return not kept.is_inference() or torch.is_inference_mode_enabled()
