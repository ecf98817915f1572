"""Several processes share the questions of `results`: the same answers, and no other's are lost."""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny
from test_text import TOKENIZERS

from transformerfam import FamConfig, convert, evaluate
from transformerfam.errors import UserError
from transformerfam.readers import readers_of
from transformerfam.reproduction import asking
from transformerfam.reproduction.asking import Asking, Opened
from transformerfam.reproduction.results import Sizes, cases_of

TOKENIZER = TOKENIZERS["gpt2"]


@dataclass(frozen=True)
class OfATinyModel(Asking):
    """One that other processes can open too, without the default model."""

    def open(self) -> Opened:
        if self.adapter == "none in other processes" and multiprocessing.parent_process():
            raise UserError("There is no such adapter here.")
        torch.manual_seed(0)
        config = FamConfig(block_size=32, memory_segments=1, fam_length=2)
        model = convert(tiny(vocab_size=len(TOKENIZER)), config)
        groups = cases_of(self.name, self.data, TOKENIZER, self.sizes)
        return Opened(model, readers_of(model, ["model", "bswa"], full_limit=None), groups)


@pytest.fixture
def its(tmp_path: Path) -> OfATinyModel:
    (tmp_path / "books").mkdir()
    prose = "The sea was grey and the boat was late. " * 40
    (tmp_path / "books" / "sea.txt").write_text(prose)
    sizes = Sizes(lengths=(160,), hidden=2, documents=1, most_tokens=100)
    return OfATinyModel("results", tmp_path, sizes, None, None, tmp_path / "kept")


def answers(its: Asking) -> dict[str, Any]:
    return {line["key"]: line["metrics"] for line in evaluate.read_results(its.kept)[1]}


@pytest.mark.slow
def test_processes_that_share_questions_give_the_answers_of_one(its: OfATinyModel) -> None:
    threads, opened = torch.get_num_threads(), its.open()
    own = list(asking.ask(its, opened, workers=2))
    assert torch.get_num_threads() == threads
    assert len(list(its.kept.glob("results-*.jsonl"))) == 2
    shared = answers(its)
    assert 0 < len(own) < len(shared)
    assert list(asking.ask(its, opened, workers=2)) == []  # nothing is asked twice
    alone = replace(its, kept=its.data / "alone")
    assert len(list(asking.ask(alone, opened))) == len(shared)
    assert answers(alone) == shared


@pytest.mark.slow
def test_what_another_process_fails_with_is_told_and_what_was_answered_is_kept(
    its: OfATinyModel,
) -> None:
    fails = replace(its, adapter="none in other processes")
    with pytest.raises(UserError, match="no such adapter here"):
        list(asking.ask(fails, fails.open(), workers=2))
    assert answers(fails)
