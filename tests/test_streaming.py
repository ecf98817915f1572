"""Reading in any split, in any company, resumed or not, at any position: the same result."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from families import converted, some_tokens, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel
from variants import VARIANTS

from transformerfam import FamConfig, Memory

B = 6
LENGTH = 5 * B + 2
pytestmark = pytest.mark.filterwarnings(
    "ignore:flex_attention called without torch.compile:UserWarning"
)


def close(a: Tensor, b: Tensor, atol: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def same_memory(a: Memory, b: Memory) -> None:
    assert a.position == b.position
    # What was written past the end of the block being read means nothing.
    for (name, x), (_, y) in zip(a.tensors(), b.tensors(), strict=True):
        if name.endswith(("keys", "values")) and not name.endswith("anchor_keys"):
            free = a.config.block_size - a.position[0] % a.config.block_size
            # Where all is kept a row that read less than its neighbours has zeros before its past.
            kept = min(x.shape[2], y.shape[2])
            x, y = (t[:, :, t.shape[2] - kept : t.shape[2] - free] for t in (x, y))
        close(x, y)


@torch.no_grad()
def stream(
    model: PreTrainedModel, ids: Tensor, pieces: list[int], memory: Memory | None = None
) -> tuple[Tensor, Memory]:
    logits = []
    for piece in ids.split(pieces, dim=1):
        out = model(piece, past_key_values=memory)
        memory = out.past_key_values
        logits.append(out.logits)
    assert memory is not None
    return torch.cat(logits, 1), memory


@pytest.mark.parametrize("name", VARIANTS)
def test_whole_equals_token_by_token_equals_resumed_equals_forked(
    name: str, tmp_path: Path
) -> None:
    model = converted(VARIANTS[name], num_hidden_layers=2)
    ids = some_tokens(2, LENGTH)
    whole, end = stream(model, ids, [LENGTH])

    tokens, memory = stream(model, ids, [1] * LENGTH)
    close(tokens, whole)
    same_memory(memory, end)

    half = 3 * B - 2
    first, memory = stream(model, ids[:, :half], [half])
    memory.save(tmp_path / "half.fam", model)
    fork = memory.fork()
    _, spoilt = stream(model, some_tokens(2, B, seed=9), [B], memory)  # the original goes elsewhere
    for resumed in (fork, Memory.load(tmp_path / "half.fam", model)):
        rest, final = stream(model, ids[:, half:], [LENGTH - half], resumed)
        close(torch.cat([first, rest], 1), whole)
        same_memory(final, end)
    assert spoilt.position == (half + B,) * 2


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_split_equals_whole(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([n for n, c in VARIANTS.items() if c.backend == "sdpa"]))
    length = data.draw(st.integers(1, 7 * B))
    cuts = data.draw(st.sets(st.integers(1, max(length - 1, 1)), max_size=8))
    edges = [0, *sorted(c for c in cuts if c < length), length]
    pieces = [b - a for a, b in pairwise(edges)]
    model = _model(name)
    ids = some_tokens(1, length, seed=length)
    whole, end = stream(model, ids, [length])
    logits, memory = stream(model, ids, pieces)
    close(logits, whole)
    same_memory(memory, end)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_row_of_a_ragged_batch_equals_the_row_alone(data: st.DataObject) -> None:
    """Rows of any lengths, padded left, right or in the middle, over several calls."""
    name = data.draw(st.sampled_from([n for n, c in VARIANTS.items() if c.backend == "sdpa"]))
    model = _model(name)
    rows = data.draw(st.integers(1, 3))
    memory: Memory | None = None
    kept = [[torch.zeros(0, dtype=torch.long)] for _ in range(rows)]
    read: list[list[Tensor]] = [[] for _ in range(rows)]
    for call in range(data.draw(st.integers(1, 3))):
        width = data.draw(st.integers(1, 3 * B))
        mask = torch.tensor(
            [
                data.draw(st.lists(st.integers(0, 1), min_size=width, max_size=width))
                for _ in range(rows)
            ]
        )
        ids = some_tokens(rows, width, seed=call)
        with torch.no_grad():
            out = model(ids, attention_mask=mask, past_key_values=memory, use_cache=True)
        memory = out.past_key_values
        assert memory is not None
        for r in range(rows):
            kept[r].append(ids[r][mask[r].bool()])
            read[r].append(out.logits[r][mask[r].bool()])
    assert memory is not None
    for r in range(rows):
        alone = torch.cat(kept[r])
        assert memory.position[r] == len(alone)
        if len(alone):
            expected, end = stream(model, alone[None], [len(alone)])
            close(torch.cat(read[r])[None], expected)
            same_memory(memory.select_rows([r]), end)


_MODELS: dict[str, PreTrainedModel] = {}


def _model(name: str) -> PreTrainedModel:
    if name not in _MODELS:
        _MODELS[name] = converted(VARIANTS[name], num_hidden_layers=2)
    return _MODELS[name]


def far(memory: Memory, blocks: int) -> Memory:
    """The same memory, as if it had read `blocks` more blocks before."""
    moved = memory.fork()
    moved.position = tuple(p + blocks * memory.config.block_size for p in moved.position)
    return moved


@pytest.mark.parametrize(
    "name",
    [
        n
        for n, c in VARIANTS.items()
        if c.fam_position != "zero" and not c.keeps_everything and c.attention != "longformer"
    ],
)
@pytest.mark.parametrize("tokens_before", [10**8, pytest.param(10**12, marks=pytest.mark.slow)])
def test_a_stream_at_a_hundred_million_equals_one_near_zero(name: str, tokens_before: int) -> None:
    """Moving all positions by a constant changes nothing (B.2.1); positions are rebased."""
    model = _model(name)
    _, memory = stream(model, some_tokens(1, 5 * B), [5 * B])
    ids = some_tokens(1, LENGTH, seed=1)
    expected, end = stream(model, ids, [B + 1, 1, LENGTH - B - 2], memory.fork())
    logits, moved_end = stream(
        model, ids, [B + 1, 1, LENGTH - B - 2], far(memory, tokens_before // B)
    )
    assert torch.equal(logits, expected)
    for (_, x), (_, y) in zip(moved_end.tensors(), end.tensors(), strict=True):
        assert torch.equal(x, y)


def test_fam_at_position_zero_does_notice_how_far_it_is() -> None:
    model = _model("zero")
    _, memory = stream(model, some_tokens(1, 5 * B), [5 * B])
    ids = some_tokens(1, 2 * B, seed=1)
    near, _ = stream(model, ids, [2 * B], memory.fork())
    there, _ = stream(model, ids, [2 * B], far(memory, 10**7))
    assert not torch.allclose(near, there)


@pytest.mark.parametrize("name", [n for n, c in VARIANTS.items() if not c.keeps_everything])
def test_memory_is_as_large_after_100_blocks_as_after_3(name: str) -> None:
    config = VARIANTS[name].replace(backend="sdpa")
    model = converted(config, num_hidden_layers=1)
    _, memory = stream(model, some_tokens(1, 3 * B), [3 * B])
    small = memory.nbytes
    _, memory = stream(model, some_tokens(1, 97 * B), [49 * B, 48 * B], memory)
    assert memory.position == (100 * B,)
    assert memory.nbytes == small
    assert all(torch.isfinite(t).all() for _, t in memory.tensors())


@pytest.mark.parametrize("name", [n for n, c in VARIANTS.items() if c.keeps_everything])
def test_what_sees_everything_keeps_everything(name: str) -> None:
    _, memory = stream(_model(name), some_tokens(1, 7 * B), [B + 1, 6 * B - 1])
    assert memory.past_length == 7 * B
    assert memory.is_sliding == [False] * len(memory)


def test_full_attention_keeps_everything() -> None:
    model = converted(FamConfig.paper(block_size=B, attention="full", fam_length=0))
    plain = tiny()
    ids = some_tokens(1, 8 * B + 1)
    logits, memory = stream(model, ids, [7, 1, 20, 8 * B + 1 - 28])
    with torch.no_grad():
        close(logits, plain(ids).logits, atol=2e-5)
    assert memory.past_length == 8 * B
