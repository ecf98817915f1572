"""What a pretrained model does with its memory on real data: tables 1, 2, 11 and 12, and more.

Data is a folder that people bring: `books/` and `proofs/` (texts), `longqa/` (rows as of L-Eval),
`tasks/` (GPT-3's tasks in llm-foundry's files), `babi/` (bAbI's). What is not there is not asked.
Four readers of the same weights answer: the model as it is, its windows without and with sinks
(StreamingLLM), and full attention up to what it was trained for; and if an adapter has changed them, the
weights as they were before (`asking`).
"""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from transformerfam import answers, evaluate, report
from transformerfam.config import FamConfig
from transformerfam.data.files import plain_texts
from transformerfam.errors import UserError
from transformerfam.files import whole_file
from transformerfam.plots import draw_curves
from transformerfam.readers import READERS
from transformerfam.reproduction.page import Page, papers_tables
from transformerfam.tasks import TASKS, Case, Wanted

# A memory that was not trained, for a look without an adapter.
UNTRAINED = FamConfig(block_size=256, memory_segments=1, fam_length=8)
BASE = "base"
_FEWEST = 6  # questions that a verdict is given on
READERS_SHOWN = {
    "model": "the model as it is",
    "bswa": "its windows without feedback",
    "sinks": "the same with attention sinks",
    "full": "full attention, up to the length that the model was trained for",
    BASE: "that with the weights as they were before the adapter was put on them",
}
_HIDDEN = (
    *("passkey", "passkey-middle", "passkey-late", "passkey-3", "facts", "recall"),
    *("babilong-qa1", "babilong-qa2"),
)
_GPT3 = {
    "gpt3-arc-challenge": "arc_challenge",
    "gpt3-arc-easy": "arc_easy",
    "gpt3-openbookqa": "openbook_qa",
    "gpt3-piqa": "piqa",
    "gpt3-winograd": "winograd_wsc",
    "gpt3-winogrande": "winogrande",
    "gpt3-lambada": "lambada_openai",
    "gpt3-triviaqa": "triviaqa_sm_sub",
}


@dataclass(frozen=True)
class Sizes:
    """How much is asked.

    Attributes:
        lengths: of texts that something is hidden in, in tokens.
        hidden: texts at each length.
        hidden_tokens: at lengths of which so many texts have more tokens than this, there are fewer
            texts, at least one; None: there are not.
        documents: of each kind.
        most_tokens: documents are cut here.
        full_tokens: and once more here, if that is shorter, so that full attention reads them too.
        long: questions of each file of `longqa/`.
        rows: of each file of `tasks/`.
    """

    lengths: tuple[int, ...] = (1024, 4096, 16_384, 65_536, 131_072)
    hidden: int = 10
    hidden_tokens: int | None = None
    documents: int = 6
    most_tokens: int = 262_144
    full_tokens: int = 8192
    long: int = 20
    rows: int = 300


