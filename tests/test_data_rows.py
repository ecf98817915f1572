"""Rows of the batch: every token is read where it should be, and reading goes on where it stopped."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_text import TOKENIZERS
from test_turns import TEMPLATES, tokenizer_with

from transformerfam.data import rows as rows_module
from transformerfam.data.examples import Example, from_row, plain
from transformerfam.data.files import open_rows
from transformerfam.data.rows import (
    DocumentRow,
    FileSource,
    Layout,
    Mixture,
    PackedRow,
    Piece,
    RepeatTask,
    RowReader,
    SingleRow,
    row_reader,
)
from transformerfam.errors import UserError

TOKENIZER = TOKENIZERS["gpt2"]
LAYOUTS: tuple[Layout, ...] = ("packed", "single", "documents")


@dataclass
class Toy:
    """Examples of given lengths, again and again; every token and every weight is another."""

    lengths: Sequence[int]
    draws: list[int] = field(default_factory=list)

    def draw(self, number: int) -> Example:
        self.draws.append(number)
        ids = range(number * 1000, number * 1000 + self.lengths[number % len(self.lengths)])
        return Example(tuple(ids), tuple(i / 7 for i in ids))


TOYS = st.lists(st.integers(0, 25), min_size=1, max_size=8).filter(
    lambda lengths: any(2 <= n <= 9 for n in lengths)
)


def reader(layout: Layout, lengths: Sequence[int], row: int = 0, rows: int = 1) -> RowReader:
    repeat = RepeatTask([-1, -2], length=3, weight=0.25) if layout == "packed" else None
    return row_reader(layout, Toy(lengths), row=row, rows=rows, length=9, repeat=repeat)


def take(reading: RowReader, count: int) -> list[Piece]:
    return [reading.next() for _ in range(count)]


# ---- any layout


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=60, deadline=None)
@given(
    lengths=TOYS,
    before=st.integers(0, 12),
    between=st.integers(0, 4),
    after=st.integers(1, 8),
    rows=st.integers(1, 3),
    data=st.data(),
)
def test_a_reader_goes_on_exactly_from_its_state(
    layout: Layout,
    lengths: list[int],
    before: int,
    between: int,
    after: int,
    rows: int,
    data: st.DataObject,
) -> None:
    lengths = [*lengths, 4] if rows == 1 else [4, *(4 if n < 2 or n > 9 else n for n in lengths)]
    row = data.draw(st.integers(0, rows - 1))
    first = reader(layout, lengths, row, rows)
    take(first, before)
    state = json.loads(json.dumps(first.state()))
    expected = take(first, after)
    other = reader(layout, lengths, row, rows)
    take(other, between)  # whatever it has done
    other.set_state(state)
    assert other.state() == state
    assert take(other, after) == expected
    assert other.state() == first.state()
    assert other.skipped == first.skipped


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 9), min_size=1, max_size=8),
    rows=st.integers(1, 6),
    processes=st.integers(1, 6),
)
def test_any_sharing_of_the_rows_reads_the_same(
    layout: Layout, lengths: list[int], rows: int, processes: int
) -> None:
    def shared(count: int) -> dict[int, list[Piece]]:
        """Each process has a source of its own, and takes turns between its rows."""
        found: dict[int, list[Piece]] = {row: [] for row in range(rows)}
        for process in range(count):
            toy = Toy(lengths)
            own = {
                row: row_reader(layout, toy, row=row, rows=rows, length=9)
                for row in range(process, rows, count)
            }
            for _, (row, reading) in itertools.product(range(5), own.items()):
                found[row].append(reading.next())
        return found

    assert shared(processes) == shared(1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_together_the_rows_draw_every_number_once(layout: Layout) -> None:
    toy = Toy([10])
    for row in range(4):
        take(row_reader(layout, toy, row=row, rows=4, length=9), 5)
    assert sorted(toy.draws) == list(range(20))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_example_is_drawn_once_however_many_pieces_it_makes(layout: Layout) -> None:
    toy = Toy([900])
    length = 8 if layout != "single" else 1000
    take(row_reader(layout, toy, row=0, rows=1, length=length), 100 if layout != "single" else 1)
    assert toy.draws == [0]


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=30, deadline=None)
@given(lengths=TOYS)
def test_targets_come_after_their_inputs_with_their_own_weights(
    layout: Layout, lengths: list[int]
) -> None:
    for piece in take(row_reader(layout, Toy(lengths), row=0, rows=1, length=9), 6):
        assert 1 <= len(piece.inputs) == len(piece.targets) == len(piece.weights) <= 9
        assert list(piece.inputs[1:]) == list(piece.targets[:-1])
        assert list(piece.weights) == [i / 7 for i in piece.targets]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_source_of_nothing_is_refused_and_not_read_for_ever(layout: Layout) -> None:
    reading = row_reader(layout, Toy([0]), row=0, rows=1, length=9)
    with pytest.raises(UserError, match="1,000 examples in line"):
        reading.next()


def test_wrong_arguments_are_refused() -> None:
    toy: Any = Toy([5])
    with pytest.raises(ValueError, match="no row 2 of 2"):
        PackedRow(toy, row=2, rows=2, length=9)
    with pytest.raises(ValueError, match="at least one token, not 0"):
        PackedRow(toy, row=0, rows=1, length=0)
    with pytest.raises(ValueError, match='for the layout "packed", not "single"'):
        row_reader("single", toy, row=0, rows=1, length=9, repeat=RepeatTask([1]))
    with pytest.raises(ValueError, match="no layout loose"):
        row_reader("loose", toy, row=0, rows=1, length=9)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no room to repeat 256"):
        PackedRow(toy, row=0, rows=1, length=500, repeat=RepeatTask([1]))


# ---- packed


@settings(max_examples=60, deadline=None)
@given(lengths=TOYS, rows=st.integers(1, 3))
def test_packed_sequences_joined_are_the_examples_joined(lengths: list[int], rows: int) -> None:
    lengths = [*lengths] if rows == 1 else [n or 1 for n in lengths]
    toy = Toy(lengths)
    pieces = take(PackedRow(toy, row=rows - 1, rows=rows, length=9), 8)
    joined = [token for p in pieces for token in (*p.inputs, p.targets[-1])]
    examples = itertools.chain.from_iterable(
        toy.draw(n).ids for n in range(rows - 1, 10_000 * rows, rows)
    )
    assert joined == list(itertools.islice(examples, 80))
    assert all(len(p.inputs) == 9 and p.fresh for p in pieces)


@settings(max_examples=40, deadline=None)
@given(lengths=TOYS, seed=st.integers(0, 5))
def test_with_the_repeat_task_sequences_keep_their_length_and_nothing_is_lost(
    lengths: list[int], seed: int
) -> None:
    task = RepeatTask([-1, -2], length=4, weight=0.25, seed=seed)
    toy = Toy(lengths)
    pieces = take(PackedRow(toy, row=0, rows=1, length=15, repeat=task), 6)
    bodies: list[int] = []
    for piece in pieces:
        ids = [*piece.inputs, piece.targets[-1]]
        body, marker, repeated = ids[:10], ids[10:12], ids[12:]
        assert len(ids) == 16
        assert marker == [-1, -2]
        assert any(body[i : i + 4] == repeated for i in range(7))
        assert list(piece.weights[9:]) == [0.0, 0.0, 0.25, 0.25, 0.25, 0.25]
        bodies += body
    examples = itertools.chain.from_iterable(toy.draw(n).ids for n in range(10_000))
    assert bodies == list(itertools.islice(examples, 60))


def test_other_rows_and_steps_repeat_other_places() -> None:
    def places(row: int, seed: int) -> list[int]:
        task = RepeatTask([-1], length=4, seed=seed)
        reading = PackedRow(Toy([900]), row=row, rows=2, length=100, repeat=task)
        return [p.targets[-4] - p.inputs[0] for p in take(reading, 6)]

    assert len({tuple(places(row, seed)) for row in (0, 1) for seed in (0, 1)}) == 4
    assert len(set(places(0, 0))) > 3


# ---- single


def test_single_pieces_are_whole_examples_and_longer_ones_are_counted() -> None:
    reading = SingleRow(Toy([5, 11, 10, 1, 2]), row=0, rows=1, length=9)
    pieces = take(reading, 3)
    assert [len(p.inputs) for p in pieces] == [4, 9, 1]
    assert [p.inputs[0] // 1000 for p in pieces] == [0, 2, 4]
    assert all(p.fresh for p in pieces)
    assert reading.skipped == 2


def test_a_single_example_that_is_too_long_can_be_refused() -> None:
    reading = row_reader("single", Toy([10, 11]), row=0, rows=1, length=9, too_long="refuse")
    reading.next()
    with pytest.raises(UserError, match=r"11 tokens, but data.length=9"):
        reading.next()
    with pytest.raises(UserError, match=r"do not have 2 to 9 tokens; raise data\.length"):
        SingleRow(Toy([11]), row=0, rows=1, length=8).next()


# ---- documents


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6), length=st.integers(1, 12))
def test_every_token_of_every_document_but_its_first_is_a_target_once(
    lengths: list[int], length: int
) -> None:
    lengths = [*lengths, 3]
    toy = Toy(lengths)
    reading = DocumentRow(toy, row=0, rows=1, length=length)
    pieces: list[Piece] = []
    while max(toy.draws, default=0) < len(lengths):
        pieces.append(reading.next())
    assert reading.skipped == sum(lengths[n % len(lengths)] < 2 for n in toy.draws)
    pieces = [p for p in pieces if p.inputs[0] < 1000 * len(lengths)]
    told = [token for p in pieces for token in p.targets]
    assert told == [token for n in range(len(lengths)) for token in toy.draw(n).ids[1:]]
    # Read without a gap, whole pieces but for the last, and fresh at the first alone.
    assert [token for p in pieces for token in p.inputs] == [token - 1 for token in told]
    assert [p.fresh for p in pieces] == [p.inputs[0] % 1000 == 0 for p in pieces]
    for piece, following in itertools.pairwise(pieces):
        assert len(piece.inputs) == length or following.fresh


# ---- files


def jsonl(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def said(source: FileSource, numbers: Sequence[int]) -> list[str]:
    return [TOKENIZER.decode(source.draw(n).ids) for n in numbers]


def test_each_epoch_has_every_row_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    texts = [f"text {n}" for n in range(20)]
    rows = open_rows(jsonl(tmp_path / "a.jsonl", *({"text": t} for t in texts)))
    source = FileSource(rows, TOKENIZER, seed=1)
    epochs = [said(source, range(e * 20, e * 20 + 20)) for e in range(3)]
    assert all(sorted(epoch) == sorted(texts) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [texts, *epochs]}) == 4
    # A pure function of seed and number.
    again = FileSource(rows, TOKENIZER, seed=1)
    assert said(again, [41, 3]) == [epochs[2][1], epochs[0][3]]
    assert said(FileSource(rows, TOKENIZER, seed=2), range(20)) != epochs[0]
    assert said(FileSource(rows, TOKENIZER, shuffle=False), range(40)) == texts * 2


def test_rows_that_cannot_be_encoded_are_stood_in_for_and_counted_once(tmp_path: Path) -> None:
    def turns(*roles: str) -> dict[str, Any]:
        return {"messages": [{"role": role, "content": role} for role in roles]}

    path = jsonl(
        tmp_path / "a.jsonl",
        {"text": "Ann waits."},
        turns("assistant"),  # the template wants the user first
        turns("user", "assistant"),
    )
    tokenizer = tokenizer_with(TEMPLATES["llama2"])
    source = FileSource(open_rows(path), tokenizer, shuffle=False)
    examples = [source.draw(n) for n in range(6)]
    assert examples[0] == plain(tokenizer, "Ann waits.")
    assert examples[1] == examples[2] != examples[0]
    assert examples[3:] == examples[:3]
    assert source.rows.bad.count == 1
    assert source.rows.bad.examples[0].startswith(f"{path}:2: the chat template of this model")
    # Each time that one is drawn it is left out, also by a reader that goes on.
    reader = SingleRow(source, row=0, rows=1, length=100)
    for _ in range(4):
        reader.next()
    again = SingleRow(source, row=0, rows=1, length=100)
    again.set_state(reader.state())
    again.next()
    assert (reader.stood_in, again.stood_in) == (1, 2)
    refusing = FileSource(open_rows(path, bad_rows="refuse"), tokenizer, shuffle=False)
    refusing.draw(0)
    with pytest.raises(UserError, match=r"a\.jsonl:2 cannot be used: the chat template"):
        refusing.draw(1)


def test_a_source_without_a_good_row_is_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"text": "a"}, {"text": "a"})  # one token each
    source = FileSource(open_rows(path), TOKENIZER)
    for _ in range(2):
        with pytest.raises(UserError, match=r"no row that can be used: .*:\d: it has no token"):
            source.draw(0)
    assert source.rows.bad.count == 2


def test_a_book_is_walked_through_tokenised_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []

    def counting(tokenizer: Any, row: Any) -> Example:
        calls.append(row)
        return from_row(tokenizer, row)

    monkeypatch.setattr(rows_module, "from_row", counting)
    path = tmp_path / "book.txt"
    path.write_text("Ann waits at the harbour. " * 200)
    whole = list(plain(TOKENIZER, path.read_text()).ids)
    source = FileSource(open_rows(str(path)), TOKENIZER)
    reading = DocumentRow(source, row=0, rows=1, length=64)
    pieces = take(reading, -(-(len(whole) - 1) // 64))
    assert [whole[0], *(t for p in pieces for t in p.targets)] == whole
    assert len(calls) == 1
    assert reading.next().fresh
    assert len(calls) == 2


# ---- mixtures


@settings(max_examples=40, deadline=None)
@given(
    shares=st.lists(st.floats(0, 10), min_size=1, max_size=5).filter(lambda s: sum(s) > 0.01),
    seed=st.integers(0, 9),
)
def test_a_mixture_draws_every_number_of_its_sources_once_and_by_their_shares(
    shares: list[float], seed: int
) -> None:
    mixture = Mixture([(Toy([2]), share) for share in shares], seed=seed)
    places = [mixture.place(n) for n in range(3000)]
    for source, share in enumerate(shares):
        own = [draw for s, draw in places if s == source]
        assert sorted(own) == list(range(len(own)))
        assert len(own) / 3000 == pytest.approx(share / sum(shares), abs=0.005)
        assert bool(own) == (share > 0)
    again = Mixture([(Toy([2]), share) for share in shares], seed=seed)
    assert [again.place(n) for n in (2500, 3, 1000)] == [places[n] for n in (2500, 3, 1000)]


def test_a_mixture_is_a_source_in_random_order() -> None:
    one, two = Toy([2]), Toy([3])
    mixture = Mixture([(one, 3), (two, 1)])
    lengths = [len(mixture.draw(n).ids) for n in range(1000)]
    assert Counter(lengths) == {2: 750, 3: 250}
    assert sorted(one.draws) == list(range(750))
    firsts = [tuple(lengths[start : start + 8]) for start in range(0, 1000, 8)]
    assert len(set(firsts)) > 20
    other = Mixture([(one, 3), (two, 1)], seed=1)
    assert [other.place(n) for n in range(50)] != [mixture.place(n) for n in range(50)]


def test_small_shares_are_drawn_too_and_wrong_ones_refused() -> None:
    mixture = Mixture([(Toy([2]), 1e-6), (Toy([2]), 1.0), (Toy([2]), 0.0)])
    assert Counter(mixture.place(n)[0] for n in range(1000)) == {0: 1, 1: 999}
    for shares in ([], [0.0], [2.0, -1.0]):
        with pytest.raises(ValueError, match="share above 0, and none below 0"):
            Mixture([(Toy([2]), share) for share in shares])
