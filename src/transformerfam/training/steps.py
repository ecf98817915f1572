"""One step of training: forward and backward through blocks, segments and FAM (section 3.1, B.2).

Knows how state goes from segment to segment and from step to step; knows neither where tokens come
from nor what the optimizer does with gradients.

A step reads its rows in segments of `bptt_blocks` blocks. Inside a segment gradients flow through
memory segments and FAM; between segments the memory goes on and the gradient does not. Rows of the
`documents` layout go on in the next step; others begin anew, or with the FAM that the first row of
the step before left behind (random state passing).

Where only what is asked sees FAM (`fam_seen="asked"`) the tokens before it are read in a call of their
own, and gradients go back through FAM alone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from transformerfam.auxiliary import FeedbackLosses
from transformerfam.call import Attended, Read, Written
from transformerfam.config import FamConfig
from transformerfam.conversion import reconfigure
from transformerfam.errors import UserError
from transformerfam.extras import require
from transformerfam.memory import Memory
from transformerfam.training.batches import Batch
from transformerfam.training.cross_entropy import weighted_cross_entropy
from transformerfam.training.curriculum import answers_said
from transformerfam.training.recipe import Recipe


@dataclass
class Carried:
    """What a step leaves to the next.

    Attributes:
        memories: in the `documents` layout the memory of each micro batch.
        fams: F of each layer, (1, N, d), as the first row of all left it; None: nothing yet.
    """

    memories: list[Memory] = field(default_factory=list)
    fams: tuple[Tensor, ...] | None = None


class FamAfterBlocks:
    """An observer that keeps F after each block of a call, with its gradient."""

    def __init__(self) -> None:
        self._fams: dict[int, list[Tensor]] = {}  # layer -> (R, N, d) after block 0, 1, ..

    def __call__(self, seen: Attended | Read | Written) -> None:
        """See `call.Observer`."""
        if isinstance(seen, Written):
            self._fams.setdefault(seen.layer, []).append(seen.fam)

    @property
    def blocks(self) -> int:
        """Of the call."""
        return min(map(len, self._fams.values()), default=0)

    def after(self, block: int) -> list[Tensor]:
        """F of each layer, (R, N, d), after a block."""
        return [fams[block] for _, fams in sorted(self._fams.items())]

    def behind(self, places: Sequence[tuple[int, int]]) -> list[Tensor]:
        """F of each layer, (places, N, d), of the row and after the block that each place names."""
        return [
            torch.stack([fams[block][row] for row, block in places])
            for _, fams in sorted(self._fams.items())
        ]

    def first_row_after(self, block: Tensor) -> list[Tensor]:
        """F of each layer of the first row, (1, N, d), after a block, (1,); without its gradient."""
        return [
            torch.stack([fam[:1].detach() for fam in fams]).index_select(0, block)[0]
            for _, fams in sorted(self._fams.items())
        ]


def _check_geometry(config: FamConfig, recipe: Recipe) -> None:
    """Refuse a model of another geometry than the recipe's, but for what steps set by themselves."""
    set_by_steps = {"fam_bias", "backend"}
    if recipe.feedback.drawn_segments:
        set_by_steps.add("memory_segments")
    for name in config.differences(recipe.fam):
        if name not in set_by_steps:
            own, told = getattr(config, name), getattr(recipe.fam, name)
            raise UserError(
                f"The model has {name} {own} and the recipe fam.{name} {told}; convert the model with "
                "recipe.fam."
            )


