"""Numbers for people: short forms, tables, and a line of progress. Knows no torch."""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TextIO


def count(number: int) -> str:
    """12,345"""
    return f"{number:,}"


def short(number: float) -> str:
    """1.23 M: three digits and a unit of thousand, million, ..."""
    units = ["", " k", " M", " G", " T", " P"]
    while abs(number) >= 999.5 and len(units) > 1:
        number /= 1000
        del units[0]
    unit = units[0]
    digits = 0 if not unit or abs(number) >= 99.95 else 1 if abs(number) >= 9.995 else 2
    return f"{number:.{digits}f}{unit}"


def size(nbytes: float) -> str:
    """47.2 MB, in powers of ten."""
    text = short(nbytes)
    return text + "B" if " " in text else text + " bytes"


def duration(seconds: float) -> str:
    """48 s, 5 min 36 s, 2 h 05 min"""
    whole = round(seconds)
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def loss(nats: float | None) -> str:
    """3.412, or a dash where nothing was scored."""
    return "–" if nats is None else f"{nats:.3f}"


def perplexity(nats: float) -> float:
    """exp of the mean loss; infinite where that is too large for a float."""
    return math.exp(nats) if nats < 700 else math.inf


def finite(number: float | None) -> float | None:
    """A number that JSON has; None for one that it has not."""
    return number if number is not None and math.isfinite(number) else None


def bits_per_byte(nats: float, nbytes: float) -> float:
    """Of a text, or a part of one, that took so many nats in all."""
    return nats / math.log(2) / max(1.0, nbytes)


def tokens_short(tokens: int) -> str:
    """4k for 4096, 1M for 1048576 and round decimal numbers alike; else with separators."""
    for unit, letter in ((1 << 20, "M"), (1 << 10, "k"), (10**6, "M"), (10**3, "k")):
        if tokens >= unit and tokens % unit == 0:
            return f"{tokens // unit}{letter}"
    return count(tokens)


def resident_bytes() -> int | None:
    """Memory of this process that is in RAM now; None where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError, AttributeError):
        return None


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, indent: str = "") -> str:
    """Columns in line: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        others = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
        return (indent + "   ".join((first, *others))).rstrip()

    return "\n".join(line(cells) for cells in (header, *rows))


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, without a line's end behind it."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(c.replace('|', chr(92) + '|') for c in r)} |" for r in lines)


def facts(pairs: Sequence[tuple[str, str]], *, indent: str = "") -> str:
    """Names in one column, what there is to say about them in the other."""
    width = max(len(name) for name, _ in pairs)
    return "\n".join(f"{indent}{name.ljust(width)}   {value}".rstrip() for name, value in pairs)


def lead_nowhere(stream: TextIO) -> None:
    """Let a stream that nobody reads any more take what Python flushes into it when it exits."""
    with suppress(OSError, ValueError):  # a stream may have no descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Progress:
    """A line that says how far a long run has come.

    On a terminal one line that is written over; elsewhere a line of its own now and then, so that a
    log file stays readable. If whoever reads it goes away, the run goes on without.

    Args:
        quiet: show nothing.
        stream: where to; standard error by default.
        interval: seconds between two lines where there is no terminal.
    """

    _TERMINAL_INTERVAL = 0.1

    def __init__(
        self, *, quiet: bool = False, stream: TextIO | None = None, interval: float = 10.0
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        # A dumb terminal cannot write over a line.
        dumb = os.environ.get("TERM") == "dumb"
        self.terminal = self._stream.isatty() and not quiet and not dumb
        self._quiet = quiet
        self._interval = self._TERMINAL_INTERVAL if self.terminal else interval
        self._last = -math.inf
        self._line = ""

    def update(self, line: str, *, now: bool = False) -> None:
        """Show `line`, if the last one is old enough or if it must be shown `now`."""
        if self._quiet or (not now and time.monotonic() - self._last < self._interval):
            return
        self._last = time.monotonic()
        if self.terminal:
            self._line = _fitting(line, shutil.get_terminal_size().columns - 1)
            self._write(f"\r\x1b[K{self._line}")
        else:
            self._write(f"{line}\n")

    def passing(self, line: str) -> None:
        """A line for those who wait at a terminal, and for nobody else."""
        if self.terminal:
            self.update(line, now=True)

    def note(self, line: str) -> None:
        """A line that stays, above the one that changes."""
        if self._quiet:
            return
        clear, again = ("\r\x1b[K", self._line) if self.terminal and self._line else ("", "")
        self._write(f"{clear}{line}\n{again}")

    def clear(self) -> None:
        """Take the changing line off the terminal."""
        if self.terminal and self._line:
            self._write("\r\x1b[K")
        self._line = ""

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            self._quiet, self.terminal = True, False
            lead_nowhere(self._stream)


def _fitting(line: str, width: int) -> str:
    """As many of the facts in a line, which stand apart by two blanks, as fit into the width."""
    while len(line) > width and "  " in line:
        line = line.rpartition("  ")[0].rstrip()
    return line[: max(width, 0)]
