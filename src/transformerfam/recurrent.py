"""Memory that runs through the whole stack: RMT and AutoCompressors, one block after the other.

The rivals of a memory that stays in its layer. A block of B tokens is read by itself, between memory
tokens that stand in the sequence like any others, at the positions that follow from their places:

    RMT (arXiv 2207.06881)             [ m_τ : N | block τ : B | m_τ : N ]      m_0 = the prompt
    AutoCompressor (arXiv 2305.14788)  [ σ_1 .. σ_τ : τ·N | block τ : B | prompt : N ]

Tokens see what is before them. The N rows at the end, which come once the block is complete, see all
of it; what the top layer makes of them is m_{τ+1}, or σ_{τ+1}. In RMT the memory tokens of each end
see each other without a causal mask, as in that paper's code; in an AutoCompressor everything is
causal. The *output of the model*, behind its last norm, enters the next block as the input of its
first layer, behind whatever the family does to embeddings: both papers' code takes it, and it cannot
grow from block to block.

Left out of the papers: RMT's cache of hidden states (Transformer-XL with memory tokens); randomised
segment lengths, and gradients stopped after two segments (`feedback.bptt_blocks` stops them at fixed
places). AutoCompressors for OPT give summaries no positions; here they have those of their places.

Knows one decoder as a function that sends rows through all layers; no family, no text.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from transformerfam import masks
from transformerfam.attention import AttentionMask, AttentionStyle, attend
from transformerfam.call import AttentionPass
from transformerfam.config import FamConfig
from transformerfam.indexing import unsqueeze
from transformerfam.layer_memory import KeyValue, LayerMemory
from transformerfam.memory import Memory
from transformerfam.rotary import Rotary, rotate

# Sends rows (R, L, d) through the stack with the given call: the model's output, (R, L, d).
Stack = Callable[[Tensor, "SegmentCall"], Tensor]


class Segments:
    """Reads new tokens on from a memory, block after block.

    Args:
        config: geometry.
        memory: where the streams stand; it is not changed.
        prompt: (N, d), m_0 of RMT, or the summary tokens of an AutoCompressor.
        rotaries: each layer's rotary positions.

    Raises:
        ValueError: if rows do not stand equally far in their streams.
    """

    def __init__(
        self, config: FamConfig, memory: Memory, prompt: Tensor, rotaries: Sequence[Rotary]
    ) -> None:
        if len(set(memory.position)) > 1:
            raise ValueError(
                f"Under recurrence={config.recurrence!r} all rows of a batch must stand equally far "
                "in their streams; read rows that do not one by one."
            )
        self.config = config
        self.rotaries = rotaries
        self.position = memory.position[0]
        self.prompt = prompt.expand(memory.rows, -1, -1)
        self.layers = list(memory.layers_memory)
        self.written = memory.written
        if self.written is not None and self.written.is_inference():
            self.written = self.written.clone()  # such tensors cannot be saved for backward

    def read(self, tokens: Tensor, stack: Stack) -> Tensor:
        """The model's output for new tokens (R, T, d), both without memory tokens."""
        outputs = []
        for part in self._parts(tokens):
            call = self._call(part.shape[1])
            # Places kept free for memory tokens, which enter at the first layer.
            front, back = (part.new_zeros(rows.shape) for rows in (call.front, call.back))
            output = stack(torch.cat([front, part, back], dim=1), call)
            end = output.shape[1] - back.shape[1]
            outputs.append(output[:, front.shape[1] : end])
            # A copy: the rest of the output can be freed.
            self._advance(part.shape[1], call, output[:, end:].clone())
        return torch.cat(outputs, dim=1)

    def commit(self, memory: Memory) -> None:
        """Advance `memory` to after what was read."""
        layers = [layer for layer in self.layers if layer is not None]
        assert len(layers) == len(self.layers), "a layer did not run"
        counts = [self.position - position for position in memory.position]
        written = self.written
        if written is not None and not torch.is_grad_enabled():
            written = written.detach()
        memory.advance(layers, counts, written=written)

    def _parts(self, tokens: Tensor) -> Iterator[Tensor]:
        """Cut where blocks end."""
        B = self.config.block_size
        first = min(B - self.position % B, tokens.shape[1])
        yield tokens[:, :first]
        if first < tokens.shape[1]:
            yield from tokens[:, first:].split(B, dim=1)

    def _memory_tokens(self) -> Tensor:
        """(R, S, d): what stands in front of the present block."""
        if self.position >= self.config.block_size:
            assert self.written is not None
            return self.written
        return self.prompt if self.config.recurrence == "rmt" else self.prompt[:, :0]

    def _call(self, count: int) -> SegmentCall:
        B, memory = self.config.block_size, self._memory_tokens()
        depth = self.position % B
        to_write = memory if self.config.recurrence == "rmt" else self.prompt
        return SegmentCall(
            self.config,
            self.rotaries,
            before=self.layers,
            memory_tokens=memory.shape[1],
            depth=depth,
            front=memory[:, : None if depth == 0 else 0],
            back=to_write[:, : None if depth + count == B else 0],
        )

    def _advance(self, count: int, call: SegmentCall, new: Tensor) -> None:
        if new.shape[1] and self.config.recurrence == "autocompressor":
            new = torch.cat([self._memory_tokens(), new], dim=1)
        # In the first block nothing is written yet: the prompt is no part of the state.
        if new.shape[1] or self.position < self.config.block_size:
            self.written = new
        self.layers = list(call.after)
        self.position += count