class Stepper:
    """Forward and backward of steps.

    Args:
        accelerator: of Hugging Face accelerate.
        model: what it has prepared, maybe wrapped.
        base: the TransformerFAM inside.
        recipe: settings.

    Attributes:
        longest: rows of the steps to come have mostly no more tokens.
        tokens: of the last step, those that this process read.
        right: of the last step, rows whose answers were all right, and rows with answers, of all
            processes; counted where texts grow (`data.begin_length`).
    """

    def __init__(self, accelerator: Any, model: Any, base: Any, recipe: Recipe) -> None:
        _check_geometry(base.fam_config, recipe)
        self.accelerator = accelerator
        self.model = model
        # Without the wrapper of DDP: at each of its calls all processes meet.
        self.inner = accelerator.unwrap_model(model)
        self.base = base
        self.recipe = recipe
        self.feedback = recipe.feedback
        self.carried = Carried()
        self.longest = recipe.data.length
        self.right = 0, 0
        self.tokens = 0
        self._step = 0
        self._counts_right = recipe.data.begin_length > 0
        if self._sharded and self.feedback.asked_blocks:
            raise UserError(
                "feedback.asked_blocks asks as often as a text has blocks, and under FSDP all processes "
                "must compute alike; set it to 0."
            )
        self._said = torch.zeros(2, 0, dtype=torch.bool)  # `answers_said` of the batch so far

    def run(self, step: int, batches: Sequence[Batch]) -> float | None:
        """Add the gradients of the mean loss over all rows of all processes.

        Args:
            step: number of the step, from 0; everything random follows from it and the seed.
            batches: this process's micro batches, the same number on every process.

        Returns:
            The weighted mean loss in nats over all processes; None if no token of the step counts.
        """
        self._step = step
        self.set_geometry(step)
        try:
            return self._run(step, batches)
        finally:
            self._set_segments(self.recipe.fam.memory_segments)

    def _run(self, step: int, batches: Sequence[Batch]) -> float | None:
        if self._sharded:
            batches = self._alike(batches)
        torch.manual_seed(self._seed(step))
        total = self._sum_over_processes(sum(float(b.weights.sum()) for b in batches))
        summed = torch.zeros((), dtype=torch.float64)
        self.right, self.tokens = (0, 0), 0
        memories: list[Memory] = []
        for i, batch in enumerate(batches):
            memory = self._begin(batch, i, step)
            is_last = i == len(batches) - 1
            with self._cast_once():
                loss, memory = self._through(batch, memory, total, is_last)
            summed += loss
            memories.append(memory)
        if self.recipe.data.layout == "documents":
            self.carried.memories = memories
        if self.feedback.state_passing:
            self.carried.fams = self._from_first_process(_fams_of_first_row(memories[0]))
        right, texts = (round(self._sum_over_processes(n)) for n in self.right)
        fewest = min(self.feedback.drawn_segments, default=self.base.fam_config.memory_segments)
        # What a wide window holds is said right without a memory.
        tells = self.base.fam_config.memory_segments == fewest
        self.right = (right, texts) if tells else (0, 0)
        return self._sum_over_processes(float(summed)) / total if total else None

    # ---- what a step begins with

    def set_geometry(self, step: int) -> None:
        """`fam_bias` on its way from `bias_start`, and the past blocks that the step sees."""
        self.set_bias(step)
        self._set_segments(segments_at(step, self.recipe))

    def set_bias(self, step: int) -> None:
        """`fam_bias` on its way from `bias_start` to what the recipe's geometry says."""
        wanted = bias_at(step, self.recipe)
        config = self.base.fam_config
        if config.has_feedback and config.fam_bias != wanted:
            reconfigure(self.base, config.replace(fam_bias=wanted))

    def _set_segments(self, wanted: int) -> None:
        config = self.base.fam_config
        if config.memory_segments != wanted:
            reconfigure(self.base, config.replace(memory_segments=wanted))

    def _begin(self, batch: Batch, index: int, step: int) -> Memory:
        if self.recipe.data.layout == "documents" and index < len(self.carried.memories):
            return self.carried.memories[index].restart(batch.fresh)
        memory = Memory.for_model(self.base, len(batch.fresh))
        chance = random.Random(f"{self.recipe.run.seed}/begin/{step}")
        passes = chance.random() < self.feedback.state_passing
        if passes and step >= self.feedback.state_passing_delay and self.carried.fams is not None:
            memory.begin_with(self.carried.fams)
        if chance.random() < self.feedback.position_offset:
            memory.offset = chance.uniform(0, self.feedback.position_offset_limit)
        return memory

    # ---- segments

    def _cast_once(self) -> AbstractContextManager[Any]:
        """Under autocast PEFT need not widen what LoRA reads: it would only be narrowed again."""
        if self.recipe.run.precision == "fp32" or self._sharded:  # FSDP has no autocast
            return nullcontext()
        helpers = require("peft.helpers", "train")
        context: AbstractContextManager[Any] = helpers.disable_input_dtype_casting(self.model)
        return context

    def _through(
        self, batch: Batch, memory: Memory, total: float, is_last: bool
    ) -> tuple[float, Memory]:
        """(sum of weighted losses, memory after the batch), having gone backward in each segment."""
        self.tokens += batch.tokens
        segments = list(batch.segments(self.feedback.bptt_blocks * self.base.fam_config.block_size))
        summed, self._said = 0.0, torch.zeros(2, len(batch.fresh), dtype=torch.bool)
        for i, segment in enumerate(segments):
            # The last backward of a step sends gradients between processes: all must come to it.
            sends = is_last and i == len(segments) - 1
            counts = self._sharded or bool(segment.weights.any())
            with nullcontext() if sends else self.accelerator.no_sync(self.model):
                with torch.set_grad_enabled(total > 0 and (counts or sends)):
                    loss, extra = self._loss(segment.to(self.accelerator.device), memory)
                if loss.requires_grad:
                    # Wrappers take the mean over processes, and `total` is the sum over them.
                    share = self.accelerator.num_processes / total
                    self.accelerator.backward((loss + extra) * share)
            summed += float(loss.detach())
            memory = memory.detach()
        self._count()
        return summed, memory

    def _loss(self, segment: Batch, memory: Memory) -> tuple[Tensor, Tensor | float]:
        """Sum over the tokens of a segment of weight times cross-entropy, in nats; and what is added.

        The auxiliary losses of a row count as often as its tokens do, so that micro batches and
        processes add up to the same however rows are dealt out.
        """
        extra = self._auxiliary()
        if extra is not None:
            summed = self._part_loss(segment, memory, {"fam_losses": extra})
            return summed, (extra.total() * segment.weights.sum(1)).sum()
        if not self._some_ask or self._sharded:
            return self._part_loss(segment, memory, {}), 0.0
        written = FamAfterBlocks()
        often = {"fam_observer": written} if self.feedback.asked_blocks else {}
        read, rest = segment.parts(self.base.fam_config.block_size)
        if read is None or rest is None:
            summed = self._part_loss(segment, memory, often)
        else:
            before = self._part_loss(read, memory, often, model=self.inner)
            # Rows that ask later than others have blocks here that they only read.
            summed = before + self._part_loss(rest, memory, often)
        return summed, self._asked_of_fam_alone(segment, written)

    def _asked_of_fam_alone(self, segment: Batch, written: FamAfterBlocks) -> Tensor | float:
        """As `_loss`, of questions behind `asked_blocks` blocks of each row; each counts 1/asked_blocks.

        A text is read once, and teaches what FAM holds behind each block that it was asked behind: from
        that on in which all is told, up to the last before the row asks, whatever other rows do.
        """
        if not self.feedback.asked_blocks:
            return 0.0
        B = self.base.fam_config.block_size
        rows = enumerate(zip(segment.told, segment.asked_from, strict=True))
        drawn = [
            (row, block)
            for row, (told, asked_from) in rows
            if segment.question[row] is not None
            for block in self._draw(
                range(max(0, -(-told // B) - 1), min(asked_from // B, written.blocks)),
                segment.inputs[row],
            )
        ]
        if not drawn:
            return 0.0
        asked = segment.questions([row for row, _ in drawn])
        memory = Memory.for_model(self.base, len(drawn))
        memory.begin_with(written.behind(drawn))
        with memory.asked():
            share = self._part_loss(asked, memory, {}, model=self.inner, counts_right=False)
        return share / self.feedback.asked_blocks

    def _draw(self, blocks: range, text: Tensor, time: int = 0) -> list[int]:
        """`asked_blocks` of them; the same ones whichever process has the text."""
        again = f"/{time}" if time else ""
        rng = random.Random(f"{self.recipe.run.seed}/asked/{self._step}/{int(text.sum())}{again}")
        return rng.sample(blocks, min(self.feedback.asked_blocks, len(blocks)))

    def _part_loss(
        self,
        part: Batch,
        memory: Memory,
        more: dict[str, Any],
        *,
        model: Any = None,
        counts_right: bool = True,
    ) -> Tensor:
        counted = part.weights.any(0)
        # The head is computed where some row counts, and nowhere else.
        columns = counted.nonzero()[:, 0] if counted.any() else torch.zeros_like(counted[:1]).long()
        mask = None
        if (self.feedback.state_passing or more) and part.valid is not None:
            # Only a FAM that is passed on, or looked at, can tell that a row was filled up.
            mask = part.valid
        if self._some_ask and (self._sharded or bool(part.asked.any())):
            more = {**more, "fam_asked": part.asked.to(part.inputs.device)}
        logits = (self.model if model is None else model)(
            input_ids=part.inputs,
            attention_mask=mask,
            past_key_values=memory,
            use_cache=True,
            logits_to_keep=columns,
            **more,
        ).logits
        targets, weights = part.targets[:, columns], part.weights[:, columns]
        if self._counts_right and counts_right:
            self._said |= answers_said(logits.detach(), targets, weights).cpu()
        return weighted_cross_entropy(logits.flatten(0, 1), targets.flatten(), weights.flatten())

    @property
    def _some_ask(self) -> bool:
        """Whether some tokens see FAM and others do not."""
        return self.base.fam_config.fam_seen == "asked"

    def _count(self) -> None:
        """Add the rows of a batch to `right`: an answer may stand in several segments."""
        answered, wrong = self._said
        right, texts = int((answered & ~wrong).sum()), int(answered.sum())
        self.right = self.right[0] + right, self.right[1] + texts

    def _auxiliary(self) -> FeedbackLosses | None:
        """What takes the auxiliary losses of a call; None if the recipe has none."""
        weights = self.feedback.diversity_weight, self.feedback.reconstruction_weight
        wanted = any(weights) and self.base.fam_config.has_feedback
        return FeedbackLosses(*weights) if wanted else None

    # ---- several processes

    @property
    def _sharded(self) -> bool:
        """Whether processes hold parts of each weight (FSDP): they then meet in every segment."""
        return bool(self.accelerator.distributed_type == "FSDP")

    def _alike(self, batches: Sequence[Batch]) -> list[Batch]:
        """Batches with as many segments on every process."""
        device = self.accelerator.device
        own = torch.tensor([b.inputs.shape[1] for b in batches], device=device)
        longest = self.accelerator.gather(own).view(-1, len(own)).amax(0)
        return [b.filled_up(int(n)) for b, n in zip(batches, longest, strict=True)]

    def _sum_over_processes(self, value: float) -> float:
        if self.accelerator.num_processes == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.accelerator.device)
        return float(self.accelerator.reduce(tensor, "sum"))

    def _from_first_process(self, fams: tuple[Tensor, ...] | None) -> tuple[Tensor, ...] | None:
        """The FAM of the first process's first row, on every process."""
        if self.accelerator.num_processes == 1:
            return fams
        from accelerate.utils import broadcast_object_list

        fams_there = [None if fams is None else [f.cpu() for f in fams]]
        broadcast_object_list(fams_there, from_process=0)
        found = fams_there[0]
        return None if found is None else tuple(f.to(self.accelerator.device) for f in found)

    def _seed(self, step: int) -> int:
        """For dropout: another on every process and in every step, the same when resumed."""
        where = f"{self.recipe.run.seed}/dropout/{step}/{self.accelerator.process_index}"
        return random.Random(where).getrandbits(63)


def segments_at(step: int, recipe: Recipe) -> int:
    """The past blocks that a step sees: drawn by `drawn_segments`, or those of the geometry."""
    drawn = recipe.feedback.drawn_segments
    if not drawn:
        return recipe.fam.memory_segments
    return random.Random(f"{recipe.run.seed}/segments/{step}").choice(drawn)


def bias_at(step: int, recipe: Recipe) -> float:
    """`fam_bias` in a step: from `bias_start` to that of the geometry over `bias_steps` steps."""
    feedback, end = recipe.feedback, recipe.fam.fam_bias
    if step >= feedback.bias_steps:
        return end
    left = (1 - step / feedback.bias_steps) ** feedback.bias_power
    return end + (feedback.bias_start - end) * left


def _fams_of_first_row(memory: Memory) -> tuple[Tensor, ...] | None:
    """F of each layer, (1, N, d); None if no block was finished yet."""
    written = memory.position[0] >= memory.config.block_size or memory.passed[0]
    fams = [f[:1].detach() for f in memory.fams if f is not None]
    return tuple(fams) if written and memory.config.has_feedback else None
