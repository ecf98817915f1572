"""Every supported family, without code per family; and the list of them in the documentation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, converted, some_tokens, tiny

from transformerfam import FamConfig, convert, reconfigure

LENGTH = 41
ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_feedback_off_and_a_window_that_holds_all_is_the_original(family: str) -> None:
    ids = some_tokens(2, LENGTH)
    model = tiny(family, torch.float32)
    original = model(ids).logits
    for length in (1, 7, 8, 9, LENGTH):
        plain = (
            original if length == LENGTH else tiny(family, torch.float32)(ids[:, :length]).logits
        )
        model = converted(
            FamConfig.paper(block_size=8, memory_segments=5, fam_length=0), family, torch.float32
        )
        torch.testing.assert_close(model(ids[:, :length]).logits, plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_first_block_is_the_original_whatever_the_feedback(family: str) -> None:
    """No token of block 0 sees a FAM, so short texts lose nothing by the conversion."""
    ids = some_tokens(1, 8)
    original = tiny(family, torch.float32)(ids).logits
    model = converted(
        FamConfig.paper(block_size=8, memory_segments=1, fam_length=3), family, torch.float32
    )
    torch.testing.assert_close(model(ids).logits, original, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_whole_equals_pieces_with_feedback_and_sinks(family: str) -> None:
    config = FamConfig.paper(block_size=8, memory_segments=1, fam_length=3, sink_tokens=2)
    model = converted(config, family, torch.float32)
    ids = some_tokens(2, LENGTH)
    whole = model(ids).logits
    memory, pieces = None, []
    for piece in ids.split([5, 3, 1, 20, 12], dim=1):
        out = model(piece, past_key_values=memory)
        memory = out.past_key_values
        pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=2e-5)
    without = reconfigure(model, config.without_feedback())(ids).logits
    torch.testing.assert_close(without[:, :8], whole[:, :8], rtol=0, atol=1e-5)
    assert not torch.allclose(without[:, 8:], whole[:, 8:])


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_the_prompt_and_every_layer(family: str) -> None:
    model = converted(
        FamConfig.paper(block_size=8, memory_segments=0, fam_length=3), family, torch.float32
    )
    model(some_tokens(1, 24), use_cache=False).logits[0, 16:].square().sum().backward()
    assert model.get_decoder().fam_prompt.weight.grad.abs().max() > 0
    for layer in model.get_decoder().layers:
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())


@pytest.mark.parametrize("family", ["Gemma 2", "Gemma 3 (text)", "Mistral", "gpt-oss"])
@torch.no_grad()
def test_a_familys_own_sliding_window_stays(family: str) -> None:
    """Layers with a window of 20 see no further, whatever our window; the others do."""
    ids = some_tokens(1, 60)
    narrow, wide = tiny(family, torch.float32), tiny(family, torch.float32, sliding_window=500)
    expected, other = narrow(ids).logits, wide(ids).logits
    assert not torch.allclose(expected, other, atol=1e-4)
    model = convert(narrow, FamConfig.paper(block_size=16, memory_segments=5, fam_length=0))
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("prefix", "needs"),
    [
        ("Phimoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
        (
            "Qwen2Moe",
            {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
            | {"use_sliding_window": True, "max_window_layers": 3, "decoder_sparse_step": 1},
        ),
    ],
)
@torch.no_grad()
def test_a_window_that_stands_in_the_mask_alone_stays(
    prefix: str, needs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, prefix, (prefix, {"sliding_window": 20, **needs}))
    test_a_familys_own_sliding_window_stays(prefix)


def test_the_documentation_lists_these_families() -> None:
    """docs/families.md; the list is made by `make docs`."""
    text = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    listed = [line[2:].split(" (`")[0] for line in text.splitlines() if line.startswith("- ")]
    assert listed == sorted(FAMILIES, key=str.lower)
