"""Where the new tokens of one call stand: in which block, in which slot, and what they see.

Only whole-number arithmetic, done once for a call and shared by all layers; knows no model.

A call brings T columns of tokens for R rows. Row r has `starts[r]` tokens behind it and stands
`starts[r] % B` tokens deep in its first block. Its blocks are numbered j = 0, 1, .. within the call,
and every position is written relative to the start of block 0 of the call, the *frame*:

    slot of a token = its place in the frame, so block j holds slots j·B .. (j+1)·B - 1
    kept past       = slots -P .. -1

A frame starts at a block boundary, so a stream never meets a large position (docs/method.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from transformerfam import masks
from transformerfam.config import FamConfig


@dataclass(frozen=True)
class CallPlan:
    """Geometry of one call.

    Attributes:
        config: the geometry of the model.
        starts: tokens that each of the R rows has behind it.
        columns: T, width of the call.
        valid: (R, T) bool on the CPU, False for padding; None: no padding.
        past_length: P, kept past in tokens.
        passed: for each row whether its stream began with the FAM of another; default: none did.
        shows_fam: whether any token of the call sees FAM.
    """

    config: FamConfig
    starts: tuple[int, ...]
    columns: int
    valid: Tensor | None
    past_length: int
    passed: tuple[bool, ...] = ()
    shows_fam: bool = True

    # ---- rows

    @property
    def rows(self) -> int:
        """R."""
        return len(self.starts)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """New tokens of each row."""
        if self.valid is None:
            return (self.columns,) * self.rows
        return tuple(self.valid.sum(1).tolist())

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Tokens of the unfinished block that each row has behind it."""
        return tuple(s % self.config.block_size for s in self.starts)

    @cached_property
    def first_blocks(self) -> tuple[int, ...]:
        """Index in the stream of each row's block 0 of the call."""
        return tuple(s // self.config.block_size for s in self.starts)

    @cached_property
    def fams_behind(self) -> tuple[int, ...]:
        """How many FAMs each row had before its block 0 of the call: its blocks, and a passed one."""
        passed = self.passed or (False,) * self.rows
        return tuple(b + p for b, p in zip(self.first_blocks, passed, strict=True))

    @cached_property
    def finished(self) -> tuple[int, ...]:
        """Blocks that each row completes in this call."""
        B = self.config.block_size
        return tuple((o + n) // B for o, n in zip(self.offsets, self.counts, strict=True))

    @cached_property
    def blocks(self) -> int:
        """nb, blocks that the call touches (of the row that touches most)."""
        B = self.config.block_size
        return max(1, *(-(-(o + n) // B) for o, n in zip(self.offsets, self.counts, strict=True)))

    @cached_property
    def aligned(self) -> bool:
        """All rows stand at the same depth of their block and have no padding."""
        return len(set(self.offsets)) == 1 and self.valid is None

    @cached_property
    def alike(self) -> bool:
        """All rows see the same: aligned, and equally far in their streams."""
        return self.aligned and len(set(zip(self.starts, self.fams_behind, strict=True))) == 1

    def rows_finishing(self, block: int) -> Tensor | None:
        """Indices of the rows that complete block j; None: all of them."""
        return self._where([c > block for c in self.finished])

    def rows_having_finished(self, blocks: int) -> Tensor | None:
        """Indices of the rows that complete exactly this many blocks; None: all of them."""
        return self._where([c == blocks for c in self.finished])

    @staticmethod
    def _where(chosen: Sequence[bool]) -> Tensor | None:
        if all(chosen):
            return None
        return torch.tensor([r for r, yes in enumerate(chosen) if yes], dtype=torch.long)

    # ---- tokens

    @cached_property
    def slots(self) -> Tensor:
        """(R or 1, T) slot of each token; padding gets the slot past the last block."""
        if self.aligned:
            return self.offsets[0] + torch.arange(self.columns)[None]
        offsets = torch.tensor(self.offsets)[:, None]
        if self.valid is None:
            return offsets + torch.arange(self.columns)
        slots = offsets + self.valid.long().cumsum(1) - 1
        return slots.masked_fill(~self.valid, self.blocks * self.config.block_size)

    @cached_property
    def whole_blocks(self) -> bool:
        """The new tokens are exactly the nb blocks: no index is needed to move between them."""
        B = self.config.block_size
        return self.aligned and not self.offsets[0] and self.columns == self.blocks * B

    @cached_property
    def queries(self) -> int:
        """L, the most new tokens that a row can have in one block."""
        return min(self.columns, self.config.block_size)

    @cached_property
    def query_places(self) -> Tensor:
        """(R or 1, T) place of each token's query in the (nb, L) grid of queries, flattened."""
        B, L = self.config.block_size, self.queries
        block = self.slots // B
        first_slot = torch.tensor(self.offsets)[: len(self.slots), None]
        in_block = self.slots - torch.where(block == 0, first_slot, block * B)
        places = block * L + in_block
        return places.masked_fill(self.slots >= self.blocks * B, self.blocks * L)

    @cached_property
    def query_columns(self) -> tuple[Tensor, Tensor]:
        """(R or 1, nb·L) column of the token at each place of the grid, and whether there is one."""
        places = self.query_places
        size = self.blocks * self.queries
        columns = torch.zeros(len(places), size + 1, dtype=torch.long)
        columns.scatter_(1, places, torch.arange(self.columns).expand_as(places).contiguous())
        taken = torch.zeros(len(places), size + 1, dtype=torch.bool).scatter_(1, places, True)
        return columns[:, :size], taken[:, :size]

    @cached_property
    def anchor_columns(self) -> tuple[Tensor, Tensor]:
        """(R or 1, A) column of each anchor in this call, and whether it is there."""
        B = self.config.block_size
        starts = torch.tensor(self.first_blocks[: 1 if self.alike else None])[:, None] * B
        positions = (starts + self.slots)[:, None]  # (R or 1, 1, T)
        wanted = torch.tensor(self.config.anchor_positions)[None, :, None]
        real = (self.slots < self.blocks * B)[:, None]
        hit = (positions == wanted) & real  # (R or 1, A, T)
        return hit.int().argmax(-1), hit.any(-1)

    # ---- keys of one block: [past | anchors | fams | own block]

    @cached_property
    def past_window(self) -> int:
        """Past that a block may see: the kept past or, where all is kept, that and the whole call."""
        if self.config.past_length is not None:
            return self.past_length
        return self.past_length + self.blocks * self.config.block_size

    @cached_property
    def past_used(self) -> int:
        """Past that some token of the call can see at all; the rest need not be computed."""
        behind = (max(self.first_blocks) + self.blocks - 1) * self.config.block_size
        return min(self.past_window, behind)

    @cached_property
    def own_used(self) -> int:
        """Slots of the own block that are filled."""
        if self.blocks > 1:
            return self.config.block_size
        return max(1, *(o + n for o, n in zip(self.offsets, self.counts, strict=True)))

    @cached_property
    def key_regions(self) -> dict[str, slice]:
        """Which of the keys that a block's queries see are past, anchors, FAMs and own block."""
        config = self.config
        sizes = {
            "past": self.past_used,
            "anchors": len(config.anchor_positions),
            "fams": config.previous_fams * config.fam_length * self.shows_fam,
            "own": self.own_used,
        }
        ends = accumulate(sizes.values())
        return {name: slice(end - sizes[name], end) for name, end in zip(sizes, ends, strict=True)}

    def visible(self, sliding_window: int | None) -> Tensor:
        """(G, 1, L, keys) bool: what the queries of each block see; G is 1, nb or R·nb.

        `sliding_window` is the layer's own window in tokens: it limits what tokens see of past and
        own block, not what they see of anchors and FAM.
        """
        ages = self._ages
        if len(set(ages)) == 1:
            ages = ages[:1]
        rows = 1 if self.alike else self.rows
        slots, taken = (grid.expand(rows, -1, -1) for grid in self.grid_slots)
        seen = [
            self._block_mask(slots[r, j], taken[r, j], r, j, sliding_window)
            for r in range(rows)
            for j in range(len(ages) if rows == 1 else self.blocks)
        ]
        mask = torch.stack(seen)[:, None]
        if rows == 1 and self.rows > 1 and len(mask) > 1:
            mask = mask[None].expand(self.rows, *mask.shape).flatten(0, 1)
        return mask

    @cached_property
    def _ages(self) -> list[int]:
        """Blocks that look alike have the same age: far into a stream every block looks alike."""
        if self.alike and (self.whole_blocks or self.blocks == 1):
            last_anchor = max(self.config.anchor_positions, default=0) // self.config.block_size
            B, k = self.config.block_size, self.config.previous_fams
            steady = self.past_window // B + last_anchor + k + 1
            return [min(self.first_blocks[0] + j, steady) for j in range(self.blocks)]
        return list(range(self.blocks))

    @cached_property
    def grid_slots(self) -> tuple[Tensor, Tensor]:
        """(R or 1, nb, L) slot of each query of the grid, and whether there is one."""
        columns, taken = self.query_columns
        slots = self.slots.gather(1, columns)
        shape = (len(slots), self.blocks, self.queries)
        return slots.view(shape), taken.view(shape)

    def _block_mask(
        self, slots: Tensor, taken: Tensor, row: int, j: int, sliding_window: int | None
    ) -> Tensor:
        """(L, keys) for one block of one row."""
        config, B = self.config, self.config.block_size
        first_block = self.first_blocks[row]
        start = (first_block + j) * B
        query = (first_block * B + slots)[:, None]
        # Where a place of the grid has no token any mask will do, as long as it lets something in.
        anyone = ~taken[:, None]

        window = masks.token_sees_token(config)
        past = start - self.past_used + torch.arange(self.past_used)
        own = start + torch.arange(self.own_used)
        parts = []
        for key in (past, own):
            sees = window(query, key) & (key >= 0)
            if sliding_window is not None:
                sees = sees & masks.sliding_window(sliding_window)(query, key)
            parts.append(sees)
        anchors = torch.tensor(config.anchor_positions, dtype=torch.long)
        sees_anchor = masks.token_sees_anchor(config)(query, anchors)
        # Counted in FAMs: one that was passed stands for a block before the first.
        passed = self.fams_behind[row] - first_block
        fams = first_block + j + passed - config.previous_fams + torch.arange(config.previous_fams)
        fams = fams.repeat_interleave(config.fam_length * self.shows_fam)
        sees_fam = masks.token_sees_fam(config)(query + passed * B, fams)
        return torch.cat([parts[0], sees_anchor, sees_fam, parts[1]], dim=1) | anyone

    def key_bias(self) -> Tensor | None:
        """(keys,) what is added to the scores of each key: `fam_bias` to those of FAM; or nothing."""
        if not self.config.fam_bias:
            return None
        bias = torch.zeros(self.key_regions["own"].stop)
        bias[self.key_regions["fams"]] = self.config.fam_bias
        return bias


def valid_columns(attention_mask: Tensor | None, rows: int, columns: int) -> Tensor | None:
    """(R, T) bool on the CPU, or None if no token is padding."""
    if attention_mask is None:
        return None
    if (
        attention_mask.dim() != 2
        or attention_mask.shape[0] != rows
        or attention_mask.shape[1] < columns
    ):
        raise ValueError(
            f"attention_mask must have 2 dimensions, (rows, tokens), and cover the {columns} new tokens "
            f"of {rows} rows; got {tuple(attention_mask.shape)}."
        )
    valid = attention_mask[:, -columns:].bool().cpu()
    return None if bool(valid.all()) else valid


def check_one_text(position_ids: Tensor | None, attention_mask: Tensor | None) -> None:
    """Refuse rows in which positions begin anew: texts packed one behind the other, without padding."""
    if position_ids is None or position_ids.dim() != 2 or position_ids.shape[1] < 2:
        return
    if torch.compiler.is_compiling():
        return  # nothing is looked at while a graph is made
    falls = (position_ids[:, 1:] < position_ids[:, :-1]).cpu()
    rows = 0 if attention_mask is None else len(attention_mask)
    valid = valid_columns(attention_mask, rows, position_ids.shape[1])
    if valid is not None:
        falls = falls & valid[:, 1:] & valid[:, :-1]
    if bool(falls.any()):
        raise ValueError(
            "The position_ids begin anew within a row, as if several texts were packed into it, and a "
            "row of a TransformerFAM is one stream; give each text a row, or read on without them."
        )


def check_asked(asked: Tensor | None, rows: int, columns: int) -> None:
    """Refuse what does not say of each token whether it is asked."""
    if asked is not None and (asked.shape != (rows, columns) or asked.dtype != torch.bool):
        raise ValueError(
            f"fam_asked must be bool and say of each of the {columns} new tokens of {rows} rows whether "
            f"it is asked; got {asked.dtype} of {tuple(asked.shape)}."
        )
