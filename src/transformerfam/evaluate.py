"""Put tasks to readers of one model (`readers`), and keep every answer as a line of a file.

A results folder belongs to one model and one seed; what is in it is not asked again, so an evaluation
that was stopped goes on where it was. Several processes share the questions, each with a file of its
own. Prints nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers

from transformerfam import __version__
from transformerfam.config import ADDED_MODULES, FamConfig
from transformerfam.conversion import twin
from transformerfam.errors import UserError, reason_of
from transformerfam.files import append_line, whole_file
from transformerfam.memory_file import fingerprint
from transformerfam.readers import Reader
from transformerfam.tasks.cases import Case
from transformerfam.tasks.questions import Question, ask_together

FORMAT = 1
_ABOUT, _RESULTS = "about.json", "results-{:03d}.jsonl"

Line = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Ask:
    """One question to one reader."""

    reader: Reader
    case: Case
    number: int

    @property
    def key(self) -> str:
        """What tells it from all others of a results folder."""
        setting = json.dumps(self.case.setting, sort_keys=True)
        return f"{self.reader.name}|{self.case.task}|{self.case.version}|{setting}|{self.number}"


def plan(
    readers: Sequence[Reader],
    cases: Sequence[Case],
    process: int = 0,
    processes: int = 1,
    together: int = 1,
) -> list[Ask]:
    """What one of several processes is to ask, all readers in turn about each `together` questions."""
    questions = [(case, number) for case in cases for number in range(case.count)]
    own = questions[process::processes]
    return [
        Ask(reader, case, number)
        for case, same in groupby(own, key=itemgetter(0))
        for some in slices([number for _, number in same], together)
        for reader in readers
        for number in some
    ]


def slices(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Items, so many at a time."""
    return (items[i : i + size] for i in range(0, len(items), size))


class Results:
    """The results folder of one model and seed.

    Args:
        folder: made if it is not there.
        readers: who is asked.
        seed: of what is asked.
        process: number of this process, which writes to a file of its own.

    Raises:
        UserError: if the folder holds results of another model, geometry or seed, or cannot be used.
    """

    def __init__(
        self, folder: Path, readers: Sequence[Reader], *, seed: int, process: int = 0
    ) -> None:
        self.folder = folder
        self._file = folder / _RESULTS.format(process)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"The folder {folder} cannot be made: {reason_of(error)}.") from None
        about = _about(readers, seed)
        kept = _read_about(folder)
        _check_same(folder, about, kept)
        if process == 0:
            merged = {**about, "readers": {**kept.get("readers", {}), **about["readers"]}}
            try:
                with whole_file(folder / _ABOUT) as beside:
                    beside.write_text(json.dumps(merged, indent=2) + "\n")
            except OSError as error:
                raise UserError(
                    f"Nothing can be written in {folder}: {reason_of(error)}."
                ) from None
        limits = {reader.name: reader.limit for reader in readers}
        self.done = {line["key"] for line in _read_lines(folder) if _is_done(line, limits)}

    def add(self, ask: Ask, line: Line) -> None:
        """Keep one answer; it is on the disk when this returns."""
        append_line(self._file, json.dumps({"key": ask.key, **line}))


def _is_done(line: Line, limits: Mapping[str, int | None]) -> bool:
    """Whether there is an answer, or still cannot be one."""
    limit = limits.get(line["reader"])
    return "skipped" not in line or (limit is not None and line["tokens"] > limit)


