"""`fam read` as a person runs it: reports, memories, comparisons, Ctrl-C, long pipes."""

from __future__ import annotations

import itertools
import json
import math
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import CONFIG, GEOMETRY, TEXT, Run, loaded, refused, start
from families import converted
from test_text import PROSE

from transformerfam import cli, models, report, stream
from transformerfam.commands import _session
from transformerfam.commands._compare import RangeLosses
from transformerfam.commands.read import EPILOG, Reading
from transformerfam.config import FamConfig
from transformerfam.conversion import twin
from transformerfam.memory import Memory
from transformerfam.memory_file import MemoryFileError
from transformerfam.stream import read
from transformerfam.text import TokenIds


def test_read_reports_what_the_library_computes(fam: Run, folder: str, book: str) -> None:
    code, out, err = fam("read", book, "--json")
    assert code == 0
    result = json.loads(out)
    model, tokenizer = loaded(folder)
    memory = Memory.for_model(model)
    chunks = list(read(model, TokenIds(tokenizer, [TEXT]), memory))
    assert result["tokens"] == result["position"] == memory.position[0]
    assert result["scored"] == result["tokens"] - 1
    assert result["nats"] == pytest.approx(sum(c.nats for c in chunks), rel=1e-5)
    assert result["loss"] == pytest.approx(result["nats"] / result["scored"])
    assert result["memory_bytes"] == memory.nbytes
    assert FamConfig.from_dict(result["config"]) == CONFIG
    assert not result["trained"]
    assert f"{result['tokens']:,} tokens   100%   " in err
    assert "loss" in err


def test_the_keys_of_json_are_documented(fam: Run, book: str, tmp_path: Path) -> None:
    code, out, _ = fam("read", book, "--json", "--compare", "--ask", "Who?", "--max-tokens", "40")
    result = json.loads(out)
    assert code == 0

    described = EPILOG.partition("keys of --json:")[2]
    documented = {
        key
        for line in described.splitlines()
        if line.startswith("  ") and line[2] != " "
        for key in re.split(r",\s*", line[2:].partition("   ")[0].strip())
    }
    assert documented == set(result)
    assert set(result["answers"][0]) == {"question", "answer"}
    for part in (*result["compare"][0], *result["compare"][0]["ranges"][0]):
        assert part in described


def test_the_summary_is_for_people(fam: Run, book: str, tmp_path: Path) -> None:
    saved = str(tmp_path / "book.fam")
    code, out, err = fam("read", book, "--quiet", "--save", saved)
    assert (code, err) == (0, "")
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert list(lines) == ["text", "model", "loss", "time", "memory", "RAM", "saved"]
    assert lines["text"].startswith(book)
    assert lines["model"] == "tiny: BSWA, blocks of 16 and the 1 before, 4 sinks, no feedback"
    assert lines["saved"] == saved


@pytest.mark.parametrize("extra", [[], ["--fam-length", "4"]])
def test_a_saved_memory_goes_on_as_if_never_stopped(
    fam: Run, book: str, tmp_path: Path, extra: list[str]
) -> None:
    whole = json.loads(fam("read", book, "--json", *extra)[1])
    saved = str(tmp_path / "book.fam")
    first = json.loads(
        fam("read", book, "--json", "--save", saved, "--max-tokens", "333", *extra)[1]
    )
    # No geometry this time: a memory brings its own.
    code, out, _ = fam("read", book, "--json", "--load", saved, "--continue")
    rest = json.loads(out)
    assert code == 0
    assert rest["config"] == whole["config"]
    assert first["tokens"] + rest["tokens"] == rest["position"] == whole["position"]
    assert rest["scored"] == rest["tokens"]
    assert first["nats"] + rest["nats"] == pytest.approx(whole["nats"], rel=1e-5)
    # The rest of the text as a text of its own, cut where a word begins.
    cut = TEXT.index(" grey")
    Path(book).write_text(TEXT[:cut])
    one = json.loads(fam("read", book, "--json", "--save", saved, *extra)[1])
    two = json.loads(fam("read", "-", "--json", "--load", saved, stdin=TEXT[cut:])[1])
    assert one["nats"] + two["nats"] == pytest.approx(whole["nats"], rel=1e-5)


