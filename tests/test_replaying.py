"""Steps over blocks that were read once: what they learn from, and what goes with them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from families import some_tokens
from peft.tuners.lora import LoraLayer
from test_adapted import with_adapter
from test_graphs import Lifted, on_the_cpu
from test_steps import B, assert_same, gradients
from test_text import TOKENIZERS
from test_training import checkpointed
from torch import Tensor

from transformerfam import Memory
from transformerfam.call import ReadBefore
from transformerfam.data.examples import Example
from transformerfam.errors import UserError
from transformerfam.replay import Recording, replay
from transformerfam.training import graphs, leading, replaying
from transformerfam.training.batches import Batch
from transformerfam.training.curriculum import Curriculum, answers_said
from transformerfam.training.inputs import open_source
from transformerfam.training.leading import Asked
from transformerfam.training.library import Library
from transformerfam.training.recipe import Recipe
from transformerfam.training.replaying import ReplayStepper, Text
from transformerfam.training.steps import FamAfterBlocks, Stepper
from transformerfam.training.trainer import Trainer

QUESTION = 4  # tokens, with the answer


class Prose:
    """Random tokens, and texts of which two blocks' worth is read and then something asked."""

    def draw(self, number: int) -> Example:
        length = 2 * B + 1 + QUESTION
        ids = self.prose(random.Random(number), length)
        asked_from = length - QUESTION
        weights = [0.0] * (asked_from + 2) + [1.0] * (QUESTION - 2)
        return Example(ids, weights, asked_from, 4, asked_from + 1)

    def prose(self, rng: random.Random, tokens: int) -> list[int]:
        return [rng.randrange(3, 64) for _ in range(tokens)]


def recipe(
    fam: dict[str, Any] | None = None, replay: dict[str, Any] | None = None, **feedback: Any
) -> Recipe:
    alone = {"memory_segments": 0, "sink_tokens": 0}
    return Recipe.from_dict(
        {
            "fam": {
                **{"block_size": B, "fam_length": 3, "adapted": "fam", "fam_seen": "asked"},
                **(alone if fam is None else fam),
            },
            "train": {"rank": 4, "alpha": 4.0},
            "data": {"layout": "single", "batch_size": 2, "length": 4 * B},
            "feedback": {"bias_steps": 0, **feedback},
            "replay": {"blocks": 6, "before": [0, 2], "behind": [1, 3], **(replay or {})},
            "run": {"steps": 3, "activation_checkpointing": False, "checkpoint_every": 1},
        }
    )


def stepper(kind: Any, made: Recipe, *more: Any, dropout: float = 0.0) -> Any:
    model = with_adapter(made.fam).train()
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.lora_dropout["default"] = torch.nn.Dropout(dropout)
    accelerator = Accelerator()
    return kind(accelerator, accelerator.prepare(model), model.base_model.model, made, *more)


def rows(count: int = 2) -> Batch:
    """Texts of `Prose` as a batch."""
    ids = some_tokens(count, 2 * B + 1 + QUESTION)
    weights = torch.zeros(ids.shape)
    weights[:, -QUESTION + 2 :] = 1.0
    asked_from = ids.shape[1] - QUESTION
    fresh, told = (True,) * count, (4,) * count
    asked, question = (asked_from,) * count, (asked_from + 1,) * count
    return Batch(ids[:, :-1], ids[:, 1:], weights[:, 1:], None, fresh, asked, told, question)


