"""Texts grow when their answers are right, and a run that goes on grows at the same step."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, cast

import pytest
import test_trainer as trainer_tests
import torch
from families import VOCABULARY
from test_graphs import on_the_cpu
from test_text import TOKENIZERS

from transformerfam.data.examples import Example
from transformerfam.data.passkey import PasskeyTexts
from transformerfam.data.rows import Mixture
from transformerfam.errors import UserError
from transformerfam.training import curriculum, graphs
from transformerfam.training.batches import Batch
from transformerfam.training.curriculum import Curriculum, answers_said
from transformerfam.training.inputs import PasskeySource
from transformerfam.training.recipe import Recipe
from transformerfam.training.trainer import Trained

TOKENIZER = TOKENIZERS["gpt2"]


def recipe(**data: object) -> Recipe:
    settings = {"layout": "single", "length": 2000, "begin_length": 400, "grow_at": 0.75, **data}
    return Recipe.from_dict({"data": settings})


def source(*lengths: int, rows: int = 4, alike: bool = True) -> PasskeySource:
    return PasskeySource(PasskeyTexts(TOKENIZER, lengths=lengths), rows, alike=alike)


def drawn(texts: PasskeySource) -> list[int]:
    return [len(texts.draw(n).ids) for n in range(0, 400, 4)]


def test_rows_of_a_step_are_as_long_as_each_other_or_each_as_long_as_it_comes() -> None:
    def steps(texts: PasskeySource) -> list[set[int]]:
        return [{len(texts.draw(row).ids) for row in range(n, n + 4)} for n in range(0, 40, 4)]

    alike, own = steps(source(300, 1000)), steps(source(300, 1000, alike=False))
    assert all(len(lengths) == 1 for lengths in alike) and len(set.union(*alike)) > 5
    assert all(len(lengths) > 1 for lengths in own)
    limited = source(300, 1000, alike=False)
    limited.longest = 400
    assert max(set.union(*steps(limited))) <= 400


def test_where_nothing_grows_nothing_is_kept() -> None:
    still = Curriculum(recipe(begin_length=0), source(300, 1000))
    assert not any(still.tell(4, 4) for _ in range(50))
    assert still.state()["right"] == []


def test_texts_are_short_until_their_answers_are_right() -> None:
    texts = source(300, 1000)
    growth = Curriculum(recipe(), texts)
    assert min(drawn(texts)) >= 300 and max(drawn(texts)) <= 400
    for _ in range(50):
        assert not growth.tell(2, 4)
    grew = [growth.tell(4, 4) for _ in range(10)]
    assert grew.count(True) == 1, "the newest 64 are looked at, and after that 64 new ones"
    assert growth.longest == 600
    assert 400 < max(drawn(texts)) <= 600
    for _ in range(100):
        growth.tell(4, 4)
    assert growth.longest == 1000, "not longer than the source says"
    assert drawn(texts) == drawn(source(300, 1000))


def test_it_takes_64_texts_to_grow() -> None:
    growth = Curriculum(recipe(), source(300, 1000))
    assert [growth.tell(4, 4) for _ in range(16)] == [False] * 15 + [True]


def test_every_source_of_a_mixture_obeys_and_a_text_is_never_shorter_than_its_source_says() -> None:
    short, long = source(300, 1000), source(500, 1000)
    Curriculum(recipe(), Mixture([(short, 1), (long, 1)]))
    assert max(drawn(short)) <= 400
    assert set(drawn(long)) == {500}


def test_it_begins_no_shorter_than_its_sources_and_always_grows() -> None:
    assert Curriculum(recipe(begin_length=1), source(300, 1000)).longest == 300
    one = Curriculum(recipe(begin_length=1), cast(Any, source(1, 4)))
    seen = [one.longest for _ in range(200) if one.tell(4, 4)]
    assert seen == [2, 3, 4]


def test_without_a_beginning_nothing_grows() -> None:
    texts = source(300, 1000)
    growth = Curriculum(recipe(begin_length=0), texts)
    before = drawn(texts)
    assert not any(growth.tell(4, 4) for _ in range(40))
    assert growth.longest == 2000 and drawn(texts) == before


def test_one_that_goes_on_grows_at_the_same_step() -> None:
    answers = [(n % 5, 4) for n in range(1, 400)]
    answers = [(min(r, n), n) for r, n in answers] + [(4, 4)] * 40
    whole = Curriculum(recipe(), source(300, 1000))
    grew = [whole.tell(*answer) for answer in answers]
    for cut in (5, 405, 420):
        first = Curriculum(recipe(), source(300, 1000))
        before = [first.tell(*answer) for answer in answers[:cut]]
        second = Curriculum(recipe(), source(300, 1000))
        second.set_state(first.state())
        assert before + [second.tell(*answer) for answer in answers[cut:]] == grew
    assert any(grew)


def test_rows_are_right_when_all_that_counts_fully_is() -> None:
    targets = torch.tensor([[1, 2, 3], [1, 2, 3], [1, 2, 3]])
    said = torch.tensor([[0, 2, 3], [1, 2, 0], [0, 0, 0]])
    logits = torch.nn.functional.one_hot(said, 5).float()
    weights = torch.tensor([[0.1, 1.0, 1.0], [0.1, 1.0, 1.0], [0.1, 0.1, 0.0]])
    answered, wrong = answers_said(logits, targets, weights).tolist()
    assert answered == [True, True, False] and wrong == [False, True, False]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"data": {"begin_length": 400}}, 'take data.layout="single"'),
        ({"data": {"grow_at": 1.5}}, "grow_at is a probability"),
        (
            {
                "data": {
                    "begin_length": 400,
                    "layout": "single",
                    "length": 20000,
                    "sources": [{"kind": "files", "path": "a.jsonl"}, {"kind": "passkey"}],
                }
            },
            "some of data.sources are files",
        ),
    ],
)
def test_what_cannot_grow_is_refused(table: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Recipe.from_dict(table)


# ---- in a run


class Texts:
    """In place of PassKey texts, for a small vocabulary: the last token is the answer."""

    lengths = range(8, 40)
    seed = 0

    def example(self, rng: random.Random, length: int) -> Example:
        ids = tuple(rng.randrange(3, VOCABULARY) for _ in range(length))
        return Example(ids, (0.1,) * (length - 1) + (1.0,))


def growing(folder: Path | None) -> Recipe:
    data = {"layout": "single", "length": 40, "begin_length": 8, "grow_at": 0.0, "batch_size": 2}
    return trainer_tests.recipe(folder, data=data, run={"steps": 9, "checkpoint_every": 0})


def test_a_run_grows_its_texts_and_one_that_goes_on_does_so_at_the_same_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curriculum, "_TEXTS", 4)

    def run(name: str, **options: Any) -> Trained:
        made = growing(tmp_path / name)
        source: Any = PasskeySource(cast(Any, Texts()), rows=2)
        return trainer_tests.run(made, source, **options)

    whole = run("whole")
    lines = trainer_tests.metrics(tmp_path / "whole")
    longest = [line["longest"] for line in lines if "longest" in line]
    assert longest == [8, 8, 12, 12, 18, 18, 27, 27, 39]
    tokens = [line["tokens"] for line in lines if "longest" in line]
    assert all(n <= 2 * (most - 1) for n, most in zip(tokens, longest, strict=True))
    assert max(tokens) > 2 * 12
    for stop in (1, 3, 6):
        part = run(str(stop), steps=stop)
        rest = run(str(stop), resume=True)
        assert part.losses + rest.losses == whole.losses
        assert trainer_tests.metrics(tmp_path / str(stop)) == lines


def test_recorded_steps_count_what_plain_ones_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "recorded", on_the_cpu)
    monkeypatch.setattr(graphs, "graph_pool", lambda: None)
    made = growing(None)
    one = trainer_tests.trainer(made, cast(Any, PasskeySource(cast(Any, Texts()), rows=2)))
    ours = graphs.RecordedStepper(one.accelerator, one.model, one.base, made)
    ids = torch.tensor([Texts().example(random.Random(n), 20).ids for n in range(4)])
    weights = torch.full((4, 19), 0.1)
    weights[:3, -1] = 1
    with torch.no_grad():
        ids[:2, -1] = one.base(ids[:2, :-1]).logits[:, -1].argmax(-1)
    batch = Batch(ids[:, :-1], ids[:, 1:], weights, None, (True,) * 4)
    for stepper in (one.stepper, ours):
        stepper.run(0, [batch])
        right, texts = stepper.right
        assert texts == 3 and right >= 2
    assert one.stepper.right == ours.right


def test_sources_of_the_same_lengths_are_as_long_as_each_other_in_each_step() -> None:
    lengths = (400, 500, 600, 700)
    sources = [
        (PasskeySource(PasskeyTexts(TOKENIZER, lengths=lengths, seed=s), rows=4), 1.0)
        for s in (1, 2)
    ]
    mixture = Mixture(sources)
    steps = [{len(mixture.draw(4 * step + row).ids) for row in range(4)} for step in range(12)]
    assert all(len(step) == 1 for step in steps) and len(set.union(*steps)) > 1
    assert len({mixture.place(n)[0] for n in range(48)}) == 2
