"""A step of training: what is carried, what is cut, and what the gradients are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from families import some_tokens, tiny
from oracle import make_exact
from torch import Tensor

from transformerfam import Memory, convert
from transformerfam.training.batches import Batch
from transformerfam.training.recipe import Recipe
from transformerfam.training.steps import Stepper, bias_at, segments_at

B = 6
FAM = {"block_size": B, "memory_segments": 1, "fam_length": 3, "sink_tokens": 1}


def recipe(layout: str = "packed", fam: dict[str, Any] | None = None, **feedback: Any) -> Recipe:
    return Recipe.from_dict(
        {
            "fam": {**FAM, **(fam or {})},
            "data": {"layout": layout, "batch_size": 2, "length": 4 * B},
            "feedback": {"bias_steps": 0, **feedback},
        }
    )


def stepper(made: Recipe) -> Stepper:
    model = convert(make_exact(tiny()), made.fam).train()
    accelerator = Accelerator()
    return Stepper(accelerator, accelerator.prepare(model), model, made)


def batch(ids: Tensor, weights: Tensor | None = None, fresh: bool = True) -> Batch:
    """Rows (R, T + 1) as inputs and the tokens after them."""
    inputs, targets = ids[:, :-1], ids[:, 1:]
    if weights is None:
        weights = torch.ones(inputs.shape)
    return Batch(inputs, targets, weights, None, (fresh,) * len(ids))


def gradients(model: Any) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys() and ours
    for name in ours:
        # The loss is taken in float32.
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-7)


# ---- the loss


def test_the_loss_is_the_weighted_mean_of_the_tokens_that_count() -> None:
    one = stepper(recipe())
    ids = some_tokens(2, 3 * B + 1)
    weights = torch.zeros(2, 3 * B)
    weights[0, 3:7], weights[1, 12] = 1.0, 0.1
    loss = one.run(0, [batch(ids, weights)])
    with torch.no_grad():
        logits = one.base(ids[:, :-1]).logits
    each = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    expected = float((each * weights.flatten()).sum() / weights.sum())
    assert loss == pytest.approx(expected, rel=1e-6)


def test_micro_batches_and_segments_add_up_to_the_whole() -> None:
    ids = some_tokens(2, 4 * B + 1)
    whole = stepper(recipe())
    loss = whole.run(0, [batch(ids)])
    split = stepper(recipe())
    parts = split.run(0, [batch(ids[:1]), batch(ids[1:])])
    assert parts == pytest.approx(loss, rel=1e-6)
    assert_same(gradients(split.base), gradients(whole.base))
    # In segments the loss is the same, since the memory goes on; gradients are cut.
    cut = stepper(recipe(bptt_blocks=2))
    assert cut.run(0, [batch(ids)]) == pytest.approx(loss, rel=1e-6)


def test_tokens_that_fill_up_a_row_change_nothing() -> None:
    ids = some_tokens(2, 3 * B + 1)
    alone, together = stepper(recipe()), stepper(recipe(state_passing=1.0))
    short = ids[:1, : B + 3]
    expected = alone.run(0, [batch(short), batch(ids[1:])])
    inputs, targets = ids[:, :-1].clone(), ids[:, 1:].clone()
    weights, valid = torch.ones(2, 3 * B), torch.ones(2, 3 * B, dtype=torch.bool)
    inputs[0, B + 2 :], weights[0, B + 2 :], valid[0, B + 2 :] = 0, 0, False
    filled = Batch(inputs, targets, weights, valid, (True, True))
    assert filled.tokens == B + 2 + 3 * B
    assert together.run(0, [filled]) == pytest.approx(expected, rel=1e-6)
    assert_same(gradients(together.base), gradients(alone.base))
    # What is passed on is what the first row had read, without what filled it up.
    memory = Memory.for_model(alone.base)
    with torch.no_grad():
        alone.base(short[:, :-1], past_key_values=memory)
    assert together.carried.fams is not None
    for ours, theirs in zip(together.carried.fams, memory.fams, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_step_in_which_nothing_counts_has_no_loss_and_no_gradient() -> None:
    one = stepper(recipe("documents"))
    ids = some_tokens(2, 2 * B + 1)
    assert one.run(0, [batch(ids, torch.zeros(2, 2 * B))]) is None
    assert not gradients(one.base)
    assert one.carried.memories[0].position == (2 * B, 2 * B)


# ---- truncated backpropagation


class Watched:
    """Gradients of a step with respect to the embedding of each token read."""

    def __init__(self, one: Stepper) -> None:
        self.rows: list[Tensor] = []
        one.base.get_input_embeddings().register_forward_hook(self._hook)

    def _hook(self, module: Any, args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.retain_grad()
            self.rows.append(output)

    def reached(self, blocks: int) -> list[bool]:
        """For each block whether any gradient came to it."""
        grads = [torch.zeros_like(r) if r.grad is None else r.grad for r in self.rows]
        joined = torch.cat(grads, dim=1)
        assert joined.shape[1] == blocks * B
        return [bool(block.abs().max() > 0) for block in joined.split(B, dim=1)]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("depth", [2, 3, 0])
def test_gradients_reach_to_the_cut_and_not_past_it(depth: int, checkpointing: bool) -> None:
    # Only the last token counts; without memory segments only FAM leads back to earlier blocks.
    one = stepper(recipe(fam={"memory_segments": 0, "sink_tokens": 0}, bptt_blocks=depth))
    if checkpointing:
        one.base.activation_checkpointing_enable()
    watched = Watched(one)
    # Segments in which nothing counts are read without gradients: let the first token count.
    weights = torch.zeros(1, 6 * B)
    weights[0, -1] = 1.0
    for first_of_segment in range(0, 6 * B, (depth or 6) * B):
        weights[0, first_of_segment] = 1e-9
    one.run(0, [batch(some_tokens(1, 6 * B + 1), weights)])
    last = torch.zeros(6, dtype=torch.bool)
    last[-depth if depth else 0 :] = True
    grads = torch.cat([r.grad for r in watched.rows if r.grad is not None], dim=1)
    strong = [bool(block.abs().max() > 1e-7) for block in grads.split(B, dim=1)]
    assert strong == last.tolist()


@pytest.mark.parametrize("depth", [2, 3])
def test_what_is_carried_over_a_cut_is_the_whole_state(depth: int) -> None:
    """The loss after a cut depends on all that was read before, and equals the uncut loss."""
    ids = some_tokens(2, 6 * B + 1)
    weights = torch.zeros(2, 6 * B)
    weights[:, -B:] = 1.0
    cut, uncut = stepper(recipe(bptt_blocks=depth)), stepper(recipe())
    assert cut.run(0, [batch(ids, weights)]) == pytest.approx(uncut.run(0, [batch(ids, weights)]))
    other = ids.clone()
    other[:, 0] = 3 + (other[:, 0] - 2) % 60
    changed = cut.run(1, [batch(other, weights)])
    assert changed != cut.run(1, [batch(ids, weights)])


def test_gradients_of_one_segment_equal_those_of_a_call_on_the_detached_memory() -> None:
    ids = some_tokens(2, 4 * B + 1)
    weights = torch.zeros(2, 4 * B)
    weights[:, -B:] = 1.0
    cut = stepper(recipe(bptt_blocks=2))
    cut.run(0, [batch(ids, weights)])
    plain = stepper(recipe()).base
    memory = Memory.for_model(plain, 2)
    with torch.no_grad():
        plain(ids[:, : 2 * B], past_key_values=memory)
    logits = plain(ids[:, 2 * B : -1], past_key_values=memory.detach()).logits
    each = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), ids[:, 2 * B + 1 :].flatten(), reduction="none"
    )
    (each * weights[:, 2 * B :].flatten()).sum().div(weights.sum()).backward()
    assert_same(gradients(cut.base), gradients(plain))


# ---- documents


def test_rows_go_on_from_step_to_step_and_begin_anew_at_the_end_of_a_document() -> None:
    one = stepper(recipe("documents"))
    ids = some_tokens(2, 4 * B + 1)
    one.run(0, [batch(ids[:, : 2 * B + 1])])
    second = Batch(
        ids[:, 2 * B : -1], ids[:, 2 * B + 1 :], torch.ones(2, 2 * B), None, (False, True)
    )
    loss = one.run(1, [second])
    assert one.carried.memories[0].position == (4 * B, 2 * B)
    with torch.no_grad():
        goes_on = one.base(ids[:1, :-1]).logits[:, 2 * B :]
        anew = one.base(ids[1:, 2 * B : -1]).logits
    expected = torch.nn.functional.cross_entropy(
        torch.cat([goes_on, anew]).flatten(0, 1), ids[:, 2 * B + 1 :].flatten()
    )
    assert loss == pytest.approx(float(expected), rel=1e-6)
    assert not any(t.requires_grad for _, t in one.carried.memories[0].tensors())


# ---- random state passing, position offset, bias


def test_state_passing_starts_from_the_fam_of_the_first_row_of_the_step_before() -> None:
    one = stepper(recipe(state_passing=1.0, state_passing_delay=2))
    ids = some_tokens(2, 2 * B + 1)
    losses = [one.run(step, [batch(ids)]) for step in range(2)]
    assert losses[0] == losses[1]  # the delay
    passed = one.carried.fams
    assert passed is not None and passed[0].shape == (1, 3, 32)
    assert not passed[0].requires_grad
    memory = Memory.for_model(one.base, 2)
    memory.begin_with(passed)
    with torch.no_grad():
        logits = one.base(ids[:, :-1], past_key_values=memory).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert one.run(2, [batch(ids)]) == pytest.approx(float(expected), rel=1e-6)
    assert expected != pytest.approx(losses[0], rel=1e-6)


def test_state_passing_happens_as_often_as_asked_and_alike_when_repeated() -> None:
    def began(seed: int) -> list[bool]:
        made = recipe(state_passing=0.8)
        one = stepper(made)
        one.carried.fams = tuple(torch.zeros(1, 3, 32, dtype=torch.float64) for _ in range(3))
        filler = batch(some_tokens(1, B + 1))
        return [one._begin(filler, 0, step).passed[0] for step in range(300)]

    first = began(0)
    assert 0.72 < sum(first) / 300 < 0.88
    assert first == began(0)


def test_a_position_offset_changes_nothing_unless_fam_stands_at_zero() -> None:
    ids = some_tokens(2, 3 * B + 1)
    for position, matters in (("last", False), ("zero", True)):
        fam = {"fam_position": position}
        plain = stepper(recipe(fam=fam)).run(0, [batch(ids)])
        moved = stepper(recipe(fam=fam, position_offset=1.0)).run(0, [batch(ids)])
        assert (moved != pytest.approx(plain, rel=1e-7)) == matters


def test_the_bias_rises_and_begins_as_the_windows_alone() -> None:
    cubic = recipe(bias_start=-64, bias_steps=4)
    assert [bias_at(step, cubic) for step in range(6)] == [-64, -27, -8, -1, 0, 0]
    made = recipe(bias_start=-1e4, bias_steps=4, bias_power=1)
    assert [bias_at(step, made) for step in range(6)] == [-1e4, -7500, -5000, -2500, 0, 0]
    ids = some_tokens(2, 4 * B + 1)
    one = stepper(made)
    loss = one.run(0, [batch(ids)])
    windows = convert(make_exact(tiny()), made.fam.without_feedback())
    with torch.no_grad():
        logits = windows(ids[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert loss == pytest.approx(float(expected), rel=1e-6)
    one.run(4, [batch(ids)])
    assert one.base.fam_config.fam_bias == 0


def test_stopped_gradients_are_those_of_the_configuration() -> None:
    ids = some_tokens(1, 3 * B + 1)
    flowing, stopped = (
        stepper(recipe(fam={"fam_length": 0, "stop_gradient": stop})) for stop in (False, True)
    )
    assert flowing.run(0, [batch(ids)]) == stopped.run(0, [batch(ids)])
    ours, theirs = gradients(flowing.base), gradients(stopped.base)
    assert any(not torch.allclose(ours[n], theirs[n]) for n in ours)


# ---- past blocks that are drawn


def test_each_step_draws_how_many_past_blocks_it_sees() -> None:
    made = recipe(drawn_segments=[0, 2, 2])
    drawn = [segments_at(step, made) for step in range(300)]
    assert set(drawn) == {0, 2} and 150 < drawn.count(2) < 250
    assert drawn == [segments_at(step, made) for step in range(300)]
    assert segments_at(0, recipe()) == FAM["memory_segments"]


def test_a_step_reads_with_the_windows_that_it_has_drawn_and_leaves_those_of_the_geometry() -> None:
    made = recipe(drawn_segments=[0, 2])
    one, ids = stepper(made), some_tokens(2, 3 * B + 1)
    for segments in (0, 2):
        step = next(n for n in range(20) if segments_at(n, made) == segments)
        loss = one.run(step, [batch(ids)])
        own = stepper(recipe(fam={"memory_segments": segments}))
        assert loss == pytest.approx(own.run(step, [batch(ids)]), rel=1e-6)
        assert_same(gradients(one.model), gradients(own.model))
        assert one.base.fam_config == made.fam


def test_texts_grow_by_steps_with_the_fewest_past_blocks() -> None:
    made = Recipe.from_dict(
        {
            "fam": FAM,
            "data": {"layout": "single", "begin_length": 2 * B, "length": 4 * B, "batch_size": 2},
            "feedback": {"bias_steps": 0, "drawn_segments": [0, 2]},
        }
    )
    one, ids = stepper(made), some_tokens(2, 3 * B + 1)
    for step in range(8):
        one.run(step, [batch(ids)])
        assert one.right[1] == (2 if segments_at(step, made) == 0 else 0)


# ---- FAM that is seen where something is asked


ALONE = {"fam_seen": "asked", "memory_segments": 0, "sink_tokens": 0}


def asked_text(told: tuple[int, ...] = ()) -> Batch:
    """Two texts of three blocks and a half, the last 5 tokens of which are a question and its answer."""
    length, question = 3 * B + 7, 3 * B + 2
    weights = torch.zeros(2, length)
    weights[:, question + 2 :] = 1.0
    made = batch(some_tokens(2, length + 1), weights)
    return replace(made, asked_from=(question,) * 2, told=told, question=(question,) * len(told))


def test_what_is_read_and_what_is_asked_in_two_calls_is_one_text() -> None:
    made = recipe("single", fam={"fam_seen": "asked"})
    one, text = stepper(made), asked_text()
    loss = one.run(0, [text])
    ours = gradients(one.base)
    logits = one.base(text.inputs, fam_asked=text.asked).logits
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), text.targets.flatten(), reduction="none"
    )
    mean = (expected * text.weights.flatten()).sum() / text.weights.sum()
    mean.backward()
    assert loss == pytest.approx(float(mean.detach()), rel=1e-6)
    assert_same(ours, gradients(one.base))


def test_a_question_behind_a_block_is_that_of_a_shorter_text() -> None:
    """Of FAM alone: without past blocks that is all that a question at the start of a block sees."""
    text = asked_text(told=(B + 1, 1))  # behind blocks 1 and 2 of the first row, all of the second
    often = stepper(recipe("single", fam=ALONE, asked_blocks=3))
    loss = often.run(0, [text])
    ours = gradients(often.base)

    one = stepper(recipe("single", fam=ALONE))
    assert one.run(0, [text]) == pytest.approx(loss, rel=1e-6)
    total = gradients(one.base)
    for row, block in ((0, 2), (0, 3), (1, 1), (1, 2), (1, 3)):
        # The same text up to that block, and then the question.
        parts = [
            torch.cat([x[row : row + 1, : block * B], x[row : row + 1, 3 * B + 2 :]], dim=1)
            for x in (text.inputs, text.targets, text.weights)
        ]
        parts[1][:, block * B - 1] = parts[0][:, block * B]
        one.run(0, [Batch(*parts, None, (True,), (block * B,))])  # type: ignore[call-arg,arg-type]
        for name, gradient in gradients(one.base).items():
            # Each run takes the mean of 3 tokens, the batch that of 6; and a third for each block.
            total[name] = total[name] + gradient * 3 / 6 / 3
    assert_same(ours, total)


def test_what_a_row_is_asked_of_fam_alone_does_not_depend_on_the_others() -> None:
    text = asked_text(told=(2 * B + 1, 1))
    weights = text.weights.clone()
    weights[1, B + 4 :] = 1.0
    text = replace(
        text, weights=weights, asked_from=(3 * B + 2, B + 2), question=(3 * B + 2, B + 2)
    )
    rows = [
        replace(
            text,
            **{name: getattr(text, name)[r : r + 1] for name in ("inputs", "targets", "weights")},
            **{name: getattr(text, name)[r : r + 1] for name in ("asked_from", "told", "question")},
            fresh=(True,),
        )
        for r in range(2)
    ]
    together, apart = (stepper(recipe("single", fam=ALONE, asked_blocks=1)) for _ in range(2))
    assert together.run(0, [text]) == pytest.approx(apart.run(0, rows), rel=1e-6)
    assert_same(gradients(together.base), gradients(apart.base))
    # Nor on a row of which all is asked, as of files.
    first = stepper(recipe("single", fam=ALONE, asked_blocks=1))
    first.run(0, [replace(text, asked_from=(3 * B + 2, 0), question=(3 * B + 2, None))])
    alone = stepper(recipe("single", fam=ALONE, asked_blocks=1))
    alone.run(0, [rows[0], replace(rows[1], asked_from=(0,), question=(None,))])
    assert_same(gradients(first.base), gradients(alone.base))


def test_no_more_questions_than_are_wanted_and_none_before_all_is_told() -> None:
    text = asked_text(
        told=(2 * B + 1, 3 * B + 1)
    )  # only block 2 of the first row, none of the second
    losses = []
    for blocks in (1, 2):
        one = stepper(recipe("single", fam=ALONE, asked_blocks=blocks))
        one.run(0, [text])
        losses.append(gradients(one.base))
    plain = stepper(recipe("single", fam=ALONE))
    plain.run(0, [text])
    without = gradients(plain.base)
    halves = {n: (losses[0][n] - without[n]) / 2 + without[n] for n in without}
    assert_same(losses[1], halves)
