"""Streams that begin with the FAM of another, at an offset, or anew beside others that go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import converted, some_tokens
from oracle import oracle
from torch import Tensor
from variants import VARIANTS

from transformerfam import FamConfig, Memory

B = 6
WITH_FEEDBACK = {n: c for n, c in VARIANTS.items() if c.has_feedback and c.backend != "flex"}
PASSED = [n for n, c in WITH_FEEDBACK.items() if c.fam_query != "static"]
SMALL = FamConfig.paper(block_size=B, memory_segments=1, fam_length=3, sink_tokens=2)


def some_fams(model: Any, rows: int = 1) -> list[Tensor]:
    """F of each layer, (rows, N, d)."""
    shape = (rows, model.fam_config.fam_length, model.config.hidden_size)
    generator = torch.Generator().manual_seed(3)
    layers = range(model.config.num_hidden_layers)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for _ in layers]


def begun(model: Any, fams: list[Tensor], rows: int = 1) -> Memory:
    memory = Memory.for_model(model, rows)
    memory.begin_with(fams)
    return memory


@pytest.mark.parametrize("length", [1, B, 4 * B + 2])
@pytest.mark.parametrize("name", PASSED)
def test_a_passed_fam_is_read_and_rewritten_as_the_oracle_does(name: str, length: int) -> None:
    model = converted(WITH_FEEDBACK[name])
    ids, fams = some_tokens(1, length), some_fams(model)
    with torch.no_grad():
        memory = begun(model, fams)
        logits = model(ids, past_key_values=memory).logits[0]
        rows = [fam[0] for fam in fams]
        expected = oracle(model, model.fam_config, ids[0], model.model.fam_prompt.weight, 0, rows)
    torch.testing.assert_close(logits, expected.logits, rtol=0, atol=1e-9)
    last = expected.fams[-1] if expected.fams else rows
    for ours, theirs in zip(memory.fams, last, strict=True):
        assert ours is not None
        torch.testing.assert_close(ours[0], theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["paper", "three previous fams", "first residual", "rms"])
def test_gradients_from_a_passed_fam_equal_the_oracle(name: str) -> None:
    model = converted(VARIANTS[name])
    ids, fams = some_tokens(1, 3 * B + 1), [f.requires_grad_() for f in some_fams(model)]
    model(ids, past_key_values=begun(model, fams)).logits[0].logsumexp(-1).sum().backward()
    ours = [f.grad.clone() for f in fams if f.grad is not None]
    weights = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert len(ours) == len(fams)
    assert not weights.pop("model.fam_prompt.weight", torch.zeros(1)).any()
    model.zero_grad()
    for fam in fams:
        fam.grad = None
    prompt = model.model.fam_prompt.weight.detach()
    rows = [fam[0] for fam in fams]
    said = oracle(model, model.fam_config, ids[0], prompt, 0, rows).logits
    said.logsumexp(-1).sum().backward()
    for fam, mine in zip(fams, ours, strict=True):
        torch.testing.assert_close(mine, fam.grad, rtol=1e-5, atol=1e-7)
    for n, p in model.named_parameters():
        if n in weights:
            torch.testing.assert_close(
                weights[n], p.grad, rtol=1e-5, atol=2e-6 * float(p.grad.abs().max())
            )


@pytest.mark.parametrize("split", [(1,), (B,), (B - 1, 2), (2 * B + 1, B)])
def test_a_stream_with_a_passed_fam_may_be_split_anywhere(split: tuple[int, ...]) -> None:
    model = converted(SMALL)
    ids, fams = some_tokens(2, 4 * B), some_fams(model, 2)
    with torch.no_grad():
        whole = model(ids, past_key_values=begun(model, fams, 2)).logits
        memory, said = begun(model, fams, 2), []
        sizes = [*split, ids.shape[1] - sum(split)]
        for piece in ids.split(sizes, dim=1):
            said.append(model(piece, past_key_values=memory).logits)
            memory = memory.fork()
    torch.testing.assert_close(torch.cat(said, 1), whole, rtol=0, atol=1e-9)


def test_rows_with_and_without_a_passed_fam_go_side_by_side() -> None:
    model = converted(SMALL)
    ids, fams = some_tokens(2, 3 * B + 1), some_fams(model)
    with torch.no_grad():
        one = begun(model, fams)
        alone = [model(ids[:1], past_key_values=one).logits, model(ids[1:]).logits]
        both = begun(model, fams, 2)
        model(ids[:, :B], past_key_values=both)
        both = both.restart([False, True])
        assert both.position == (B, 0) and both.passed == (True, False)
        # Row 0 goes on where it was and row 1 begins anew.
        second = torch.cat([ids[:1, B : 3 * B], ids[1:, : 2 * B]])
        together = model(second, past_key_values=both).logits
    torch.testing.assert_close(together[0], alone[0][0, B : 3 * B], rtol=0, atol=1e-9)
    torch.testing.assert_close(together[1], alone[1][0, : 2 * B], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_an_offset_is_where_the_oracle_begins(name: str) -> None:
    config = VARIANTS[name]
    model = converted(config)
    ids = some_tokens(1, 3 * B + 1)
    memory = Memory.for_model(model)
    memory.offset = 7.0 * B
    with torch.no_grad():
        said = [model(piece, past_key_values=memory).logits[0] for piece in ids.split(B + 1, 1)]
        prompt = model.model.fam_prompt.weight if config.has_feedback else None
        expected = oracle(model, config, ids[0], prompt, start=7 * B).logits
        unmoved = oracle(model, config, ids[0], prompt).logits
    torch.testing.assert_close(torch.cat(said), expected, rtol=0, atol=1e-9)
    matters = config.has_feedback and config.fam_position == "zero"
    assert bool((expected - unmoved).abs().max() > 1e-6) == matters


def test_a_memory_that_began_with_a_fam_survives_its_file(tmp_path: Path) -> None:
    model = converted(SMALL.replace(memory_segments=0))
    ids, fams = some_tokens(1, 2 * B), some_fams(model)
    memory = begun(model, fams)
    memory.offset = 3.5
    with pytest.raises(ValueError, match="read something"):
        memory.save(tmp_path / "none.fam", model)
    with torch.no_grad():
        model(ids[:, :3], past_key_values=memory)
        memory.save(tmp_path / "some.fam", model)
        again = Memory.load(tmp_path / "some.fam", model)
        assert (again.passed, again.offset) == ((True,), 3.5)
        ours = model(ids[:, 3:], past_key_values=again).logits
        theirs = model(ids[:, 3:], past_key_values=memory).logits
    assert torch.equal(ours, theirs)


def test_a_fam_that_does_not_fit_is_refused() -> None:
    model = converted(SMALL)
    memory = Memory.for_model(model, 2)
    for wrong in ([], some_fams(model)[:1], some_fams(model, 3)):
        with pytest.raises(ValueError, match="2 rows and 3 slots"):
            memory.begin_with(wrong)
    with torch.no_grad():
        model(some_tokens(2, 1), past_key_values=memory)
    with pytest.raises(ValueError, match="read nothing"):
        memory.begin_with(some_fams(model))


def test_a_failed_call_leaves_the_passed_fam() -> None:
    model = converted(SMALL)
    memory = begun(model, some_fams(model))
    with pytest.raises(ValueError, match="rows"):
        model(some_tokens(2, 2), past_key_values=memory)
    assert memory.passed_fams is not None
