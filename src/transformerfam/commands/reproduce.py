"""`fam reproduce`: make a figure of the paper again, at a size that fits the machine."""

from __future__ import annotations

import argparse
import shlex
import time
from pathlib import Path

from transformerfam import report
from transformerfam.commands import _options as options
from transformerfam.errors import UserError

HELP = "make a figure of the paper again: train, ask, draw"

EPILOG = """\
examples:
  fam reproduce figure3a
  fam reproduce figure3a --parts start --seeds 1
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fam reproduce`."""
    parser.description = (
        "Train what a figure of the paper compares, at toy size and from scratch, with several seeds; "
        "ask; and write a page, a picture and the numbers. Each run is kept when it ends, so that the "
        "same command goes on where it was interrupted."
    )
    parser.epilog = EPILOG
    parser.add_argument("figure", metavar="FIGURE", choices=["figure3a"], help="figure3a")
    parser.add_argument(
        "--parts",
        metavar="PARTS",
        default="start,anywhere",
        help="figure3a: `start`, the paper's; `anywhere`, what it does not ask (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds",
        metavar="COUNT",
        type=options.whole(1),
        default=3,
        help="runs of everything, seeds 0, 1, ... (default: %(default)s)",
    )
    parser.add_argument(
        "--steps", metavar="STEPS", type=options.whole(1), help="of training, for a quick look"
    )
    parser.add_argument(
        "--lengths",
        metavar="BLOCKS",
        help="ask at these lengths, with commas between (default: 2 to 1024 blocks)",
    )
    parser.add_argument(
        "--workers",
        metavar="COUNT",
        type=options.whole(1),
        default=2,
        help="runs at a time, each on one core (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        default="reproduction",
        help="where page, picture and numbers go (default: %(default)s)",
    )
    options.add_quiet(parser)


def run(args: argparse.Namespace) -> int:
    """Do the runs that are missing; write the page."""
    from transformerfam.reproduction import figure3a, figure3a_page
    from transformerfam.reproduction.runs import results_of

    parts = _names(args.parts, [p.name for p in figure3a.PARTS])
    lengths = figure3a.LENGTHS if args.lengths is None else _lengths(args.lengths)
    runs = figure3a.plan(parts, range(args.seeds), lengths, args.steps)
    progress = report.Progress(quiet=args.quiet)
    folder, began, done = Path(args.out), time.monotonic(), []
    found = results_of(runs, figure3a.work, folder / "figure3a.runs.jsonl", workers=args.workers)
    progress.passing(f"{len(runs)} runs ...")
    for each, result, kept in found:
        done.append((each, result))
        if not kept:
            progress.note(
                f"{len(done)}/{len(runs)}   {each['part']}, {each['variant']}, seed {each['seed']}: "
                f"loss {result['last_loss']:.3f}, {report.duration(result['seconds'])}"
            )
    order = {str(r): i for i, r in enumerate(runs)}
    done.sort(key=lambda pair: order[str(pair[0])])
    paths = figure3a_page.write(folder, done, _command(args))
    print(_tables(done, parts))
    print(
        f"\nwrote {paths[0]}, {paths[1]} and {paths[2]} after "
        f"{report.duration(time.monotonic() - began)}"
    )
    return 0


def _names(text: str, known: list[str]) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or set(names) - set(known):
        raise UserError(f"--parts takes {' and '.join(known)}, with commas between, not {text!r}.")
    return names


def _lengths(text: str) -> tuple[int, ...]:
    try:
        lengths = sorted({int(part) for part in text.split(",")})
    except ValueError:
        lengths = []
    if not lengths or lengths[0] < 2:
        raise UserError(f"--lengths takes numbers of at least 2 with commas between, not {text!r}.")
    return tuple(lengths)


def _command(args: argparse.Namespace) -> str:
    """The command that makes the same page."""
    words = ["fam", "reproduce", args.figure, "--parts", args.parts, "--seeds", str(args.seeds)]
    if args.steps is not None:
        words += ["--steps", str(args.steps)]
    if args.lengths is not None:
        words += ["--lengths", args.lengths]
    return shlex.join(words)


def _tables(done: list[tuple[dict[str, object], dict[str, object]]], parts: list[str]) -> str:
    from transformerfam.reproduction import figure3a, figure3a_page

    lines = []
    for name in parts:
        for keys, where in figure3a.part(name).asked:
            curves = figure3a_page.curves_of(done, name, f"{keys} {where}")
            lines += [f"trained on keys {name}, asked: {keys} {where}", ""]
            lines += [report.table(*figure3a_page.table(curves)), ""]
    return "\n".join([*lines, *figure3a_page.verdicts(done)])
