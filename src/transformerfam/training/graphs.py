"""Training steps as CUDA graphs: a step is recorded once and then played back.

With small blocks a step is some ten thousand small kernels, and Python takes several times as long to
start them as the GPU to run them. A recording starts them all at once. It is of one segment, forward
and backward: every row is filled up to `bptt_blocks` blocks, or to the longest length that there may
be, and begins anew, with the FAM that another text has left, or where the segment before has ended.
Where only what is asked sees FAM (`fam_seen="asked"`) it is of a whole text, one for each length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from transformerfam.call import keeping
from transformerfam.layer_memory import LayerMemory
from transformerfam.memory import Memory
from transformerfam.training.batches import Batch
from transformerfam.training.cross_entropy import weighted_cross_entropy
from transformerfam.training.curriculum import answers_said
from transformerfam.training.recipe import Recipe
from transformerfam.training.steps import FamAfterBlocks, Stepper

Beginning = Literal["anew", "passed", "on"]
Result = TypeVar("Result")


class RecordedStepper(Stepper):
    """Forward and backward of steps, recorded; what comes of them is the same as of a `Stepper`.

    Args: see `Stepper`. The accelerator's device must be a GPU, and the recipe one that may say
    `run.cuda_graphs`.
    """

    def __init__(self, accelerator: Any, model: Any, base: Any, recipe: Recipe) -> None:
        super().__init__(accelerator, model, base, recipe)
        self._length = 0
        self._pool: Any = None
        self._recordings: dict[tuple[int, int, Beginning, int, int], Recording] = {}
        # By rows and past blocks: where streams stand.
        self._streams: dict[tuple[int, int], Streams] = {}
        self._gradients = _Gradients([p for p in model.parameters() if p.requires_grad])

    def run(self, step: int, batches: Sequence[Batch]) -> float | None:
        """See `Stepper`."""
        longest = max(self.longest, *(batch.inputs.shape[1] for batch in batches))
        segment = self.feedback.bptt_blocks * self.base.fam_config.block_size
        length = min(longest, segment) if segment else longest
        if self._some_ask:
            self._pool = self._pool or graph_pool()
        elif length > self._length:
            self._recordings.clear()  # before there is room for others
            self._streams.clear()
            self._length, self._pool = length, graph_pool()
        return super().run(step, batches)

    def _through(
        self, batch: Batch, memory: Memory, total: float, is_last: bool
    ) -> tuple[float, Memory]:
        self._gradients.give()
        self.tokens += batch.tokens
        size, B = self._length, self.base.fam_config.block_size
        if self._some_ask:
            # What is read is the longer part by far: a recording for each length.
            size = -(-batch.inputs.shape[1] // B) * B
        whole = batch.filled_up(-(-batch.inputs.shape[1] // size) * size)
        # The first row's last whole block: its FAM is the one that may be passed on.
        last = (
            batch.inputs.shape[1] if batch.valid is None else int(batch.valid[0].sum())
        ) // B - 1
        begins: Beginning = "anew" if memory.passed_fams is None else "passed"
        summed, left = 0.0, memory
        self._said = torch.zeros(2, memory.rows, dtype=torch.bool)
        for segment in whole.segments(size):
            played = self._recording(begins, memory, segment)
            loss, said = played.play(segment, 1 / total if total else 0.0, last)
            summed += loss
            self._said |= said
            if self.feedback.state_passing and 0 <= last < size // B:
                left = Memory.for_model(self.base, memory.rows)
                left.begin_with([fam.clone() for fam in played.streams.written])
            begins, last = "on", last - size // B
        self._count()
        return summed, left

    def _recording(self, begins: Beginning, memory: Memory, segment: Batch) -> Recording:
        """What is played for streams that begin like those of `memory`, under the step's geometry."""
        length, read = segment.inputs.shape[1], 0
        if self._some_ask:
            before, _ = segment.parts(self.base.fam_config.block_size)
            read = 0 if before is None else before.inputs.shape[1]
        key = memory.rows, self.base.fam_config.memory_segments, begins, length, read
        streams = self._streams.setdefault(key[:2], Streams())
        if begins == "passed":
            streams.pass_on(memory)
        if key not in self._recordings:
            self._recordings[key] = self._record(begins, memory.rows, streams, length, read)
        return self._recordings[key]

    def _record(
        self, begins: Beginning, rows: int, streams: Streams, length: int, read: int
    ) -> Recording:
        """A new recording; it was run to be made, and leaves nothing of that behind."""
        with undone([*self._gradients.tensors, *streams.tensors()]):
            return Recording(
                self.model,
                Memory.for_model(self.base, rows),
                length,
                begins,
                streams,
                counts_right=self._counts_right,
                writes=bool(self.feedback.state_passing),
                goes_on=bool(self.feedback.bptt_blocks),
                read=read if self._some_ask else None,
                pool=self._pool,
            )


