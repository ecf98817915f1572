"""`fam reproduce`: make tables and figures of the paper again, at a size that fits the machine."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from transformerfam import report
from transformerfam.commands import _options as options
from transformerfam.errors import UserError, reason_of

if TYPE_CHECKING:
    from transformerfam.reproduction.experiment import Planned
    from transformerfam.reproduction.page import Found, Page
    from transformerfam.reproduction.runs import Result

_SEEDS = 3
_DEFAULTS = {"--scale": "toy", "--seeds": _SEEDS}
_TRAINING = ("--scale", "--seeds", "--steps", "--workers")
_ASKING = ("--adapter", "--cut", "--data", "--dtype", "--rows", "--samples")
_LOOK_TOKENS = 4096  # of texts longer than these --samples asks for fewer

HELP = "make a table or figure of the paper again: train, ask, draw"

EPILOG = """\
examples:
  fam reproduce figure3a
  fam reproduce table5 table6 --seeds 1
  fam reproduce all --out docs/reproduction
  fam reproduce table5 --scale paper
"""
_RUNS = "runs.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fam reproduce`."""
    parser.description = (
        "Train what a table or figure of the paper compares, with several seeds; ask; and write a page "
        "(Markdown and HTML), a picture and the numbers, with the paper's numbers beside and what "
        "held. Each run is kept when it ends, so that the same command goes on where it was "
        "interrupted, and items that ask for the same run share it."
    )
    parser.epilog = EPILOG
    parser.add_argument(
        "items",
        metavar="ITEM",
        nargs="*",
        help="figure1, figure3a, table5, ..., or all; without one they are listed",
    )
    parser.add_argument(
        "--scale",
        choices=["toy", "small", "paper"],
        default="toy",
        help="toy: from scratch, on two cores. small: SmolLM2, on one accelerator. paper: the "
        "paper's shapes and hyperparameters, built without weights, planned and estimated "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--seeds",
        metavar="COUNT",
        type=options.whole(1),
        default=_SEEDS,
        help="runs of everything, seeds 0, 1, ... (default: %(default)s)",
    )
    parser.add_argument(
        "--steps", metavar="STEPS", type=options.whole(1), help="of training, for a quick look"
    )
    parser.add_argument(
        "--lengths",
        metavar="LENGTHS",
        help="ask at these lengths, with commas between: blocks for toys, else tokens",
    )
    _add_real_data(parser)
    parser.add_argument(
        "--workers",
        metavar="COUNT",
        type=options.whole(1),
        help="runs at a time, each on one core, or on the accelerator at the scale small; for results "
        "and table2 processes that share the questions (default: 2 for toys, else 1)",
    )
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        default="reproduction",
        help="where pages, pictures and numbers go (default: %(default)s)",
    )
    options.add_quiet(parser)


def _add_real_data(parser: argparse.ArgumentParser) -> None:
    """What is asked of a pretrained model."""
    parser.add_argument(
        "--data",
        metavar="FOLDER",
        help="for results and table2: real data, see docs/evaluation.md",
    )
    parser.add_argument(
        "--adapter",
        metavar="FOLDER",
        help="for results, table2 and figure11: an adapter of the default model, such as "
        "shipped (default: none)",
    )
    parser.add_argument(
        "--samples",
        metavar="COUNT",
        type=options.whole(1),
        help="for results and table2: questions of each kind, for a quick look; of keys and "
        f"facts in more than {_LOOK_TOKENS:,} tokens fewer, down to one",
    )
    parser.add_argument(
        "--rows",
        metavar="COUNT",
        type=options.whole(1),
        help="for results and table2: questions of each of GPT-3's tasks (default: as "
        "--samples, or 300)",
    )
    parser.add_argument(
        "--cut",
        metavar="TOKENS",
        type=options.whole(2),
        help="for results: whole documents are cut here (default: the longest of --lengths, or "
        "262,144)",
    )
    options.add_dtype(parser, "for results and table2: ")


