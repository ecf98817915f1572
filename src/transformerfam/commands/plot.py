"""`fam plot`: a figure of what `fam eval` found."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformerfam.errors import UserError

if TYPE_CHECKING:
    from transformerfam.evaluate import Line
    from transformerfam.plots import Curve

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


def panels_of(lines: list[Line]) -> dict[str, list[Curve]]:
    """Title -> curves, for what has an axis."""
    by_length: dict[str, dict[str, dict[int, list[Line]]]] = {}
    documents: dict[str, list[Line]] = {}
    for line in lines:
        if "length" in line["setting"]:
            title = f"{line['task']}: {line['metric']}"
            reader = by_length.setdefault(title, {}).setdefault(line["reader"], {})
            reader.setdefault(line["setting"]["length"], []).append(line)
        elif "edges" in line.get("metrics", {}):
            documents.setdefault(line["reader"], []).append(line)
    panels = {
        title: [c for name, found in readers.items() if (c := _by_length(name, found)) is not None]
        for title, readers in by_length.items()
    }
    if documents:
        panels["documents: tokens predicted right, by place"] = [
            _by_place(name, found) for name, found in documents.items()
        ]
    return {title: curves for title, curves in panels.items() if curves}


def _by_length(name: str, found: dict[int, list[Line]]) -> Curve | None:
    from transformerfam.evaluate import summarise
    from transformerfam.plots import Curve

    points = []
    for length in sorted(found):
        summary = summarise(found[length], found[length][0]["metric"])
        if summary is not None:
            error = summary.error or 0.0
            points.append((length, summary.mean, summary.mean - error, summary.mean + error))
    return Curve(name, *map(list, zip(*points, strict=True))) if points else None


def _by_place(name: str, found: list[Line]) -> Curve:
    """Share of tokens right in each part; a part stands at its middle."""
    from transformerfam.plots import Curve

    edges = max((line["metrics"]["edges"] for line in found), key=len)
    sums = [[0, 0] for _ in edges]
    for line in found:
        metrics: dict[str, Any] = line["metrics"]
        for part, (scored, right) in enumerate(
            zip(metrics["scored"], metrics["right"], strict=True)
        ):
            sums[part][0] += scored
            sums[part][1] += right
    places = [
        max(1, edge) * 3 // 2 if edge else edges[1] // 2 if edges[1:] else 512 for edge in edges
    ]
    share = [right / max(1, scored) for scored, right in sums]
    return Curve(name, places, share, share, share)
