"""What a conversion costs at the start, and after a little training, for several ways to begin.

    .venv/bin/python benchmarks/harmless_start.py --output harmless.jsonl
    .venv/bin/python benchmarks/harmless_start.py --biases=-8,-16,-32 --block-size 64  # nothing trained

Each way is trained alike (LoRA and the prompt) on the same text with several seeds; a seed draws the
prompt's tokens, LoRA's random half and the order of the text. The loss is measured on another part
of the text, as one stream. Results are kept one by one, so that an interrupted run goes on.

The text is the Python language reference, which every Python carries, or any file (--text).
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from transformerfam import report
from transformerfam.reproduction.runs import Result, Run, results_of
from transformerfam.text import language_reference

GEOMETRY = {"block_size": 128, "memory_segments": 1, "fam_length": 8, "sink_tokens": 4}
KEPT = {**GEOMETRY, "first_residual": "prompt"}
# name: (geometry, what the prompt starts from, settings of [feedback])
WAYS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "BSWA": ({**GEOMETRY, "fam_length": 0}, "vocabulary", {}),
    "kept, start token, bias from -32": (KEPT, "start", {"bias_start": -32.0}),
    "kept, start token": (KEPT, "start", {}),
    "paper": ({**GEOMETRY, "first_residual": "zero"}, "vocabulary", {}),
}


def text_parts(path: str | None) -> tuple[str, str]:
    """(text to train on, text to measure on)."""
    text = language_reference() if path is None else Path(path).read_text(encoding="utf-8")
    middle = len(text) // 2
    return text[:middle], text[middle:]


def work(run: Run) -> Result:
    """Convert, measure, train, measure."""
    import torch

    from transformerfam import load, reconfigure
    from transformerfam.conversion import initialise_prompt
    from transformerfam.data.examples import Example, plain
    from transformerfam.training.adaptation import adapt
    from transformerfam.training.probes import HeldOut
    from transformerfam.training.recipe import Recipe
    from transformerfam.training.trainer import Trainer

    torch.set_num_threads(1)
    geometry, prompt, feedback = WAYS[run["way"]]
    bias = {**feedback, "bias_steps": round(run["steps"] * run["rises"]) if feedback else 0}
    recipe = Recipe.from_dict(
        {
            "fam": geometry,
            "train": {"rank": 16, "alpha": 32.0},
            "data": {"layout": "packed", "length": run["length"], "batch_size": 1},
            "optimizer": {"learning_rate": 3e-4, "warmup_steps": 2},
            "feedback": bias,
            "run": {
                "steps": run["steps"],
                "seed": run["seed"],
                "activation_checkpointing": False,
                # The paper's start has gradients of 1e6, which are cut to 1.
                "explode_at": float("inf"),
            },
        }
    )
    model, tokenizer = load(config=recipe.fam)
    initialise_prompt(model, prompt, run["seed"])  # type: ignore[arg-type]
    learn, ask = (plain(tokenizer, text) for text in text_parts(run["text"]))
    held_out = HeldOut({"text": Example(ask.ids[: run["asked"]], ask.weights[: run["asked"]])})

    class Places:
        """The text from a place that seed and step choose."""

        def draw(self, number: int) -> Example:
            import random

            size = run["length"] + 1
            place = random.Random(f"{run['seed']}/{number}").randrange(len(learn.ids) - size)
            cut = slice(place, place + size)
            return Example(learn.ids[cut], learn.weights[cut])

    if feedback:
        reconfigure(model, recipe.fam.replace(fam_bias=feedback["bias_start"]))
    before = held_out(model)["mean"]
    reconfigure(model, recipe.fam)
    without_bias = held_out(model)["mean"] if feedback else before
    trained = Trainer(recipe, adapt(model, recipe.train, run["seed"]), Places(), quiet=True).run()
    after = held_out(trained.model.eval())["mean"]
    return {"before": before, "before, bias 0": without_bias, "after": after}


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("harmless.jsonl"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=36)
    parser.add_argument("--length", type=int, default=512, help="tokens of a step")
    parser.add_argument("--asked", type=int, default=1024, help="tokens that are measured")
    parser.add_argument("--rises", type=float, default=0.25, help="share of the steps for the bias")
    parser.add_argument("--text", help="a text file instead of the language reference")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--biases", help="only the loss after conversion under these biases")
    parser.add_argument("--block-size", type=int, default=128, help="for --biases")
    args = parser.parse_args()
    if args.biases:
        print_by_bias([float(b) for b in args.biases.split(",")], args)
        return
    names = ("steps", "length", "asked", "text", "rises")
    sizes = {name: getattr(args, name) for name in names}
    runs = [{"way": way, "seed": seed, **sizes} for way in WAYS for seed in range(args.seeds)]
    found: dict[tuple[str, int], Result] = {}
    for run, result, kept in results_of(runs, work, args.output, workers=args.workers):
        found[run["way"], run["seed"]] = result
        if not kept:
            print(
                f"{len(found)}/{len(runs)}  {run['way']}, seed {run['seed']}: {result}", flush=True
            )
    print(table(found, args.seeds))


def print_by_bias(biases: list[float], args: argparse.Namespace) -> None:
    """The loss of the default start under each bias, nothing trained; and that of the windows."""
    from transformerfam import FamConfig, load, reconfigure
    from transformerfam.data.examples import Example, plain
    from transformerfam.training.probes import HeldOut

    config = FamConfig.from_dict({**KEPT, "block_size": args.block_size})
    model, tokenizer = load(config=config)
    ask = plain(tokenizer, text_parts(args.text)[1])
    held_out = HeldOut({"text": Example(ask.ids[: args.asked], ask.weights[: args.asked])})
    ways = {f"bias {bias:g}": config.replace(fam_bias=bias) for bias in biases}
    for name, way in {"windows": config.without_feedback(), **ways}.items():
        print(f"{name:12} {held_out(reconfigure(model, way))['mean']:.4f}", flush=True)


def table(found: dict[tuple[str, int], Result], seeds: int) -> str:
    """Mean and spread of the losses in nats, and how far above BSWA of the same seed."""
    rows = []
    for way in WAYS:
        cells = [way]
        for when in ("before", "before, bias 0", "after"):
            above = [found[way, s][when] - found["BSWA", s][when] for s in range(seeds)]
            mean = statistics.mean(found[way, s][when] for s in range(seeds))
            cells.append(f"{mean:.3f}")
            cells.append(f"{statistics.mean(above):+.3f} ± {statistics.pstdev(above):.3f}")
        rows.append(cells)
    head = ["way", "at the start", "above BSWA", "bias 0", "above BSWA", "trained", "above BSWA"]
    return report.table(head, rows)


if __name__ == "__main__":
    main()