class Streams:
    """Where the streams of a step stand between segments, in tensors that stay where they are.

    Attributes:
        passed: F of each layer, (1, N, d), with which streams begin under random state passing.
        written: F of each layer, (1, N, d), as the first row of a segment left it.
        layers: each layer's memory after a segment.
    """

    def __init__(self) -> None:
        self.passed: list[Tensor] = []
        self.written: list[Tensor] = []
        self.layers: list[LayerMemory] = []

    def tensors(self) -> Iterator[Tensor]:
        """All of them."""
        yield from self.passed
        yield from self.written
        for layer in self.layers:
            yield from (tensor for _, tensor in layer.named_tensors())

    def pass_on(self, memory: Memory) -> None:
        """Streams begin with the FAM with which those of `memory` do, which is the same in all."""
        assert memory.passed_fams is not None
        self.passed = _put(self.passed, [fam[:1] for fam in memory.passed_fams])

    def write(self, fams: Sequence[Tensor]) -> None:
        """Take over what a first row has left."""
        self.written = _put(self.written, fams)

    def go_on(self, memory: Memory) -> None:
        """Take over where streams stand."""
        layers = [layer for layer in memory.layers_memory if layer is not None]
        if not self.layers:
            self.layers = [layer.map(lambda t: t.detach().clone()) for layer in layers]
        for mine, theirs in zip(self.layers, layers, strict=True):
            tensors = [[t.detach() for _, t in m.named_tensors()] for m in (mine, theirs)]
            _put(*tensors)


