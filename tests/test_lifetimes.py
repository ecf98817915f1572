"""What memories leave behind: nothing that grows, and no graph that is over."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import converted, some_tokens
from variants import VARIANTS

from transformerfam import FamConfig, Memory
from transformerfam.call import ReadBefore
from transformerfam.replay import record, replay

B = 6
CONFIG = FamConfig(block_size=B, memory_segments=1, fam_length=3, sink_tokens=2)
GROWING = ["full", "sparse"]
RECURRENT = {
    kind: FamConfig(block_size=B, memory_segments=0, fam_length=3, recurrence=kind)
    for kind in ("rmt", "autocompressor")
}


def read(model: Any, ids: Any, memory: Memory) -> Any:
    return model(input_ids=ids, past_key_values=memory).logits


@pytest.mark.parametrize("kind", GROWING)
@torch.no_grad()
def test_what_rows_that_began_anew_had_kept_is_let_go(kind: str) -> None:
    model = converted(VARIANTS[kind])
    size, ids = model.fam_config.block_size, some_tokens(1, 8)
    expected = read(model, ids, Memory.for_model(model, 1))
    memory, sizes = Memory.for_model(model, 1), set[int]()
    for _ in range(3):
        read(model, some_tokens(1, 4 * size + 1), memory)
        memory = memory.restart([True])
        sizes.add(memory.nbytes)
        torch.testing.assert_close(read(model, ids, memory.fork()), expected)
    assert len(sizes) == 1 and memory.past_length == 0


@pytest.mark.parametrize("kind", GROWING)
@torch.no_grad()
def test_rows_that_are_left_of_a_batch_keep_their_own_past_alone(kind: str) -> None:
    model = converted(VARIANTS[kind])
    size = model.fam_config.block_size
    memory, ids = Memory.for_model(model, 2), some_tokens(2, 5 * size)
    read(model, ids, memory)
    memory = memory.restart([False, True])
    assert memory.past_length == 5 * size
    read(model, ids[:, : size + 2], memory)
    short, more = memory.select_rows([1]), some_tokens(1, 3)
    assert short.past_length == size
    alone = Memory.for_model(model, 1)
    read(model, ids[1:, : size + 2], alone)
    torch.testing.assert_close(read(model, more, short), read(model, more, alone))


@pytest.mark.parametrize("kind", ["sinks", "static", "rmt", "bswa with sinks", "full"])
@pytest.mark.parametrize("tokens", [3, 4 * B])
def test_reading_without_gradients_leaves_no_graph(kind: str, tokens: int) -> None:
    model = converted({**VARIANTS, **RECURRENT}[kind])
    memory = Memory.for_model(model, 1)
    read(model, some_tokens(1, 2 * model.fam_config.block_size + 1), memory)
    assert any(tensor.requires_grad for _, tensor in memory.tensors())
    with torch.no_grad():
        read(model, some_tokens(1, tokens), memory)
    assert not [name for name, tensor in memory.tensors() if tensor.requires_grad]


@pytest.mark.parametrize("kind", RECURRENT)
@torch.no_grad()
def test_a_memory_that_was_begun_anew_can_be_loaded(kind: str, tmp_path: Path) -> None:
    model = converted(RECURRENT[kind])
    memory = Memory.for_model(model, 2)
    read(model, some_tokens(2, 2 * model.fam_config.block_size + 1), memory)
    again = memory.restart([True, True])
    again.save(tmp_path / "anew.fam", model)
    loaded = Memory.load(tmp_path / "anew.fam", model)
    ids = some_tokens(2, 5)
    expected = read(model, ids, Memory.for_model(model, 2))
    torch.testing.assert_close(read(model, ids, loaded), expected)


@pytest.mark.parametrize("family", ["GPT-NeoX", "OLMo 2", "Llama"])
def test_a_fam_that_was_made_in_inference_mode_can_be_trained_on(family: str) -> None:
    model = converted(CONFIG, family)
    other, memory = Memory.for_model(model, 1), Memory.for_model(model, 1)
    with torch.inference_mode():
        read(model, some_tokens(1, 2 * B), other)
    memory.begin_with([fam for fam in other.fams if fam is not None])
    read(model, some_tokens(1, 2 * B + 1), memory).sum().backward()


@torch.no_grad()
def test_undo_puts_back_which_rows_were_passed_a_fam() -> None:
    model = converted(CONFIG)
    memory, ids = Memory.for_model(model, 2), some_tokens(2, 2 * B)
    read(model, ids, memory)
    passed = Memory.for_model(model, 2)
    passed.begin_with([fam for fam in memory.fams if fam is not None])
    read(model, ids, passed)
    half = passed.restart([False, True])
    put_back = half.undo()
    half.reorder_cache(torch.tensor([1, 0]))
    assert half.passed == (False, True)
    put_back()
    assert half.passed == (True, False) and half.position == (2 * B, 0)


@torch.no_grad()
def test_a_recording_keeps_nothing_else_alive() -> None:
    model = converted(CONFIG.replace(adapted="fam", fam_seen="asked"))
    for recording in record(model, some_tokens(1, 3 * B), Memory.for_model(model, 1)):
        for anchors in recording.anchors:
            for x in (anchors.keys, anchors.values):
                assert x.untyped_storage().nbytes() == x.numel() * x.element_size()


@torch.no_grad()
def test_a_stream_that_keeps_more_than_f_is_not_given_f_alone() -> None:
    config = replace(CONFIG, fam_query="static", adapted="fam", fam_seen="asked")
    model = converted(config)
    (one,) = record(model, some_tokens(1, B), Memory.for_model(model, 1))
    known = ReadBefore(
        B,
        lambda layer, j: one.tokens[layer],
        one.anchors.__getitem__,
        lambda layer, j: torch.zeros(1, 3, 32),
    )
    with pytest.raises(ValueError, match="cannot be given F alone"):
        replay(model, known, Memory.for_model(model, 1))


@torch.no_grad()
def test_a_beam_search_hands_out_no_memory() -> None:
    model, ids = converted(CONFIG), some_tokens(1, B)
    more = {"max_new_tokens": 4, "return_dict_in_generate": True}
    assert model.generate(ids, num_beams=2, **more).past_key_values is None
    several = model.generate(ids, num_return_sequences=2, do_sample=True, **more)
    assert several.past_key_values.rows == 2
