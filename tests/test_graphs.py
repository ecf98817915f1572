"""Recorded steps: what they compute is what steps compute; a GPU is not needed to tell."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator
from families import some_tokens, tiny
from test_steps import FAM, B, assert_same, batch, recipe, stepper
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from transformerfam import convert
from transformerfam.call import Call, keeping
from transformerfam.conversion import reconfigure
from transformerfam.data.rows import Source
from transformerfam.errors import UserError
from transformerfam.training import adaptation, graphs
from transformerfam.training.batches import Batch
from transformerfam.training.graphs import RecordedStepper
from transformerfam.training.recipe import Recipe, find
from transformerfam.training.replaying import stepper_for
from transformerfam.training.steps import Stepper


def on_the_cpu(run: Callable[[], Any], pool: Any) -> tuple[Any, Callable[[], None]]:
    """In place of CUDA's recording: runs again, and must leave its result in the same place."""
    result = tree_map(Tensor.clone, run())

    def replay() -> None:
        tree_map(Tensor.copy_, result, run())

    return result, replay


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "recorded", on_the_cpu)
    monkeypatch.setattr(graphs, "graph_pool", lambda: None)


def recorded_stepper(made: Recipe) -> RecordedStepper:
    other = stepper(made)
    return RecordedStepper(other.accelerator, other.model, other.base, made)


@pytest.mark.parametrize("norm", ["none", "rms", 2.0])
def test_gradients_and_losses_are_those_of_plain_steps(norm: Any) -> None:
    made = recipe("single", fam={"feedback_norm": norm})
    plain, ours = stepper(made), recorded_stepper(made)
    for step, length in enumerate([4 * B, 2 * B + 3, 4 * B]):
        ids = some_tokens(2, length + 1, seed=step)
        weights = torch.rand(2, length)
        expected = plain.run(step, [batch(ids, weights)])
        found = ours.run(step, [batch(ids, weights)])
        assert found == pytest.approx(expected, rel=1e-5)
        pairs = [
            {n: p.grad.clone() for n, p in s.base.named_parameters() if p.grad is not None}
            for s in (ours, plain)
        ]
        assert_same(*pairs)
        for one in (plain, ours):
            one.base.zero_grad()  # as the optimizer does: gradients are taken away


def test_an_adapter_of_fam_alone_is_recorded_where_fam_goes() -> None:
    made = recipe("single", fam={"adapted": "fam"})
    model = adaptation.adapt(convert(tiny(dtype=torch.float32), made.fam), made.train, seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # 0 at the start, where an adapter changes nothing
            torch.nn.init.normal_(parameter.data, std=0.1)
    ids, losses, grads = some_tokens(2, 4 * B + 1), [], []
    for kind in (Stepper, RecordedStepper):
        one = copy.deepcopy(model).train()
        each = kind(Accelerator(), one, adaptation.base_of(one), made)
        losses.append(each.run(0, [batch(ids)]))
        grads.append({n: p.grad for n, p in one.named_parameters() if p.grad is not None})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert grads[0].keys() == grads[1].keys() and any("lora_A" in name for name in grads[0])
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-6, rtol=1e-4)
    # It matters where: an adapter of everything has another loss.
    other = recipe("single")
    everything = adaptation.base_of(one)
    reconfigure(everything, other.fam)
    assert Stepper(Accelerator(), one, everything, other).run(0, [batch(ids)]) != losses[0]


def asking(rows: int, length: int, first: list[int], seed: int = 0) -> Batch:
    """Texts that are read, and asked something from a column on; only answers count."""
    made = batch(some_tokens(rows, length + 1, seed=seed))
    weights = torch.arange(length) > torch.tensor(first)[:, None]
    return replace(made, weights=weights.float(), asked_from=tuple(first))


@pytest.mark.parametrize(
    "feedback", [{}, {"state_passing": 0.7, "drawn_segments": (0, 1)}], ids=str
)
def test_what_is_asked_is_recorded_behind_what_is_read(feedback: dict[str, Any]) -> None:
    made = recipe("single", fam={"fam_seen": "asked"}, **feedback)
    plain, ours = stepper(made), recorded_stepper(made)
    cases = [(4 * B, [3 * B, 3 * B + 2]), (4 * B - 1, [2 * B + 1, 3 * B]), (B + 1, [1, B])]
    steps = [asking(2, T, first, seed) for seed, (T, first) in enumerate([*cases, *cases])]
    assert_alike(plain, ours, steps)
    # That only answers see FAM matters.
    other = stepper(recipe("single"))
    assert other.run(0, steps[:1]) != pytest.approx(stepper(made).run(0, steps[:1]), rel=1e-4)


