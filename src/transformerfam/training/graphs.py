"""Training steps as CUDA graphs: a step is recorded once and then played back.

With small blocks a step is some ten thousand small kernels, and Python takes several times as long to
start them as the GPU to run them. A recording starts them all at once. It is of one shape: every row
is filled up to the longest length that there may be, and begins a stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from transformerfam.call import keeping
from transformerfam.memory import Memory
from transformerfam.training.batches import Batch
from transformerfam.training.cross_entropy import weighted_cross_entropy
from transformerfam.training.curriculum import answers_right
from transformerfam.training.recipe import Recipe
from transformerfam.training.steps import Stepper

_REHEARSALS = 2  # steps before the recording: libraries allocate and choose kernels in the first


def stepper_for(accelerator: Any, model: Any, base: Any, recipe: Recipe) -> Stepper:
    """The recipe's way to do steps; without a GPU, or with several, nothing is recorded."""
    one_gpu = accelerator.device.type == "cuda" and accelerator.num_processes == 1
    kind = RecordedStepper if recipe.run.cuda_graphs and one_gpu else Stepper
    return kind(accelerator, model, base, recipe)


class RecordedStepper(Stepper):
    """Forward and backward of steps, recorded; what comes of them is the same as of a `Stepper`.

    Args: see `Stepper`. The accelerator's device must be a GPU, and the recipe one that may say
    `run.cuda_graphs`.
    """

    def __init__(self, accelerator: Any, model: Any, base: Any, recipe: Recipe) -> None:
        super().__init__(accelerator, model, base, recipe)
        self._recordings: dict[int, Recording] = {}
        trained = [p for p in model.parameters() if p.requires_grad]
        # A recording adds to the gradients that were there when it was made.
        self._gradients = [(p, torch.zeros_like(p)) for p in trained]

    def run(self, step: int, batches: Sequence[Batch]) -> float | None:
        """See `Stepper`."""
        longest = max(self.longest, *(batch.inputs.shape[1] for batch in batches))
        for rows in {len(batch.fresh) for batch in batches}:
            if rows not in self._recordings or self._recordings[rows].length < longest:
                self._record(rows, longest)
        return super().run(step, batches)

    def _record(self, rows: int, length: int) -> None:
        """A new recording, which leaves no gradients behind."""
        self._recordings.pop(rows, None)  # before there is room for another
        self._give_gradients()
        before = [gradient.clone() for _, gradient in self._gradients]
        self._recordings[rows] = Recording(self.model, rows, length, self._counts_right)
        torch._foreach_copy_([gradient for _, gradient in self._gradients], before)

    def _through(
        self, batch: Batch, memory: Memory, total: float, is_last: bool
    ) -> tuple[float, Memory]:
        self._give_gradients()
        played = self._recordings[len(batch.fresh)]
        summed, *right = played.play(batch, 1 / total if total else 0.0)
        if right:
            self._count(*right)
        return summed, memory

    def _give_gradients(self) -> None:
        """Put the gradients back where the optimizer has taken them away, at zero."""
        gone = [(p, gradient) for p, gradient in self._gradients if p.grad is None]
        if gone:
            torch._foreach_zero_([gradient for _, gradient in gone])
        for parameter, gradient in gone:
            parameter.grad = gradient


class Recording:
    """Forward and backward over `rows` rows of `length` tokens.

    Args:
        model: in training mode, on a GPU, with a gradient at each trained parameter.
        rows, length: the shape.
        counts_right: look whose answers are right.
    """

    def __init__(self, model: Any, rows: int, length: int, counts_right: bool) -> None:
        self.length = length
        self._model = model
        self._counts_right = counts_right
        device = next(model.parameters()).device
        self._inputs = torch.zeros(rows, length, dtype=torch.long, device=device)
        self._targets = torch.zeros_like(self._inputs)
        self._weights = torch.zeros(rows, length, device=device)
        self._share = torch.zeros((), device=device)
        self._made: dict[Any, Any] = {}
        self._results, self._replay = recorded(self._run)

    def play(self, batch: Batch, share: float) -> list[float]:
        """Add the gradients of `share` times the sum of weighted losses, in nats.

        Returns:
            That sum, and where it is looked at the two numbers of `answers_right`.
        """
        batch = batch.filled_up(self._inputs.shape[1])
        self._inputs.copy_(batch.inputs)
        self._targets.copy_(batch.targets)
        self._weights.copy_(batch.weights)
        self._share.fill_(share)
        self._replay()
        results: list[float] = self._results.tolist()
        return results

    def _run(self) -> Tensor:
        with keeping(self._made):
            logits = self._model(input_ids=self._inputs, use_cache=False).logits
        results = []
        if self._counts_right:
            results = [*answers_right(logits.detach(), self._targets, self._weights)]
        summed = weighted_cross_entropy(
            logits.flatten(0, 1), self._targets.flatten(), self._weights.flatten()
        )
        (summed * self._share).backward()
        return torch.stack([summed.detach(), *(n.to(summed.dtype) for n in results)])


def recorded(run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
    """What `run` returns, and what does `run` again and leaves its new result there."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(_REHEARSALS):
            run()
    torch.cuda.current_stream().wait_stream(aside)
    torch.cuda.empty_cache()  # the recording has memory of its own
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return result, graph.replay
