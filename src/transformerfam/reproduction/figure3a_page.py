"""Figure 3a as people see it: tables, plain sentences on what held, and a picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformerfam import report
from transformerfam.files import whole_file
from transformerfam.plots import Curve, draw_curves
from transformerfam.reproduction.figure3a import PARTS, Part, part
from transformerfam.reproduction.runs import Result, Run

LONGEST = part("start").longest_trained
FAR = 50 * LONGEST
_TITLES = {
    "1 start": "one key, at the start",
    "1 late": "one key, seen late",
    "3 start": "three keys, all at the start",
    "3 late": "three keys, the one asked seen late",
}
# variant -> for each seed, accuracy by blocks
Curves = dict[str, list[dict[int, float]]]


def curves_of(results: Sequence[tuple[Run, Result]], name: str, asked: str) -> Curves:
    """The accuracies of one part and one question, by variant, seeds in order."""
    found: Curves = {variant.name: [] for variant in part(name).variants}
    for run, result in sorted(results, key=lambda pair: pair[0]["seed"]):
        if run["part"] == name:
            by_length = result["accuracy"][asked]
            found[run["variant"]].append({int(n): share for n, share in by_length.items()})
    return {variant: seeds for variant, seeds in found.items() if seeds}


def table(curves: Curves) -> tuple[list[str], list[list[str]]]:
    """Header and rows: mean over seeds and, where seeds differ, lowest to highest."""
    lengths = sorted(next(iter(curves.values()))[0])
    rows = [
        [variant, *(_cell([seed[n] for seed in seeds]) for n in lengths)]
        for variant, seeds in curves.items()
    ]
    return ["blocks", *map(str, lengths)], rows


def _cell(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    mean = f"{statistics.mean(values):.2f}"
    return mean if high - low < 0.005 else f"{mean} ({low:.2f}–{high:.2f})"


def verdicts(results: Sequence[tuple[Run, Result]]) -> list[str]:
    """What the paper says of figure 3a, and whether it held here."""
    curves = curves_of(results, "start", "1 start")
    if set(curves) != {variant.name for variant in part("start").variants}:
        return []
    reach = {name: min(_reach(seed) for seed in seeds) for name, seeds in curves.items()}
    furthest = max(curves["FAM"][0])
    lines = []
    worst = {n: min(seed[n] for seed in curves["FAM"]) for n in curves["FAM"][0] if n >= FAR}
    if worst:
        at = min(worst)
        lines.append(
            f"FAM keeps the key far past the longest text it was trained on ({LONGEST} "
            f"blocks): the worst of its seeds has accuracy {worst[at]:.2f} at {at} blocks and "
            f"{worst[furthest]:.2f} at {furthest}."
        )
    for more, less in (("M1", "M1_SG"), ("M2", "M1"), ("FAM", "M4")):
        held = "held" if reach[more] > reach[less] else "did not hold"
        lines.append(
            f"That {more} reaches further than {less} {held}: with half of the digits right in every "
            f"seed, {more} reaches {reach[more]} blocks and {less} {reach[less]}."
        )
    return lines


def _reach(seed: Mapping[int, float]) -> int:
    """The greatest length up to which half of the digits are right; 0: not even the shortest."""
    reached = 0
    for blocks in sorted(seed):
        if seed[blocks] < 0.5:
            break
        reached = blocks
    return reached


def page(results: Sequence[tuple[Run, Result]], command: str, picture: str, data: str) -> str:
    """The page in Markdown."""
    seeds = sorted({run["seed"] for run, _ in results})
    over = (
        f"as the mean of seeds {', '.join(map(str, seeds))} and, where they differ, the lowest and the "
        "highest"
        if len(seeds) > 1
        else f"with seed {seeds[0]}"
    )
    lines = [
        "# Figure 3a: PassKey by length, at toy size",
        "",
        f"    {command}",
        "",
        "Small decoders from scratch read a key of a few digits in random filler and are asked for it "
        "at the end. Accuracy is the share of digits said right (chance: 0.10), over 32 keys that "
        f"training never saw, {over}. All numbers: [{data}]({data}).",
        "",
        f"![Accuracy by length]({picture})",
        "",
    ]
    for its in PARTS:
        if any(run["part"] == its.name for run, _ in results):
            lines += _part_page(its, results)
    return "\n".join(lines)


def _part_page(its: Part, results: Sequence[tuple[Run, Result]]) -> list[str]:
    own = [(run, result) for run, result in results if run["part"] == its.name]
    steps = sorted({run["steps"] for run, _ in own})
    seconds = statistics.mean(result["seconds"] for _, result in own)
    kinds = " and ".join(f"{keys} {where}" for keys, where in its.trained)
    lines = [
        f"## Trained on: {kinds}",
        "",
        f"{its.shape.layers} layers, {its.shape.width} wide; blocks of {its.shape.block}; keys of "
        f"{its.shape.digits} digits; {', '.join(map(str, steps))} steps of {its.shape.rows} texts of 2 "
        f"to {its.longest_trained} blocks, on average {report.duration(seconds)} on one core.",
        "",
    ]
    if its.name == "start":
        lines += [f"- {sentence}" for sentence in verdicts(results)] + [""]
    for keys, where in its.asked:
        asked = f"{keys} {where}"
        header, rows = table(curves_of(results, its.name, asked))
        lines += [f"Asked: {_TITLES[asked]}.", "", _markdown(header, rows), ""]
    return lines


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def draw(path: Path, results: Sequence[tuple[Run, Result]]) -> None:
    """One panel for each question of each part."""
    panels: dict[str, list[Curve]] = {}
    marks = {}
    for its in PARTS:
        for keys, where in its.asked:
            asked = f"{keys} {where}"
            curves = curves_of(results, its.name, asked)
            if curves:
                title = f"Trained: {its.trained[0][1]}. Asked: {_TITLES[asked]}"
                panels[title] = [_curve(name, seeds) for name, seeds in curves.items()]
                marks[title] = {"trained": its.longest_trained}
    draw_curves(path, panels, x="blocks read", y="digits said right", marks=marks)


def _curve(name: str, seeds: Sequence[Mapping[int, float]]) -> Curve:
    lengths = sorted(seeds[0])
    columns = [[seed[n] for seed in seeds] for n in lengths]
    return Curve(
        name,
        lengths,
        [statistics.mean(c) for c in columns],
        [min(c) for c in columns],
        [max(c) for c in columns],
    )


def write(folder: Path, results: Sequence[tuple[Run, Result]], command: str) -> list[Path]:
    """Page, picture and data in `folder`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"figure3a.{ending}" for ending in ("md", "png", "json")]
    ordered: list[dict[str, Any]] = [{"run": run, "result": result} for run, result in results]
    with whole_file(paths[2]) as beside:
        beside.write_text(json.dumps(ordered, indent=1) + "\n")
    draw(paths[1], results)
    with whole_file(paths[0]) as beside:
        beside.write_text(page(results, command, paths[1].name, paths[2].name) + "\n")
    return paths
