"""Rows of any columns, in order, from JSON lines, parquet or the hub: for tasks, which know their own.

What training reads is in `files`, which knows what columns it needs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformerfam.data.files import JSON_LINES, first_line
from transformerfam.data.hub import load_table
from transformerfam.errors import UserError
from transformerfam.extras import require


def open_table(
    path: str | None, *, hub: tuple[str, str | None, str] | None
) -> Iterator[Mapping[str, Any]]:
    """Rows of a file or, without one, of a data set of the hub.

    Args:
        path: a .jsonl or .parquet file.
        hub: (name, configuration, split), see `hub.load_table`.

    Raises:
        UserError: they cannot be read; for JSON lines with the line, when it is come to.
    """
    if path is None:
        assert hub is not None
        return _from_hub(*hub)
    if not Path(path).is_file():
        raise UserError(f"There is no file {path}.")
    if Path(path).suffix.lower() in JSON_LINES:
        return _lines(path)
    if Path(path).suffix.lower() == ".parquet":
        return _parquet(path)
    raise UserError(f"{path} is neither a .jsonl nor a .parquet file.")


def _lines(path: str) -> Iterator[Mapping[str, Any]]:
    try:
        file = open(path, "rb")  # noqa: SIM115  # closed below
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None
    with file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if not text:
                    continue
                row = json.loads(text)
            except ValueError as error:
                raise UserError(f"{path}:{number} is not JSON: {error}.") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number} is not an object with named columns.")
            yield row


def _parquet(path: str) -> Iterator[Mapping[str, Any]]:
    datasets = require("datasets", "train")
    try:
        table = datasets.Dataset.from_parquet(path)
    except Exception as error:  # the library's errors are of many classes
        raise UserError(f"{path} is no parquet file: {first_line(error)}.") from error
    yield from table


def _from_hub(name: str, configuration: str | None, split: str) -> Iterator[Mapping[str, Any]]:
    try:
        table = load_table(name, split, configuration)
    except Exception as error:
        raise UserError(
            f"The data set {name} could not be loaded from the hub ({first_line(error)}); give a "
            "file of the same columns with --data."
        ) from error
    yield from table