def hidden(data: Path, tokenizer: Any, sizes: Sizes) -> list[Case]:
    """Keys and facts in long prose: the books, or the Python language reference."""
    from transformerfam.text import language_reference

    filler = plain_texts(str(data / "books")) if (data / "books").is_dir() else []
    wanted = Wanted(
        tokenizer,
        sizes.lengths,
        sizes.hidden,
        filler=filler or [language_reference()],
        data={"babilong": str(data / "babi")} if (data / "babi").is_dir() else {},
    )
    cases = [case for name in _HIDDEN for case in TASKS[name].cases(wanted)]
    if sizes.hidden_tokens is None:
        return cases
    most = [max(1, sizes.hidden_tokens // case.setting["length"]) for case in cases]
    return [replace(c, count=min(c.count, n)) for c, n in zip(cases, most, strict=True)]


def documents(data: Path, tokenizer: Any, sizes: Sizes) -> list[Case]:
    """Whole books and formal proofs, by place."""
    # Proofs are programs, whatever their files are called.
    proofs = f"{glob.escape(str(data / 'proofs'))}/*"
    cuts = sorted({min(sizes.full_tokens, sizes.most_tokens), sizes.most_tokens})
    return [
        case
        for name, path in (("books", str(data / "books")), ("proofs", proofs))
        if (data / name).is_dir()
        for most_tokens in cuts
        for case in TASKS["documents"].cases(
            Wanted(
                tokenizer,
                samples=sizes.documents,
                data={"documents": path},
                most_tokens=most_tokens,
            )
        )
    ]


def long_questions(data: Path, tokenizer: Any, sizes: Sizes) -> list[Case]:
    """Questions about long documents, and summaries."""
    return [
        case
        for file in sorted((data / "longqa").glob("*.jsonl"))
        for case in TASKS["longqa"].cases(
            Wanted(tokenizer, samples=sizes.long, data={"longqa": str(file)})
        )
    ]


def gpt3(data: Path, tokenizer: Any, sizes: Sizes) -> list[Case]:
    """GPT-3's tasks."""
    found = {name: data / "tasks" / f"{file}.jsonl" for name, file in _GPT3.items()}
    here = {name: str(path) for name, path in found.items() if path.exists()}
    wanted = Wanted(tokenizer, samples=sizes.rows, data=here)
    return [case for name in here for case in TASKS[name].cases(wanted)]


_HIDDEN_HEADING = "Keys and facts in long prose"
_DOCUMENTS_HEADING = "Whole documents"
_GPT3_HEADING = "GPT-3's tasks"
Group = Callable[[Path, Any, Sizes], list[Case]]
# heading -> what is asked
GROUPS: dict[str, Group] = {
    _HIDDEN_HEADING: hidden,
    _DOCUMENTS_HEADING: documents,
    "Questions about long documents, and summaries": long_questions,
    _GPT3_HEADING: gpt3,
}
# name of an item -> (title, its groups, tables of the paper beside it)
ITEMS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "results": (
        "A pretrained model and its memory on real data",
        tuple(GROUPS),
        ("table01_lct_8b_24b", "table02_gpt3_summary"),
    ),
    "table2": (
        "Tables 2 and 12: GPT-3's tasks",
        (_GPT3_HEADING,),
        ("table02_gpt3_summary", "table12_gpt3"),
    ),
}


def asks_more_than_gpt3(name: str) -> bool:
    """Whether an item asks for what has a length, too."""
    return set(ITEMS[name][1]) != {_GPT3_HEADING}


def cases_of(name: str, data: Path, tokenizer: Any, sizes: Sizes) -> dict[str, list[Case]]:
    """Heading -> cases, for the data at hand.

    Raises:
        UserError: if there is nothing of the item's.
    """
    groups = {title: GROUPS[title](data, tokenizer, sizes) for title in ITEMS[name][1]}
    if not any(groups.values()):
        raise UserError(
            f"{data} has nothing of {name}; it needs folders such as tasks/ or books/, see "
            "docs/evaluation.md."
        )
    return {title: cases for title, cases in groups.items() if cases}


def results_page(
    name: str,
    groups: dict[str, list[Case]],
    lines: Sequence[evaluate.Line],
    command: str,
    about: str,
    folder: Path,
    config: FamConfig,
) -> Page:
    """The page: a table for each group, a picture of what has a length or place; and the numbers.

    `config`: the geometry of the model that was asked.
    """
    title, _, tables = ITEMS[name]
    cases = [case for group in groups.values() for case in group]
    asked = {evaluate.case_key(case) for case in cases}
    lines = [line for line in lines if evaluate.line_key(line) in asked]
    took = report.duration(sum(line.get("seconds", 0.0) for line in lines))
    about = f"{about}\n\nThe answers took {took}, added up."
    page = Page(name, [f"# {title}", "", f"    {command}", "", about, ""])
    panels = answers.panels_of(lines)
    if panels:
        picture = folder / f"{name}.png"
        marks: dict[str, dict[str, float]] = {panel: {} for panel in panels}
        draw_curves(picture, panels, x="tokens", y="share right", marks=marks)
        page.pictures.append(picture)
        page.lines += [f"![Share right by tokens]({picture.name})", ""]
    present = {line["reader"] for line in lines}
    readers = [name for name in READERS_SHOWN if name in present]
    explained = "; ".join(f"`{name}`: {READERS_SHOWN[name]}" for name in readers)
    if verdicts := held(groups, lines, config):
        page.lines += ["## What held here", "", *(f"- {line}" for line in verdicts), ""]
    page.lines += ["## Our numbers", "", f"Mean and standard error. {explained}.", ""]
    numbers = answers.summaries(lines, cases, readers)
    with whole_file(folder / f"{name}.json") as beside:
        beside.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    page.lines += [f"All of it: [{name}.json]({name}.json).", ""]
    for heading, group in groups.items():
        page.lines += _section(heading, group, lines, readers)
    page.lines += papers_tables(tables)
    return page


def windows_of(config: FamConfig) -> str:
    """The reader with the windows of a memory and nothing else, so that its sinks prove nothing."""
    return "sinks" if config.sink_tokens else "bswa"


def _may_differ(line: evaluate.Line, config: FamConfig) -> bool:
    """Whether a memory could be of use in a question: what all readers read alike is no evidence."""
    plain, read_only = config.plain_length, line["task"] == "documents"
    if read_only and config.fam_seen == "asked":
        return False
    return plain is not None and line["tokens"] > plain


def held(
    groups: dict[str, list[Case]], lines: Sequence[evaluate.Line], config: FamConfig
) -> list[str]:
    """A sentence on each claim: whether the model does better than its windows without feedback."""
    by_case = evaluate.grouped(lines)
    said, windows = [], windows_of(config)
    for heading, cases in groups.items():
        for name, claimed in _claims(heading, cases).items():
            found = [by_case.get(evaluate.case_key(case), {}) for case in claimed]
            both = [
                evaluate.paired(f.get("model", []), f.get(windows, []), case.metric)
                for f, case in zip(found, claimed, strict=True)
            ]
            if heading != _GPT3_HEADING:
                both = [list(chain.from_iterable(both))]
            both = [each for each in both if evaluate.summarise(each, "difference")]
            telling = [[line for line in each if _may_differ(line, config)] for each in both]
            if both:
                said.append(_verdict(name, [each for each in telling if each], windows))
    return said


def _claims(heading: str, cases: Sequence[Case]) -> dict[str, list[Case]]:
    """What is judged -> its cases: something hidden at all lengths, a kind of text, a row of table 2."""
    claims: dict[str, list[Case]] = {}
    for case in cases:
        if heading == _HIDDEN_HEADING:
            name = f"{case.task}, all lengths"
        elif heading == _GPT3_HEADING:
            name = f"{_summary_row(case)}, mean over its tasks"
        else:
            name = answers.named(case)
        claims.setdefault(name, []).append(case)
    return claims


def _summary_row(case: Case) -> str:
    """The row of table 2 that a task of GPT-3's belongs to."""
    return f"GPT-3 {'Rank' if case.metric == 'accuracy' else 'Gen'}"  # all else is said


def _verdict(name: str, tasks: Sequence[Sequence[evaluate.Line]], windows: str) -> str:
    """Whether there is a difference: two standard errors are taken for one, from 6 questions each on.

    Args:
        name: of what is judged.
        tasks: lines of `evaluate.paired` in which both could differ, of each task that weighs the same.
        windows: the reader that the model is judged against.
    """
    claim = f"That the memory does better than its windows alone (`{windows}`), {name},"
    if not tasks:
        return f"{claim} **cannot be told**: all of it is read alike with a memory and without."
    first, second, difference = (
        evaluate.mean_of_tasks([s for task in tasks if (s := evaluate.summarise(task, metric))])
        for metric in ("first", "second", "difference")
    )
    error = difference.error
    verdict, enough = "is open", all(len(task) >= _FEWEST for task in tasks)
    if error is not None and enough and abs(difference.mean) > 2 * error:
        verdict = "held" if difference.mean > 0 else "did not hold: it does worse"
    spread = "" if error is None else f" ± {error:.3f}"
    return (
        f"{claim} **{verdict}**: {first.mean:.3f} against {second.mean:.3f}, a difference of "
        f"{difference.mean:+.3f}{spread}, asked {difference.count:,} times."
    )


def _section(
    heading: str, cases: Sequence[Case], lines: Sequence[evaluate.Line], readers: Sequence[str]
) -> list[str]:
    """The tables of a group, in Markdown."""
    said = [f"### {heading}", ""]
    header, rows = answers.table_of(lines, cases, readers)
    if heading == _GPT3_HEADING:
        rows += _means(lines, cases, readers)
    said += [report.markdown_table(header, rows), ""]
    if heading == _DOCUMENTS_HEADING:
        for case in cases:
            name = case.label.removeprefix("documents ")
            said += [f"Perplexity / bits per byte of {name} by place:", ""]
            said += [report.markdown_table(*answers.places_of(lines, case, readers)), ""]
    if heading == _GPT3_HEADING:
        said += [_got_worse(lines, cases, BASE if BASE in readers else READERS[-1]), ""]
    return said


def _means(
    lines: Sequence[evaluate.Line], cases: Sequence[Case], readers: Sequence[str]
) -> list[list[str]]:
    """Rows of table 2: means over tasks, of readers that answered all of them."""
    by_case = evaluate.grouped(lines)
    by_row: dict[tuple[str, str], list[Case]] = {}
    for case in cases:
        metric = case.metric if case.metric == "accuracy" else "said right"
        by_row.setdefault((f"{_summary_row(case)} mean", metric), []).append(case)
    rows = []
    for names, of_row in by_row.items():
        cells = []
        for reader in readers:
            sums = [
                evaluate.summarise(by_case.get(evaluate.case_key(c), {}).get(reader, []), c.metric)
                for c in of_row
            ]
            whole = [each for each in sums if each]
            mean = evaluate.mean_of_tasks(whole) if len(whole) == len(sums) else None
            cells.append(answers.cell(mean))
        rows.append([*names, *cells])
    return rows


def _got_worse(lines: Sequence[evaluate.Line], cases: Sequence[Case], before: str) -> str:
    """Where the model is worse than the reader `before`, in a sentence."""
    by_case = evaluate.grouped(lines)
    worse, errors = [], 0
    for case in cases:
        found = by_case.get(evaluate.case_key(case), {})
        model, base = (
            evaluate.summarise(found.get(name, []), case.metric) for name in (READERS[0], before)
        )
        if model is None or base is None or base.error is None:
            continue
        errors += 1
        if base.mean - model.mean > base.error:
            worse.append(f"{answers.named(case)} ({model.mean:.3f} after {base.mean:.3f})")
    if not errors:
        return f"One question of each does not tell whether the model is worse than `{before}`."
    if not worse:
        return f"In none of them is the model worse than `{before}` by more than a standard error."
    return f"Worse than `{before}` by more than a standard error: {', '.join(worse)}."
