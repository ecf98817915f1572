"""`fam chat`: a conversation whose every turn goes into one memory."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from transformerfam import report
from transformerfam.commands import _options as options
from transformerfam.errors import UserError

if TYPE_CHECKING:
    from transformerfam.commands._session import Session
    from transformerfam.stream import Sampling
    from transformerfam.turns import Turns

HELP = "talk with a model that keeps the whole conversation in one memory"

COMMANDS = """\
  /save FILE   save the memory
  /load FILE   go on with the conversation in a saved memory
  /reset       forget everything
  /info        what the memory holds
  /quit        leave, as the end of the input does
"""
EPILOG = f"""\
in the conversation:
{COMMANDS}
examples:
  fam read book.txt --save book.fam
  fam chat --load book.fam --save talk.fam
  fam chat --load talk.fam --continue
  echo "Who is the captain?" | fam chat --load book.fam --temperature 0
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fam chat`."""
    parser.description = (
        "Talk with a model in its chat template. Only what is new in a turn is read; the rest is in "
        "the memory. One line is one turn, typed or piped. Ctrl-C ends an answer, or the "
        "conversation if there is none."
    )
    parser.epilog = EPILOG
    parser.add_argument(
        "--system",
        metavar="TEXT",
        type=options.text,
        help="a system message for the start of a conversation",
    )
    options.add_quiet(parser)
    options.add_sampling(parser, max_new_tokens=400)
    options.add_memory(parser)
    parser.add_argument(
        "--continue",
        dest="continues",
        action="store_true",
        help="the memory of --load holds a conversation: go on with it. Otherwise what was read is a "
        "text, and a conversation about it begins, with the template's system message if it has one",
    )
    options.add_model(parser, with_memory=True)
    options.add_geometry(parser)


def run(args: argparse.Namespace) -> int:
    """Open the model and talk."""
    from transformerfam.commands import _session
    from transformerfam.memory_file import save_memory
    from transformerfam.turns import Turns

    if args.continues and (not args.load or args.system is not None):
        raise UserError("--continue goes on with the conversation of --load, without a --system.")
    sampling = options.sampling(args)
    _session.check_can_save(args.save)
    progress = report.Progress(quiet=args.quiet)
    session = _session.open_session(args, progress)
    turns = Turns(session.tokenizer, system=args.system)
    if not turns.has_template:
        progress.note(
            f"{session.name} has no chat template; turns are put to it as questions and answers."
        )
    chat = Chat(session, turns, sampling, args.max_new_tokens, progress)
    chat.first = not args.continues
    try:
        return chat.run()
    except KeyboardInterrupt:
        print()
        return _session.INTERRUPTED
    finally:  # whatever ends it, the turns before are kept
        if args.save and chat.changed:
            save_memory(session.memory, args.save, session.model, text="")
            progress.note(f"saved {args.save}")
        elif args.save:  # an older conversation may be there
            progress.note(f"Nothing was said, and {args.save} was not written.")


class Chat:
    """The loop of turns and commands."""

    def __init__(
        self,
        session: Session,
        turns: Turns,
        sampling: Sampling,
        max_new_tokens: int,
        progress: report.Progress,
    ) -> None:
        self.session, self.turns, self.sampling = session, turns, sampling
        self.max_new_tokens, self.progress = max_new_tokens, progress
        self.terminal = sys.stdin is not None and sys.stdin.isatty()
        # Whether the next turn begins a conversation; what was read before is then a text.
        self.first = True
        self.changed = False  # the memory, since the start
        self._commands: dict[str, Callable[[str], None]] = {
            "/save": self._save,
            "/load": self._load,
            "/reset": self._reset,
            "/info": self._info,
        }

    def run(self) -> int:
        """Take turns until the input ends or /quit."""
        if self.terminal:
            self.progress.note("/info /save FILE /load FILE /reset /quit; Ctrl-C ends an answer")
        while (line := self._line()) is not None:
            word, _, rest = line.partition(" ")
            if word == "/quit":
                break
            if not line:
                continue
            if line.startswith("/"):
                self._command(word, rest.strip())
            else:
                self._turn(line)
        return 0

    def _line(self) -> str | None:
        """The next line without its ends; None at the end of the input."""
        if self.terminal:
            import readline  # noqa: F401  # importing it gives input() line editing and history

            try:
                return input("> ").strip()
            except EOFError:
                print()
                return None
        if sys.stdin is None:
            raise UserError("There is no standard input to read turns from.")
        line = sys.stdin.readline()
        return line.strip() if line else None

    def _turn(self, text: str) -> None:
        from transformerfam.commands._session import StopOnInterrupt
        from transformerfam.turns import answer

        forget_the_turn = self.session.memory.undo()
        try:
            with StopOnInterrupt() as stop:
                for part in answer(
                    self.session.model,
                    self.session.tokenizer,
                    self.session.memory,
                    text,
                    turns=self.turns,
                    first=self.first,
                    sampling=self.sampling,
                    max_new_tokens=self.max_new_tokens,
                    stopped=lambda: stop.requested,
                ):
                    print(part, end="", flush=True)
        except (UserError, ValueError) as error:
            forget_the_turn()
            self._say(str(error))
            return
        except BaseException:
            forget_the_turn()  # half a turn is none
            raise
        self.first, self.changed = False, True
        print("\n", flush=True)

    # ---- commands

    def _command(self, word: str, rest: str) -> None:
        if word not in self._commands:
            self._say(f"{word} is no command; there are {', '.join(self._commands)} and /quit.")
            return
        try:
            self._commands[word](rest)
        except (UserError, ValueError, OSError) as error:
            self._say(str(error))

    def _save(self, path: str) -> None:
        from transformerfam.commands._session import check_can_save
        from transformerfam.memory_file import save_memory

        if not path:
            raise UserError("/save needs the name of a file.")
        path = os.path.expanduser(path)  # no shell has done it
        check_can_save(path)
        save_memory(self.session.memory, path, self.session.model, text="")
        self._say(f"saved {path} ({report.size(Path(path).stat().st_size)})")

    def _load(self, path: str) -> None:
        from transformerfam.memory import Memory

        if not path:
            raise UserError("/load needs the name of a file.")
        self.session.memory = Memory.load(os.path.expanduser(path), self.session.model)
        self.first, self.changed = self.session.memory.position[0] == 0, True
        self._say(f"loaded {path}, a memory of {self.session.memory.position[0]:,} tokens")

    def _reset(self, _: str) -> None:
        from transformerfam.memory import Memory

        self.session.memory = Memory.for_model(self.session.model)
        self.first = self.changed = True
        self._say("The memory is empty.")

    def _info(self, _: str) -> None:
        memory = self.session.memory
        self._say(
            f"{memory.position[0]:,} tokens read, memory {report.size(memory.nbytes)}; "
            f"{self.session.name}: {self.session.config.describe()}"
        )

    def _say(self, line: str) -> None:
        """What the program says, and not the model, is no output: it goes to standard error."""
        print(line, file=sys.stderr, flush=True)
