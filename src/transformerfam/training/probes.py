"""What is measured while a memory learns: loss on held-out texts, and PassKey by length.

Each probe takes a model and gives names and numbers. A text is read as a stream, in chunks, with one
memory: it may be as long as one likes.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from transformerfam.data.examples import Example
from transformerfam.data.passkey import PasskeyTexts
from transformerfam.memory import Memory
from transformerfam.stream import read

_CHUNK_BLOCKS = 8
_CHUNK_TOKENS = 2048  # of all rows together


class Probe(Protocol):
    """Something to measure."""

    @property
    def name(self) -> str:
        """What its numbers are called in the journal."""

    def __call__(self, model: Any) -> dict[str, float]:
        """Measure, without gradients; the model is in evaluation mode."""


@dataclass(frozen=True)
class HeldOut:
    """Weighted mean loss in nats of each of some texts."""

    examples: Mapping[str, Example]
    name: str = "heldout"

    def __call__(self, model: Any) -> dict[str, float]:
        """Name of the text -> loss; `mean` over the texts."""
        losses = {}
        for text, example in self.examples.items():
            weights = torch.tensor(example.weights[1:], dtype=torch.float64)
            read_losses = torch.cat([chunk.losses for chunk in read(model, example.ids)])
            losses[text] = float((read_losses * weights).sum() / weights.sum())
        return {**losses, "mean": sum(losses.values()) / len(losses)}


@dataclass(frozen=True)
class Passkey:
    """Share of keys that are said without a mistake (exact match of greedy decoding), by length.

    Attributes:
        texts: makes the texts.
        lengths: in tokens.
        samples: keys at each length.
        seed: which keys and fillers.
        rows: texts read side by side.
    """

    texts: PasskeyTexts
    lengths: Sequence[int]
    samples: int
    seed: int
    rows: int = 10
    name: str = "passkey"

    def __call__(self, model: Any) -> dict[str, float]:
        """Length -> share of keys."""
        return {str(length): self.accuracy(model, length) for length in self.lengths}

    def accuracy(self, model: Any, length: int) -> float:
        """Share of `samples` keys that are said right after texts of `length` tokens."""
        right = 0
        for first in range(0, self.samples, self.rows):
            numbers = range(first, min(first + self.rows, self.samples))
            samples = [
                self.texts.sample(random.Random(f"{self.seed}/probe/{length}/{n}"), length)
                for n in numbers
            ]
            # Rows are read side by side only if they are of one length.
            for same in {len(s.example.ids) for s in samples}:
                batch = [s for s in samples if len(s.example.ids) == same]
                ids = torch.tensor([list(s.example.ids) for s in batch])
                answers = [s.answer for s in batch]
                asked_from = min(s.example.asked_from for s in batch)
                right += sum(said_right(model, ids, answers, asked_from))
        return right / self.samples


@torch.no_grad()
def said_right(
    model: Any, ids: Tensor, answers: Sequence[slice], asked_from: int | None = None
) -> list[bool]:
    """For each row of ids (R, T) whether greedy decoding says its answer.

    Tokens see FAM from `asked_from` on, if that is before the answers, see `FamConfig.fam_seen`.

    Greedy decoding says exactly the answer if every token of it is the likeliest after the text and
    the answer's tokens before it; so one pass over text and answer tells.
    """
    start = min(a.start for a in answers) - 1
    start = start if asked_from is None else min(start, asked_from)
    logits = logits_from(model, ids, start)
    said = logits.argmax(-1).cpu()  # (R, T - start): the token after each of them
    return [
        bool((said[r, a.start - 1 - start : a.stop - 1 - start] == ids[r, a]).all())
        for r, a in enumerate(answers)
    ]


@torch.no_grad()
def logits_from(model: Any, ids: Tensor, start: int) -> Tensor:
    """(R, T - start, vocabulary): predictions after the tokens from `start` on, of a stream (R, T).

    They are asked, see `FamConfig.fam_seen`.
    """
    config = model.fam_config
    memory = Memory.for_model(model, len(ids))
    blocks = max(1, min(_CHUNK_BLOCKS, _CHUNK_TOKENS // (len(ids) * config.block_size)))
    device = model.get_input_embeddings().weight.device
    for chunk in ids[:, :start].split(blocks * config.block_size, dim=1):
        if chunk.shape[1]:
            model(input_ids=chunk.to(device), past_key_values=memory, logits_to_keep=1)
    with memory.asked():
        rest: Tensor = model(input_ids=ids[:, start:].to(device), past_key_values=memory).logits
    return rest
