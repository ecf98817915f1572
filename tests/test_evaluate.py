"""Evaluation: readers of the same weights, answers kept one by one, nothing asked twice."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from command_line import Run, refused
from families import converted, some_tokens, tiny

from transformerfam import FamConfig, conversion, evaluate
from transformerfam.answers import panels_of, places_of, summaries, table_of
from transformerfam.errors import UserError
from transformerfam.readers import Reader, readers_of
from transformerfam.tasks.cases import Case
from transformerfam.tasks.questions import Recite

CONFIG = FamConfig.paper(block_size=8, memory_segments=1, fam_length=2)


@pytest.fixture(scope="module")
def model() -> Any:
    return converted(CONFIG)


def case(length: int = 20, count: int = 3) -> Case:
    def make(number: int) -> Recite:
        ids = some_tokens(1, length + 1, seed=number)[0].tolist()
        return Recite(ids[:-1], ids[-1:], {"n": number})

    return Case("dummy", 1, {"length": length}, count, make, "exact")


def test_readers_share_weights_and_differ_in_windows(model: Any) -> None:
    found = readers_of(model, ["model", "bswa", "sinks", "full"], full_limit=None)
    assert [r.name for r in found] == ["model", "bswa", "sinks", "full"]
    assert all(r.model.lm_head.weight is model.lm_head.weight for r in found)
    assert found[1].config == CONFIG.without_feedback()
    assert found[2].config.sink_tokens == 4
    assert (found[3].config.attention, found[3].limit) == ("full", 512)
    ids = some_tokens(1, 30)
    with torch.no_grad():
        expected = tiny()(ids).logits
        torch.testing.assert_close(found[3].model(ids).logits, expected, atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="no reader all; there are model, bswa"):
        readers_of(model, ["all"], full_limit=None)


def test_rival_patterns_are_readers_by_name(model: Any) -> None:
    names = ["longformer", " M2", "BigBird", "full attention", "m2"]
    found = readers_of(model, names, full_limit=99)
    assert [r.name for r in found] == ["Longformer", "M2", "BigBird", "full attention"]
    assert [r.config.attention for r in found] == ["longformer", "bswa", "bigbird", "full"]
    assert all(r.config.block_size == 8 and not r.config.has_feedback for r in found)
    assert [r.limit for r in found] == [None, None, 99, 99]
    for name in ("RMT", "FM2", "prefix", "M1_SG"):  # untrained memories; what differs in training
        with pytest.raises(UserError, match=f"no reader {name}; there are .*Longformer"):
            readers_of(model, [name], full_limit=None)
    xl = converted(CONFIG.changed(attention="xl", fam_length=0))
    assert readers_of(xl, ["M2"], full_limit=None)[0].config.attention == "bswa"
    small = converted(CONFIG.replace(block_size=4))
    with pytest.raises(UserError, match="Sparse Transformer does not go with this model"):
        readers_of(small, ["Sparse Transformer"], full_limit=None)


def test_readers_that_cannot_differ_yet_are_asked_once(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers = readers_of(model, ["model", "bswa", "sinks", "full"], full_limit=None)
    other = Reader("other", converted(FamConfig(attention="full", fam_length=0), seed=1))
    asked: list[Any] = []
    ask = Recite.ask

    def noted(self: Recite, model: Any) -> dict[str, Any]:
        asked.append(model)
        return ask(self, model)

    monkeypatch.setattr(Recite, "ask", noted)
    # A block of 8, a window of 16 without feedback, and what lies beyond both.
    for length, alike in ((7, [0, 0, 0, 0, 4]), (15, [0, 1, 1, 1, 4]), (16, [0, 1, 2, 3, 4])):
        asked.clear()
        results = evaluate.Results(tmp_path / str(length), readers, seed=0)
        asks = evaluate.plan([*readers, other], [case(length=length, count=2)])
        lines = [line for _, line in evaluate.evaluate(asks, results)]
        models = [*(reader.model for reader in readers), other.model]
        assert asked == [models[n] for n in sorted(set(alike))] * 2
        for ask_, line, n in zip(asks, lines, alike * 2, strict=True):
            question: Any = ask_.case.make(ask_.number)
            assert line["metrics"] == ask(question, ask_.reader.model)
            assert ("same_as" in line) == (models.index(ask_.reader.model) != n)


def test_questions_may_be_read_side_by_side(model: Any, tmp_path: Path) -> None:
    readers = readers_of(model, ["model", "bswa", "full"], full_limit=25)
    cases = [case(length=7, count=5), case(length=20, count=5), case(length=40, count=5)]
    found = []
    for together in (1, 2, 5):
        asks = evaluate.plan(readers, cases, together=together)
        results = evaluate.Results(tmp_path / str(together), readers, seed=0)
        lines = [line for _, line in evaluate.evaluate(asks, results, together)]
        kept = evaluate.read_results(results.folder)[1]
        timeless = [{k: v for k, v in line.items() if k != "seconds"} for line in kept]
        assert len(lines) == len(kept) == len({ask.key for ask in asks}) == 45
        found.append(sorted(timeless, key=lambda line: str(line["key"])))
    assert found[0] == found[1] == found[2]
    assert sum("same_as" in line for line in found[0]) == 10  # within the first block
    assert sum("skipped" in line for line in found[0]) == 5


def test_an_adapter_makes_other_weights(model: Any) -> None:
    twins = [Reader(n, conversion.twin(model, CONFIG)) for n in ("model", "adapted")]
    assert twins[0].same_as(twins[1], 8) and not twins[0].same_as(twins[1], 9)
    peft.get_peft_model(twins[1].model, peft.LoraConfig(target_modules=["q_proj"]))
    assert not twins[0].same_as(twins[1], 8)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_share_questions_and_not_readers(model: Any, processes: int) -> None:
    readers = readers_of(model, ["model", "full"], full_limit=None)
    cases = [case(), case(length=40, count=2)]
    parts = [evaluate.plan(readers, cases, n, processes) for n in range(processes)]
    keys = [ask.key for part in parts for ask in part]
    assert sorted(keys) == sorted(ask.key for ask in evaluate.plan(readers, cases))
    for part in parts:
        names = [ask.reader.name for ask in part]
        assert names == ["model", "full"] * (len(part) // 2)


def test_what_was_asked_is_kept_and_not_asked_again(model: Any, tmp_path: Path) -> None:
    readers = readers_of(model, ["model", "full"], full_limit=25)
    asks = evaluate.plan(readers, [case(), case(length=40)])
    results = evaluate.Results(tmp_path, readers, seed=0)
    begun = evaluate.evaluate(asks, results)
    first = [line for _, line in (next(begun), next(begun), next(begun))]
    assert [line["reader"] for line in first] == ["model", "full", "model"]
    with (tmp_path / "results-000.jsonl").open("a") as file:
        file.write('{"key": "cut sh')  # killed while it wrote
    again = evaluate.Results(tmp_path, readers, seed=0)
    rest = list(evaluate.evaluate(asks, again))
    assert len(rest) == len(asks) - 3
    about, lines = evaluate.read_results(tmp_path)
    assert len(lines) == len(asks) == 12
    assert set(about["readers"]) == {"model", "full"}
    skipped = [line for line in lines if "skipped" in line]
    assert {(line["reader"], line["tokens"]) for line in skipped} == {("full", 41)}
    direct = case().make(2).ask(model)
    kept = next(x for x in lines if x["reader"] == "model" and x["question"] == 2)
    assert kept["metrics"] == direct


def test_what_was_too_long_is_asked_once_it_may_be_longer(model: Any, tmp_path: Path) -> None:
    for limit, left, process in ((25, 6, 1), (30, 0, 0), (50, 3, 0), (50, 0, 0)):
        readers = readers_of(model, ["full"], full_limit=limit)
        asks = evaluate.plan(readers, [case(), case(length=40)])
        results = evaluate.Results(tmp_path, readers, seed=0, process=process)
        assert len(list(evaluate.evaluate(asks, results))) == left
    _, lines = evaluate.read_results(tmp_path)
    assert all("metrics" in line for line in lines) and len(lines) == 6


def test_another_memory_over_the_same_weights_is_another_model(model: Any, tmp_path: Path) -> None:
    before = evaluate.weights_of(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.fam_prompt.weight[0, 0] += 1
    assert evaluate.weights_of(other) != before == evaluate.weights_of(copy.deepcopy(model))
    for names in (["bswa"], ["model", "bswa"], ["full", "model"]):  # readers are added in any order
        evaluate.Results(tmp_path, readers_of(model, names, full_limit=None), seed=0)


def test_a_process_that_comes_first_finds_nothing_done(model: Any, tmp_path: Path) -> None:
    readers = readers_of(model, ["model"], full_limit=None)
    assert evaluate.Results(tmp_path, readers, seed=0, process=1).done == set()


def test_a_folder_in_which_nothing_can_be_written_is_refused(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def full(path: Path) -> Iterator[Path]:
        raise OSError(28, "No space left on device")
        yield path

    monkeypatch.setattr(evaluate, "whole_file", full)
    with pytest.raises(UserError, match=r"Nothing can be written in .*: no space left on device"):
        evaluate.Results(tmp_path, readers_of(model, ["model"], full_limit=None), seed=0)


def test_processes_share_a_folder(model: Any, tmp_path: Path) -> None:
    readers = readers_of(model, ["model"], full_limit=None)
    asks = evaluate.plan(readers, [case(count=5)])
    for process in range(2):
        results = evaluate.Results(tmp_path, readers, seed=0, process=process)
        list(evaluate.evaluate(asks[process::2], results))
    assert [p.name for p in sorted(tmp_path.glob("results*"))] == [
        "results-000.jsonl",
        "results-001.jsonl",
    ]
    assert sorted(line["question"] for line in evaluate.read_results(tmp_path)[1]) == [
        0,
        1,
        2,
        3,
        4,
    ]


def test_results_of_an_older_version_are_gone_on_with(model: Any, tmp_path: Path) -> None:
    readers = readers_of(model, ["model"], full_limit=None)
    evaluate.Results(tmp_path, readers, seed=0)
    about = json.loads((tmp_path / "about.json").read_text())
    del about["readers"]["model"]["adapted"]  # a field that came later
    (tmp_path / "about.json").write_text(json.dumps(about))
    evaluate.Results(tmp_path, readers, seed=0)
    about["readers"]["model"]["what"] = "of a newer version"
    (tmp_path / "about.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="another geometry of the reader model"):
        evaluate.Results(tmp_path, readers, seed=0)


def test_results_of_something_else_are_not_mixed(model: Any, tmp_path: Path) -> None:
    evaluate.Results(tmp_path, readers_of(model, ["model"], full_limit=None), seed=0)
    other = readers_of(converted(CONFIG, seed=1), ["model"], full_limit=None)
    with pytest.raises(UserError, match="holds results of another model; choose another"):
        evaluate.Results(tmp_path, other, seed=0)
    windows = readers_of(converted(CONFIG.replace(memory_segments=2)), ["model"], full_limit=None)
    with pytest.raises(UserError, match="another geometry of the reader model"):
        evaluate.Results(tmp_path, windows, seed=0)
    with pytest.raises(UserError, match="another seed"):
        evaluate.Results(tmp_path, readers_of(model, ["model"], full_limit=None), seed=1)


def test_a_summary_is_the_mean_and_its_standard_error() -> None:
    lines = [{"metrics": {"exact": value}} for value in (1.0, 0.0, 1.0, 1.0)]
    found = evaluate.summarise([*lines, {"skipped": "long"}], "exact")
    assert found is not None
    assert found.mean == 0.75
    assert found.error == pytest.approx(math.sqrt((3 * 0.0625 + 0.5625) / 3 / 4))
    weighed = [
        {"metrics": {"accuracy": 0.5, "scored": [10, 20]}},
        {"metrics": {"accuracy": 1.0, "scored": [10]}},
    ]
    documents = evaluate.summarise(weighed, "accuracy")
    assert documents is not None and documents.mean == pytest.approx(25 / 40)
    assert evaluate.summarise([{"skipped": "long"}], "exact") is None


# ---- the command


def test_the_command_asks_shows_and_goes_on(fam: Run, folder: str, tmp_path: Path) -> None:
    out = str(tmp_path / "results")
    words = ["eval", folder, "--tasks", "passkey,recall", "--lengths", "300", "--output", out]
    words += ["--readers", "model,full", "--block-size", "16", "--full-limit", "100000", "--quiet"]
    code, shown, err = fam(*words, "--samples", "1")
    assert (code, err) == (0, "")
    assert "passkey 300" in shown and "recall 300" in shown
    lines = (tmp_path / "results" / "results-000.jsonl").read_text().splitlines()
    assert len(lines) == 4
    code, _, _ = fam(*words, "--samples", "2")
    assert code == 0
    more = (tmp_path / "results" / "results-000.jsonl").read_text().splitlines()
    assert len(more) == 8 and more[:4] == lines
    facts = json.loads(lines[0])
    assert facts["format"] == 1 and facts["task"] == "passkey" and facts["seconds"] > 0


def test_tasks_are_listed(fam: Run) -> None:
    code, shown, _ = fam("eval", "--list")
    assert code == 0 and "babilong-qa1" in shown and "RULER" in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--tasks"),
        (["--tasks", "nothing"], "no task nothing"),
        (["--tasks", "passkey", "--lengths", "1"], "--lengths takes"),
        (["--tasks", "passkey", "--data", "x"], "--data takes TASK=PATH"),
        (["--tasks", "documents"], "give --data documents=PATH"),
        (["--tasks", "passkey", "--readers", "nobody"], "no reader nobody"),
    ],
)
def test_what_cannot_be_asked_is_refused(
    fam: Run, folder: str, tmp_path: Path, words: list[str], said: str
) -> None:
    output = ["--output", str(tmp_path / "out"), "--quiet"]
    refused(fam("eval", folder, *output, *words), said)


# ---- the figure


def result(length: int, value: float, reader: str = "model", number: int = 0) -> dict[str, Any]:
    return {
        "key": f"{reader}|{length}|{number}",
        "reader": reader,
        "task": "passkey",
        "version": 1,
        "setting": {"length": length},
        "metric": "exact",
        "metrics": {"exact": value},
    }


def test_who_left_questions_out_is_not_taken_for_better() -> None:
    case = Case("passkey", 1, {"length": 100}, 3, lambda _: pytest.fail("asked"), "exact")
    lines = [result(100, value, number=n) for n, value in enumerate([1.0, 0.0, 0.0])]
    lines.append(result(100, 1.0, "full"))
    _, rows = table_of(lines, [case], ["model", "full"])
    assert rows == [["passkey 100", "exact", "0.333 ± 0.333", "1.000 (1 of 3)"]]


def test_a_figure_has_a_panel_a_task_and_a_curve_a_reader() -> None:
    lines = [result(n, float(n < 300), number=i) for n in (100, 200, 400) for i in range(2)]
    lines.append({**result(400, 0.0, "full"), "skipped": "long"})
    del lines[-1]["metrics"]
    lines.append(result(100, 1.0, "full"))
    panels = panels_of(lines)
    (curves,) = panels.values()
    assert [(c.name, list(c.x), list(c.y)) for c in curves] == [
        ("model", [100, 200, 400], [1.0, 1.0, 0.0]),
        ("full", [100], [1.0]),
    ]
    followed = {
        **result(0, 0.0),
        "setting": {"data": "x"},
        "metrics": {
            **{"edges": [0, 1024], "scored": [10, 10], "right": [5, 10]},
            **{"nats": [1, 1], "bytes": [40, 40]},
        },
    }
    old = {**followed, "metrics": {**followed["metrics"]}}
    del old["metrics"]["bytes"]  # of the task's first version
    ((title, documents),) = panels_of([followed, followed, old]).items()
    assert title == "passkey x: tokens predicted right, by place"
    assert (list(documents[0].x), list(documents[0].y)) == ([512, 1536], [0.5, 1.0])


def test_answers_about_other_texts_are_other_panels() -> None:
    lines = [result(100, 1.0), result(100, 0.0, number=1)]
    lines[0]["setting"] = {"length": 100, "filler": "aa", "data": "x/babi"}
    lines[1]["setting"] = {"length": 100, "filler": "aa"}
    assert list(panels_of(lines)) == ["passkey babi: exact", "passkey: exact"]
    lines[1]["setting"]["filler"] = "bb"
    assert list(panels_of(lines)) == [
        "passkey babi (filler aa): exact",
        "passkey (filler bb): exact",
    ]


def test_documents_are_summed_up_by_place_for_each_reader() -> None:
    case = Case("documents", 1, {"data": "x"}, 2, lambda number: Recite([1], [2]), "accuracy", "")

    def followed(
        reader: str, edges: list[int], nats: list[float], accuracy: float
    ) -> dict[str, Any]:
        sums = {"scored": [10] * len(edges), "right": [5] * len(edges), "nats": nats}
        sums["bytes"] = [50] * len(edges)
        return {
            **result(0, 0.0, reader),
            **{"task": "documents", "setting": {"data": "x"}, "metric": "accuracy"},
            "metrics": {"accuracy": accuracy, "edges": edges, **sums},
        }

    lines = [
        followed("model", [0, 1024], [0.0, 20.0], 0.5),
        followed("model", [0], [20.0], 0.2),
        followed("full", [0], [10.0], 0.4),
    ]
    assert places_of(lines, case, ["model", "full", "bswa"]) == (
        ["tokens", "model", "full", "bswa"],
        [
            ["from 0", "2.7 / 0.289", "2.7 / 0.289", "–"],
            ["from 1,024", "7.4 / 0.577", "–", "–"],
        ],
    )
    model, full = summaries(lines, [case], ["model", "full", "bswa"])
    assert model["mean"] == pytest.approx(0.4)  # every token weighs the same
    assert [part["nats"] for part in model["by_place"]] == [20.0, 20.0]
    assert (full["reader"], full["count"], full["length"]) == ("full", 1, None)


def test_one_of_several_processes_tells_what_is_missing(
    fam: Run, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["eval", folder, "--tasks", "passkey", "--lengths", "300", "--samples", "3", "--quiet"]
    words += ["--output", str(tmp_path / "out")]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    code, shown, _ = fam(*words)
    assert code == 0 and "lacks 1 of 3 answers; the same command shows them later" in shown
    monkeypatch.setenv("RANK", "1")
    assert fam(*words) == (0, "", "")
    monkeypatch.setenv("RANK", "0")
    assert "holds every answer" in fam(*words)[1]


def test_the_command_draws_what_was_found(
    fam: Run, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(fam("plot"), "holds no results")
    evaluate.Results(tmp_path / "eval", readers_of(model, ["model"], full_limit=None), seed=0)
    refused(fam("plot"), "nothing to draw")
    lines = [json.dumps(result(n, 1.0)) for n in (100, 200)]
    (tmp_path / "eval" / "results-000.jsonl").write_text("\n".join(lines) + "\n")
    refused(fam("plot", "--tasks", "recall"), "no results of recall")
    assert fam("plot", "--out", "a.png") == (0, "wrote a.png\n", "")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
