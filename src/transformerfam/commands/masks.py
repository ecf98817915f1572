"""`fam masks`: draw which query sees which key."""

from __future__ import annotations

import argparse

from transformerfam.commands import _options as options

HELP = "draw the attention patterns: which query sees which key"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fam masks`."""
    parser.description = (
        "Draw figures 1 and 2 of the paper, the attention patterns without and with the feedback "
        "memory, and the patterns of TransformerXL, BigBird and Sparse Transformer, from the "
        "predicates that the model computes with. Needs matplotlib: "
        "pip install 'transformerfam[plot]'."
    )
    parser.add_argument("path", metavar="OUT", help="the file to write: .png, .svg or .pdf")
    parser.add_argument(
        "--sink-tokens",
        metavar="TOKENS",
        type=options.whole(0),
        default=0,
        help="attention sinks in figure 2, 0 to 4 (default: 0, as in the paper)",
    )


def run(args: argparse.Namespace) -> int:
    """Draw."""
    from transformerfam.plots import draw_masks

    draw_masks(args.path, sink_tokens=args.sink_tokens)
    print(f"wrote {args.path}")
    return 0
