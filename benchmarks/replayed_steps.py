"""Training FAM over blocks that are read in every step, and over the same ones read once before.

    .venv/bin/python benchmarks/replayed_steps.py --adapter shipped --blocks 5

The default model in bfloat16 under the recipe smollm2-replay: steps of rows that read so many blocks,
and steps that replay them, in turns in one run; seconds of a step, tokens a second, and their ratio.
Needs instructions for bfloat16 to be fast (`avx512_bf16` or `amx_bf16` in /proc/cpuinfo).
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from typing import Any

from transformerfam import report
from transformerfam.training import adaptation
from transformerfam.training.batches import Batch
from transformerfam.training.inputs import open_source, row_readers
from transformerfam.training.recipe import Recipe, find
from transformerfam.training.replaying import ReplayStepper
from transformerfam.training.steps import Stepper
from transformerfam.training.trainer import make_accelerator


def recipe(adapter: str, rows: int, length: int, blocks: int) -> Recipe:
    """Keys at the start of texts of this length; with `blocks`, of texts that are replayed over them."""
    given = [f"model.adapter={adapter}", "model.dtype=bfloat16", "run.precision=bf16"]
    given += [f"data.batch_size={rows}", f"data.micro_batch_size={rows}", "data.length=100000"]
    given += [f"replay.blocks={4 if blocks else 0}", "replay.before=0", f"replay.behind={blocks}"]
    given += ["replay.times=3", "feedback.drawn_segments=0"]
    made = Recipe.load(find("smollm2-replay"), given)
    source = replace(made.data.sources[0], lengths=(length,))
    return made.replace(data=replace(made.data, sources=(source,)))


def timed(stepper: Stepper, batch: Batch, step: int) -> tuple[float, int]:
    """(seconds, tokens) of one step without the optimizer."""
    began = time.perf_counter()
    stepper.run(step, [batch])
    return time.perf_counter() - began, stepper.tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter", default="shipped", help="what to train on")
    parser.add_argument("--rows", type=int, default=4, help="texts of a step")
    parser.add_argument("--blocks", type=int, default=5, help="blocks behind the first, from 1")
    parser.add_argument("--repeats", type=int, default=3, help="steps of each kind")
    options = parser.parse_args()
    ways: dict[str, tuple[Recipe, Any]] = {
        "read": (
            recipe(options.adapter, options.rows, 1024 * (options.blocks + 1) + 176, 0),
            Stepper,
        ),
        "replayed": (recipe(options.adapter, options.rows, 1200, options.blocks), ReplayStepper),
    }
    model, tokenizer = adaptation.load_for_training(ways["read"][0])
    base, accelerator = adaptation.base_of(model), make_accelerator(ways["read"][0])
    prepared = accelerator.prepare(model).train()
    steppers, batches = {}, {}
    for name, (made, kind) in ways.items():
        source = open_source(made, tokenizer)
        more = [source] if kind is ReplayStepper else []
        steppers[name] = kind(accelerator, prepared, base, made, *more)
        batches[name] = Batch.of([r.next() for r in row_readers(made, source, tokenizer)])
    taken: dict[str, list[tuple[float, int]]] = {name: [] for name in ways}
    for step in range(options.repeats + 1):  # the first warms up, and reads what is replayed
        for name in ways:
            taken[name].append(timed(steppers[name], batches[name], step))
            model.zero_grad()
    speeds = {}
    for name, found in taken.items():
        seconds = statistics.median(s for s, _ in found[1:])
        speeds[name] = statistics.median(n / s for s, n in found[1:])
        print(f"{name:>9}: {seconds:6.1f} s a step, {report.count(round(speeds[name]))} tokens/s")
    print(f"    ratio: {speeds['replayed'] / speeds['read']:.1f}")


if __name__ == "__main__":
    main()
