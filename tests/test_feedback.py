"""Layer-major, batched and streamed: all equal to the slow definition in oracle.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import converted, some_tokens
from oracle import oracle
from variants import VARIANTS

from transformerfam import FamConfig, Memory

B = 6
LENGTHS = (1, B, B + 1, 5 * B + 1)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_logits_and_every_fam_equal_the_oracle(name: str) -> None:
    config = VARIANTS[name]
    model = converted(config)
    ids = some_tokens(1, LENGTHS[-1])
    prompt = model.model.fam_prompt.weight if config.has_feedback else None

    def assert_same_fams(memory: Memory, block: int) -> None:
        found: Any = memory.fams
        for ours, theirs in zip(found, expected.fams[block], strict=True):
            torch.testing.assert_close(ours[0], theirs, rtol=0, atol=1e-9)

    with torch.no_grad():
        # The oracle says of the beginning of a text what it says of it in the whole text.
        expected = oracle(model, config, ids[0], prompt)
        for length in LENGTHS:
            whole = model(ids[:, :length], use_cache=True)
            torch.testing.assert_close(whole.logits[0], expected.logits[:length], rtol=0, atol=1e-9)
            if config.has_feedback and length >= B:
                assert_same_fams(whole.past_key_values, length // B - 1)
        memory = None
        for block in range(len(expected.fams)):
            step = model(ids[:, block * B : (block + 1) * B], past_key_values=memory)
            memory = step.past_key_values
            assert_same_fams(memory, block)


@pytest.mark.parametrize("name", [name for name, c in VARIANTS.items() if c.backend != "flex"])
def test_gradients_of_every_parameter_equal_the_oracle(name: str) -> None:
    config = VARIANTS[name]
    model = converted(config)
    ids = some_tokens(1, 4 * B + 3)
    weights = torch.randn(
        ids.shape[1], 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )

    (model(ids, use_cache=False).logits[0] * weights).sum().backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    prompt = model.model.fam_prompt.weight if config.has_feedback else None
    (oracle(model, config, ids[0], prompt).logits * weights).sum().backward()

    assert ("model.fam_prompt.weight" in ours) == config.has_feedback
    for n, p in model.named_parameters():
        # Llama's norm works in float32 whatever the model's type: 1e-7 is its rounding.
        torch.testing.assert_close(
            ours[n], p.grad, rtol=1e-5, atol=2e-6 * float(p.grad.abs().max())
        )


def test_a_stopped_gradient_does_stop() -> None:
    """The last token's gradient at the embedding of block 0 is zero with one layer and M1_SG."""
    for stop in (False, True):
        config = FamConfig.paper(block_size=B, memory_segments=1, fam_length=0, stop_gradient=stop)
        model = converted(config, num_hidden_layers=1)
        embeds = model.get_input_embeddings()(some_tokens(1, 2 * B)).detach().requires_grad_()
        model(inputs_embeds=embeds).logits[0, -1].sum().backward()
        reaches_block_0 = bool(embeds.grad[0, :B].abs().max() > 0)
        assert reaches_block_0 == (not stop)


def test_feedback_carries_what_no_window_can() -> None:
    """Without memory segments only FAM connects the blocks, however far apart."""
    ids = some_tokens(1, 6 * B)
    other = ids.clone()
    other[0, 0] = 3 + (other[0, 0] - 2) % 60
    for fam_length, connected in ((0, False), (2, True)):
        config = FamConfig.paper(
            block_size=B, memory_segments=0, fam_length=fam_length, first_residual="prompt"
        )
        model = converted(config)
        with torch.no_grad():
            difference = (model(ids).logits[0, -1] - model(other).logits[0, -1]).abs().max()
        assert bool(difference > 1e-9) == connected


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_no_token_sees_the_future(name: str) -> None:
    model = converted(VARIANTS[name])
    ids = some_tokens(1, 3 * B + 2)
    with torch.no_grad():
        before = model(ids).logits
        for changed in (2, B - 1, B, 2 * B + 1, 3 * B + 1):
            other = ids.clone()
            other[0, changed] = 3 + (other[0, changed] - 2) % 60
            after = model(other).logits
            torch.testing.assert_close(after[:, :changed], before[:, :changed], rtol=0, atol=1e-12)
            assert not torch.equal(after[:, changed], before[:, changed])