def run(args: argparse.Namespace) -> int:
    """Make the pages that were asked for, one after the other."""
    from transformerfam.reproduction.page import write_index

    titles = _titles()
    if not args.items:
        print(report.facts(sorted(titles.items())))
        return 0
    names = _names(args, titles)
    _refuse_unused(names, args)
    folder = _folder(args.out)
    for name in names:
        began = time.monotonic()
        try:
            page = _page(name, args, folder)
        except UserError as error:
            if args.items != ["all"]:
                raise
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        paths = page.write(folder)
        print("\n".join(page.lines))
        print(
            f"\nwrote {' and '.join(map(str, [*paths, *page.pictures]))} after "
            f"{report.duration(time.monotonic() - began)}\n",
            flush=True,
        )
    write_index(folder)
    return 0


def _titles() -> dict[str, str]:
    """What there is."""
    from transformerfam.reproduction import results
    from transformerfam.reproduction.items import ITEMS, SAME_PAGE
    from transformerfam.reproduction.machine import MACHINE

    titles = {name: item.title for name, item in ITEMS.items()}
    titles |= {name: (make.__doc__ or "").splitlines()[0] for name, make in MACHINE.items()}
    titles |= {name: title for name, (title, _, _) in results.ITEMS.items()}
    return titles | {other: titles[n] for other, n in SAME_PAGE.items() if n in titles}


def _names(args: argparse.Namespace, titles: dict[str, str]) -> list[str]:
    from transformerfam.reproduction import results
    from transformerfam.reproduction.items import ITEMS, SAME_PAGE
    from transformerfam.reproduction.machine import MACHINE

    if args.items == ["all"]:
        trained, asked = set(ITEMS), set(results.ITEMS) if args.data else set()
        # What trains nothing has no scale.
        return sorted(trained | asked | (set(MACHINE) if args.scale == "toy" else set()))
    if unknown := [name for name in args.items if name not in titles]:
        raise UserError(
            f"There is no item {unknown[0]}; `fam reproduce` without one lists what there is."
        )
    return list(dict.fromkeys(SAME_PAGE.get(name, name) for name in args.items))


def _folder(path: str) -> Path:
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be made: {reason_of(error)}.") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"Nothing can be written in the folder {folder}; name another with --out.")
    return folder


def _page(name: str, args: argparse.Namespace, folder: Path) -> Page:
    from transformerfam.reproduction import page, results, scales
    from transformerfam.reproduction.items import ITEMS
    from transformerfam.reproduction.machine import MACHINE, Making, paper_page

    command = _command(name, args)
    if name in results.ITEMS:
        return _results(name, args, folder, command)
    if name in MACHINE:
        making = Making(folder, command, args.adapter)
        if lengths := _lengths(args.lengths):
            making = replace(making, lengths=lengths)
        return MACHINE[name](making)
    item = ITEMS[name]
    if args.scale == "paper":
        return paper_page(name, item, command)
    found = _found(name, args, folder)
    if args.scale == "small":
        name, item = f"{name}-small", scales.small_item(item)
    page.write_numbers(folder / f"{name}.json", found)
    return page.item_page(name, item, found, command, folder)


def _used(name: str, scale: str) -> set[str]:
    """Options that change what comes of an item."""
    from transformerfam.reproduction import results
    from transformerfam.reproduction.items import ITEMS
    from transformerfam.reproduction.machine import WITH_LENGTHS

    if name in ITEMS:
        return {"--scale"} if scale == "paper" else {*_TRAINING, "--lengths"}
    if name in results.ITEMS:
        of_made_up = {"--cut", "--lengths"} if results.asks_more_than_gpt3(name) else set()
        return {"--adapter", "--data", "--dtype", "--rows", "--samples", "--workers"} | of_made_up
    return {"--lengths"} if name in WITH_LENGTHS else {"--adapter"} if name == "figure11" else set()


