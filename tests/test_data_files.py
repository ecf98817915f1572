"""Files become rows; what cannot be used is counted or refused, with file, line and reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from transformerfam.data.examples import BadRow
from transformerfam.data.files import BadRows, Rows, open_rows
from transformerfam.data.hub import load_table
from transformerfam.errors import UserError
from transformerfam.extras import MissingExtraError
from transformerfam.tasks.longqa import SOURCES

GOOD: list[dict[str, Any]] = [
    {"text": "Ann waits."},
    {"prompt": "Who?", "completion": " Ann."},
    {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ann."}]},
]


def write(path: Path, *lines: object) -> str:
    """JSON lines; bytes are written as they are."""
    data = b"".join(
        (line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines
    )
    path.write_bytes(data)
    return str(path)


def everything(rows: Rows) -> list[Any]:
    return [rows[i] for i in range(len(rows))]


# ---- JSON lines


def test_json_lines_are_rows_with_the_columns_that_are_learnt_from(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *({**row, "id": n} for n, row in enumerate(GOOD)))
    rows = open_rows(path)
    assert everything(rows) == GOOD
    assert rows.bad == BadRows()
    assert [rows.places(i) for i in range(3)] == [f"{path}:{n}" for n in (1, 2, 3)]
    with pytest.raises(IndexError, match="no row 3"):
        rows[3]


BAD_LINES: list[tuple[object, str]] = [
    (b"{", "it is not JSON: expecting property name"),
    (b'{"text": "\xff"}', "it is not UTF-8: byte 10 of the line is wrong"),
    (b"[" * 100_000, "it is not JSON: "),
    (["a"], "it is not an object with named columns"),
    ({"text": 1}, "its text is not text but a number"),
    ({"body": "a"}, "it has body, but not prompt and completion, messages, or text"),
    (b'{"text": "\\ud800"}', "its text has half of a surrogate pair"),
]


def test_bad_lines_are_counted_with_their_place_and_reason(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", GOOD[0], b"", *(bad for bad, _ in BAD_LINES), b" ", GOOD[1])
    rows = open_rows(path)
    assert everything(rows) == GOOD[:2]
    assert [rows.places(i) for i in range(2)] == [f"{path}:1", f"{path}:11"]
    assert rows.bad.count == len(BAD_LINES)
    assert len(rows.bad.examples) == 5
    for number, (shown, (_, reason)) in enumerate(
        zip(rows.bad.examples, BAD_LINES, strict=False), 3
    ):
        assert shown.startswith(f"{path}:{number}: {reason}")


@pytest.mark.parametrize("number", range(len(BAD_LINES)))
def test_refuse_refuses_the_first_bad_line(tmp_path: Path, number: int) -> None:
    bad, reason = BAD_LINES[number]
    path = write(tmp_path / "a.jsonl", GOOD[0], bad)
    with pytest.raises(UserError) as refused:
        open_rows(path, bad_rows="refuse")
    assert str(refused.value).startswith(f"{path}:2 cannot be used: {reason}")
    assert len(open_rows(path)) == 1


def test_a_file_of_which_no_line_can_be_used_is_always_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"body": "a"}, {"body": "b"})
    with pytest.raises(UserError, match=r"no line that can be used; line 1: it has body"):
        open_rows(path)
    write(tmp_path / "b.jsonl", *GOOD)
    with pytest.raises(UserError, match=r"a\.jsonl has no line that can be used"):
        open_rows(str(tmp_path))


def test_the_last_line_needs_no_end_and_the_first_may_have_a_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a b"}\r\n{"text": "c d"}')
    assert everything(open_rows(str(path))) == [{"text": "a b"}, {"text": "c d"}]


@pytest.mark.parametrize("indent", [None, 1])
def test_one_json_array_is_refused_with_what_to_do(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(GOOD, indent=indent))
    with pytest.raises(UserError, match="one JSON array; write one object on each line"):
        open_rows(str(path))


def test_a_column_of_texts_may_have_another_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"book": "Ann waits.", "text": 3}, {"text": "a"})
    rows = open_rows(path, text_column="book")
    assert everything(rows) == [{"text": "Ann waits."}]
    assert rows.bad.examples == [f"{path}:2: it has no book"]


def test_a_file_that_goes_away_makes_bad_rows(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", *GOOD)
    (tmp_path / "b.txt").write_text("Ann waits.")
    rows = open_rows(str(tmp_path))
    for path in tmp_path.iterdir():
        path.unlink()
    for row in (0, 3):
        with pytest.raises(BadRow, match="cannot be read any more: no such file"):
            rows[row]


# ---- text files


def test_a_text_file_is_one_row_read_when_it_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "book.rst"
    path.write_bytes(b"\xef\xbb\xbfAnn\r\nwaits.\n")
    rows = open_rows(str(path))
    assert (len(rows), rows.places(0)) == (1, str(path))
    assert rows[0] == {"text": "Ann\r\nwaits.\n"}
    path.write_text("Ann left.")
    assert rows[0] == {"text": "Ann left."}


BAD_TEXTS = {
    b"": "it is empty",
    b"\xef\xbb\xbf \n": "it is empty",
    b"abc\xe9 d": "it is not UTF-8 text: byte 3 cannot be decoded; convert it with iconv",
    b"ab\0c": "it is not a text file: it has a NUL byte at byte 2",
    "Ann".encode("utf-16"): "it is UTF-16; convert it with iconv -f UTF-16 -t UTF-8",
}


@pytest.mark.parametrize("data", BAD_TEXTS)
def test_what_is_no_text_is_refused_alone_and_left_out_among_others(
    tmp_path: Path, data: bytes
) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    with pytest.raises(UserError) as alone:
        open_rows(str(path))
    assert str(alone.value) == f"{path} cannot be used: {BAD_TEXTS[data]}."
    (tmp_path / "b.txt").write_text("Ann waits.")
    rows = open_rows(str(tmp_path))
    assert everything(rows) == [{"text": "Ann waits."}]
    assert rows.bad == BadRows(1, [f"{path}: {BAD_TEXTS[data]}"])
    with pytest.raises(UserError) as among:
        open_rows(str(tmp_path), bad_rows="refuse")
    assert str(among.value) == f"{path} cannot be used: {BAD_TEXTS[data]}."


# ---- folders and patterns


def test_a_folder_gives_all_its_files_in_sorted_order(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", *GOOD[:2])
    (tmp_path / "c").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("a.txt", "c/d.MD", "e.py", ".git/f.txt", ".g.txt"):
        (tmp_path / name).write_text(name)
    rows = open_rows(str(tmp_path))
    assert everything(rows) == [{"text": "a.txt"}, *GOOD[:2], {"text": "c/d.MD"}]
    assert [Path(rows.places(i)).name for i in range(4)] == [
        "a.txt",
        "b.jsonl:1",
        "b.jsonl:2",
        "d.MD",
    ]


def test_a_pattern_gives_the_files_that_it_matches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c").mkdir()
    for name in ("b.py", "a.py", "c/d.py", "e.txt", "[1].txt"):
        (tmp_path / name).write_text(name)
    assert everything(open_rows(f"{tmp_path}/*.py")) == [{"text": "a.py"}, {"text": "b.py"}]
    assert len(open_rows(f"{tmp_path}/**/*.py")) == 3
    # A file of that very name is no pattern; and ~ is the user's folder.
    monkeypatch.setenv("HOME", str(tmp_path))
    assert everything(open_rows("~/[1].txt")) == [{"text": "[1].txt"}]


def test_nothing_to_read_is_one_sentence(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "e.py").write_text("a")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "bad.txt").write_text("")
    (tmp_path / "worse.txt").write_text("")
    for name, sentence in {
        "folder": "The folder {} holds no .jsonl, .ndjson, .json, .parquet, .txt, .md file.",
        "empty.jsonl": "{} is empty: there is no row to read.",
        "*.pdf": "No file is called like {}.",
        "none.jsonl": "There is no file {}.",
        "none": "There is no file {}.",
        "*.txt": f"{{}} has no row that can be used: {tmp_path}/bad.txt: it is empty.",
    }.items():
        path = f"{tmp_path}/{name}"
        with pytest.raises(UserError) as refused:
            open_rows(path)
        assert str(refused.value) == sentence.format(path)


def test_a_file_that_may_not_be_read_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deny(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    for name in ("a.txt", "a.jsonl"):
        path = write(tmp_path / name, GOOD[0])
        with monkeypatch.context() as patched:
            patched.setattr("builtins.open", deny)
            patched.setattr(Path, "read_bytes", deny)
            with pytest.raises(UserError) as refused:
                open_rows(path)
        assert str(refused.value) == f"{path} cannot be read: permission denied."


# ---- parquet and the hub


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    found = pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return found


def test_a_parquet_file_is_rows_that_are_looked_at_when_drawn(
    tmp_path: Path, datasets: Any
) -> None:
    path = str(tmp_path / "a.parquet")
    datasets.Dataset.from_dict(
        {"text": ["Ann waits.", None, "She left."], "id": [1, 2, 3]}
    ).to_parquet(path)
    rows = open_rows(path)
    assert [rows[0], rows[2]] == [{"text": "Ann waits."}, {"text": "She left."}]
    with pytest.raises(BadRow, match="its text is not text but null"):
        rows[1]
    assert rows.bad.count == 0
    for _ in range(2):
        rows.cannot_use(1, "its text is null")
    assert rows.bad == BadRows(1, [f"{path}:2: its text is null"])
    refusing = open_rows(path, bad_rows="refuse")
    with pytest.raises(UserError, match=r"a\.parquet:2 cannot be used: why\."):
        refusing.cannot_use(1, "why")


def test_a_parquet_file_of_conversations(tmp_path: Path, datasets: Any) -> None:
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_list([GOOD[2]]).to_parquet(str(path))
    write(tmp_path / "b.jsonl", GOOD[2])
    assert everything(open_rows(str(tmp_path))) == [GOOD[2], GOOD[2]]


def test_a_table_without_the_columns_is_refused(tmp_path: Path, datasets: Any) -> None:
    path = str(tmp_path / "a.parquet")
    datasets.Dataset.from_dict({"body": ["a"], "id": [1]}).to_parquet(path)
    with pytest.raises(UserError, match="has the columns body, id, but not prompt and completion,"):
        open_rows(path)
    assert everything(open_rows(path, text_column="body")) == [{"text": "a"}]
    Path(path).write_text("no table")
    with pytest.raises(UserError, match=r"a\.parquet is no parquet file: "):
        open_rows(path)


def test_data_sets_of_the_hub_that_are_programs_are_read_from_what_it_made_of_them(
    datasets: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []

    def load(name: str, configuration: str | None = None, **more: Any) -> Any:
        asked.append((name, configuration, more))
        if "revision" not in more and name.startswith("ann/"):
            raise RuntimeError("Dataset scripts are no longer supported, but found news.py")
        return name

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_table("ann/news", "test", "welsh") == "ann/news"
    converted = {"data_dir": "welsh", "split": "test", "revision": "refs/convert/parquet"}
    assert asked == [
        ("ann/news", "welsh", {"split": "test"}),
        ("ann/news", None, converted),
    ]
    url = SOURCES["qasper"].hub
    assert url is not None and load_table(url[0], url[2], url[1]) == "json"
    (split, file), *others = asked[-1][2]["data_files"].items()
    assert split == asked[-1][2]["split"] == "validation" and not others
    assert file.startswith("zip://qasper/validation.jsonl::https://")


def test_any_other_name_is_of_the_hub(
    tmp_path: Path, datasets: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(name: str, configuration: None, *, split: str) -> Any:
        if split != "test":
            raise ValueError(f'Unknown split "{split}".\nShould be one of ["test"].')
        return datasets.Dataset.from_dict({"text": [name]})

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = open_rows("ann/harbour", split="test")
    assert everything(rows) == [{"text": "ann/harbour"}]
    assert rows.places(0) == "ann/harbour:1"
    with pytest.raises(UserError) as refused:
        open_rows("harbour")
    assert str(refused.value) == (
        "There is no file or folder harbour, and no data set harbour with a split train could be "
        'loaded: Unknown split "train".'
    )


def test_tables_need_an_extra_and_files_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    (tmp_path / "a.parquet").write_text("")
    with pytest.raises(MissingExtraError, match=r"transformerfam\[train\]"):
        open_rows(str(tmp_path / "a.parquet"))
    assert len(open_rows(write(tmp_path / "b.jsonl", *GOOD))) == 3
