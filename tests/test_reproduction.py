"""Figures made again: the toy task, runs that are kept, and the page that comes of them."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import refused
from families import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from test_text import TOKENIZERS

from transformerfam import FamConfig, cli, convert
from transformerfam.commands import reproduce
from transformerfam.errors import UserError
from transformerfam.reproduction import experiment, machine, page, results, scales, toy, toy_text
from transformerfam.reproduction.experiment import Experiment, Planned, Shape, Variant
from transformerfam.reproduction.items import ITEMS, SAME_PAGE, Claim
from transformerfam.reproduction.machine import MACHINE
from transformerfam.reproduction.runs import results_of
from transformerfam.tasks import Case

TOKENIZER = TOKENIZERS["gpt2"]
SHAPE = Shape(width=16, layers=2, block=24, digits=3, rows=4)


# ---- the task


@settings(max_examples=60, deadline=None)
@given(
    keys=st.integers(1, 3),
    where=st.sampled_from(["start", "anywhere", "late"]),
    blocks=st.integers(2, 9),
    seed=st.integers(0, 9),
)
def test_a_text_holds_its_keys_once_and_asks_for_one_of_them(
    keys: int, where: toy.Where, blocks: int, seed: int
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
    source = toy.ToyPasskeys(SHAPE, most_blocks=4)
    lengths = [[len(source.draw(4 * step + row)) for row in range(4)] for step in range(40)]
    assert all(len(set(of_step)) == 1 for of_step in lengths)
    assert {of_step[0] // SHAPE.block for of_step in lengths} == {2, 3, 4}
    assert source.draw(7) == source.draw(7) != source.draw(6)


def test_prose_is_trained_on_and_measured_in_different_parts() -> None:
    learn, ask = toy_text.parts()
    assert len(learn) > 4 * len(ask) - 10 and len(ask) > 50_000
    source = toy_text.Stretches(SHAPE, blocks=3)
    drawn = source.draw(5)
    assert len(drawn.ids) == 3 * SHAPE.block and bytes(drawn.ids) in learn
    assert drawn.weights == (0.0,) + (1.0,) * (3 * SHAPE.block - 1)
    assert source.draw(5) == drawn != source.draw(6)


def test_prose_is_measured_by_place() -> None:
    run = {"shape": {"block": 4}, "lengths": [1, 3], "count": 2}

    model = torch.nn.Module()
    text, seen = toy_text.parts()[1], []

    def read(_: object, ids: bytes) -> Any:
        """Tells the byte that is most frequent in English, whatever comes."""
        seen.append(bytes(ids))
        hits = torch.tensor([byte == ord("e") for byte in ids[1:]])
        yield type("Chunk", (), {"hits": hits})()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy_text, "read", read)
        shares = toy_text.asked(model, run)["text"]
    assert [len(s) for s in seen] == [12, 12] and all(s in text for s in seen)
    first = sum(s[1:4].count(b"e") for s in seen) / 6
    later = sum(s[4:].count(b"e") for s in seen) / 16
    assert shares == {"1": pytest.approx(first), "3": pytest.approx(later)}


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
    file.write_text('{"run": {"n"')  # killed while it wrote the first of all
    assert not next(results_of(runs, count_calls, file, workers=1))[2]
    with pytest.raises(UserError, match="cannot be read"):
        list(results_of(runs, count_calls, tmp_path, workers=1))
    file.write_bytes(b"no results \xff\n")
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

ITS = Experiment(
    variants=(Variant("M1", {"fam_length": 0}), Variant("FAM", {"memory_segments": 0})),
    asked=("1 start",),
    steps=1,
    longest=2,
    lengths=(2, 4, 200),
    shape=SHAPE,
    optimizer={},
)


def found(*reach: tuple[int, int]) -> list[tuple[Planned, dict[str, Any]]]:
    """Results in which M1 and FAM are right up to a length, for each seed."""
    made = []
    for planned in experiment.plan(ITS, range(len(reach))):
        far = reach[planned.seed][planned.variant == "FAM"]
        right = {str(n): float(n <= far) for n in ITS.lengths}
        made.append((planned, {"accuracy": {"1 start": right}, "last_loss": 0.1, "seconds": 60.0}))
    return made


@pytest.mark.parametrize(
    ("reach", "verdict"),
    [
        ([(2, 200), (4, 200)], "**held**, as in the paper: 1.000 against 0.250"),
        ([(2, 200), (200, 4)], "**is open (1 of 2 seeds)**: "),
        ([(2, 2), (4, 4)], "**is open: no difference**: "),
        ([(2, 200), (4, 4)], "**is open (1 of 2 seeds)**: "),
        ([(200, 2), (200, 4)], "**did not hold**, other than in the paper: "),
        ([(2, 4)], "**held with the one seed**, as in the paper: "),
        ([(4, 2)], "**did not hold with the one seed**, other than in the paper: "),
    ],
)
def test_a_claim_is_judged_seed_by_seed(reach: list[tuple[int, int]], verdict: str) -> None:
    curves = page.curves_of(ITS, found(*reach), "1 start")
    said = page.judge(Claim("FAM", "M1"), ITS, curves)
    assert "That FAM does better than M1" in said
    assert verdict in said
    assert "lengths beyond those trained on" in said
    assert "not measured" in page.judge(Claim("FAM", "M9"), ITS, curves)


def test_who_has_learned_nothing_cannot_be_beaten() -> None:
    longest = ITS.longest
    knows, learned_nothing = {longest: 1.0, 200: 0.1}, {longest: 0.1, 200: 0.1}
    curves = {"M1": [knows, learned_nothing], "FAM": [{longest: 1.0, 200: 0.9}] * 2}
    said = page.judge(Claim("FAM", "M1"), ITS, curves)
    assert "**cannot be told: M1 learned nothing in 1 of 2 seeds**: 0.900 against 0.100" in said
    curves["M1"] = [knows] * 2
    assert "**held**" in page.judge(Claim("FAM", "M1"), ITS, curves)


def test_two_that_are_at_chance_are_not_told_apart() -> None:
    curves = {"M1": [{4: 0.09, 200: 0.11}] * 2, "FAM": [{4: 0.13, 200: 0.12}] * 2}
    assert "**cannot be told" in page.judge(Claim("FAM", "M1"), ITS, curves)
    curves["FAM"] = [{4: 0.3, 200: 0.12}] * 2
    assert "**held**: 0.210" in page.judge(Claim("FAM", "M1", paper=None), ITS, curves)
    assert "**held**, other than in the paper" in page.judge(
        Claim("FAM", "M1", paper=False), ITS, curves
    )


def test_who_has_not_even_learned_its_training_texts_is_named() -> None:
    curves = {"M1": [{2: 0.09, 200: 0.9}, {2: 0.2, 200: 0.1}], "FAM": [{2: 1.0, 200: 0.1}] * 2}
    (said,) = page.learned_nothing(ITS, curves)
    assert said.startswith("M1 learned nothing in 1 of 2 seeds")
    keys = {"M1": [{2: 0.1, 200: 0.0}], "FAM": [{2: 0.0, 200: 0.1}]}  # whole ones: rarely by chance
    (said,) = page.learned_nothing(replace(ITS, unit="tokens"), keys)
    assert said.startswith("FAM learned nothing in 1 of 1 seeds")
    assert page.learned_nothing(ITS, {"FAM": [{200: 0.0}]}) == []  # nothing that short was asked


def test_the_page_shows_spread_reach_and_what_the_paper_says(tmp_path: Path) -> None:
    item = replace(ITEMS["table6"], experiment=ITS, claims=(Claim("FAM", "M1"),), said="FAM holds.")
    made = page.item_page("table6", item, found((2, 200), (2, 4)), "fam reproduce table6", tmp_path)
    text = "\n".join(made.lines)
    assert "FAM makes no mistake in any seed up to 4 blocks, 2 times" in text
    assert "did so in each of 2 seeds" in text and "once in 2 times" in text
    assert "| FAM | 1.00 | 1.00 | 0.50 (0.00–1.00) |" in text
    assert "The paper: FAM holds." in text and "| 6 | 16.2 |" in text
    markdown, html = made.write(tmp_path)
    assert markdown.read_text().startswith(f"# {item.title}")
    shown = html.read_text()
    assert "<td>16.2</td>" in shown and 'src="data:image/png;base64,' in shown
    assert 'src="table6.png' not in shown and "{{" not in shown


def test_every_item_can_be_planned_and_its_paper_tables_are_there() -> None:
    for name, item in ITEMS.items():
        planned = list(experiment.plan(item.experiment, [0]))
        names = [each.variant for each in planned]
        assert len(set(names)) == len(names), name
        claimed = {side for claim in item.claims for side in (claim.more, claim.less)}
        assert claimed <= set(names), name
        assert {claim.asked for claim in item.claims} <= {"", *item.experiment.asked}
        for each in planned:
            assert json.loads(json.dumps(each.run)) == each.run
            if not each.run["model"].get("architecture"):
                toy.recipe_of(each.run)
        for table in item.paper:
            header, rows = page.papers_table(table)
            assert rows and all(len(row) == len(header) for row in rows)


def test_items_share_runs() -> None:
    ours, theirs = (
        [json.dumps(each.run) for each in experiment.plan(ITEMS[name].experiment, [0])]
        for name in ("table7", "table6")
    )
    assert set(ours) & set(theirs)


# ---- larger scales


def test_a_toys_geometry_becomes_the_papers() -> None:
    fam = scales.paper_geometry(Variant("FAM", {"memory_segments": 0, "fam_length": 8}))
    assert (fam.block_size, fam.fam_length, fam.memory_segments) == (1024, 64, 0)
    assert (fam.feedback_norm, fam.first_residual, fam.sink_tokens) == ("none", "zero", 0)
    small = scales.paper_geometry(Variant("x", {"fam_length": 1}, paper={"fam_length": 256}), 256)
    assert (small.block_size, small.fam_length) == (256, 64)
    swa = Variant("SWA", {"fam_length": 0, "attention": "swa", "window": 16})
    assert scales.paper_geometry(swa).window == 1024


def test_small_runs_are_recipes() -> None:
    planned = list(scales.small_plan(ITS, [3], lengths=None, steps=7))
    recipe = scales.small_recipe(planned[1].run)
    assert recipe.run.steps == 7 and recipe.run.seed == 3
    assert recipe.fam == scales.paper_geometry(ITS.variants[1], block=256)
    with pytest.raises(UserError, match="fam train paper"):
        list(scales.small_plan(ITEMS["table11"].experiment, [0], lengths=None, steps=None))


@pytest.mark.slow
@pytest.mark.parametrize("name", ITEMS)
def test_every_item_has_its_larger_scales_or_is_refused(name: str, tmp_path: Path) -> None:
    item = ITEMS[name]
    for variant in scales.distinct(item.experiment):
        assert scales.paper_geometry(variant).block_size == 1024
    if item.experiment.asked != ("1 start",):
        with pytest.raises(UserError, match="fam eval --tasks"):
            list(scales.small_plan(item.experiment, [0], lengths=None, steps=None))
        return
    planned = list(scales.small_plan(item.experiment, [0], lengths=[2048, 32_768], steps=None))
    runs = [json.dumps(each.run) for each in planned]
    assert len(set(runs)) == len(runs)
    for each in planned:
        recipe = scales.small_recipe(each.run)
        assert recipe.fam == FamConfig.from_dict(each.run["fam"])
        assert recipe.data.length == scales.SMALL_LONGEST
    answers = {"accuracy": {"1 start": {"2048": 1.0, "32768": 0.5}}, "last_loss": 1, "seconds": 60}
    found = [(each, answers) for each in planned]
    made = page.item_page(name, scales.small_item(item), found, "fam reproduce", tmp_path)
    text = "\n".join(made.lines)
    assert "| tokens | 2048 | 32768 |" in text and "texts of up to 18,432 tokens" in text
    assert "blocks read" not in text and "from scratch" not in text and "digits" not in text


def test_variants_that_differ_as_toys_alone_are_one_at_larger_scales() -> None:
    names = [variant.name for variant in scales.distinct(ITEMS["figure3a"].experiment)]
    assert names == ["M0", "M1_SG", "M1", "M2", "M4", "FAM"]


def test_what_variants_are_compared_by_is_off_in_the_others() -> None:
    planned = scales.small_plan(ITEMS["figure6"].experiment, [0], lengths=None, steps=None)
    passing = {each.variant: each.run["feedback"]["state_passing"] for each in planned}
    assert passing == {"FAM": 0, "p = 0.2": 0.2, "p = 0.5": 0.5, "p = 0.8": 0.8, "p = 1": 1.0}


def test_a_model_of_the_paper_is_counted_and_estimated() -> None:
    shape = scales.PaperModel("tiny", 2, 8, 4, 2, 1)
    config = FamConfig.paper(block_size=4, memory_segments=1, fam_length=2)
    weights = scales.count_weights(shape, config)
    per_layer = 2 * 8 * 8 + 2 * 8 * 4 + 3 * 8 * 32 + 2 * 8
    assert weights["layers"] == 2 * per_layer and weights["prompt"] == 2 * 8
    assert weights["all"] == 2 * per_layer + 16 + 8 + 256_000 * 8
    assert weights["lora"] == 64 * 2 * (2 * 16 + 2 * 12 + 3 * 40)
    need = scales.estimate(shape, config, {"steps": 5, "rows": 3, "longest": 8})
    assert need["tokens"] == 120
    slots = 4 + 2 + 4
    assert need["bytes"] == 2 * 2 * (2 * slots * 4 + 2 * 8)
    twice = scales.estimate(shape, config, {"steps": 10, "rows": 3, "longest": 8})
    assert twice["flops"] == 2 * need["flops"] > 0


# ---- the command


def test_the_command_trains_asks_and_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made"
    argv = ["reproduce", "table8", "--seeds", "1", "--steps", "1"]
    argv += ["--lengths", "2,3", "--workers", "1", "--out", str(out)]
    assert cli.main(argv) == 0
    shown = capsys.readouterr()
    assert "TransformerXL" in shown.out and "3/3" in shown.err
    numbers = json.loads((out / "table8.json").read_text())
    assert [entry["variant"] for entry in numbers] == ["BSWA", "XL", "SWA"]
    assert (out / "table8.png").read_bytes()[:4] == b"\x89PNG"
    assert "--steps 1" in (out / "table8.md").read_text()
    index = (out / "index.md").read_text()
    assert "](table8.md)" in index and "- That BSWA does better than XL" in index
    # Again: everything is kept, and the page is the same.
    assert cli.main(argv) == 0
    again = capsys.readouterr()
    assert "3/3" not in again.err
    assert json.loads((out / "table8.json").read_text()) == numbers


def test_without_an_item_they_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["reproduce"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in [*ITEMS, *MACHINE])


@pytest.mark.parametrize("name", [pytest.param("figure1", marks=pytest.mark.slow), "table10"])
def test_what_needs_no_training_is_made_at_once(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["reproduce", name, "--out", str(tmp_path)]) == 0
    text = (tmp_path / f"{name}.md").read_text()
    assert f"fam reproduce {name}" in text and "wrote" in capsys.readouterr().out


def test_the_papers_size_is_planned_without_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = scales.PaperModel("tiny", 2, 8, 4, 2, 1)
    monkeypatch.setattr(scales, "PAPER_MODELS", (shape,))
    argv = ["reproduce", "table6", "--scale", "paper", "--out", str(tmp_path)]
    assert cli.main(argv) == 0
    capsys.readouterr()
    text = (tmp_path / "table6-paper.md").read_text()
    assert "| 6 FAMs | tiny |" in text
    assert "50,000 steps of 128 texts of the mix of instructions of up to 8,704 tokens" in text


def test_the_papers_size_has_what_the_paper_trained() -> None:
    passkey, tuned = (dict(machine._of_the_paper(ITEMS[n])) for n in ("figure7", "figure5"))
    assert passkey["FAM"].memory_segments == 0 and "linear attention" not in passkey
    assert passkey["Infini-attention"].compressive_memory == "linear"
    assert tuned["FAM"].memory_segments == 3 and tuned["FAM"].fam_length == 64
    assert {"base 100", "base 1,000", "base 100,000"} <= set(tuned)
    small = scales.small_plan(ITEMS["figure5"].experiment, [0], lengths=None, steps=None)
    assert "base 100" not in {each.variant for each in small}


@pytest.mark.parametrize(
    "wrong", [["table99"], ["table5", "--lengths", "0,2"], ["table5", "--lengths", "far"]], ids=str
)
def test_what_cannot_be_done_is_refused(
    wrong: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = cli.main(["reproduce", *wrong, "--out", str(tmp_path)])
    shown = capsys.readouterr()
    refused((code, shown.out, shown.err), "--lengths" if len(wrong) > 1 else "table99")


# ---- real data


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder of a little of everything."""
    folder = tmp_path / "data"
    for name in ("books", "proofs", "tasks", "longqa"):
        (folder / name).mkdir(parents=True)
    (folder / "proofs" / "easy.ml").write_text("let TRIVIAL = prove(`T`,REWRITE_TAC[]);;\n" * 40)
    (folder / "books" / "one.txt").write_text("It was a day like any other day by the sea. " * 40)
    row = {"query": "Which is red?", "choices": ["a rose", "the sea"], "gold": 0}
    (folder / "tasks" / "piqa.jsonl").write_text(json.dumps(row) + "\n")
    asked = {"input": "A day.", "instructions": ["What?"], "outputs": ["A day."]}
    (folder / "longqa" / "talk.jsonl").write_text(json.dumps(asked) + "\n")
    return folder