class SegmentCall:
    """One call of the decoder, over rows of one block: what its layers share and leave behind.

    Args:
        config: geometry.
        rotaries: each layer's rotary positions.
        before: each layer's keys and values of the block so far.
        memory_tokens: S, rows in front of the block.
        depth: tokens of the block that were read before this call.
        front: (R, S, d), the memory tokens in front, at the first tokens of the block; then (R, 0, d).
        back: (R, N, d), those that are to be written, at its last tokens; else (R, 0, d).

    Attributes:
        after: each layer's keys and values, for the next call.
    """

    def __init__(
        self,
        config: FamConfig,
        rotaries: Sequence[Rotary],
        before: Sequence[LayerMemory | None],
        *,
        memory_tokens: int,
        depth: int,
        front: Tensor,
        back: Tensor,
    ) -> None:
        self.config = config
        self.rotaries = rotaries
        self.before = before
        self.memory_tokens = memory_tokens
        self.depth = depth
        self.front = front
        self.back = back
        self.after: list[LayerMemory | None] = [None] * len(before)
        self._cache: dict[Hashable, Any] = {}

    def inputs(self, layer: int, hidden: Tensor) -> Tensor:
        """What a layer reads (R, L, d): in the first, memory tokens stand in their places."""
        if layer:
            return hidden
        tokens = hidden[:, self.front.shape[1] : hidden.shape[1] - self.back.shape[1]]
        return torch.cat([self.front.to(hidden), tokens, self.back.to(hidden)], dim=1)

    def enter(self, layer: int, hidden: Tensor) -> AttentionPass:
        """The pass of one layer, whose input is `hidden`."""
        return partial(self._attend, layer, hidden)

    def _attend(
        self,
        layer: int,
        hidden: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        style: AttentionStyle,
    ) -> Tensor:
        """(R, H, L, D) queries to (R, L, H, Dv); the layer's keys and values are kept."""
        rotary, length = self.rotaries[layer], query.shape[2]
        tables = self._once(
            (id(rotary), query.device),
            lambda: unsqueeze(rotary.tables(self._places(length)[None], query), 1),
        )
        before, seen = self.before[layer], KeyValue(rotate(key, tables), value)
        if before is not None:
            before = before.fit(key, value, hidden)
            # A new block sees nothing of the one before but what was written.
            seen = KeyValue.cat([before.tokens, seen]) if self.depth else seen
        empty = LayerMemory.without_slots(key, value, hidden)
        # When the block is complete, what it had to say is in what is written.
        self.after[layer] = empty if self.back.shape[1] else empty.with_tokens(seen)
        mask = self._once(
            ("mask", style.sliding_window, query.device),
            lambda: self._mask(length, style.sliding_window, query.device),
        )
        query = rotate(query, tables)
        out = attend(query, seen.keys, seen.values, mask, style, self.config.backend)
        return out.transpose(1, 2)

    def _once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """A value shared by the layers of this call."""
        if key not in self._cache:
            with torch.no_grad():
                self._cache[key] = make()
        return self._cache[key]

    def _places(self, length: int) -> Tensor:
        """(L,) place of each row of this call: memory tokens, block and memory tokens in one row."""
        first = self.memory_tokens + self.depth if self.depth else 0
        return first + torch.arange(length)

    def _mask(self, length: int, window: int | None, device: torch.device) -> AttentionMask:
        query, S = self._places(length)[:, None], self.memory_tokens
        key = torch.arange(int(query[-1]) + 1)[None]
        sees = masks.segment(self.config, S)(query, key)
        if window is not None:
            sees = sees & (query - window < key)
        bias = None
        if self.config.fam_bias:
            bias = (torch.arange(key.shape[1], device=device) < S) * self.config.fam_bias
        return AttentionMask(sees[None, None].to(device), bias)
