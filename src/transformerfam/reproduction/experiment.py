"""What is compared at toy size: variants, what they are trained on, and what they are asked.

Only plain values: an experiment becomes runs, and a run, a dictionary that JSON can hold, says all that
decides its result. Two experiments that ask for the same run share it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from transformerfam.reproduction.runs import Result, Run

Kind = Literal["passkey", "text"]


@dataclass(frozen=True)
class Shape:
    """How large a toy is.

    Attributes:
        width: of the model.
        layers: of the model, of four heads each.
        block: tokens of a block.
        digits: of a key (`passkey`).
        rows: texts of a step.
    """

    width: int
    layers: int
    block: int
    digits: int
    rows: int


@dataclass(frozen=True)
class Variant:
    """One line of a table.

    Attributes:
        name: as people see it.
        fam: its geometry: what it has beside block size and the experiment's own start.
        feedback: settings of [feedback], how it is trained.
        optimizer: settings in which it differs from its experiment.
        model: of the model itself: `rope_theta`, or `architecture` = "linear".
        steps: of training; 0: those of its experiment.
        paper: what the paper has for it at full size, where that is not the toy's, see `scales`.
    """

    name: str
    fam: Mapping[str, Any]
    feedback: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 0
    paper: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    """Variants trained and asked alike.

    Attributes:
        kind: `passkey`: keys in random filler. `text`: bytes of real prose.
        variants: what is compared.
        trained: (keys, where) of the texts that are trained on, in equal shares (`passkey`).
        asked: what is asked: "1 start", "3 late", .. (`passkey`), "text" (`text`).
        steps: of training.
        longest: text that is trained on, in `unit`; the shortest toy has 2 blocks.
        lengths: asked at these lengths, in `unit`.
        shape: of model and texts.
        optimizer: settings that differ from the recipe's defaults.
        count: texts asked at each length.
        unit: `blocks` for toys, `tokens` for a pretrained model.
    """

    variants: tuple[Variant, ...]
    asked: tuple[str, ...]
    steps: int
    longest: int
    lengths: tuple[int, ...]
    shape: Shape
    optimizer: Mapping[str, Any]
    kind: Kind = "passkey"
    trained: tuple[str, ...] = ("1 start",)
    count: int = 32
    unit: Literal["blocks", "tokens"] = "blocks"


@dataclass(frozen=True)
class Planned:
    """A run, and whose it is."""

    variant: str
    seed: int
    run: Run


def plan(
    its: Experiment,
    seeds: Sequence[int],
    *,
    lengths: Sequence[int] | None = None,
    steps: int | None = None,
) -> Iterator[Planned]:
    """The runs of an experiment; `lengths` and `steps` replace its own."""
    for seed in seeds:
        for variant in its.variants:
            run = {
                "kind": its.kind,
                "seed": seed,
                "steps": steps or variant.steps or its.steps,
                "lengths": list(lengths or its.lengths),
                "trained": list(its.trained),
                "asked": list(its.asked),
                "most_blocks": its.longest,
                "count": its.count,
                "shape": asdict(its.shape),
                "fam": dict(variant.fam),
                "feedback": dict(variant.feedback),
                "optimizer": {**its.optimizer, **variant.optimizer},
                "model": dict(variant.model),
            }
            yield Planned(variant.name, seed, run)


def work(run: Run) -> Result:
    """Train one variant with one seed, and ask it.

    Returns:
        `accuracy`: what was asked -> length -> share right; `last_loss` in nats; `seconds`.
    """
    import time

    import torch

    from transformerfam.reproduction import linear, toy, toy_text

    torch.set_num_threads(1)
    kind = run["model"].get("architecture", run["kind"])
    its: Any = {"passkey": toy, "text": toy_text, "linear": linear}[kind]
    began = time.monotonic()
    model, losses = its.trained(run)
    seconds = time.monotonic() - began
    return {
        "accuracy": its.asked(model, run),
        "last_loss": sum(losses[-20:]) / len(losses[-20:]),
        "seconds": round(seconds, 1),
    }
