"""Teach the default model its memory within minutes of a GPU, by its recipes (docs/training.md).

    .venv/bin/python benchmarks/memory_on_a_gpu.py --filler books --out memory --minutes 9
    .venv/bin/python benchmarks/memory_on_a_gpu.py --filler books --out memory --minutes 9 \\
        --adapter shipped --from smollm2-replay --held other-books

The same as `fam train` with each recipe, from the adapter of the one before, in larger steps. To record
a step takes half a second a block: texts are of a length or two here, where the recipes have many. Texts
that are replayed are recorded block by block, however long they are; they come to more blocks as their
answers are said right.
A stage that has its adapter in OUT is not done again, and one that was broken off goes on from its last
checkpoint. Minutes are those of training: loading takes half a minute more a stage. What is in
OUT/adapter in the end is small enough to be carried about (bfloat16). `--check` takes one short step of
each stage on a CPU, in OUT/check: whether all of it runs. With `--held`, texts that are not trained on,
the memory is asked for keys in them in the end, eight side by side; to load it anew would take longer.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from transformerfam import report
from transformerfam.data.files import plain_texts
from transformerfam.embedded import SHIPPED, shipped_adapter
from transformerfam.evaluate import Results, evaluate, plan, summarise
from transformerfam.readers import readers_of
from transformerfam.tasks import TASKS, Wanted
from transformerfam.training.places import CHECKPOINTS
from transformerfam.training.recipe import Recipe, find
from transformerfam.training.trainer import train

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# What cannot be recorded is left out: texts that grow, and questions behind their blocks.
LARGE = ("data.micro_batch_size=0", "data.begin_length=0", "feedback.asked_blocks=0")
# Recipe, its share of the time when all are done, rows of a step, lengths (none: the recipe's), and
# what else is changed. Lengths are such that what is asked begins well within a block, in all texts;
# two of them would be a range, which cannot be recorded.
STAGES: tuple[tuple[str, float, int, tuple[int, ...], tuple[str, ...]], ...] = (
    ("smollm2-begin", 0.1, 64, (), ()),
    ("smollm2-memory", 0.25, 32, (), LARGE),
    (
        "smollm2-updates",
        0.25,
        48,
        (1060, 2080, 2080),
        (*LARGE, "feedback.drawn_segments=1", "optimizer.learning_rate=7e-4"),
    ),
    (
        "smollm2-windows",
        0.4,
        12,
        (5300, 9400, 9400),
        (*LARGE, "data.length=16384", "optimizer.learning_rate=6e-4"),
    ),
    (
        "smollm2-replay",
        0.4,
        96,
        (),
        (
            "replay.blocks=256",
            "replay.before=0,0,0,0,1,3,6,12",
            "replay.behind=1,3,5,8,12,18,27,40,60",
            "replay.times=1",
            "replay.rows_at_once=32",
            "feedback.bptt_blocks=4",
            "feedback.asked_blocks=4",
            "data.begin_length=12288",
            "data.grow_at=0.6",
            "optimizer.learning_rate=4e-4",
            "optimizer.warmup_steps=8",
        ),
    ),
)
NAMES = [name for name, *_ in STAGES]
ON_A_GPU = ("model.dtype=bfloat16", "run.precision=bf16", "run.checkpoint_every=50")
ASKED, LENGTHS = ("passkey", "passkey-middle"), (5120, 8192, 16384, 32768, 65536)
SIDE_BY_SIDE = 8
CHECK = ("run.steps=1", "data.batch_size=2", "data.micro_batch_size=0")
CHECK_REPLAY = ("replay.blocks=4", "replay.times=1", "replay.before=1", "replay.behind=7")


def recipe(stage: int, args: argparse.Namespace) -> Recipe:
    """A stage, which goes on from the adapter of the one before."""
    name, share, rows, lengths, larger = STAGES[stage]
    own = Recipe.load(find(name), [])
    changes = [*larger, f"run.output={args.out / name}", f"model.base={args.model}"]
    changes += [f"data.filler={args.filler}", f"data.batch_size={rows}"]
    if lengths:
        each = ",".join(map(str, lengths))
        changes += [f"data.sources.{i}.lengths={each}" for i in range(len(own.data.sources))]
    first = NAMES.index(args.first)
    if stage > first:
        changes.append(f"model.adapter={args.out / NAMES[stage - 1]}")
    elif args.adapter:
        changes.append(f"model.adapter={args.adapter}")
    if args.check:
        short = CHECK_REPLAY if own.replay.blocks else ()
        return Recipe.load(find(name), [*changes, *CHECK, *short])
    share /= sum(share for _, share, *_ in STAGES[first:])
    changes += [*ON_A_GPU, f"run.minutes={share * args.minutes}"]
    return Recipe.load(find(name), [*changes, f"run.cuda_graphs={str(args.record).lower()}"])


def carried(folder: Path, to: Path) -> None:
    """Copy an adapter, in half of its size, as one of the default model."""
    to.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        if file.is_file() and file.name != WEIGHTS:
            shutil.copy(file, to)
    tensors = load_file(folder / WEIGHTS)
    save_file({name: t.to(torch.bfloat16) for name, t in tensors.items()}, to / WEIGHTS)
    config = json.loads((to / CONFIG).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = "smollm2"
    (to / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")


def ask(model: Any, folder: Path, held: Path, lengths: tuple[int, ...], samples: int) -> None:
    """Ask for keys at the start and in the middle of texts, and print what is said right.

    Args:
        model: that was trained.
        folder: where it was written, with its tokenizer.
        held: texts to hide keys in.
    """
    wanted = Wanted(
        tokenizer=AutoTokenizer.from_pretrained(folder),
        lengths=lengths,
        samples=samples,
        seed=0,
        filler=plain_texts(str(held)),
    )
    cases = [case for name in ASKED for case in TASKS[name].cases(wanted)]
    readers = readers_of(model.get_base_model(), ["model"], full_limit=None)
    results = Results(folder / "asked", readers, seed=0)
    for case in cases:  # one after the other: what was answered is seen at once
        asks = plan(readers, [case], together=SIDE_BY_SIDE)
        with torch.autocast("cuda", torch.bfloat16, enabled=model.device.type == "cuda"):
            lines = [line for _, line in evaluate(asks, results, SIDE_BY_SIDE)]
        whole, digits = (summarise(lines, metric) for metric in ("exact", "tokens"))
        if whole and digits:
            right = f"{whole.mean:.2f} of {whole.count} whole, {digits.mean:.2f} of the digits"
            print(f"{case.task} of {case.setting['length']:,} tokens: {right}", flush=True)


def main() -> None:
    """Train what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--filler", type=Path, required=True, help="prose to hide things in")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2", help="the default model, or its weights")
    parser.add_argument("--adapter", default="", help="begin with this one")
    parser.add_argument("--from", dest="first", choices=NAMES, default=NAMES[0], help="stage")
    parser.add_argument("--minutes", type=float, default=9.0, help="of training")
    parser.add_argument("--no-record", dest="record", action="store_false", help="no CUDA graphs")
    parser.add_argument("--held", type=Path, help="texts to ask for keys in")
    parser.add_argument("--check", action="store_true", help="one step of each stage, on a CPU")
    args = parser.parse_args()
    args.out = args.out / "check" if args.check else args.out
    if args.adapter == SHIPPED:  # also where the default model is given as a file
        args.adapter = shipped_adapter()
    trained: Any = None
    for stage in range(NAMES.index(args.first), len(NAMES)):
        name = NAMES[stage]
        if not (args.out / name / WEIGHTS).exists():
            begun = any((args.out / name / CHECKPOINTS).glob("step-*"))
            if not begun:
                shutil.rmtree(args.out / name, ignore_errors=True)
            began = time.monotonic()
            done = train(recipe(stage, args), quiet=True, resume=begun)
            told = [loss for loss in done.losses if loss is not None]
            ends = f"loss {told[0]:.2f} to {sum(told[-20:]) / len(told[-20:]):.2f}"
            took = report.duration(time.monotonic() - began)
            print(f"{name}: {done.steps:,} steps, {ends}, {took}", flush=True)
            trained = done.model
        carried(args.out / name, args.out / "adapter")
    if args.held and trained is None:
        print(
            f"Nothing was trained, and so nothing is asked: fam eval --adapter {args.out / 'adapter'}"
        )
    elif args.held:
        lengths, samples = ((1200,), 1) if args.check else (LENGTHS, SIDE_BY_SIDE)
        ask(trained, args.out / NAMES[-1], args.held, lengths, samples)


if __name__ == "__main__":
    main()
