"""One row of the batch: which examples it takes, and how it cuts them into pieces.

Row r of R takes the draws r, r + R, r + 2R, ... of a source, and a draw is a pure function of its
number. So it does not matter which process holds which rows, and where a row stands is a few numbers.
Knows no model and, but for `FileSource`, no files and no tokenizer.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, Protocol

from transformerfam.data.examples import BadRow, Example, from_row, with_repeat_task
from transformerfam.data.files import Rows
from transformerfam.errors import UserError

Layout = Literal["packed", "single", "documents"]

_CYCLE = 1000  # draws of a mixture in which every source has exactly its share
_PATIENCE = 1000  # draws in a row that may be of no use


class Source(Protocol):
    """Where examples come from, without end."""

    def draw(self, number: int) -> Example:
        """The example that is taken as the `number`-th, over all rows of the batch.

        A pure function of the number.
        """


class FileSource:
    """Rows of files, again and again.

    A row that cannot be encoded, such as a conversation that the chat template refuses, is counted in
    `rows.bad`, and the next one stands in for it.

    Args:
        rows: see `open_rows`.
        tokenizer: a tokenizer of transformers.
        seed: of the order.
        shuffle: each epoch has an order of its own; else the order is that of the files.
    """

    def __init__(self, rows: Rows, tokenizer: Any, *, seed: int = 0, shuffle: bool = True) -> None:
        self.rows = rows
        self._tokenizer = tokenizer
        self._seed = seed
        # Rows of the batch may stand in different epochs.
        self._order = lru_cache(maxsize=4)(self._shuffled) if shuffle else self._in_order

    def draw(self, number: int) -> Example:
        """Row `number` of all epochs in line.

        Raises:
            UserError: no row can be used, or the first bad row if bad rows are refused.
        """
        count = len(self.rows)
        epoch, place = divmod(number, count)
        order = self._order(epoch)
        for step in range(count):
            index = order[(place + step) % count]
            try:
                example = from_row(self._tokenizer, self.rows[index])
                return replace(example, stands_in_for=step) if step else example
            except BadRow as bad:
                self.rows.cannot_use(index, bad.reason)
        raise UserError(
            f"{self.rows.name} has no row that can be used: {self.rows.bad.examples[0]}."
        )

    def _in_order(self, epoch: int) -> Sequence[int]:
        return range(len(self.rows))

    def _shuffled(self, epoch: int) -> Sequence[int]:
        order = list(range(len(self.rows)))
        random.Random(f"{self._seed}/order/{epoch}").shuffle(order)
        return order


class Mixture:
    """Several sources, each drawn from as often as its share says; itself a source.

    Of every 1,000 draws each source gets its share, to the nearest one and at least one, in random
    order. So each source's draws are counted without gaps: what is read of it is what would be read
    of it alone. A source whose texts are made up (`makes_up`) is asked for the number among all draws.

    Args:
        sources: the sources and their shares, of any sum; a share of 0 is never drawn from.
        seed: of the order.

    Raises:
        ValueError: no share is positive, or one is negative.
    """

    def __init__(self, sources: Sequence[tuple[Source, float]], *, seed: int = 0) -> None:
        shares = [share for _, share in sources]
        if not shares or min(shares) < 0 or sum(shares) <= 0:
            raise ValueError("A mixture needs a source with a share above 0, and none below 0.")
        self._sources = [source for source, _ in sources]
        self._counts = _apportion(shares, max(_CYCLE, 10 * len(shares)))
        self._seed = seed
        self._plan = lru_cache(maxsize=4)(self._plan_of)

    def draw(self, number: int) -> Example:
        """See `Source`."""
        place, own = self.place(number)
        source = self._sources[place]
        # What makes up its texts has none to leave out, and may have to know in which step it is.
        return source.draw(number if getattr(source, "makes_up", False) else own)

    def place(self, number: int) -> tuple[int, int]:
        """Which source the `number`-th draw is from, and which of that source's draws it is."""
        cycle, step = divmod(number, sum(self._counts))
        source, rank = self._plan(cycle)[step]
        return source, cycle * self._counts[source] + rank

    @property
    def sources(self) -> list[Source]:
        """What is drawn from."""
        return self._sources

    def _plan_of(self, cycle: int) -> list[tuple[int, int]]:
        order = [source for source, count in enumerate(self._counts) for _ in range(count)]
        random.Random(f"{self._seed}/mixture/{cycle}").shuffle(order)
        seen = [0] * len(self._counts)
        plan = []
        for source in order:
            plan.append((source, seen[source]))
            seen[source] += 1
        return plan