def _put(places: list[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
    """The values in their places, which are made the first time."""
    if not places:
        return [value.clone() for value in values]
    torch._foreach_copy_(places, list(values))
    return places


class Recording:
    """Forward and backward over one segment of some rows.

    Args:
        model: in training mode, on a GPU, with a gradient at each trained parameter.
        memory: an empty one.
        length: of the segment in tokens.
        begins: how.
        streams: what it begins with and leaves behind.
        counts_right: look whose answers are said right.
        writes: leave behind what the first row has written.
        goes_on: leave behind where streams stand.
        read: columns before all that are asked (`FamConfig.fam_seen`); None: all tokens see FAM.
        pool: memory that is shared with other recordings, none of which plays at the same time.
    """

    def __init__(
        self,
        model: Any,
        memory: Memory,
        length: int,
        begins: Beginning,
        streams: Streams,
        *,
        counts_right: bool,
        writes: bool,
        goes_on: bool,
        read: int | None,
        pool: Any,
    ) -> None:
        self.streams = streams
        self._model = model
        self._memory = memory
        self._begins = begins
        self._counts_right = counts_right
        self._writes = writes
        self._goes_on = goes_on
        self._read = read
        device = next(model.parameters()).device
        self._inputs = torch.zeros(memory.rows, length, dtype=torch.long, device=device)
        self._targets = torch.zeros_like(self._inputs)
        self._weights = torch.zeros(memory.rows, length, device=device)
        self._asked = torch.ones_like(self._inputs, dtype=torch.bool)
        self._share = torch.zeros((), device=device)
        self._last = torch.zeros(1, dtype=torch.long, device=device)
        self._made: dict[Any, Any] = {}
        self._results, self._replay = recorded(self._run, pool)

    def play(self, batch: Batch, share: float, last: int) -> tuple[float, Tensor]:
        """Add the gradients of `share` times the sum of weighted losses, in nats.

        Args:
            batch: of the length that was recorded.
            share: see above.
            last: the block of the segment after which FAM is `streams.written`; any number for one
                that is not in it.

        Returns:
            That sum, and `answers_said` on the CPU; nothing was said if that is not looked at.
        """
        self._inputs.copy_(batch.inputs)
        self._targets.copy_(batch.targets)
        self._weights.copy_(batch.weights)
        self._asked.copy_(batch.asked)
        self._share.fill_(share)
        self._last.fill_(
            min(max(last, 0), self._inputs.shape[1] // self._memory.config.block_size - 1)
        )
        self._replay()
        summed, *said = self._results.tolist()
        return summed, torch.tensor(said, dtype=torch.bool).view(2, -1)

    def _run(self) -> Tensor:
        memory, written = self._beginning(), FamAfterBlocks()
        if self._read:
            # Nothing that is read counts, and FAM is all that its gradient goes along.
            self._logits(slice(0, self._read), memory, written, logits_to_keep=1)
        columns = slice(self._read or 0, None)
        logits = self._logits(columns, memory, written)
        targets, weights = self._targets[:, columns], self._weights[:, columns]
        said = self._weights.new_zeros(2, self._memory.rows)
        if self._counts_right:
            said = answers_said(logits.detach(), targets, weights)
        summed = weighted_cross_entropy(logits.flatten(0, 1), targets.flatten(), weights.flatten())
        (summed * self._share).backward()
        # Only now: the backward pass has read what the segment began with.
        if written.blocks:
            self.streams.write(written.first_row_after(self._last))
        if self._goes_on and memory is not None:
            self.streams.go_on(memory)
        return torch.cat([summed.detach()[None], said.flatten().to(summed.dtype)])

    def _logits(
        self, columns: slice, memory: Memory | None, written: FamAfterBlocks, **more: Any
    ) -> Tensor:
        """What the model says at some columns."""
        if self._writes:
            more["fam_observer"] = written
        if self._read is not None and columns.start == self._read:
            more["fam_asked"] = self._asked[:, columns]
        with keeping(self._made.setdefault(columns.start, {})):
            logits: Tensor = self._model(
                input_ids=self._inputs[:, columns],
                past_key_values=memory,
                use_cache=memory is not None,
                **more,
            ).logits
        return logits

    def _beginning(self) -> Memory | None:
        """The memory with which the segment begins; None: an empty one, of which nothing is kept."""
        if self._begins == "anew" and not self._goes_on and not self._read:
            return None
        memory = self._memory.fork()
        if self._begins == "passed":
            memory.begin_with(self.streams.passed)
        elif self._begins == "on":
            # How far they have come makes no difference once their windows are full.
            memory.advance(self.streams.layers, [self._inputs.shape[1]] * memory.rows)
        return memory


class RecordedPieces:
    """Pieces of work of which each is recorded once and then played with other tensors.

    Args:
        parameters: that are trained. Recordings add to their gradients, which stay where they are.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._gradients = _Gradients(parameters)
        self._pool = graph_pool()
        self._made: dict[Any, tuple[list[Tensor], list[Tensor], Callable[[], None]]] = {}
        self._kept: dict[Any, dict[Any, Any]] = {}  # what recordings look up: must not go away
        # One piece plays at a time: pieces that are given the like have places for it in common.
        self._places: dict[Any, Tensor] = {}

    def __call__(
        self, key: Any, run: Callable[[list[Tensor]], list[Tensor]], given: list[Tensor]
    ) -> list[Tensor]:
        """What `run(given)` returns, valid until something is played again.

        Args:
            key: names the piece; whatever else than these tensors `run` depends on belongs in it.
            run: the piece; must not look at what is in the tensors.
            given: of the same shapes whenever the key is the same.
        """
        self._gradients.give()
        if key not in self._made:
            places = [self._place(i, tensor) for i, tensor in enumerate(given)]
            torch._foreach_copy_(places, given)
            kept = self._kept.setdefault(key, {})

            def piece() -> list[Tensor]:
                with keeping(kept):
                    return run(places)

            with undone(self._gradients.tensors):
                self._made[key] = places, *recorded(piece, self._pool)
        places, results, play = self._made[key]
        torch._foreach_copy_(places, given)
        play()
        return results

    def _place(self, i: int, like: Tensor) -> Tensor:
        return self._places.setdefault((i, like.shape, like.dtype), torch.empty_like(like))


class _Gradients:
    """Gradients that stay in their places: recordings add to those that were there at the time."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._pairs = [(p, torch.zeros_like(p)) for p in parameters]

    @property
    def tensors(self) -> list[Tensor]:
        """All of them."""
        return [gradient for _, gradient in self._pairs]

    def give(self) -> None:
        """Put them back where the optimizer has taken them away, at zero."""
        gone = [(p, gradient) for p, gradient in self._pairs if p.grad is None]
        if gone:
            torch._foreach_zero_([gradient for _, gradient in gone])
        for parameter, gradient in gone:
            parameter.grad = gradient


@contextmanager
def undone(tensors: list[Tensor]) -> Iterator[None]:
    """What is written into some tensors in here: a recording is run to be made, and leaves nothing."""
    before = [tensor.clone() for tensor in tensors]
    yield
    torch._foreach_copy_(tensors, before)


def graph_pool() -> Any:
    """Memory for recordings of which one plays at a time."""
    return torch.cuda.graph_pool_handle()


def recorded(run: Callable[[], Result], pool: Any) -> tuple[Result, Callable[[], None]]:
    """What `run` returns, and what does `run` again and leaves its new result there."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        run()  # a rehearsal: libraries allocate and choose kernels
    torch.cuda.current_stream().wait_stream(aside)
    torch.cuda.empty_cache()  # the recording has memory of its own
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = run()
    return result, graph.replay
