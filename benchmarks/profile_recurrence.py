"""How much of a prefill goes into the feedback recurrence, on the default model.

    .venv/bin/python benchmarks/profile_recurrence.py

Prints, for a call of one and of two blocks of 1,024 random tokens on a fresh stream: seconds with and
without feedback (best of 3), and of the former those in the recurrence and in projections alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from transformerfam import FamConfig, feedback, load, reconfigure
from transformerfam.feedback import Recurrence


def named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` as an entry of its own in a profile."""

    def run(*args: Any) -> Any:
        with record_function(name):
            return function(*args)

    return run


@torch.no_grad()
def main() -> None:
    """Measure and print."""
    Recurrence.run = named("recurrence", Recurrence.run)  # type: ignore[method-assign]
    feedback.projections = named("projections alone", feedback.projections)
    model, _ = load(config=FamConfig(fam_length=0))
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (1, 2048), generator=torch.Generator().manual_seed(0))
    for tokens in (1024, 2048):
        for name, config in (("BSWA", FamConfig(fam_length=0)), ("FAM", FamConfig())):
            reconfigure(model, config)
            best = float("inf")
            for _ in range(3):
                start = time.perf_counter()
                model(ids[:, :tokens], logits_to_keep=1)
                best = min(best, time.perf_counter() - start)
            with profile(activities=[ProfilerActivity.CPU]) as found:
                model(ids[:, :tokens], logits_to_keep=1)
            spent = {e.key: e.cpu_time_total / 1e6 for e in found.key_averages()}
            parts = [
                f"{k} {spent[k]:.3f} s" for k in ("recurrence", "projections alone") if k in spent
            ]
            print(f"{tokens} tokens, {name}: {best:.2f} s", *parts, sep="  ")


if __name__ == "__main__":
    main()
