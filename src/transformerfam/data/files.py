"""JSON lines, parquet, text files, folders and data sets of the hub, as rows; and which rows are bad.

Knows files and what columns a row needs. Knows no tokenizer: what a row becomes is not asked here.
"""

from __future__ import annotations

import bisect
import codecs
import glob
import itertools
import json
import os
import re
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from transformerfam.data.examples import BadRow, checked
from transformerfam.data.hub import load_table
from transformerfam.errors import UserError, reason_of
from transformerfam.extras import require

JSON_LINES = (".jsonl", ".ndjson", ".json")
SUFFIXES = (*JSON_LINES, ".parquet", ".txt", ".md")  # what is taken of a folder
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_SHOWN = 5

Note = Callable[[str, str], None]
"""Told the place and the reason of each bad row."""


@dataclass
class BadRows:
    """Rows that cannot be used.

    Attributes:
        count: how many were found so far.
        examples: the first few, as "file:line: reason".
    """

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, place: str, reason: str) -> None:
        """Count one more."""
        self.count += 1
        if len(self.examples) < _SHOWN:
            self.examples.append(f"{place}: {reason}")


class RowFile(Protocol):
    """Rows of one file."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """One row as `checked` gives it; raises BadRow if it cannot be used."""

    def place(self, index: int) -> str:
        """Where the row stands, for a message."""


class Rows:
    """Rows of several files, one after the other.

    Args:
        name: what the user called them.
        files: where they are.
        bad: rows that were found to be bad already, and are not among those of `files`.
        refuse: a bad row that is found later is an error.

    Attributes:
        late: those among `bad` that were found when they were drawn.
    """

    def __init__(
        self, name: str, files: Sequence[RowFile], bad: BadRows, *, refuse: bool = False
    ) -> None:
        self.name = name
        self.bad = bad
        self.late = BadRows()
        self._files = [file for file in files if len(file)]
        self._ends = list(itertools.accumulate(map(len, self._files)))
        self._refuse = refuse
        self._found: set[int] = set()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """Row `index`: {prompt, completion}, {messages} or {text}. Raises BadRow with the reason."""
        file, row = self._find(index)
        return file[row]

    def places(self, index: int) -> str:
        """Where row `index` stands, as "file:line"; a text file is one row, called by its name."""
        file, row = self._find(index)
        return file.place(row)

    def cannot_use(self, index: int, reason: str) -> None:
        """Count row `index` among the bad, once; in "refuse" it is an error.

        Raises:
            UserError: naming file, line and reason.
        """
        if self._refuse:
            raise _refusal(self.places(index), reason)
        if index not in self._found:
            self._found.add(index)
            for kept in (self.bad, self.late):
                kept.add(self.places(index), reason)

    def _find(self, index: int) -> tuple[RowFile, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has {len(self):,} rows and no row {index}.")
        file = bisect.bisect_right(self._ends, index)
        return self._files[file], index - (self._ends[file - 1] if file else 0)


def open_rows(
    path_or_name: str,
    *,
    split: str = "train",
    text_column: str | None = None,
    bad_rows: Literal["skip", "refuse"] = "skip",
) -> Rows:
    """Open what a user calls data.

    JSON lines and text files are read through once, so that their bad rows are known; nothing of them
    is kept in memory. Rows of a parquet file or of the hub are looked at when they are drawn.

    Args:
        path_or_name: a .jsonl, .ndjson or .json file with an object on each line, a .parquet file, a
            text file, which is one row {text}; a folder, of which all such files are taken in sorted
            order, also from folders in it; a pattern with *; or the name of a data set on the hub.
        split: of a data set of the hub.
        text_column: the column of plain texts, if it is not `text`.
        bad_rows: leave bad rows out and count them, or refuse the first.

    Raises:
        UserError: there are no rows, none can be used, or with "refuse" one cannot.
    """
    bad, refuse = BadRows(), bad_rows == "refuse"

    def note(place: str, reason: str) -> None:
        if refuse:
            raise _refusal(place, reason)
        bad.add(place, reason)

    files: list[RowFile]
    paths = _files_of(path_or_name)
    if paths is None:
        files = [_Table.from_hub(path_or_name, split, text_column)]
    else:
        files = [_open(path, text_column, note) for path in paths]
    rows = Rows(path_or_name, files, bad, refuse=refuse)
    if not len(rows):
        if not bad.count:
            raise UserError(f"{path_or_name} is empty: there is no row to read.")
        if [path_or_name] == paths:
            raise _refusal(path_or_name, bad.examples[0].removeprefix(f"{path_or_name}: "))
        raise UserError(f"{path_or_name} has no row that can be used: {bad.examples[0]}.")
    return rows


def plain_texts(path: str) -> list[str]:
    """The rows {text} of what `open_rows` opens; rows of other kinds are left out."""
    rows, texts = open_rows(path), []
    for index in range(len(rows)):
        try:
            texts.append(str(rows[index]["text"]))
        except (BadRow, KeyError):  # other rows will do
            continue
    return texts


# ---- parts


def _refusal(place: str, reason: str) -> UserError:
    return UserError(f"{place} cannot be used: {reason}.")


def _files_of(name: str) -> list[str] | None:
    """The files that a path or a pattern means, in sorted order; None: it must be of the hub."""
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        below = Path(path).rglob("*")
        found = sorted(
            str(file)
            for file in below
            if file.suffix.lower() in SUFFIXES
            and file.is_file()
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        )
        if not found:
            raise UserError(f"The folder {name} holds no {', '.join(SUFFIXES)} file.")
        return found
    if os.path.exists(path):
        return [path]
    if glob.has_magic(path):
        found = sorted(file for file in glob.glob(path, recursive=True) if os.path.isfile(file))
        if not found:
            raise UserError(f"No file is called like {name}.")
        return found
    if Path(path).suffix.lower() in SUFFIXES or not _HUB_NAME.fullmatch(name):
        raise UserError(f"There is no file {name}.")
    return None


def _open(path: str, text_column: str | None, note: Note) -> RowFile:
    suffix = Path(path).suffix.lower()
    try:
        if suffix in JSON_LINES:
            return _Lines(path, text_column, note)
        if suffix == ".parquet":
            return _Table.from_parquet(path, text_column)
        return _Text(path, note)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason_of(error)}.") from None


class _Lines:
    """JSON lines; the rows are the good ones, found by where they begin in the file."""

    def __init__(self, path: str, text_column: str | None, note: Note) -> None:
        self._path = path
        self._text_column = text_column
        self._starts, self._numbers = array("q"), array("q")
        with open(path, "rb") as file:
            first = ""
            start = 0
            for number, line in enumerate(file, 1):
                try:
                    if line.strip():
                        self._parse(line, start)
                        self._starts.append(start)
                        self._numbers.append(number)
                except BadRow as bad:
                    first = first or f"line {number}: {bad.reason}"
                    note(f"{path}:{number}", bad.reason)
                start += len(line)
        if first and not self._starts:
            raise UserError(f"{path} has no line that can be used; {first}.")

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        start = self._starts[index]
        try:
            with open(self._path, "rb") as file:
                file.seek(start)
                return self._parse(file.readline(), start)
        except OSError as error:
            raise BadRow(f"it cannot be read any more: {reason_of(error)}") from None

    def place(self, index: int) -> str:
        return f"{self._path}:{self._numbers[index]}"

    def _parse(self, line: bytes, start: int) -> dict[str, Any]:
        if start == 0:
            line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip() == b"[" or line.startswith(b"[{"):
                raise UserError(
                    f"{self._path} is one JSON array; write one object on each line instead, as "
                    "jq -c '.[]' does."
                )
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise BadRow(f"it is not UTF-8: byte {error.start:,} of the line is wrong") from None
        except (ValueError, RecursionError) as error:
            raise BadRow(f"it is not JSON: {' '.join(str(error).split()).lower()}") from None
        return checked(row, self._text_column)


class _Text:
    """A text file: one row, or none if it is bad. It is read again when the row is asked for."""

    def __init__(self, path: str, note: Note) -> None:
        self._path = path
        try:
            read_text(path)
            self._length = 1
        except BadRow as bad:
            self._length = 0
            note(path, bad.reason)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        try:
            return {"text": read_text(self._path)}
        except OSError as error:
            raise BadRow(f"it cannot be read any more: {reason_of(error)}") from None

    def place(self, index: int) -> str:
        return self._path


def read_text(path: str) -> str:
    """The text of a file in UTF-8.

    Raises:
        BadRow: it is empty or no UTF-8 text.
        OSError: it cannot be read.
    """
    data = Path(path).read_bytes()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise BadRow("it is UTF-16; convert it with iconv -f UTF-16 -t UTF-8")
    if (nul := data.find(b"\0")) >= 0:
        raise BadRow(f"it is not a text file: it has a NUL byte at byte {nul:,}")
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise BadRow(
            f"it is not UTF-8 text: byte {error.start:,} cannot be decoded; convert it with iconv"
        ) from None
    if not text.strip():
        raise BadRow("it is empty")
    return text


class _Table:
    """A table of the datasets library; rows are looked at when they are asked for."""

    def __init__(self, table: Any, name: str, text_column: str | None) -> None:
        self._name = name
        self._table = table
        self._text_column = text_column
        wanted = (
            [{"prompt", "completion"}, {"messages"}, {"text"}]
            if text_column is None
            else [{text_column}]
        )
        has = list(table.column_names)
        if not any(columns <= set(has) for columns in wanted):
            needs = text_column or "prompt and completion, messages, or text"
            raise UserError(f"{name} has the columns {', '.join(has)}, but not {needs}.")

    @classmethod
    def from_parquet(cls, path: str, text_column: str | None) -> _Table:
        datasets = require("datasets", "train")
        try:
            table = datasets.Dataset.from_parquet(path)
        except Exception as error:  # the library's errors are of many classes
            raise UserError(f"{path} is no parquet file: {first_line(error)}.") from error
        return cls(table, path, text_column)

    @classmethod
    def from_hub(cls, name: str, split: str, text_column: str | None) -> _Table:
        try:
            table = load_table(name, split)
        except Exception as error:
            raise UserError(
                f"There is no file or folder {name}, and no data set {name} with a split {split} "
                f"could be loaded: {first_line(error)}."
            ) from error
        return cls(table, name, text_column)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return checked(self._table[index], self._text_column)

    def place(self, index: int) -> str:
        return f"{self._name}:{index + 1}"


def first_line(error: Exception) -> str:
    """What an error of another library says, as a part of a sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
