"""Steps that lead FAM over blocks which were read once: long texts at a small part of their cost.

For a memory that is seen only where something is asked and an adapter of FAM alone. What a block leaves
in a layer then never changes while FAM is trained, see `transformerfam.replay`. So blocks of prose are
read once, before the first step. In a step the first block of each row is read, in which everything is
told; FAM is led over blocks of prose, over that block, and over more prose; and then the row's question
is asked, behind the beginning of one more block. With other prose, several times.

That prose is not what would have been read behind the row's first block: it stood in other texts.
"""

from __future__ import annotations

import random
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from transformerfam.call import ReadBefore
from transformerfam.conversion import reconfigure
from transformerfam.data.rows import Mixture, Source
from transformerfam.errors import UserError
from transformerfam.layer_memory import KeyValue
from transformerfam.memory import Memory
from transformerfam.replay import Recording, record, replay
from transformerfam.stream import evaluating
from transformerfam.training.batches import Batch
from transformerfam.training.graphs import RecordedStepper
from transformerfam.training.recipe import Recipe
from transformerfam.training.steps import FamAfterBlocks, Stepper

_STREAMS = 4  # that are read side by side


def stepper_for(accelerator: Any, model: Any, base: Any, recipe: Recipe, source: Source) -> Stepper:
    """The recipe's way to do steps; without a GPU, or with several, nothing is a CUDA graph."""
    if recipe.replay.blocks and recipe.fam.has_feedback:
        return ReplayStepper(accelerator, model, base, recipe, source)
    one_gpu = accelerator.device.type == "cuda" and accelerator.num_processes == 1
    kind = RecordedStepper if recipe.run.cuda_graphs and one_gpu else Stepper
    return kind(accelerator, model, base, recipe)


