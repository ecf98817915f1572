"""`fam demo`: a small real model is told something, reads on far past its window, and is asked."""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import textwrap
import time
from dataclasses import dataclass, field
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
    from transformerfam.memory import Memory

HELP = "watch a small real model remember what it read long ago, in constant memory"
_ANSWER_TOKENS = 6  # a space and five digits
_FIRST_ASKED = 1250  # tokens read; then after twice as many, and so on
_CONVERSATION = ("What is the capital of France?", "What is it famous for? One sentence.")
_REPLY_TOKENS = 48


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fam demo`."""
    parser.description = (
        "Tell SmolLM2-135M-Instruct a pass key and let it read on in the Python language reference, "
        "which every Python carries: with its trained feedback memory, with the same weights and "
        "windows without feedback, and as it was before, with full attention as far as that fits. Ask "
        "all of them for the key on the way, and the first again from a memory that was saved and "
        "opened again; talk with the model, its memory saved and opened between two turns; draw loss "
        "and memory by length."
    )
    parser.add_argument(
        "--tokens",
        metavar="TOKENS",
        type=options.whole(_FIRST_ASKED),
        default=10_000,
        help="how much to read (default: %(default)s)",
    )
    parser.add_argument(
        "--full-limit",
        metavar="TOKENS",
        type=options.whole(2),
        default=8192,
        help="how far full attention reads (default: %(default)s, what the model was trained for)",
    )
    parser.add_argument(
        "--memory-segments",
        metavar="M",
        type=options.whole(0),
        help="past blocks that the windows hold (default: as many as in training)",
    )
    parser.add_argument(
        "--seed",
        metavar="N",
        type=options.whole(0),
        default=1,
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
    """What the demo finds.

    Attributes:
        key: the number that is hidden.
        variants: the readers.
        answers: what each said the key is, by tokens read and name.
        sizes: bytes of their memories, by tokens read and name.
    """

    key: str
    variants: list[Variant]
    answers: dict[int, dict[str, str]] = field(default_factory=dict)
    sizes: dict[int, dict[str, int]] = field(default_factory=dict)


def run(args: argparse.Namespace) -> int:
    """Read, ask, save, ask again, draw the picture."""
    from transformerfam import models
    from transformerfam.commands._session import check_place
    from transformerfam.data.passkey import INTRODUCTION, pass_key

    if Path(args.out).suffix not in (".png", ".svg"):
        raise UserError(f"The picture must be .png or .svg, not {args.out}.")
    for place in (args.out, args.json):
        if place:
            check_place(place)
    progress = report.Progress(quiet=args.quiet)
    progress.note("Loading SmolLM2-135M-Instruct, a language model of 135 million weights.")
    model, tokenizer = _with_memory(args.memory_segments)
    before, _ = models.load(config=FamConfig(attention="full", fam_length=0))
    key = str(random.Random(args.seed).randrange(10_000, 100_000))
    told = pass_key(key)
    begin, question = f"{INTRODUCTION} {told.sentence}", f" {told.question} {told.stem}"
    ids = _token_ids(tokenizer, begin, args.tokens)
    if len(ids) < args.tokens:
        progress.note(f"There are no more than {len(ids):,} tokens to read.")
    progress.note(_explain(model.fam_config, told.sentence, len(ids)))
    shown = Shown(key, _readers(model, before, args.full_limit))
    started = time.monotonic()
    asked = tokenizer(question, add_special_tokens=False).input_ids
    kept = _read(shown, tokenizer, ids, asked, progress)
    progress.clear()
    print(f"Read by three readers in {report.duration(time.monotonic() - started)}.\n")
    print(f"Asked on the way:{question} ...\n\n{_answers_table(shown)}\n")
    print(f"{_sizes_table(shown)}\n\n{_verdict(shown)}\n")
    print(f"{_reopened(shown, tokenizer, kept, asked)}\n")
    print(f"{_talked(model, tokenizer)}\n")
    if args.json:
        _write_json(args.json, shown)
    return _draw(args.out, shown)


# ---- what is read, by whom


def _with_memory(memory_segments: int | None) -> tuple[Any, Any]:
    """The default model with its trained memory, in windows of so many past blocks."""
    from transformerfam import models
    from transformerfam.conversion import reconfigure

    model, tokenizer = models.load(adapter=models.SHIPPED)
    if memory_segments is not None:
        model = reconfigure(model, model.fam_config.replace(memory_segments=memory_segments))
    return model, tokenizer


def _token_ids(tokenizer: Any, begin: str, count: int) -> list[int]:
    from transformerfam.text import TokenIds, language_reference

    return list(islice(TokenIds(tokenizer, [f"{begin} {language_reference()}"]), count))


def _explain(config: FamConfig, told: str, tokens: int) -> str:
    window = (config.memory_segments + 1) * config.block_size
    return (
        f"It reads {tokens:,} tokens: the words\n\n    {told}\n\n"
        f"and then the Python language reference.\nIt sees {window:,} tokens at most, and the "
        f"feedback memory: {config.fam_length} rows in each layer."
    )


def _readers(model: Any, before: Any, full_limit: int) -> list[Variant]:
    from transformerfam.commands._compare import RangeLosses, Variant
    from transformerfam.conversion import twin
    from transformerfam.memory import Memory

    named = {
        f"FAM {model.fam_config.fam_length}": model,
        "without feedback": twin(model, model.fam_config.without_feedback()),
        "full attention": before,
    }
    return [
        Variant(
            name=name,
            model=reader,
            memory=Memory.for_model(reader),
            ranges=RangeLosses(_FIRST_ASKED),
            limit=full_limit if reader is before else None,
        )
        for name, reader in named.items()
    ]


def _read(
    shown: Shown,
    tokenizer: Any,
    ids: Sequence[int],
    asked: Sequence[int],
    progress: report.Progress,
) -> Memory:
    """Read bit by bit, all in turns, and ask each time that the text has doubled.

    Returns:
        A copy of the first reader's memory as it was when it last said the key, or was first asked.
    """
    first = shown.variants[0]
    stops = sorted({*range(_FIRST_ASKED, len(ids), _FIRST_ASKED), len(ids)})
    kept = first.memory
    for count, stop in enumerate(stops, start=1):
        for variant in shown.variants:
            variant.read(ids[variant.tokens : stop])
        there = [v for v in shown.variants if v.tokens == stop]
        shown.sizes[stop] = {v.name: v.memory.nbytes for v in there}
        bar = "█" * (count * 20 // len(stops))
        sizes = "   ".join(f"{v.name} {report.size(v.memory.nbytes)}" for v in there)
        progress.update(f"{bar:░<20} {stop:,} of {stops[-1]:,} tokens   {sizes}")
        if count & (count - 1) == 0 or stop == stops[-1]:
            said = {v.name: _say(v.model, v.memory, tokenizer, asked) for v in there}
            shown.answers[stop] = said
            if count == 1 or said[first.name] == shown.key:
                kept = first.memory.fork()
    return kept


# ---- what they say


def _say(model: Any, memory: Memory, tokenizer: Any, asked: Sequence[int]) -> str:
    """The likeliest words behind the question, asked on a copy of the memory."""
    from transformerfam.stream import generate

    said = generate(model, list(asked), memory.fork(), max_new_tokens=_ANSWER_TOKENS)
    return " ".join(tokenizer.decode(list(said)).split())


def _answers_table(shown: Shown) -> str:
    names = [v.name for v in shown.variants]
    rows = []
    for tokens, answers in shown.answers.items():
        cells = [_marked(answers[n], shown.key) if n in answers else "–" for n in names]
        rows.append([f"after {tokens:,} tokens", *cells])
    return report.table(["", *names], rows)


def _sizes_table(shown: Shown) -> str:
    names = [v.name for v in shown.variants]
    first = shown.sizes[min(shown.sizes)]
    # Of a reader that stops early, as it was when it did.
    last = {name: nbytes for sizes in shown.sizes.values() for name, nbytes in sizes.items()}
    rows = [
        [f"memory, {label}", *(report.size(sizes[n]) if n in sizes else "–" for n in names)]
        for label, sizes in (("at first", first), ("at the end", last))
    ]
    rows.append(["loss, nats a token", *(report.loss(v.loss) for v in shown.variants)])
    rows.append(["tokens read", *(f"{v.tokens:,}" for v in shown.variants)])
    return report.table(["", *names], rows)


def _verdict(shown: Shown) -> str:
    """What the tables say, in words."""
    fam, windows, _ = (v.name for v in shown.variants)
    config: FamConfig = shown.variants[0].model.fam_config
    window = (config.memory_segments + 1) * config.block_size
    right = {
        name: [n for n, said in shown.answers.items() if said.get(name) == shown.key]
        for name in (fam, windows)
    }
    beyond = [n for n in right[fam] if n > window and n not in right[windows]]
    if beyond:
        words = (
            f"The feedback memory has the key after {max(beyond):,} tokens, of which the windows hold "
            f"{window:,};\nthe same weights without it do not"
        )
        lost = [n for n in shown.answers if n > max(beyond)]
        words += f", and after {min(lost):,} it has lost it." if lost else "."
    elif sees := [n for n in right[fam] if n not in right[windows]]:
        words = (
            f"The feedback memory says the key after {max(sees):,} tokens; the same weights without it, "
            "which still\nsee it in their windows, do not."
        )
    elif right[fam]:
        words = "Whoever says the key still sees it: read more than a window holds (--tokens)."
    else:
        words = "The feedback memory has lost the key."
    return words


def _reopened(shown: Shown, tokenizer: Any, memory: Memory, asked: Sequence[int]) -> str:
    """What is said from a memory that was saved and opened again."""
    model = shown.variants[0].model
    opened, size = _saved_and_opened(memory, model)
    return (
        f"The memory after {memory.position[0]:,} tokens, saved ({size}), opened again and asked again: "
        f"{_marked(_say(model, opened, tokenizer, asked), shown.key)}"
    )


def _talked(model: Any, tokenizer: Any) -> str:
    """A conversation, as `fam chat` holds it, whose memory is saved and opened in between."""
    from transformerfam.memory import Memory
    from transformerfam.turns import answer

    memory, said = Memory.for_model(model), [f"A conversation ({model.fam_config.describe()}):\n"]
    for turn, question in enumerate(_CONVERSATION):
        if turn:
            memory, size = _saved_and_opened(memory, model)
            said.append(f"  (memory saved, {size}, and opened again)")
        reply = answer(
            model, tokenizer, memory, question, first=not turn, max_new_tokens=_REPLY_TOKENS
        )
        said += [
            f"  > {question}",
            *textwrap.wrap("".join(reply), 90, initial_indent="  ", subsequent_indent="  "),
        ]
    return "\n".join(said)


def _saved_and_opened(memory: Memory, model: Any) -> tuple[Memory, str]:
    """The memory as a file gives it back, and the size of the file."""
    from transformerfam.memory import Memory

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "demo.fam"
        memory.save(file, model)
        return Memory.load(file, model), report.size(file.stat().st_size)


def _marked(said: str, key: str) -> str:
    if said == key:
        return f"{said} ✓"
    digits = sum(a == b for a, b in zip(said, key, strict=True)) if len(said) == len(key) else 0
    return f"{said} ✗ {digits} of {len(key)}" if digits else f"{said} ✗"


# ---- what is kept


def _write_json(path: str, shown: Shown) -> None:
    from transformerfam.commands._compare import comparison_json
    from transformerfam.files import whole_file

    values = {
        "text": "a pass key and the Python language reference",
        "key": shown.key,
        "answers": [{"tokens": n, **said} for n, said in shown.answers.items()],
        "memory_bytes": [{"tokens": n, **now} for n, now in shown.sizes.items()],
        "readers": comparison_json(shown.variants),
    }
    try:
        with whole_file(path) as file:
            file.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}.") from None


def _draw(path: str, shown: Shown) -> int:
    from transformerfam.extras import MissingExtraError
    from transformerfam.plots import draw_reading

    losses = {
        v.name: [(a, min(b, v.tokens), loss) for a, b, loss in v.ranges.rows() if loss is not None]
        for v in shown.variants
    }
    by_length = {
        v.name: [(n, now[v.name]) for n, now in shown.sizes.items() if v.name in now]
        for v in shown.variants
    }
    try:
        draw_reading(path, losses, by_length)
    except MissingExtraError as error:
        print(f"No picture: {error}")
        return 0
    print(f"Loss and memory by length, as a picture: {path}")
    return 0
