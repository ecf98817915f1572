"""`fam read`: read a text of any length with a memory of fixed size."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from transformerfam import report
from transformerfam.commands import _options as options
from transformerfam.commands._tally import Tally, TextRead
from transformerfam.errors import UserError

if TYPE_CHECKING:
    from transformerfam.commands._compare import Variant
    from transformerfam.commands._session import Session
    from transformerfam.memory_file import MemoryFileError
    from transformerfam.stream import Chunk
    from transformerfam.text import TextSource, TokenIds

HELP = "read a text of any length, say how well it was predicted, and ask about it"

EPILOG = """\
examples:
  fam read book.txt --ask "Who is the captain?"
  fam read book.txt --save book.fam         then: fam chat --load book.fam
  fam read book.txt --load book.fam --save book.fam --continue
  journalctl | fam read - --save log.fam
  fam read book.txt --compare --max-tokens 20000

keys of --json:
  text, model, trained    what was read, by what, and whether its memory was trained
  config                  the geometry, by the names of the options above
  tokens, position        tokens read now, and in the whole life of the memory
  scored, nats, loss      tokens predicted, the sum of their -log p, and nats / scored
  perplexity              exp(loss); loss and perplexity are null if nothing was scored
  seconds, tokens_per_second
  memory_bytes            size of the memory, the same after any length
  resident_bytes          most RAM of this process seen between chunks; null where unknown
  saved                   the file of --save, or null
  interrupted             whether Ctrl-C ended the reading
  answers                 a list of {question, answer}, one for each --ask
  compare                 with --compare, a list of {name, config, tokens, scored, loss,
                          loss_within_full_limit, memory_bytes, ranges: [{start, stop, loss}]}
"""


_PIECE = 1 << 16  # tokens that are gone past at a time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fam read`."""
    parser.description = (
        "Read a text of any length in constant memory. Every token but the first is predicted before "
        "it is read; the loss is the mean of -log p in nats a token. Progress goes to standard error, "
        "the result to standard output. Ctrl-C ends the reading as the end of the text would."
    )
    parser.epilog = EPILOG
    parser.add_argument("text", metavar="FILE", help="a UTF-8 text file, or - for standard input")
    parser.add_argument(
        "--max-tokens", metavar="TOKENS", type=options.whole(1), help="read no more"
    )
    parser.add_argument(
        "--ask",
        metavar="QUESTION",
        action="append",
        default=[],
        type=options.text,
        help="answer a question after reading, in the model's chat template; may be given several "
        "times. Each is asked on a copy: the saved memory holds the text alone",
    )
    parser.add_argument(
        "--max-new-tokens",
        metavar="TOKENS",
        type=options.whole(1),
        default=200,
        help="longest answer (default: %(default)s)",
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="read the same text with full attention, with windows, with and without sinks, and "
        "with the feedback memory, side by side; a memory that is seen only when asked, such as that "
        "of the default model, reads as its windows with sinks do (--no-adapter: an untrained one)",
    )
    parser.add_argument(
        "--full-limit",
        metavar="TOKENS",
        type=options.whole(1),
        default=4096,
        help="where full attention, whose memory grows, stops in --compare (default: %(default)s)",
    )
    parser.add_argument(
        "--lenient",
        action="store_true",
        help="read on over bytes that are not UTF-8 and over NUL bytes",
    )
    parser.add_argument("--json", action="store_true", help="give the result as one JSON object")
    options.add_quiet(parser)
    options.add_memory(parser)
    parser.add_argument(
        "--continue",
        dest="continues",
        action="store_true",
        help="FILE is the text that the memory of --load has begun: go on where it stopped. "
        "Otherwise FILE is read from its start, behind what was read before",
    )
    options.add_model(parser, with_memory=True)
    options.add_geometry(parser)


def run(args: argparse.Namespace) -> int:
    """Read, report, save, answer."""
    _check(args)
    from transformerfam.commands import _session
    from transformerfam.text import TextSource

    _session.check_can_save(args.save)
    progress = report.Progress(quiet=args.quiet)
    if args.text == "-" and sys.stdin is not None and sys.stdin.isatty():
        progress.note("Reading what you type; Ctrl-D on an empty line ends it.")
    with TextSource(args.text, lenient=args.lenient) as source:
        session = _session.open_session(args, progress)
        _check_questions(args, session)
        reading = Reading(args, session, source, progress)
        reading.run()
    if args.json:
        reading.print_json()
    else:
        print(reading.summary())
        reading.print_answers()
    if reading.interrupted and args.ask:
        progress.note("Stopped, so nothing was asked.")
    if reading.not_saved is not None:
        raise reading.not_saved
    return _session.INTERRUPTED if reading.interrupted else 0