def evaluate(
    asks: Sequence[Ask], results: Results, together: int = 1
) -> Iterator[tuple[Ask, Line]]:
    """Ask what is not in `results` yet; each answer is kept before it is given out.

    A question that is too long for a reader is kept as skipped. Readers that cannot differ yet
    (`Reader.same_as`) are asked once for all.

    Args:
        asks: see `plan`.
        results: where answers are kept.
        together: so many questions of a case are read side by side, if their lengths allow it.
    """
    case: Case | None = None
    before: dict[int, tuple[Ask, Line]] = {}  # number of a question -> who was asked last
    todo = [ask for ask in asks if ask.key not in results.done]
    for _, same in groupby(todo, key=lambda ask: (id(ask.case), ask.reader.name)):
        for some in slices(list(same), together):
            if some[0].case is not case:
                case, before = some[0].case, {}
            answered = _answered(some, before)
            for ask, line in answered:
                results.add(ask, line)
                if "seconds" in line:
                    before[ask.number] = ask, line
            yield from answered


def _answered(
    asks: Sequence[Ask], before: Mapping[int, tuple[Ask, Line]]
) -> list[tuple[Ask, Line]]:
    """Lines of questions of one case to one reader."""
    found, open_questions = [], list[tuple[Line, Question]]()
    for ask in asks:
        question = ask.case.make(ask.number)
        line = _line(ask, question)
        limit, last = ask.reader.limit, before.get(ask.number)
        if limit is not None and question.tokens > limit:
            line["skipped"] = f"longer than {limit:,} tokens"
        elif last is not None and ask.reader.same_as(last[0].reader, question.tokens):
            line |= {"metrics": last[1]["metrics"], "same_as": last[0].reader.name}
        else:
            open_questions.append((line, question))
        found.append((ask, line))
    if open_questions:
        began = time.perf_counter()
        answers = ask_together(asks[0].reader.model, [question for _, question in open_questions])
        seconds = round((time.perf_counter() - began) / len(answers), 3)
        for (line, _), metrics in zip(open_questions, answers, strict=True):
            line |= {"metrics": metrics, "seconds": seconds}
    return found


def _line(ask: Ask, question: Question) -> Line:
    """What is known before it is asked."""
    return {
        "format": FORMAT,
        "reader": ask.reader.name,
        "task": ask.case.task,
        "version": ask.case.version,
        "setting": dict(ask.case.setting),
        "question": ask.number,
        "metric": ask.case.metric,
        "tokens": question.tokens,
        "facts": dict(question.facts),
        "software": ", ".join(f"{name} {version}" for name, version in _software().items()),
    }


# ---- files


def read_results(folder: Path) -> tuple[dict[str, Any], list[Line]]:
    """What a results folder is about, and its lines, of all processes, each question once.

    Raises:
        UserError: if it holds no results.
    """
    about = _read_about(folder)
    if not about:
        raise UserError(f"The folder {folder} holds no results: it has no {_ABOUT}.")
    return about, _read_lines(folder)


def _read_lines(folder: Path) -> list[Line]:
    lines: dict[str, Line] = {}
    for file in sorted(folder.glob("results-*.jsonl")):
        for text in file.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
                if "skipped" not in line or line["key"] not in lines:
                    lines[line["key"]] = line
            except (ValueError, KeyError, TypeError):
                continue  # cut short when its writer was killed
    return list(lines.values())


def _about(readers: Sequence[Reader], seed: int) -> dict[str, Any]:
    first = readers[0].model
    return {
        "format": FORMAT,
        "model": str(first.config._name_or_path),
        "weights": weights_of(first),
        "seed": seed,
        "readers": {r.name: r.config.to_dict() for r in readers},
        "software": _software(),
    }