@pytest.fixture
def tiny_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model in the place of the default one."""

    def load(
        adapter: str | None = None, config: FamConfig | None = None, dtype: str | None = None
    ) -> Any:
        small = FamConfig(block_size=32, memory_segments=1, fam_length=2)
        if adapter == "of-fam":
            small = small.replace(adapted="fam")
        plain = tiny(vocab_size=len(TOKENIZER), dtype=getattr(torch, dtype or "float32"))
        return convert(plain, small), TOKENIZER

    monkeypatch.setattr("transformerfam.models.load", load)


@pytest.mark.usefixtures("tiny_default")
def test_real_data_makes_one_page_and_is_not_asked_twice(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["reproduce", "results", "--data", str(data), "--samples", "1", "--lengths", "160"]
    argv += ["--cut", "100", "--adapter", "shipped", "--out", str(tmp_path / "out")]
    (data / "about.txt").write_text("One day, by the sea.\n")
    assert cli.main(argv) == 0
    capsys.readouterr()
    text = (tmp_path / "out" / "results.md").read_text()
    assert "\n\nOne day, by the sea.\n\nThe answers took " in text
    for heading in results.GROUPS:
        assert f"## {heading}" in text
    assert "| task | metric | model | bswa | sinks | full | base |" in text
    for named in (
        "| passkey 160 | exact |",
        "documents books",
        "Perplexity / bits per byte of proofs 100 by place",
    ):
        assert named in text
    # The fixture's adapter changes nothing.
    assert "One question of each does not tell whether the model is worse than `base`." in text
    numbers = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {n["reader"] for n in numbers} == {"model", "bswa", "sinks", "full", "base"}
    (books,) = (n for n in numbers if n["task"] == "documents books 100" and n["reader"] == "full")
    assert [(part["from"], part["scored"]) for part in books["by_place"]] == [(0, 99)]
    assert str(tmp_path) not in text  # where the data lies says nothing
    answered = (tmp_path / "out" / "answers" / "results-000.jsonl").read_text()
    assert cli.main(argv) == 0
    assert (tmp_path / "out" / "answers" / "results-000.jsonl").read_text() == answered


@pytest.mark.usefixtures("tiny_default")
def test_weights_that_an_adapter_of_fam_leaves_alone_are_asked_once(
    data: Path, tmp_path: Path
) -> None:
    argv = ["reproduce", "table12", "--data", str(data), "--samples", "1", "--adapter", "of-fam"]
    assert cli.main([*argv, "--dtype", "bfloat16", "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "table2.md").read_text()
    assert " --dtype bfloat16 " in text and ", in bfloat16." in text
    assert "| task | metric | model | bswa | sinks | full |\n" in text
    assert "whether the model is worse than `full`." in text


@pytest.mark.usefixtures("tiny_default")
def test_real_data_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more, reason in (([], "--data FOLDER"), (["--data", str(tmp_path)], "nothing of table2")):
        code = cli.main(["reproduce", "table12", *more, "--out", str(tmp_path / "out")])
        shown = capsys.readouterr()
        refused((code, shown.out, shown.err), reason)


@pytest.mark.usefixtures("tiny_default")
def test_figure_11_shows_what_queries_look_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["reproduce", "figure11", "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    text = (tmp_path / "figure11.md").read_text()
    assert (tmp_path / "figure11.png").read_bytes()[:4] == b"\x89PNG"
    assert "nothing trained" in text and "| layer | read from FAM |" in text
    assert "- That block queries read FAM throughout **" in text


def test_what_a_figure_shows_in_some_layers_is_open() -> None:
    for values, said in (
        ([0.3, 0.4], "**held**"),
        ([0.1, 0.4], "**is open (1 of 2 layers)**"),
        ([0.1, 0.2], "**did not hold**"),
    ):
        assert machine._in_layers(values, 0.2).startswith(said)


def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # to root all folders are open
    code = cli.main(["reproduce", "table8", "--out", str(tmp_path)])
    shown = capsys.readouterr()
    refused((code, shown.out, shown.err), "can be written in the folder", "--out")


def test_all_goes_on_after_an_item_that_a_scale_does_not_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    two = {name: ITEMS[name] for name in ("anywhere", "table11")}
    monkeypatch.setattr("transformerfam.reproduction.items.ITEMS", two)
    monkeypatch.setattr(
        "transformerfam.reproduction.machine.MACHINE", {"table10": MACHINE["table10"]}
    )
    assert cli.main(["reproduce", "all", "--scale", "small", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().err
    assert "anywhere is left out: At the scale small" in said
    assert "table11 is left out" in said
    assert (tmp_path / "index.md").exists()  # it went on to the end
    assert not (tmp_path / "table10.md").exists()  # what trains nothing has no scale


UNUSED = {
    "table10": ["--seeds 2", "--steps 9", "--scale paper", "--lengths 64", "--adapter shipped"],
    "table5": ["--adapter shipped", "--data .", "--cut 99", "--steps 7 --scale paper"],
    "results": ["--seeds 2 --data .", "--steps 9 --data ."],
    "table12": ["--cut 99 --data .", "--lengths 64 --data ."],
    "table14": ["--rows 3"],
}


@pytest.mark.parametrize(
    ("name", "options"), [(name, each) for name, found in UNUSED.items() for each in found]
)
def test_what_an_item_has_no_use_for_is_refused(
    name: str, options: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["reproduce", name, *options.split(), "--out", str(tmp_path)]) == 2
    said = f"{options.split()[0]} does nothing for {SAME_PAGE.get(name, name)}; leave it out"
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_time_by_length_is_judged_by_its_quartiles() -> None:
    assert machine._quartiles([3.0]) == (3.0, 3.0, 3.0)
    assert machine._quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)
    falls = [1.2, 1.3, 1.0, 1.0, 1.0, 1.0, 1.0, 1.1]
    for ratios, verdict in (
        (falls, "**held**, as in the paper: 1.25 (1.22–1.28) times its time in the first 2 of 8"),
        (falls[::-1], "**did not hold**, other than in the paper"),
        ([1.0, 1.4, 1.0, 1.0, 1.0, 1.0, 1.1, 1.2], "**is open**"),
    ):
        assert verdict in "\n".join(machine._cheaper_with_length(ratios))
    assert machine._cheaper_with_length([1.1] * 7) == []


def test_what_an_item_has_use_for_is_not_refused() -> None:
    used = {
        "figure11": "--adapter",
        "table13": "--lengths",
        "table2": "--data",
        "table5": "--seeds",
    }
    assert all(option in reproduce._used(name, "toy") for name, option in used.items())
    assert "--cut" in reproduce._used("results", "toy")
    assert "--cut" not in reproduce._used("table2", "toy")


def test_an_option_may_be_of_use_to_one_of_several_items(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["reproduce", "table10", "table8", "--seeds", "1", "--steps", "1", "--lengths", "2"]
    assert cli.main([*argv, "--workers", "1", "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    assert "fam reproduce table10\n" in (tmp_path / "table10.md").read_text()
    assert (
        "fam reproduce table8 --seeds 1 --steps 1 --lengths 2\n"
        in (tmp_path / "table8.md").read_text()
    )
    # Nothing is made before all options are looked at.
    argv += ["--data", ".", "--out", str(tmp_path / "none")]
    assert cli.main(argv) == 2
    assert "--data does nothing for table10 and table8; leave it out" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_page_that_the_paper_shows_in_two_places_is_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["reproduce", "table4", "table3", "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    assert "fam reproduce table3\n" in (tmp_path / "table3.md").read_text()
    assert not (tmp_path / "table4.md").exists()
    listed = {**ITEMS, **MACHINE, **results.ITEMS}
    assert set(SAME_PAGE.values()) <= set(listed) and not set(SAME_PAGE) & set(listed)


def test_of_longer_texts_fewer_are_asked_and_documents_are_cut_for_full_attention_too(
    data: Path,
) -> None:
    sizes = results.Sizes(lengths=(128, 512, 2048), hidden=8, hidden_tokens=1024)
    hidden = results.hidden(data, TOKENIZER, sizes)
    counts = {(c.task, c.setting["length"]): c.count for c in hidden}
    assert [counts["recall", n] for n in (128, 512, 2048)] == [8, 2, 1]
    cuts = [c.setting["most_tokens"] for c in results.documents(data, TOKENIZER, sizes)]
    assert cuts == [8192, 262_144] * 2


PLAIN = FamConfig(sink_tokens=0)


def answered(
    reader: str, case: Case, values: list[float], tokens: int = 2000
) -> list[dict[str, Any]]:
    """Lines of one reader, a question a value."""
    return [
        {"task": case.task, "version": case.version, "setting": dict(case.setting)}
        | {"reader": reader, "question": number, "tokens": tokens, "metrics": {case.metric: value}}
        for number, value in enumerate(values)
    ]


def test_what_held_on_real_data_is_judged_question_by_question(data: Path) -> None:
    (case,) = results.gpt3(data, TOKENIZER, results.Sizes())
    groups = {"GPT-3's tasks": [case]}
    windows = answered("bswa", case, [0.0, 1.0] * 50)
    for model, verdict in (
        (
            [0.0, 1.0] * 48 + [1.0] * 4,
            "is open**: 0.520 against 0.500, a difference of +0.020 ± 0.014",
        ),
        (
            [0.0, 1.0] * 40 + [1.0] * 20,
            "held**: 0.600 against 0.500, a difference of +0.100 ± 0.030",
        ),
        ([0.0] * 100, "did not hold: it does worse**: 0.000 against 0.500"),
    ):
        lines = answered("model", case, model) + windows
        (said,) = results.held(groups, lines, PLAIN)
        claim = "That the memory does better than its windows alone (`bswa`), GPT-3 Rank"
        assert said.startswith(f"{claim}, mean over its tasks, **")
        assert verdict in said
        assert said.endswith("asked 100 times.")
    assert results.held(groups, windows, PLAIN) == []
    # Sinks are no merit of a memory that has them: what it is judged against has them too.
    assert results.held(groups, lines, FamConfig()) == []
    few = answered("model", case, [1.0] * 5) + answered("bswa", case, [0.0] * 5)
    assert "is open**: 1.000 against 0.000" in results.held(groups, few, PLAIN)[0]


def test_what_all_read_alike_tells_nothing_of_a_memory(data: Path) -> None:
    """Texts of one block, and documents that are only read where FAM is seen when asked."""
    (case,) = results.gpt3(data, TOKENIZER, results.Sizes())
    short = [*answered("model", case, [1.0] * 9, 500), *answered("bswa", case, [1.0] * 9, 500)]
    (said,) = results.held({"GPT-3's tasks": [case]}, short, PLAIN)
    assert said.endswith("**cannot be told**: all of it is read alike with a memory and without.")
    long = [
        *answered("model", case, [1.0] * 9 + [1.0] * 3),
        *answered("bswa", case, [1.0] * 9 + [0.0] * 3),
    ]
    for line in long:
        line["tokens"] = 500 if line["question"] < 9 else 2000
    (said,) = results.held({"GPT-3's tasks": [case]}, long, PLAIN)
    assert "is open**: 1.000 against 0.000" in said and said.endswith("asked 3 times.")
    (book, *_) = results.documents(data, TOKENIZER, results.Sizes())
    read = [*answered("model", book, [0.5] * 9), *answered("bswa", book, [0.5] * 9)]
    (said,) = results.held({"Whole documents": [book]}, read, PLAIN.replace(fam_seen="asked"))
    assert "cannot be told" in said
    assert "is open" in results.held({"Whole documents": [book]}, read, PLAIN)[0]


def test_a_memory_is_judged_against_windows_with_as_many_sinks() -> None:
    assert results.windows_of(FamConfig(sink_tokens=4)) == "sinks"
    assert results.windows_of(FamConfig(sink_tokens=0)) == "bswa"


def test_tables_of_gpt3_have_means_over_tasks_whatever_their_questions(data: Path) -> None:
    (case,) = results.gpt3(data, TOKENIZER, results.Sizes())
    other = replace(case, task="gpt3-arc-easy")
    lines = [
        *answered("model", case, [1.0] * 8 + [0.0] * 8),
        *answered("model", other, [1.0] * 100),
        *answered("bswa", case, [0.0] * 16),
    ]
    (row,) = results._means(lines, [case, other], ["model", "bswa"])
    assert row == ["GPT-3 Rank mean", "accuracy", "0.750 ± 0.065", "–"]
    few = [*lines, *answered("bswa", other, [1.0] * 5)]
    assert "is open" in results.held({"GPT-3's tasks": [case, other]}, few, PLAIN)[0]
    lines += answered("bswa", other, [1.0] * 100)
    (said,) = results.held({"GPT-3's tasks": [case, other]}, lines, PLAIN)
    assert "**held**: 0.750 against 0.500, a difference of +0.250 ± 0.065" in said


def test_what_got_worse_by_training_is_named(data: Path) -> None:
    (case,) = results.gpt3(data, TOKENIZER, results.Sizes())
    before = answered("base", case, [0.0, 1.0] * 10)
    same = answered("model", case, [1.0, 0.0] * 10)
    worse = answered("model", case, [0.0] * 20)
    assert "In none" in results._got_worse(before + same, [case], results.BASE)
    named = "gpt3-piqa piqa.jsonl (0.000 after 0.500)"
    assert named in results._got_worse(before + worse, [case], results.BASE)
