"""Figure 3a at toy size: PassKey accuracy by length, with windows of several sizes and with FAM.

Part `start` is the paper's: the key stands at the start of the text. Part `anywhere` asks what the
paper does not: one key or three, each anywhere, asked when they were seen long ago and when they were
seen late, with and without a bound on the norm of FAM and with and without random state passing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from transformerfam.reproduction.runs import Result, Run

Where = Literal["start", "anywhere", "late"]
LENGTHS = (2, 3, 4, 8, 16, 32, 64, 150, 300, 600, 1024)  # blocks
KEYS_ASKED = 32


@dataclass(frozen=True)
class Shape:
    """How large a toy is.

    Attributes:
        width: of the model.
        layers: of the model, of four heads each.
        block: tokens of a block.
        digits: of a key.
        rows: texts of a step.
    """

    width: int
    layers: int
    block: int
    digits: int
    rows: int


@dataclass(frozen=True)
class Variant:
    """A way to remember.

    Attributes:
        name: as in the figure.
        fam: its geometry.
        feedback: how it is trained.
        optimizer: settings in which it differs from its part.
        steps: of training; 0: those of its part.
    """

    name: str
    fam: Mapping[str, Any]
    feedback: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 0


@dataclass(frozen=True)
class Part:
    """One experiment of the figure.

    Attributes:
        name: `start` or `anywhere`.
        variants: what is compared.
        trained: (keys, where) of the texts that are trained on, in equal shares.
        asked: (keys, where) of the texts that are asked about.
        steps: of training.
        lengths: (share of the steps after which this holds, most blocks of a text): short texts
            first, since a memory is learned on them much sooner.
        shape: of model and texts.
        optimizer: settings that differ from the recipe's defaults.
    """

    name: str
    variants: tuple[Variant, ...]
    trained: tuple[tuple[int, Where], ...]
    asked: tuple[tuple[int, Where], ...]
    steps: int
    lengths: tuple[tuple[float, int], ...]
    shape: Shape
    optimizer: Mapping[str, Any]

    @property
    def longest_trained(self) -> int:
        """In blocks."""
        return max(most for _, most in self.lengths)


def _windows(segments: int, **more: Any) -> dict[str, Any]:
    return {"memory_segments": segments, "fam_length": 0, **more}


_FAM = {"memory_segments": 0, "fam_length": 8}
_SMALL = {"memory_segments": 0, "fam_length": 4}
_PASSING = {"state_passing": 0.5, "state_passing_delay": 750}

PARTS = (
    Part(
        name="start",
        variants=(
            Variant("M0", _windows(0)),
            Variant("M1_SG", _windows(1, stop_gradient=True)),
            Variant("M1", _windows(1)),
            Variant("M2", _windows(2)),
            Variant("M4", _windows(4)),
            Variant("FAM, decay 0.3", {**_FAM, "feedback_norm": "rms"}),
            Variant(
                "FAM", {**_FAM, "feedback_norm": "rms"}, optimizer={"weight_decay": 3.0}, steps=2000
            ),
        ),
        trained=((1, "start"),),
        asked=((1, "start"),),
        steps=1000,
        lengths=((0.0, 3),),
        shape=Shape(width=64, layers=2, block=16, digits=2, rows=32),
        # A decay of 3 keeps logits small and the loss from ending at 0: what is written has to stand
        # out of all else that is in FAM, and then it stands long. Windows learn nothing with it.
        optimizer={"learning_rate": 2e-3, "weight_decay": 0.3, "schedule": "cosine"},
    ),
    Part(
        name="anywhere",
        variants=(
            Variant("FAM", _SMALL),
            Variant("FAM, rms", {**_SMALL, "feedback_norm": "rms"}),
            Variant("FAM, passing", _SMALL, _PASSING),
            Variant("FAM, rms, passing", {**_SMALL, "feedback_norm": "rms"}, _PASSING),
        ),
        trained=((1, "anywhere"), (3, "anywhere")),
        asked=((1, "late"), (1, "start"), (3, "late"), (3, "start")),
        steps=1500,
        lengths=((0.0, 6),),
        shape=Shape(width=64, layers=2, block=16, digits=2, rows=32),
        optimizer={"learning_rate": 2e-3, "weight_decay": 0.3, "schedule": "cosine"},
    ),
)


def part(name: str) -> Part:
    """The part of that name."""
    return next(p for p in PARTS if p.name == name)


def plan(
    parts: Sequence[str], seeds: Sequence[int], lengths: Sequence[int], steps: int | None
) -> list[Run]:
    """The runs of some parts of the figure; `steps` replaces those of the parts."""
    return [
        {
            "part": p.name,
            "variant": variant.name,
            "seed": seed,
            "steps": steps or variant.steps or p.steps,
            "lengths": list(lengths),
            # A result is kept for these settings, and for no others.
            "settings": {
                "fam": dict(variant.fam),
                "feedback": dict(variant.feedback),
                "optimizer": {**p.optimizer, **variant.optimizer},
                "blocks": [list(pair) for pair in p.lengths],
                "shape": asdict(p.shape),
            },
        }
        for p in (part(name) for name in parts)
        for seed in seeds
        for variant in p.variants
    ]


def work(run: Run) -> Result:
    """Train one variant with one seed, and ask it."""
    import time

    import torch

    from transformerfam.reproduction import toy

    torch.set_num_threads(1)
    its = part(run["part"])
    variant = next(v for v in its.variants if v.name == run["variant"])
    began = time.monotonic()
    model, losses = toy.trained(its, variant, run["seed"], run["steps"])
    seconds = time.monotonic() - began
    accuracy = {}
    for keys, where in its.asked:
        source = toy.ToyPasskeys(its.shape, keys=keys, where=where)
        accuracy[f"{keys} {where}"] = {
            str(blocks): toy.digit_accuracy(model, source, blocks, KEYS_ASKED)
            for blocks in run["lengths"]
        }
    return {
        "accuracy": accuracy,
        "last_loss": sum(losses[-20:]) / len(losses[-20:]),
        "seconds": round(seconds, 1),
    }
