"""Training steps on a GPU, recorded as CUDA graphs and not: the same gradients, and how much faster.

    .venv/bin/python benchmarks/recorded_steps.py

A model of SmolLM2's shape with random weights, LoRA of rank 16 and a FAM of 16 slots, bfloat16. First
prints by how much gradients differ, in float32 and bfloat16; then a line for each shape, plain and
recorded in the same run. Needs a GPU; nothing is downloaded.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from transformerfam import FamConfig, convert, report
from transformerfam.training import adaptation
from transformerfam.training.batches import Batch
from transformerfam.training.graphs import RecordedStepper
from transformerfam.training.recipe import Recipe
from transformerfam.training.steps import Stepper
from transformerfam.training.trainer import make_accelerator

VOCABULARY = 49152
SHAPES = ((128, 256, 64, 0), (96, 512, 64, 0), (48, 1024, 128, 1), (24, 2048, 256, 1))
STEPS = 3


def over_a_new_model(kind: Any, recipe: Recipe, layers: int, *more: Any) -> Any:
    """A stepper of this kind over a model of SmolLM2's shape in the recipe's geometry and precision."""
    torch.manual_seed(0)
    llama = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[recipe.run.precision]
    accelerator = make_accelerator(recipe)
    plain = convert(LlamaForCausalLM(llama).to(dtype), recipe.fam)
    model = adaptation.adapt(plain, recipe.train, seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zeros at the start, behind which no gradient comes
            torch.nn.init.normal_(parameter.data, std=0.02)
    base = adaptation.base_of(model)
    return kind(accelerator, accelerator.prepare(model).train(), base, recipe, *more)


def made(kind: type[Stepper], config: FamConfig, layers: int, length: int, precision: str) -> Any:
    """A stepper of this kind over a new model."""
    recipe = Recipe.from_dict(
        {
            "train": {"rank": 16, "alpha": 32.0},
            "data": {"layout": "single", "length": length, "batch_size": 1},
            "feedback": {"bias_steps": 0},
            "run": {"precision": precision, "activation_checkpointing": False},
        }
    )
    return over_a_new_model(kind, recipe.replace(fam=config), layers)


def gradients_of_last(stepper: Any, steps: Sequence[Batch]) -> dict[str, Tensor]:
    """The gradients of the last of some steps: where steps are recorded, one that is played back."""
    for number, its in enumerate(steps):
        stepper.model.zero_grad()
        stepper.run(number, [its])
    named = stepper.model.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.requires_grad}


def largest_difference(plain: dict[str, Tensor], recorded: dict[str, Tensor]) -> float:
    """Of a gradient, relative to its norm."""
    return max(
        float((plain[n] - recorded[n]).norm() / plain[n].norm().clamp(min=1e-9)) for n in plain
    )


def batch(rows: int, length: int) -> Batch:
    """Random tokens, of which the last six count fully."""
    ids = torch.randint(VOCABULARY, (rows, length + 1), generator=torch.Generator().manual_seed(0))
    weights = torch.full((rows, length), 0.01)
    weights[:, -6:] = 1
    return Batch(ids[:, :-1], ids[:, 1:], weights, None, (True,) * rows)


def fam(block_size: int, memory_segments: int) -> FamConfig:
    """A memory that all tokens see, with such blocks."""
    return FamConfig(
        block_size=block_size,
        memory_segments=memory_segments,
        fam_length=16,
        feedback_norm="rms",
        feedback_rms=10.0,
    )


def difference(precision: str) -> float:
    """The largest relative difference of a gradient, plain and recorded."""
    steps = [batch(4, length) for length in (400, 333)]  # the second is filled up
    plain, recorded = (
        gradients_of_last(made(kind, fam(64, 1), 3, 400, precision), steps)
        for kind in (Stepper, RecordedStepper)
    )
    return largest_difference(plain, recorded)


def seconds(kind: type[Stepper], shape: tuple[int, int, int, int]) -> tuple[float, float]:
    """(seconds of a step, peak of reserved memory in GiB)."""
    rows, length, block_size, memory_segments = shape
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    config = fam(block_size, memory_segments)
    stepper, its = made(kind, config, 30, length, "bf16"), batch(rows, length)
    stepper.run(0, [its])
    torch.cuda.synchronize()
    began = time.perf_counter()
    for step in range(STEPS):
        stepper.run(step, [its])
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / STEPS, torch.cuda.max_memory_reserved() / 2**30


def main() -> None:
    """Measure and print."""
    if not torch.cuda.is_available():
        raise SystemExit("A step is recorded on a GPU, and there is none.")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    torch.backends.cuda.matmul.allow_tf32 = False
    for precision in ("fp32", "bf16"):
        print(f"{precision}: largest relative difference of a gradient {difference(precision):.1e}")
    rows = []
    for shape in SHAPES:
        tokens = shape[0] * shape[1]
        (plain, _), (recorded, peak) = (seconds(kind, shape) for kind in (Stepper, RecordedStepper))
        rows.append(
            (
                f"{shape[0]} rows of {shape[1]:,}, blocks of {shape[2]} and {shape[3]} before",
                f"{tokens / plain:,.0f}",
                f"{tokens / recorded:,.0f}",
                f"{plain / recorded:.1f}",
                f"{peak:.0f} GiB",
            )
        )
    columns = ("shape", "plain, tokens/s", "recorded, tokens/s", "ratio", "memory, recorded")
    print(report.table(columns, rows))


if __name__ == "__main__":
    main()
