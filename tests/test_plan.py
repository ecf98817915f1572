"""Places and masks of ragged calls, held against python loops over single tokens."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import kept_past, window_shows
from variants import VARIANTS

from transformerfam import FamConfig
from transformerfam.plan import CallPlan

CONFIGS = {name: config for name, config in VARIANTS.items() if config.backend == "sdpa"}


@dataclass(frozen=True)
class Token:
    """A new token of one row."""

    column: int
    position: int  # in the stream


def tokens_of(plan: CallPlan) -> list[list[Token]]:
    """The new tokens of each row, one after another."""
    rows = []
    for row, start in enumerate(plan.starts):
        columns = [c for c in range(plan.columns) if plan.valid is None or bool(plan.valid[row, c])]
        rows.append([Token(c, start + i) for i, c in enumerate(columns)])
    return rows


@st.composite
def plans(draw: st.DrawFn) -> CallPlan:
    """A call of up to three rows anywhere in their streams, with or without padding."""
    config = CONFIGS[draw(st.sampled_from(sorted(CONFIGS)))]
    rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 20))
    starts = draw(st.lists(st.integers(0, 40), min_size=rows, max_size=rows))
    if draw(st.booleans()):
        starts = [starts[0]] * rows
    valid = None
    kind = draw(st.sampled_from(["any", "padded", "whole blocks"]))
    if kind == "padded":
        bits = st.lists(st.booleans(), min_size=columns, max_size=columns)
        valid = torch.tensor(draw(st.lists(bits, min_size=rows, max_size=rows)))
    elif kind == "whole blocks":  # for which there is a shorter way
        starts = [start // 6 * config.block_size for start in starts]
        columns = draw(st.integers(1, 4)) * config.block_size
    past = config.past_length
    if past is None:  # everything is kept: the whole blocks of the row that has read most
        past = max(starts) // config.block_size * config.block_size
    return CallPlan(config, tuple(starts), columns, valid, past)


@given(plans())
@settings(max_examples=150, deadline=None)
def test_rows_and_blocks(plan: CallPlan) -> None:
    B, rows = plan.config.block_size, tokens_of(plan)
    assert plan.rows == len(rows)
    assert plan.counts == tuple(map(len, rows))
    touched = [1]
    for r, (start, tokens) in enumerate(zip(plan.starts, rows, strict=True)):
        assert (plan.first_blocks[r], plan.offsets[r]) == divmod(start, B)
        ends = [t for t in tokens if t.position % B == B - 1]
        assert plan.finished[r] == len(ends)
        touched.append(len({t.position // B for t in tokens} | {start // B}))
        if not tokens:
            touched.pop()
    assert plan.blocks == max(touched)
    for j in range(plan.blocks):
        for found, chosen in (
            (plan.rows_finishing(j), [f > j for f in plan.finished]),
            (plan.rows_having_finished(j), [f == j for f in plan.finished]),
        ):
            indices = list(range(plan.rows)) if found is None else found.tolist()
            assert indices == [r for r, yes in enumerate(chosen) if yes]


@given(plans())
@settings(max_examples=150, deadline=None)
def test_every_token_has_its_slot_and_its_place(plan: CallPlan) -> None:
    B, L, nb = plan.config.block_size, plan.queries, plan.blocks
    slots = plan.slots.expand(plan.rows, -1)
    places = plan.query_places.expand(plan.rows, -1)
    columns, taken = (x.expand(plan.rows, -1) for x in plan.query_columns)
    for r, tokens in enumerate(tokens_of(plan)):
        frame = plan.first_blocks[r] * B
        real = {t.column for t in tokens}
        for column in range(plan.columns):
            if column not in real:  # padding: past the end of the frame and of the grid
                assert int(slots[r, column]) == nb * B
                assert int(places[r, column]) == nb * L
        for token in tokens:
            assert int(slots[r, token.column]) == token.position - frame
            place = int(places[r, token.column])
            assert 0 <= place < nb * L
            assert place // L == (token.position - frame) // B
            assert int(columns[r, place]) == token.column
        assert len({int(places[r, t.column]) for t in tokens}) == len(tokens)
        used = {int(places[r, t.column]) for t in tokens}
        assert {i for i in range(nb * L) if taken[r, i]} == used


@given(plans())
@settings(max_examples=100, deadline=None)
def test_anchors_are_found_in_the_call_that_brings_them(plan: CallPlan) -> None:
    anchors = plan.config.anchor_positions
    columns, here = (x.expand(plan.rows, -1) for x in plan.anchor_columns)
    assert columns.shape == here.shape == (plan.rows, len(anchors))
    for r, tokens in enumerate(tokens_of(plan)):
        where = {t.position: t.column for t in tokens}
        for a, anchor in enumerate(anchors):
            assert bool(here[r, a]) == (anchor in where)
            if anchor in where:
                assert int(columns[r, a]) == where[anchor]


@given(plans(), st.sampled_from([None, 1, 4, 9]))
@settings(max_examples=150, deadline=None)
def test_a_query_sees_what_the_pattern_says_and_nothing_twice(
    plan: CallPlan, sliding_window: int | None
) -> None:
    check_visible(plan, sliding_window)


@pytest.mark.parametrize("name", CONFIGS)
def test_far_into_a_stream_whole_blocks_look_alike(name: str) -> None:
    config = CONFIGS[name]
    for block in range(9):
        start = block * config.block_size
        past = start if config.past_length is None else config.past_length
        check_visible(CallPlan(config, (start,) * 2, 3 * config.block_size, None, past), None)


def check_visible(plan: CallPlan, sliding_window: int | None) -> None:
    config, B = plan.config, plan.config.block_size
    A, kN = len(config.anchor_positions), config.previous_fams * config.fam_length
    P, own = plan.past_used, plan.own_used
    mask = plan.visible(sliding_window)
    assert mask.shape[1:] == (1, plan.queries, P + A + kN + own)
    assert len(mask) in (1, plan.rows * plan.blocks)
    assert bool(mask.any(-1).all()), "a query that sees nothing gives NaN"
    places = plan.query_places.expand(plan.rows, -1)
    for r, tokens in enumerate(tokens_of(plan)):
        for token in tokens:
            j, place = divmod(int(places[r, token.column]), plan.queries)
            seen = mask[0 if len(mask) == 1 else r * plan.blocks + j, 0, place].tolist()
            start = (plan.first_blocks[r] + j) * B
            assert start == token.position // B * B
            past, anchors, fams, block = (
                seen[:P],
                seen[P : P + A],
                seen[P + A : P + A + kN],
                seen[P + A + kN :],
            )
            kept = [start - P + i for i, yes in enumerate(past) if yes]
            kept += [start + i for i, yes in enumerate(block) if yes]
            kept_for_ever = [config.anchor_positions[i] for i, yes in enumerate(anchors) if yes]
            expected, expected_for_ever = expected_tokens(config, token.position, sliding_window)
            assert kept == expected
            assert kept_for_ever == expected_for_ever
            assert fams == expected_fams(config, token.position)


def expected_tokens(
    config: FamConfig, t: int, sliding_window: int | None
) -> tuple[list[int], list[int]]:
    """The tokens that the query at `t` sees where they stand, and those that it sees as anchors."""
    where, for_ever = [], []
    start, past = t // config.block_size * config.block_size, past_of(config, t)
    for s in range(t + 1):
        if window_shows(config, t, s):
            if s < start - past:
                for_ever.append(s)  # only a global token is seen from so far
            elif sliding_window is None or s > t - sliding_window:
                where.append(s)
        elif s < config.sink_tokens:
            for_ever.append(s)
    return where, for_ever


def past_of(config: FamConfig, t: int) -> int:
    """How far before its block the keys at t's disposal reach."""
    if config.keeps_everything:
        return t
    if config.attention != "longformer":
        return kept_past(config)
    assert config.past_length is not None
    return config.past_length


def expected_fams(config: FamConfig, t: int) -> list[bool]:
    block, k = t // config.block_size, config.previous_fams
    return [block - k + i >= 0 for i in range(k) for _ in range(config.fam_length)]


@given(plans())
@settings(max_examples=100, deadline=None)
def test_all_that_is_visible_is_kept(plan: CallPlan) -> None:
    """No token that the pattern shows lies before the kept past, unless it is kept for ever."""
    config = plan.config
    for start, tokens in zip(plan.starts, tokens_of(plan), strict=True):
        kept_from = start // config.block_size * config.block_size - plan.past_length
        for token in tokens:
            for s in range(min(start, token.position + 1)):
                if window_shows(config, token.position, s):
                    assert s >= kept_from or s in config.anchor_positions
