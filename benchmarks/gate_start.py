"""What an untrained compressive memory costs right after conversion, by where its gates start.

    .venv/bin/python benchmarks/gate_start.py

Nothing is trained. The loss, in nats a token, is measured on a part of the Python language reference,
as one stream; `gradient` is the root mean square of the loss's gradient at β.
"""

from __future__ import annotations

import argparse

import torch
from harmless_start import text_parts

from transformerfam import FamConfig, load, reconfigure
from transformerfam.data.examples import Example, plain
from transformerfam.report import table
from transformerfam.training.probes import HeldOut


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gates", default="-2,-4,-6,-8", help="values of β")
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--asked", type=int, default=2048, help="tokens that are measured")
    args = parser.parse_args()
    windows = FamConfig(block_size=args.block_size, memory_segments=1, fam_length=0)
    model, tokenizer = load(config=windows)
    ask = plain(tokenizer, text_parts(None)[1])
    held_out = HeldOut({"text": Example(ask.ids[: args.asked], ask.weights[: args.asked])})
    ids = torch.tensor([ask.ids[: args.asked]])
    model.requires_grad_(False)
    alone = held_out(model)["mean"]
    rows = [["windows", "", f"{alone:.4f}", "", ""]]
    for rule in ("linear", "delta"):
        for start in args.gates.split(","):
            reconfigure(model, windows.replace(compressive_memory=rule))
            gates = model.get_decoder().memory_gates.weight
            gates.data.fill_(float(start))
            loss = held_out(model)["mean"]
            gates.requires_grad_(True)
            model(ids, labels=ids, use_cache=False).loss.backward()
            gradient = float(gates.grad.pow(2).mean().sqrt())
            gates.grad = None
            gates.requires_grad_(False)
            rows.append([rule, start, f"{loss:.4f}", f"{loss - alone:+.4f}", f"{gradient:.1e}"])
            print(rows[-1], flush=True)
    print(table(["memory", "β", "loss", "above windows", "gradient"], rows))


if __name__ == "__main__":
    main()
