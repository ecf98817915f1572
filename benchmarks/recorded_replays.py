"""Replayed texts on a GPU, their pieces recorded as CUDA graphs and not: gradients, and how fast.

    .venv/bin/python benchmarks/recorded_replays.py --rows 96 --rows-at-once 32

A model of SmolLM2's shape with random weights and random prose, LoRA of rank 16 and a FAM of 16 slots,
blocks of 1,024. First prints by how much gradients differ, in float32 and bfloat16, through whole texts
and in segments; then a line for each number of blocks, past blocks and blocks of a segment, plain and
recorded in the same run. Needs a GPU; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import replace

import torch
from recorded_steps import VOCABULARY, gradients_of_last, largest_difference, over_a_new_model

from transformerfam import report
from transformerfam.data.examples import Example
from transformerfam.training.batches import Batch
from transformerfam.training.leading import Leading
from transformerfam.training.recipe import Recipe
from transformerfam.training.replaying import ReplayStepper

QUESTION = 60
# Blocks behind the first, past blocks that questions see, blocks of a segment (0: all).
SHAPES = ((4, 0, 0), (16, 0, 0), (16, 0, 4), (60, 0, 4), (16, 3, 0))


class Prose:
    """Random tokens."""

    def draw(self, number: int) -> Example:
        """See `Source`; nothing is drawn here."""
        raise NotImplementedError

    def prose(self, rng: random.Random, tokens: int) -> list[int]:
        """So many of them."""
        return [rng.randrange(VOCABULARY) for _ in range(tokens)]


def made(
    layers: int, block_size: int, precision: str, behind: int, at_once: int, segment: int
) -> ReplayStepper:
    """A stepper over a new model."""
    feedback = {"bias_steps": 0, "asked_blocks": 2, "bptt_blocks": segment, "drawn_segments": [0]}
    recipe = Recipe.from_dict(
        {
            "fam": {
                "block_size": block_size,
                "memory_segments": 3,
                "fam_length": 16,
                "feedback_norm": "rms",
                "feedback_rms": 15.0,
                "adapted": "fam",
                "fam_seen": "asked",
            },
            "train": {"rank": 16, "alpha": 32.0},
            "data": {"layout": "single", "length": 2 * block_size, "batch_size": 1},
            "feedback": feedback,
            "replay": {"blocks": 24, "before": [1], "behind": [behind], "rows_at_once": at_once},
            "run": {"precision": precision, "activation_checkpointing": False, "cuda_graphs": True},
        }
    )
    stepper: ReplayStepper = over_a_new_model(ReplayStepper, recipe, layers, Prose())
    return stepper


def batch(rows: int, block_size: int) -> Batch:
    """Random texts, something asked behind their first block."""
    length = block_size + 40 + QUESTION
    ids = torch.randint(VOCABULARY, (rows, length + 1), generator=torch.Generator().manual_seed(0))
    weights = torch.zeros(rows, length)
    weights[:, -6:] = 1
    asked, question = (length - QUESTION,) * rows, (length - QUESTION + 10,) * rows
    return Batch(
        ids[:, :-1], ids[:, 1:], weights, None, (True,) * rows, asked, (60,) * rows, question
    )


def difference(precision: str, behind: int, segment: int) -> float:
    """The largest relative difference of a gradient, plain and recorded."""
    found = []
    for recorded in (False, True):
        stepper = made(3, 128, precision, behind, 2, segment)
        if not recorded:
            unrecord(stepper)
        found.append(gradients_of_last(stepper, [batch(4, 128)] * 2))
    return largest_difference(*found)


def unrecord(stepper: ReplayStepper) -> None:
    """The same texts, of pieces that are not recorded."""
    stepper._pieces = Leading(stepper.accelerator, stepper.inner, stepper.base)


def seconds(stepper: ReplayStepper, its: Batch, past: int, steps: int) -> float:
    """Of a step."""
    feedback = replace(stepper.recipe.feedback, drawn_segments=(past,))
    stepper.recipe = stepper.recipe.replace(feedback=feedback)
    for step in range(8):  # all places where questions may begin
        stepper.run(step, [its])
    torch.cuda.synchronize()
    began = time.perf_counter()
    for step in range(steps):
        stepper.run(step, [its])
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / steps


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=96, help="texts of a step")
    parser.add_argument("--rows-at-once", type=int, default=32, help="replay.rows_at_once")
    parser.add_argument("--no-plain", action="store_true", help="time recorded steps alone")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("A step is recorded on a GPU, and there is none.")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    torch.backends.cuda.matmul.allow_tf32 = False
    for precision in ("fp32", "bf16"):
        whole, cut = difference(precision, 3, 0), difference(precision, 9, 2)
        print(
            f"{precision}: largest relative difference of a gradient {whole:.1e}, in segments {cut:.1e}",
            flush=True,
        )
    its, rows = batch(args.rows, 1024), []
    for behind, past, segment in SHAPES:
        torch.cuda.reset_peak_memory_stats()
        stepper = made(30, 1024, "bf16", behind, args.rows_at_once, segment)
        recorded = seconds(stepper, its, past, steps=4)
        tokens, peak = stepper.tokens, torch.cuda.max_memory_reserved() / 2**30
        plain = None
        if not args.no_plain:
            unrecord(stepper)
            plain = seconds(stepper, its, past, steps=1)
        rows.append(
            (
                f"{behind + 2} blocks, {past} before those asked, segments of {segment or 'all'}",
                "" if plain is None else f"{plain:.2f}",
                f"{recorded:.2f}",
                "" if plain is None else f"{plain / recorded:.1f}",
                f"{tokens / recorded:,.0f}",
                f"{peak:.0f} GiB",
            )
        )
        print(rows[-1], flush=True)
        del stepper
        torch.cuda.empty_cache()
    columns = ("texts", "plain, s", "recorded, s", "ratio", "recorded, tokens/s", "memory")
    print(report.table(columns, rows))


if __name__ == "__main__":
    main()
