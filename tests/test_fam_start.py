"""A prefix for each layer in place of the prompt, and queries that stay the same (SUM FAM)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import converted, some_tokens, tiny
from transformers import AutoModelForCausalLM

from transformerfam import FamConfig, Memory, convert, reconfigure
from transformerfam.conversion import initialise_prompt
from transformerfam.errors import UserError
from transformerfam.probe import run_probe
from transformerfam.training.adaptation import adapt, trained_parameters
from transformerfam.training.recipe import Recipe
from transformerfam.training.settings import TrainSettings

B, N, LAYERS = 6, 3, 3
PREFIX = FamConfig.paper(block_size=B, memory_segments=1, fam_length=N, fam_start="prefix")
STATIC = PREFIX.replace(fam_start="prompt", fam_query="static")


def test_a_prefix_starts_as_what_each_layer_reads() -> None:
    model: Any = convert(tiny(), PREFIX, prompt="vocabulary", seed=4)
    drawn = torch.randint(64, (N,), generator=torch.Generator().manual_seed(4))
    inputs = run_probe(model.model, drawn, torch.zeros(N, dtype=torch.long)).inputs
    expected = torch.cat([inputs[layer][0] for layer in range(LAYERS)])
    assert torch.equal(model.model.fam_prompt.weight, expected)
    # Its first N rows are what the prompt would be.
    prompt: Any = convert(tiny(), STATIC, prompt="vocabulary", seed=4)
    assert torch.equal(model.model.fam_prompt.weight[:N], prompt.model.fam_prompt.weight)


def test_prompt_and_prefix_give_way_to_each_other() -> None:
    model: Any = converted(PREFIX)
    kept = model.model.fam_prompt
    assert reconfigure(model, PREFIX.replace(memory_segments=2)).model.fam_prompt is kept
    assert reconfigure(model, STATIC).model.fam_prompt.weight.shape == (N, 32)
    assert reconfigure(model, PREFIX).model.fam_prompt.weight.shape == (LAYERS * N, 32)


@pytest.mark.parametrize("config", [PREFIX, STATIC], ids=["prefix", "static"])
def test_rows_that_begin_anew_begin_as_new_streams(config: FamConfig) -> None:
    model: Any = converted(config)
    ids = some_tokens(2, 4 * B)
    with torch.no_grad():
        memory = Memory.for_model(model, 2)
        model(ids[:, : B + 2], past_key_values=memory)
        memory = memory.restart([False, True])
        together = model(
            torch.cat([ids[:1, B + 2 : 3 * B], ids[1:, : 2 * B - 2]]), past_key_values=memory
        ).logits
        goes_on, anew = model(ids[:1]).logits, model(ids[1:]).logits
    torch.testing.assert_close(together[0], goes_on[0, B + 2 : 3 * B], rtol=0, atol=1e-9)
    torch.testing.assert_close(together[1], anew[0, : 2 * B - 2], rtol=0, atol=1e-9)


def test_a_prefix_is_an_f_that_another_stream_left() -> None:
    model: Any = converted(PREFIX)
    ids = some_tokens(2, 2 * B + 1)
    rows = model.model.fam_prompt.weight.detach().split(N)
    passed: Any = converted(PREFIX.replace(fam_start="prompt"))
    memory = Memory.for_model(passed, 2)
    memory.begin_with([row[None] for row in rows])
    with torch.no_grad():
        expected = passed(ids, past_key_values=memory).logits
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-12)
        # And gives way to one that is passed indeed.
        other = Memory.for_model(model, 2)
        other.begin_with([row[None] + 1 for row in rows])
        assert not torch.allclose(model(ids, past_key_values=other).logits, expected)


def test_static_queries_refuse_the_fam_of_another() -> None:
    memory = Memory(STATIC, layers=LAYERS)
    with pytest.raises(ValueError, match="cannot begin with the FAM of another"):
        memory.begin_with([torch.zeros(1, N, 32)] * LAYERS)
    with pytest.raises(UserError, match=r"feedback\.state_passing.*fam\.fam_query"):
        Recipe.from_dict({"fam": {"fam_query": "static"}, "feedback": {"state_passing": 0.8}})


def test_what_static_queries_ask_is_kept_from_block_0_on() -> None:
    model: Any = converted(STATIC)
    ids, memory = some_tokens(1, 5 * B), Memory.for_model(model)
    kept = []
    with torch.no_grad():
        for block in ids.split(B, dim=1):
            model(block, past_key_values=memory)
            layers = [layer for layer in memory.layers_memory if layer is not None]
            kept.append([layer.extra["fam_input"] for layer in layers])
    prompt = model.model.fam_prompt.weight.detach()
    for of_block in kept:
        torch.testing.assert_close(of_block[0][0], prompt)
        assert all(torch.equal(a, b) for a, b in zip(of_block, kept[0], strict=True))
    # What rises into layer 1 is F of layer 0 after block 0.
    with torch.no_grad():
        first = model(ids[:, :B], use_cache=True).past_key_values.fams
    assert torch.equal(kept[0][1], first[0])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_prefix_learns_in_every_layer(checkpointing: bool) -> None:
    model: Any = converted(PREFIX).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    model(some_tokens(1, 3 * B), use_cache=False).logits.logsumexp(-1).sum().backward()
    gradient = model.model.fam_prompt.weight.grad.view(LAYERS, N, -1)
    assert bool((gradient.abs().amax((1, 2)) > 0).all())


def test_a_prefix_is_saved_and_trained_as_the_prompt_is(tmp_path: Path) -> None:
    model: Any = converted(PREFIX, dtype=torch.float32)
    initialise_prompt(model, "vocabulary", seed=1)
    model.save_pretrained(tmp_path / "whole")
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert torch.equal(again.model.fam_prompt.weight, model.model.fam_prompt.weight)
    ids = some_tokens(1, 2 * B)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    adapted = adapt(again, TrainSettings(what="prompt"), seed=0)
    (trained,) = trained_parameters(adapted).values()
    assert trained.shape == (LAYERS * N, 32)
    with torch.no_grad():
        trained.add_(1.0)
    adapted.save_pretrained(tmp_path / "adapter")
    from transformerfam.models import put_adapter

    put: Any = put_adapter(model, str(tmp_path / "adapter")).merge_and_unload()
    assert torch.equal(put.model.fam_prompt.weight, trained)
