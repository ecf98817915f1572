"""Answers as people see them: a table of means with their errors, and curves. Draws nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformerfam import report
from transformerfam.evaluate import Line, case_key, grouped, summarise
from transformerfam.plots import Curve
from transformerfam.tasks.cases import Case


def table_of(
    lines: Sequence[Line], cases: Sequence[Case], readers: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    """Header and rows: mean and standard error of each case's metric, one column a reader."""
    by_case = grouped(lines)
    rows = []
    for case in cases:
        found = by_case.get(case_key(case), {})
        cells = [_cell(found.get(reader, []), case.metric) for reader in readers]
        rows.append([named(case), case.metric, *cells])
    return ["task", "metric", *readers], rows


def named(case: Case) -> str:
    """A case and its length."""
    length = case.setting.get("length")
    return case.label if length is None else f"{case.label} {report.tokens_short(length)}"


def _cell(lines: Sequence[Line], metric: str) -> str:
    summary = summarise(lines, metric)
    if summary is None:
        return "–"
    error = "" if summary.error is None else f" ± {summary.error:.3f}"
    return f"{summary.mean:.3f}{error}"


def panels_of(lines: Sequence[Line]) -> dict[str, list[Curve]]:
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
    points = []
    for length in sorted(found):
        summary = summarise(found[length], found[length][0]["metric"])
        if summary is not None:
            error = summary.error or 0.0
            points.append((length, summary.mean, summary.mean - error, summary.mean + error))
    return Curve(name, *map(list, zip(*points, strict=True))) if points else None


def _by_place(name: str, found: list[Line]) -> Curve:
    """Share of tokens right in each part; a part stands at its middle."""
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