def test_continue_wants_the_text_that_was_begun(fam: Run, book: str, tmp_path: Path) -> None:
    refused(fam("read", book, "--continue"), "--load")
    saved = str(tmp_path / "book.fam")
    assert fam("read", book, "--save", saved)[0] == 0
    Path(book).write_text("Another, shorter.")
    refused(fam("read", book, "--quiet", "--load", saved, "--continue"), "not the text")
    Path(book).write_text(TEXT.replace("the", "a"))  # as long, and changed
    refused(fam("read", book, "--quiet", "--load", saved, "--continue"), "not the text")
    Path(book).write_text(f"{TEXT} And more.")
    assert fam("read", book, "--load", saved, "--continue", "--save", saved)[0] == 0
    Path(book).write_text(f"{TEXT} And more. And the rest.")
    assert fam("read", book, "--load", saved, "--continue", "--save", saved)[0] == 0


@pytest.mark.parametrize("command", ["chat", "generate", "read"])
def test_where_a_text_goes_on_is_not_known_of_a_memory_of_other_things(
    command: str, fam: Run, book: str, tmp_path: Path
) -> None:
    saved, more = str(tmp_path / "book.fam"), str(tmp_path / "more.fam")
    fam("read", book, "--save", saved, "--max-tokens", "100")
    given = {"chat": [], "generate": ["Ann"], "read": [book, "--max-tokens", "9"]}[command]
    new = [] if command == "read" else ["--max-new-tokens", "5"]
    assert fam(command, *given, "--load", saved, "--save", more, *new, stdin="Who?\n")[0] == 0
    refused(fam("read", book, "--quiet", "--load", more, "--continue"), "other things")


