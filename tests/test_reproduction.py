"""Figures made again: the toy task, runs that are kept, and the page that comes of them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import refused
from hypothesis import given, settings
from hypothesis import strategies as st

from transformerfam import FamConfig, cli
from transformerfam.errors import UserError
from transformerfam.reproduction import figure3a, figure3a_page, toy
from transformerfam.reproduction.runs import results_of

SHAPE = figure3a.Shape(width=16, layers=2, block=24, digits=3, rows=4)
Pairs = list[tuple[dict[str, Any], dict[str, Any]]]


# ---- the task


@settings(max_examples=60, deadline=None)
@given(
    keys=st.integers(1, 3),
    where=st.sampled_from(["start", "anywhere", "late"]),
    blocks=st.integers(2, 9),
    seed=st.integers(0, 9),
)
def test_a_text_holds_its_keys_once_and_asks_for_one_of_them(
    keys: int, where: figure3a.Where, blocks: int, seed: int
) -> None:
    source = toy.ToyPasskeys(SHAPE, keys, where)
    ids = list(source.example(random.Random(seed), blocks).ids)
    assert len(ids) == blocks * SHAPE.block
    markers = [i for i, token in enumerate(ids) if token == toy.MARKER]
    assert len(markers) == keys and ids.count(toy.QUERY) == 1
    told = {}
    name_length = int(keys > 1)
    for i in markers:
        name = ids[i + 1] if name_length else None
        told[name] = ids[i + 1 + name_length : i + 1 + name_length + SHAPE.digits]
        assert i // SHAPE.block < blocks - 1
    asked = ids[-SHAPE.digits - 1] if name_length else None
    assert ids[-SHAPE.digits - 1 - name_length] == toy.QUERY
    assert told[asked] == ids[-SHAPE.digits :]
    if where == "late":
        place = next(i for i in markers if not name_length or ids[i + 1] == asked)
        assert place // SHAPE.block == blocks - 2


def test_all_rows_of_a_step_have_the_same_length_and_steps_differ() -> None:
    source = toy.ToyPasskeys(SHAPE, most_blocks=((0, 4), (30, 9)))
    lengths = [[len(source.draw(4 * step + row)) for row in range(4)] for step in range(90)]
    assert all(len(set(of_step)) == 1 for of_step in lengths)
    blocks = [of_step[0] // SHAPE.block for of_step in lengths]
    assert set(blocks[:30]) == {2, 3, 4}
    assert set(blocks[30:]) == {2, 3, 4, 5, 6, 7, 8, 9}
    assert source.draw(7) == source.draw(7) != source.draw(6)


def test_accuracy_counts_digits() -> None:
    config = FamConfig.paper(block_size=SHAPE.block, memory_segments=0, fam_length=2)
    model = toy.toy_model(config, SHAPE, 0)
    source = toy.ToyPasskeys(SHAPE)
    share = toy.digit_accuracy(model, source, 3, 8)
    rng = random.Random("asked/3")
    ids = torch.tensor([list(source.example(rng, 3).ids) for _ in range(8)])
    with torch.no_grad():
        said = model(ids).logits.argmax(-1)[:, -SHAPE.digits - 1 : -1]
    assert share == pytest.approx(float((said == ids[:, -SHAPE.digits :]).float().mean()))


# ---- runs


def count_calls(run: dict[str, Any]) -> dict[str, Any]:
    if run["fails"]:
        raise UserError("no")
    return {"twice": 2 * run["n"]}


def test_runs_that_are_done_are_not_done_again(tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    runs = [{"n": n, "fails": False} for n in range(2)]
    first = list(results_of(runs, count_calls, file, workers=1))
    assert sorted(result["twice"] for _, result, _ in first) == [0, 2]
    assert not any(kept for _, _, kept in first)
    again = list(results_of(runs, count_calls, file, workers=1))
    assert all(kept for _, _, kept in again)
    file.write_text("no results\n")
    with pytest.raises(UserError, match="move it away"):
        list(results_of(runs, count_calls, file, workers=1))


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_fails_says_why_and_loses_no_other(workers: int, tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    runs = [{"n": 1, "fails": False}, {"n": 2, "fails": True}]
    list(results_of(runs[:1], count_calls, file, workers=1))
    with pytest.raises(UserError, match=r"^no$"):
        list(results_of([*runs, {"n": 3, "fails": True}], count_calls, file, workers=workers))
    (kept,) = results_of(runs[:1], count_calls, file, workers=1)
    assert kept == (runs[0], {"twice": 2}, True)


def test_two_commands_on_one_file_keep_each_others_results(tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    one, two = ([{"n": n, "fails": False} for n in ns] for ns in ((1, 2), (3, 4)))
    first = results_of(one, count_calls, file, workers=1)
    next(first)
    list(results_of(two, count_calls, file, workers=1))
    list(first)
    with file.open("a") as broken:
        broken.write('{"run": {"n"')  # killed while it wrote
    again = list(results_of([*one, *two, {"n": 9, "fails": False}], count_calls, file, workers=1))
    assert [kept for _, _, kept in again] == [True] * 4 + [False]
    assert all(kept for _, _, kept in results_of([again[-1][0]], count_calls, file, workers=1))


# ---- the page


def pairs(reach: dict[str, int], seeds: int = 2) -> Pairs:
    """Results in which each variant is right up to a length."""
    found = []
    for run in figure3a.plan(["start"], range(seeds), (2, 4, 200, 1024), None):
        right = {str(n): float(n <= reach[run["variant"]]) for n in run["lengths"]}
        result = {"accuracy": {"1 start": right}, "last_loss": 0.1, "seconds": 60.0}
        found.append((run, result))
    return found


def test_the_page_says_what_held_and_what_did_not() -> None:
    reach = {"M0": 0, "M1_SG": 2, "M1": 2, "M2": 4, "M4": 4, "FAM, decay 0.3": 0, "FAM": 1024}
    found = pairs(reach)
    said = figure3a_page.verdicts(found)
    assert "accuracy 1.00 at 200 blocks and 1.00 at 1024" in said[0]
    assert "M1 reaches further than M1_SG did not hold" in said[1]
    assert "M2 reaches further than M1 held" in said[2]
    assert "FAM reaches 1024 blocks and M4 4" in said[3]
    found[-1][1]["accuracy"]["1 start"]["200"] = 0.5
    assert "accuracy 0.50 at 200" in figure3a_page.verdicts(found)[0]
    text = figure3a_page.page(found, "fam reproduce figure3a", "a.png", "a.json")
    assert "0.75 (0.50–1.00)" in text and "| M0 | 0.00 | 0.00 | 0.00 | 0.00 |" in text
    assert "1 min 00 s on one" in text


def test_the_command_trains_asks_and_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made"
    argv = ["reproduce", "figure3a", "--parts", "start", "--seeds", "1", "--steps", "1"]
    argv += ["--lengths", "2,3", "--workers", "1", "--out", str(out)]
    assert cli.main(argv) == 0
    shown = capsys.readouterr()
    assert "M1_SG" in shown.out and "7/7" in shown.err
    numbers = json.loads((out / "figure3a.json").read_text())
    assert {entry["run"]["variant"] for entry in numbers} == {
        variant.name for variant in figure3a.part("start").variants
    }
    assert (out / "figure3a.png").read_bytes()[:4] == b"\x89PNG"
    assert "--steps 1" in (out / "figure3a.md").read_text()
    # Again: everything is kept, and the page is the same.
    assert cli.main(argv) == 0
    again = capsys.readouterr()
    assert "7/7" not in again.err
    assert json.loads((out / "figure3a.json").read_text()) == numbers


@pytest.mark.parametrize(
    "wrong", [["--parts", "end"], ["--lengths", "1,2"], ["--lengths", "far"]], ids=str
)
def test_what_cannot_be_done_is_refused(
    wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code = cli.main(["reproduce", "figure3a", *wrong])
    shown = capsys.readouterr()
    refused((code, shown.out, shown.err), wrong[0])