def test_a_longer_step_is_another_recording() -> None:
    made = recipe("single")
    plain, ours = stepper(made), recorded_stepper(made)
    for longest, length in ((2 * B, 2 * B), (2 * B, 3 * B), (4 * B, B + 1), (4 * B, 4 * B)):
        ours.longest = longest
        ids = some_tokens(2, length + 1, seed=length)
        expected = plain.run(0, [batch(ids)])
        assert ours.run(0, [batch(ids)]) == pytest.approx(expected, rel=1e-5)
        assert ours._length == max(longest, length if length > 2 * B else 0)


def test_micro_batches_add_up() -> None:
    made = recipe("single")
    plain, ours = stepper(made), recorded_stepper(made)
    ids = some_tokens(2, 4 * B + 1)
    plain.run(0, [batch(ids)])
    ours.run(0, [batch(ids[:1]), batch(ids[1:])])
    grads = [
        {n: p.grad for n, p in s.base.named_parameters() if p.grad is not None}
        for s in (ours, plain)
    ]
    assert_same(*grads)


def filled(rows: list[int], seed: int) -> Batch:
    """Rows of these many tokens, filled up to the longest."""
    ids = some_tokens(len(rows), max(rows) + 1, seed=seed)
    valid = torch.arange(max(rows))[None] < torch.tensor(rows)[:, None]
    inputs, targets = ids[:, :-1] * valid, ids[:, 1:] * valid
    return Batch(inputs, targets, valid.float(), valid, (True,) * len(rows))


def assert_alike(plain: Stepper, ours: Stepper, steps: list[Batch]) -> None:
    """Losses, gradients and what is passed on are the same step after step."""
    for step, rows in enumerate(steps):
        assert ours.run(step, [rows]) == pytest.approx(plain.run(step, [rows]), rel=1e-5)
        grads = [
            {n: p.grad for n, p in s.base.named_parameters() if p.grad is not None}
            for s in (ours, plain)
        ]
        assert_same(*grads)
        found, expected = ours.carried.fams, plain.carried.fams
        assert (found is None) == (expected is None)
        for mine, theirs in zip(found or (), expected or (), strict=True):
            torch.testing.assert_close(mine, theirs)
        for one in (plain, ours):
            one.base.zero_grad()


# Of the first row a text of some blocks, one without a whole block, one that is filled up.
STEPS = [[4 * B, 3 * B], [2 * B + 1, 5 * B - 1], [B - 1, 2 * B], [3 * B - 2, 3 * B], [2 * B, B + 3]]


@pytest.mark.parametrize(
    "feedback",
    [
        pytest.param({"state_passing": 0.7}, marks=pytest.mark.slow),
        {"bptt_blocks": 2, "state_passing": 0.7},
        {"bptt_blocks": 2, "state_passing": 0.7, "drawn_segments": (0, 1)},
    ],
    ids=str,
)
def test_what_goes_on_from_segment_to_segment_and_step_to_step(feedback: dict[str, Any]) -> None:
    made = recipe("single", **feedback)
    plain, ours = stepper(made), recorded_stepper(made)
    assert_alike(plain, ours, [filled(rows, seed) for seed, rows in enumerate([*STEPS, *STEPS])])


@pytest.mark.parametrize(
    "fam", [{"feedback_norm": "rms"}, {"previous_fams": 2}, {"fam_length": 0}, {"sink_tokens": 3}]
)
def test_segments_go_on_under_any_geometry(fam: dict[str, Any]) -> None:
    passing = {"state_passing": 0.7} if fam.get("fam_length", 1) else {}
    made = recipe("single", fam=fam, bptt_blocks=2, **passing)
    plain, ours = stepper(made), recorded_stepper(made)
    assert_alike(plain, ours, [filled(rows, seed) for seed, rows in enumerate(STEPS)])


@pytest.mark.parametrize("kind", [Stepper, RecordedStepper])
def test_an_answer_that_two_segments_share_is_right_as_a_whole(kind: type[Stepper]) -> None:
    """Two rows are answered, each at both ends of its second segment; one of them is right."""
    made = Recipe.from_dict(
        {
            "fam": FAM,
            "data": {"layout": "single", "batch_size": 3, "length": 6 * B, "begin_length": 6 * B},
            "feedback": {"bias_steps": 0, "bptt_blocks": 2},
        }
    )
    other = stepper(made)
    one = kind(other.accelerator, other.model, other.base, made)
    ids = some_tokens(3, 5 * B + 1)
    with torch.no_grad():
        targets = one.base(ids[:, :-1]).logits.argmax(-1)
    weights = torch.full(targets.shape, 0.1)
    weights[:2, 2 * B - 1 : 2 * B + 1] = 1
    targets[1, 2 * B] += 1
    one.run(0, [Batch(ids[:, :-1], targets, weights, None, (True,) * 3)])
    assert one.right == (1, 2)


