"""The feedback recurrence of one layer (algorithm 2): F_τ = layer(F_{τ-1} | block τ).

FAM rows go through the very same layer as the tokens, by *re-entrance*: the layer is run on them
with a pass of this module in place of its attention mask. No layer needs a weight of its own for
FAM, and no family code of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from transformerfam.attention import AttentionStyle, attend_beside
from transformerfam.call import Call, Reenter, Written
from transformerfam.indexing import members, merge, put, take, take_tables, unsqueeze
from transformerfam.layer_memory import KeyValue
from transformerfam.rotary import Tables, rotate


class Recurrence:
    """F of one layer over the blocks that a call completes.

    Args:
        call: the call.
        layer: index of the layer.
        reenter: runs rows through the layer.
        blocks: keys and values of block j of the call, (R, Hk, B, D), or (1, Hk, B, D) of all rows.
        extra: what the layer kept, see `FamConfig.extra_state`; after `run` what it is to keep.
        own_frames: keys of each block are rotated in its own frame, not all in that of the call.

    Attributes:
        each: F (R, N, d) after block j = 0, 1, .. of the call, if auxiliary losses want them; a row
            that does not complete block j has an older one there.
    """

    def __init__(
        self,
        call: Call,
        layer: int,
        reenter: Reenter,
        blocks: Callable[[int], KeyValue],
        extra: Mapping[str, Tensor],
        *,
        own_frames: bool = False,
    ) -> None:
        self.call = call
        self.layer = layer
        self.reenter = reenter
        self.blocks = blocks
        self.extra = dict(extra)
        self.own_frames = own_frames
        self.each: list[Tensor] = []
        self.config = call.config
        self.plan = call.plan
        self.is_static = self.config.fam_query == "static"

    def run(self, fam: Tensor) -> tuple[Tensor, list[KeyValue]]:
        """Advance F (R, N, d).

        Returns:
            F after the last block that each row completes, and for j = 0, 1, .. the keys and values
            (R, Hk, N, D) of F after block j of the call, in the frame of the call, or with
            `own_frames` in that of the block behind it.
        """
        made: list[KeyValue] = []
        finished = self.plan.finished
        for j in range(max(finished)):
            rows = self.plan.rows_finishing(j)
            updated, own = self._update(take(fam, rows), j, rows)
            if j:
                # This update projected the F that the one before it made.
                made.append(own.map(partial(put, rows=rows, count=self.plan.rows)))
            fam = merge(fam, rows, updated)
            if self.call.losses is not None:
                self.each.append(fam)
            self.call.tell(Written(self.layer, j, fam))
        if max(finished):
            self._project_last(fam, made)
        return fam, made

    # ---- one block

    def _update(self, fam: Tensor, j: int, rows: Tensor | None) -> tuple[Tensor, KeyValue]:
        """F_τ of some rows from their F_{τ-1} and block j; and the keys and values of F_{τ-1}."""
        batch = members(rows, self.plan.rows)
        is_first = [self.plan.fams_behind[r] + j == 0 for r in batch]
        if not any(is_first):
            return self._next_update(fam, j, rows)
        if all(is_first):
            return self._first_update(j, rows)
        first = torch.tensor([i for i, yes in enumerate(is_first) if yes])
        later = torch.tensor([i for i, yes in enumerate(is_first) if not yes])
        index = torch.tensor(batch)
        one, one_kv = self._first_update(j, index[first])
        two, two_kv = self._next_update(take(fam, later), j, index[later])
        order = torch.cat([first, later]).argsort()
        return take(torch.cat([one, two]), order), one_kv.zip(
            two_kv, lambda a, b: take(torch.cat([a, b]), order)
        )

    def _next_update(self, fam: Tensor, j: int, rows: Tensor | None) -> tuple[Tensor, KeyValue]:
        compress = self._fam_pass(j, rows)
        if self.is_static:
            # SUM FAM: only keys and values are F's, and nothing of F is copied.
            query, _, _ = projections(self.reenter, take(self.extra["fam_input"], rows))
            _, key, value = projections(self.reenter, fam)
            compress.given = query, key, value
            fam = torch.zeros_like(fam)
        return self._bounded(self.reenter(fam, compress)), compress.own

    def _first_update(self, j: int, rows: Tensor | None) -> tuple[Tensor, KeyValue]:
        """Block 0 of the stream: the FAM input is the prompt as it has risen to this layer (B.1)."""
        risen = self.call.rising[self.layer]
        assert risen is not None, "the layer below has not read block 0"
        # A model may be split over devices between two layers.
        compress = self._fam_pass(j, rows)
        risen = take(risen, rows).to(compress.block.keys.device)
        if self.is_static:
            self.extra["fam_input"] = merge(self.extra["fam_input"], rows, risen)
        if self.is_static or self.config.first_residual == "zero":
            # Af = attention: the layer gets zeros for its residual, and attention the queries, keys
            # and values of the prompt.
            compress.given = projections(self.reenter, risen)
            risen = torch.zeros_like(risen)
        updated = self._bounded(self.reenter(risen, compress))
        rises = put(updated, rows, self.plan.rows)
        if self.call.rising[self.layer + 1] is None:
            # Recomputation under activation checkpointing comes here again; the first stays.
            self.call.rising[self.layer + 1] = rises
        return updated, compress.own

    def _project_last(self, fam: Tensor, made: list[KeyValue]) -> None:
        """Keys and values of each row's newest F, which no update has projected yet."""
        _, key, value = projections(self.reenter, fam)
        for blocks in sorted(set(self.plan.finished) - {0}):
            new = KeyValue(rotate(key, self._tables(blocks, blocks, key)), value)
            if blocks > len(made):
                made.append(new)
            else:
                rows = self.plan.rows_having_finished(blocks)
                newest = new.map(partial(take, rows=rows))
                made[blocks - 1] = made[blocks - 1].zip(newest, partial(_merged, rows))

    def _fam_pass(self, j: int, rows: Tensor | None) -> FamPass:
        block = self.blocks(j).map(lambda x: take(x, rows) if len(x) == self.plan.rows else x)
        key_tables = query_tables = take_tables(self._tables(j, j, block.keys), rows)
        if self.config.fam_query_position == "block_end":
            query_tables = take_tables(self._tables(j + 1, j, block.keys), rows)
        return FamPass(block, query_tables, key_tables, partial(self.call.attend, self.layer, j))

    def _tables(self, block: int, reader: int, like: Tensor) -> Tables | None:
        """Rotation of the FAM before a block, in the frame of the keys of block `reader`."""
        frame = reader if self.own_frames else 0
        return fam_tables(self.call, self.layer, block, like, frame)

    def _bounded(self, fam: Tensor) -> Tensor:
        """`feedback_norm` applied to a new F, (R', N, d)."""
        norm = self.config.feedback_norm
        if norm == "none":
            return fam
        # Squares of large rows overflow in half precision.
        wide = fam.to(torch.promote_types(fam.dtype, torch.float32))
        rms = wide.pow(2).mean(-1, keepdim=True).add(1e-6).sqrt()
        if norm == "rms":
            return (wide * (self.config.feedback_rms / rms)).to(fam.dtype)
        if isinstance(norm, tuple):
            caps = self.call.once(
                ("caps", fam.device, wide.dtype),
                lambda: torch.as_tensor(norm, dtype=wide.dtype, device=fam.device).reshape(-1, 1),
            )
            return (wide * (caps / rms).clamp(max=1.0)).to(fam.dtype)
        return (wide * (float(norm) / rms).clamp(max=1.0)).to(fam.dtype)