def _apportion(shares: Sequence[float], draws: int) -> list[int]:
    """Whole numbers in proportion to the shares, of the given sum; none is 0 unless its share is."""
    exact = [share * draws / sum(shares) for share in shares]
    counts = [int(wanted) for wanted in exact]
    by_rest = sorted(range(len(shares)), key=lambda s: (counts[s] - exact[s], s))
    for source in by_rest[: draws - sum(counts)]:
        counts[source] += 1
    for source, share in enumerate(shares):
        if share > 0 and not counts[source]:
            counts[counts.index(max(counts))] -= 1
            counts[source] = 1
    return counts


@dataclass(frozen=True)
class Piece:
    """What one row reads in one step.

    Attributes:
        inputs: (T,) token ids.
        targets: (T,), the token after each of them.
        weights: (T,), how much predicting targets[i] after inputs[..i] counts.
        fresh: this begins a stream: no state is carried into it.
        asked_from: the first token that is asked, see `Example`.
        told, question: see `Example`.
    """

    inputs: Sequence[int]
    targets: Sequence[int]
    weights: Sequence[float]
    fresh: bool
    asked_from: int = 0
    told: int = 0
    question: int | None = None

    @classmethod
    def of(
        cls, ids: Sequence[int], weights: Sequence[float], *, fresh: bool = True, **asked: Any
    ) -> Piece:
        """The piece of T + 1 tokens: all but the last are read, all but the first are told."""
        return cls(ids[:-1], ids[1:], weights[1:], fresh, **asked)


@dataclass(frozen=True)
class RepeatTask:
    """A random segment of a packed sequence is to be said again at its end (B.2).

    Attributes:
        marker: tokens in between, see `repeat_marker`.
        length: tokens of the segment.
        weight: how much each of its tokens counts.
        seed: of where the segment lies.
    """

    marker: Sequence[int]
    length: int = 256
    weight: float = 0.1
    seed: int = 0


class RowReader(ABC):
    """What one row of the global batch reads, piece by piece, without end.

    Args:
        source: what is read.
        row: which row of the batch this is, from 0.
        rows: rows of the global batch, over all processes.
        length: T, most tokens of a piece.

    Attributes:
        skipped: examples that were of no use: too short to have a target, or too long.
        stood_in: rows that were drawn and could not be used at all, for which others stood in.
    """

    def __init__(self, source: Source, *, row: int, rows: int, length: int) -> None:
        if not 0 <= row < rows:
            raise ValueError(f"There is no row {row} of {rows}.")
        if length < 1:
            raise ValueError(f"A piece has at least one token, not {length}.")
        self.source = source
        self.row = row
        self.rows = rows
        self.length = length
        self.skipped = self.stood_in = 0
        self._pieces = 0
        self._drawn = 0  # of this row; the last of them is the present example
        self._offset = 0  # tokens of it that are done
        self._example: Example | None = None

    @abstractmethod
    def next(self) -> Piece:
        """The next piece.

        Raises:
            UserError: the source gives nothing that can be used.
        """

    def state(self) -> dict[str, int]:
        """Where this row stands, fit for JSON."""
        return {
            "pieces": self._pieces,
            "drawn": self._drawn,
            "offset": self._offset,
            "skipped": self.skipped,
            "stood_in": self.stood_in,
        }

    def set_state(self, state: dict[str, int]) -> None:
        """Go on from a state of a reader that was made in the same way."""
        self._pieces, self._drawn = state["pieces"], state["drawn"]
        self._offset, self.skipped = state["offset"], state["skipped"]
        self.stood_in = state.get("stood_in", 0)
        self._example = None

    # ---- parts

    def _present(self) -> Example:
        """The example that the row is in; drawn again after `set_state`."""
        if self._example is None:
            self._example = self.source.draw(self.row + (self._drawn - 1) * self.rows)
        return self._example

    def _turn_over(self, least: int, most: int | None = None) -> Example:
        """Draw the next example, of `least` to `most` tokens."""
        for _ in range(_PATIENCE):
            self._drawn += 1
            self._offset, self._example = 0, None
            example = self._present()
            self.stood_in += example.stands_in_for
            if least <= len(example.ids) and (most is None or len(example.ids) <= most):
                return example
            self.skipped += 1
        if most is None:
            raise UserError(f"{_PATIENCE:,} examples in line have fewer than {least} tokens.")
        raise UserError(
            f"{_PATIENCE:,} examples in line do not have {least} to {most:,} tokens; raise data.length."
        )


