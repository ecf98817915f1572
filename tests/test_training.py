"""Gradients: through blocks, calls, checkpoints, adapters, compilers and half precision."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import some_tokens, tiny
from oracle import make_exact
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from variants import VARIANTS

from transformerfam import FamConfig, Memory, convert

B = 6
CONFIG = FamConfig.paper(block_size=B, memory_segments=1, fam_length=3, sink_tokens=1)
LENGTH = 3 * B + 2
Gradients = dict[str, Tensor]


def build(config: FamConfig = CONFIG, **changes: Any) -> PreTrainedModel:
    """By default a Llama in float64 throughout, so that gradients can be compared closely."""
    model = tiny(**{"num_hidden_layers": 2, **changes})
    return convert(model if changes.keys() & {"family", "dtype"} else make_exact(model), config)


def checkpointed(model: PreTrainedModel, **options: Any) -> PreTrainedModel:
    """In training mode and with activation checkpointing, under its newest name."""
    model.train()
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)(*([options] if options else []))
    return model


def gradients(model: Any) -> Gradients:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(ours: Gradients, theirs: Gradients, atol: float = 1e-9) -> None:
    assert ours.keys() == theirs.keys() and ours
    far = {name: float((ours[name] - theirs[name]).abs().max()) for name in ours}
    assert max(far.values()) <= atol, {name: error for name, error in far.items() if error > atol}


def whole(model: Any, ids: Tensor, **options: Any) -> Gradients:
    """The gradients of one call over everything, of a loss that weighs every logit differently."""
    logits = model(input_ids=ids, use_cache=False, **options).logits
    weighed(logits, 0).backward()
    return gradients(model)


def weighed(logits: Tensor, start: int) -> Tensor:
    steps = torch.arange(start + 1, start + 1 + logits.shape[1], dtype=logits.dtype)
    return (logits * steps[:, None].sin() * torch.arange(logits.shape[2]).cos()).sum()


# ---- loss


@pytest.mark.parametrize("family", ["Llama", "Gemma 2"])
def test_labels_give_the_cross_entropy_of_the_next_token(family: str) -> None:
    model = build(family=family)
    ids = some_tokens(2, LENGTH)
    labels = ids.clone()
    labels[0, :5] = -100
    with torch.no_grad():
        out = model(ids, labels=labels)
    flat = out.logits[:, :-1].flatten(0, 1).float()
    expected = torch.nn.functional.cross_entropy(flat, labels[:, 1:].flatten())
    torch.testing.assert_close(out.loss.float(), expected)


def test_a_few_steps_lower_the_loss() -> None:
    model, ids = build(dtype=torch.float32).train(), some_tokens(2, LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2


# ---- activation checkpointing


@pytest.mark.parametrize("first_residual", ["zero", "prompt"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention": "full", "sink_tokens": 0},
        {"feedback_norm": "rms", "previous_fams": 2},
        {"fam_length": 0},
    ],
    ids=str,
)
def test_checkpointing_changes_no_gradient(first_residual: str, changes: dict[str, Any]) -> None:
    config = CONFIG.replace(first_residual=first_residual, **changes)
    ids = some_tokens(2, LENGTH)
    expected = whole(build(config), ids)
    assert ("model.fam_prompt.weight" in expected) == config.has_feedback
    assert_same(whole(checkpointed(build(config)), ids), expected)


@pytest.mark.parametrize("first_residual", ["zero", "prompt"])
@pytest.mark.parametrize("lengths", [(LENGTH, 3), (LENGTH, B), (3, 0), (2 * B, B - 1)])
def test_checkpointing_of_rows_of_different_lengths(
    first_residual: str, lengths: tuple[int, int]
) -> None:
    config = CONFIG.replace(first_residual=first_residual)
    ids, mask = some_tokens(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, : LENGTH - length] = 0
    # In training the prompt has a gradient in every call, if only of zero.
    expected = whole(build(config).train(), ids, attention_mask=mask)
    assert_same(whole(checkpointed(build(config)), ids, attention_mask=mask), expected)


@pytest.mark.parametrize("family", ["Gemma 3 (text)", "GPT-NeoX", "Mixtral", "Cohere 2"])
def test_checkpointing_in_other_families(family: str) -> None:
    ids = some_tokens(1, LENGTH)
    expected = whole(build(family=family, dtype=torch.float32), ids)
    model = checkpointed(build(family=family, dtype=torch.float32))
    assert_same(whole(model, ids), expected, atol=1e-4)


def test_checkpointing_with_a_memory_that_is_carried() -> None:
    ids = some_tokens(1, LENGTH)
    assert_same(carried(checkpointed(build()), ids, 4), whole(build(), ids))


def test_checkpointing_that_runs_layers_as_their_own_graphs_is_refused() -> None:
    with pytest.raises(ValueError, match="use_reentrant=True; leave it out"):
        checkpointed(build(), use_reentrant=True)


# ---- a memory that carries gradients from call to call


def carried(model: Any, ids: Tensor, tokens: int, detach: bool = False) -> Gradients:
    """Gradients of the same loss read in pieces, and backward through all of them at the end."""
    memory, loss = Memory.for_model(model, ids.shape[0]), torch.zeros((), dtype=torch.float64)
    for start in range(0, ids.shape[1], tokens):
        out = model(input_ids=ids[:, start : start + tokens], past_key_values=memory)
        loss = loss + weighed(out.logits, start)
        memory = memory.detach() if detach else memory
    loss.backward()
    return gradients(model)


@pytest.mark.parametrize("name", ["paper", "stopped gradient", "xl with sinks, stopped"])
@pytest.mark.parametrize("tokens", [1, 2, B - 1, B, B + 1])
def test_gradients_flow_through_a_carried_memory(tokens: int, name: str) -> None:
    model, ids = build(VARIANTS[name]), some_tokens(2, LENGTH)
    assert_same(carried(model, ids, tokens), whole(model, ids))


@pytest.mark.parametrize("trainable", ["q_proj", "v_proj", "o_proj", "fam_prompt", "lm_head"])
def test_writing_into_a_memory_spoils_no_gradient(trainable: str) -> None:
    """Where only some weights are trained, keys need no gradient themselves but others need them."""
    model, ids = build(), some_tokens(1, LENGTH)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable in name)
    expected = whole(model, ids)
    for tokens in (1, 2, B):
        assert_same(carried(model, ids, tokens), expected)


def test_reading_on_without_gradients_spoils_none() -> None:
    model, ids = build(), some_tokens(1, LENGTH)
    memory = Memory.for_model(model)
    loss = weighed(model(ids[:, :B], past_key_values=memory).logits, 0)
    loss = loss + weighed(model(ids[:, B : B + 2], past_key_values=memory).logits, B)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for token in range(3):
                model(ids[:, token : token + 1], past_key_values=memory)
    loss.backward()
    assert_same(gradients(model), whole(model, ids[:, : B + 2]))


def test_detaching_truncates_backpropagation() -> None:
    model, ids = build(), some_tokens(1, 2 * B)
    embeds = model.get_input_embeddings()(ids[:, :B]).detach().requires_grad_()
    for detach in (True, False):
        memory = model(inputs_embeds=embeds).past_key_values
        memory = memory.detach() if detach else memory
        loss = model(ids[:, B:], past_key_values=memory).logits.sum()
        (gradient,) = torch.autograd.grad(loss, embeds, allow_unused=True)
        if detach:
            assert gradient is None
        else:
            assert gradient is not None and bool(gradient.any())
    truncated = carried(model, ids, B, detach=True)
    through = carried(model, ids, B)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.allclose(truncated[name], through[name])


def test_the_prompt_learns_only_where_a_stream_begins() -> None:
    model, ids = build(), some_tokens(1, 2 * B)
    memory = model(ids[:, :B]).past_key_values.detach()
    model(ids[:, B:], past_key_values=memory).logits.sum().backward()
    prompt = "model.fam_prompt.weight"
    assert prompt not in gradients(model)
    model(ids).logits.sum().backward()
    assert bool(gradients(model)[prompt].any())


def test_embeddings_get_gradients_through_feedback_alone() -> None:
    """Without memory segments, block 0 reaches block 4 through FAM and nothing else."""
    model = build(CONFIG.replace(memory_segments=0, sink_tokens=0))
    embeds = model.get_input_embeddings()(some_tokens(1, 5 * B)).detach().requires_grad_()
    model(inputs_embeds=embeds).logits[0, -1].sum().backward()
    assert bool((embeds.grad[0].abs().amax(1) > 0).all())


# ---- dropout


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_attention_dropout_works_in_training_alone(backend: str) -> None:
    model = build(CONFIG.replace(backend=backend), attention_dropout=0.3)
    ids = some_tokens(1, LENGTH)
    with torch.no_grad():
        quiet = model(ids).logits
        assert torch.equal(model(ids).logits, quiet)
        model.train()
        torch.manual_seed(0)
        noisy = model(ids).logits
        assert not torch.allclose(noisy, quiet)
        assert not torch.allclose(model(ids).logits, noisy)
        torch.manual_seed(0)
        assert torch.equal(model(ids).logits, noisy)
        model.eval()
        assert torch.equal(model(ids).logits, quiet)


def test_checkpointing_repeats_the_same_dropout() -> None:
    ids, found = some_tokens(1, LENGTH), []
    for model in (build(attention_dropout=0.3).train(), checkpointed(build(attention_dropout=0.3))):
        torch.manual_seed(0)
        found.append(whole(model, ids))
    assert_same(found[0], found[1])


# ---- adapters


@pytest.fixture
def adapted() -> Any:
    return adapt(build(dtype=torch.float32))


def adapt(model: PreTrainedModel) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    return peft.get_peft_model(
        model,
        peft.LoraConfig(target_modules="all-linear", modules_to_save=["fam_prompt"], lora_alpha=64),
    )


def train(model: Any, steps: int = 3) -> None:
    ids = some_tokens(2, LENGTH)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


def test_an_adapter_trains_the_prompt_and_nothing_of_the_model(adapted: Any) -> None:
    before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    train(adapted)
    changed = {n for n, p in adapted.named_parameters() if not torch.equal(p, before[n])}
    prompts = {n for n in changed if "fam_prompt" in n}
    assert len(prompts) == 1 and "modules_to_save" in prompts.pop()
    assert all("lora_" in name or "modules_to_save" in name for name in changed)
    assert {n for n in before if "lora_B" in n} <= changed


@pytest.mark.parametrize("family", ["Llama", "Gemma 3 (text)", "Phi-3", "GPT-NeoX"])
def test_an_adapter_is_saved_loaded_and_merged(family: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = build(family=family, dtype=torch.float32)
    plain = copy.deepcopy(model)
    adapted, ids = adapt(model), some_tokens(2, LENGTH)
    with torch.no_grad():
        untrained = plain(ids).logits
        torch.testing.assert_close(adapted(input_ids=ids).logits, untrained)
    train(adapted)
    adapted.eval()
    with torch.no_grad():
        expected = adapted(input_ids=ids).logits
    assert not torch.allclose(expected, untrained, atol=1e-2)

    adapted.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, expected)
    merged = loaded.merge_and_unload()
    assert type(merged) is type(model)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, expected, rtol=0, atol=1e-3)
        assert torch.equal(again(ids).logits, merged(ids).logits)


def test_an_adapter_with_checkpointing_has_the_same_gradients() -> None:
    ids = some_tokens(1, LENGTH)
    found = []
    for checkpoint in (False, True):
        model = adapt(build())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.add_(0.1)
        found.append(whole(checkpointed(model) if checkpoint else model, ids))
    assert_same(found[0], found[1])
    assert any("fam_prompt" in name for name in found[0])


def test_an_adapter_of_some_layers_trains_through_a_carried_memory() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        build(), peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    ids = some_tokens(1, LENGTH)
    assert_same(carried(model, ids, 2), whole(model, ids))


# ---- half precision


def test_bfloat16_is_close_to_float32() -> None:
    ids = some_tokens(2, LENGTH)
    with torch.no_grad():
        exact = build(dtype=torch.float32)(ids).logits
        rounded = build(dtype=torch.bfloat16)(ids).logits
        whole_call = build(dtype=torch.bfloat16)
        memory, pieces = None, []
        for piece in ids.split(4, dim=1):
            out = whole_call(piece, past_key_values=memory)
            memory = out.past_key_values
            pieces.append(out.logits)
    assert rounded.dtype == torch.bfloat16
    for logits in (rounded, torch.cat(pieces, 1)):
        error = (logits.float() - exact).norm() / exact.norm()
        assert float(error) < 0.03


@pytest.mark.parametrize("norm", ["rms", 100.0])
def test_float16_bounds_feedback_that_is_large(norm: str | float) -> None:
    """The square of 300 is more than float16 can hold."""
    config = CONFIG.replace(feedback_norm=norm)
    models = [build(config, dtype=dtype) for dtype in (torch.float16, torch.float32)]
    fams = []
    for model in models:
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.down_proj.weight.mul_(600)
            memory = model(some_tokens(1, 2 * B)).past_key_values
        fams.append(memory.fams[0].float())
    assert bool(fams[1].abs().max() > 0.5)
    torch.testing.assert_close(fams[0], fams[1], rtol=0.1, atol=0.05 * float(fams[1].abs().max()))


def test_autocast_is_close_to_float32_and_carries_memories_across() -> None:
    model, ids = build(dtype=torch.float32), some_tokens(1, LENGTH)
    expected = whole(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids, use_cache=False).logits
        weighed(logits.float(), 0).backward()
        found = gradients(model)
        with torch.no_grad():
            memory = model(ids[:, : B + 2]).past_key_values
            for start in range(B + 2, LENGTH, 4):
                out = model(ids[:, start : start + 4], past_key_values=memory)
                torch.testing.assert_close(
                    out.logits, logits[:, start : start + 4].detach(), rtol=0, atol=0.15
                )
    for name in expected:
        assert float((found[name] - expected[name]).norm()) < 0.1 * float(expected[name].norm())


# ---- compilers


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of itself
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_model_equals_the_eager_one(backend: str) -> None:
    model, ids = build(dtype=torch.float32, num_hidden_layers=1), some_tokens(1, 2 * B + 2)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        expected = model(ids).logits
        torch.testing.assert_close(compiled(ids).logits, expected, rtol=0, atol=1e-4)
        memory, pieces = None, []
        for piece in ids.split(B, dim=1):
            out = compiled(piece, past_key_values=memory)
            memory = out.past_key_values
            pieces.append(out.logits)
        torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=0, atol=1e-4)
    eager = whole(model, ids)
    weighed(compiled(ids, use_cache=False).logits, 0).backward()
    assert_same(gradients(model), eager, atol=1e-3)
