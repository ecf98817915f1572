"""Infini-attention (arXiv 2404.07143): beside its window, each head reads a sum of all past blocks.

For each layer and key-value head a matrix M, (D, Dv), and a vector z, (D,), both 0 at first:

    σ(x)    = ELU(x) + 1
    A_mem   = σ(Q) M / (σ(Q) z)                              equation 3
    M      += σ(K)ᵀ V                                        equation 4, `linear`
    M      += σ(K)ᵀ (V - σ(K) M / (σ(K) z))                  equation 5, `delta`
    z      += Σ σ(K)                                         over the block's tokens
    A       = sigmoid(β) A_mem + (1 - sigmoid(β)) A_local    equation 10, β one number for each head

Queries of block τ read M as it was after block τ - 1; the paper's segment is a block. Q and K have
no positions here. A_local is attention over any window of `bswa`, whose past blocks are in M as well;
the paper's has none (`memory_segments=0`). While nothing is in memory, in block 0, A is A_local.

Knows one layer; the gates β come with the call.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import elu, pad

from transformerfam.attention import AttentionStyle
from transformerfam.blocks import TokenPass


class CompressivePass(TokenPass):
    """One layer over the new tokens of a call: local attention, and what memory adds to it.

    Its state, in `LayerMemory.extra`, is [M | z] as one matrix (R, Hk, D, Dv + 1), in float32 or
    wider: `compressed` holds all finished blocks, and `pending` what the tokens of the block being
    read will add. Both rules add up over tokens as long as M stands still, and it does in a block.
    """

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, style: AttentionStyle) -> Tensor:
        """An `AttentionPass`: (R, H, T, D) queries to (R, T, H, Dv)."""
        local = super().__call__(query, key, value, style)
        wide = torch.promote_types(query.dtype, torch.float32)
        query, key, value = (x.to(wide) for x in (query, key, value))
        memory, pending = self._state_before(key, value)
        features, queries = self._to_grid(_features(key)), self._to_grid(_features(query))
        features = features * self._is_token(features)
        # [V | 1]: the column of ones makes z the last column of M.
        values = self._to_grid(pad(value, (0, 1), value=1.0))
        read = []
        for j in range(self.plan.blocks):
            read.append(self._read(queries[:, j], memory))
            pending = pending + self._written(features[:, j], values[:, j], memory)
            done = self._finishes(j, memory)
            memory = memory + done * pending
            pending = pending * ~done
        if (after := self.call.after[self.layer]) is not None:
            extra = {"compressed": memory, "pending": pending}
            self.call.leave(self.layer, replace(after, extra=extra))
        gate = self._gate(query)
        mixed = (1 - gate) * local + gate * self._from_grid(torch.stack(read, 1))
        return mixed.to(local.dtype)

    def _state_before(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        before = self.call.before[self.layer]
        if before is None:
            empty = key.new_zeros(*key.shape[:2], key.shape[3], value.shape[3] + 1)
            return empty, empty
        compressed, pending = before.extra["compressed"], before.extra["pending"]
        if compressed.is_inference() and not torch.is_inference_mode_enabled():
            return compressed.clone(), pending.clone()
        return compressed, pending

    def _read(self, features: Tensor, memory: Tensor) -> Tensor:
        """A_mem, (R, H, L, Dv), of σ(Q), (R, H, L, D)."""
        if self.config.stop_gradient:
            memory = memory.detach()
        heads, L = memory.shape[1], features.shape[2]
        # Query heads that share a memory become more queries of it.
        shared = features.unflatten(1, (heads, -1)).flatten(2, 3)  # (R, Hk, H/Hk · L, D)
        return _retrieved(shared, memory).unflatten(2, (-1, L)).flatten(1, 2)

    def _written(self, features: Tensor, values: Tensor, memory: Tensor) -> Tensor:
        """What tokens add to [M | z], (R, Hk, D, Dv + 1), from σ(K) and [V | 1]."""
        if self.config.compressive_memory == "delta":
            values = values - pad(_retrieved(features, memory), (0, 1))
        return _product(features.transpose(-1, -2), values)

    def _is_token(self, like: Tensor) -> Tensor:
        """(R or 1, nb, 1, L, 1) bool: where the grid has a token."""
        taken = self.call.index("grid taken", lambda: self.plan.grid_slots[1], like)
        return taken[:, :, None, :, None]

    def _finishes(self, j: int, like: Tensor) -> Tensor:
        """(R, 1, 1, 1) bool: the rows that complete block j."""
        made = self.call.index(
            f"finishes {j}", lambda: torch.tensor([n > j for n in self.plan.finished]), like
        )
        return made[:, None, None, None]

    def _gate(self, like: Tensor) -> Tensor:
        """sigmoid(β), (R or 1, T, H, 1), and 0 where nothing is in memory."""
        assert self.call.gates is not None
        gate = self.call.gates[self.layer].to(like).sigmoid()
        remembers = self.call.index("remembers", self._remembers, like)
        return remembers[..., None, None] * gate[:, None]

    def _remembers(self) -> Tensor:
        """(R, T) bool: tokens of later blocks than the stream's first."""
        first = torch.tensor(self.plan.first_blocks)[:, None]
        return first + self.plan.slots // self.config.block_size > 0


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in the type that they have: autocast would round what sums over all blocks."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def _features(x: Tensor) -> Tensor:
    """σ(x) = ELU(x) + 1, above 0."""
    return elu(x) + 1


def _retrieved(features: Tensor, memory: Tensor) -> Tensor:
    """σ M / (σ z), (..., L, Dv), for σ (..., L, D) and [M | z]; 0 where nothing is in memory."""
    sums = _product(features, memory)
    total = sums[..., -1:]
    return sums[..., :-1] / torch.where(total > 0, total, 1.0)
