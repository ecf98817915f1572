"""What one micro batch brings: rows of the same length, and how much each token counts.

Knows no model and no files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from transformerfam.data.rows import Piece
from transformerfam.errors import UserError


@dataclass(frozen=True)
class Batch:
    """R rows of T tokens.

    Attributes:
        inputs: (R, T) token ids.
        targets: (R, T), the token after each of them.
        weights: (R, T) float, how much predicting that target counts.
        valid: (R, T) bool, False where a shorter row is filled up; None: nowhere.
        fresh: for each row whether it begins a new stream.
        asked_from: for each row its first column that is asked (`FamConfig.fam_seen`); empty: 0 in all.
        told, question: for each row how many columns tell what is asked, and where it is asked; empty,
            and None: nobody knows.
    """

    inputs: Tensor
    targets: Tensor
    weights: Tensor
    valid: Tensor | None
    fresh: tuple[bool, ...]
    asked_from: tuple[int, ...] = ()
    told: tuple[int, ...] = ()
    question: tuple[int | None, ...] = ()

    @classmethod
    def of(cls, pieces: Sequence[Piece]) -> Batch:
        """Rows one below the other, filled up on the right to the longest."""
        lengths = torch.tensor([len(p.inputs) for p in pieces])
        longest = int(lengths.max())
        valid = torch.arange(longest)[None] < lengths[:, None]
        return cls(
            inputs=_rows([p.inputs for p in pieces], longest, torch.long),
            targets=_rows([p.targets for p in pieces], longest, torch.long),
            weights=_rows([p.weights for p in pieces], longest, torch.float32),
            valid=None if bool(valid.all()) else valid,
            fresh=tuple(p.fresh for p in pieces),
            asked_from=tuple(p.asked_from for p in pieces),
            told=tuple(p.told for p in pieces),
            question=tuple(p.question for p in pieces),
        )

    @property
    def tokens(self) -> int:
        """Tokens read, without what fills up."""
        return self.inputs.numel() if self.valid is None else int(self.valid.sum())

    def to(self, device: torch.device) -> Batch:
        """On another device; `valid` stays on the CPU, where it is looked at."""
        return replace(
            self,
            inputs=self.inputs.to(device),
            targets=self.targets.to(device),
            weights=self.weights.to(device),
        )

    def filled_up(self, length: int) -> Batch:
        """Of at least `length` columns."""
        more = length - self.inputs.shape[1]
        if more <= 0:
            return self
        valid = torch.ones_like(self.inputs, dtype=torch.bool) if self.valid is None else self.valid
        return replace(
            self,
            inputs=pad(self.inputs, (0, more)),
            targets=pad(self.targets, (0, more)),
            weights=pad(self.weights, (0, more)),
            valid=pad(valid, (0, more)),
        )

    def rows(self, rows: slice) -> Batch:
        """Some of the rows."""
        return Batch(
            self.inputs[rows],
            self.targets[rows],
            self.weights[rows],
            None if self.valid is None else self.valid[rows],
            self.fresh[rows],
            self.asked_from[rows],
            self.told[rows],
            self.question[rows],
        )

    def segments(self, size: int) -> Iterator[Batch]:
        """Cut along time into pieces of `size` tokens; 0: not at all."""
        size = size or self.inputs.shape[1]
        for start in range(0, self.inputs.shape[1], size):
            yield self._cut(start, start + size)

    def parts(self, size: int) -> tuple[Batch | None, Batch | None]:
        """Cut into what is read and what is asked, the first in whole pieces of `size` tokens.

        No row asks in a column of the first part. None: there is no such part.
        """
        columns = self.inputs.shape[1]
        first = min(*self.asked_from, columns) if self.asked_from else 0
        border = columns if first == columns else first // size * size
        read = self._cut(0, border) if border else None
        return read, self._cut(border, columns) if border < columns else None

    def check_told_within(self, columns: int) -> None:
        """Refuse rows that do not tell all in their first columns, or ask before they are over.

        Raises:
            UserError: if there is one.
        """
        for asked_from, told, question in zip(
            self.asked_from, self.told, self.question, strict=True
        ):
            if question is None or not told <= columns <= asked_from:
                raise UserError(
                    f"replay.blocks is for texts that tell all in their first {columns:,} tokens and "
                    f"ask behind them; one of {self.inputs.shape[1] + 1:,} tokens tells in {told:,} and "
                    f"is asked from {asked_from:,} on. Make lengths some hundred more than a block."
                )

    def questions(self, rows: Sequence[int], starts: Sequence[int | None] = ()) -> Batch:
        """What some rows ask, and how it goes on; filled up on the right.

        `starts`: each row's first column; by default that of its question.
        """
        pieces = []
        for row in rows:
            end = int(self.weights[row].nonzero().max()) + 1
            columns = slice((starts or self.question)[row], end)
            inputs, targets, weights = (
                x[row, columns].tolist() for x in (self.inputs, self.targets, self.weights)
            )
            pieces.append(Piece(inputs, targets, weights, fresh=True))
        return Batch.of(pieces).to(self.inputs.device)

    @property
    def asked(self) -> Tensor:
        """(R, T) bool on the CPU: which tokens are asked."""
        first = torch.tensor(self.asked_from or (0,) * len(self.fresh))
        return torch.arange(self.inputs.shape[1]) >= first[:, None]

    def _cut(self, start: int, stop: int) -> Batch:
        columns = slice(start, stop)
        return Batch(
            self.inputs[:, columns],
            self.targets[:, columns],
            self.weights[:, columns],
            None if self.valid is None else self.valid[:, columns],
            self.fresh,
            tuple(max(0, first - start) for first in self.asked_from),
            tuple(max(0, told - start) for told in self.told),
            tuple(None if q is None or q < start else q - start for q in self.question),
        )


def _rows(values: Sequence[Sequence[float]], longest: int, dtype: torch.dtype) -> Tensor:
    made = torch.zeros(len(values), longest, dtype=dtype)
    for row, numbers in enumerate(values):
        made[row, : len(numbers)] = torch.tensor(numbers, dtype=dtype)
    return made
