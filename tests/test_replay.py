"""A memory that is led over recorded blocks is the one that reading them leaves."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from families import FAMILIES, converted, some_tokens, tiny
from oracle import make_exact
from test_adapted import with_adapter
from variants import VARIANTS

from transformerfam import FamConfig, Memory, convert
from transformerfam.call import ReadBefore
from transformerfam.layer_memory import KeyValue
from transformerfam.replay import Recording, record, replay
from transformerfam.training.steps import FamAfterBlocks

B = 6
CONFIG = FamConfig(
    block_size=B, memory_segments=1, fam_length=3, sink_tokens=2, adapted="fam", fam_seen="asked"
)
IDS = some_tokens(2, 5 * B)
T = 4 * B + 3  # that are replayed at most
QUESTION = some_tokens(2, 5, seed=1)


def given(recordings: list[Recording], columns: int) -> ReadBefore:
    """Blocks as they were read one behind the other, the last maybe no further than wanted."""

    def block(layer: int, j: int) -> KeyValue:
        return recordings[j].tokens[layer].cut(0, columns - j * B)

    last = recordings[(columns - 1) // B]
    return ReadBefore(columns, block, last.anchors.__getitem__)


def read(model: Any, ids: Any, memory: Memory) -> Memory:
    model(input_ids=ids, past_key_values=memory)
    return memory


def assert_same(ours: Memory, theirs: Memory, atol: float = 1e-9) -> None:
    assert ours.position == theirs.position
    named = dict(theirs.tensors())
    for name, tensor in ours.tensors():
        torch.testing.assert_close(tensor, named[name], rtol=0, atol=atol)


def seen_when_asked(config: FamConfig) -> FamConfig | None:
    """The same geometry with FAM for the asked alone; None where nothing can be recorded.

    Not FlexAttention, which warns on CPUs and computes what the others do.
    """
    if not config.has_feedback or config.past_length is None or config.backend == "flex":
        return None
    return config.replace(fam_seen="asked")


REPLAYED = {
    name: asked for name, c in VARIANTS.items() if (asked := seen_when_asked(c)) is not None
}


@pytest.mark.parametrize("columns", [4, B, 3 * B, T])
@pytest.mark.parametrize("name", REPLAYED)
@torch.no_grad()
def test_replayed_is_read(name: str, columns: int) -> None:
    model = convert(make_exact(tiny()), REPLAYED[name]).eval()
    whole, streamed, led = (Memory.for_model(model, 2) for _ in range(3))
    read(model, IDS[:, :columns], whole)
    recordings = record(model, IDS, streamed)
    with torch.no_grad():
        replay(model, given(recordings, columns), led)
    assert_same(led, whole)
    answers = []
    for memory in (whole, led):
        with memory.asked(), torch.no_grad():
            answers.append(model(input_ids=QUESTION, past_key_values=memory).logits)
    torch.testing.assert_close(answers[1], answers[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_is_read_in_every_family(family: str) -> None:
    config = CONFIG.replace(previous_fams=2, memory_segments=2)
    model = converted(config, family, torch.float32).eval()
    whole, led = Memory.for_model(model, 2), Memory.for_model(model, 2)
    recordings = record(model, IDS, Memory.for_model(model, 2))
    with torch.no_grad():
        read(model, IDS[:, :T], whole)
        replay(model, given(recordings, T), led)
    assert_same(led, whole, atol=5e-5)


def test_a_memory_goes_on_from_what_was_read_and_with_the_fam_of_another() -> None:
    model = with_adapter(CONFIG).base_model.model
    fams = [f for f in read(model, IDS, Memory.for_model(model, 2)).fams if f is not None]
    for begins in (False, True):
        whole, led = Memory.for_model(model, 2), Memory.for_model(model, 2)
        if begins:
            whole.begin_with(fams)
            led.begin_with(fams)
        read(model, IDS[:, :T], whole)
        recordings = record(model, IDS, Memory.for_model(model, 2))
        with torch.no_grad():
            replay(model, given(recordings[:2], 2 * B), led)
            replay(model, given(recordings[2:], T - 2 * B), led)
        assert_same(led, whole)


@pytest.mark.parametrize("segments", [0, 2])
def test_fam_gets_the_gradient_of_a_text_that_is_read(segments: int) -> None:
    model = with_adapter(CONFIG.replace(memory_segments=segments)).train()
    base = model.base_model.model
    found = []
    recordings = record(base, IDS, Memory.for_model(base, 2))
    for replayed in (False, True):
        memory = Memory.for_model(base, 2)
        if replayed:
            replay(base, given(recordings, T), memory)
        else:
            read(base, IDS[:, :T], memory)
        with memory.asked():
            base(input_ids=QUESTION, past_key_values=memory).logits.logsumexp(-1).sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert found[0].keys() == found[1].keys() and any("lora_" in name for name in found[0])
    for name, gradient in found[0].items():
        assert gradient is not None
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=1e-9)


def test_blocks_of_several_texts_are_one_text_where_blocks_do_not_see_each_other() -> None:
    """Without past blocks and sinks a block leaves the same wherever it stands."""
    config = CONFIG.replace(memory_segments=0, sink_tokens=0)
    model = convert(make_exact(tiny()), config).eval()
    one, two = (record(model, ids[:, : 2 * B], Memory.for_model(model)) for ids in IDS[:, None])
    led = Memory.for_model(model)
    with torch.no_grad():
        replay(model, given([two[1], one[0], two[0]], 3 * B), led)
    text = torch.cat([IDS[1:, B : 2 * B], IDS[:1, :B], IDS[1:, :B]], dim=1)
    assert_same(led, read(model, text, Memory.for_model(model)))


@pytest.mark.parametrize("begins", [(), (True, True), (True, False)])
def test_fam_alone_is_what_a_whole_memory_has(begins: tuple[bool, ...]) -> None:
    """Of a new stream, of one that has read, and of one that begins with the FAM of another."""
    model = convert(make_exact(tiny()), CONFIG).eval()
    recordings, read_before = (
        record(model, IDS, Memory.for_model(model, 2)),
        read(model, IDS[:, : 2 * B], Memory.for_model(model, 2)),
    )
    memory = read_before.restart(begins) if begins else Memory.for_model(model, 2)
    whole, written = memory.fork(), FamAfterBlocks()
    alone = replace(given(recordings[2:], 2 * B), keep=False)
    with torch.no_grad():
        replay(model, given(recordings[2:], 2 * B), whole)
        replay(model, alone, memory, fam_observer=written)
    assert memory.position == (read_before.restart(begins).position if begins else (0, 0))
    for fam, wanted in zip(written.after(1), whole.fams, strict=True):
        assert wanted is not None
        torch.testing.assert_close(fam, wanted, rtol=0, atol=1e-9)


def test_streams_at_different_places_are_led_over_the_same_blocks() -> None:
    """The second begins with the FAM of another, and is a block further on; what is read is one text."""
    model = convert(make_exact(tiny()), CONFIG.replace(previous_fams=2)).eval()
    later = read(model, IDS[:1, :B], Memory.for_model(model))
    recordings = record(model, IDS[1:], Memory.for_model(model))

    def led(rows: list[Memory]) -> list[Memory]:
        for memory in rows:
            with torch.no_grad():
                replay(model, given(recordings, T), memory)
        return rows

    apart = led([Memory.for_model(model), later.fork()])
    (both,) = led([later.select_rows([0, 0]).restart([True, False])])
    for row, memory in enumerate(apart):
        assert_same(both.select_rows([row]), memory)


@pytest.mark.parametrize("family", ["Gemma 2", "Llama", "gpt-oss"])
def test_what_all_streams_read_need_not_be_there_for_each(family: str) -> None:
    """With scores that are capped (Gemma 2) and sinks that no key owns (gpt-oss) too."""
    model = converted(CONFIG, family, torch.float32).eval()
    apart, shared = Memory.for_model(model, 2), Memory.for_model(model, 2)
    own = record(model, IDS[:, :B], Memory.for_model(model, 2))[0]
    prose = record(model, IDS[:1], Memory.for_model(model))

    def block(rows: int, layer: int, j: int) -> KeyValue:
        read = prose[j].tokens[layer].cut(0, 3 if j == 4 else None)
        return own.tokens[layer] if j == 1 else read.map(lambda x: x.expand(rows, -1, -1, -1))

    columns = 4 * B + 3
    for memory, rows in ((apart, 2), (shared, 1)):
        with torch.no_grad():
            replay(
                model, ReadBefore(columns, partial(block, rows), own.anchors.__getitem__), memory
            )
    assert_same(shared, apart, atol=5e-5)


def test_what_cannot_be_led_over_blocks_says_why() -> None:
    everything = ReadBefore(
        B, lambda layer, j: KeyValue(IDS, IDS), lambda layer: KeyValue(IDS, IDS)
    )
    always = convert(tiny(), CONFIG.replace(fam_seen="always"))
    with pytest.raises(ValueError, match="do not see FAM"):
        replay(always, everything, Memory.for_model(always))
    model = convert(tiny(), CONFIG)
    memory = Memory.for_model(model, 2)
    with memory.asked(), pytest.raises(ValueError, match="do not see FAM"):
        replay(model, everything, memory)
    inside = read(model, IDS[:, :4], Memory.for_model(model, 2))
    with pytest.raises(ValueError, match="start of a block"):
        replay(model, everything, inside)
    with pytest.raises(ValueError, match="start of a block"):
        record(model, IDS, inside)
    with pytest.raises(ValueError, match="Only whole blocks of 6 tokens"):
        record(model, IDS[:, :T], Memory.for_model(model, 2))
    full = convert(tiny(), CONFIG.replace(attention="full"))
    with pytest.raises(ValueError, match="windows that end"):
        replay(full, everything, Memory.for_model(full))
