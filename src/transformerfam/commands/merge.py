"""`fam merge`: an adapter and its model become one model."""

from __future__ import annotations

import argparse
import os
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformerfam import report
from transformerfam.commands import _options as options
from transformerfam.errors import UserError

HELP = "make one model of an adapter and the model that it was trained on"

EPILOG = """\
examples:
  fam merge my-adapter my-model
  fam read book.txt --model my-model
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fam merge`."""
    parser.description = (
        "Add a trained adapter into the weights of its model and save the result, with its geometry, "
        "FAM prompt and tokenizer, as a model of its own, which needs no PEFT."
    )
    parser.epilog = EPILOG
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of the adapter, or its hub name")
    parser.add_argument("output", metavar="OUTPUT", help="folder to make; it may be there if empty")
    parser.add_argument(
        "--model", metavar="NAME", help="the model (default: the one that the adapter names)"
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="type of the weights (default: as the model's are stored)",
    )
    options.add_quiet(parser)


def run(args: argparse.Namespace) -> int:
    """Load, merge, save."""
    target = Path(args.output).expanduser().resolve()
    _check_adapter(args.adapter, args.model)
    _check_output(target)
    progress = report.Progress(quiet=args.quiet)
    progress.passing(f"loading {args.adapter} ...")
    from transformers.utils import logging

    from transformerfam import models

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    adapter = args.adapter if args.model else None
    model, tokenizer = models.load(args.model or args.adapter, dtype=args.dtype, adapter=adapter)
    if model.fam_config.adapted == "fam":
        raise UserError(
            f"{args.adapter} changes the way of FAM alone, and tokens are read by the model's own "
            "weights: both cannot be one; keep the adapter."
        )
    progress.passing(f"saving {args.output} ...")
    with _whole_folder(target) as beside:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
    progress.clear()
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    print(
        f"wrote {args.output}, {report.size(size)}; read with it: "
        f"fam read FILE --model {shlex.quote(args.output)}"
    )
    return 0


def _check_adapter(adapter: str, model: str | None) -> None:
    folder = Path(adapter).expanduser()
    if folder.is_dir() and not (folder / "adapter_config.json").is_file():
        raise UserError(f"{adapter} holds no adapter: it has no adapter_config.json.")
    if not folder.is_dir() and not model:
        raise UserError(
            f"There is no folder {adapter}; for an adapter on the hub, name its model with --model."
        )


def _check_output(target: Path) -> None:
    """Refuse before the work is done what could not be written after it."""
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file; name a folder.")
    if target.is_dir() and any(target.iterdir()):
        raise UserError(f"The folder {target} is not empty; name another, nothing is overwritten.")
    above = target.parent
    if not above.is_dir():
        raise UserError(f"There is no folder {above} to make {target.name} in.")
    if not os.access(above, os.W_OK):
        raise UserError(f"{target} cannot be made: the folder {above} cannot be written.")


@contextmanager
def _whole_folder(target: Path) -> Iterator[Path]:
    """A folder to write beside `target`, which takes its place if the block succeeds."""
    above = tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent)
    with above as place:
        beside = Path(place) / target.name
        beside.mkdir()
        yield beside
        if target.is_dir():
            target.rmdir()  # empty, or it would have been refused
        beside.rename(target)
