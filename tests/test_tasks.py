"""Tasks: what is asked is what they promise, of the length that was wanted, the same each time."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from command_line import Run
from test_text import PROSE, TOKENIZERS
from test_turns import TEMPLATES

from transformerfam.errors import UserError
from transformerfam.tasks import TASKS, Task, Wanted, babilong, longqa
from transformerfam.tasks.cases import Case
from transformerfam.tasks.questions import Choose, Follow, Recite, Say

TOKENIZER = TOKENIZERS["gpt2"]
# Words enough for lists of words.
WORDS = " ".join(f"word{a}{b}" for a in "abcdefghij" for b in "klmnopqrst")
FILLER = [PROSE * 3, WORDS + "."]
_KINDS = ("passkey", "facts", "recall", "ruler-niah", "ruler-vt")
MADE = [name for name in TASKS if name.startswith(_KINDS)]
MADE += ["babilong-qa1", "babilong-qa2"]


def wanted(**changes: Any) -> Wanted:
    return Wanted(**{"tokenizer": TOKENIZER, "lengths": (900,), "filler": FILLER, **changes})


def only(name: str, **changes: Any) -> Case:
    (case,) = TASKS[name].cases(wanted(**changes))
    return case


def text(ids: Any) -> str:
    shown: str = TOKENIZER.decode(list(ids), clean_up_tokenization_spaces=False)
    return shown


def whole(question: Any) -> list[int]:
    """What is read and what is asked behind it."""
    return [*question.text, *question.ids]


@pytest.mark.parametrize("name", MADE)
def test_what_is_made_up_has_its_length_and_is_the_same_each_time(name: str) -> None:
    case = only(name, samples=3)
    assert (case.task, case.count, case.setting["length"]) == (name, 3, 900)
    questions = [case.make(n) for n in range(3)]
    for question in questions:
        assert isinstance(question, Recite | Say)
        assert 898 <= question.tokens <= 902
        json.dumps(dict(question.facts))
    again = only(name, samples=3)
    assert [whole(q) for q in questions] == [whole(again.make(n)) for n in range(3)]
    assert whole(questions[0]) != whole(questions[1])
    other = only(name, samples=3, seed=1)
    assert whole(questions[0]) != whole(other.make(0))


def test_what_is_hidden_in_another_text_is_another_question(tmp_path: Path) -> None:
    (tmp_path / "qa1_test_test.txt").write_text(BABI)
    kept = {}
    changed: dict[str, dict[str, Any]] = {
        "one": {},
        "same": {"filler": tuple(FILLER)},
        "other": {"filler": [*FILLER, "More."]},
        "babi": {"data": {"babilong": str(tmp_path)}},
    }
    for name, changes in changed.items():
        kept[name] = [only(task, **changes) for task in ("passkey", "ruler-vt", "babilong-qa1")]
    settings = {name: [case.setting for case in cases] for name, cases in kept.items()}
    assert settings["one"] == settings["same"]
    assert all(a != b for a, b in zip(settings["one"], settings["other"], strict=True))
    assert settings["one"][:2] == settings["babi"][:2] and settings["one"][2] != settings["babi"][2]
    assert [case.label for case in kept["other"]] == ["passkey", "ruler-vt", "babilong-qa1"]
    assert kept["babi"][2].label == f"babilong-qa1 {tmp_path.name}"


def test_recall_asks_for_a_segment_that_stands_in_the_text() -> None:
    question = only("recall").make(0)
    assert isinstance(question, Recite)
    told, marker, given = text(whole(question)).partition("[repeat random segment]:")
    assert marker and given + text(question.answer) in told


@pytest.mark.parametrize("template", [None, TEMPLATES["chatml"]])
def test_a_fact_is_told_and_what_is_left_to_say_is_what_it_is_about(
    template: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TOKENIZER, "chat_template", template)
    for name in ("facts", "facts-anywhere"):
        for question in map(only(name).make, range(20)):
            assert isinstance(question, Recite)
            key = question.facts["key"]
            assert text(question.answer) == f" {key}"
            assert key in text(question.text) and question.facts["depth"] <= (name != "facts")
            assert ("<|im_start|>" in text(question.ids)) == bool(template)
            assert "?" in text(question.ids) and not text(question.ids).endswith(key)


@pytest.mark.parametrize(
    ("kind", "count"), [("niah", 1), ("niah-multikey", 1), ("niah-multivalue", 4)]
)
def test_needles_are_in_the_text_once_and_the_references_are_those_of_the_word(
    kind: str, count: int
) -> None:
    for n in range(5):
        question = only(f"ruler-{kind}").make(n)
        assert isinstance(question, Say)
        shown = text(whole(question))
        references = question.facts["references"]
        assert len(references) == count
        word = shown.rpartition(" mentioned in")[0].rpartition(" ")[2]
        for reference in references:
            needle = f"One of the special magic numbers for {word} is: {reference}."
            assert shown.count(needle) == 1
        assert shown.count("One of the special magic numbers") == max(count, 4 * ("key" in kind))
        assert question.score(" ".join(references)) == {"recall": 1.0}
        assert question.score(references[0]) == {"recall": 1 / count}


def test_variables_are_a_chain_of_one_value() -> None:
    question = only("ruler-vt").make(0)
    assert isinstance(question, Say)
    shown, names = text(whole(question)), question.facts["references"]
    value = shown.partition(f"VAR {names[0]} = ")[2][:5]
    assert value.isdigit() and len(names) == 5
    places = [shown.index(f"VAR {names[0]} = {value}")]
    places += [shown.index(f"VAR {b} = VAR {a}") for a, b in pairwise(names)]
    assert places == sorted(places)


def test_common_words_come_ten_times_as_often_as_others() -> None:
    with pytest.raises(UserError, match=r"ruler-cwe alone take \d,\d+ tokens"):
        only("ruler-cwe").make(0)
    question = only("ruler-cwe", lengths=(4500,)).make(0)
    assert isinstance(question, Say)
    assert 4300 < question.tokens <= 4500
    listed = text(whole(question)).partition("\n")[2].partition("\nQuestion")[0].split()
    words = [w for w in listed if not w.rstrip(".").isdigit()]
    counts = {word: words.count(word) for word in set(words)}
    common = question.facts["references"]
    assert {counts[word] for word in common} == {30}
    assert {n for word, n in counts.items() if word not in common} == {3}


def test_long_lists_have_pairs_of_words() -> None:
    question = only("ruler-cwe", lengths=(40_000,)).make(0)
    assert 39_000 < question.tokens <= 40_000


# ---- stories


@pytest.mark.parametrize("kind", ["qa1", "qa2"])
def test_the_answer_of_a_story_follows_from_its_facts(kind: str) -> None:
    for n in range(200):
        question = only(f"babilong-{kind}").make(n)
        assert isinstance(question, Say)
        answer = question.facts["answer"]
        shown = text(whole(question))
        asked = shown.rpartition("Where is ")[2].partition("?")[0]
        who = asked
        if kind == "qa2":
            thing = asked.removeprefix("the ")
            before = shown.partition(f" the {thing} there.")[0]
            who = next(p for p in reversed(before.split()) if p in babilong._PEOPLE)
        moves = [
            s for s in shown.split(".") if f"{who} " in s and " the " in s and "there" not in s
        ]
        moves = [m for m in moves if any(move in m for move in babilong._MOVES)]
        assert moves[-1].endswith(f"the {answer}")
        assert question.score(f" {answer}.\nand more") == {"accuracy": 1.0}
        wrong = next(p for p in babilong._PLACES if p != answer)
        assert question.score(f" {answer}. John is in the {wrong}.") == {"accuracy": 1.0}
        assert question.score(f"{answer} or {wrong}") == {"accuracy": 0.0}
        assert question.score(wrong) == {"accuracy": 0.0}


BABI = """1 Mary got the milk there.
2 John moved to the bedroom.
3 Where is the milk? \thallway\t1 2
1 Sandra went back to the kitchen.
2 Where is Sandra? \tKitchen\t1
"""


def test_stories_of_babi_are_read_with_their_facts(tmp_path: Path) -> None:
    (tmp_path / "qa4_relations_test.txt").write_text(BABI)
    first, second = babilong.read_babi(tmp_path, "qa4")
    assert first.facts == ("Mary got the milk there.", "John moved to the bedroom.")
    assert (first.answer, first.supporting) == ("hallway", [0, 1])
    assert (second.question, second.answer) == ("Where is Sandra?", "kitchen")
    case = only("babilong-qa4", data={"babilong": str(tmp_path)})
    assert case.make(0).facts["answer"] in ("hallway", "kitchen")
    with pytest.raises(UserError, match=r"has no file qa5_"):
        babilong.read_babi(tmp_path, "qa5")
    with pytest.raises(UserError, match="give --data babilong=FOLDER"):
        only("babilong-qa3")


# ---- documents and questions about them


def test_documents_are_followed_from_their_start_up_to_the_cut(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(PROSE)
    (tmp_path / "b.txt").write_text(PROSE * 2)
    case = only("documents", data={"documents": str(tmp_path)}, most_tokens=50)
    assert case.count == 2
    question = case.make(1)
    assert isinstance(question, Follow)
    assert len(question.ids) == 50 and (PROSE * 2).startswith(text(question.ids))
    assert question.nbytes == pytest.approx([len(text(question.ids).encode())], abs=3)
    whole = only("documents", data={"documents": str(tmp_path)}).make(0)
    assert isinstance(whole, Follow)
    assert whole.nbytes == [len(PROSE.encode())]
    long = PROSE * (5000 // len(PROSE) * 5)
    (tmp_path / "a.txt").write_text(long)
    parts = only("documents", data={"documents": str(tmp_path / "a.txt")}).make(0)
    assert isinstance(parts, Follow)
    assert list(parts.edges) == [0, 1024, 2048, 4096][: len(parts.edges)] and len(parts.edges) > 2
    assert sum(parts.nbytes) == pytest.approx(len(long.encode()))
    first = len(text(parts.ids[:1024]).encode())
    assert parts.nbytes[0] == pytest.approx(first, rel=0.02)
    with pytest.raises(UserError, match="give --data documents=PATH"):
        only("documents")


def test_documents_of_the_hub_are_asked_for_by_their_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def opened(name: str, **more: Any) -> list[Any]:
        asked.append((name, more))
        return []

    monkeypatch.setattr("transformerfam.tasks.documents.open_rows", opened)
    for name in ("ann/books", "ann/books:validation"):
        only("documents", data={"documents": name})
    assert asked == [("ann/books", {"split": "test"}), ("ann/books", {"split": "validation"})]


ROWS: dict[str, dict[str, Any]] = {
    "narrativeqa": {
        "document": {"text": "A long story."},
        "question": {"text": "Who?"},
        "answers": [{"text": "Ann"}, {"text": "the girl Ann"}],
    },
    "qasper": {"input": "Which data?\n\nA paper about data.", "output": "the usual data"},
    "quality": {
        "input": "Why?\n\n (A) One\n (B) Two\n (C) Three\n (D) Four\n\nA story.\n\nIt goes on.",
        "output": "Three",
    },
    "xlsum": {"text": "An article.", "summary": "Short."},
    "longqa": {"input": "A text.", "instructions": ["One?", "Two?"], "outputs": ["1", "2"]},
}


ANSWERS = {"qasper": "The usual data.", "xlsum": "Short.", "longqa": "1"}


@pytest.mark.parametrize("name", ROWS)
def test_rows_become_questions(name: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(ROWS[name]) + "\n")
    case = only(name, data={name: str(file)})
    assert case.count == (2 if name == "longqa" else 1)
    question = case.make(0)
    assert isinstance(question, Say | Choose)
    shown = text(whole(question))
    if isinstance(question, Choose):
        assert [text(c) for c in question.choices] == [" One", " Two", " Three", " Four"]
        assert question.gold == 2
        assert "A story.\n\nIt goes on.\n\nQuestion: Why?\nAnswer:" in shown
    elif name == "narrativeqa":
        assert question.score("the girl Ann")["rougeL"] == 1.0
        assert question.score("ann!") == {"rougeL": 1.0, "f1": 1.0}
        assert "A long story.\n\nQuestion: Who?\nAnswer:" in shown
    else:
        assert question.score("nothing of it")["rougeL"] < 0.5
        right = question.score(f"{ANSWERS[name]}\n\nQuestion: And now?")
        assert right["rougeL"] == pytest.approx(1.0)


def test_rows_of_one_question_are_its_references(tmp_path: Path) -> None:
    """SCROLLS writes a row for each reference."""
    file, row = tmp_path / "rows.jsonl", ROWS["qasper"]
    rows = [row, {**row, "output": "data"}, {"input": "Who?\n\nA paper.", "output": "Ann"}]
    file.write_text("\n".join(map(json.dumps, rows)))
    for name in ("qasper", "narrativeqa"):
        case = only(name, data={name: str(file)}, samples=1)
        assert case.count == 1
        first = case.make(0)
        assert isinstance(first, Say) and first.score("data")["f1"] == 1.0
        assert only(name, data={name: str(file)}).count == 2


def test_each_document_is_asked_about_once_before_one_is_asked_about_again(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [
        {"input": name, "instructions": [f"{name}{n}?" for n in "123"], "outputs": ["a", "b", "c"]}
        for name in ("One", "Two", "Three")
    ]
    file.write_text("\n".join(map(json.dumps, rows)))

    def asked(samples: int) -> list[str]:
        case = only("longqa", data={"longqa": str(file)}, samples=samples)
        shown = [text(whole(case.make(number))) for number in range(case.count)]
        return [one.partition("Question: ")[2].partition("?")[0] for one in shown]

    assert asked(2) == ["One1", "Two1"]
    assert asked(5) == ["One1", "Two1", "Three1", "One2", "Two2"]
    assert asked(99)[5:] == ["Three2", "One3", "Two3", "Three3"]


def test_other_files_in_a_folder_are_other_documents(tmp_path: Path) -> None:
    def setting() -> dict[str, Any]:
        return dict(only("documents", data={"documents": str(tmp_path)}).setting)

    (tmp_path / "m.txt").write_text("A text.")
    before = setting()
    assert setting() == before
    (tmp_path / "a.txt").write_text("Another text.")
    assert setting() != before


def test_words_are_compared_as_squad_does() -> None:
    assert longqa.f1("The cat, sat", "a cat sat") == 1.0
    assert longqa.f1("cat sat down", "cat") == pytest.approx(0.5)
    assert longqa.f1("the", "cat") == 0.0


def test_rows_that_are_something_else_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "x"}\n')
    with pytest.raises(UserError, match=r"Row 1 of .* is none of qasper"):
        only("qasper", data={"qasper": str(file)})
    file.write_text("no json\n")
    with pytest.raises(UserError, match=r"rows\.jsonl:1 is not JSON"):
        only("qasper", data={"qasper": str(file)})


# ---- the list


def test_a_new_task_is_a_function_and_a_line(
    fam: Run, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As docs/evaluation.md says."""

    def cases(wanted: Wanted) -> list[Case]:
        def make(number: int) -> Recite:
            ids = wanted.encoder.encode("so it goes on", first=True)
            return Recite(ids[:-1], ids[-1:], {"draw": wanted.rng("dummy", number).random()})

        return [Case("dummy", 1, {"length": 5}, wanted.samples, make, "exact")]

    monkeypatch.setitem(TASKS, "dummy", Task(cases, "the end of a sentence", "nothing"))
    words = ["--tasks", "dummy", "--samples", "2", "--output", str(tmp_path / "out"), "--quiet"]
    code, shown, err = fam("eval", folder, *words, "--block-size", "16")
    assert (code, err) == (0, "")
    assert "dummy 5" in shown


def test_the_page_lists_every_task() -> None:
    page = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    for name, task in TASKS.items():
        assert f"| `{name}` | {task.about} | {task.source} |" in page, "run make docs"
