"""The predicates against plain definitions: sets of positions, written from section 2."""

from __future__ import annotations

import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from transformerfam.config import FamConfig
from transformerfam.masks import (
    Predicate,
    _drawn_blocks,
    block_sliding_window,
    causal,
    fam_sees_token,
    sliding_window,
    token_sees_anchor,
    token_sees_fam,
    token_sees_token,
)

BLOCK = st.integers(1, 7)
SEGMENTS = st.integers(0, 3)
POSITION = st.integers(0, 60)
HORIZON = 80  # keys after the query are looked at too


def seen(predicate: Predicate, query: int) -> set[int]:
    return {key for key in range(HORIZON) if predicate(query, key)}


def bswa(B: int, M: int, sinks: int = 0) -> FamConfig:
    return FamConfig.paper(block_size=B, memory_segments=M, fam_length=0, sink_tokens=sinks)


def xl(B: int, M: int, window: int) -> FamConfig:
    return FamConfig.paper(
        block_size=B, memory_segments=M, fam_length=0, attention="xl", window=window
    )


@given(t=POSITION)
def test_full_attention_sees_itself_and_all_before(t: int) -> None:
    assert seen(causal, t) == set(range(t + 1))
    assert seen(token_sees_token(FamConfig.paper(attention="full")), t) == set(range(t + 1))


@given(t=POSITION, w=st.integers(1, 20))
def test_swa_sees_the_last_w(t: int, w: int) -> None:
    last = set(list(range(t + 1))[-w:])
    assert seen(sliding_window(w), t) == last
    config = FamConfig.paper(block_size=4, fam_length=0, attention="swa", window=w)
    assert seen(token_sees_token(config), t) == last


