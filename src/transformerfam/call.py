"""One call of a TransformerFAM's decoder: what its layers share and leave behind.

Nothing is kept on modules: a `Memory`'s layers go in, new ones come out, and the memory moves on only
when all layers have run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from transformerfam.attention import AttentionMask, AttentionStyle, attend, attention_weights
from transformerfam.auxiliary import FeedbackLosses
from transformerfam.config import FamConfig
from transformerfam.layer_memory import KeyValue, LayerMemory
from transformerfam.memory import Memory
from transformerfam.plan import CallPlan
from transformerfam.rotary import Rotary, Tables

# Sends rows (R', N, d) through a layer with the given pass in place of the attention mask.
Reenter = Callable[[Tensor, "AttentionPass"], Tensor]


class AttentionPass(Protocol):
    """What stands in a layer's attention mask: it answers the layer's call to attention."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, style: AttentionStyle) -> Tensor:
        """(R, H, L, D) queries and (R, Hk, L, D) keys, unrotated -> (R, L, H, Dv)."""


@dataclass(frozen=True)
class Attended:
    """One attention of a call, as it was computed.

    Attributes:
        layer: index of the layer.
        block: None if the call's tokens asked, all blocks at once (with `memory_source="output"`
            one after the other, each told of by itself); j if the FAM queries did that compress
            block j of the call.
        plan: of the call. `plan.key_regions` says what the keys are that tokens see; those of FAM
            queries are the N of FAM and then the B of the block.
        query, key, value, mask, style: what was given to `attention.attend`.
        output: what came of it, (G, H, L, Dv).
    """

    layer: int
    block: int | None
    plan: CallPlan
    query: Tensor
    key: Tensor
    value: Tensor
    mask: AttentionMask | None
    style: AttentionStyle
    output: Tensor

    def weights(self) -> Tensor:
        """(G, H, L, K): the weights of the values in the output."""
        return attention_weights(self.query, self.key, self.mask, self.style)


@dataclass(frozen=True)
class Written:
    """What the FAM of a layer is after a block of a call.

    Attributes:
        layer: index of the layer.
        block: j of the call.
        fam: F, (R, N, d); a row that does not complete block j has an older one there.
    """

    layer: int
    block: int
    fam: Tensor


@dataclass(frozen=True)
class Read:
    """What the new tokens of a call leave in a layer.

    Attributes:
        layer: index of the layer.
        anchors: keys, not rotated, and values of the streams' anchors, (R, Hk, A, D).
        tokens: keys, rotated in the frame of the call, and values of the new tokens, (R, Hk, T, D).
    """

    layer: int
    anchors: KeyValue
    tokens: KeyValue


# Told of what a call computes. Whoever only runs a model needs none, and pays nothing.
Observer = Callable[[Attended | Read | Written], None]


@dataclass(frozen=True)
class ReadBefore:
    """Tokens whose keys and values are known, so that no layer has to compute them (`replay`).

    Attributes:
        columns: T, whole blocks and maybe the beginning of one more.
        block: (layer, j) to keys, rotated in the frame of block j itself, and values of its tokens,
            (R, Hk, B or less, D); or (1, Hk, ..) if all streams read the same.
        anchors: layer to those of the streams, see `Read`; (1, Hk, ..) too if they are alike.
        fams: (layer, j) to F after block j, (R, N, d), of the newest `previous_fams` blocks, if it is
            known too: no layer then updates it.
        keep: whether the memory after the call is wanted, and not F alone, which an observer is told.
    """

    columns: int
    block: Callable[[int, int], KeyValue]
    anchors: Callable[[int], KeyValue]
    fams: Callable[[int, int], Tensor] | None = None
    keep: bool = True


_KEPT: ContextVar[dict[Any, Any] | None] = ContextVar("kept", default=None)


@contextmanager
def keeping(made: dict[Any, Any]) -> Iterator[None]:
    """Let calls in here share what they make once (`Call.once`), with each other and with later ones.

    They must have the same plan: as many rows and columns of streams that stand at the same place. A
    CUDA graph is recorded like this, which can hold no copy from the CPU.
    """
    before = _KEPT.set(made)
    try:
        yield
    finally:
        _KEPT.reset(before)


@contextmanager
def apart(name: str) -> Iterator[None]:
    """Let calls in here share what they make with each other alone, inside of `keeping`."""
    kept = _KEPT.get()
    if kept is None:
        yield
        return
    with keeping(kept.setdefault(("apart", name), {})):
        yield