def _check(args: argparse.Namespace) -> None:
    if args.continues and not args.load:
        raise UserError("--continue goes on with a saved memory; name it with --load.")
    if args.compare and args.load:
        raise UserError("--compare reads a text from its start, so it cannot begin with --load.")


def _check_questions(args: argparse.Namespace, session: Session) -> None:
    """Refuse what a chat template refuses before a whole book is read."""
    from transformerfam.turns import Turns

    if args.ask:
        turns = Turns(session.tokenizer)
        for question in args.ask:
            turns.opening(question, first=True, fresh=False)


class Reading:
    """One run of `fam read`, from the first token to the report."""

    def __init__(
        self,
        args: argparse.Namespace,
        session: Session,
        source: TextSource,
        progress: report.Progress,
    ) -> None:
        self.args, self.session, self.source, self.progress = args, session, source, progress
        self.tally = Tally()
        self._text: TextRead | None = TextRead()  # None: the memory has read other things too
        self.interrupted = self.saved = False
        self.not_saved: MemoryFileError | None = None  # told when all else is
        self._skipped_bytes = 0.0
        self.variants: list[Variant] = []
        self._taken: list[int] = []

    # ---- reading

    def run(self) -> None:
        """Read to the end, to --max-tokens or to Ctrl-C, and save."""
        from transformerfam.commands._session import StopOnInterrupt

        if self.args.compare:
            from transformerfam.commands._compare import comparison

            session = self.session
            self.variants = comparison(
                session.model,
                session.memory,
                trained=session.trained,
                full_limit=self.args.full_limit,
            )

        notice = "Stopping after this chunk; Ctrl-C again stops at once and saves nothing."
        try:
            with StopOnInterrupt("" if self.args.quiet else notice) as stop:
                self._read(stop)
        except Exception as error:
            # A bad byte far into a text, no memory left: what came before was read for good.
            self.progress.clear()
            if self.args.save and self.tally.tokens:
                self._save()
            if not self.saved:
                raise
            kept = f"The {self.tally.tokens:,} tokens read before are saved in {self.args.save}."
            if isinstance(error, UserError):
                raise UserError(f"{error} {kept}") from None
            self.progress.note(kept)
            raise
        self.progress.clear()
        if self.args.save and (self.tally.tokens or not self.interrupted):
            self._save()

    def _read(self, stop: Any) -> None:
        from transformerfam.stream import read
        from transformerfam.text import TokenIds

        memory = self.session.memory
        fresh = self.args.continues or memory.position[0] == 0
        ids = TokenIds(self.session.tokenizer, stop.until(self.source), fresh=fresh)
        tokens = iter(ids)
        if self.args.continues:
            self._skip(tokens, memory.position[0], stop)
            self._skipped_bytes = ids.bytes_done
        elif memory.position[0]:
            self._text = None
        tokens = islice(tokens, self.args.max_tokens)
        self.progress.passing("reading ...")
        started = time.monotonic()
        for chunk in read(self.session.model, self._noted(tokens), memory):
            self.tally.add(chunk)
            if self._text is not None:
                self._text.add(self._taken)
            self._compare(chunk)
            self.tally.seconds = time.monotonic() - started
            self.progress.update(self._line(ids))
            if stop.requested:
                break
        self.interrupted = stop.requested

    def _skip(self, tokens: Iterator[int], read_before: int, stop: Any) -> None:
        """Go past what the memory has read, which must be the same text."""
        from transformerfam.memory_file import memory_header

        began = (memory_header(self.args.load) or {}).get("text")
        if began == "":
            raise UserError(
                f"{self.args.load} has read other things besides a text, so where {self.source.name} "
                "goes on is not known; leave --continue out."
            )
        self.progress.passing(f"finding token {read_before:,} ...")
        found, text = 0, TextRead()
        while ids := list(islice(tokens, min(_PIECE, read_before - found))):
            found += len(ids)
            text.add(ids)
        if stop.requested:
            return
        if found < read_before or began not in (None, text.fingerprint()):
            raise UserError(
                f"{self.source.name} is not the text that {self.args.load} has begun, of which it has "
                f"read {read_before:,} tokens; leave --continue out."
            )
        self._text = text

    def _noted(self, tokens: Iterator[int]) -> Iterator[int]:
        """The tokens, of which those of a chunk are kept until it is done."""
        return (self._taken.append(token) or token for token in tokens)  # type: ignore[func-returns-value]

    def _compare(self, chunk: Chunk) -> None:
        for variant in self.variants:
            if variant.memory is chunk.memory:
                variant.add(chunk.position, chunk.losses.tolist())
                variant.tokens += chunk.tokens
            else:
                self.progress.passing(f"{chunk.position:,} tokens   {variant.name} ...")
                variant.read(self._taken)
        self._taken.clear()

    def _save(self) -> None:
        from transformerfam.memory_file import MemoryFileError, save_memory

        text = "" if self._text is None else self._text.fingerprint()
        try:
            save_memory(self.session.memory, self.args.save, self.session.model, text=text)
            self.saved = True
        except MemoryFileError as error:
            self.not_saved = error

    def _line(self, ids: TokenIds) -> str:
        tally, memory = self.tally, self.session.memory
        parts = [
            f"{tally.tokens:,} tokens",
            f"{tally.rate:,.0f}/s",
            f"loss {report.loss(tally.last)} (mean {report.loss(tally.loss)})",
            f"memory {report.size(memory.nbytes)}",
        ]
        if tally.resident is not None:
            parts.append(f"RAM {report.size(report.resident_bytes() or 0)}")
        share = self._share(ids)
        if share is not None:
            left = tally.seconds * (1 - share) / share
            parts.insert(
                1, f"{share:.0%}, {report.duration(left)} left" if share < 0.995 else "100%"
            )
        return "   ".join(parts)

    def _share(self, ids: TokenIds) -> float | None:
        """How much of what there is to read was read; None if nobody knows."""
        shares = []
        if self.args.max_tokens:
            shares.append(self.tally.tokens / self.args.max_tokens)
        if self.source.bytes_total:
            done = ids.bytes_done - self._skipped_bytes
            shares.append(done / max(1, self.source.bytes_total - self._skipped_bytes))
        return min(1.0, max(shares)) if shares and max(shares) > 0 else None

    # ---- reporting

    def summary(self) -> str:
        """What a person wants to know at the end."""
        tally, session = self.tally, self.session
        position = session.memory.position[0]
        before = "" if position == tally.tokens else f", {position:,} with those read before"
        stopped = ", stopped by Ctrl-C" if self.interrupted else ""
        pairs = [("text", f"{self.source.name}, {tally.tokens:,} tokens{before}{stopped}")]
        pairs.append(("model", f"{session.name}: {session.config.describe()}"))
        if tally.loss is not None:
            shown = f"{tally.loss:.3f} nats a token (perplexity {tally.perplexity:,.1f})"
            pairs.append(("loss", shown))
        pace = "for all ways below" if self.variants else f"{tally.rate:,.0f} tokens/s"
        pairs.append(("time", f"{report.duration(tally.seconds)}, {pace}"))
        pairs.append(("memory", report.size(session.memory.nbytes) + self._growth()))
        if tally.resident is not None:
            pairs.append(("RAM", f"{report.size(tally.resident)} for the whole process"))
        if self.saved:
            pairs.append(("saved", self.args.save))
        text = report.facts(pairs)
        if self.variants:
            from transformerfam.commands._compare import comparison_table

            table = comparison_table(self.variants)
            text += f"\n\nLoss in nats a token, lower is better\n\n{table}"
        return text

    def _growth(self) -> str:
        if self.session.config.slots is None:
            return ", and it grows with the text"
        if self.session.config.through_stack:
            return " now, and by the place in a block more or less, after any length of text"
        return ", after any length of text"

    def as_json(self, answers: list[dict[str, str]]) -> dict[str, Any]:
        """The keys of --json."""
        tally, session = self.tally, self.session
        found: dict[str, Any] = {
            "text": self.source.name,
            "model": session.name,
            "trained": session.trained,
            "config": session.config.to_dict(),
            "tokens": tally.tokens,
            "position": session.memory.position[0],
            "scored": tally.scored,
            "nats": report.finite(tally.nats),
            "loss": report.finite(tally.loss),
            "perplexity": None if tally.loss is None else report.finite(tally.perplexity),
            "seconds": round(tally.seconds, 3),
            "tokens_per_second": round(tally.rate, 1),
            "memory_bytes": session.memory.nbytes,
            "resident_bytes": tally.resident,
            "saved": self.args.save if self.saved else None,
            "interrupted": self.interrupted,
            "answers": answers,
        }
        if self.variants:
            from transformerfam.commands._compare import comparison_json

            found["compare"] = comparison_json(self.variants)
        return found

    # ---- asking

    def _answer(self, question: str) -> Iterator[str]:
        from transformerfam.turns import answer

        session = self.session
        return answer(
            session.model,
            session.tokenizer,
            session.memory.fork(),
            question,
            max_new_tokens=self.args.max_new_tokens,
        )

    def print_json(self) -> None:
        """The result as one object, whatever becomes of the answers."""
        answers: list[dict[str, str]] = []
        try:
            for question in [] if self.interrupted else self.args.ask:
                said = "".join(self._answer(question)).strip()
                answers.append({"question": question, "answer": said})
        finally:
            print(json.dumps(self.as_json(answers)), flush=True)

    def print_answers(self) -> None:
        """The answers as they are made."""
        for question in [] if self.interrupted else self.args.ask:
            print(f"\n> {question}", flush=True)
            for part in self._answer(question):
                print(part, end="", flush=True)
            print()