@given(t=POSITION, B=BLOCK, M=SEGMENTS)
def test_bswa_sees_its_block_and_whole_blocks_before(t: int, B: int, M: int) -> None:
    blocks = [list(range(start, start + B)) for start in range(0, t + B, B)][: t // B + 1]
    expected = {key for block in blocks[-(M + 1) :] for key in block if key <= t}
    assert seen(block_sliding_window(B, M), t) == expected
    assert seen(token_sees_token(bswa(B, M)), t) == expected


@given(B=BLOCK, M=SEGMENTS, place=st.integers(0, 6), more=st.integers(0, 3))
def test_bswa_window_grows_within_a_block(B: int, M: int, place: int, more: int) -> None:
    """Section 2.1: from M·B + 1 at the first token of a block to (M + 1)·B at its last."""
    assume(place < B)
    query = (M + more) * B + place
    size = len(seen(block_sliding_window(B, M), query))
    assert size == M * B + 1 + place
    assert M * B + 1 <= size <= (M + 1) * B


@given(t=POSITION, B=BLOCK, M=SEGMENTS, data=st.data())
def test_xl_is_both_windows(t: int, B: int, M: int, data: st.DataObject) -> None:
    w = data.draw(st.integers(1, (M + 1) * B))
    inner = seen(token_sees_token(xl(B, M, w)), t)
    outer = seen(token_sees_token(bswa(B, M)), t)
    assert inner <= outer
    assert inner == {key for key in outer if key > t - w}
    assert len(inner) == min(w, len(outer))


@given(t=POSITION, B=BLOCK, M=SEGMENTS)
def test_xl_with_the_longest_window_is_bswa(t: int, B: int, M: int) -> None:
    assert seen(token_sees_token(xl(B, M, (M + 1) * B)), t) == seen(token_sees_token(bswa(B, M)), t)


@given(t=POSITION, w=st.integers(1, 8), globals_=st.sets(POSITION, min_size=1, max_size=3))
def test_longformer_adds_globals_both_ways(t: int, w: int, globals_: set[int]) -> None:
    config = FamConfig.paper(
        block_size=4,
        fam_length=0,
        attention="longformer",
        window=w,
        global_positions=tuple(globals_),
    )
    past = set(range(t + 1))
    local = past if t in globals_ else {key for key in past if key > t - w}
    assert seen(token_sees_token(config), t) == local | (globals_ & past)


def bigbird(B: int, M: int, r: int) -> FamConfig:
    return FamConfig.paper(
        block_size=B, memory_segments=M, fam_length=0, attention="bigbird", random_blocks=r
    )


@given(t=POSITION, B=BLOCK, M=SEGMENTS, r=st.integers(1, 4))
def test_bigbird_adds_the_first_block_and_r_whole_ones(t: int, B: int, M: int, r: int) -> None:
    found = seen(token_sees_token(bigbird(B, M, r)), t)
    window = seen(token_sees_token(bswa(B, M)), t)
    assert window <= found <= set(range(t + 1))
    assert set(range(min(B, t + 1))) <= found
    drawn = {key // B for key in found - window - set(range(B))}
    assert len(drawn) == max(0, min(r, t // B - M - 1))
    assert found == window | {key for key in range(t + 1) if key // B in drawn | {0}}


def test_bigbird_draws_evenly_and_alike_for_the_queries_of_a_block() -> None:
    sees = token_sees_token(bigbird(2, 1, 3))
    for block in range(14, 114):
        of_first, of_last = (
            {b for b in range(block - 1) if sees(2 * block + i, 2 * b)} for i in (0, 1)
        )
        assert of_first == of_last
    drawn = [0] * 12
    for block in range(14, 3014):
        for b in _drawn_blocks(block, 12, 3):
            drawn[b - 1] += 1
    assert sum(drawn) == 9000
    assert max(drawn) < 9000 / 12 * 1.15 and min(drawn) > 9000 / 12 * 0.85


@given(t=POSITION, B=BLOCK, M=SEGMENTS, data=st.data())
def test_sparse_adds_the_ends_of_all_blocks(t: int, B: int, M: int, data: st.DataObject) -> None:
    c = data.draw(st.integers(1, B))
    config = FamConfig.paper(
        block_size=B, memory_segments=M, fam_length=0, attention="sparse", summary_tokens=c
    )
    ends = {end - i for end in range(B - 1, t + B, B) for i in range(c)}
    expected = seen(token_sees_token(bswa(B, M)), t) | (ends & set(range(t + 1)))
    assert seen(token_sees_token(config), t) == expected


@given(t=POSITION, B=BLOCK, M=SEGMENTS, sinks=st.integers(1, 4))
def test_sinks_complement_the_window(t: int, B: int, M: int, sinks: int) -> None:
    """Every sink up to the query is seen exactly once: by the window or as a sink."""
    assume(sinks <= B)
    config = bswa(B, M, sinks)
    in_window = seen(token_sees_token(config), t)
    as_sink = {key for key in range(sinks) if token_sees_anchor(config)(t, key)}
    assert not in_window & as_sink
    assert (in_window | as_sink) >= {key for key in range(sinks) if key <= t}
    assert all(key <= t for key in as_sink)
    if t // B <= M:
        assert not as_sink  # nothing has left the window yet


@given(t=POSITION, w=st.integers(1, 8), globals_=st.sets(POSITION, min_size=1, max_size=3))
def test_globals_stand_in_for_what_is_not_kept(t: int, w: int, globals_: set[int]) -> None:
    config = FamConfig.paper(
        block_size=4,
        fam_length=0,
        attention="longformer",
        window=w,
        global_positions=tuple(globals_),
    )
    past = config.past_length
    assert past is not None
    kept = set(range(max(0, t // 4 * 4 - past), t + 1))
    from_anchors = {key for key in globals_ if token_sees_anchor(config)(t, key)}
    assert not kept & from_anchors
    assert (seen(token_sees_token(config), t) & kept) | from_anchors == seen(
        token_sees_token(config), t
    )


@given(t=POSITION, B=BLOCK, k=st.integers(1, 4))
def test_tokens_see_the_last_k_fams(t: int, B: int, k: int) -> None:
    config = FamConfig.paper(block_size=B, fam_length=1, previous_fams=k)
    fams = {block for block in range(-3, 70) if token_sees_fam(config)(t, block)}
    assert fams == set(list(range(t // B))[-k:])


@given(B=BLOCK, k=st.integers(1, 4))
def test_no_token_of_block_0_sees_a_fam(B: int, k: int) -> None:
    config = FamConfig.paper(block_size=B, fam_length=1, previous_fams=k)
    assert not any(token_sees_fam(config)(t, block) for t in range(B) for block in range(-5, 9))


@given(block=st.integers(0, 8), B=BLOCK)
def test_fam_queries_see_their_whole_block_and_no_other(block: int, B: int) -> None:
    config = FamConfig.paper(block_size=B, fam_length=1)
    assert seen(fam_sees_token(config), block) == set(range(block * B, (block + 1) * B))


@given(t=POSITION, B=BLOCK, k=st.integers(1, 3))
def test_nothing_flows_back_in_time(t: int, B: int, k: int) -> None:
    """What a token sees through FAM lies in finished blocks: every layer stays causal."""
    config = FamConfig.paper(block_size=B, fam_length=1, previous_fams=k)
    for block in range(10):
        if token_sees_fam(config)(t, block):
            assert max(seen(fam_sees_token(config), block)) < t // B * B


@given(B=BLOCK, M=SEGMENTS, data=st.data())
def test_tensors_give_what_numbers_give(B: int, M: int, data: st.DataObject) -> None:
    """Dense masks and FlexAttention call the predicates with tensors."""
    sinks = data.draw(st.integers(0, min(2, B)))
    positions = torch.arange(4 * B)
    config = bswa(B, M, sinks)
    fam = FamConfig.paper(block_size=B, memory_segments=M, fam_length=1, previous_fams=2)
    longformer = FamConfig.paper(
        block_size=B, fam_length=0, attention="longformer", window=2, global_positions=(0, B)
    )
    predicates = [
        causal,
        token_sees_token(config),
        token_sees_anchor(config),
        token_sees_token(xl(B, M, (M + 1) * B)),
        token_sees_token(longformer),
        token_sees_token(bigbird(B, 0, 1)),
        token_sees_anchor(longformer),
        token_sees_fam(fam),
        fam_sees_token(fam),
    ]
    for predicate in predicates:
        dense = predicate(positions[:, None], positions[None, :])
        assert dense.dtype == torch.bool
        assert dense.tolist() == [
            [bool(predicate(q, k)) for k in range(4 * B)] for q in range(4 * B)
        ]
