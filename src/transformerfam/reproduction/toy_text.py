"""Real prose at toy size: bytes of the Python language reference, which every Python carries.

A small decoder from scratch learns to predict the next byte of one part of the text, and is measured
on whole stretches of another part, by place. There is no tokenizer to train and nothing to download.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch

from transformerfam.data.examples import Example
from transformerfam.reproduction import toy
from transformerfam.reproduction.experiment import Shape
from transformerfam.reproduction.runs import Run
from transformerfam.stream import read
from transformerfam.text import language_reference

BYTES = 256
_HELD_OUT = 0.2


@cache
def parts() -> tuple[bytes, bytes]:
    """(bytes to train on, bytes to measure on)."""
    text = language_reference().encode()
    cut = int(len(text) * (1 - _HELD_OUT))
    return text[:cut], text[cut:]


@dataclass(frozen=True)
class Stretches:
    """A `Source` of stretches of the text, of as many bytes as the longest text of training."""

    shape: Shape
    blocks: int
    seed: int = 0

    def draw(self, number: int) -> Example:
        """The number-th stretch; every byte but its first is to be told."""
        text, size = parts()[0], self.blocks * self.shape.block
        start = random.Random(f"{self.seed}/stretch/{number}").randrange(len(text) - size)
        return Example(tuple(text[start : start + size]), (0.0,) + (1.0,) * (size - 1))


def trained(run: Run) -> tuple[Any, list[float]]:
    """A toy model that has learned, and the loss of each step; see `experiment.plan`."""
    source = Stretches(Shape(**run["shape"]), run["most_blocks"], run["seed"])
    return toy.train(run, source, BYTES)


def asked(model: Any, run: Run) -> Mapping[str, Mapping[str, float]]:
    """`text` -> block -> share of the bytes that are told, from the length before to that block.

    `count` stretches of the longest length, each read as one stream.
    """
    model.eval()
    block, edges = run["shape"]["block"], [0, *run["lengths"]]
    size, text = edges[-1] * block, parts()[1]
    right = torch.zeros(size)
    places = [i * (len(text) - size) // max(1, run["count"] - 1) for i in range(run["count"])]
    for start in places:
        hits = torch.cat([chunk.hits for chunk in read(model, text[start : start + size])])
        right[1:] += hits.float() / len(places)
    shares = {}
    for first, last in pairwise(edges):
        # The very first byte of a stream is told by nobody.
        shares[str(last)] = float(right[max(1, first * block) : last * block].mean())
    return {"text": shares}