def test_ctrl_c_while_the_place_is_looked_for_says_nothing_of_the_text(
    fam: Run, book: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, again = str(tmp_path / "book.fam"), tmp_path / "again.fam"
    fam("read", book, "--save", saved, "--max-tokens", "300")

    def until(stop: _session.StopOnInterrupt, source: Any) -> Iterator[str]:
        stop.requested = True
        return iter(())

    monkeypatch.setattr(_session.StopOnInterrupt, "until", until)
    options = ["--load", saved, "--continue", "--save", str(again)]
    code, _, err = fam("read", book, "--quiet", *options)
    assert (code, err) == (130, "") and not again.exists()


def test_whatever_ends_the_reading_what_was_read_is_saved(
    fam: Run, book: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, advance, calls = tmp_path / "book.fam", stream._advance, itertools.count()

    def fails(*args: Any, **options: Any) -> Any:
        if next(calls):
            raise RuntimeError("out of memory")
        return advance(*args, **options)

    Path(book).write_text(TEXT * 40)
    monkeypatch.setattr(stream, "_advance", fails)
    code, _, err = fam("read", book, "--save", str(saved))
    assert code == 1 and "out of memory" in err and "are saved in" in err
    monkeypatch.undo()
    assert json.loads(fam("info", str(saved), "--json")[1])["position"][0] > 0


def test_numbers_that_json_lacks_are_null() -> None:
    assert [report.finite(x) for x in (1.5, math.nan, math.inf, None)] == [1.5, None, None, None]


def test_the_numbers_are_there_whatever_becomes_of_the_answers(
    fam: Run, book: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(*_: Any, **__: Any) -> Iterator[str]:
        yield "half"
        raise KeyboardInterrupt

    monkeypatch.setattr("transformerfam.turns.answer", answer)
    code, out, _ = fam("read", book, "--json", "--ask", "Who?")
    assert code == 130 and json.loads(out)["answers"] == []


def test_a_name_may_be_as_long_as_names_can_be(fam: Run, book: str, tmp_path: Path) -> None:
    saved = tmp_path / ("ж" * 127)
    assert fam("read", book, "--save", str(saved))[0] == 0 and saved.is_file()
    refused(fam("read", book, "--quiet", "--save", str(tmp_path / ("ж" * 128))), "cannot be saved")
    link = tmp_path / "link.fam"
    link.symlink_to(tmp_path / "nowhere" / "book.fam")
    refused(fam("read", book, "--quiet", "--save", str(link)), "there is no folder")


def test_questions_are_asked_on_a_copy(fam: Run, folder: str, book: str, tmp_path: Path) -> None:
    with_questions, without = tmp_path / "asked.fam", tmp_path / "plain.fam"
    code, out, _ = fam(
        "read", book, "--save", str(with_questions), "--ask", "Who is Ann?", "--ask", "Why?",
        "--max-new-tokens", "8",
    )  # fmt: skip
    assert code == 0
    assert "\n> Who is Ann?\n" in out
    assert "\n> Why?\n" in out
    fam("read", book, "--save", str(without))
    model, _ = loaded(folder)
    a, b = (Memory.load(path, model) for path in (with_questions, without))
    assert a.position == b.position
    for (name, one), (_, other) in zip(a.tensors(), b.tensors(), strict=True):
        assert torch.equal(one, other), name


def test_untrained_feedback_is_told(fam: Run, folder: str, book: str, tmp_path: Path) -> None:
    assert "untrained" not in fam("read", book)[2]
    assert "untrained" in fam("read", book, "--fam-length", "4")[2]
    assert fam("read", book, "--fam-length", "4", "--quiet")[2] == ""
    model, tokenizer = loaded(folder, CONFIG.replace(fam_length=4))
    model.save_pretrained(tmp_path / "trained")
    tokenizer.save_pretrained(tmp_path / "trained")
    code, out, err = fam("read", book, "--json", model=str(tmp_path / "trained"))
    assert code == 0
    assert "untrained" not in err
    assert json.loads(out)["trained"]


@pytest.mark.parametrize("place", ["no/folder/m.fam", ".", "book.txt"])
def test_a_bad_place_to_save_is_refused_before_anything_is_read(
    fam: Run, book: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("loaded a model"))
    refused(fam("read", book, "--save", str(tmp_path / place)))
    assert Path(book).read_bytes() == TEXT.encode()


@pytest.mark.parametrize("content", [b"", b"\0\1", b"caf\xe9", None])
def test_what_is_no_text_is_refused_before_a_model_is_loaded(
    fam: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("loaded a model"))
    path = tmp_path / "input"
    if content is not None:
        path.write_bytes(content)
    refused(fam("read", str(path), "--quiet"), str(path))


def test_a_late_bad_byte_saves_what_came_before(fam: Run, tmp_path: Path) -> None:
    path, saved = tmp_path / "log", str(tmp_path / "log.fam")
    path.write_bytes(PROSE.encode() * 400 + b"\xff")
    refused(fam("read", str(path), "--quiet", "--save", saved), "cannot be decoded", "are saved in")
    assert fam("read", str(path), "--lenient", "--load", saved, "--continue")[0] == 0


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--load", "none.fam"], ["There is no memory file none.fam"]),
        (["--compare", "--load", "none.fam"], ["--compare"]),
        (["--sink-tokens", "17"], ["sink_tokens"]),
        (["--device", "nowhere"], ["nowhere"]),
    ],
)
def test_other_refusals(fam: Run, book: str, args: list[str], words: list[str]) -> None:
    refused(fam("read", book, "--quiet", *args), *words)


def test_a_memory_of_another_geometry_or_kind_of_file_is_refused(
    fam: Run, book: str, tmp_path: Path
) -> None:
    saved = str(tmp_path / "book.fam")
    fam("read", book, "--save", saved)
    refused(fam("read", book, "--load", saved, "--block-size", "32"), "block_size")
    refused(fam("read", book, "--load", book))
    assert cli.main(["read", book, "--model", str(tmp_path)]) == 2


# ---- compare


def test_compare_reads_each_way_as_if_alone(fam: Run, book: str, tmp_path: Path) -> None:
    limit, saved = 100, str(tmp_path / "book.fam")
    code, out, _ = fam(
        "read", book, "--json", "--compare", "--full-limit", str(limit), "--save", saved
    )
    assert code == 0
    result = json.loads(out)
    variants = {v["name"]: v for v in result["compare"]}
    assert list(variants) == ["full", "BSWA", "BSWA + 4 sinks", "FAM 16, untrained"]
    assert variants["full"]["tokens"] == limit
    for v in variants.values():
        config = FamConfig.from_dict(v["config"])
        words = ["--attention", config.attention, "--sink-tokens", str(config.sink_tokens)]
        words += ["--fam-length", str(config.fam_length), "--max-tokens", str(v["tokens"])]
        alone = json.loads(fam("read", book, "--json", *words)[1])
        assert alone["loss"] == pytest.approx(v["loss"], rel=1e-5)
        assert alone["memory_bytes"] == v["memory_bytes"]
        scored = [r for r in v["ranges"] if r["loss"] is not None]
        assert scored[-1]["stop"] == v["tokens"]
        early = json.loads(fam("read", book, "--json", *words[:-1], str(limit))[1])
        assert early["loss"] == pytest.approx(v["loss_within_full_limit"], rel=1e-5)
    assert variants["BSWA + 4 sinks"]["loss"] == pytest.approx(result["loss"])
    # The model that reads is left as it was: its memory fits a run without --compare.
    assert fam("read", book, "--load", saved, "--continue")[0] == 0


def test_the_table_of_a_comparison(fam: Run, book: str) -> None:
    _, out, _ = fam("read", book, "--compare", "--full-limit", "64", "--fam-length", "4")
    table = out.partition("lower is better\n\n")[2].splitlines()
    assert table[0].split("   ")[-1].strip() == "FAM 4, untrained"
    assert [line.partition("  ")[0] for line in table[-3:]] == ["first 64", "all", "memory"]
    assert table[-2].split()[1] == "–"  # full attention did not read all
    assert 4 <= len(table) - 4 <= 12


def test_ranges_stay_few_and_keep_their_means() -> None:
    ranges = RangeLosses(4)
    losses = torch.arange(1000.0)
    for at in range(0, 1000, 7):
        ranges.add(at, losses[at : at + 7].tolist())
    rows = ranges.rows()
    assert len(rows) <= 12
    for first, stop, mean in rows:
        assert mean == pytest.approx(losses[first:stop].mean().item())


def test_a_twin_shares_the_weights_and_nothing_else() -> None:
    model = converted(CONFIG)
    other = twin(model, CONFIG.replace(fam_length=4))
    assert model.fam_config == CONFIG
    assert other.fam_config.fam_length == 4
    own = dict(model.named_parameters())
    more = {name for name, p in other.named_parameters() if own.get(name) is not p}
    assert more == {"model.fam_prompt.weight"}


def test_what_was_read_is_told_though_the_memory_cannot_be_saved(
    fam: Run, book: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise MemoryFileError("Cannot write the memory: no space left.")

    monkeypatch.setattr("transformerfam.memory_file.save_memory", full)
    saved = str(tmp_path / "book.fam")
    code, out, err = fam("read", book, "--ask", "Who?", "--max-new-tokens", "3", "--save", saved)
    assert code == 2 and "no space left" in err
    assert "loss" in out and "> Who?" in out and "saved" not in out


def test_the_share_that_was_read_is_of_what_there_was_to_read(
    fam: Run, book: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = str(tmp_path / "book.fam")
    fam("read", book, "--save", saved, "--max-tokens", "100")
    shares: list[float | None] = []
    share = Reading._share

    def noted(reading: Reading, ids: TokenIds) -> float | None:
        shares.append(share(reading, ids))
        return shares[-1]

    monkeypatch.setattr(Reading, "_share", noted)
    monkeypatch.setattr("transformerfam.stream._CHUNK_TOKENS", 32)
    fam("read", book, "--load", saved, "--continue")
    # Nothing of what was read before is in it; a tokenizer reads some bytes ahead.
    assert shares[0] is not None and shares[0] < 0.5 and shares[-1] == pytest.approx(1)


# ---- Ctrl-C and long pipes


def test_ctrl_c_saves_says_so_and_the_rest_follows(
    fam: Run, folder: str, tmp_path: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    path, saved = tmp_path / "long.txt", str(tmp_path / "long.fam")
    path.write_text(PROSE * 5_000)
    process = start("read", str(path), "--model", folder, *GEOMETRY, "--save", saved)
    processes.append(process)
    assert process.stderr is not None
    while b"tokens" not in process.stderr.readline():  # the first chunk is read
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Stopping after this chunk" in err
    assert b"Traceback" not in err
    assert b"stopped by Ctrl-C" in out
    assert saved.encode() in out
    position = json.loads(fam("info", saved, "--json")[1])["position"][0]
    more = json.loads(
        fam("read", str(path), "--json", "--load", saved, "--continue", "--max-tokens", "100")[1]
    )
    assert more["position"] == position + 100
    assert more["scored"] == 100


@pytest.mark.slow
def test_ctrl_c_while_waiting_reads_what_has_come(
    folder: str, tmp_path: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    saved = tmp_path / "pipe.fam"
    process = start(
        "read", "-", "--model", folder, *GEOMETRY, "--save", str(saved), "--json",
        stdin=subprocess.PIPE,
    )  # fmt: skip
    processes.append(process)
    assert process.stdin is not None
    process.stdin.write(PROSE.encode())  # less than a chunk: nothing can be read yet
    process.stdin.flush()
    assert process.stderr is not None
    wait_until_reading(process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    result = json.loads(out)
    assert result["interrupted"]
    assert result["tokens"] > 50
    assert saved.exists()


def wait_until_reading(process: subprocess.Popen[bytes]) -> None:
    """Until the process sleeps in a read of its standard input, model loaded."""
    for _ in range(600):
        assert process.poll() is None
        call = Path(f"/proc/{process.pid}/syscall")
        words = call.read_text().split()
        if words[:2] == ["0", "0x0"]:  # read(0, ...)
            return
        time.sleep(0.05)
    pytest.fail("never came to wait for its input")


@pytest.mark.slow
def test_resident_memory_is_flat_over_a_long_pipe(
    folder: str, processes: list[subprocess.Popen[bytes]]
) -> None:
    size = 20_000_000
    process = start(
        "read", "-", "--model", folder, *GEOMETRY, "--quiet", "--json", stdin=subprocess.PIPE
    )
    processes.append(process)
    assert process.stdin is not None
    text = b"harbour harbour, harbour. \n" * 2000  # words of few tokens, or it would take longer
    written, resident = 0, []
    while written < size:
        process.stdin.write(text)  # the pipe holds 64 kB: what was written was read, nearly
        written += len(text)
        status = Path(f"/proc/{process.pid}/status").read_text()
        resident.append((written, int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) * 1024))
    process.stdin.close()
    assert process.stdout is not None
    result = json.loads(process.stdout.read())
    assert process.wait() == 0
    assert result["tokens"] > 1_000_000
    early = max(r for w, r in resident if size * 0.1 < w < size * 0.3)
    late = max(r for w, r in resident if w > size * 0.8)
    assert late - early < 10_000_000, (early, late)
