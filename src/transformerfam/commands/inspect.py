"""`fam inspect`: look into the memory of a text, as a page to explore and as figure 11."""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformerfam import report
from transformerfam.commands import _options as options
from transformerfam.errors import UserError

if TYPE_CHECKING:
    from transformerfam.commands._session import Session
    from transformerfam.inspection import Inspection

HELP = "look into the memory: what is written, what is read, as a page to explore"

EPILOG = """\
examples:
  fam inspect book.txt                       then open fam-inspect.html in a browser
  fam inspect book.txt --adapter out --layers 3,9,20 --tokens 4096 --output look.html
  fam inspect book.txt --figure maps.png     also draws figure 11

The page is one file and needs no network. Without --adapter the default model gets an untrained
memory, that of figure 11: --block-size 256 --memory-segments 1 --fam-length 8.
"""

# Figure 11 of the paper shows blocks of 256 and 8 slots.
_FIGURE_11 = {"block_size": 256, "memory_segments": 1, "fam_length": 8}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fam inspect`."""
    parser.description = (
        "Read a text and write a page on which every word can be asked: how much of it was written "
        "into the feedback memory, by which slot, what the word reads from memory, and what the memory "
        "does to its loss. With attention maps of whole blocks, and how the memory moves from block to "
        "block."
    )
    parser.epilog = EPILOG
    parser.add_argument("text", metavar="FILE", help="a UTF-8 text file, or - for standard input")
    parser.add_argument(
        "--output",
        metavar="FILE",
        default="fam-inspect.html",
        help="the page (default: %(default)s)",
    )
    parser.add_argument(
        "--figure",
        metavar="FILE",
        help="also draw the attention maps of the last whole block, as .png, .svg or .pdf",
    )
    parser.add_argument(
        "--tokens",
        metavar="TOKENS",
        type=options.whole(1),
        default=2048,
        help="read no more than this many tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--layers",
        metavar="LAYER,...",
        type=_layers,
        help="look into these layers, counted from 0, or all (default: six from first to last)",
    )
    parser.add_argument(
        "--no-baseline",
        action="store_true",
        help="do not read the text without feedback as well, to compare",
    )
    parser.add_argument(
        "--lenient",
        action="store_true",
        help="read on over bytes that are not UTF-8 and over NUL bytes",
    )
    options.add_quiet(parser)
    options.add_model(parser)
    options.add_geometry(parser)


def run(args: argparse.Namespace) -> int:
    """Read, look, write."""
    from transformerfam.commands import _session

    _session.check_place(args.output)
    if args.figure:
        from transformerfam.attention_maps import check_figure

        _session.check_place(args.figure)
        check_figure(args.figure)
    from transformerfam.text import TextSource, TokenIds

    progress = report.Progress(quiet=args.quiet)
    if args.model is None and args.adapter is None:
        for name, value in _FIGURE_11.items():
            if getattr(args, name) is None:
                setattr(args, name, value)
    _check_apart(args)
    with TextSource(args.text, lenient=args.lenient) as source:
        session = _session.open_session(args, progress)
        tokens = iter(TokenIds(session.tokenizer, source))
        ids = list(islice(tokens, args.tokens))
        more = next(tokens, None) is not None
    found = _look(args, session, ids, progress)
    _write_page(args, session, found, source.name, more)
    if args.figure:
        from transformerfam.attention_maps import draw_attention_maps

        draw_attention_maps(args.figure, found)
    print(_summary(args, session, found, source.name, more))
    return 0


def _layers(text: str) -> tuple[int, ...] | str:
    if text == "all":
        return text
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be numbers with commas, or all, not {text!r}"
        ) from None


def _check_apart(args: argparse.Namespace) -> None:
    """Refuse to write over the text, or one result over the other."""
    named = {"FILE": args.text, "--output": args.output, "--figure": args.figure}
    places = {name: Path(path).resolve() for name, path in named.items() if path and path != "-"}
    if len(set(places.values())) < len(places):
        raise UserError(f"{' and '.join(places)} must be different files.")


def _look(
    args: argparse.Namespace, session: Session, ids: list[int], progress: report.Progress
) -> Inspection:
    from transformerfam.inspection import inspect_stream

    layers: Any = range(len(session.memory)) if args.layers == "all" else args.layers
    found = inspect_stream(
        session.model,
        ids,
        layers=layers,
        baseline=not args.no_baseline,
        progress=progress.passing,
    )
    progress.clear()
    return found


def _write_page(
    args: argparse.Namespace, session: Session, found: Inspection, name: str, more: bool
) -> None:
    from transformerfam.files import whole_file
    from transformerfam.inspection_page import page
    from transformerfam.text import words_of

    made = page(
        found,
        words_of(session.tokenizer, found.tokens),
        title=Path(name).name,
        facts=[session.name, session.config.describe(), _read(found, more)],
        trained=session.trained,
    )
    try:
        with whole_file(args.output) as beside:
            # FILE's name, which is in it, need not be text.
            beside.write_text(made, encoding="utf-8", errors="replace")
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{args.output} cannot be written: {reason}.") from error


def _read(found: Inspection, more: bool) -> str:
    read = len(found.tokens)
    rest = ", and the rest of the text was left out" if more else ""
    return f"{'the first ' if more else ''}{read:,} tokens{rest}"


def _summary(
    args: argparse.Namespace, session: Session, found: Inspection, name: str, more: bool
) -> str:
    tail = "; --tokens reads more" if more else ""
    layers = ", ".join(str(layer.layer) for layer in found.layers)
    loss = f"{found.losses[1:].mean():.3f} nats a token"
    if found.losses_without is not None:
        loss += f", {found.losses_without[1:].mean():.3f} with the feedback memory off"
    pairs = [
        ("text", f"{name}, {_read(found, more)}{tail}"),
        ("model", f"{session.name}: {session.config.describe()}"),
        ("layers", f"{layers} of {found.model_layers}"),
        ("loss", loss),
        ("page", f"{args.output}, {report.size(Path(args.output).stat().st_size)}"),
    ]
    if args.figure:
        pairs.append(("figure", args.figure))
    return report.facts(pairs)