def _refuse_unused(names: Sequence[str], args: argparse.Namespace) -> None:
    """Refuse an option that none of the items has a use for.

    Raises:
        UserError: if there is one.
    """
    used = set().union(*(_used(name, args.scale) for name in names))
    for option in sorted({*_TRAINING, *_ASKING, "--lengths"} - used):
        if _given(option, args):
            raise UserError(f"{option} does nothing for {' and '.join(names)}; leave it out.")


def _given(option: str, args: argparse.Namespace) -> bool:
    return getattr(args, option[2:]) != _DEFAULTS.get(option)


def _results(name: str, args: argparse.Namespace, folder: Path, command: str) -> Page:
    """Ask a pretrained model about real data."""
    from transformerfam import answers, evaluate
    from transformerfam.reproduction import asking, results

    if args.data is None:
        raise UserError(f"{name} asks about real data; give it with --data FOLDER.")
    sizes = results.Sizes()
    if args.samples:
        counts = dict.fromkeys(("hidden", "documents", "long", "rows"), args.samples)
        sizes = replace(sizes, **counts, hidden_tokens=args.samples * _LOOK_TOKENS)
    if args.rows:
        sizes = replace(sizes, rows=args.rows)
    if lengths := _lengths(args.lengths):
        sizes = replace(sizes, lengths=lengths, most_tokens=lengths[-1])
    if args.cut:
        sizes = replace(sizes, most_tokens=args.cut)
    kept = folder / "answers"
    its = asking.Asking(name, Path(args.data), sizes, args.adapter, args.dtype, kept)
    opened, progress = its.open(), report.Progress(quiet=args.quiet)
    for done, count, asked in asking.ask(its, opened, args.workers or 1):
        progress.update(f"{done:,}/{count:,}   {answers.named(asked.case)}, {asked.reader.name}")
    lines, about = evaluate.read_results(kept)[1], asking.describe(its, opened.model)
    config = opened.model.fam_config
    return results.results_page(name, opened.groups, lines, command, about, folder, config)


def _found(name: str, args: argparse.Namespace, folder: Path) -> Found:
    """The runs of an item with their results, those that are missing made now."""
    from transformerfam.reproduction import experiment, scales
    from transformerfam.reproduction.items import ITEMS
    from transformerfam.reproduction.runs import results_of

    its, lengths = ITEMS[name].experiment, _lengths(args.lengths)
    make, work = (
        (experiment.plan, experiment.work)
        if args.scale == "toy"
        else (scales.small_plan, scales.small_work)
    )
    planned = list(make(its, range(args.seeds), lengths=lengths, steps=args.steps))
    progress = report.Progress(quiet=args.quiet)
    progress.passing(f"{name}: {len(planned)} runs ...")
    whose = {str(each.run): each for each in planned}
    results: dict[str, Result] = {}
    runs = [each.run for each in planned]
    workers = args.workers or (2 if args.scale == "toy" else 1)
    for run, result, kept in results_of(runs, work, folder / _RUNS, workers=workers):
        results[str(run)] = result
        if not kept:
            told = _told(whose[str(run)], result)
            progress.note(f"{len(results)}/{len(planned)}   {told}")
    return [(each, results[str(each.run)]) for each in planned]


def _told(planned: Planned, result: Result) -> str:
    seconds = report.duration(result["seconds"])
    return f"{planned.variant}, seed {planned.seed}: loss {result['last_loss']:.3f}, {seconds}"


def _lengths(text: str | None) -> tuple[int, ...] | None:
    return None if text is None else options.lengths(text, 1)


def _command(name: str, args: argparse.Namespace) -> str:
    """The command that makes the same page."""
    words = ["fam", "reproduce", name]
    # Where data lies says nothing, and how many work at it changes nothing.
    shown = {"--data": "DATA", "--adapter": Path(args.adapter or "").name}
    order = ("--scale", "--seeds", "--steps", "--lengths", "--samples", "--rows", "--cut")
    for option in (*order, "--dtype", "--data", "--adapter"):
        if option in _used(name, args.scale) and _given(option, args):
            words += [option, shown.get(option, str(getattr(args, option[2:])))]
    return shlex.join(words)
