"""`fam train`: do what a recipe says."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from transformerfam import report
from transformerfam.commands import _options as options
from transformerfam.errors import UserError

if TYPE_CHECKING:
    from transformerfam.training.recipe import Recipe
    from transformerfam.training.settings import SourceSettings
    from transformerfam.training.trainer import Trained

HELP = "teach a model to use its feedback memory, as a recipe says"
_SAMPLE_CHARACTERS = 600
_TRIED_ROWS = 32

EPILOG = """\
examples:
  fam train smollm2-passkey data.sources.0.filler=book.txt --output passkey-adapter
  fam train my.toml optimizer.learning_rate=1e-4 data.sources.0.path=texts.jsonl --dry-run
  fam train my.toml --resume
  accelerate launch -m transformerfam train my.toml
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fam train`."""
    parser.description = (
        "Train a model as a recipe says: LoRA and the FAM prompt by default. Ctrl-C ends training "
        "after the present step, with a checkpoint from which --resume goes on exactly. Needs "
        "packages of its own: pip install 'transformerfam[train]'."
    )
    parser.epilog = EPILOG
    parser.add_argument(
        "recipe",
        metavar="RECIPE",
        nargs="?",
        help="a .toml file, or the name of a recipe that comes with transformerfam",
    )
    parser.add_argument(
        "changes",
        metavar="KEY=VALUE",
        nargs="*",
        help="settings that count more than the recipe's, section.key=value as in TOML",
    )
    parser.add_argument(
        "--output", metavar="FOLDER", help="where the adapter goes; the same as run.output=FOLDER"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint in that folder"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="show the settings, count the rows, show one sample, and train nothing",
    )
    parser.add_argument(
        "--settings", action="store_true", help="list every setting with its default and meaning"
    )
    options.add_quiet(parser)
    _let_changes_stand_behind_options(parser)


def run(args: argparse.Namespace) -> int:
    """Read the recipe, train, say what came of it."""
    if args.settings:
        from transformerfam.commands import _settings

        print(_settings.as_text(min(shutil.get_terminal_size().columns, 100)))
        return 0
    recipe = _recipe(args)
    if args.dry_run:
        return _dry_run(recipe)
    from transformerfam.training import places

    places.check(recipe)
    from transformers.utils import logging

    from transformerfam.commands import _session
    from transformerfam.training.trainer import train

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    first = _is_first_process()
    progress = report.Progress(quiet=args.quiet or not first)

    notice = "Stopping after this step; Ctrl-C again stops at once."
    with _session.StopOnInterrupt(notice if first else "") as stop:
        trained = train(
            recipe,
            resume=args.resume,
            quiet=args.quiet or not first,
            stop=lambda: stop.requested,
        )
    if trained.interrupted:
        again = _to_resume(args)
        progress.note(f"stopped after step {trained.steps:,}; go on with: {again}")
        progress.note(f"or save what it has learned: {again} run.steps={trained.steps}")
        return _session.INTERRUPTED
    if first:
        print(_outcome(trained, recipe))
    return 0


def _let_changes_stand_behind_options(parser: argparse.ArgumentParser) -> None:
    """Take KEY=VALUE anywhere; argparse alone has no words for them behind an option."""
    parse = parser.parse_known_args

    def known(args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:
        found, rest = parse(args, namespace)
        behind = [word for word in rest if "=" in word and not word.startswith("-")]
        found.changes = [*(found.changes or ()), *behind]
        return found, [word for word in rest if word not in behind]

    parser.parse_known_args = known  # type: ignore[assignment, method-assign]


def _recipe(args: argparse.Namespace) -> Recipe:
    """The recipe with all changes, complete."""
    from transformerfam.training import checks, places, recipe

    if args.recipe is None:
        raise UserError(
            f"Name a recipe, a file or one of {', '.join(recipe.shipped())}; fam train --settings "
            "lists what one can say."
        )
    found = recipe.Recipe.load(recipe.find(args.recipe), args.changes)
    if args.output is not None:
        found = found.replace(run=replace(found.run, output=args.output))
    if not args.dry_run:
        checks.check_complete(found)
    return places.with_full_paths(found)


def _is_first_process() -> bool:
    """Whether this is the process that speaks; `accelerate launch` numbers them."""
    return os.environ.get("RANK", "0") == "0"


def _to_resume(args: argparse.Namespace) -> str:
    """The command that goes on."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return "the same command and --resume"
    words = ["fam", "train", args.recipe, *args.changes]
    if args.output is not None:
        words += ["--output", args.output]
    return shlex.join([*words, "--resume"])


def _outcome(trained: Trained, recipe: Recipe) -> str:
    """What the probes measured, and how to use what was made."""
    parts = []
    for name, numbers in trained.results.items():
        rows = [(key, f"{value:.4g}") for key, value in numbers.items()]
        parts.append(f"{name}\n{report.facts(rows, indent='  ')}")
    parts.append(
        f"wrote {trained.folder} after {trained.steps:,} steps; read with it: fam read FILE --model "
        f"{shlex.quote(recipe.run.output)}"
    )
    return "\n".join(parts)


# ---- dry run


def _dry_run(recipe: Recipe) -> int:
    """Show what would be done: settings, data, one sample. Loads a tokenizer and no weights."""
    print(recipe.to_toml())
    found = [(f"data.sources.{i}", _described(s)) for i, s in enumerate(recipe.data.sources)]
    if not found:
        raise UserError("The recipe has no data; give data.sources.0.path=FILE.")
    print(report.facts(found), end="\n\n")
    from transformerfam.training import places

    places.check(recipe)
    print(_sample(recipe))
    if not recipe.run.output:
        print("The recipe has no run.output yet; name a folder with --output.", file=sys.stderr)
    return 0


def _described(source: SourceSettings) -> str:
    if source.kind != "files":
        return source.described(source.lengths[-1])
    from transformerfam.data.files import open_rows

    rows = open_rows(source.path, split=source.split, bad_rows=source.bad_rows)
    text = f"{source.path}, {len(rows):,} rows"
    if rows.bad.count:
        text += f", {rows.bad.count:,} more that cannot be used: {'; '.join(rows.bad.examples)}"
    return text


def _sample(recipe: Recipe) -> str:
    """What the first row of the batch would read first, decoded; and what turned out to be of no use."""
    from transformerfam.training.inputs import left_out, open_probes, open_source, row_readers

    tokenizer = _tokenizer(recipe.model.base)
    open_probes(recipe, tokenizer)
    source = open_source(recipe, tokenizer)
    readers = row_readers(recipe, source, tokenizer)
    pieces = [reader.next() for reader in readers[:_TRIED_ROWS]]
    first, most = pieces[0], max(pieces[0].weights, default=0.0)
    ids = [*first.inputs, *first.targets[-1:]]
    told = list(zip(first.targets, first.weights, strict=True))
    learned = [i for i, weight in told if weight and weight == most]
    less = sum(0 < weight < most for _, weight in told)
    also = f", {less:,} more with less weight" if less else ""
    count, reasons = left_out(source, readers)
    remark = f"left out so far: {'; '.join(reasons)}\n" if count else ""
    return (
        f"{remark}first of {len(readers):,} rows: {len(ids):,} tokens, {len(learned):,} of them "
        f"learned{also}\n"
        f"  text     {_cut(tokenizer.decode(ids))}\n"
        f"  learned  {_cut(tokenizer.decode(learned))}"
    )


def _cut(text: str) -> str:
    """Both ends of a text, on one line."""
    shown = repr(text)
    half = _SAMPLE_CHARACTERS // 2
    return shown if len(shown) <= 2 * half else f"{shown[:half]} ... {shown[-half:]}"


def _tokenizer(name: str) -> Any:
    """A model's tokenizer alone, where that can be had without its weights."""
    from transformers import AutoTokenizer

    from transformerfam import models
    from transformerfam.embedded import embedded_folder, first_sentence, quiet

    if name.endswith(".gguf"):
        return models.load(name)[1]
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(
                str(embedded_folder()) if name == models.EMBEDDED else name
            )
    except Exception as error:  # missing and damaged tokenizers raise many kinds of errors
        raise UserError(
            f"{name} has no tokenizer that can be used ({first_sentence(error)})."
        ) from error
