"""Several streams read at once, as rows of one memory: what comes of each is what comes of it alone.

`score_each` is of several continuations of one stream, `absorb_rows` and `hits_of_rows` of streams that
are as long as each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transformerfam.memory import Memory
from transformerfam.stream import (
    check_vocabulary,
    chunk_lengths,
    evaluating,
    read,
    scores,
    single_row,
)

_SIDE_BY_SIDE_BYTES = 256 << 20


@dataclass(frozen=True)
class Scored:
    """How well a continuation of a stream was predicted.

    Attributes:
        nats: sum of -log p over its tokens, but for the first where nothing was read before.
        hits: (scored,) bool on the CPU, whether each of those tokens was the likeliest.
    """

    nats: float
    hits: Tensor


def score_each(
    model: Any, continuations: Sequence[Sequence[int]], memory: Memory
) -> Iterator[Scored]:
    """How well each of several continuations of one stream is predicted, read side by side.

    Where rows of memory are small, short ones cost little more than one of them. They count as asked
    (`FamConfig.fam_seen`). No gradients.

    Args:
        model: a TransformerFAM.
        continuations: token ids, of any lengths.
        memory: where the stream stands, one row; it stays there.

    Yields:
        A `Scored` for each, in their order, some at a time.

    Raises:
        ValueError: as `read`; and for a memory that has read something and does not know what comes
            next, so that first tokens could not be scored.
    """
    memory = single_row(model, memory)
    if memory.position[0] and memory.next_logits is None:
        raise ValueError(
            "This memory has no next_logits to score first tokens with; read the last tokens before the "
            "continuations with transformerfam.read or stream.absorb."
        )
    rows = _rows_side_by_side(model, continuations, memory)
    for start in range(0, len(continuations), rows):
        group = continuations[start : start + rows]
        with memory.asked():
            side_by_side = _side_by_side if len(group) > 1 else _alone
            scored = side_by_side(model, group, memory)
        yield from scored


def _rows_side_by_side(model: Any, continuations: Sequence[Sequence[int]], memory: Memory) -> int:
    # Rows of memory that runs through the stack cannot be padded; a fresh memory does not know yet how
    # large it will be.
    if memory.config.through_stack or not memory.is_initialized:
        return 1
    logits = 4 * model.config.get_text_config().vocab_size * max(map(len, continuations), default=0)
    return max(1, _SIDE_BY_SIDE_BYTES // (memory.nbytes + logits))


def _alone(model: Any, group: Sequence[Sequence[int]], memory: Memory) -> list[Scored]:
    (ids,) = group
    chunks = list(read(model, ids, memory.fork()))
    hits = [chunk.hits for chunk in chunks] or [torch.zeros(0, dtype=torch.bool)]
    return [Scored(sum(chunk.nats for chunk in chunks), torch.cat(hits))]


def _side_by_side(model: Any, group: Sequence[Sequence[int]], memory: Memory) -> list[Scored]:
    for ids in group:
        check_vocabulary(model, ids)
    longest = max(1, *map(len, group))
    device = model.get_input_embeddings().weight.device
    padded = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in group], device=device)
    lengths = torch.tensor([len(ids) for ids in group], device=device)
    with torch.no_grad(), evaluating(model):
        logits: Tensor = model(
            input_ids=padded,
            attention_mask=(torch.arange(longest, device=device) < lengths[:, None]).long(),
            past_key_values=memory.select_rows([0] * len(group)),
            use_cache=True,
        ).logits
    found = []
    for row, ids in zip(logits, group, strict=True):
        losses, hits = scores(row, list(ids), memory.next_logits)
        found.append(Scored(float(losses.sum(dtype=torch.float64)), hits))
    return found


@torch.no_grad()
def absorb_rows(model: Any, rows: Sequence[Sequence[int]], memory: Memory | None = None) -> Memory:
    """Read streams that are as long as each other side by side: `absorb` for several rows.

    Args:
        model: a TransformerFAM.
        rows: token ids of each stream; may be empty in all.
        memory: where they stand, one row each; advanced in place. None: fresh streams.

    Raises:
        ValueError: for streams of different lengths, or a token id that the model does not have.
    """
    memory = Memory.for_model(model, len(rows)) if memory is None else memory
    inputs, chunk_length = _as_rows(model, rows), chunk_lengths(model, memory, None)
    start = 0
    while start < inputs.shape[1]:
        stop = start + chunk_length(memory.position[0])
        with evaluating(model):
            model(
                input_ids=inputs[:, start:stop],
                past_key_values=memory,
                use_cache=True,
                logits_to_keep=1,
            )
        start = stop
    return memory


@torch.no_grad()
def hits_of_rows(model: Any, rows: Sequence[Sequence[int]], memory: Memory, *, last: int) -> Tensor:
    """Read streams on in one call: whether each of their `last` tokens was the likeliest.

    Args:
        model: a TransformerFAM.
        rows: token ids of each stream, as long as each other and longer than `last`.
        memory: where they stand, one row each; advanced in place.
        last: how many of the tokens are looked at.

    Returns:
        (rows, last) bool on the CPU.

    Raises:
        ValueError: as `absorb_rows`.
    """
    inputs = _as_rows(model, rows)
    with evaluating(model):
        logits = model(
            input_ids=inputs, past_key_values=memory, use_cache=True, logits_to_keep=last + 1
        ).logits
    hits: Tensor = logits[:, :-1].argmax(-1) == inputs[:, -last:]
    return hits.cpu()


def _as_rows(model: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    if len(set(map(len, rows))) != 1:
        raise ValueError("Streams that are read side by side must be as long as each other.")
    for ids in rows:
        check_vocabulary(model, ids)
    device = model.get_input_embeddings().weight.device
    return torch.tensor([list(ids) for ids in rows], dtype=torch.long, device=device)
