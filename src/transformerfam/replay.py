"""Blocks that were read once, taken into memories again and again.

Where tokens do not see FAM (`fam_seen="asked"`, before something is asked) what a block leaves in a
layer, its keys and values, does not depend on FAM, nor on an adapter of FAM alone. So it can be kept,
and FAM led over it at a small part of what reading costs: N rows go through the layer instead of B
tokens. A memory that is led over all blocks of a text is the one that reading it would have left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transformerfam.call import Attended, Read, ReadBefore, Written
from transformerfam.config import FamConfig
from transformerfam.layer_memory import KeyValue
from transformerfam.memory import Memory
from transformerfam.modules import decoder_of


@dataclass(frozen=True)
class Recording:
    """What one block of R streams, read at its place, leaves.

    Attributes:
        tokens: of each layer, keys, rotated in the frame of the block, and values, (R, Hk, B, D).
        anchors: of each layer, keys, not rotated, and values of the streams' anchors, (R, Hk, A, D).
    """

    tokens: list[KeyValue]
    anchors: list[KeyValue]

    @staticmethod
    def cat(parts: Sequence[Recording]) -> Recording:
        """Streams one below the other."""
        if len(parts) == 1:
            return parts[0]

        def joined(layers: Sequence[KeyValue]) -> KeyValue:
            keys, values = ([getattr(x, name) for x in layers] for name in ("keys", "values"))
            return KeyValue(torch.cat(keys), torch.cat(values))

        tokens = zip(*(p.tokens for p in parts), strict=True)
        anchors = zip(*(p.anchors for p in parts), strict=True)
        return Recording([joined(x) for x in tokens], [joined(x) for x in anchors])

    def rows(self, rows: slice) -> Recording:
        """Some of the streams."""
        cut = [[kv.map(lambda x: x[rows]) for kv in part] for part in (self.tokens, self.anchors)]
        return Recording(*cut)


@torch.no_grad()
def record(model: Any, ids: Tensor, memory: Memory) -> list[Recording]:
    """Read whole blocks, and keep what each leaves.

    Args:
        model: a TransformerFAM.
        ids: (R, n·B) token ids.
        memory: of R streams that stand at the start of a block; it is advanced.

    Raises:
        ValueError: as in `replay`, or if the ids are no whole blocks.
    """
    _check(model.fam_config, memory)
    if ids.shape[1] % model.fam_config.block_size:
        raise ValueError(
            f"Only whole blocks of {model.fam_config.block_size:,} tokens are recorded, and here are "
            f"{ids.shape[1]:,} tokens."
        )
    recordings = []
    for block in ids.split(model.fam_config.block_size, dim=1):
        heard = _Recorder()
        decoder_of(model)(
            input_ids=block, past_key_values=memory, use_cache=True, fam_observer=heard
        )
        recordings.append(Recording(heard.tokens, heard.anchors))
    return recordings


class _Recorder:
    """An observer of a call of one block."""

    def __init__(self) -> None:
        self.tokens: list[KeyValue] = []
        self.anchors: list[KeyValue] = []

    def __call__(self, seen: Attended | Read | Written) -> None:
        if isinstance(seen, Read):
            self.tokens.append(seen.tokens)
            # Not a view, which would keep all of a memory.
            self.anchors.append(seen.anchors.map(Tensor.clone))


def replay(model: Any, given: ReadBefore, memory: Memory, **options: Any) -> None:
    """Lead a memory over tokens that were read before (algorithm 2 without the tokens' own layers).

    Gradients go through FAM, and through nothing else.

    Args:
        model: a TransformerFAM.
        given: what the tokens left when they were read. Blocks need not have stood behind each other.
        memory: of streams that stand at the start of a block; it is advanced, unless `given.keep` says
            that F alone is wanted.
        options: of the decoder, such as `fam_observer`.

    Raises:
        ValueError: if tokens of this geometry see FAM, so that what they leave depends on it; if it has
            another kind of memory; or if the memory is inside a block.
    """
    _check(model.fam_config, memory)
    if given.fams is not None and model.fam_config.is_static:
        raise ValueError(
            "With fam_query='static' a stream keeps more than F, and cannot be given F alone."
        )
    decoder = decoder_of(model)
    embeddings = decoder.get_input_embeddings().weight
    # A layer is entered by one row of zeros for each stream, in the place of its tokens.
    decoder(
        inputs_embeds=embeddings.new_zeros(memory.rows, 1, embeddings.shape[1]),
        past_key_values=memory,
        use_cache=True,
        fam_given=given,
        **options,
    )


def memory_at(model: Any, rows: int, block: int, fams: Sequence[Tensor] | None = None) -> Memory:
    """A memory of streams that stand at the start of a block, with F of each layer and nothing else.

    Args:
        model: a TransformerFAM.
        rows: R.
        block: whole blocks that were read.
        fams: F of each layer, (R, N, d), after them; None: there is none, and if `block` is not 0, what
            comes next is given with its own (`ReadBefore.fams`) and fills the windows.
    """
    memory = Memory.for_model(model, rows)
    if fams is not None:
        memory.begin_with(fams)
    memory.position = (block * memory.config.block_size,) * rows
    return memory


def _check(config: FamConfig, memory: Memory) -> None:
    if config.fam_seen != "asked" or memory.asking:
        raise ValueError(
            "Only tokens that do not see FAM can be taken into a memory without being read; take "
            'fam_seen="asked", and record and replay outside of `memory.asked()`.'
        )
    if config.past_length is None:
        raise ValueError("Only windows that end can be led over what was read before.")
    if any(position % config.block_size for position in memory.position):
        raise ValueError("Only at the start of a block can a memory take in what was read before.")
