from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transformerfam.config import FamConfig
from transformerfam.masks import token_sees_token

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no block": ({"block_size": 0}, "block_size must be a whole number of at least 1, not 0"),
    "half a block": ({"block_size": 1.5}, "block_size must be a whole number"),
    "True for a number": ({"memory_segments": True}, "memory_segments must be a whole number"),
    "text for a number": ({"block_size": "1024"}, "block_size must be a whole number"),
    "negative segments": ({"memory_segments": -1}, "memory_segments .* at least 0, not -1"),
    "negative slots": ({"fam_length": -1}, "fam_length .* at least 0"),
    "no previous FAM": ({"previous_fams": 0}, "previous_fams .* at least 1"),
    "negative sinks": ({"sink_tokens": -1}, "sink_tokens .* at least 0"),
    "negative global": (
        {"attention": "longformer", "global_positions": (-1,)},
        "global_positions must be positions",
    ),
    "half a global": (
        {"attention": "longformer", "global_positions": (0.5,)},
        "global_positions must be positions",
    ),
    "unknown pattern": (
        {"attention": "local"},
        "attention must be one of full, swa, bswa, xl, .*'l",
    ),
    "unknown FAM position": ({"fam_position": "first"}, "fam_position must be one of last, float"),
    "unknown query position": ({"fam_query_position": "x"}, "fam_query_position must be one of"),
    "unknown residual": ({"first_residual": "none"}, "first_residual must be one of zero, prompt"),
    "unknown backend": ({"backend": "cuda"}, "backend must be one of sdpa, eager, flex"),
    "window of bswa": ({"window": 5}, "attention='bswa' has no window to set"),
    "window of full": ({"attention": "full", "window": 5}, "attention='full' has no window to set"),
    "empty window": ({"attention": "swa", "window": 0}, "needs a window of at least 1 token"),
    "no window left": (
        {"attention": "swa", "memory_segments": 0},
        "set window, or memory_segments",
    ),
    "xl beyond what is kept": (
        {"attention": "xl", "block_size": 4, "memory_segments": 2, "fam_length": 0, "window": 13},
        "xl window of 13 tokens is longer than 2 memory segments and the present block, 12 tokens",
    ),
    "longformer without globals": ({"attention": "longformer"}, "needs at least one"),
    "globals without longformer": ({"global_positions": (0,)}, "belong to attention='longformer'"),
    "sinks beyond block 0": (
        {"block_size": 2, "fam_length": 0, "sink_tokens": 3},
        "sink_tokens=3 must fit into a block; with block_size=2 set it to 2 or fewer",
    ),
    "unknown norm": ({"feedback_norm": "layer"}, "feedback_norm must be 'none', 'rms', or"),
    "norm of zero": ({"feedback_norm": 0.0}, "feedback_norm as a number .* above 0"),
    "norm that is no number": ({"feedback_norm": float("nan")}, "feedback_norm as a number"),
    "a norm of zero among others": (
        {"fam_length": 2, "feedback_norm": (1.0, 0.0)},
        "feedback_norm as a number .* above 0",
    ),
    "no norm in the list": ({"feedback_norm": ()}, "feedback_norm as a number"),
    "a norm for every other slot": (
        {"fam_length": 4, "feedback_norm": (1.0, 2.0)},
        "feedback_norm has 2 numbers for 4 feedback slots",
    ),
    "norm without feedback": ({"fam_length": 0, "feedback_norm": "rms"}, "need a feedback memory"),
    "FAMs without feedback": ({"fam_length": 0, "previous_fams": 2}, "need a feedback memory"),
    "rms of what": ({"feedback_rms": 2.0}, "is what feedback_norm='rms' rescales to"),
    "rms of nothing": (
        {"feedback_norm": "rms", "feedback_rms": 0.0},
        "feedback_rms must be a number above 0",
    ),
    "unknown source": ({"memory_source": "both"}, "memory_source must be one of input, output"),
    "unknown rule": (
        {"compressive_memory": "sum"},
        "compressive_memory must be one of none, linear, delta",
    ),
    "outputs beside FAM": (
        {"memory_source": "output"},
        "memory_source='output' stands in the place of FAM; set fam_length to 0",
    ),
    "a sum beside FAM": (
        {"compressive_memory": "delta"},
        "compressive_memory stands in the place of FAM; set fam_length to 0",
    ),
    "outputs in another pattern": (
        {"memory_source": "output", "fam_length": 0, "attention": "swa"},
        "memory_source='output' works on whole blocks: it needs attention='bswa'",
    ),
    "a sum in another pattern": (
        {"compressive_memory": "linear", "fam_length": 0, "attention": "full"},
        "compressive_memory works on whole blocks: it needs attention='bswa'",
    ),
    "outputs that nobody sees": (
        {"memory_source": "output", "fam_length": 0, "memory_segments": 0},
        "needs past blocks to see; set memory_segments to 1 or more",
    ),
    "two memories": (
        {"memory_source": "output", "compressive_memory": "linear", "fam_length": 0},
        "two memories of past blocks; choose one",
    ),
    "through the stack with windows": (
        {"recurrence": "rmt"},
        "set memory_segments=0 and attention='bswa'",
    ),
    "through the stack without memory tokens": (
        {"recurrence": "rmt", "memory_segments": 0, "fam_length": 0},
        "needs memory tokens",
    ),
    "through the stack with a norm": (
        {"recurrence": "autocompressor", "memory_segments": 0, "feedback_norm": "rms"},
        "previous_fams and feedback_norm do nothing",
    ),
    "through the stack from a prefix": (
        {"recurrence": "rmt", "memory_segments": 0, "fam_start": "prefix"},
        "fam_start and fam_query do nothing",
    ),
    "through the stack from another place": (
        {"recurrence": "rmt", "memory_segments": 0, "fam_position": "zero"},
        "leave fam_position and fam_query_position out",
    ),
    "an unknown recurrence": ({"recurrence": "lstm"}, "recurrence must be one of layer, rmt"),
    "drawn blocks elsewhere": ({"random_blocks": 1}, "random_blocks belong to .*bigbird"),
    "bigbird without draws": ({"attention": "bigbird"}, "needs at least one; its paper has three"),
    "summaries elsewhere": ({"summary_tokens": 1}, "summary_tokens belong to .*sparse"),
    "sparse without summaries": ({"attention": "sparse"}, "which needs at least one"),
    "more summaries than tokens": (
        {"attention": "sparse", "block_size": 4, "fam_length": 0, "summary_tokens": 5},
        "summary_tokens=5 must fit into a block",
    ),
    "half a token of window": (
        {"attention": "swa", "window": 9.5},
        "window must be a whole number or None, not 9.5",
    ),
    "a window in words": ({"attention": "swa", "window": "3"}, "window must be a whole number"),
    "gradients in words": (
        {"stop_gradient": "no"},
        "stop_gradient must be True or False, not 'no'",
    ),
    "no norm at all": ({"feedback_norm": None}, "feedback_norm must be 'none', 'rms', a number"),
    "norms in words": ({"fam_length": 1, "feedback_norm": ["1"]}, "feedback_norm must be 'none'"),
    "one position": (
        {"attention": "longformer", "global_positions": 5},
        "global_positions must be",
    ),
    "a yes for a bias": ({"fam_bias": True}, "fam_bias must be a finite number, not True"),
    "more slots than positions": (
        {"block_size": 4, "fam_length": 5},
        "fam_length can be at most block_size",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_with_the_reason(name: str) -> None:
    values, reason = REFUSED[name]
    with pytest.raises(ValueError, match=reason) as caught:
        FamConfig.paper(**values)
    assert str(caught.value).count("\n") == 0


def test_the_papers_setting_is_one_switch_away() -> None:
    config = FamConfig.paper()
    assert (config.block_size, config.memory_segments, config.fam_length) == (1024, 3, 64)
    assert (config.fam_position, config.first_residual) == ("last", "zero")
    assert (config.feedback_norm, config.previous_fams, config.sink_tokens) == ("none", 1, 0)
    assert config.attention == "bswa"
    assert FamConfig.paper(memory_segments=0).memory_segments == 0
    assert FamConfig.paper(sink_tokens=2).sink_tokens == 2
    assert FamConfig() == config.replace(first_residual="prompt", sink_tokens=4)


@st.composite
def configs(draw: st.DrawFn) -> FamConfig:
    """Any geometry that is allowed, small enough to enumerate."""
    B = draw(st.integers(1, 6))
    M = draw(st.integers(0, 3))
    N = draw(st.integers(0, B))
    pattern = draw(st.sampled_from(["full", "swa", "bswa", "xl", "longformer"]))
    values: dict[str, Any] = {"block_size": B, "memory_segments": M, "fam_length": N}
    if pattern in ("swa", "xl", "longformer"):
        values["window"] = draw(st.integers(1, (M + 1) * B))
    if pattern == "longformer":
        values["global_positions"] = draw(st.sets(st.integers(0, 3 * B), min_size=1, max_size=3))
    elif pattern != "full":
        values["sink_tokens"] = draw(st.integers(0, B))
    if N:
        values["previous_fams"] = draw(st.integers(1, 3))
        values["feedback_norm"] = draw(
            st.sampled_from(["none", "rms", 2.0, [float(n + 1) for n in range(N)]])
        )
    return FamConfig.paper(attention=pattern, **values)


@given(config=configs())
def test_comes_back_from_json(config: FamConfig) -> None:
    back = FamConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert back == config
    assert hash(back) == hash(config)
    assert config.memory_differences(back) == []


def test_refuses_what_it_does_not_know() -> None:
    values = FamConfig.paper().to_dict() | {"slots_per_head": 2, "another": 1}
    with pytest.raises(ValueError, match=r"has another, slots_per_head, which this version"):
        FamConfig.from_dict(values)


def test_is_a_value() -> None:
    config = FamConfig.paper()
    with pytest.raises(FrozenInstanceError):
        config.block_size = 2  # type: ignore[misc]
    assert config.replace(block_size=128) != config
    assert config.replace(block_size=128).block_size == 128
    with pytest.raises(ValueError, match="at most block_size"):
        config.replace(block_size=8)
    longformer = FamConfig.paper(attention="longformer", global_positions=(3, 0, 3))
    assert longformer.global_positions == (0, 3)


@given(config=configs())
def test_without_feedback_keeps_the_windows(config: FamConfig) -> None:
    plain = config.without_feedback()
    assert not plain.has_feedback
    assert config.has_feedback == (config.fam_length > 0)
    assert (plain.past_length, plain.window_length) == (config.past_length, config.window_length)
    assert plain.anchor_positions == config.anchor_positions


@given(config=configs(), block=st.integers(0, 6), place=st.integers(0, 5))
def test_what_is_kept_is_what_can_be_seen(config: FamConfig, block: int, place: int) -> None:
    """Past, own block and anchors hold every token that a token may look at."""
    B, P = config.block_size, config.past_length
    query = block * B + place % B
    sees = token_sees_token(config)
    seen = {key for key in range(query + 1) if sees(query, key)}
    kept = set(range(0 if P is None else max(0, block * B - P), query + 1))
    assert seen <= kept | set(config.anchor_positions)
    assert P is None or P % B == 0
    assert (config.slots is None) == (P is None)
    if P is not None:
        fams = config.previous_fams * config.fam_length
        assert config.slots == P + len(config.anchor_positions) + fams + B


def test_geometry_of_the_paper() -> None:
    """Section 2.1: windows of 3073 to 4096; section 3.2: 36k for depth 18 and 2k windows."""
    config = FamConfig.paper()
    assert config.past_length == 3072
    assert config.slots == 3072 + 64 + 1024
    assert config.window_length is None
    assert FamConfig.paper(memory_segments=2).receptive_field(18) == 36 * 1024 + 1024
    assert FamConfig.paper(memory_segments=0).receptive_field(18) == 1024
    assert FamConfig.paper(attention="full").receptive_field(18) is None
    assert FamConfig.paper(attention="swa", window=100).receptive_field(3) == 298


def test_window_by_default() -> None:
    assert FamConfig.paper(attention="xl").window_length == 3072
    assert FamConfig.paper(attention="xl", window=4096).window_length == 4096
    assert FamConfig.paper(attention="swa", window=7).past_length == 1024
    assert FamConfig.paper(attention="swa", window=1).past_length == 0
    assert FamConfig.paper(attention="swa", window=1025).past_length == 1024
    assert FamConfig.paper(attention="swa", window=1026).past_length == 2048


def test_patterns_that_keep_all_or_some_for_ever_have_no_sinks() -> None:
    assert FamConfig(attention="full").sink_tokens == 0
    assert FamConfig(attention="longformer", global_positions=(0,)).sink_tokens == 0
    assert FamConfig().replace(attention="full").anchor_positions == ()
    for config in (
        FamConfig(attention="bigbird", random_blocks=3),
        FamConfig(attention="sparse", summary_tokens=8),
    ):
        assert (config.keeps_everything, config.sink_tokens, config.slots) == (True, 0, None)
        assert config.receptive_field(2) is None
        assert config.changed(attention="bswa") == FamConfig(sink_tokens=0)


def test_anchors_are_sinks_or_globals() -> None:
    assert FamConfig.paper().anchor_positions == ()
    assert FamConfig.paper(sink_tokens=3).anchor_positions == (0, 1, 2)
    longformer = FamConfig.paper(attention="longformer", global_positions=(5, 2000), window=10)
    assert longformer.anchor_positions == (5, 2000)
    assert longformer.past_length == 1024  # the second global sees all of the first block


def test_what_a_variant_keeps_and_adds_goes_with_it() -> None:
    plain = FamConfig.paper(fam_length=0)
    found = {
        ("output", "none"): (("output_keys", "output_values"), ()),
        ("input", "delta"): (("compressed", "pending"), ("memory_gates",)),
        ("input", "none"): ((), ()),
    }
    for (source, rule), (kept, added) in found.items():
        config = plain.replace(memory_source=source, compressive_memory=rule)
        assert (config.extra_state, config.added_modules) == (kept, added)
        assert config.without_feedback() == plain
    assert FamConfig.paper().added_modules == ("fam_prompt",)


def test_memory_through_the_stack_has_no_sinks_and_grows_in_an_autocompressor() -> None:
    rmt = FamConfig(block_size=8, memory_segments=0, fam_length=9, recurrence="rmt")
    assert (rmt.sink_tokens, rmt.slots) == (0, 8 + 9)
    assert rmt.replace(recurrence="autocompressor").slots is None
    assert rmt.without_feedback().recurrence == "layer"


def test_a_memory_fits_where_only_speed_or_gradients_differ() -> None:
    config = FamConfig.paper()
    assert config.memory_differences(config.replace(backend="eager", stop_gradient=True)) == []
    other = config.replace(fam_position="zero", sink_tokens=4, backend="flex")
    assert config.memory_differences(other) == ["fam_position", "sink_tokens"]
    known = {f.name for f in fields(FamConfig)}
    assert {"backend", "stop_gradient"} <= known
