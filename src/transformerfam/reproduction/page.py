"""What a reproduction found, as a page in Markdown and in HTML, with a picture and the numbers."""

from __future__ import annotations

import base64
import csv
import html
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from transformerfam import report
from transformerfam.extras import require
from transformerfam.files import whole_file
from transformerfam.plots import Curve, draw_curves
from transformerfam.reproduction.experiment import Experiment, Planned
from transformerfam.reproduction.items import Claim, Item
from transformerfam.reproduction.runs import Result

ASKED = {
    "1 start": "one key, at the start",
    "1 late": "one key, seen late",
    "3 start": "three keys, all at the start",
    "3 late": "three keys, the one asked seen late",
    "text": "bytes of prose, by place",
}
# By what lengths are counted -> the share right that says little: of ten digits, of whole keys.
_HARDLY_ANYTHING = {"blocks": 0.15, "tokens": 0.02}
# variant -> for each seed, share right by length
Curves = dict[str, list[dict[int, float]]]
Found = Sequence[tuple[Planned, Result]]


@dataclass
class Page:
    """A page that is being made.

    Attributes:
        name: of its files.
        lines: in Markdown; pictures by the name of their file.
        pictures: files beside it.
    """

    name: str
    lines: list[str] = field(default_factory=list)
    pictures: list[Path] = field(default_factory=list)

    def write(self, folder: Path) -> list[Path]:
        """Write NAME.md and NAME.html; returns their paths."""
        text = "\n".join(self.lines).rstrip() + "\n"
        paths = [folder / f"{self.name}.md", folder / f"{self.name}.html"]
        for path, content in zip(paths, (text, self._html(text)), strict=True):
            with whole_file(path) as beside:
                beside.write_text(content, encoding="utf-8")
        return paths

    def _html(self, text: str) -> str:
        """One file without anything beside it."""
        markdown = require("markdown", "plot")
        body = markdown.markdown(text, extensions=["tables", "sane_lists"])
        for picture in self.pictures:
            inline = base64.b64encode(picture.read_bytes()).decode()
            body = body.replace(f'src="{picture.name}"', f'src="data:image/png;base64,{inline}"')
        template = files("transformerfam.reproduction").joinpath("page.html").read_text("utf-8")
        title = html.escape(text.splitlines()[0].lstrip("# "))
        return template.replace("{{title}}", title).replace("{{body}}", body)


# ---- numbers


def curves_of(its: Experiment, found: Found, asked: str) -> Curves:
    """What was found for one question, by variant, seeds in order."""
    curves: Curves = {variant.name: [] for variant in its.variants}
    for planned, result in sorted(found, key=lambda pair: pair[0].seed):
        by_length = result["accuracy"][asked]
        curves[planned.variant].append({int(n): share for n, share in by_length.items()})
    return {variant: seeds for variant, seeds in curves.items() if seeds}