def written_out(text: Text, library: Library) -> Batch:
    """The same texts as tokens from beginning to end."""
    parts = [
        text.rows.inputs[:, :B]
        if j == text.own
        else library.ids[text.prose(j, len(library))].expand(len(text.rows.fresh), -1)
        for j in range(text.blocks + 1)
    ]
    parts[-1] = parts[-1][:, : text.begun]
    read = torch.cat(parts, dim=1)
    nothing = torch.zeros(read.shape)

    def behind(first: Tensor, then: Tensor) -> Tensor:
        return torch.cat([first, then], dim=1)

    count, asked_from = len(read), read.shape[1]
    return Batch(
        behind(read, text.asked.inputs),
        behind(read, text.asked.targets),
        behind(nothing, text.asked.weights),
        None,
        (True,) * count,
        (asked_from,) * count,
        tuple(text.own * B + told for told in text.rows.told),
        (asked_from + 1,) * count,
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("asked_blocks", [0, 9])
def test_a_replayed_text_is_one_that_is_read(asked_blocks: int, checkpointing: bool) -> None:
    """Of blocks that do not see each other, so that it does not matter where they were read."""
    made = recipe(replay={"times": 3}, asked_blocks=asked_blocks)
    one, batch = stepper(ReplayStepper, made, Prose()), rows()
    if checkpointing:
        checkpointed(one.base)
    loss = one.run(5, [batch])
    ours = gradients(one.base)
    plain = stepper(Stepper, recipe(replay={"blocks": 0}, asked_blocks=asked_blocks))
    losses, total = [], dict[str, Tensor]()
    for time in range(3):
        text = written_out(one._text(batch, time), one.library)
        losses.append(plain.run(5, [text]))
        for name, gradient in gradients(plain.base).items():
            total[name] = total.get(name, 0) + gradient / 3
    assert loss == pytest.approx(sum(losses) / 3, rel=1e-6)
    assert_same(ours, total)


GEOMETRIES: dict[str, dict[str, Any]] = {
    "alone": {"memory_segments": 0, "sink_tokens": 0},
    "windows": {"memory_segments": 2, "sink_tokens": 1},
    "several": {"memory_segments": 1, "previous_fams": 3},
    "prefix": {"memory_segments": 1, "fam_start": "prefix"},
    "swa": {"attention": "swa", "memory_segments": 1, "window": 2 * B + 1},
    "xl": {"attention": "xl", "memory_segments": 1},
    "rms": {"feedback_norm": "rms", "feedback_rms": 2.0},
}


def assert_gradients_are_those_of(
    plainly: Callable[[ReplayStepper, Text, Recording], tuple[Tensor, Tensor]],
    made: Recipe,
    step: int,
) -> None:
    """Of a step of four texts; `plainly` says the losses of one, and of what is asked of F alone."""
    one, batch = stepper(ReplayStepper, made, Prose()), rows()
    loss, ours = one.run(step, [batch]), gradients(one.base)
    own = one._read(batch)
    one.base.zero_grad()
    total = 0.0
    for time in range(4):
        text = one._text(batch, time)
        part, alone = plainly(one, text, own)
        total += float(part.detach()) / 4
        ((part + alone) / 4 / float(batch.weights.sum())).backward()
    assert loss == pytest.approx(total / float(batch.weights.sum()), rel=1e-5)
    assert_same(ours, gradients(one.base))


@pytest.mark.parametrize("name", GEOMETRIES)
def test_gradients_block_by_block_are_those_of_whole_texts(name: str) -> None:
    """Also of questions some rows at a time, and of those that go on in the next block."""
    made = recipe(fam=GEOMETRIES[name], replay={"times": 4, "rows_at_once": 1}, asked_blocks=2)
    assert_gradients_are_those_of(whole_text, made, step=3)


def whole_text(one: ReplayStepper, text: Text, own: Recording) -> tuple[Tensor, Tensor]:
    """The losses of a text through which gradients go at once, and of what is asked of F alone."""
    blocks = [one._block(text, own, j) for j in range(text.blocks + 1)]
    memory, written = Memory.for_model(one.base, 2), FamAfterBlocks()
    columns = text.blocks * B + text.begun
    given = ReadBefore(columns, lambda layer, j: blocks[j][layer], own.anchors.__getitem__)
    replay(one.base, given, memory, fam_observer=written)
    with memory.asked():
        part = one._part_loss(text.asked, memory, {})
    drawn = [
        (row, block)
        for row in range(2)
        for block in one._draw(range(text.own, text.blocks), text.rows.inputs[row], text.time)
    ]
    memory = Memory.for_model(one.base, len(drawn))
    memory.begin_with(written.behind(drawn))
    with memory.asked():
        alone = one._part_loss(text.rows.questions([row for row, _ in drawn]), memory, {})
    return part, alone / one.feedback.asked_blocks


@pytest.mark.parametrize("name", GEOMETRIES)
def test_gradients_stop_where_segments_begin(name: str) -> None:
    """As if each segment were gone over in a call of its own, from a memory without a gradient."""
    drawn = {"before": [0, 1, 4], "behind": [0, 3, 7], "times": 4}
    made = recipe(fam=GEOMETRIES[name], replay=drawn, asked_blocks=2, bptt_blocks=3)
    assert_gradients_are_those_of(in_segments, made, step=2)


def in_segments(one: ReplayStepper, text: Text, own: Recording) -> tuple[Tensor, Tensor]:
    """As `whole_text`, in segments of `bptt_blocks` blocks that end with the text."""
    size = one.feedback.bptt_blocks
    blocks = [one._block(text, own, j) for j in range(text.blocks + 1)]
    starts = [0, *(j for j in range(1, text.blocks) if (text.blocks - j) % size == 0), text.blocks]
    memory, written = Memory.for_model(one.base, 2), dict[int, list[Tensor]]()
    for start, stop in itertools.pairwise(starts):
        columns = (stop - start) * B + (text.begun if stop == text.blocks else 0)
        part_of = partial(lambda start, layer, j: blocks[start + j][layer], start)
        given = ReadBefore(columns, part_of, own.anchors.__getitem__)
        observer, memory = FamAfterBlocks(), memory.detach()
        replay(one.base, given, memory, fam_observer=observer)
        written |= {start + j: observer.after(j) for j in range(stop - start)}
    with memory.asked():
        part = one._part_loss(text.asked, memory, {})
    groups = one._asked_alone(text)
    drawn = [place for group in groups for place in group]
    assert {block for _, block in drawn} <= {stop - 1 for stop in starts[1:]}
    memory = Memory.for_model(one.base, len(drawn))
    layers = range(len(written[0]))
    memory.begin_with([torch.stack([written[j][i][row] for row, j in drawn]) for i in layers])
    with memory.asked():
        alone = one._part_loss(text.rows.questions([row for row, _ in drawn]), memory, {})
    return part, alone / len(groups)


def test_segments_that_nobody_asks_are_not_gone_back_over(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = {"before": [0], "behind": [40]}
    one = stepper(ReplayStepper, recipe(replay=drawn, asked_blocks=2, bptt_blocks=3), Prose())
    back, gone = one._pieces.back, list[int]()

    def heard(*given: Any) -> Tensor | None:
        gone.append(given[3])
        found: Tensor | None = back(*given)
        return found

    monkeypatch.setattr(one._pieces, "back", heard)
    text = one._text(rows(), 0)
    one.run(0, [rows()])
    ends = {40, *(block for group in one._asked_alone(text) for _, block in group)}
    assert ends != {40}
    assert sorted(gone) == sorted(end - i for end in ends for i in range(3) if end >= i)


def asked_alone(step: int, times: int = 1, **settings: Any) -> list[tuple[int, ...]]:
    """Of texts of a step with their own block in place 0 or 2, the blocks behind which all are asked."""
    replay = {"before": [0, 2], "behind": [6, 7, 8], "times": times}
    one, found = stepper(ReplayStepper, recipe(replay=replay, **settings), Prose()), []
    one._step = step
    for time in range(times):
        text = one._text(rows(), time)
        groups = one._asked_alone(text)
        assert all({row for row, _ in group} == {0, 1} for group in groups)
        assert all(len({block for _, block in group}) == 1 for group in groups), "alike for all"
        found.append(tuple(block - text.own for group in groups for _, block in group[:1]))
    return found


def test_the_first_segment_is_always_asked_and_all_others_in_time() -> None:
    found = asked_alone(0, times=99, asked_blocks=2, bptt_blocks=3)
    assert all(len(set(places)) == 2 and places[0] < 3 for places in found)
    assert {place for places in found for place in places[1:]} == set(range(3, 9))
    assert found != asked_alone(1, times=99, asked_blocks=2, bptt_blocks=3)


def test_texts_of_few_segments_are_asked_behind_each() -> None:
    for places in asked_alone(0, times=9, asked_blocks=9, bptt_blocks=4):
        assert len(places) == len(set(places)) == -(-(max(places) + 1) // 4)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_recorded_pieces_are_those_that_are_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replaying, "_WIDTH", 2)  # questions begin at several places of such blocks
    drawn = {"before": [0, 1, 2], "behind": [1, 2, 9], "times": 3}
    feedback: dict[str, Any] = {"drawn_segments": [0, 1, 2]} if name == "windows" else {}
    feedback |= {"bptt_blocks": 3} if name in ("windows", "several", "rms") else {}
    made = recipe(fam=GEOMETRIES[name], replay=drawn, asked_blocks=2, **feedback)
    plain, ours = (recorded(made, monkeypatch, is_it) for is_it in (False, True))
    for step in (1, 2, 4):  # which draw 0, 2 and 1 past blocks
        losses = []
        for one in (plain, ours):
            monkeypatch.setattr(one, "_text", partial(ReplayStepper._text, ours))
            ours._step = step
            losses.append(one.run(step, [rows(3)]))
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        assert_same(gradients(ours.base), gradients(plain.base))


def recorded(made: Recipe, monkeypatch: pytest.MonkeyPatch, is_it: bool) -> ReplayStepper:
    """A stepper with recordings as they would be on a GPU, or without."""
    monkeypatch.setattr(graphs, "recorded", on_the_cpu)
    monkeypatch.setattr(graphs, "graph_pool", lambda: None)
    monkeypatch.setattr(replaying, "_plays_graphs", lambda *_: is_it)
    one: ReplayStepper = stepper(ReplayStepper, made, Prose())
    return one


@pytest.mark.parametrize("name", GEOMETRIES)
def test_played_pieces_take_nothing_from_the_cpu(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(fam=GEOMETRIES[name], replay={"behind": [4]}, asked_blocks=2)
    one, looked = recorded(made, monkeypatch, is_it=True), set[str]()
    plays = one._pieces._plays

    def watched(key: Any, run: Any, given: list[Tensor]) -> list[Tensor]:
        def again(tensors: list[Tensor]) -> list[Tensor]:
            run(tensors)  # makes what is kept
            with Lifted() as lifted:
                found: list[Tensor] = run(tensors)
            assert lifted.count == 0, key
            looked.add(key[0])
            return found

        return plays(key, again, given)

    monkeypatch.setattr(one._pieces, "_plays", watched)
    one.run(0, [rows()])
    assert looked == {"lead", "back", "ask", "alone"}


def growing(max_growth: float) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Gradients of a text over many blocks, and those of F with which each block is left."""
    drawn = {"before": [0], "behind": [9], "max_growth": max_growth}
    one = stepper(ReplayStepper, recipe(replay=drawn), Prose())
    back, left = one._pieces.back, list[Tensor]()

    def heard(*given: Any) -> Tensor | None:
        left.append(given[-1].clone())
        found: Tensor | None = back(*given)
        # The first row grows, in this test by hand.
        return None if found is None else found * torch.tensor([1e4, 1.0])[:, None, None]

    one._pieces.back = heard
    one.run(0, [rows()])
    return gradients(one.base), left


def test_a_row_whose_gradient_grows_is_cut_alone() -> None:
    (_, grown), (found, cut) = growing(0.0), growing(1e3)
    ours, free = (
        torch.stack([x.pow(2).sum((0, 2, 3)).sqrt() for x in all_]) for all_ in (cut, grown)
    )
    assert free[-1, 0] > 1e6 * free[0, 0], "without a limit"
    torch.testing.assert_close(ours[0], free[0])
    assert (ours <= 1001 * ours[0]).all() and ours[-1, 0] > 999 * ours[0, 0]
    assert torch.equal(ours[:, 1], free[:, 1]), "the other goes on as it was"
    assert any(gradient.any() for gradient in found.values())


@pytest.mark.parametrize("segments", [0, 1, 4])
def test_a_limit_that_nothing_reaches_changes_nothing(segments: int) -> None:
    runs = []
    for max_growth in (0.0, 1e6):
        drawn = {"max_growth": max_growth, "behind": [9]}
        made = recipe(replay=drawn, asked_blocks=2, bptt_blocks=segments)
        one = stepper(ReplayStepper, made, Prose())
        one.run(0, [rows()])
        runs.append(gradients(one.base))
    assert_same(*runs)


def test_dropout_there_is_dropout_back() -> None:
    """The gradient of a step with dropout is that of its loss, whose masks the seed gives."""
    made = recipe(replay={"before": [0], "behind": [4], "times": 2})
    one: ReplayStepper = stepper(ReplayStepper, made, Prose(), dropout=0.3)
    batches = [rows(), rows()]
    one.run(0, batches)
    moved = {name: p for name, p in one.base.named_parameters() if p.grad is not None}
    along = {name: torch.randn_like(p) for name, p in moved.items()}
    expected = sum(
        float((p.grad * along[name]).sum()) for name, p in moved.items() if p.grad is not None
    )
    losses = list[float]()
    for way in (1e-5, -2e-5):
        with torch.no_grad():
            for name, p in moved.items():
                p += way * along[name]
        losses.append(float(one.run(0, batches) or 0))
    assert expected and (losses[0] - losses[1]) / 2e-5 == pytest.approx(expected, rel=1e-3)


def test_micro_batches_have_dropout_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    one: ReplayStepper = stepper(ReplayStepper, recipe(), Prose(), dropout=0.3)
    seeds = list[int]()
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    one.run(0, [rows(), rows()])
    there = [seed for seed in seeds[1:] if seeds.count(seed) == 2]
    assert len(there) == len(seeds) - 1, "each there and back, and all others another"


def test_tokens_count_as_often_as_they_are_replayed() -> None:
    one = stepper(ReplayStepper, recipe(replay={"times": 2}), Prose())
    one.run(0, [rows()])
    wanted = [written_out(one._text(rows(), time), one.library).inputs.numel() for time in (0, 1)]
    assert one.tokens == sum(wanted)


def test_texts_are_drawn_anew_each_time_and_alike_when_repeated() -> None:
    def texts(step: int) -> list[tuple[Any, ...]]:
        one = stepper(ReplayStepper, recipe(replay={"times": 9}), Prose())
        one._step = step
        made = [one._text(rows(), time) for time in range(9)]
        return [(t.own, t.blocks, t.begun, t.place) for t in made]

    assert texts(0) == texts(0) != texts(1)
    drawn = texts(0)
    assert {own for own, *_ in drawn} == {0, 2}
    assert {blocks - own - 1 for own, blocks, *_ in drawn} == {1, 3}


def test_texts_come_to_more_blocks_as_their_answers_are_right() -> None:
    table = recipe(replay={"before": [0, 2], "behind": [1, 3, 9], "times": 40}).to_dict()
    table["data"] |= {"begin_length": 1, "grow_at": 0.5}
    made = Recipe.from_dict(table)
    one, growth = stepper(ReplayStepper, made, Prose()), Curriculum(made, Prose())
    longest = list[int]()
    while not longest or growth.longest != longest[-1]:
        longest.append(growth.longest)
        one.longest = growth.longest
        lengths = {(one._text(rows(), time).blocks + 1) * B for time in range(40)}
        assert max(lengths) <= growth.longest < 1.6 * max(lengths)
        for _ in range(8):
            growth.tell(8, 8)
    assert longest[0] == 3 * B and longest[-1] == 13 * B == max(lengths)


def test_a_replayed_text_is_right_if_all_of_its_answers_are() -> None:
    table = recipe(replay={"times": 3, "rows_at_once": 1}).to_dict()
    table["data"]["begin_length"] = 1
    one, said = stepper(ReplayStepper, Recipe.from_dict(table), Prose()), list[Tensor]()
    asks = one._pieces.ask

    def heard(*given: Any, **named: Any) -> Asked:
        asked = asks(*given, **named)
        said.append(torch.tensor([[True], [len(said) % 2 == 1]]))
        return replace(asked, said=said[-1])

    one._pieces.ask = heard
    one.run(0, [rows()])
    assert len(said) == 6 and one.right == (3, 6)


def test_answers_are_right_if_they_are_what_the_model_says(monkeypatch: pytest.MonkeyPatch) -> None:
    table = recipe(replay={"before": [0], "behind": [1]}).to_dict()
    table["data"]["begin_length"] = 1
    one, batch, logits = (
        stepper(ReplayStepper, Recipe.from_dict(table), Prose()),
        rows(),
        list[Tensor](),
    )

    def heard(said: Tensor, *given: Tensor) -> Tensor:
        logits.append(said.clone())
        return answers_said(said, *given)

    monkeypatch.setattr(leading, "answers_said", heard)
    one.run(0, [batch])
    assert one.right == (0, 2)
    targets = batch.targets.clone()
    targets[:, -logits[0].shape[1] :] = logits[0].argmax(-1)
    one.run(0, [replace(batch, targets=targets)])
    assert one.right == (2, 2)


def test_the_library_is_prose_as_the_windows_of_the_geometry_read_it() -> None:
    made = recipe(fam={"memory_segments": 1, "sink_tokens": 1}, drawn_segments=[0])
    one = stepper(ReplayStepper, made, Prose())
    one.set_geometry(0)
    library = one.library
    assert one.base.fam_config.memory_segments == 0, "what the step has drawn"
    assert len(library) == 8, "two each of four streams"
    other = Library(stepper(Stepper, made).base, Prose(), 6, made.run.seed)
    for ours, theirs in zip(library.tokens, other.tokens, strict=True):
        assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)


@pytest.mark.parametrize("late", [{"told": (4, B + 1)}, {"asked_from": (2 * B, B - 1)}])
def test_a_text_that_tells_later_or_asks_earlier_is_refused(late: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="tell all in their first 6 tokens"):
        stepper(ReplayStepper, recipe(), Prose()).run(0, [replace(rows(), **late)])


def test_a_run_that_goes_on_is_one_that_was_not_stopped(tmp_path: Path) -> None:
    def run(folder: str, stops: Sequence[bool]) -> dict[str, Tensor]:
        asked = iter([*stops, *[False] * 9])
        trained = None
        for resume in [False] + [True] * any(stops):
            torch.manual_seed(0)
            made = recipe(fam={"memory_segments": 1, "sink_tokens": 1}, drawn_segments=[0, 1])
            made = made.replace(run=replace(made.run, output=str(tmp_path / folder)))
            trainer = Trainer(made, with_adapter(made.fam), Prose(), quiet=True)
            trained = trainer.run(resume=resume, stop=lambda: next(asked))
        assert trained is not None and trained.steps == 3
        return {n: p.detach() for n, p in trained.model.named_parameters() if p.requires_grad}

    whole, stopped = run("whole", []), run("stopped", [True])
    assert whole
    for name, value in whole.items():
        assert torch.equal(value, stopped[name]), name


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"fam": {"adapted": "all"}}, "adapted"),
        ({"fam": {"attention": "full"}}, "windows that end"),
        ({"feedback": {"state_passing": 0.5}}, "state_passing"),
        ({"feedback": {"position_offset": 0.5}}, "position_offset"),
        ({"feedback": {"bptt_blocks": 2}, "fam": {"previous_fams": 3}}, "at least as many, not 2"),
        ({"feedback": {"bptt_blocks": 2}}, "set feedback.asked_blocks"),
        ({"feedback": {"bptt_blocks": 2, "asked_blocks": 2}, "replay": {"before": [2]}}, "smaller"),
        ({"replay": {"behind": []}}, "behind"),
        ({"replay": {"before": [-1]}}, "before"),
        ({"replay": {"times": 0}}, "times"),
        ({"replay": {"rows_at_once": -1}}, "rows_at_once"),
        ({"replay": {"max_growth": -1.0}}, "max_growth"),
        ({"fam": {"fam_query": "static"}}, "static"),
        ({"run": {"cuda_graphs": True, "activation_checkpointing": True}}, "checkpointing"),
        ({"run": {"cuda_graphs": True}, "fam": {"fam_position": "zero"}}, "fam_position"),
        # Without FAM nothing is replayed, and recordings are those of steps that read.
        (
            {
                "run": {"cuda_graphs": True},
                "fam": {"fam_length": 0, "fam_seen": "always", "adapted": "all"},
                "data": {"layout": "documents"},
            },
            'layout="documents"',
        ),
        ({"data": {"layout": "documents"}}, "single"),
        ({"data": {"sources": [{"kind": "files", "path": "x.jsonl"}]}}, "files"),
    ],
)
def test_what_does_not_go_together_says_why(changes: dict[str, Any], named: str) -> None:
    table = recipe().to_dict()
    for section, values in changes.items():
        table[section] = {**table[section], **values}
    with pytest.raises(UserError, match=named):
        Recipe.from_dict(table)


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ({"lengths": [420]}, "Make lengths .* more"),
        ({"lengths": [1900], "keys": 9, "asked": 9}, "fewer keys or larger blocks"),
    ],
)
def test_sources_whose_texts_do_not_fit_are_refused_at_the_start(
    source: dict[str, Any], named: str
) -> None:
    table = recipe(fam={"block_size": 400}).to_dict()

    def opened(source: dict[str, Any]) -> Any:
        sources = [{"kind": "passkey", "where": "anywhere", **source}]
        data = {**table["data"], "length": 2000, "sources": sources}
        return open_source(Recipe.from_dict({**table, "data": data}), TOKENIZERS["gpt2"])

    opened({"lengths": [800]})
    with pytest.raises(UserError, match=named):
        opened(source)


def test_a_source_without_prose_cannot_be_replayed() -> None:
    class Mute:
        def draw(self, number: int) -> Example:
            return Prose().draw(number)

    with pytest.raises(UserError, match="made-up texts"):
        stepper(ReplayStepper, recipe(), Mute()).run(0, [rows()])
