"""Feedback memory segments: past blocks as their layers' outputs. Against the oracle, with every
split, see test_feedback.py and test_streaming.py; here is what they leave out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import converted, some_tokens, tiny
from oracle import oracle
from test_training import B, assert_same, build, carried, checkpointed, whole
from torch import Tensor
from transformers import PreTrainedModel

from transformerfam import FamConfig, convert

CONFIG = FamConfig.paper(
    block_size=B, memory_segments=2, fam_length=0, sink_tokens=1, memory_source="output"
)
IDS = some_tokens(2, 4 * B + 2)


def as_llama(phi: PreTrainedModel) -> PreTrainedModel:
    """The Llama of the weights of a Phi-3, which keeps q, k, v in one matrix."""
    weights = dict(phi.state_dict())
    heads, kv_heads = phi.config.num_attention_heads, phi.config.num_key_value_heads
    sizes = [n * phi.config.head_dim for n in (heads, kv_heads, kv_heads)]
    for name in list(weights):
        if "qkv_proj" in name:
            parts = zip("qkv", weights.pop(name).split(sizes), strict=True)
            weights |= {name.replace("qkv_", f"{letter}_"): part for letter, part in parts}
        elif "gate_up_proj" in name:
            gate, up = weights.pop(name).chunk(2)
            weights |= {name.replace("gate_up", "gate"): gate, name.replace("gate_up", "up"): up}
    llama = tiny(rms_norm_eps=phi.config.rms_norm_eps)
    llama.load_state_dict(weights)
    return llama


@pytest.mark.parametrize("changes", [{}, {"attention_mask": True}], ids=["even", "ragged"])
def test_checkpointing_changes_no_gradient(changes: dict[str, Any]) -> None:
    if changes:
        mask = torch.ones_like(IDS)
        mask[0, :4], mask[1, :9] = 0, 0
        changes = {"attention_mask": mask}
    expected = whole(build(CONFIG), IDS, **changes)
    assert_same(whole(checkpointed(build(CONFIG)), IDS, **changes), expected)


@pytest.mark.parametrize("tokens", [1, B - 1, B, B + 1])
def test_gradients_flow_through_a_carried_memory(tokens: int) -> None:
    model = build(CONFIG)
    assert_same(carried(model, IDS, tokens), whole(model, IDS))


def test_dropout_of_attention_is_drawn_once_and_repeated_under_checkpointing() -> None:
    found = []
    for model in (
        build(CONFIG, attention_dropout=0.3).train(),
        checkpointed(build(CONFIG, attention_dropout=0.3)),
    ):
        torch.manual_seed(0)
        found.append(whole(model, IDS))
    assert_same(found[0], found[1])


@pytest.mark.parametrize("stop", [False, True])
def test_a_stopped_gradient_does_stop(stop: bool) -> None:
    """The last token's gradient at the embeddings of earlier blocks, in a model of one layer."""
    config = CONFIG.replace(stop_gradient=stop, sink_tokens=0)
    model = converted(config, num_hidden_layers=1)
    embeds = model.get_input_embeddings()(some_tokens(1, 4 * B)).detach().requires_grad_()
    model(inputs_embeds=embeds).logits[0, -1].sum().backward()
    reached = embeds.grad[0].abs().amax(1) > 0
    assert bool(reached[3 * B :].all())
    assert bool(reached[: 3 * B].any()) == bool(reached[: 3 * B].all()) == (not stop)


@torch.no_grad()
def test_outputs_carry_in_one_layer_what_inputs_cannot() -> None:
    """Outputs made of outputs: the reach of a layer is not its window."""
    ids = some_tokens(1, 6 * B)
    other = ids.clone()
    other[0, 0] = 3 + (other[0, 0] - 2) % 60
    for source, connected in (("input", False), ("output", True)):
        config = CONFIG.replace(memory_source=source, memory_segments=1, sink_tokens=0)
        model = converted(config, num_hidden_layers=1)
        difference = (model(ids).logits[0, -1] - model(other).logits[0, -1]).abs().max()
        assert bool(difference > 0) == connected


@torch.no_grad()
def test_a_family_with_one_matrix_for_all_three_equals_the_oracle() -> None:
    phi = tiny("Phi-3", partial_rotary_factor=1.0)
    expected = oracle(as_llama(phi), CONFIG, IDS[0]).logits
    torch.testing.assert_close(convert(phi, CONFIG)(IDS[:1]).logits[0], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", ["Cohere 2", "GPT-NeoX", "Gemma 2", "Mixtral", "gpt-oss"])
@torch.no_grad()
def test_whole_equals_pieces_in_other_families(family: str) -> None:
    model = converted(CONFIG, family, torch.float32)
    memory, pieces = None, []
    for piece in IDS.split([5, 3, 1, B, 2 * B - 1], dim=1):
        out = model(piece, past_key_values=memory)
        memory = out.past_key_values
        pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), model(IDS).logits, rtol=0, atol=2e-5)
    without = converted(CONFIG.without_feedback(), family, torch.float32)(IDS).logits
    torch.testing.assert_close(without[:, :B], model(IDS).logits[:, :B], rtol=0, atol=1e-5)
    assert not torch.allclose(without[:, B:], model(IDS).logits[:, B:], atol=1e-3)


def test_routers_are_recorded_for_tokens_alone() -> None:
    model = converted(CONFIG, "Mixtral", torch.float32)
    logits: tuple[Tensor, ...] = model(IDS, output_router_logits=True).router_logits
    assert [len(layer) for layer in logits] == [IDS.numel()] * 3