def fam_keys(
    call: Call, layer: int, reenter: Reenter, fam: Tensor, block: int, frame: int = 0
) -> KeyValue:
    """Keys, rotated for block `block` of the call to read, and values of F (R, N, d)."""
    _, key, value = projections(reenter, fam)
    return KeyValue(rotate(key, fam_tables(call, layer, block, key, frame)), value)


def fam_tables(call: Call, layer: int, block: int, like: Tensor, frame: int = 0) -> Tables | None:
    """Rotation of the FAM that a block of the call reads, in the frame of block `frame`."""

    def positions() -> Tensor:
        return call.fam_positions(block) - frame * call.config.block_size

    return unsqueeze(call.tables(layer, f"fam {block} in {frame}", positions, like), 1)


def projections(reenter: Reenter, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The layer's queries, keys and values of some rows, (R', H, N, D) each, not rotated."""
    try:
        reenter(rows, _stop_with_projections)
    except _Projected as projected:
        return projected.query, projected.key, projected.value
    raise RuntimeError("the layer called no attention")


def _merged(rows: Tensor | None, old: Tensor, new: Tensor) -> Tensor:
    return merge(old, rows, new)


class FamPass:
    """The FAM rows of a layer compress one block: they attend [ Kf ; K_τ ] without a mask.

    Attributes:
        attend: `Call.attend` for this layer and block.
        given: queries, keys and values to use instead of the layer's, or None.
        own: keys (rotated) and values of the FAM rows, once it has run.
    """

    def __init__(
        self,
        block: KeyValue,
        query_tables: Tables | None,
        key_tables: Tables | None,
        attend: Callable[..., Tensor],
    ) -> None:
        self.block = block
        self.query_tables = query_tables
        self.key_tables = key_tables
        self.attend = attend
        self.given: tuple[Tensor, Tensor, Tensor] | None = None
        self.own: KeyValue

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, style: AttentionStyle) -> Tensor:
        """An `AttentionPass`: (R', H, N, D) queries to (R', N, H, Dv)."""
        if self.given is not None:
            query, key, value = self.given
        query = rotate(query, self.query_tables)
        self.own = KeyValue(rotate(key, self.key_tables), value)
        if len(self.block.keys) < len(query):
            own, shared = ((x.keys, x.values) for x in (self.own, self.block))
            return attend_beside(query, own, shared, style).transpose(1, 2)
        seen = KeyValue.cat([self.own, self.block])
        return self.attend(query, seen.keys, seen.values, None, style).transpose(1, 2)


class _Projected(Exception):
    """Leaves a layer at its attention: the rest of it would be computed for nothing."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        super().__init__()
        self.query, self.key, self.value = query, key, value


def _stop_with_projections(
    query: Tensor, key: Tensor, value: Tensor, style: AttentionStyle
) -> Tensor:
    raise _Projected(query, key, value)
