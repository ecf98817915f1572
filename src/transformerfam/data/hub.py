"""Data sets of the Hugging Face hub, those among them that are programs."""

from __future__ import annotations

from typing import Any

from transformerfam.extras import require

# The branch on which the hub keeps, as parquet files, what such a program once gave.
_CONVERTED = "refs/convert/parquet"


def load_table(name: str, split: str, configuration: str | None = None) -> Any:
    """A split of a data set, as a table of the library `datasets`.

    Args:
        name: OWNER/NAME, or an address of .jsonl files that `datasets` understands.
        split: its part.
        configuration: the data set's own name for one of its kinds.

    Raises:
        Exception: of many classes, if it cannot be had.
    """
    datasets = require("datasets", "train")
    if "://" in name:
        return datasets.load_dataset("json", data_files={split: name}, split=split)
    try:
        return datasets.load_dataset(name, configuration, split=split)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        # There a configuration is a folder.
        return datasets.load_dataset(name, data_dir=configuration, split=split, revision=_CONVERTED)
