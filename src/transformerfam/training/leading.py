"""FAM led over the blocks of a text one by one, and its gradient led back over them.

For blocks whose keys and values are known (`replay`), where F is all that goes from one to the next.
Of each block only the F before it is kept, and the block is gone through again when the gradient comes
back. So a text of any number of blocks takes the memory of one, besides an F for each; and every piece,
a block there or back or a question, is of the same shape wherever it stands, so that it can be recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transformerfam.call import ReadBefore, apart
from transformerfam.layer_memory import KeyValue
from transformerfam.memory import Memory
from transformerfam.replay import memory_at, replay
from transformerfam.training.batches import Batch
from transformerfam.training.cross_entropy import weighted_cross_entropy
from transformerfam.training.curriculum import answers_said
from transformerfam.training.steps import FamAfterBlocks

# Of each layer, what the tokens of a block left: (R, Hk, B, D), or (1, ..) if all rows read the same.
Block = Sequence[KeyValue]
# Does a piece of work on tensors; or plays it, if it is recorded.
Plays = Callable[[Any, Callable[[list[Tensor]], list[Tensor]], list[Tensor]], list[Tensor]]


def at_once(
    _: Any, run: Callable[[list[Tensor]], list[Tensor]], given: list[Tensor]
) -> list[Tensor]:
    """The `Plays` that records nothing."""
    return run(given)


@dataclass(frozen=True)
class Asked:
    """What came of questions.

    Attributes:
        loss: sum over their tokens of weight times cross-entropy, in nats.
        gradient: of F, as it was given.
        said: `answers_said` of each row, on the CPU.
    """

    loss: float
    gradient: Tensor
    said: Tensor


class Leading:
    """The pieces of a text that is replayed.

    Args:
        accelerator: for the precision.
        model: a TransformerFAM with a head, maybe with an adapter.
        base: the TransformerFAM in it.
        plays: does the pieces.

    F is that of all layers here, (L, R, N, d). Where a piece is recorded, F must not depend on how many
    blocks were read before, as it does for `fam_position="zero"`.
    """

    def __init__(self, accelerator: Any, model: Any, base: Any, plays: Plays = at_once) -> None:
        self._accelerator = accelerator
        self._model = model
        self._base = base
        self._plays = plays

    @torch.no_grad()
    def lead(self, fam: Tensor | None, block: Block, rows: int, number: int) -> Tensor:
        """F after a block.

        Args:
            fam: F before it; None: it is the first.
            block: what it left.
            rows: R.
            number: of the block in the text.
        """

        def run(tensors: list[Tensor]) -> list[Tensor]:
            before, given = _parted(tensors, fam is not None)
            return [self._after(before, _unflat(given), rows, number)]

        # Not the number: keys stand in the frame of their block, and F beside them.
        key = "lead", fam is None, rows, len(block[0].keys)
        return self._plays(key, run, [*([] if fam is None else [fam]), *_flat(block)])[0]

    def back(
        self, fam: Tensor | None, block: Block, rows: int, number: int, gradient: Tensor
    ) -> Tensor | None:
        """The gradient of F before a block from that of F after it; adds to those of the parameters.

        Args: see `lead`.
        """

        def run(tensors: list[Tensor]) -> list[Tensor]:
            wanted, *rest = tensors
            before, given = _parted(rest, fam is not None)
            if before is not None:
                before = before.detach().requires_grad_()
            self._after(before, _unflat(given), rows, number).backward(wanted)
            return [] if before is None else [_gradient(before)]

        key = "back", fam is None, rows, len(block[0].keys)
        known = [] if fam is None else [fam]
        found = self._plays(key, run, [gradient, *known, *_flat(block)])
        return found[0] if found else None

    def ask(
        self,
        fams: Tensor,
        blocks: Sequence[Block],
        anchors: Block,
        behind: int,
        asked: Batch,
        columns: Tensor | None,
        share: float,
    ) -> Asked:
        """Questions behind blocks.

        Args:
            fams: F after the newest `previous_fams` of the whole blocks, (k, L, R, N, d).
            blocks: the newest of the text, as many as the windows and F reach back; the last is that
                which is begun.
            anchors: of the streams (`Read.anchors`).
            behind: whole blocks of the text.
            asked: the questions, on the device.
            columns: of them, those in which a token counts; None: any.
            share: of the loss, of which gradients are wanted.
        """
        rows, count, begun = len(asked.inputs), len(blocks) - 1, blocks[-1][0].keys.shape[2]

        def remembers(leaf: Tensor, given: list[Tensor]) -> Memory:
            size = len(given) // (count + 2)
            each = [_unflat(given[i : i + size]) for i in range(0, len(given), size)]
            memory = memory_at(self._base, rows, behind - count)
            known = ReadBefore(
                count * memory.config.block_size + begun,
                lambda layer, j: each[j][layer],
                each[-1].__getitem__,
                lambda layer, j: leaf[j - count][layer],
            )
            replay(self._base, known, memory)
            return memory

        tensors = [t for block in (*blocks, anchors) for t in _flat(block)]
        shared = tuple(len(block[0].keys) == 1 for block in blocks)
        # How many blocks are behind matters in one way: at the start of a text anchors may stand in the
        # windows too, and are seen once.
        key = "ask", self._base.fam_config.memory_segments, begun, shared, behind > count
        return self._asked(key, remembers, fams, tensors, asked, columns, share)

    def ask_fam_alone(
        self, fams: Tensor, asked: Batch, columns: Tensor | None, share: float
    ) -> Asked:
        """As `ask`, with F and nothing else to answer from.

        Args:
            fams: (1, L, R, N, d).
        """

        def remembers(leaf: Tensor, _: list[Tensor]) -> Memory:
            return memory_at(self._base, len(asked.inputs), 0, list(leaf[0]))

        key = "alone", self._base.fam_config.memory_segments
        return self._asked(key, remembers, fams, [], asked, columns, share)

    # ---- in the words of a model

    def _after(self, fam: Tensor | None, block: Block, rows: int, number: int) -> Tensor:
        memory = memory_at(self._base, rows, number, None if fam is None else list(fam))
        written = FamAfterBlocks()
        size = memory.config.block_size
        given = ReadBefore(size, lambda layer, _: block[layer], block.__getitem__, keep=False)
        with self._accelerator.autocast():
            replay(self._base, given, memory, fam_observer=written)
        return torch.stack(written.after(0))

    def _asked(
        self,
        key: tuple[Any, ...],
        remembers: Callable[[Tensor, list[Tensor]], Memory],
        fams: Tensor,
        tensors: list[Tensor],
        asked: Batch,
        wanted: Tensor | None,
        share: float,
    ) -> Asked:
        def run(given: list[Tensor]) -> list[Tensor]:
            leaf, inputs, targets, weights, part, *rest = given
            columns = None
            if wanted is not None:
                columns, *rest = rest
            leaf = leaf.detach().requires_grad_()
            with self._accelerator.autocast():
                memory = remembers(leaf, rest)
                with memory.asked(), apart("question"):
                    logits = self._model(
                        input_ids=inputs,
                        past_key_values=memory,
                        use_cache=True,
                        logits_to_keep=0 if columns is None else columns,
                    ).logits
                if columns is not None:
                    targets, weights = targets[:, columns], weights[:, columns]
                # Before the loss, whose gradient takes the place of the logits.
                said = answers_said(logits.detach(), targets, weights)
                summed = weighted_cross_entropy(
                    logits.flatten(0, 1), targets.flatten(), weights.flatten()
                )
            (summed * part).backward()
            return [summed.detach(), _gradient(leaf), said]

        given = [fams, asked.inputs, asked.targets, asked.weights]
        given += [torch.tensor(share, device=fams.device)]
        given += [*([] if wanted is None else [wanted]), *tensors]
        key = *key, len(fams), tuple(asked.inputs.shape)
        summed, gradient, said = self._plays(key, run, given)
        return Asked(float(summed), gradient, said.cpu())


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _parted(tensors: list[Tensor], has_first: bool) -> tuple[Tensor | None, list[Tensor]]:
    return (tensors[0], tensors[1:]) if has_first else (None, tensors)


def _flat(block: Block) -> list[Tensor]:
    return [tensor for layer in block for tensor in (layer.keys, layer.values)]


def _unflat(tensors: list[Tensor]) -> Block:
    return [KeyValue(*pair) for pair in zip(tensors[::2], tensors[1::2], strict=True)]
