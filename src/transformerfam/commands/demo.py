"""`fam demo`: a real model reads a real long text in four ways, side by side."""

from __future__ import annotations

import argparse
import json
import time
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformerfam import report
from transformerfam.commands import _options as options
from transformerfam.config import FamConfig
from transformerfam.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformerfam.commands._compare import Variant

HELP = "watch a small real model read a long real text in constant memory"
# Small blocks, so that a text of a few minutes is many windows long.
_CONFIG = FamConfig(block_size=256, memory_segments=3, fam_length=0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fam demo`."""
    parser.description = (
        "Read the Python language reference, which every Python carries, with full attention as far "
        "as it fits, with windows, with windows and sinks, and with a feedback memory; print the loss "
        "and the memory by length, and draw both."
    )
    parser.add_argument(
        "--tokens",
        metavar="TOKENS",
        type=options.whole(2),
        default=6144,
        help="how much to read (default: %(default)s)",
    )
    parser.add_argument(
        "--full-limit",
        metavar="TOKENS",
        type=options.whole(2),
        default=3072,
        help="how far full attention reads (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        default="fam-demo.png",
        help="the picture, .png or .svg (default: %(default)s)",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the numbers here")
    options.add_quiet(parser)


def run(args: argparse.Namespace) -> int:
    """Read, print the tables, draw the picture."""
    from transformerfam import models
    from transformerfam.commands._compare import comparison, comparison_json, comparison_table
    from transformerfam.memory import Memory

    if Path(args.out).suffix not in (".png", ".svg"):
        raise UserError(f"The picture must be .png or .svg, not {args.out}.")
    progress = report.Progress(quiet=args.quiet)
    progress.note("Loading SmolLM2-135M-Instruct, a language model of 135 million weights.")
    model, tokenizer = models.load(config=_CONFIG)
    ids = list(islice(_token_ids(tokenizer), args.tokens))
    variants = comparison(model, Memory.for_model(model), trained=False, full_limit=args.full_limit)
    progress.note(_explain(len(ids)))
    started = time.monotonic()
    sizes = _read(variants, ids, progress)
    progress.clear()
    took = report.duration(time.monotonic() - started)
    print(f"Loss in nats a token, by place in the text (read four ways in {took}):\n")
    print(comparison_table(variants))
    print(f"\nMemory while reading:\n\n{_sizes_table(variants, sizes)}\n")
    print(_verdict(variants))
    if args.json:
        _write_json(
            args.json, {"text": "Python language reference", "variants": comparison_json(variants)}
        )
    return _draw(args.out, variants, sizes)


def _token_ids(tokenizer: Any) -> Iterator[int]:
    from transformerfam.text import TokenIds, language_reference

    return iter(TokenIds(tokenizer, [language_reference()]))


def _explain(tokens: int) -> str:
    B, M = _CONFIG.block_size, _CONFIG.memory_segments
    return (
        f"It reads {tokens:,} tokens of the Python language reference, {B} at a time, and always sees "
        f"the block that it is in and {M} before it: a window of at most {(M + 1) * B:,} tokens."
    )


def _read(
    variants: list[Variant], ids: list[int], progress: report.Progress
) -> list[dict[str, int]]:
    """Read block by block, all variants in turns; sizes of their memories after each step."""
    step = 2 * _CONFIG.block_size
    sizes = []
    for start in range(0, len(ids), step):
        for variant in variants:
            variant.read(ids[start : start + step])
        sizes.append(
            {v.name: v.memory.nbytes for v in variants if v.tokens >= min(start + step, len(ids))}
        )
        done = min(start + step, len(ids))
        largest = "   ".join(f"{v.name} {report.size(v.memory.nbytes)}" for v in variants)
        progress.update(f"{done:,} of {len(ids):,} tokens   {largest}")
    return sizes


def _sizes_table(variants: list[Variant], sizes: list[dict[str, int]]) -> str:
    step = 2 * _CONFIG.block_size
    marks = sorted(
        {0, 1, len(sizes) // 4, len(sizes) // 2, len(sizes) - 1} & set(range(len(sizes)))
    )
    rows = []
    for i in marks:
        cells = [report.size(sizes[i][v.name]) if v.name in sizes[i] else "–" for v in variants]
        rows.append([f"after {(i + 1) * step:,}", *cells])
    return report.table(["tokens", *(v.name for v in variants)], rows)


def _verdict(variants: list[Variant]) -> str:
    """What the numbers say, in the order in which they say it."""
    by_name = {v.name: v for v in variants}
    full, windows, sinks, fam = (by_name[n] for n in by_name)
    limit = report.count(full.tokens)
    lines = [
        f"Full attention keeps every token and stops here at {limit} of them; the others keep a memory "
        "that no longer grows once their window is full.",
        f"Four sink tokens change the loss of windows from {report.loss(windows.loss)} to "
        f"{report.loss(sinks.loss)} nats.",
    ]
    if fam.loss is not None and sinks.loss is not None and fam.loss > sinks.loss:
        lines.append(
            f"The feedback memory has not been trained, and it does harm: {report.loss(fam.loss)} nats. "
            "Tokens attend to rows that mean nothing yet. What a conversion gives before training is "
            "the reader with sinks, and that is the default of fam read and fam chat."
        )
    return "\n".join(lines)


def _write_json(path: str, values: dict[str, Any]) -> None:
    from transformerfam.files import whole_file

    try:
        with whole_file(path) as file:
            file.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}.") from None


def _draw(path: str, variants: list[Variant], sizes: list[dict[str, int]]) -> int:
    from transformerfam.extras import MissingExtraError
    from transformerfam.plots import draw_reading

    losses = {
        v.name: [(a, min(b, v.tokens), loss) for a, b, loss in v.ranges.rows() if loss is not None]
        for v in variants
    }
    step = 2 * _CONFIG.block_size
    by_length = {
        v.name: [((i + 1) * step, now[v.name]) for i, now in enumerate(sizes) if v.name in now]
        for v in variants
    }
    try:
        draw_reading(path, losses, by_length)
    except MissingExtraError as error:
        print(f"No picture: {error}")
        return 0
    print(f"\nThe same as a picture: {path}")
    return 0
