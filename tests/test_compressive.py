"""Infini-attention. With every split, batch and resumption see test_streaming.py; the gates here
are wide open, where conversion nearly shuts them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from families import converted, some_tokens, tiny
from oracle import CompressiveMemory, oracle
from safetensors.torch import load_file
from test_adaptation import base_folder, loaded, logits, short, trained_on
from test_feedback_segments import as_llama
from test_streaming import same_memory, stream
from test_training import B, assert_same, build, carried, checkpointed, whole
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from transformerfam import FamConfig, Memory, compressive, convert, reconfigure
from transformerfam.conversion import restore, twin
from transformerfam.memory_file import fingerprint
from transformerfam.models import is_trained, load, put_adapter
from transformerfam.training import adaptation

CONFIGS = {
    f"{rule}, M{M}": FamConfig.paper(
        block_size=B, memory_segments=M, fam_length=0, sink_tokens=M, compressive_memory=rule
    )
    for rule, M in (("linear", 0), ("linear", 1), ("delta", 0), ("delta", 2))
}
DELTA = CONFIGS["delta, M0"]
IDS = some_tokens(2, 4 * B + 2)
GATES = "model.memory_gates.weight"


def opened(model: PreTrainedModel) -> PreTrainedModel:
    """Gates that matter, each another."""
    gates = model.get_decoder().memory_gates.weight
    with torch.no_grad():
        gates.copy_(torch.randn(gates.shape, generator=torch.Generator().manual_seed(3)))
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients_equal_the_oracle(name: str) -> None:
    model, ids = opened(build(CONFIGS[name])), some_tokens(1, 3 * B + 2)
    weights = torch.randn(ids.shape[1], 64, generator=torch.Generator().manual_seed(1)).double()
    said = model(ids, use_cache=False).logits[0]
    (said * weights).sum().backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    expected = oracle(model, CONFIGS[name], ids[0]).logits
    (expected * weights).sum().backward()
    torch.testing.assert_close(said, expected, rtol=0, atol=1e-9)
    assert bool((ours[GATES].abs() > 0).all())
    assert_same(ours, {n: p.grad for n, p in model.named_parameters()}, atol=1e-7)


def test_the_delta_rule_writes_what_is_not_known_by_hand() -> None:
    """One key, written twice: its new value counts as much as both do under the linear rule."""
    key, old, new = torch.tensor([1.0, -1.0]), torch.tensor([4.0, 0.0]), torch.tensor([0.0, 8.0])
    found = {}
    for rule in ("linear", "delta"):
        memory = CompressiveMemory(DELTA.replace(compressive_memory=rule), head_dim=2)
        for value in (old, new):
            memory.write(key[None, None], value[None, None])
        found[rule] = memory.read(key[None])
    # Both have z = 2 σ(K); M is σ(K)ᵀ (old + new), or σ(K)ᵀ (old + (new - old)).
    torch.testing.assert_close(found["linear"], torch.tensor([2.0, 4.0]))
    torch.testing.assert_close(found["delta"], torch.tensor([0.0, 4.0]))


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_block_0_is_local_attention_to_the_bit(name: str) -> None:
    model = opened(converted(CONFIGS[name]))
    windows = twin(model, CONFIGS[name].without_feedback())
    for pieces in ([4 * B + 2], [B - 2, 2, 3 * B + 2]):
        ours, theirs = (stream(m, IDS, pieces)[0] for m in (model, windows))
        assert torch.equal(ours[:, :B], theirs[:, :B])
        assert bool((ours[:, B:] != theirs[:, B:]).any(-1).all())


@torch.no_grad()
def test_it_carries_what_no_window_can() -> None:
    other = IDS.clone()
    other[:, 0] = 3 + (other[:, 0] - 2) % 60
    model = opened(converted(DELTA, num_hidden_layers=1))
    changed = model(IDS).logits != model(other).logits
    assert bool(changed[:, -1].any(-1).all())
    windows = reconfigure(model, DELTA.without_feedback())
    assert torch.equal(windows(IDS).logits[:, -1], windows(other).logits[:, -1])


@pytest.mark.parametrize("stop", [False, True])
def test_a_stopped_gradient_does_stop(stop: bool) -> None:
    model = opened(converted(DELTA.replace(stop_gradient=stop), num_hidden_layers=1))
    embeds = model.get_input_embeddings()(some_tokens(1, 3 * B)).detach().requires_grad_()
    model(inputs_embeds=embeds).logits[0, -1].sum().backward()
    assert bool(embeds.grad[0, : 2 * B].any()) == (not stop)
    assert bool(model.get_decoder().memory_gates.weight.grad.any())


# ---- streams


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_any_split_any_company_saved_and_resumed(name: str, tmp_path: Path) -> None:
    model = opened(converted(CONFIGS[name]))
    expected = torch.cat([stream(model, row[None], [len(row)])[0] for row in IDS])
    for pieces in ([IDS.shape[1]], [1] * IDS.shape[1], [5, 2 * B, 1, 2 * B - 4]):
        said, memory = stream(model, IDS, pieces)
        torch.testing.assert_close(said, expected, rtol=0, atol=1e-9)
    _, memory = stream(model, IDS[:, : B + 2], [B + 2])
    memory.save(tmp_path / "half.fam", model)
    rest, _ = stream(
        model, IDS[:, B + 2 :], [7, 3 * B - 7], Memory.load(tmp_path / "half.fam", model)
    )
    torch.testing.assert_close(rest, expected[:, B + 2 :], rtol=0, atol=1e-9)


@torch.no_grad()
def test_a_row_of_a_ragged_batch_equals_the_row_alone() -> None:
    model = opened(converted(CONFIGS["delta, M2"]))
    mask = torch.ones_like(IDS)
    mask[0, :9], mask[1, 3:5], mask[1, -4:] = 0, 0, 0
    memory = model(IDS, attention_mask=mask, use_cache=True).past_key_values
    more = some_tokens(2, 2 * B, seed=5)
    said = model(more, past_key_values=memory).logits
    for row in range(2):
        alone = torch.cat([IDS[row][mask[row].bool()], more[row]])[None]
        expected, end = stream(model, alone, [alone.shape[1]])
        torch.testing.assert_close(said[row], expected[0, -2 * B :], rtol=0, atol=1e-9)
        same_memory(memory.select_rows([row]), end)


def test_the_state_is_a_matrix_for_each_head() -> None:
    model = converted(DELTA, dtype=torch.bfloat16)
    with torch.no_grad():
        memory = model(IDS).past_key_values
    rows, heads, features = 2, 2, 8
    layer = memory.layers_memory[0]
    for kept in (layer.extra["compressed"], layer.extra["pending"]):
        # Sums over a stream without end are kept wider than the weights.
        assert kept.dtype == torch.float32
        assert kept.shape == (rows, heads, features, features + 1)


def test_autocast_does_not_round_what_sums_over_all_blocks() -> None:
    features, memory = torch.rand(1, 2, 5, 8), torch.rand(1, 2, 8, 9)
    expected = compressive._retrieved(features, memory)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (features @ memory).dtype == torch.bfloat16
        assert torch.equal(compressive._retrieved(features, memory), expected)


# ---- gradients


@pytest.mark.parametrize("name", CONFIGS)
def test_checkpointing_and_a_carried_memory_change_no_gradient(name: str) -> None:
    expected = whole(opened(build(CONFIGS[name])), IDS)
    assert GATES in expected
    assert_same(whole(checkpointed(opened(build(CONFIGS[name]))), IDS), expected)
    for tokens in (1, B + 1):
        assert_same(carried(opened(build(CONFIGS[name])), IDS, tokens), expected)


def test_gates_have_a_gradient_in_every_call_of_training() -> None:
    """Wrappers that train in parallel wait for one, also where nothing is in memory yet."""
    model = build(DELTA).train()
    assert not whole(model, IDS[:, :B])[GATES].any()


# ---- other families


@torch.no_grad()
def test_a_family_with_one_matrix_for_all_three_equals_the_oracle() -> None:
    phi = tiny("Phi-3", partial_rotary_factor=1.0)
    llama = as_llama(phi)
    model = opened(convert(phi, DELTA))
    llama.model.memory_gates = model.model.memory_gates
    expected = oracle(llama, DELTA, IDS[0, : 3 * B]).logits
    said = model(IDS[:1, : 3 * B]).logits[0]
    torch.testing.assert_close(said, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", ["Cohere 2", "GPT-NeoX", "Gemma 2", "Mixtral", "gpt-oss"])
@torch.no_grad()
def test_whole_equals_pieces_in_other_families(family: str) -> None:
    model = opened(converted(CONFIGS["linear, M1"], family, torch.float32))
    said, _ = stream(model, IDS, [5, 3, 1, B, 2 * B - 1])
    torch.testing.assert_close(said, model(IDS).logits, rtol=0, atol=5e-5)


# ---- conversion, files, adapters


def test_gates_come_nearly_shut_stay_and_go() -> None:
    plain = tiny()
    names = set(plain.state_dict())
    windows = convert(copy.deepcopy(plain), DELTA.without_feedback())
    model = convert(plain, DELTA)
    assert set(model.state_dict()) - names == {GATES}
    assert model.model.memory_gates.weight.shape == (3, 4)
    with torch.no_grad():
        harm = (model(IDS).logits - windows(IDS).logits).norm() / windows(IDS).logits.norm()
    assert 0 < harm < 0.01
    opened(model)
    before = model.model.memory_gates.weight.clone()
    for config in (DELTA.without_feedback(), CONFIGS["linear, M1"]):
        reconfigure(model, config)
        assert torch.equal(model.model.memory_gates.weight, before)
    assert reconfigure(windows, DELTA).model.memory_gates.weight.shape == (3, 4)
    assert set(restore(model).state_dict()) == names


def test_gates_are_saved_and_loaded(tmp_path: Path) -> None:
    model = opened(converted(DELTA))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert again.fam_config == DELTA
    assert torch.equal(logits(again), logits(model))


def test_gates_are_part_of_who_made_a_memory_if_they_are_used() -> None:
    model = converted(DELTA)
    windows = twin(model, DELTA.without_feedback())
    names = [fingerprint(m) for m in (model, windows)]
    opened(model)
    assert fingerprint(model) != names[0] and fingerprint(windows) == names[1]


@pytest.mark.parametrize("what", ["lora", "prompt"])
def test_an_adapter_trains_saves_and_loads_the_gates(what: str, tmp_path: Path) -> None:
    base = base_folder(tmp_path)
    fam = {"block_size": B, "memory_segments": 0, "fam_length": 0, "compressive_memory": "delta"}
    made = short(tmp_path, base, fam=fam, train={"what": what})
    start: Tensor = adaptation.load_for_training(made)[0].get_decoder().memory_gates.weight
    trained = trained_on(made).model
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    gates = [tensor for name, tensor in saved.items() if "memory_gates" in name]
    assert len(gates) == 1 and bool((gates[0] != start).all())
    assert what == "lora" or len(saved) == 1

    model = loaded(tmp_path / "adapter")
    assert is_trained(model) and is_trained(model, model.fam_config.replace(block_size=B + 1))
    assert not is_trained(model, FamConfig(fam_length=2))  # its prompt would be new
    assert not is_trained(load(base, made.fam)[0])
    assert torch.equal(model.model.memory_gates.weight, gates[0])
    torch.testing.assert_close(logits(model), logits(trained), rtol=1e-4, atol=1e-4)

    more = short(tmp_path, base, "second", fam=fam, model={"adapter": str(tmp_path / "adapter")})
    torch.testing.assert_close(logits(adaptation.load_for_training(more)[0]), logits(trained))


def test_an_adapter_of_windows_leaves_the_gates_to_the_model(tmp_path: Path) -> None:
    base = base_folder(tmp_path)
    trained_on(short(tmp_path, base, fam={"block_size": B, "fam_length": 0}))
    model = put_adapter(
        converted(DELTA, dtype=torch.float32), str(tmp_path / "adapter"), trainable=True
    )
    assert not is_trained(load(str(tmp_path / "adapter"), DELTA)[0])
    assert any("memory_gates" in name for name in adaptation.trained_parameters(model))