class Call:
    """One call of the decoder: R rows, T new tokens each, on an existing or a new memory.

    Args:
        config: geometry.
        plan: where the new tokens stand.
        before: each layer's memory before the call; None for a new stream.
        rotaries: each layer's rotary positions.
        start: the trained start of FAM, None without feedback: the prompt (N, d), which is the FAM
            input of layer 0 in block 0, or a prefix (layers · N, d).
        keep: whether the memories after the call are wanted.
        first_fams: each layer's F_{-1}, (R or 1, N, d), of the rows that begin with one; None: no
            row does.
        beginning: for each row whether it does.
        offset: position of the first token of each stream.
        gates: (layers, H), β of the compressive memory; None without.
        losses: takes the auxiliary losses of the layers; None: they are not computed.
        observer: told of what tokens leave, of each attention, and of FAM after each block.
        asked: (R, T) bool, which tokens see FAM; None: all, or as the plan has it none.
        given: the new tokens' keys and values, if they are known.
    """

    def __init__(
        self,
        config: FamConfig,
        plan: CallPlan,
        before: list[LayerMemory | None],
        rotaries: tuple[Rotary, ...],
        start: Tensor | None,
        keep: bool,
        first_fams: Sequence[Tensor] | None = None,
        beginning: tuple[bool, ...] = (),
        offset: float = 0.0,
        gates: Tensor | None = None,
        losses: FeedbackLosses | None = None,
        observer: Observer | None = None,
        asked: Tensor | None = None,
        given: ReadBefore | None = None,
    ) -> None:
        self.config = config
        self.plan = plan
        self.before = before
        self.rotaries = rotaries
        self.keep = keep
        self.start = start
        self.first_fams = first_fams
        self.beginning = beginning
        self.offset = offset
        self.gates = gates
        self.losses = losses
        self.observer = observer
        self.asked = asked
        self.given = given
        # Made from a tensor of this very call, so not `once`, which calls may share.
        self.asked_masks: dict[AttentionMask, AttentionMask] = {}
        self.after: list[LayerMemory | None] = [None] * len(before)
        self._finished = False
        # rising[l]: the FAM input of layer l in block 0 (B.1), (R, N, d): the prompt rises once.
        self.rising: list[Tensor | None] = [None] * (len(before) + 1)
        if start is not None and config.fam_start == "prompt":
            self.rising[0] = start.expand(plan.rows, -1, -1)
        kept = _KEPT.get()
        self._cache: dict[Any, Any] = {} if kept is None else kept

    def finish(self, memory: Memory | None) -> None:
        """Advance `memory`, if there is one, to after the call, and be silent from now on.

        Layers that are computed again for their gradients (activation checkpointing) come to the call
        once more; what they make then belongs to nobody, and must not be kept.
        """
        if memory is not None:
            layers = [layer for layer in self.after if layer is not None]
            assert len(layers) == len(self.after), "a layer did not run"
            memory.advance(layers, self.plan.counts)
        self.after = [None] * len(self.after)
        self.observer = None
        self._finished = True

    def leave(self, layer: int, after: LayerMemory) -> None:
        """A layer's memory after the call, if it is wanted."""
        if self.keep and not self._finished:
            self.after[layer] = after

    def tell(self, seen: Attended | Read | Written) -> None:
        """Let the observer know, if there is one."""
        if self.observer is not None:
            self.observer(seen)

    def attend(
        self,
        layer: int,
        block: int | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: AttentionMask | None,
        style: AttentionStyle,
    ) -> Tensor:
        """`attention.attend` for a layer's tokens, or for the FAM queries that compress a block."""
        out = attend(query, key, value, mask, style, self.config.backend)
        self.tell(Attended(layer, block, self.plan, query, key, value, mask, style, output=out))
        return out

    # ---- made once for all layers

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """A value shared by the layers of this call."""
        if key not in self._cache:
            with torch.no_grad():
                self._cache[key] = make()
        return self._cache[key]

    def tables(
        self, layer: int, name: str, positions: Callable[[], Tensor], like: Tensor
    ) -> Tables | None:
        """Rotation by `positions`, shared by the layers of the same rotary."""
        rotary = self.rotaries[layer]
        return self.once((id(rotary), name, like.device), lambda: rotary.tables(positions(), like))

    def index(self, name: str, make: Callable[[], Tensor], like: Tensor) -> Tensor:
        """An index tensor of the plan, on the device of `like`."""
        return self.once((name, like.device), lambda: make().to(like.device))

    # ---- positions in the frame

    def frame_starts(self) -> Tensor:
        """(R or 1, 1) position in the stream of the start of the frame."""
        return self._tokens_of(self.plan.first_blocks) + self.offset

    @property
    def frame_moves(self) -> bool:
        """Whether the frame follows the stream.

        Where everything is kept it stands still at the start: keys that are kept for ever would be
        rotated again at every block, and round each time.
        """
        return self.config.past_length is not None

    def in_frame(self, positions: Tensor) -> Tensor:
        """Rotary positions from positions relative to the start of the call's first block."""
        return positions if self.frame_moves else positions + self.frame_starts()

    def token_positions(self) -> Tensor:
        """(R or 1, T) rotary position of each new token."""
        return self.in_frame(self.plan.slots)

    def frame_shift(self) -> Tensor:
        """(R or 1, 1): how far everything moves back when the frame moves on to the next call."""
        return -self._tokens_of(self.plan.finished)

    def _tokens_of(self, blocks: Sequence[int]) -> Tensor:
        """(R or 1, 1) tokens in so many blocks of each row; one row if all are alike."""
        same = len(set(blocks)) == 1
        counted = torch.tensor(blocks[:1] if same else blocks, dtype=torch.float64)
        return counted[:, None] * self.config.block_size

    def fam_positions(self, block: int) -> Tensor:
        """(R or 1, N) frame position of F_{j-1}, the FAM that block j of the call reads (B.2.1)."""
        B, N = self.config.block_size, self.config.fam_length
        slot = torch.arange(N, dtype=torch.float64)[None]
        if self.config.fam_position == "zero":
            return self.in_frame(-self.frame_starts()).expand(-1, N)
        if self.config.fam_position == "float":
            return self.in_frame(block * B - 1 + (slot + 1) / (N + 1))
        return self.in_frame(block * B - N + slot)

    def anchor_positions(self, block: int) -> Tensor:
        """(R or 1, A) frame position at which block j of the call sees the anchors."""
        anchors = torch.tensor(self.config.anchor_positions, dtype=torch.float64)[None]
        if self.config.global_positions:
            return anchors + self.offset - self.frame_starts()
        S, P = self.config.sink_tokens, self.plan.past_length
        return block * self.config.block_size - P - S + anchors

    def anchor_positions_of_blocks(self, blocks: int) -> Tensor:
        """(R or 1, nb, A): the same for each of the first `blocks` blocks."""
        return torch.stack([self.anchor_positions(j) for j in range(blocks)], dim=1)
