"""Who is asked for `results`, and how several processes share the questions.

Every answer is kept when it is given, so that what was stopped goes on, with as many processes as one
likes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from transformerfam import evaluate, models
from transformerfam.readers import READERS, Reader, readers_of
from transformerfam.reproduction.results import BASE, UNTRAINED, Sizes, cases_of
from transformerfam.reproduction.runs import processes
from transformerfam.tasks import Case


@dataclass(frozen=True)
class Asking:
    """What is asked of which model: plain values, which another process can be told.

    Attributes:
        name: of an item of `results.ITEMS`.
        data: the folder of real data.
        sizes: how much is asked.
        adapter: of the default model; None: one that nothing was trained of.
        dtype: of the weights; None: as they are stored.
        kept: where answers are kept.
    """

    name: str
    data: Path
    sizes: Sizes
    adapter: str | None
    dtype: str | None
    kept: Path

    def open(self) -> Opened:
        """Load the model and make the questions.

        Raises:
            UserError: if the data has nothing of the item's, or the adapter cannot be loaded.
        """
        untrained = None if self.adapter else UNTRAINED
        model, tokenizer = models.load(config=untrained, dtype=self.dtype, adapter=self.adapter)
        readers = readers_of(model, READERS, full_limit=None)
        # An adapter of FAM alone leaves full attention as it is.
        if self.adapter and model.fam_config.adapted == "all":
            (full,) = readers_of(models.load(dtype=self.dtype)[0], ["full"], full_limit=None)
            readers.append(replace(full, name=BASE))
        return Opened(model, readers, cases_of(self.name, self.data, tokenizer, self.sizes))


@dataclass(frozen=True)
class Opened:
    """A model that is asked.

    Attributes:
        model: a TransformerFAM.
        readers: it, its windows, full attention, and that before it was trained, if it was.
        groups: heading -> cases.
    """

    model: Any
    readers: Sequence[Reader]
    groups: dict[str, list[Case]]

    @property
    def cases(self) -> list[Case]:
        """Those of all groups."""
        return [case for group in self.groups.values() for case in group]


def ask(
    asking: Asking, opened: Opened, workers: int = 1
) -> Iterator[tuple[int, int, evaluate.Ask]]:
    """Put all questions to all readers; (answers given, of how many, question) of this process's share.

    Args:
        asking: what other processes are told.
        opened: what this one has of it.
        workers: processes that share the questions, this one among them; of one thread each if there
            are several.

    Raises:
        UserError: if the answers that are kept are of something else.
    """
    results = evaluate.Results(asking.kept, opened.readers, seed=0)
    left = sum(each.key not in results.done for each in evaluate.plan(opened.readers, opened.cases))
    workers = min(workers, left)
    if workers < 2:
        yield from _share(opened, results, 0, 1)
        return
    with _one_thread(), processes(workers - 1) as pool:
        others = [pool.submit(_others_share, asking, n, workers) for n in range(1, workers)]
        for told in _share(opened, results, 0, workers):
            yield told
            for other in others:
                if other.done():
                    other.result()  # raises what it failed with
        for other in others:
            other.result()


def _share(
    opened: Opened, results: evaluate.Results, process: int, count: int
) -> Iterator[tuple[int, int, evaluate.Ask]]:
    asks = evaluate.plan(opened.readers, opened.cases, process, count)
    todo = [each for each in asks if each.key not in results.done]
    for done, (asked, _) in enumerate(evaluate.evaluate(todo, results), 1):
        yield done, len(todo), asked


def _others_share(asking: Asking, process: int, count: int) -> None:
    """In a process of its own."""
    opened = asking.open()
    results = evaluate.Results(asking.kept, opened.readers, seed=0, process=process)
    for _ in _share(opened, results, process, count):
        pass


@contextmanager
def _one_thread() -> Iterator[None]:
    """This process computes with one thread, as those that it shares the cores with."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def describe(asking: Asking, model: Any) -> str:
    """Who is asked, in a sentence, and what `about.txt` says of the data, if it is there."""
    about = asking.data / "about.txt"
    told = (
        f"\n\n{about.read_text(encoding='utf-8', errors='replace').strip()}"
        if about.is_file()
        else ""
    )
    trained = f" with the adapter {asking.adapter}" if asking.adapter else ", nothing trained"
    numbers = str(model.dtype).removeprefix("torch.")
    return (
        f"{Path(str(model.config._name_or_path)).name}{trained}: {model.fam_config.describe()}, in "
        f"{numbers}. "
        "Texts of one block are read alike by all readers of the same weights: the first block sees no "
        f"FAM, and lies in every window.{told}"
    )
