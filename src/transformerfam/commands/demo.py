"""`fam demo`: a small real model is told something, reads on far past its windows, and is asked."""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformerfam import report
from transformerfam.commands import _options as options
from transformerfam.config import FamConfig
from transformerfam.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformerfam.commands._compare import Variant

HELP = "watch a small real model remember what it read long ago, in constant memory"
_ANSWER_TOKENS = 6  # a space and five digits


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fam demo`."""
    parser.description = (
        "Hide a pass key at the start of the Python language reference, which every Python carries, "
        "and let SmolLM2-135M-Instruct read on: with its trained feedback memory, with the same "
        "weights and windows without feedback, and as it was before, with full attention, as far as "
        "that fits. Then ask all of them for the key, and the first again in a conversation, from a "
        "memory that was saved and opened again."
    )
    parser.add_argument(
        "--tokens",
        metavar="TOKENS",
        type=options.whole(64),
        default=6144,
        help="how much to read (default: %(default)s)",
    )
    parser.add_argument(
        "--full-limit",
        metavar="TOKENS",
        type=options.whole(64),
        default=3072,
        help="how far full attention reads (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        metavar="N",
        type=options.whole(0),
        default=0,
        help="of the pass key (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        default="fam-demo.png",
        help="the picture, .png or .svg (default: %(default)s)",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the numbers here")
    options.add_quiet(parser)


@dataclass
class Shown:
    """What the demo found.

    Attributes:
        key: the number that was hidden.
        variants: the readers, having read.
        answers: what each says the key is.
        sizes: bytes of their memories, by name, each time that they had read so much more.
        step: how much more.
    """

    key: str
    variants: list[Variant]
    answers: dict[str, str]
    sizes: list[dict[str, int]]
    step: int


def run(args: argparse.Namespace) -> int:
    """Read, ask, talk, draw the picture."""
    from transformerfam import models

    if Path(args.out).suffix not in (".png", ".svg"):
        raise UserError(f"The picture must be .png or .svg, not {args.out}.")
    progress = report.Progress(quiet=args.quiet)
    progress.note("Loading SmolLM2-135M-Instruct, a language model of 135 million weights.")
    model, tokenizer = models.load(adapter=models.SHIPPED)
    before, _ = models.load(config=FamConfig(attention="full", fam_length=0))
    key = str(random.Random(args.seed).randrange(10_000, 100_000))
    begin, question = _words(key)
    progress.note(_explain(model.fam_config, begin, args.tokens))
    variants = _readers(model, before, args.full_limit)
    ids = _token_ids(tokenizer, begin, args.tokens)
    started = time.monotonic()
    step = max(512, model.fam_config.block_size)
    sizes = _read(variants, ids, step, progress)
    progress.passing("asking ...")
    answers = {v.name: _say(v, tokenizer, question) for v in variants}
    progress.clear()
    shown = Shown(key, variants, answers, sizes, step)
    print(f"Read by three readers in {report.duration(time.monotonic() - started)}, then asked:\n")
    print(f"    {question.strip()} ...\n")
    print(_table(shown))
    print(f"\n{_verdict(shown)}\n")
    _talk(variants[0], tokenizer, question)
    if args.json:
        _write_json(args.json, shown)
    return _draw(args.out, shown)


# ---- what is read, by whom


def _words(key: str) -> tuple[str, str]:
    """What stands before the text, and the question: the words of figure 10."""
    from transformerfam.data.passkey import INTRODUCTION

    return (
        f"{INTRODUCTION} The pass key is {key}. Remember it. {key} is the pass key.",
        " What is the pass key? The pass key is",
    )


def _token_ids(tokenizer: Any, begin: str, count: int) -> list[int]:
    from transformerfam.text import TokenIds, language_reference

    return list(islice(TokenIds(tokenizer, [f"{begin} {language_reference()}"]), count))


def _explain(config: FamConfig, begin: str, tokens: int) -> str:
    B, M = config.block_size, config.memory_segments
    return (
        f"It reads {tokens:,} tokens: the words\n\n    {begin.partition('. ')[2].partition('. ')[2]}\n\n"
        "and then the Python language reference. It always sees the block that it is in and "
        f"{M} before it, {(M + 1) * B:,} tokens at most, and the feedback memory."
    )


def _readers(model: Any, before: Any, full_limit: int) -> list[Variant]:
    from transformerfam.commands._compare import RangeLosses, Variant
    from transformerfam.conversion import twin
    from transformerfam.memory import Memory

    windows = twin(model, model.fam_config.without_feedback())
    named = {
        f"FAM {model.fam_config.fam_length}": model,
        "without feedback": windows,
        "full attention": before,
    }
    width = max(256, model.fam_config.block_size)
    return [
        Variant(
            name=name,
            model=reader,
            memory=Memory.for_model(reader),
            ranges=RangeLosses(width),
            limit=full_limit if reader is before else None,
            first_limit=full_limit,
        )
        for name, reader in named.items()
    ]


def _read(
    variants: list[Variant], ids: Sequence[int], step: int, progress: report.Progress
) -> list[dict[str, int]]:
    """Read bit by bit, all in turns; sizes of their memories after each bit."""
    sizes = []
    for start in range(0, len(ids), step):
        for variant in variants:
            variant.read(ids[start : start + step])
        done = min(start + step, len(ids))
        sizes.append({v.name: v.memory.nbytes for v in variants if v.tokens >= done})
        bar = "█" * (done * 20 // len(ids))
        memories = "   ".join(f"{v.name} {report.size(v.memory.nbytes)}" for v in variants)
        progress.update(f"{bar:░<20} {done:,} of {len(ids):,} tokens   {memories}")
    return sizes


# ---- what they say


def _say(variant: Variant, tokenizer: Any, question: str) -> str:
    """The likeliest words behind the question, asked on a copy of the memory."""
    from transformerfam.stream import generate

    asked = tokenizer(question, add_special_tokens=False).input_ids
    said = generate(variant.model, asked, variant.memory.fork(), max_new_tokens=_ANSWER_TOKENS)
    return " ".join(tokenizer.decode(list(said)).split())


def _table(shown: Shown) -> str:
    variants = shown.variants
    rows = [
        ["has read", *(f"{v.tokens:,}" for v in variants)],
        ["its memory", *(report.size(v.memory.nbytes) for v in variants)],
        ["loss, nats a token", *(report.loss(v.loss) for v in variants)],
        [
            f"of the first {variants[0].first_limit:,}",
            *(report.loss(v.first_loss) for v in variants),
        ],
        ["says", *(shown.answers[v.name] for v in variants)],
        ["right", *("yes" if shown.answers[v.name] == shown.key else "no" for v in variants)],
    ]
    return report.table(["", *(v.name for v in variants)], rows)


def _verdict(shown: Shown) -> str:
    """What the table says, in words."""
    fam, windows, full = shown.variants
    right = {v.name: shown.answers[v.name] == shown.key for v in shown.variants}
    words = f"The key stood {fam.tokens:,} tokens back, "
    if right[fam.name] and not right[windows.name]:
        words += "far outside of every window: what is left of it is in the feedback memory. "
    elif right[fam.name]:
        words += "and both could say it: read more than their windows reach (--tokens). "
    else:
        words += "and the feedback memory has lost it. "
    first, last = shown.sizes[0][fam.name], shown.sizes[-1][fam.name]
    words += (
        f"That memory had {report.size(first)} after {shown.step:,} tokens and {report.size(last)} "
    )
    words += f"at the end; full attention, which stops at {full.tokens:,} here, has "
    words += f"{report.size(full.memory.nbytes)} and grows."
    return words


def _talk(variant: Variant, tokenizer: Any, question: str) -> None:
    """A conversation on a memory that was saved and opened again."""
    from transformerfam.memory import Memory
    from transformerfam.stream import Sampling
    from transformerfam.turns import Turns, answer

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "demo.fam"
        variant.memory.save(file, variant.model)
        memory = Memory.load(file, variant.model)
        print(f"Saved ({report.size(file.stat().st_size)}) and opened again, in a conversation:\n")
    turns = Turns(tokenizer)
    for first, said in ((True, question.partition("?")[0].strip() + "?"), (False, "Thank you!")):
        parts = answer(
            variant.model,
            tokenizer,
            memory,
            said,
            turns=turns,
            first=first,
            sampling=Sampling(temperature=0.0),
            max_new_tokens=40,
        )
        print(f"> {said}\n{''.join(parts).strip()}\n")


# ---- what is kept


def _write_json(path: str, shown: Shown) -> None:
    from transformerfam.commands._compare import comparison_json
    from transformerfam.files import whole_file

    values = {
        "text": "a pass key and the Python language reference",
        "key": shown.key,
        "answers": shown.answers,
        "readers": comparison_json(shown.variants),
        "memory_bytes": [
            {"tokens": (i + 1) * shown.step, **now} for i, now in enumerate(shown.sizes)
        ],
    }
    try:
        with whole_file(path) as file:
            file.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}.") from None


def _draw(path: str, shown: Shown) -> int:
    from transformerfam.extras import MissingExtraError
    from transformerfam.plots import draw_reading

    variants = shown.variants
    losses = {
        v.name: [(a, min(b, v.tokens), loss) for a, b, loss in v.ranges.rows() if loss is not None]
        for v in variants
    }
    by_length = {
        v.name: [
            ((i + 1) * shown.step, now[v.name])
            for i, now in enumerate(shown.sizes)
            if v.name in now
        ]
        for v in variants
    }
    try:
        draw_reading(path, losses, by_length)
    except MissingExtraError as error:
        print(f"No picture: {error}")
        return 0
    print(f"Loss and memory by length, as a picture: {path}")
    return 0
