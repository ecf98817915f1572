"""Training throughput and peak memory: FAM against its windows alone and against full attention.

    .venv/bin/python benchmarks/training_speed.py

One training step (forward and backward, LoRA on all matrices and the prompt) over one row of random
tokens, by each of the three in turns, in one run. To come to 32k tokens on a CPU it takes the first
layers of the model only (--layers), and computes the head for the last 64 tokens; both are the
same for all three. Trust the ratios.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from typing import Any

import peft
import torch
from torch.nn.functional import cross_entropy

from transformerfam import FamConfig, Memory, load, report
from transformerfam.benchmark import gauge_of_bytes, readers, wait_for

COUNTED = 64


def shortened(model: Any, layers: int) -> Any:
    """The model with its first layers alone."""
    decoder = model.get_decoder()
    decoder.layers = decoder.layers[:layers]
    model.config.num_hidden_layers = layers
    for name in ("layer_types",):
        if getattr(model.config, name, None):
            setattr(model.config, name, getattr(model.config, name)[:layers])
    return model


def trainable(model: Any, checkpointing: bool) -> Any:
    """With LoRA, in training mode."""
    feedback = getattr(model, "fam_config", None)
    saved = ["fam_prompt"] if feedback is not None and feedback.has_feedback else None
    model = copy.copy(model)
    config = peft.LoraConfig(r=16, target_modules="all-linear", modules_to_save=saved)
    adapted = peft.get_peft_model(model, config).train()
    if checkpointing:
        base: Any = adapted.get_base_model()
        base.activation_checkpointing_enable()
        base.enable_input_require_grads()
    return adapted


def step(model: Any, ids: torch.Tensor) -> tuple[float, int | None]:
    """(seconds, bytes at the peak above what was in use) of one step."""
    gauge = gauge_of_bytes(ids.device)
    began = time.perf_counter()
    base = model.get_base_model()
    more = {}
    if hasattr(base, "fam_config"):
        more = {"past_key_values": Memory.for_model(base), "use_cache": True}
    else:
        more = {"use_cache": False}
    logits = model(input_ids=ids[:, :-1], logits_to_keep=COUNTED, **more).logits
    cross_entropy(logits.flatten(0, 1).float(), ids[0, -COUNTED:]).backward()
    wait_for(ids)
    seconds = time.perf_counter() - began
    peak = None if gauge is None else gauge()
    model.zero_grad()
    return seconds, peak


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="2048,8192,32768")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="at lengths below 16k, else 1")
    parser.add_argument("--block-size", type=int, default=1024)
    parser.add_argument("--memory-segments", type=int, default=3)
    parser.add_argument("--fam-length", type=int, default=64)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    config = FamConfig(args.block_size, args.memory_segments, args.fam_length)
    model, _ = load(args.model, config, dtype=args.dtype, device=args.device)
    compared = readers(shortened(model, args.layers), config)
    models = {r.name: trainable(r.model, args.checkpointing) for r in compared}
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]

    def tokens(count: int) -> torch.Tensor:
        return torch.randint(vocabulary, (1, count + 1), generator=generator).to(args.device)

    for warmed in models.values():
        step(warmed, tokens(512))
    speeds, peaks = [], []
    for length in map(int, args.lengths.split(",")):
        seconds: dict[str, list[float]] = {name: [] for name in models}
        peak: dict[str, int] = dict.fromkeys(models, 0)
        for _ in range(args.repeats if length < 16384 else 1):
            ids = tokens(length)
            for name, each in models.items():
                took, most = step(each, ids)
                seconds[name].append(took)
                peak[name] = max(peak[name], most or 0)
        middle = {name: statistics.median(times) for name, times in seconds.items()}
        fam, windows, full = middle.values()
        ratios = (f"{windows / fam:.2f}", f"{full / fam:.2f}")
        speeds.append(
            [report.count(length), *(f"{length / s:,.0f}" for s in middle.values()), *ratios]
        )
        peaks.append([report.count(length), *(report.size(b) for b in peak.values())])
        print(f"{length} tokens measured", flush=True)
    print(f"{args.layers} layers, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    header = ["tokens/s", *models, f"FAM / {list(models)[1]}", "FAM / full"]
    print(report.table(header, speeds), end="\n\n")
    print(report.table(["peak above weights", *models], peaks))


if __name__ == "__main__":
    main()
