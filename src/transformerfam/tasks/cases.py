"""What a task is: cases, each of one setting, each with questions made from a number.

A task is a function from `Wanted` to cases; `tasks.TASKS` lists them by name. Adding one is adding a
module and a line there.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from glob import glob
from pathlib import Path
from typing import Any

from transformerfam.data.haystack import Haystack
from transformerfam.errors import UserError
from transformerfam.tasks.questions import Question
from transformerfam.text import Encoder

_FEWEST_WORDS = 50
_FILLER, _FILES = "filler", "files"  # fingerprints in a case's setting


@dataclass(frozen=True)
class Wanted:
    """What is to be asked, whatever the task.

    Attributes:
        tokenizer: a tokenizer of transformers.
        lengths: of texts that are made up, in tokens.
        samples: questions of each setting; of files at most so many.
        seed: of everything that is made up.
        filler: texts to hide things in.
        data: name of a task -> file, folder or name on the hub.
        most_tokens: longer documents are cut here (the paper cuts at 262,144); None: never.
        language: of XL-Sum's texts, see `rouge.LANGUAGES`, where their rows do not say.
    """

    tokenizer: Any
    lengths: Sequence[int] = (1024, 4096, 16384)
    samples: int = 20
    seed: int = 0
    filler: Sequence[str] = ()
    data: Mapping[str, str] = field(default_factory=dict)
    most_tokens: int | None = None
    language: str = "english"

    @cached_property
    def encoder(self) -> Encoder:
        """For pieces of a text."""
        return Encoder(self.tokenizer)

    @cached_property
    def haystack(self) -> Haystack:
        """The filler's sentences."""
        return Haystack(self.encoder, self.filler)

    @cached_property
    def words(self) -> list[str]:
        """Different words of the filler, in alphabetical order."""
        text = " ".join(self.filler)
        found = sorted(set(re.findall(r"\b[a-z]{4,10}\b", text)))
        if len(found) < _FEWEST_WORDS:
            raise UserError(
                f"The filler has {len(found)} words that can be used; give a text of more."
            )
        return found

    def made_up(self, length: int) -> dict[str, Any]:
        """The setting of a case whose texts are made: their length, and a fingerprint of the filler."""
        return {"length": length, _FILLER: self._fingerprint_of_filler}

    @cached_property
    def _fingerprint_of_filler(self) -> str:
        digest = hashlib.sha256()
        for text in self.filler:
            digest.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
        return digest.hexdigest()[:12]

    def given(self, task: str) -> dict[str, str]:
        """The setting of a case whose data was brought: where it is, and a fingerprint of its files.

        Of their names and sizes: their contents may be large. Nothing for a data set of the hub.
        """
        path = self.data.get(task)
        if path is None:
            return {"data": "hub"}
        files = sorted(Path(found) for found in glob(path))
        files = [
            f for file in files for f in (sorted(file.rglob("*")) if file.is_dir() else [file])
        ]
        if not files:
            return {"data": path}
        known = "".join(f"{f.name} {f.stat().st_size}\n" for f in files if f.is_file())
        return {"data": path, _FILES: hashlib.sha256(known.encode()).hexdigest()[:12]}

    def path(self, task: str) -> str:
        """Where the data of a task is.

        Raises:
            UserError: if that was not said.
        """
        if task not in self.data:
            raise UserError(f"The task {task} needs data; give --data {task}=PATH.")
        return self.data[task]

    def rng(self, *parts: object) -> random.Random:
        """A generator for one question: a function of the seed and of what is asked."""
        return random.Random("/".join(map(str, (self.seed, *parts))))


@dataclass(frozen=True)
class Case:
    """One setting of a task.

    Attributes:
        task: its name.
        version: raised when what is asked or how it is scored changes.
        setting: what tells this case from others of the task, as JSON values.
        count: questions there are.
        make: number of a question, from 0 -> the question; the same each time.
        metric: the one that a table shows.
        axis: the value of `setting` that a figure shows along its axis; empty: none.
    """

    task: str
    version: int
    setting: Mapping[str, Any]
    count: int
    make: Callable[[int], Question]
    metric: str
    axis: str = "length"

    @property
    def label(self) -> str:
        """The task and what tells its cases apart, but for the axis and the filler."""
        others = [
            data_name(Path(v)) if k == "data" else str(v)
            for k, v in self.setting.items()
            if k not in (self.axis, _FILLER, _FILES) and v is not None
        ]
        return " ".join([self.task, *others])


def data_name(data: Path) -> str:
    """A file's or folder's name, or that of the folder whose files are all meant."""
    return data.parent.name if data.name == "*" else data.name


def by_length(
    task: str,
    version: int,
    wanted: Wanted,
    make: Callable[[int, int], Question],
    metric: str,
    **setting: Any,
) -> list[Case]:
    """Cases of what is made up: one for each length.

    Args:
        make: a length and the number of a question -> the question.
        setting: what tells these cases from others of the task, besides length and filler.
    """
    return [
        Case(
            task,
            version,
            {**wanted.made_up(length), **setting},
            wanted.samples,
            partial(make, length),
            metric,
        )
        for length in wanted.lengths
    ]


@dataclass(frozen=True)
class Task:
    """An entry of the list of tasks.

    Attributes:
        cases: what to ask.
        about: one line for people.
        source: the paper or program that it follows.
    """

    cases: Callable[[Wanted], list[Case]]
    about: str
    source: str