def table(curves: Curves, unit: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows: mean over seeds and, where seeds differ, lowest to highest."""
    lengths = sorted(next(iter(curves.values()))[0])
    rows = [
        [variant, *(_cell([seed[n] for seed in seeds]) for n in lengths)]
        for variant, seeds in curves.items()
    ]
    return [unit, *map(str, lengths)], rows


def _cell(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    mean = f"{statistics.mean(values):.2f}"
    return mean if high - low < 0.005 else f"{mean} ({low:.2f}–{high:.2f})"


def judge(claim: Claim, its: Experiment, curves: Curves) -> str:
    """Whether a claim held here, in one sentence."""
    lengths = [n for n in next(iter(curves.values()))[0] if claim.within or n > its.longest]
    if not lengths or {claim.more, claim.less} - set(curves):
        return f"{claim.more} against {claim.less}: not measured."
    more, less = (
        [statistics.mean(seed[n] for n in lengths) for seed in curves[name]]
        for name in (claim.more, claim.less)
    )
    wins = sum(a > b for a, b in zip(more, less, strict=True))
    losses = sum(a < b for a, b in zip(more, less, strict=True))
    worse = claim.less if wins >= losses else claim.more
    where = "all lengths" if claim.within else "lengths beyond those trained on"
    means = f"{statistics.mean(more):.3f} against {statistics.mean(less):.3f} over {where}"
    if (
        its.kind == "passkey"
        and max(map(statistics.mean, (more, less))) < _HARDLY_ANYTHING[its.unit]
    ):
        verdict = "**cannot be told, since neither says much more than chance**"
    elif its.kind == "passkey" and (failed := _failures(its, curves[worse])):
        verdict = f"**cannot be told: {worse} learned nothing in {failed} of {len(more)} seeds**"
    else:
        verdict = _verdict(wins, losses, len(more), claim.paper)
    question = f" ({ASKED[claim.asked]})" if claim.asked else ""
    return f"That {claim.more} does better than {claim.less}{question} {verdict}: {means}."


def _verdict(wins: int, losses: int, seeds: int, paper: bool | None) -> str:
    """What so many seeds of all say, and whether the paper says so too; None: it says nothing."""
    if not wins and not losses:
        return "**is open: no difference**"
    if max(wins, losses) < seeds:
        return f"**is open ({wins} of {seeds} seeds)**"
    return held_or_not(wins == seeds, paper, "" if seeds > 1 else " with the one seed")


def held_or_not(held: bool, paper: bool | None = True, how: str = "") -> str:
    """A verdict, and whether the paper finds the same; None: it does not say."""
    verdict = f"**{'held' if held else 'did not hold'}{how}**"
    if paper is None:
        return verdict
    return f"{verdict}, {'as' if held == paper else 'other than'} in the paper"


def learned_nothing(its: Experiment, curves: Curves) -> list[str]:
    """Which variants, in how many seeds, do not know texts as they were trained on."""
    lines = []
    for name, seeds in curves.items():
        if failed := _failures(its, seeds):
            lines.append(
                f"{name} learned nothing in {failed} of {len(seeds)} seeds: texts as long as those of "
                "training are answered by chance."
            )
    return lines


def _failures(its: Experiment, seeds: Sequence[Mapping[int, float]]) -> int:
    """Seeds of a variant that answer by chance what they were trained on."""
    within = [[share for n, share in seed.items() if n <= its.longest] for seed in seeds]
    return sum(max(shares) < _HARDLY_ANYTHING[its.unit] for shares in within if shares)


def reach_of(its: Experiment, curves: Curves) -> list[str]:
    """How far each variant that goes past its training is right, in its worst seed."""
    lines = []
    for name, seeds in curves.items():
        worst = {n: min(seed[n] for seed in seeds) for n in seeds[0]}
        whole = _reached(worst, 0.995)
        if whole > its.longest:
            half = _reached(worst, 0.5)
            lines.append(
                f"{name} makes no mistake in any seed up to {whole} {its.unit}, "
                f"{whole / its.longest:.3g} times the longest text it was trained on, and says half "
                f"of the {_counted(its)} up to {half}."
            )
    return lines


def _reached(worst: Mapping[int, float], share: float) -> int:
    """The greatest length up to which so much is right; 0: not even the shortest."""
    reached = 0
    for blocks in sorted(worst):
        if worst[blocks] < share:
            break
        reached = blocks
    return reached


# ---- the page of an item


def item_page(name: str, item: Item, found: Found, command: str, folder: Path) -> Page:
    """The page of a table or figure that toys were trained for; draws its picture."""
    its = item.experiment
    page = Page(name)
    seeds = sorted({planned.seed for planned, _ in found})
    page.lines = [f"# {item.title}", "", f"    {command}", "", item.about, "", _how(its, found), ""]
    curves = {asked: curves_of(its, found, asked) for asked in its.asked}
    first = curves[its.asked[0]]
    verdicts = []
    if its.kind == "passkey":
        verdicts = reach_of(its, first) + learned_nothing(its, first)
    verdicts += [judge(claim, its, curves[claim.asked or its.asked[0]]) for claim in item.claims]
    page.lines += ["## What held here", "", *(f"- {line}" for line in verdicts), ""]
    if len(seeds) > 1 and item.claims:
        page.lines += [
            f"What held, or did not, did so in each of {len(seeds)} seeds, which are asked the same "
            "texts. Of two variants that are equally good, one or the other does better in each of "
            f"them once in {2 ** (len(seeds) - 1)} times.",
            "",
        ]
    if item.said:
        page.lines += [f"The paper: {item.said}", ""]
    picture = folder / f"{name}.png"
    draw(picture, its, curves)
    page.pictures.append(picture)
    page.lines += [f"![Share right by {its.unit} read]({picture.name})", ""]
    over = "the mean of the seeds and, where they differ, the lowest and the highest"
    page.lines += [
        "## Our numbers",
        "",
        f"Share right, {over if len(seeds) > 1 else f'seed {seeds[0]}'}. "
        f"All of it: [{name}.json]({name}.json).",
        "",
    ]
    for asked, of_asked in curves.items():
        page.lines += [
            f"Asked: {ASKED[asked]}.",
            "",
            report.markdown_table(*table(of_asked, its.unit)),
            "",
        ]
    page.lines += papers_tables(item.paper)
    return page


def _how(its: Experiment, found: Found) -> str:
    seconds = [result["seconds"] for _, result in found]
    # Runs that were suspended, or shared their core, would pull a mean.
    took = f"{report.duration(statistics.median(seconds))} a run (the median)"
    steps = ", ".join(map(str, sorted({planned.run["steps"] for planned, _ in found})))
    shape = its.shape
    if its.unit == "tokens":
        return (
            f"The default model under the recipe `passkey`: {steps} steps of texts of up to "
            f"{its.longest:,} tokens, {took}; blocks of a quarter of the paper's; {its.count} texts "
            "asked at each length, and a key counts if all of it is said."
        )
    keys = f"; keys of {shape.digits} digits (chance: 0.10)" if its.kind == "passkey" else ""
    return (
        f"A decoder from scratch of {shape.layers} layers, {shape.width} wide; blocks of {shape.block}"
        f"{keys}; {steps} steps of {shape.rows} texts of up to {its.longest} blocks, {took}, "
        f"on one core; {its.count} texts asked at each length, which "
        "training never saw."
    )


def papers_tables(names: Sequence[str]) -> list[str]:
    """Printed tables of the paper, under a heading."""
    lines: list[str] = []
    for name in names:
        number = int(re.findall(r"\d+", name)[0])
        lines += [
            f"## The paper's table {number}",
            "",
            report.markdown_table(*papers_table(name)),
            "",
        ]
    return lines


def papers_table(name: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table as printed in the paper (arXiv 2404.09173v3)."""
    file = files("transformerfam.reproduction").joinpath("paper", f"{name}.csv")
    header, *rows = csv.reader(file.read_text("utf-8").splitlines())
    return header, rows


def draw(path: Path, its: Experiment, curves: Mapping[str, Curves]) -> None:
    """One panel for each question."""
    panels = {
        ASKED[asked]: [_curve(name, seeds) for name, seeds in found.items()]
        for asked, found in curves.items()
    }
    marks = {title: {"trained": float(its.longest)} for title in panels}
    right = f"{_counted(its)} {'said' if its.kind == 'passkey' else 'told'} right"
    draw_curves(path, panels, x=f"{its.unit} read", y=right, marks=marks)


def _counted(its: Experiment) -> str:
    """What a share is a share of."""
    if its.kind == "text":
        return "bytes"
    return "digits" if its.unit == "blocks" else "keys"


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


def write_numbers(path: Path, found: Found) -> None:
    """Every run with its result."""
    entries = [
        {"variant": planned.variant, "run": planned.run, "result": result}
        for planned, result in found
    ]
    with whole_file(path) as beside:
        beside.write_text(json.dumps(entries, indent=1) + "\n")


def write_index(folder: Path) -> Path:
    """A list of all pages of a folder, each with what held in it; returns its path."""
    lines = ["# Reproductions", "", "    fam reproduce all", ""]
    for path in sorted(folder.glob("*.md")):
        text = path.read_text(encoding="utf-8").splitlines()
        if path.name == "index.md" or not text or not text[0].startswith("# "):
            continue
        lines += [f"## [{text[0].removeprefix('# ')}]({path.name})", ""]
        if held := [line for line in text if re.match(r"- .*\*\*.*\*\*[^:]*: ", line)]:
            lines += [*held, ""]
    index = folder / "index.md"
    with whole_file(index) as beside:
        beside.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    return index
