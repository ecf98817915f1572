"""`fam plot`: a figure of what `fam eval` found."""

from __future__ import annotations

import argparse
from pathlib import Path

from transformerfam.errors import UserError

HELP = "draw what fam eval found"

EPILOG = """\
examples:
  fam plot eval
  fam plot eval --out passkey.svg --tasks passkey,passkey-3
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fam plot`."""
    parser.description = (
        "Draw the results of fam eval: each task by length, one curve a reader, with one standard "
        "error around it; documents by place in the text."
    )
    parser.epilog = EPILOG
    parser.add_argument(
        "folder", metavar="FOLDER", nargs="?", default="eval", help="results (default: %(default)s)"
    )
    parser.add_argument("--tasks", metavar="TASK,...", help="draw these (default: all)")
    parser.add_argument(
        "--out",
        metavar="FILE",
        default="fam-eval.png",
        help="the picture, .png, .svg or .pdf (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Read, draw, say where."""
    from transformerfam.answers import panels_of
    from transformerfam.evaluate import read_results
    from transformerfam.plots import draw_curves

    lines = read_results(Path(args.folder))[1]
    if args.tasks:
        tasks = {name.strip() for name in args.tasks.split(",")}
        if missing := sorted(tasks - {line["task"] for line in lines}):
            raise UserError(f"{args.folder} has no results of {', '.join(missing)}.")
        lines = [line for line in lines if line["task"] in tasks]
    panels = panels_of(lines)
    if not panels:
        raise UserError(
            f"{args.folder} has nothing to draw: a figure needs answers at several lengths or places."
        )
    draw_curves(
        args.out, panels, x="tokens", y="share right", marks={title: {} for title in panels}
    )
    print(f"wrote {args.out}")
    return 0
