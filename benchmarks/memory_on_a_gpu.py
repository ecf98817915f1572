"""Teach the default model a memory of FAM alone within minutes of a GPU, stage by stage, and ask it.

    .venv/bin/python benchmarks/memory_on_a_gpu.py --filler books --held persuasion.txt --out memory

The stages are those by which two CPU cores came to nearly every key of the block before and a few
of three blocks before (LOG.md, 2026-11-27), and one more for windows of three past blocks. Tokens
are read by the model's own weights throughout (`adapted = "fam"`). A stage that has its adapter in
OUT is not done again, and one that was broken off is begun again. What is in OUT/adapter in the end
is small enough to be carried about (bfloat16). `--check` takes one short step of each stage on a
CPU, in OUT/check: whether all of it runs. It has not been run on a GPU yet.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from transformerfam import load, read, report
from transformerfam.conversion import reconfigure, twin
from transformerfam.data.files import plain_texts
from transformerfam.stream import Chunk
from transformerfam.tasks import TASKS, Wanted
from transformerfam.training.recipe import Recipe, find
from transformerfam.training.trainer import train

WEIGHTS = "adapter_model.safetensors"
ON_A_GPU = (
    "model.dtype=bfloat16",
    "run.precision=bf16",
    "run.cuda_graphs=true",
    "run.checkpoint_every=0",
    "data.micro_batch_size=0",
)
BEGIN = ("data.length=512",)
NEXT_BLOCK = (
    "data.length=512",
    "data.begin_length=0",
    "data.batch_size=16",
    "data.sources.0.lengths=262,290",
    "data.sources.0.filler_share=0.1",
    "feedback.state_passing=0",
    "optimizer.learning_rate=1e-3",
)
ANYWHERE = ("data.batch_size=12", "feedback.bptt_blocks=8", "feedback.state_passing=0.5")
WINDOWS = (
    "data.length=4096",
    "data.begin_length=0",
    "data.batch_size=12",
    "data.sources.0.lengths=1100,4096",
    "data.sources.0.filler_share=0.6",
    "feedback.bptt_blocks=4",
    "feedback.state_passing=0.8",
    "feedback.drawn_segments=0,3",
    "optimizer.learning_rate=3e-4",
)
# Name, share of the time, recipe, settings: to read anything at all; to read a whole key, wherever it
# stood in the block before; to hold it, and to write over an older one; to leave prose alone in windows.
STAGES = (
    ("begin", 0.1, "smollm2-fam", BEGIN),
    ("next-block", 0.15, "smollm2-fam-2", NEXT_BLOCK),
    ("anywhere", 0.35, "smollm2-fam-2", ANYWHERE),
    ("windows", 0.4, "smollm2-fam-2", WINDOWS),
)
CHECK = (
    "data.batch_size=2",
    "data.micro_batch_size=2",
    "data.begin_length=0",
    "data.length=512",
    "data.sources.0.lengths=480,512",
    "run.steps=1",
)


def recipe(stage: int, args: argparse.Namespace) -> Recipe:
    """A stage, which goes on from the adapter of the one before."""
    name, share, recipe_name, settings = STAGES[stage]
    changes = [*settings, f"run.output={args.out / name}", "run.steps=100000"]
    changes += [f"model.base={args.model}", f"data.sources.0.filler={args.filler}"]
    if stage:
        changes.append(f"model.adapter={args.out / STAGES[stage - 1][0]}")
    changes += CHECK if args.check else [*ON_A_GPU, f"run.minutes={share * args.minutes}"]
    return Recipe.load(find(recipe_name), changes)


def carried(folder: Path, to: Path) -> None:
    """Copy an adapter, in half of its size."""
    to.mkdir(exist_ok=True)
    for file in folder.iterdir():
        if file.is_file() and file.name != WEIGHTS:
            shutil.copy(file, to)
    tensors = load_file(folder / WEIGHTS)
    save_file({name: t.to(torch.bfloat16) for name, t in tensors.items()}, to / WEIGHTS)


def keys_right(model: Any, tokenizer: Any, args: argparse.Namespace) -> list[list[str]]:
    """Share of whole keys, and of their digits, by length and place."""
    wanted = Wanted(
        tokenizer,
        (512,) if args.check else (512, 1024, 2048, 4096, 8192),
        samples=1 if args.check else 8,
        filler=plain_texts(str(args.held)),
    )
    rows = []
    for task in ("passkey", "passkey-middle", "passkey-late"):
        for case in TASKS[task].cases(wanted):
            answers = [case.make(number).ask(model) for number in range(case.count)]
            means = [sum(a[key] for a in answers) / len(answers) for key in ("exact", "tokens")]
            rows.append([task, report.count(case.setting["length"]), *(f"{m:.2f}" for m in means)])
    return rows


def losses(model: Any, tokenizer: Any, args: argparse.Namespace) -> list[list[str]]:
    """Nats a token of each 1,024 tokens of the held-out text, with the memory and without."""
    tokens = 600 if args.check else 8192
    ids = tokenizer(plain_texts(str(args.held))[0][: 8 * tokens]).input_ids[:tokens]
    windows = twin(model, model.fam_config.without_feedback())
    columns = []
    for reader in (model, windows):
        chunks: list[Chunk] = list(read(reader, ids))
        parts = torch.cat([chunk.losses for chunk in chunks]).split(1024)
        columns.append([f"{float(part.mean()):.3f}" for part in parts])
    return [[f"from {n * 1024:,}", *cells] for n, cells in enumerate(zip(*columns, strict=True))]


def main() -> None:
    """Train what is not there yet, then print two tables for no past block and for three."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--filler", type=Path, required=True, help="prose to hide keys in")
    parser.add_argument("--held", type=Path, required=True, help="a text that is not in it")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2", help="the default model, or its .gguf file")
    parser.add_argument("--minutes", type=float, default=6.0, help="of training")
    parser.add_argument("--check", action="store_true", help="one step of each stage, on a CPU")
    args = parser.parse_args()
    if args.check:
        args.out = args.out / "check"
    for stage, (name, *_) in enumerate(STAGES):
        if not (args.out / name / WEIGHTS).exists():
            shutil.rmtree(args.out / name, ignore_errors=True)
            began = time.monotonic()
            done = train(recipe(stage, args), quiet=True)
            told = [loss for loss in done.losses if loss is not None]
            ends = f"loss {told[0]:.2f} to {sum(told[-20:]) / len(told[-20:]):.2f}"
            took = report.duration(time.monotonic() - began)
            print(f"{name}: {done.steps:,} steps, {ends}, {took}", flush=True)
    carried(args.out / STAGES[-1][0], args.out / "adapter")
    model, tokenizer = load(
        args.model, adapter=str(args.out / "adapter"), device=None if args.check else "cuda"
    )
    for segments in (0, 3):
        reconfigure(model, model.fam_config.replace(memory_segments=segments))
        print(f"\n{model.fam_config.describe()}")
        print(
            report.table(["task", "tokens", "keys", "digits"], keys_right(model, tokenizer, args))
        )
        print(
            report.table(["tokens", "FAM", "windows"], losses(model, tokenizer, args)), flush=True
        )


if __name__ == "__main__":
    main()
