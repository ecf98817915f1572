"""The command line, `fam`. Knows the commands by their modules and errors by their kinds.

Exit codes: 0 done; 1 something failed that is not the user's doing; 2 arguments, input or files that
cannot be used; 130 stopped by Ctrl-C; 141 whoever read the output went away.
"""

from __future__ import annotations

import argparse
import os
import pkgutil
import shutil
import sys
import textwrap
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

from transformerfam import __version__, commands
from transformerfam.errors import UserError
from transformerfam.report import lead_nowhere

DEBUG = "TRANSFORMERFAM_DEBUG"
_ORDER = (
    "read",
    "generate",
    "chat",
    "train",
    "merge",
    "eval",
    "plot",
    "info",
    "variants",
    "masks",
    "inspect",
    "demo",
    "bench",
    "reproduce",
)
_DOCS_WIDTH = 90
_FAILED, _REFUSED, _INTERRUPTED, _NO_READER = 1, 2, 130, 141

_DESCRIPTION = (
    "Read texts of any length with a pretrained language model and a memory of fixed size."
)
_EPILOG = f"""\
fam COMMAND --help says more about a command.

exit codes:
  0    done
  1    something failed that is not your doing (a bug, no memory left, a full disk)
  2    arguments, input or files that cannot be used; one sentence says why
  130  stopped by Ctrl-C
  141  whoever read the output went away

{DEBUG}=1 shows where an error came from.
"""


def command_names() -> list[str]:
    """The commands, which are the modules of `transformerfam.commands`, in the order of the help."""
    found = {m.name for m in pkgutil.iter_modules(commands.__path__) if not m.name.startswith("_")}
    return [name for name in _ORDER if name in found] + sorted(found - set(_ORDER))


def build_parser(
    names: Sequence[str] | None = None, *, width: int | None = None
) -> argparse.ArgumentParser:
    """The parser of `fam`.

    Args:
        names: the commands to know; only their modules are imported. All by default.
        width: columns of the help; by default those of the terminal, within reason.
    """
    columns = width or max(60, min(shutil.get_terminal_size().columns - 2, 100))

    def formatter(prog: str) -> argparse.HelpFormatter:
        return _Formatter(prog, max_help_position=28, width=columns)

    parser = argparse.ArgumentParser(
        prog="fam",
        usage="fam COMMAND [options]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"transformerfam {__version__}")
    adder = parser.add_subparsers(
        title="commands", prog="fam", dest="command", metavar="COMMAND", required=True
    )
    for name in command_names() if names is None else names:
        module = _module(name)
        sub = adder.add_parser(
            name, help=module.HELP, formatter_class=formatter, allow_abbrev=False
        )
        module.add_arguments(sub)
        sub.description = sub.description or module.HELP.capitalize() + "."
        sub.usage = _usage(sub)
        sub.set_defaults(_run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `fam` with `argv` and return the exit code. Prints; never raises for what a user did."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _prepare_streams()
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        return _NO_READER
    except KeyboardInterrupt:
        return _tell("Stopped.", _INTERRUPTED)
    except (UserError, ValueError) as error:
        # ValueError is how the library refuses what a caller asked for.
        return _tell(f"fam: {_one_line(error)}", _REFUSED)
    except Exception as error:
        return _tell(
            f"fam: {type(error).__name__}: {_one_line(error)} ({DEBUG}=1 says where)", _FAILED
        )
    finally:
        _let_go()


def _run(arguments: Sequence[str]) -> int:
    # One command's module is enough to run it; a first word that is none needs the whole help.
    known = [arguments[0]] if arguments and arguments[0] in command_names() else None
    try:
        with warnings.catch_warnings():
            if not os.environ.get(DEBUG):
                warnings.simplefilter("ignore")
            args = build_parser(known).parse_args(arguments)
            return int(args._run(args))
    except SystemExit as stop:  # from argparse, which has printed help or what is wrong
        return stop.code if isinstance(stop.code, int) else _REFUSED


def write_docs(path: Path) -> None:
    """Write the help of every command to a Markdown file."""
    path.write_text(docs(), encoding="utf-8")


def docs() -> str:
    """The help of every command as Markdown, the same on every terminal."""
    parser = build_parser(width=_DOCS_WIDTH)
    parts = [
        "# Command line\n",
        "<!-- Generated by: python -m transformerfam.cli --write-docs docs/cli.md -->\n",
        _fenced(parser.format_help()),
    ]
    choices = next(
        action.choices
        for action in parser._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    for name, sub in choices.items():
        parts += [f"## fam {name}\n", _fenced(sub.format_help())]
    return "\n".join(parts)


# ---- parts


class _Formatter(argparse.HelpFormatter):
    """Fills a paragraph to the width; leaves text of several lines as it was written."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        # The default would break --sink-tokens after its hyphen.
        return textwrap.wrap(text, width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = text.splitlines() if "\n" in text else self._split_lines(text, width)
        return "\n".join(indent + line for line in lines)


def _module(name: str) -> ModuleType:
    return import_module(f"{commands.__name__}.{name}")


def _usage(parser: argparse.ArgumentParser) -> str:
    """`fam read [options] FILE`: the options stand below, in groups."""
    formatter = argparse.HelpFormatter(parser.prog)
    positionals = [a for a in parser._actions if not a.option_strings]
    words = [formatter._format_args(a, str(a.metavar or a.dest)) for a in positionals]
    return " ".join([parser.prog, "[options]", *words])


def _fenced(text: str) -> str:
    return f"```text\n{text.rstrip()}\n```\n"


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no reason given"


def _tell(line: str, code: int) -> int:
    """Say why it ends, and where if that was asked for."""
    if os.environ.get(DEBUG):
        traceback.print_exc()
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        lead_nowhere(sys.stderr)
    return code


def _let_go() -> None:
    """What could not be written is not tried again when Python exits."""
    try:
        sys.stdout.flush()
    except OSError:
        lead_nowhere(sys.stdout)


def _prepare_streams() -> None:
    """What a terminal's encoding lacks, or a typed line that is not of it, is no error.

    Nor is a closed stream: nothing else is opened in its place, and what goes there goes nowhere.
    """
    while (place := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(place)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  # as long as the process
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write-docs"] and len(sys.argv) == 3:
        write_docs(Path(sys.argv[2]))
    else:
        sys.exit(main())