class Library:
    """Blocks of prose that were read once.

    Args:
        model: a TransformerFAM.
        source: what a recipe reads; gives the prose.
        blocks: P, how many at least; streams that are read side by side have as many each.
        seed: of the places of the prose.

    Attributes:
        ids: (P, B), what they say.
        tokens: of each layer, keys, rotated in the frame of their block, and values, (P, Hk, B, D).
    """

    def __init__(self, model: Any, source: Source, blocks: int, seed: int) -> None:
        self.tokens: list[KeyValue] = []
        streams = min(_STREAMS, blocks)
        each = -(-blocks // streams)
        B = model.fam_config.block_size
        rng = random.Random(f"{seed}/library")
        texts = [_prose(source, rng, (each + 1) * B) for _ in range(streams)]
        ids = torch.tensor(texts, device=model.get_input_embeddings().weight.device)
        # The first token of a stream is one to look at for nothing: its block is like no other.
        self.ids = ids[:, B:].unflatten(1, (each, B)).flatten(0, 1)
        memory = Memory.for_model(model, streams)
        with evaluating(model):
            for block, part in enumerate(ids.split(B, dim=1)):
                (read,) = record(model, part, memory)
                if block:
                    self._put(slice(block - 1, None, each), read)

    def __len__(self) -> int:
        return len(self.ids)

    def _put(self, places: slice, read: Recording) -> None:
        if not self.tokens:
            self.tokens = [
                kv.map(lambda x: x.new_empty(len(self), *x.shape[1:])) for kv in read.tokens
            ]
        for kept, new in zip(self.tokens, read.tokens, strict=True):
            kept.keys[places] = new.keys
            kept.values[places] = new.values

    def block(self, layer: int, place: int) -> KeyValue:
        """Keys and values of a block in a layer, (1, Hk, B, D), as views."""
        return self.tokens[layer].map(lambda x: x[place : place + 1])


def _prose(source: Source, rng: random.Random, tokens: int) -> list[int]:
    """So many tokens of what the sources hide things in."""
    if isinstance(source, Mixture):
        source = source.sources[source.place(rng.getrandbits(32))[0]]
    if not hasattr(source, "prose"):
        raise UserError("replay.blocks needs sources of made-up texts, whose prose is read once.")
    ids: list[int] = source.prose(rng, tokens)
    return ids


@dataclass(frozen=True)
class Text:
    """Texts of as many blocks: prose, the block of each row that tells, prose, and its question.

    All rows have the same prose: what it leaves then need not be there for each of them. A question
    that does not fit behind what is begun goes on in the next block, as any other.

    Attributes:
        rows: where they come from.
        asked: what is asked of each, and how it goes on.
        time: which of the step's texts these are.
        own: which block is the row's own.
        blocks: how many there are before the one in which it is asked.
        begun: tokens of that one, prose too, that are read before.
        place: where in the library the prose begins.
    """

    rows: Batch
    asked: Batch
    time: int
    own: int
    blocks: int
    begun: int
    place: int

    def prose(self, block: int, count: int) -> int:
        """Place of the prose of a block in a library of so many."""
        return (self.place + block) % count

    def tokens(self, block_size: int) -> int:
        """Of all rows, those that are asked among them."""
        return len(self.rows.fresh) * (self.blocks * block_size + self.begun) + self.asked.tokens


class ReplayStepper(Stepper):
    """Forward and backward of steps over recorded blocks.

    Args: see `Stepper`.
        source: what the recipe reads; gives the prose.
    """

    def __init__(
        self, accelerator: Any, model: Any, base: Any, recipe: Recipe, source: Source
    ) -> None:
        super().__init__(accelerator, model, base, recipe)
        if self._sharded:
            raise UserError("replay.blocks does not go with FSDP; set it to 0.")
        self._source = source
        self._library: Library | None = None

    @property
    def library(self) -> Library:
        """The blocks of prose; read when they are first wanted, by the windows of the geometry."""
        if self._library is None:
            drawn = self.base.fam_config
            reconfigure(self.base, drawn.replace(memory_segments=self.recipe.fam.memory_segments))
            with self.accelerator.autocast():
                self._library = Library(
                    self.base, self._source, self.recipe.replay.blocks, self.recipe.run.seed
                )
            reconfigure(self.base, drawn)
        return self._library

    def _through(
        self, batch: Batch, memory: Memory, total: float, is_last: bool
    ) -> tuple[float, Memory]:
        settings, batch = self.recipe.replay, batch.to(self.accelerator.device)
        library, B = self.library, self.base.fam_config.block_size
        batch.check_told_within(B)
        with evaluating(self.base), self.accelerator.autocast():
            (own,) = record(self.base, batch.inputs[:, :B], memory.fork())
        summed = 0.0
        for time in range(settings.times):
            text = self._text(batch, time)
            self.tokens += text.tokens(B)
            sends = is_last and time == settings.times - 1
            with nullcontext() if sends else self.accelerator.no_sync(self.model):
                with self.accelerator.autocast():
                    loss, extra = self._replayed(text, own, library, memory.fork())
                share = self.accelerator.num_processes / total / settings.times
                self.accelerator.backward((loss + extra) * share)
            summed += float(loss.detach()) / settings.times
        return summed, memory

    def _text(self, batch: Batch, time: int) -> Text:
        """What is put around the own blocks, alike for all rows of the step on all processes."""
        settings, B = self.recipe.replay, self.base.fam_config.block_size
        rng = random.Random(f"{self.recipe.run.seed}/replay/{self._step}/{time}")
        before, behind = rng.choice(settings.before), rng.choice(settings.behind)
        asked = batch.questions(range(len(batch.fresh)), batch.asked_from)
        begun, place = rng.randrange(B), rng.randrange(len(self.library))
        return Text(batch, asked, time, before, before + 1 + behind, begun, place)

    def _replayed(
        self, text: Text, own: Recording, library: Library, memory: Memory
    ) -> tuple[Tensor, Tensor | float]:
        """As `_loss`."""
        B = self.base.fam_config.block_size

        def block(layer: int, j: int) -> KeyValue:
            if j == text.own:
                return own.tokens[layer]
            read = library.block(layer, text.prose(j, len(library)))
            return read if j < text.blocks else read.cut(0, text.begun)

        written = FamAfterBlocks()
        often = {"fam_observer": written} if self.feedback.asked_blocks else {}
        columns = text.blocks * B + text.begun
        replay(self.base, ReadBefore(columns, block, own.anchors.__getitem__), memory, **often)
        with memory.asked():
            summed = self._part_loss(text.asked, memory, {})
        told = tuple(text.own * B + n for n in text.rows.told)
        rows = replace(text.rows, told=told, asked_from=(columns,) * len(told))
        return summed, self._asked_of_fam_alone(rows, written, text.time)
