"""Answers as people see them: a table of means with their errors, and curves. Draws nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformerfam import report
from transformerfam.evaluate import Line, Summary, case_key, grouped, summarise
from transformerfam.plots import Curve
from transformerfam.tasks.cases import Case, data_name


def table_of(
    lines: Sequence[Line], cases: Sequence[Case], readers: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    """Header and rows: mean and standard error of each case's metric, one column a reader.

    Where a reader left out what was too long for it, of how many questions: they are the easier ones.
    """
    by_case = grouped(lines)
    rows = []
    for case in cases:
        found = by_case.get(case_key(case), {})
        sums = [summarise(found.get(reader, []), case.metric) for reader in readers]
        most = max((s.count for s in sums if s is not None), default=0)
        rows.append([named(case), case.metric, *(cell(s, most) for s in sums)])
    return ["task", "metric", *readers], rows


def named(case: Case) -> str:
    """A case and its length."""
    length = case.setting.get("length")
    return case.label if length is None else f"{case.label} {report.tokens_short(length)}"


def cell(summary: Summary | None, questions: int = 0) -> str:
    """A mean and its standard error; where others had more questions, of how many."""
    if summary is None:
        return "–"
    error = "" if summary.error is None else f" ± {summary.error:.3f}"
    fewer = f" ({summary.count} of {questions})" if summary.count < questions else ""
    return f"{summary.mean:.3f}{error}{fewer}"


def summaries(
    lines: Sequence[Line], cases: Sequence[Case], readers: Sequence[str]
) -> list[dict[str, Any]]:
    """What `table_of` and `places_of` show, as JSON values: a dictionary for each case and reader."""
    by_case = grouped(lines)
    found = []
    for case in cases:
        answered = by_case.get(case_key(case), {})
        for reader in readers:
            summary = summarise(answered.get(reader, []), case.metric)
            if summary is None:
                continue
            parts = _parts(answered[reader])
            found.append(
                {
                    "task": case.label,
                    "length": case.setting.get("length"),
                    "reader": reader,
                    "metric": case.metric,
                    **asdict(summary),
                    **({"by_place": parts} if parts else {}),
                }
            )
    return found


def places_of(
    lines: Sequence[Line], case: Case, readers: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    """Header and rows: perplexity and bits per byte of a case's documents in each part, by reader."""
    answered = grouped(lines).get(case_key(case), {})
    parts = {
        reader: {part["from"]: part for part in _parts(answered.get(reader, []))}
        for reader in readers
    }
    rows = []
    for edge in sorted({edge for by_edge in parts.values() for edge in by_edge}):
        cells = [_by_part(by_edge.get(edge)) for by_edge in parts.values()]
        rows.append([f"from {edge:,}", *cells])
    return ["tokens", *readers], rows


def _by_part(part: dict[str, Any] | None) -> str:
    if not part or not part["scored"]:
        return "–"
    perplexity = f"{report.perplexity(part['nats'] / part['scored']):.1f}"
    return f"{perplexity} / {report.bits_per_byte(part['nats'], part['bytes']):.3f}"


def _has_places(line: Line) -> bool:
    """Whether it holds sums by place; those of the task's first version had no bytes."""
    return "bytes" in line.get("metrics", {})


def _parts(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Sums over documents for each part of one: `from`, `scored`, `nats`, `right`, `bytes`."""
    parts: list[dict[str, Any]] = []
    for metrics in (line["metrics"] for line in lines if _has_places(line)):
        names = ("scored", "nats", "right", "bytes")
        for number, edge in enumerate(metrics["edges"]):
            if number == len(parts):
                parts.append({"from": edge, **dict.fromkeys(names, 0)})
            for name in names:
                parts[number][name] += metrics[name][number]
    return parts


def panels_of(lines: Sequence[Line]) -> dict[str, list[Curve]]:
    """Title -> curves, for what has an axis."""
    several = len({line["setting"].get("filler") for line in lines} - {None}) > 1
    by_length: dict[str, dict[str, dict[int, list[Line]]]] = {}
    by_place: dict[str, dict[str, list[Line]]] = {}
    for line in lines:
        if "length" in line["setting"]:
            title = f"{_hidden(line, several)}: {line['metric']}"
            reader = by_length.setdefault(title, {}).setdefault(line["reader"], {})
            reader.setdefault(line["setting"]["length"], []).append(line)
        elif _has_places(line):
            by_place.setdefault(_documents(line), {}).setdefault(line["reader"], []).append(line)
    panels = {
        title: [c for name, found in readers.items() if (c := _by_length(name, found)) is not None]
        for title, readers in by_length.items()
    }
    panels |= {
        f"{title}: tokens predicted right, by place": [
            _by_place(name, found) for name, found in readers.items()
        ]
        for title, readers in by_place.items()
    }
    return {title: curves for title, curves in panels.items() if curves}


def _hidden(line: Line, several: bool) -> str:
    """What is hidden in which texts; fillers have no names and are told apart by their marks."""
    setting = line["setting"]
    data = [data_name(Path(setting["data"]))] if "data" in setting else []
    mark = [f"(filler {setting['filler']})"] if several and "filler" in setting else []
    return " ".join([line["task"], *data, *mark])


def _documents(line: Line) -> str:
    """The texts that a line is of, and where they were cut."""
    cut = line["setting"].get("most_tokens")
    name = data_name(Path(line["setting"]["data"]))
    return f"{line['task']} {name}" + (f", {report.tokens_short(cut)}" if cut else "")


def _by_length(name: str, found: dict[int, list[Line]]) -> Curve | None:
    points = []
    for length in sorted(found):
        summary = summarise(found[length], found[length][0]["metric"])
        if summary is not None:
            error = summary.error or 0.0
            points.append((length, summary.mean, summary.mean - error, summary.mean + error))
    return Curve(name, *map(list, zip(*points, strict=True))) if points else None


def _by_place(name: str, found: list[Line]) -> Curve:
    """Share of tokens right in each part; a part stands at its middle."""
    parts = _parts(found)
    edges = [part["from"] for part in parts]
    places = [
        max(1, edge) * 3 // 2 if edge else edges[1] // 2 if edges[1:] else 512 for edge in edges
    ]
    share = [part["right"] / max(1, part["scored"]) for part in parts]
    return Curve(name, places, share, share, share)