def _software() -> dict[str, str]:
    return {
        "transformerfam": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def weights_of(model: Any) -> str:
    """A fingerprint of the weights, those of a memory among them, whatever the geometry."""
    digest = hashlib.sha256(fingerprint(twin(model, model.fam_config.without_feedback())).encode())
    for name, tensor in sorted(model.named_parameters()):
        if any(module in name for module in ADDED_MODULES):  # windows have them too, and do not ask
            digest.update(tensor.detach().to("cpu", torch.float64).numpy().tobytes())
    return digest.hexdigest()


def _read_about(folder: Path) -> dict[str, Any]:
    file = folder / _ABOUT
    if not file.exists():
        return {}
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{file} cannot be read as results; choose another folder.") from None
    return about if isinstance(about, dict) else {}


def _check_same(folder: Path, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    if not theirs:
        return
    names = {"format": "format", "weights": "model", "seed": "seed"}
    differing = [shown for key, shown in names.items() if ours[key] != theirs.get(key)]
    for name, config in ours["readers"].items():
        if not _same_geometry(config, theirs.get("readers", {}).get(name, config)):
            differing.append(f"geometry of the reader {name}")
    if differing:
        raise UserError(
            f"The folder {folder} holds results of another {' and '.join(differing)}; choose another "
            "folder."
        )


def _same_geometry(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    try:  # fields that came later are what they were before they were there: their defaults
        return FamConfig.from_dict(ours) == FamConfig.from_dict(theirs)
    except (TypeError, ValueError):
        return False


# ---- sums


@dataclass(frozen=True)
class Summary:
    """One metric of one reader in one case.

    Attributes:
        mean: over the questions.
        error: standard error of the mean; None for one question.
        count: questions that were answered.
    """

    mean: float
    error: float | None
    count: int


def summarise(lines: Sequence[Line], metric: str) -> Summary | None:
    """Mean and standard error over lines of one case and reader; None: all were skipped.

    For `documents` every token weighs the same, for all else every question.
    """
    answered = [line["metrics"] for line in lines if "metrics" in line]
    answered = [metrics for metrics in answered if sum(metrics.get("scored", [1]))]
    if not answered:
        return None
    values = [float(metrics[metric]) for metrics in answered]
    weights = [float(sum(metrics.get("scored", [1]))) for metrics in answered]
    total = sum(weights)
    mean = sum(w * v for w, v in zip(weights, values, strict=True)) / total
    if len(values) == 1:
        return Summary(mean, None, 1)
    n = len(values)
    spread = sum((w * (v - mean)) ** 2 for w, v in zip(weights, values, strict=True))
    return Summary(mean, math.sqrt(spread * n / (n - 1)) / total, n)


def mean_of_tasks(summaries: Sequence[Summary]) -> Summary:
    """The mean over tasks, each weighing the same however many questions it has (table 2)."""
    errors = [s.error for s in summaries if s.error is not None]
    n = len(summaries)
    error = math.hypot(*errors) / n if len(errors) == n else None
    return Summary(sum(s.mean for s in summaries) / n, error, sum(s.count for s in summaries))


def paired(lines: Sequence[Line], others: Sequence[Line], metric: str) -> list[Line]:
    """Lines of the questions of a case that two readers answered, side by side.

    What makes a question hard for both does not blur their difference.

    Returns:
        Lines with the metrics `first`, `second` and `difference`, of what was `metric`.
    """
    seconds = {line["question"]: line["metrics"] for line in others if "metrics" in line}
    found = []
    for line in lines:
        if "metrics" in line and line["question"] in seconds:
            first, second = line["metrics"][metric], seconds[line["question"]][metric]
            both = {"first": first, "second": second, "difference": first - second}
            found.append({**line, "metrics": {**line["metrics"], **both}})
    return found


CaseKey = tuple[str, int, str]


def case_key(case: Case) -> CaseKey:
    """(task, version, setting as JSON), by which lines are grouped."""
    return case.task, case.version, json.dumps(case.setting, sort_keys=True)


def line_key(line: Line) -> CaseKey:
    """The key of the case that a line belongs to."""
    return line["task"], line["version"], json.dumps(line["setting"], sort_keys=True)


def grouped(lines: Sequence[Line]) -> dict[CaseKey, dict[str, list[Line]]]:
    """Case -> reader -> lines, in the order in which they came."""
    found: dict[CaseKey, dict[str, list[Line]]] = {}
    for line in lines:
        found.setdefault(line_key(line), {}).setdefault(line["reader"], []).append(line)
    return found
