"""Steps that lead FAM over blocks which were read once: long texts at a small part of their cost.

For a memory that is seen only where something is asked and an adapter of FAM alone. What a block leaves
in a layer then never changes while FAM is trained, see `transformerfam.replay`. So blocks of prose are
read once, before the first step. In a step the first block of each row is read, in which everything is
told; FAM is led over blocks of prose, over that block, and over more prose; and then the row's question
is asked, behind the beginning of one more block. With other prose, several times.

That prose is not what would have been read behind the row's first block: it stood in other texts.

With `bptt_blocks` a text is cut, from its end on, into segments of so many blocks, over which gradients
go back and no further. Questions then stand at the ends of segments; over those that nobody asks, F is
only led, and not kept. So a text of hundreds of blocks costs little more than leading F over it.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transformerfam.conversion import reconfigure
from transformerfam.data.rows import Source
from transformerfam.errors import UserError
from transformerfam.memory import Memory
from transformerfam.replay import Recording, record
from transformerfam.stream import evaluating
from transformerfam.training.batches import Batch
from transformerfam.training.curriculum import replayed_length
from transformerfam.training.graphs import RecordedPieces, RecordedStepper
from transformerfam.training.leading import Block, Leading, at_once
from transformerfam.training.library import Library
from transformerfam.training.recipe import Recipe
from transformerfam.training.steps import Stepper

# Of steps that are recorded: questions are filled up to a multiple of so many tokens,
_WIDTH = 64
# and begin at one of so many places of a block.
_PLACES = 4


def stepper_for(accelerator: Any, model: Any, base: Any, recipe: Recipe, source: Source) -> Stepper:
    """The recipe's way to do steps."""
    if recipe.replay.blocks and recipe.fam.has_feedback:
        return ReplayStepper(accelerator, model, base, recipe, source)
    kind = RecordedStepper if _plays_graphs(accelerator, recipe) else Stepper
    return kind(accelerator, model, base, recipe)


@dataclass(frozen=True)
class Led:
    """A text that FAM was led over, and what its questions want of FAM.

    Attributes:
        text: where it went.
        own: what the rows' own blocks left.
        fams: F after blocks by their number, (L, R, N, d) each: after those that are gone back over,
            and before the first of them.
        gradients: of F after each block that is gone back over.
    """

    text: Text
    own: Recording
    fams: Mapping[int, Tensor]
    gradients: Mapping[int, Tensor]


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

    def ends(self, size: int) -> range:
        """The last blocks of segments of `size` blocks, from that on in which all is told.

        The last segment ends with the text; the first may be shorter.
        """
        return range(self.own + (self.blocks - 1 - self.own) % size, self.blocks, size)

    def tokens(self, block_size: int) -> int:
        """Of all rows, those that are asked among them."""
        return len(self.rows.fresh) * (self.blocks * block_size + self.begun) + self.asked.tokens


