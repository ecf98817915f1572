"""Tasks of GPT-3's paper: rows as llm-foundry writes them become the questions that table 12 scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import Run
from test_tasks import TOKENIZER, only, text

from transformerfam.errors import UserError
from transformerfam.tasks import TASKS
from transformerfam.tasks.gpt3 import HARNESS
from transformerfam.tasks.questions import Choose, Fit, Recite, Say
from transformerfam.text import start_tokens

CHOOSE = {"query": "Question: Why is it grey?\n", "choices": ["Rain.", "The sea."], "gold": 1}
FIT = {
    "context_options": ["Ann saw the ship so Ann", "Ann saw the ship so the ship"],
    "continuation": "waited.",
    "gold": 0,
}
RECITE = {"context": "They waited for the", "continuation": "ship"}
SAY = {"context": "Question: Who waited?\nAnswer:", "answer": "Ann", "aliases": ["The Ann Lee"]}
ROWS: dict[str, dict[str, Any]] = {
    "gpt3-arc-challenge": CHOOSE,
    "gpt3-arc-easy": CHOOSE,
    "gpt3-openbookqa": CHOOSE,
    "gpt3-piqa": CHOOSE,
    "gpt3-winograd": FIT,
    "gpt3-winogrande": FIT,
    "gpt3-lambada": RECITE,
    "gpt3-triviaqa": SAY,
}


def asked(name: str, folder: Path, *rows: dict[str, Any]) -> Any:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return only(name, data={name: str(file)}, samples=2)


def read(ids: Any) -> str:
    """The text of a stream that begins as the tokenizer begins texts."""
    start = start_tokens(TOKENIZER)
    assert list(ids)[: len(start)] == start
    return text(ids[len(start) :])


def test_every_task_is_tried() -> None:
    assert set(ROWS) == {name for name in TASKS if name.startswith("gpt3-")}


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row is CHOOSE])
def test_choices_follow_the_question(name: str, tmp_path: Path) -> None:
    case = asked(name, tmp_path, CHOOSE, CHOOSE, CHOOSE)
    assert (case.count, case.metric) == (2, "accuracy")
    question = case.make(1)
    assert isinstance(question, Choose)
    wanted = "Question: Why is it grey?"
    assert read(question.ids) == wanted + ("" if name == "gpt3-openbookqa" else "\nAnswer:")
    assert [text(choice) for choice in question.choices] == [" Rain.", " The sea."]
    assert (question.gold, question.lengths) == (1, [5, 8])


@pytest.mark.parametrize("name", ["gpt3-winograd", "gpt3-winogrande"])
def test_of_schemas_what_follows_is_scored(name: str, tmp_path: Path) -> None:
    question = asked(name, tmp_path, FIT).make(0)
    assert isinstance(question, Fit)
    assert [read(context) for context in question.contexts] == FIT["context_options"]
    assert (text(question.continuation), question.gold) == (" waited.", 0)


def test_the_last_word_is_recited(tmp_path: Path) -> None:
    case = asked("gpt3-lambada", tmp_path, RECITE)
    question = case.make(0)
    assert isinstance(question, Recite) and case.metric == "exact"
    assert (read(question.ids), text(question.answer)) == ("They waited for the", " ship")


def test_any_alias_is_an_exact_match_without_case_punctuation_and_articles(tmp_path: Path) -> None:
    case = asked("gpt3-triviaqa", tmp_path, SAY)
    question = case.make(0)
    assert isinstance(question, Say) and case.metric == "exact_match"
    assert read(question.ids) == SAY["context"]
    for said, right in [(" Ann", 1), (" the ann-lee!\nQ", 1), (" Ann Lee Ann", 0), ("", 0)]:
        assert question.score(said) == {"exact_match": float(right)}


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_another_kind_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"Row 1 of .*rows\.jsonl is none of {name}"):
        asked(name, tmp_path, {"text": "x"})
    with pytest.raises(UserError, match="has no question"):
        asked(name, tmp_path)
    with pytest.raises(UserError, match=f"give --data {name}=PATH"):
        only(name)


def test_a_right_answer_that_is_no_choice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is none of gpt3-arc-easy"):
        asked("gpt3-arc-easy", tmp_path, {**CHOOSE, "gold": 2})


def test_they_are_asked_on_the_command_line(fam: Run, folder: str, tmp_path: Path) -> None:
    words = []
    for name in "gpt3-piqa", "gpt3-winograd", "gpt3-lambada":
        file = tmp_path / f"{name}.jsonl"
        file.write_text(json.dumps(ROWS[name]) + "\n")
        words += ["--data", f"{name}={file}"]
    out = str(tmp_path / "out")
    tasks = "gpt3-piqa,gpt3-winograd,gpt3-lambada"
    code, shown, err = fam("eval", folder, "--tasks", tasks, *words, "--output", out, "--quiet")
    assert (code, err) == (0, "")
    assert all(name in shown for name in tasks.split(","))


def test_the_page_has_the_command_for_all_tasks_of_the_harness() -> None:
    page = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert f"--tasks {','.join(HARNESS.values())}" in page, "run make docs"
