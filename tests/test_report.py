"""Numbers for people, tables, and a progress line that behaves on a terminal and in a log."""

from __future__ import annotations

import io
import math

import pytest

from transformerfam import report


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (999.6, "1.00 k"),
        (12_345, "12.3 k"),
        (99_949, "99.9 k"),
        (99_960, "100 k"),
        (1.5e9, "1.50 G"),
        (2e18, "2000 P"),
    ],
)
def test_short_numbers_have_three_digits(number: float, text: str) -> None:
    assert report.short(number) == text


def test_sizes_durations_and_losses() -> None:
    assert [report.size(n) for n in (10, 47_200_000)] == ["10 bytes", "47.2 MB"]
    times = (0.3, 9.96, 59.6, 336, 3599.6, 7500)
    shown = ["0.3 s", "10 s", "1 min 00 s", "5 min 36 s", "1 h 00 min", "2 h 05 min"]
    assert [report.duration(t) for t in times] == shown
    assert [report.loss(x) for x in (None, 3.4119)] == ["–", "3.412"]
    assert report.perplexity(1) == pytest.approx(math.e)
    assert report.perplexity(1000) == math.inf
    assert [report.tokens_short(n) for n in (4096, 10**6, 1 << 20, 1234)] == [
        *("4k", "1M", "1M", "1,234"),
    ]


def test_a_table_has_its_columns_in_line() -> None:
    text = report.table(["tokens", "loss"], [["1–10", "3.4"], ["11–20", "12.0"]])
    assert text == "tokens   loss\n1–10      3.4\n11–20    12.0"
    assert report.facts([("a", "1"), ("long", "2")]) == "a      1\nlong   2"


def test_resident_memory_is_that_of_a_process_or_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    resident = report.resident_bytes()
    assert resident is None or 10**7 < resident < 10**12
    monkeypatch.setattr("pathlib.Path.read_text", lambda _: "no number")
    assert report.resident_bytes() is None


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_one_line_is_written_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    screen = Terminal()
    progress = report.Progress(stream=screen)
    progress.passing("loading ...")
    progress.update("10 tokens   5/s   far too much to show", now=True)
    progress.note("a remark")
    progress.clear()
    progress.clear()
    clear = "\r\x1b[K"
    expected = ["", "loading ...", "10 tokens   5/s", "a remark\n10 tokens   5/s", ""]
    assert screen.getvalue().split(clear) == expected


def test_a_dumb_terminal_gets_lines_as_a_log_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    screen = Terminal()
    progress = report.Progress(stream=screen)
    progress.passing("loading ...")
    progress.update("10 tokens", now=True)
    assert screen.getvalue() == "10 tokens\n"


def test_in_a_log_lines_come_now_and_then() -> None:
    log = io.StringIO()
    progress = report.Progress(stream=log, interval=1000)
    progress.passing("loading ...")
    for step in range(5):
        progress.update(f"step {step}")
    progress.note("a remark")
    progress.clear()
    assert log.getvalue() == "step 0\na remark\n"


def test_a_run_goes_on_when_nobody_reads_how_far_it_is() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    for stream in (Gone(), type("GoneTerminal", (Gone, Terminal), {})()):
        progress = report.Progress(stream=stream)
        progress.update("a", now=True)
        progress.note("b")
        progress.clear()


def test_quiet_is_quiet() -> None:
    for stream in (io.StringIO(), Terminal()):
        progress = report.Progress(stream=stream, quiet=True)
        progress.passing("a")
        progress.update("b", now=True)
        progress.note("c")
        progress.clear()
        assert stream.getvalue() == ""