def _begins(place: int, room: int) -> int:
    """One of `_PLACES` places of so many tokens' room."""
    return max(0, (2 * place + 1) * room // (2 * _PLACES))


def _plays_graphs(accelerator: Any, recipe: Recipe) -> bool:
    """Whether steps are CUDA graphs: without a GPU, or with several, nothing is."""
    one_gpu = accelerator.device.type == "cuda" and accelerator.num_processes == 1
    return recipe.run.cuda_graphs and one_gpu


def _norms(gradients: Tensor) -> Tensor:
    """(R,): the norm of each row of (L, R, N, d)."""
    wide = torch.promote_types(gradients.dtype, torch.float32)
    return torch.linalg.vector_norm(gradients, dim=(0, 2, 3), dtype=wide)


def _cut(gradient: Tensor, most: Tensor) -> None:
    """Rows of (L, R, N, d) whose norm is more than that of `most`, (R,), to that norm.

    Over many blocks the gradients of a few rows grow several hundredfold; of the others nothing would be
    left under `max_grad_norm`, which cuts the sum of all.
    """
    share = (most / _norms(gradient).clamp(min=1e-30)).clamp(max=1.0)
    gradient *= share[:, None, None].to(gradient.dtype)


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
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._recorded = _plays_graphs(accelerator, recipe)
        dropout = getattr(base.config.get_text_config(), "attention_dropout", 0.0)
        if self._recorded and dropout:
            raise UserError(
                f"The model has attention_dropout={dropout}, which differs there and back where steps "
                "are recorded; set run.cuda_graphs=false."
            )
        plays = RecordedPieces(self._trained) if self._recorded else at_once
        self._batch = 0  # of the step's, so that each has a dropout of its own
        # Windows of other kinds have something to see in any case.
        self._narrows = recipe.fam.attention == "bswa"
        self._pieces = Leading(accelerator, self.inner, base, plays)

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

    def run(self, step: int, batches: Sequence[Batch]) -> float | None:
        """See `Stepper`."""
        self._batch = 0
        loss = super().run(step, batches)
        if self.accelerator.num_processes > 1:
            self._add_up_gradients()
        return loss

    def _add_up_gradients(self) -> None:
        """Over all processes: gradients come in pieces, past the wrapper that would do so.

        What was in them before the step is added up too; a trainer has taken it away.
        """
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._trained]
        summed = self.accelerator.reduce(torch.cat([g.flatten() for g in own]), "sum")
        parts = summed.split([g.numel() for g in own])
        for parameter, part in zip(self._trained, parts, strict=True):
            parameter.grad = part.view_as(parameter).to(parameter.dtype)

    def _through(
        self, batch: Batch, memory: Memory, total: float, is_last: bool
    ) -> tuple[float, Memory]:
        batch.check_told_within(self.base.fam_config.block_size)
        self._batch += 1
        own = self._read(batch)
        summed, times = 0.0, self.recipe.replay.times
        for time in range(times):
            text = self._text(batch, time)
            self.tokens += text.tokens(self.base.fam_config.block_size)
            summed += self._replayed(text, own, 1 / total / times if total else 0.0) / times
        return summed, memory

    def _read(self, batch: Batch) -> Recording:
        """The rows' own blocks."""
        ids = batch.inputs[:, : self.base.fam_config.block_size].to(self.accelerator.device)
        parts = []
        with evaluating(self.base), self.accelerator.autocast():
            for rows in self._in_turn(len(ids), self.base.fam_config.memory_segments):
                memory = Memory.for_model(self.base, rows.stop - rows.start)
                parts += record(self.base, ids[rows], memory)
        return Recording.cat(parts)

    def _in_turn(self, rows: int, segments: int) -> list[slice]:
        """Rows that read, or are asked, at a time: more of them where windows are shorter."""
        widest = max(self.recipe.fam.memory_segments, *self.feedback.drawn_segments, 0)
        wanted = self.recipe.replay.rows_at_once or rows
        each = max(1, wanted * (widest + 1) // (segments + 1))
        return [slice(start, min(start + each, rows)) for start in range(0, rows, each)]

    def _text(self, batch: Batch, time: int) -> Text:
        """What is put around the own blocks, alike for all rows of the step on all processes."""
        B = self.base.fam_config.block_size
        rng = random.Random(f"{self.recipe.run.seed}/replay/{self._step}/{time}")
        before, behind = rng.choice(self._places())
        asked = self._of_few_widths(batch.questions(range(len(batch.fresh)), batch.asked_from))
        begun = rng.randrange(B)
        if self._recorded:
            # A recording for each place, and none of them goes on in the next block.
            begun = _begins(rng.randrange(_PLACES), B - asked.inputs.shape[1])
        place = rng.randrange(len(self.library))
        return Text(batch, asked, time, before, before + 1 + behind, begun, place)

    def _places(self) -> list[tuple[int, int]]:
        """Numbers of blocks before and behind, of texts that are not too long by now."""
        settings, B = self.recipe.replay, self.base.fam_config.block_size
        every = [(before, behind) for before in settings.before for behind in settings.behind]
        if not self.recipe.data.begin_length:
            return every
        return [pair for pair in every if replayed_length(*pair, B) <= self.longest]

    def _replayed(self, text: Text, own: Recording, share: float) -> float:
        """The loss of a text, whose gradients times `share` are added to those of the parameters."""
        alone = self._asked_alone(text)
        segments = self._segments(text, alone)
        led, rows, summed = self._lead(text, own, segments), len(text.rows.fresh), 0.0
        self._said = torch.zeros(2, rows, dtype=torch.bool)
        for part in self._in_turn(rows, self.base.fam_config.memory_segments):
            summed += self._ask(led, part, share)
        self._count()
        count = len(alone) if self.feedback.bptt_blocks else self.feedback.asked_blocks
        for group in alone:
            for part in self._in_turn(len(group), 0):
                self._ask_fam_alone(led, group[part], share / count)
        self._lead_back(led, segments)
        return summed

    def _segments(self, text: Text, alone: Iterable[Iterable[tuple[int, int]]]) -> list[range]:
        """The segments that are asked, each from its last block back to its first."""
        size = self.feedback.bptt_blocks
        if not size:
            return [range(text.blocks - 1, -1, -1)]
        ends = {text.blocks - 1, *(block for group in alone for _, block in group)}
        return [range(end, max(-1, end - size), -1) for end in ends]

    def _lead(self, text: Text, own: Recording, segments: Sequence[range]) -> Led:
        """F over all blocks; kept where segments are to be gone back over."""
        kept = {place for segment in segments for j in segment for place in (j - 1, j)}
        fams, fam = dict[int, Tensor](), None
        for j in range(text.blocks):
            self._same_chance(text, j)
            fam = self._pieces.lead(fam, self._block(text, own, j), len(text.rows.fresh), j)
            if j in kept:
                fams[j] = fam.clone()  # a recording has one place for all
        gradients = {j: torch.zeros_like(fams[j]) for segment in segments for j in segment}
        return Led(text, own, fams, gradients)

    def _lead_back(self, led: Led, segments: Iterable[range]) -> None:
        """The gradients of F after the blocks of segments, back over each of them."""
        text, growth = led.text, self.recipe.replay.max_growth
        norms = [_norms(gradient) for gradient in led.gradients.values()] if growth else []
        most = growth * torch.stack(norms).amax(0) if growth else None
        for segment in segments:
            for j in segment:
                self._same_chance(text, j)
                block, rows = self._block(text, led.own, j), len(text.rows.fresh)
                found = self._pieces.back(led.fams.get(j - 1), block, rows, j, led.gradients[j])
                if found is not None and j > segment[-1]:
                    led.gradients[j - 1].add_(found)
                    if most is not None:
                        _cut(led.gradients[j - 1], most)

    def _same_chance(self, text: Text, block: int) -> None:
        """Dropout there is dropout back."""
        if not self._recorded:
            place = f"{self._seed(self._step)}/{self._batch}/{text.time}/{block}"
            torch.manual_seed(random.Random(place).getrandbits(63))

    def _block(self, text: Text, own: Recording, j: int) -> Block:
        """What a block of the text left; of the last, that is begun, what is read of it."""
        if j == text.own:
            return own.tokens
        place = text.prose(j, len(self.library))
        read = [self.library.block(layer, place) for layer in range(len(own.tokens))]
        return read if j < text.blocks else [kv.cut(0, text.begun) for kv in read]

    # ---- questions

    def _ask(self, led: Led, rows: slice, share: float) -> float:
        """The loss of some rows' questions behind the text."""
        text, own, config = led.text, led.own.rows(rows), self.base.fam_config
        previous = config.previous_fams
        kept = max((config.past_length or 0) // config.block_size, previous)
        seen = range(max(0, text.blocks - kept), text.blocks + 1)
        blocks = [self._block(text, own, j) for j in seen]
        newest = range(max(0, text.blocks - previous), text.blocks)
        asked = text.asked.rows(rows).to(self.accelerator.device)
        found = self._pieces.ask(
            torch.stack([led.fams[j][:, rows] for j in newest]),
            blocks,
            own.anchors,
            behind=text.blocks,
            asked=asked,
            columns=self._columns(asked),
            share=share,
        )
        for i, j in enumerate(newest):
            led.gradients[j][:, rows] += found.gradient[i]
        self._said[:, rows] = found.said
        return found.loss

    def _asked_alone(self, text: Text) -> list[list[tuple[int, int]]]:
        """Rows, and blocks behind which they are asked of FAM alone; in groups, each asked at once."""
        count, size = self.feedback.asked_blocks, self.feedback.bptt_blocks
        rows = range(len(text.rows.fresh))
        if not count:
            return []
        if not size:
            ids, told = text.rows.inputs, text.ends(1)
            return [[(row, j) for row in rows for j in self._draw(told, ids[row], text.time)]]
        # The same ones for all rows, so that few segments are gone back over; and always the first, in
        # which what is told is written.
        rng = random.Random(f"{self.recipe.run.seed}/ends/{self._step}/{text.time}")
        first, *others = text.ends(size)
        ends = [first, *rng.sample(others, min(count - 1, len(others)))]
        return [[(row, end) for row in rows] for end in ends]

    def _ask_fam_alone(self, led: Led, asked: Sequence[tuple[int, int]], share: float) -> None:
        """Ask rows behind blocks, both of which are named, of F alone."""
        questions = self._of_few_widths(led.text.rows.questions([row for row, _ in asked]))
        questions = questions.to(self.accelerator.device)
        segments = self.base.fam_config.memory_segments
        if questions.inputs.shape[1] <= self.base.fam_config.block_size and self._narrows:
            self._set_segments(0)  # windows that hold nothing need not be looked at
        known = torch.stack([led.fams[block][:, row] for row, block in asked], dim=1)[None]
        found = self._pieces.ask_fam_alone(known, questions, self._columns(questions), share)
        self._set_segments(segments)
        for i, (row, block) in enumerate(asked):
            led.gradients[block][:, row] += found.gradient[0, :, i]

    def _of_few_widths(self, asked: Batch) -> Batch:
        """Questions, filled up to few widths if each is a recording."""
        width = -(-asked.inputs.shape[1] // _WIDTH) * _WIDTH
        return asked.filled_up(width) if self._recorded else asked

    def _columns(self, asked: Batch) -> Tensor | None:
        """Where the head is computed: everywhere, if that is to be alike in all texts."""
        if self._recorded:
            return None
        return asked.weights.any(0).nonzero()[:, 0]