def test_a_recording_between_two_segments_leaves_streams_where_they_are() -> None:
    """Texts of one segment, and then of three: the way to go on is recorded in the midst of a text."""
    made = recipe("single", bptt_blocks=2)
    plain, ours = stepper(made), recorded_stepper(made)
    assert_alike(plain, ours, [filled([n * B, 2 * B], seed=n) for n in (2, 1, 6, 6)])


def test_once_recorded_nothing_comes_from_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a call makes once comes from the first run: tables and masks are made on the CPU."""
    made = recipe("single")
    ours = recorded_stepper(made)
    ids = some_tokens(2, 4 * B + 1)
    ours.run(0, [batch(ids)])
    once = Call.once

    def kept(self: Call, key: Any, make: Callable[[], Any]) -> Any:
        def refuse() -> Any:
            raise AssertionError(f"{key} is made again")

        return once(self, key, refuse)

    monkeypatch.setattr(Call, "once", kept)
    ours.run(1, [batch(ids)])


def test_a_recording_in_a_later_step_takes_no_gradients_away() -> None:
    made = recipe("single")
    plain, ours = stepper(made), recorded_stepper(made)
    ours.longest = 2 * B
    short, long = some_tokens(2, 2 * B + 1), some_tokens(2, 4 * B + 1, seed=1)
    for batches in ([short], [short, long]):  # gradients of both steps add up
        for one in (plain, ours):
            one.run(0, [batch(ids) for ids in batches])
    grads = [
        {n: p.grad for n, p in s.base.named_parameters() if p.grad is not None}
        for s in (ours, plain)
    ]
    assert_same(*grads)


class Lifted(TorchDispatchMode):
    """Notes tensors that are made of Python's numbers: on a GPU each is a copy from the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.lift_fresh.default
        return func(*args, **(kwargs or {}))


GEOMETRIES: dict[str, dict[str, Any]] = {
    "default": {},
    "norm of each slot": {"feedback_norm": (1.0, 2.0, 3.0)},
    "rms": {"feedback_norm": "rms"},
    "prefix": {"fam_start": "prefix"},
    "static": {"fam_query": "static"},
    "several": {"previous_fams": 2},
    "float": {"fam_position": "float"},
    "windows": {"fam_length": 0},
    "full": {"attention": "full", "fam_length": 0},
    "swa": {"attention": "swa"},
    "output": {"fam_length": 0, "memory_source": "output"},
    "compressive": {"fam_length": 0, "compressive_memory": "delta"},
}


@pytest.mark.parametrize("name", sorted(GEOMETRIES))
def test_a_played_step_makes_no_tensor_of_numbers(name: str) -> None:
    made = recipe("single", fam=GEOMETRIES[name])
    one = stepper(made)
    ids, kept = some_tokens(2, 4 * B), dict[Any, Any]()
    with keeping(kept):
        one.model(input_ids=ids, use_cache=False)
        with Lifted() as lifted:
            one.model(input_ids=ids, use_cache=False)
    assert kept and lifted.count == 0


def test_without_a_gpu_steps_are_plain() -> None:
    made = recipe("single")
    made = replace(made, run=replace(made.run, cuda_graphs=True, activation_checkpointing=False))
    one = stepper(made)
    assert (
        type(stepper_for(one.accelerator, one.model, one.base, made, source=cast(Source, None)))
        is Stepper
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (["run.activation_checkpointing=true"], "run.activation_checkpointing=true; leave"),
        (["feedback.position_offset=0.5", "train.dropout=0.1"], "offset, train.dropout; leave"),
        (["feedback.bptt_blocks=2", "feedback.drawn_segments=0,3"], "at least 3, not 2"),
        (["feedback.bptt_blocks=2", "fam.fam_position=zero"], "positions count"),
        (["feedback.bptt_blocks=2", "fam.attention=full"], "windows grow"),
        (["data.layout=documents"], "documents"),
        (["fam.recurrence=rmt", "fam.feedback_norm=none", "fam.feedback_rms=1.0"], "recurrence"),
        (["feedback.bias_steps=5"], "bias_steps; leave"),
        (["fam.fam_seen=asked", "feedback.bptt_blocks=2"], "feedback.bptt_blocks; leave"),
        (["fam.fam_seen=asked", "feedback.asked_blocks=2"], "feedback.asked_blocks; leave"),
        (
            ["fam.fam_seen=asked", "data.sources.0.asked_prose=0"],
            "filler_share without asked_prose",
        ),
    ],
)
def test_what_makes_steps_differ_is_refused(changes: list[str], named: str) -> None:
    seen_by_all = ["fam.fam_seen=always", "data.sources.0.asked_prose=0"]
    recorded = ["run.cuda_graphs=true", *([] if "fam.fam_seen=asked" in changes else seen_by_all)]
    Recipe.load(find("smollm2-begin"), recorded)
    with pytest.raises(UserError, match=named):
        Recipe.load(find("smollm2-begin"), [*recorded, *changes])