class PackedRow(RowReader):
    """Examples one after the other, with nothing in between, cut into sequences of length + 1.

    An example that is cut goes on in the next sequence. Every sequence is fresh. With a repeat task,
    that much less of the examples is in it, so that the length stays.
    """

    def __init__(
        self,
        source: Source,
        *,
        row: int,
        rows: int,
        length: int,
        repeat: RepeatTask | None = None,
    ) -> None:
        super().__init__(source, row=row, rows=rows, length=length)
        self._repeat = repeat
        self._body = length + 1 - (len(repeat.marker) + repeat.length if repeat else 0)
        if repeat and self._body < repeat.length:
            raise UserError(
                f"A sequence of {length:,} tokens has no room to repeat {repeat.length:,} of them."
            )

    def next(self) -> Piece:
        """The next `length` + 1 tokens."""
        ids: list[int] = []
        weights: list[float] = []
        while len(ids) < self._body:
            example = self._present() if self._drawn else self._turn_over(1)
            if self._offset == len(example.ids):
                example = self._turn_over(1)
            part = slice(self._offset, self._offset + self._body - len(ids))
            ids += example.ids[part]
            weights += example.weights[part]
            self._offset = min(part.stop, len(example.ids))
        if task := self._repeat:
            rng = random.Random(f"{task.seed}/repeat/{self.row}/{self._pieces}")
            ids, weights = with_repeat_task(
                ids, weights, task.marker, rng, task.length, task.weight
            )
        self._pieces += 1
        return Piece.of(ids, weights)


class SingleRow(RowReader):
    """An example a piece, of its own length; every piece is fresh.

    Args:
        source: what is read.
        row: which row of the batch this is, from 0.
        rows: rows of the global batch, over all processes.
        length: T, most tokens of a piece.
        too_long: leave examples of more than T + 1 tokens out and count them, or refuse the first.
    """

    def __init__(
        self,
        source: Source,
        *,
        row: int,
        rows: int,
        length: int,
        too_long: Literal["skip", "refuse"] = "skip",
    ) -> None:
        super().__init__(source, row=row, rows=rows, length=length)
        self._too_long = too_long

    def next(self) -> Piece:
        """The next example."""
        refuse = self._too_long == "refuse"
        example = self._turn_over(2, None if refuse else self.length + 1)
        if len(example.ids) > self.length + 1:
            raise UserError(
                f"An example has {len(example.ids):,} tokens, but data.length={self.length:,}; "
                "raise it, or leave such examples out."
            )
        self._pieces += 1
        return Piece.of(
            example.ids,
            example.weights,
            asked_from=example.asked_from,
            told=example.told,
            question=example.question,
        )


class DocumentRow(RowReader):
    """Walks through documents: each piece is the next `length` tokens of the present one.

    The last piece of a document is shorter, and the one behind it is fresh. Every token of a document
    but its first is a target exactly once.
    """

    def next(self) -> Piece:
        """The next tokens of the document, or the first of the next."""
        if not self._drawn or self._offset + 1 >= len(self._present().ids):
            self._turn_over(2)
        example, start = self._present(), self._offset
        part = slice(start, start + self.length + 1)
        piece = Piece.of(
            example.ids[part],
            example.weights[part],
            fresh=start == 0,
            asked_from=max(0, example.asked_from - start),
        )
        self._offset += len(piece.inputs)
        self._pieces += 1
        return piece


def row_reader(
    layout: Layout,
    source: Source,
    *,
    row: int,
    rows: int,
    length: int,
    repeat: RepeatTask | None = None,
    too_long: Literal["skip", "refuse"] = "skip",
) -> RowReader:
    """The reader of row `row` of `rows` in a layout.

    Raises:
        ValueError: there is no such layout, or a repeat task in another than "packed".
    """
    if repeat is not None and layout != "packed":
        raise ValueError(f'The repeat task is for the layout "packed", not "{layout}".')
    if layout == "packed":
        return PackedRow(source, row=row, rows=rows, length=length, repeat=repeat)
    if layout == "single":
        return SingleRow(source, row=row, rows=rows, length=length, too_long=too_long)
    if layout == "documents":
        return DocumentRow(source, row=row, rows=rows, length=length)
    raise ValueError(f"There is no layout {layout}; use packed, single or documents.")
