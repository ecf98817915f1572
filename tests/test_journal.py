"""The journal: its lines, what a resumed run leaves of them, TensorBoard, the line of progress."""

from __future__ import annotations

import importlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from transformerfam.training.journal import FILE, Journal, keep_until


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / FILE).read_text().splitlines()]


def keep(journal: Journal, steps: range, **changes: Any) -> None:
    numbers = {"loss": 2.0, "rate": 0.1, "grad_norm": 0.8, "tokens": 100, "seconds": 0.5}
    for step in steps:
        journal.step(step, **{**numbers, "loss": 1 / step, **changes})


def quiet(folder: Path, **options: Any) -> Journal:
    return Journal(folder, **{"steps": 4, "quiet": True, "tensorboard": False, **options})


def test_each_step_and_each_probe_is_a_line_that_is_there_at_once(tmp_path: Path) -> None:
    journal = quiet(tmp_path / "out")
    keep(journal, range(1, 2), fam_bias=-3.0, other=None)
    first = {
        "step": 1,
        "loss": 1.0,
        "rate": 0.1,
        "grad_norm": 0.8,
        "tokens": 100,
        "seconds": 0.5,
        "tokens_per_second": 200.0,
        "fam_bias": -3.0,
    }
    assert lines(tmp_path / "out") == [first]
    journal.probe(1, {"passkey": {"2048": 0.5}})
    journal.probe(1, {})  # nothing was measured
    assert lines(tmp_path / "out") == [first, {"step": 1, "probe": {"passkey": {"2048": 0.5}}}]
    journal.close()


def test_what_json_has_no_number_for_is_null(tmp_path: Path) -> None:
    journal = quiet(tmp_path)
    keep(journal, range(1, 2), loss=float("nan"), grad_norm=float("inf"), seconds=0.0)
    keep(journal, range(2, 3), loss=None, grad_norm=None)
    journal.probe(2, {"heldout": {"a": float("nan")}})
    first, second, probe = lines(tmp_path)
    assert first["loss"] is first["grad_norm"] is first["tokens_per_second"] is None
    assert second["loss"] is second["grad_norm"] is None
    assert probe["probe"] == {"heldout": {"a": None}}
    journal.close()


def test_a_resumed_run_reads_like_one_that_was_never_interrupted(tmp_path: Path) -> None:
    whole = quiet(tmp_path / "whole")
    keep(whole, range(1, 5))
    whole.close()

    parts = quiet(tmp_path / "parts")
    keep(parts, range(1, 4))
    parts.probe(3, {"passkey": {"64": 1.0}})
    parts.close()
    with (tmp_path / "parts" / FILE).open("a") as file:
        file.write('{"step": 1')  # cut short by a crash
    again = quiet(tmp_path / "parts", start_step=2)
    keep(again, range(3, 5))
    again.close()
    assert (tmp_path / "parts" / FILE).read_text() == (tmp_path / "whole" / FILE).read_text()


def test_a_run_from_the_start_begins_a_new_file(tmp_path: Path) -> None:
    journal = quiet(tmp_path)
    keep(journal, range(1, 4))
    journal.close()
    quiet(tmp_path).close()
    assert lines(tmp_path) == []


def test_lines_that_are_none_are_dropped(tmp_path: Path) -> None:
    file = tmp_path / FILE
    file.write_text('[]\n{}\n{"step": "x"}\nnull\n{"step": 1}\n{"step": 1}')
    keep_until(file, 5)
    assert file.read_text() == '{"step": 1}\n'
    keep_until(tmp_path / "none", 5)
    assert [p.name for p in tmp_path.iterdir()] == [FILE]


def test_a_silent_journal_leaves_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    journal = Journal.silent()
    keep(journal, range(1, 4))
    journal.probe(3, {"passkey": {"64": 1.0}})
    journal.close()
    assert capsys.readouterr() == ("", "")


def test_without_a_folder_there_is_progress_alone(capsys: pytest.CaptureFixture[str]) -> None:
    journal = Journal(None, steps=2)
    keep(journal, range(1, 3))
    journal.close()
    assert "step 2/2" in capsys.readouterr().err


# ---- progress


def test_the_line_says_how_far_how_well_and_how_long(tmp_path: Path) -> None:
    screen = Screen()
    journal = Journal(None, steps=1000, stream=screen)
    keep(journal, range(120, 121), loss=2.345, tokens=406)
    journal.close()
    expected = "step 120/1,000   loss 2.345   812 tokens/s   7 min 20 s left   grad 0.8"
    assert expected in screen.getvalue()


def test_the_time_left_is_smoothed_over_steps() -> None:
    stream = io.StringIO()
    journal = Journal(None, steps=1000, stream=stream)
    keep(journal, range(100, 101), seconds=1.0)
    assert "15 min 00 s left" in stream.getvalue()
    journal.step(101, loss=None, rate=0.1, grad_norm=None, tokens=1, seconds=11.0)
    journal.progress.update(journal._line(101, None, None, None, None), now=True)
    # One step of 11 s makes the mean 2 s, not 6 s.
    assert stream.getvalue().endswith("step 101/1,000   loss –   29 min 58 s left\n")


@pytest.mark.parametrize(("most", "shown"), [(61.0, "1 min 01 s"), (-2.0, "0"), (1e6, "15 min")])
def test_the_time_left_is_no_more_than_the_run_may_take(most: float, shown: str) -> None:
    stream = io.StringIO()
    keep(Journal(None, steps=1000, stream=stream), range(100, 101), seconds=1.0, most_left=most)
    assert f"{shown}" in stream.getvalue().partition("tokens/s")[2]


def test_the_last_step_is_always_shown_and_probes_stay() -> None:
    stream = io.StringIO()
    journal = Journal(None, steps=3, stream=stream)
    keep(journal, range(1, 4))
    journal.probe(3, {"passkey": {"2048": 1.0, "4096": 0.12345}})
    shown = stream.getvalue().splitlines()
    assert shown[0].startswith("step 1/3")
    assert shown[1] == "step 3/3   loss 0.333   200 tokens/s   grad 0.8"
    assert shown[2] == "step 3   passkey: 2048 1, 4096 0.123"


# ---- TensorBoard


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    name = "tensorboard.backend.event_processing.event_accumulator"
    events = importlib.import_module(name).EventAccumulator(str(folder))
    events.Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}


@pytest.mark.filterwarnings("ignore")  # of TensorBoard's own imports
def test_tensorboard_shows_a_resumed_run_as_one(tmp_path: Path) -> None:
    journal = quiet(tmp_path, tensorboard=True)
    keep(journal, range(1, 4))
    journal.probe(2, {"passkey": {"64": 0.5}})
    journal.close()
    again = quiet(tmp_path, tensorboard=True, start_step=2)
    keep(again, range(3, 5), loss=None)
    again.close()
    found = scalars(tmp_path / "tensorboard")
    assert [step for step, _ in found["train/loss"]] == [1, 2]
    assert [step for step, _ in found["train/rate"]] == [1, 2, 3, 4]
    assert found["passkey/64"] == [(2, 0.5)]


def test_without_tensorboard_there_are_lines_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    journal = quiet(tmp_path, tensorboard=True)
    keep(journal, range(1, 3))
    journal.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    assert not (tmp_path / "tensorboard").exists()
