"""What it costs prose to be asked throughout, with the memory in view, instead of being read.

    .venv/bin/python benchmarks/asked_prose.py persuasion.txt --tokens 6144

Nats a token by 1,024 tokens of a text, read and asked in one run by the default model with an adapter,
in bfloat16. Under an adapter that is seen only where something is asked, reading is that of windows.
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from transformerfam import Memory, load, read, report
from transformerfam.text import TokenIds

PART = 1024


def losses(model: Any, ids: list[int], asked: bool) -> list[float]:
    """Nats a token of each part."""
    memory = Memory.for_model(model)
    memory.asking = asked
    of_tokens = torch.cat([chunk.losses for chunk in read(model, ids, memory)])
    return [float(part.mean()) for part in of_tokens.split(PART)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path, help="a text file")
    parser.add_argument("--adapter", default="shipped", help="of the default model")
    parser.add_argument("--tokens", type=int, default=6144, help="how much of the text")
    options = parser.parse_args()
    model, tokenizer = load(adapter=options.adapter, dtype="bfloat16")
    with options.text.open(encoding="utf-8") as text:
        ids = list(islice(TokenIds(tokenizer, text), options.tokens))
    found = [losses(model, ids, asked) for asked in (False, True)]
    rows = [
        [report.count(part * PART), f"{plain:.3f}", f"{asked:.3f}", f"{asked - plain:+.3f}"]
        for part, (plain, asked) in enumerate(zip(*found, strict=True))
    ]
    print(report.table(["from token", "read", "asked", "difference"], rows))


if __name__ == "__main__":
    main()
