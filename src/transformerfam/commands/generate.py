"""`fam generate`: continue a text, or a memory of one."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from transformerfam import report
from transformerfam.commands import _options as options
from transformerfam.errors import UserError

if TYPE_CHECKING:
    from transformerfam.commands._session import Session, StopOnInterrupt
    from transformerfam.stream import Sampling

HELP = "continue a prompt, a piped text of any length, or a saved memory"

EPILOG = """\
examples:
  fam generate "The harbour lay grey under"
  fam generate - < chapter.txt --temperature 0
  fam generate --load book.fam --max-new-tokens 50
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fam generate`."""
    parser.description = (
        "Continue a text as it stands, without a chat template. The continuation goes to standard "
        "output as it is made. A saved memory holds the prompt and the continuation."
    )
    parser.epilog = EPILOG
    parser.add_argument(
        "prompt",
        metavar="PROMPT",
        nargs="?",
        type=options.text,
        help="the text, or - for standard input; may be left out with --load",
    )
    parser.add_argument(
        "--lenient",
        action="store_true",
        help="read on over bytes of standard input that are not UTF-8, and over NUL bytes",
    )
    options.add_quiet(parser)
    options.add_sampling(parser, max_new_tokens=200)
    options.add_memory(parser)
    options.add_model(parser, with_memory=True)
    options.add_geometry(parser)


def run(args: argparse.Namespace) -> int:
    """Read the prompt, write the continuation, save."""
    if not args.prompt and not args.load:
        raise UserError("Give a PROMPT to continue, - for standard input, or a memory with --load.")
    from transformerfam.commands import _session
    from transformerfam.memory_file import save_memory

    sampling = options.sampling(args)
    _session.check_can_save(args.save)
    progress = report.Progress(quiet=args.quiet)
    prompt = _prompt(args.prompt, args.lenient)
    session = _session.open_session(args, progress)
    if not args.prompt and session.memory.next_logits is None:
        raise UserError(f"{args.load} has read nothing that could be continued; give a PROMPT.")

    def save() -> None:
        if args.save:
            save_memory(session.memory, args.save, session.model, text="")
            progress.note(f"saved {args.save}")

    notice = "Stopping; Ctrl-C again stops at once and saves nothing."
    with _session.StopOnInterrupt("" if args.quiet else notice) as stop:
        before, started = session.memory.position[0], time.monotonic()
        read, written = 0, 0
        try:
            _read_prompt(session, stop.until(prompt))
            read = session.memory.position[0] - before
            for token_text in _continuation(args, session, sampling, stop):
                print(token_text, end="", flush=True)
                written += 1
            print(flush=True)
        except Exception:
            # Whoever read the text went away, or a byte of the prompt is bad: the memory is whole.
            if session.memory.position[0] > before:
                save()
            raise
    seconds = time.monotonic() - started
    if stop.requested and not written:
        progress.note(f"Stopped after {read:,} tokens of the prompt.")
    progress.note(f"{written:,} tokens in {report.duration(seconds)}")
    save()
    return _session.INTERRUPTED if stop.requested else 0


def _prompt(given: str | None, lenient: bool) -> Iterator[str]:
    """The prompt in pieces; opened at once, so that what cannot be read is refused at once."""
    if given != "-":
        return iter([given] if given else [])
    from transformerfam.text import TextSource

    if sys.stdin is not None and sys.stdin.isatty():
        print("Type the text; Ctrl-D on an empty line ends it.", file=sys.stderr)
    return iter(TextSource("-", lenient=lenient))


def _read_prompt(session: Session, prompt: Iterator[str]) -> None:
    from transformerfam.stream import absorb
    from transformerfam.text import TokenIds

    memory = session.memory
    tokens = TokenIds(session.tokenizer, prompt, fresh=memory.position[0] == 0)
    with memory.asked():
        absorb(session.model, tokens, memory)


def _continuation(
    args: argparse.Namespace, session: Session, sampling: Sampling, stop: StopOnInterrupt
) -> Iterator[str]:
    """The new text token by token; an empty part in the middle of a character."""
    from transformerfam.stream import generate
    from transformerfam.text import Decoder
    from transformerfam.turns import end_tokens

    if stop.requested:
        return
    tokenizer = session.tokenizer
    decoder = Decoder(tokenizer)
    for token in generate(
        session.model,
        [],
        session.memory,
        max_new_tokens=args.max_new_tokens,
        sampling=sampling,
        stop=end_tokens(session.model, tokenizer),
    ):
        yield decoder.put(token)
        if stop.requested:
            break
    rest = decoder.end()
    if rest:
        print(rest, end="", flush=True)
