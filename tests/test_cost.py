"""Cost formulas against the masks, counted pair by pair."""

from __future__ import annotations

import numpy as np
import pytest

from transformerfam import masks
from transformerfam.config import FamConfig
from transformerfam.cost import ModelShape, flops, keys_per_query

CONFIGS = [
    FamConfig.paper(block_size=4, memory_segments=2, fam_length=2),
    FamConfig.paper(block_size=4, memory_segments=2, fam_length=2, previous_fams=3, sink_tokens=3),
    FamConfig.paper(block_size=4, memory_segments=0, fam_length=0, sink_tokens=4),
    FamConfig.paper(block_size=4, fam_length=0, attention="swa", window=6, sink_tokens=2),
    FamConfig.paper(block_size=4, memory_segments=2, fam_length=3, attention="xl"),
    FamConfig.paper(block_size=4, fam_length=0, attention="full"),
    FamConfig.paper(
        block_size=4, memory_segments=1, fam_length=2, attention="bigbird", random_blocks=2
    ),
    FamConfig.paper(
        block_size=4, memory_segments=1, fam_length=0, attention="sparse", summary_tokens=3
    ),
    FamConfig.paper(
        block_size=4, fam_length=1, attention="longformer", window=5, global_positions=(0, 9)
    ),
]


def counted(config: FamConfig, t: int) -> int:
    """Keys that the token at t sees, one by one."""
    sees, sees_sink = masks.token_sees_token(config), masks.token_sees_anchor(config)
    sees_fam = masks.token_sees_fam(config)
    tokens = sum(bool(sees(np.int64(t), np.int64(s))) for s in range(t + 1))
    sinks = sum(bool(sees_sink(np.int64(t), np.int64(s))) for s in range(config.sink_tokens))
    fams = sum(bool(sees_fam(np.int64(t), np.int64(f))) for f in range(t // config.block_size + 1))
    return tokens + sinks + fams * config.fam_length


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.attention)
def test_keys_per_query_are_those_of_the_masks(config: FamConfig) -> None:
    length = 40
    keys = keys_per_query(config, np.arange(length))
    assert keys.tolist() == [counted(config, t) for t in range(length)]


def test_a_token_that_is_read_costs_no_look_at_a_fam_that_only_the_asked_see() -> None:
    asked = FamConfig(block_size=4, memory_segments=1, fam_length=2, fam_seen="asked")
    positions = np.arange(40)
    expected = keys_per_query(asked.without_feedback(), positions)
    assert keys_per_query(asked, positions).tolist() == expected.tolist()


def test_feedback_costs_the_factor_of_the_paper() -> None:
    # Wide layers and no head: attention does not count, and 1 + N/B is left (1.0625).
    shape = ModelShape(
        layers=2,
        layer_weights=10**12,
        head_weights=0,
        attention_width=1,
        key_value_width=1,
        hidden_size=1,
        head_size=1,
    )
    config = FamConfig.paper()
    with_fam = flops(config, shape, 8 * 1024)
    without = flops(config.without_feedback(), shape, 8 * 1024)
    assert with_fam / without == pytest.approx(1 + 64 / 1024, rel=1e-6)


def test_attention_is_counted_by_pairs_and_full_attention_grows_with_the_square() -> None:
    shape = ModelShape(
        layers=3,
        layer_weights=0,
        head_weights=0,
        attention_width=8,
        key_value_width=4,
        hidden_size=8,
        head_size=1,
    )
    full = FamConfig.paper(block_size=4, fam_length=0, attention="full")
    assert flops(full, shape, 10) == 4 * 8 * 3 * (10 * 11 // 2)
    fam = FamConfig.paper(block_size=4, memory_segments=0, fam_length=2)
    tokens = 3 * (1 + 2 + 3 + 4) + 2 * 4 * 2  # 3 blocks; those after the first see 2 FAM keys each
    updates = 3 * 2 * (2 + 4)
    assert flops(fam, shape, 12) == 4 * 8 * 3 * (tokens + updates)


@pytest.mark.parametrize("kind", ["rmt", "autocompressor"])
def test_memory_through_the_stack_is_counted_by_the_masks_of_its_blocks(kind: str) -> None:
    B, N, length = 4, 3, 14
    config = FamConfig.paper(block_size=B, memory_segments=0, fam_length=N, recurrence=kind)
    rows = pairs = 0
    for block, first in enumerate(range(0, length, B)):
        S, tokens = (N if kind == "rmt" else block * N), min(B, length - first)
        places = S + tokens + (N if tokens == B else 0)
        sees = masks.segment(config, S)
        pairs += sum(bool(sees(q, k)) for q in range(places) for k in range(places))
        rows += places
    shape = ModelShape(3, 100, 10, 8, key_value_width=8, hidden_size=8, head_size=4)
    expected = 2 * 100 * rows + 2 * 10 * length + 4 * 8 * 3 * pairs
    assert flops(config, shape, length) == expected


def test_head_and_layers_are_two_operations_a_weight_and_token() -> None:
    shape = ModelShape(
        layers=3,
        layer_weights=100,
        head_weights=10,
        attention_width=0,
        key_value_width=0,
        hidden_size=0,
        head_size=1,
    )
    assert flops(FamConfig.paper(block_size=4, fam_length=0), shape, 7) == 2 * 110 * 7
    outputs = FamConfig.paper(block_size=4, fam_length=0, memory_source="output")
    assert flops(outputs, shape, 7) == 2 * (2 * 100 + 10) * 7
    # Only the one finished block costs an update; FAM rows never reach the head.
    assert flops(FamConfig.paper(block_size=4, fam_length=3), shape, 7) == 2 * 110 * 7 + 2 * 100 * 3
