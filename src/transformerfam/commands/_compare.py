"""`fam read --compare`: the same text at the same time under other attention, with the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformerfam import report
from transformerfam.config import FamConfig

if TYPE_CHECKING:
    from transformerfam.memory import Memory

_MOST_RANGES = 12
_USUAL_SINKS = 4
_USUAL_SLOTS = 64


class RangeLosses:
    """Mean loss by range of the stream, in constant space: ranges double when there are too many.

    Args:
        width: tokens of a range to begin with.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self._sums: list[tuple[float, int]] = []

    def add(self, start: int, losses: Sequence[float]) -> None:
        """Losses of consecutive tokens, the first of which stands at `start` in the stream."""
        for offset, loss in enumerate(losses):
            index = (start + offset) // self.width
            while index >= len(self._sums):
                self._sums.append((0.0, 0))
            nats, scored = self._sums[index]
            self._sums[index] = (nats + loss, scored + 1)
            if len(self._sums) > _MOST_RANGES:
                self._halve()

    def rows(self) -> list[tuple[int, int, float | None]]:
        """(first token, token after the last, mean loss) of each range."""
        return [
            (i * self.width, (i + 1) * self.width, nats / scored if scored else None)
            for i, (nats, scored) in enumerate(self._sums)
        ]

    def _halve(self) -> None:
        padded = [*self._sums, (0.0, 0)] if len(self._sums) % 2 else self._sums
        pairs = zip(padded[::2], padded[1::2], strict=True)
        self._sums = [(a[0] + b[0], a[1] + b[1]) for a, b in pairs]
        self.width *= 2


@dataclass
class Variant:
    """One way to read the text, and how it did so far.

    Attributes:
        limit: tokens after which it stops (full attention, whose memory grows); None: never.
        first: nats and scored tokens among those within the limit of full attention.
    """

    name: str
    model: Any
    memory: Memory
    ranges: RangeLosses
    limit: int | None = None
    tokens: int = 0
    nats: float = 0.0
    scored: int = 0
    first_limit: int = 0
    first: tuple[float, int] = field(default=(0.0, 0))

    def read(self, ids: Sequence[int]) -> None:
        """Read more of the text, as far as it goes here."""
        from transformerfam.stream import read

        if self.limit is not None:
            ids = ids[: max(0, self.limit - self.tokens)]
        for chunk in read(self.model, ids, self.memory):
            self.add(chunk.position, chunk.losses.tolist())
            self.tokens += chunk.tokens

    def add(self, position: int, losses: Sequence[float]) -> None:
        """Count the losses of the tokens before `position`."""
        start = position - len(losses)
        self.ranges.add(start, losses)
        self.nats += sum(losses)
        self.scored += len(losses)
        early = losses[: max(0, self.first_limit - start)]
        self.first = (self.first[0] + sum(early), self.first[1] + len(early))

    @property
    def loss(self) -> float | None:
        """Mean over all that was read."""
        return self.nats / self.scored if self.scored else None

    @property
    def first_loss(self) -> float | None:
        """Mean over the tokens that full attention read too."""
        return self.first[0] / self.first[1] if self.first[1] else None


def comparison(model: Any, memory: Memory, *, trained: bool, full_limit: int) -> list[Variant]:
    """The ways to read a text side by side: full attention, windows, windows with sinks, FAM.

    The one that `model` is set to reads with `memory` itself; the others share the weights.
    """
    from transformerfam.conversion import twin
    from transformerfam.memory import Memory

    base: FamConfig = model.fam_config
    variants = []
    for name, config in _configs(base, trained).items():
        own = config == base
        reader = model if own else twin(model, config)
        variants.append(
            Variant(
                name=name,
                model=reader,
                memory=memory if own else Memory.for_model(reader),
                ranges=RangeLosses(base.block_size),
                limit=full_limit if config.keeps_everything and not own else None,
                first_limit=full_limit,
            )
        )
    return variants


def _configs(base: FamConfig, trained: bool) -> dict[str, FamConfig]:
    windows = base.without_feedback()
    if windows.keeps_everything:
        windows = windows.changed(attention="bswa")
    name = windows.attention.upper()
    found = {"full": windows.changed(attention="full"), name: windows.replace(sink_tokens=0)}
    if windows.attention != "longformer":
        sinks = base.sink_tokens or min(_USUAL_SINKS, base.block_size)
        found[f"{name} + {sinks} sinks"] = windows.replace(sink_tokens=sinks)
    slots = min(_USUAL_SLOTS, base.block_size)
    remembering = base if base.memory_name else windows.replace(fam_length=slots)
    name = f"{remembering.memory_name} {remembering.fam_length or ''}".rstrip()
    untrained = bool(remembering.added_modules) and not (trained and base.memory_name)
    found[name + (", untrained" if untrained else "")] = remembering
    if base not in found.values():
        found["as set"] = base
    return found


def comparison_table(variants: Sequence[Variant]) -> str:
    """Loss by range of the text, one column a way to read it."""
    longest = max(variants, key=lambda v: v.tokens)
    # Each has doubled its ranges as far as it read; the shorter ones follow the longest.
    width = longest.ranges.width
    for variant in variants:
        while variant.ranges.width < width:
            variant.ranges._halve()
    columns = [dict((a, loss) for a, _, loss in v.ranges.rows()) for v in variants]
    rows = []
    for start, end, _ in longest.ranges.rows():
        label = f"{start + 1:,}–{min(end, longest.tokens):,}"
        rows.append([label, *(report.loss(column.get(start)) for column in columns)])
    limit = variants[0].first_limit
    if longest.tokens > limit:
        rows.append([f"first {limit:,}", *(report.loss(v.first_loss) for v in variants)])
    whole = [v.loss if v.tokens == longest.tokens else None for v in variants]
    rows.append(["all", *(report.loss(loss) for loss in whole)])
    rows.append(["memory", *(report.size(v.memory.nbytes) for v in variants)])
    return report.table(["tokens", *(v.name for v in variants)], rows)


def comparison_json(variants: Sequence[Variant]) -> list[dict[str, Any]]:
    """The same for programs."""
    return [
        {
            "name": v.name,
            "config": v.memory.config.to_dict(),
            "tokens": v.tokens,
            "scored": v.scored,
            "loss": v.loss,
            "loss_within_full_limit": v.first_loss,
            "memory_bytes": v.memory.nbytes,
            "ranges": [
                {"start": a, "stop": min(b, v.tokens), "loss": loss}
                for a, b, loss in v.ranges.rows()
            ],
        }
        for v in variants
    ]
