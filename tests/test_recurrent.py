"""Memory through the whole stack (RMT, AutoCompressors) against plain loops over plain models.

The plain twin knows nothing of the package: for each block it sends [memory ; block ; memory] as one
sequence of embeddings through the original model of transformers, with a mask of its own.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import VOCABULARY, converted, some_tokens, tiny
from oracle import make_exact
from torch import Tensor

from transformerfam import FamConfig, Memory, convert
from transformerfam.auxiliary import FeedbackLosses
from transformerfam.conversion import reconfigure
from transformerfam.data.examples import Example
from transformerfam.readers import readers_of
from transformerfam.stream import absorb, generate, read
from transformerfam.tasks.questions import Recite
from transformerfam.training.adaptation import adapt
from transformerfam.training.recipe import Recipe
from transformerfam.training.trainer import Trainer

B, N = 5, 3
KINDS = ("rmt", "autocompressor")
T = 4 * B + 2


def config(kind: str, **changes: Any) -> FamConfig:
    geometry: dict[str, Any] = {"block_size": B, "memory_segments": 0, "fam_length": N}
    return FamConfig(**{**geometry, "recurrence": kind, **changes})


def mask_of(kind: str, front: int, tokens: int, back: int) -> Tensor:
    """(1, 1, L, L) additive, float64."""
    length = front + tokens + back
    sees = torch.tril(torch.ones(length, length, dtype=torch.bool))
    if kind == "rmt":
        sees[:front, :front] = True
        sees[front + tokens :, front + tokens :] = True
    return torch.where(sees, 0.0, float("-inf")).double()[None, None]


def plainly(plain: Any, kind: str, ids: Tensor, prompt: Tensor) -> Tensor:
    """Logits (R, T, V) by the papers' formulas: a loop over blocks, each read from the start."""
    rows = len(ids)
    first = prompt.expand(rows, -1, -1)
    memory = first if kind == "rmt" else first[:, :0]
    logits = []
    for block in ids.split(B, dim=1):
        embeds = plain.get_input_embeddings()(block)
        back = first[:, :0]
        if block.shape[1] == B:
            back = memory if kind == "rmt" else first
        length = memory.shape[1] + block.shape[1] + back.shape[1]
        hidden = plain.model(
            inputs_embeds=torch.cat([memory, embeds, back], dim=1),
            attention_mask=mask_of(kind, memory.shape[1], block.shape[1], back.shape[1]),
            position_ids=torch.arange(length)[None],
            use_cache=False,
        ).last_hidden_state
        end = memory.shape[1] + block.shape[1]
        logits.append(plain.lm_head(hidden[:, memory.shape[1] : end]))
        if block.shape[1] == B:
            written = hidden[:, end:]
            memory = written if kind == "rmt" else torch.cat([memory, written], dim=1)
    return torch.cat(logits, dim=1)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def pair(kind: str, **changes: Any) -> tuple[Any, Any, Tensor]:
    """The original model, converted, and its prompt."""
    plain = make_exact(tiny(attn_implementation="sdpa"))
    model = convert(copy.deepcopy(plain), config(kind, **changes))
    return plain, model, model.model.fam_prompt.weight


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("length", [1, B - 1, B, B + 1, T])
def test_logits_are_those_of_plain_loops(kind: str, length: int, backend: str) -> None:
    plain, model, prompt = pair(kind, backend=backend)
    ids = some_tokens(2, length)
    with torch.no_grad():
        torch.testing.assert_close(
            model(ids).logits, plainly(plain, kind, ids, prompt), rtol=0, atol=1e-9
        )


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_through_all_blocks_are_those_of_plain_loops(
    kind: str, checkpointed: bool
) -> None:
    plain, model, prompt = pair(kind)
    ids = some_tokens(2, T)
    weights = torch.randn(2, T, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    if checkpointed:
        model.train()
        model.activation_checkpointing_enable()
    (model(ids, use_cache=False).logits * weights).sum().backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters()}
    prompt = prompt.detach().clone().requires_grad_()
    (plainly(plain, kind, ids, prompt) * weights).sum().backward()
    theirs = {n: p.grad for n, p in plain.named_parameters()}
    theirs["model.fam_prompt.weight"] = prompt.grad
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        torch.testing.assert_close(
            ours[name], grad, rtol=1e-5, atol=2e-6 * float(grad.abs().max()), msg=name
        )


def pieces(ids: Tensor, sizes: tuple[int, ...]) -> Iterator[Tensor]:
    yield from ids.split(list(sizes), dim=1)


@pytest.mark.parametrize("sizes", [(1,) * T, (3, 9, 1, 9), (B, B, 2 * B + 2), (2, 3, T - 5)])
def test_any_split_is_the_same(kind: str, sizes: tuple[int, ...]) -> None:
    model = pair(kind)[1]
    ids = some_tokens(2, T)
    with torch.no_grad():
        whole = model(ids, use_cache=True)
        memory, said = Memory.for_model(model, 2), []
        for piece in pieces(ids, sizes):
            said.append(model(piece, past_key_values=memory).logits)
    torch.testing.assert_close(torch.cat(said, 1), whole.logits, rtol=0, atol=1e-9)
    other = whole.past_key_values
    assert memory.position == other.position == (T, T)
    for (name, ours), (same, theirs) in zip(memory.tensors(), other.tensors(), strict=True):
        assert name == same
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_gradients_flow_through_a_carried_memory_up_to_where_it_is_cut(kind: str) -> None:
    model = pair(kind)[1]
    ids = some_tokens(1, T)
    (model(ids, use_cache=False).logits[:, -1]).sum().backward()
    whole = model.model.fam_prompt.weight.grad.clone()
    for cut in (False, True):
        model.zero_grad()
        memory = Memory.for_model(model)
        model(ids[:, :7], past_key_values=memory)
        if cut:
            memory = memory.detach()
        model(ids[:, 7:], past_key_values=memory).logits[:, -1].sum().backward()
        ours = model.model.fam_prompt.weight.grad
        ours = (
            torch.zeros_like(whole) if ours is None else ours
        )  # RMT reads the prompt at first only
        assert torch.allclose(ours, whole, rtol=1e-9, atol=1e-12) != cut


def test_rows_side_by_side_are_rows_alone_forked_selected_and_begun_again(kind: str) -> None:
    model = pair(kind)[1]
    ids = some_tokens(3, T)
    memory = Memory.for_model(model, 3)
    with torch.no_grad():
        model(ids[:, :8], past_key_values=memory)
        kept = memory.fork()
        batched = model(ids[:, 8:], past_key_values=memory).logits
        for row in range(3):
            one = kept.select_rows([row])
            alone = model(ids[row : row + 1, 8:], past_key_values=one).logits
            torch.testing.assert_close(alone[0], batched[row], rtol=0, atol=1e-9)
        again = kept.restart((True,) * 3)
        assert again.position == (0, 0, 0)
        fresh = model(ids, past_key_values=again).logits
        torch.testing.assert_close(fresh[:, 8:], batched, rtol=0, atol=1e-9)


def test_generate_continues_token_by_token_as_at_once(kind: str) -> None:
    model = pair(kind)[1]
    ids = some_tokens(1, 8)
    made = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)[0]
    assert made[8:].tolist() == list(generate(model, ids[0].tolist(), max_new_tokens=12))
    with torch.no_grad():
        at_once = model(made[None]).logits[0].argmax(-1)
    assert at_once[7:-1].tolist() == made[8:].tolist()


def test_a_stream_is_saved_and_goes_on(kind: str, tmp_path: Path) -> None:
    model = pair(kind)[1]
    ids = some_tokens(1, T)[0].tolist()
    for place in (2, B, 2 * B, 2 * B + 3):
        memory = absorb(model, ids[:place])
        memory.save(tmp_path / "m.safetensors", model)
        loaded = Memory.load(tmp_path / "m.safetensors", model)
        assert loaded.nbytes == memory.nbytes
        ours = [c.losses for c in read(model, ids[place:], loaded)]
        theirs = [c.losses for c in read(model, ids[place:], memory)]
        torch.testing.assert_close(torch.cat(ours), torch.cat(theirs), rtol=0, atol=0)


def test_state_is_as_large_as_said(kind: str) -> None:
    """S·d of written rows, and two times Hk·D of S + B rows in each layer before a block ends."""
    model = pair(kind)[1]
    memory = Memory.for_model(model)
    ids = some_tokens(1, 20 * B)
    layers, width, d, number = 3, 2 * 8, 32, 8
    with torch.no_grad():
        for block in range(4):
            start = block * B
            model(ids[:, start : start + B - 1], past_key_values=memory)
            in_front = N if kind == "rmt" else block * N
            kept = in_front if block else 0
            held = layers * 2 * width * (in_front + B - 1) + kept * d
            assert memory.nbytes == held * number
            model(ids[:, start + B - 1 : start + B], past_key_values=memory)
            written = N if kind == "rmt" else (block + 1) * N
            assert memory.nbytes == written * d * number
            held_in_storage = sum(t.untyped_storage().nbytes() for _, t in memory.tensors())
            assert held_in_storage == memory.nbytes


@pytest.mark.parametrize("family", ["Gemma 2", "Gemma 3 (text)", "Granite", "GPT-NeoX", "Cohere 2"])
def test_families_that_scale_or_window_read_the_same_in_pieces(kind: str, family: str) -> None:
    model = converted(config(kind), family)
    ids = some_tokens(2, T)
    with torch.no_grad():
        whole = model(ids).logits
        memory, said = None, []
        for piece in pieces(ids, (7, 1, T - 8)):
            output = model(piece, past_key_values=memory, use_cache=True)
            memory = output.past_key_values
            said.append(output.logits)
        torch.testing.assert_close(torch.cat(said, 1), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["Gemma 2", "Gemma 3 (text)", "Granite"])
def test_memory_tokens_enter_in_the_scale_that_the_first_layer_reads(
    kind: str, family: str
) -> None:
    """The first layer reads the rows of the prompt as they are, in the scale of its tokens."""
    plain = tiny(family)
    model = convert(copy.deepcopy(plain), config(kind), prompt="vocabulary", seed=3)
    ids = some_tokens(1, B)
    seen: list[Tensor] = []
    layer = model.model.layers[0].input_layernorm
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(ids)
    torch.testing.assert_close(seen[0][0, -N:], model.model.fam_prompt.weight, rtol=0, atol=0)
    drawn = torch.randint(64, (N,), generator=torch.Generator().manual_seed(3))
    entered: list[Tensor] = []
    layer = plain.model.layers[0].input_layernorm
    layer.register_forward_pre_hook(lambda module, args: entered.append(args[0].detach()))
    with torch.no_grad():
        plain(drawn[None], use_cache=False)
    torch.testing.assert_close(entered[0][0], seen[0][0, -N:], rtol=1e-6, atol=1e-6)


def test_a_familys_own_window_holds_for_memory_tokens_too() -> None:
    """Mistral's layers see w places back; the plain model with the same places says the same."""
    plain = tiny("Mistral", sliding_window=4)
    model = convert(copy.deepcopy(plain), config("autocompressor"))
    prompt, ids = model.model.fam_prompt.weight, some_tokens(1, 2 * B)
    with torch.no_grad():
        first = plain.model(
            inputs_embeds=torch.cat([plain.model.embed_tokens(ids[:, :B]), prompt[None]], 1)
        ).last_hidden_state
        both = torch.cat([first[:, B:], plain.model.embed_tokens(ids[:, B:])], 1)
        expected = plain(inputs_embeds=both).logits[:, N:]
        torch.testing.assert_close(model(ids).logits[:, B:], expected, rtol=0, atol=1e-5)


def test_memory_carries_what_blocks_do_not_see(kind: str) -> None:
    model = pair(kind)[1]
    ids = some_tokens(1, T)
    other = ids.clone()
    other[0, 0] = 3 + (other[0, 0] - 2) % 60
    with torch.no_grad():
        assert (model(ids).logits[0, -1] - model(other).logits[0, -1]).abs().max() > 1e-9
        alone = reconfigure(model, config(kind).without_feedback().replace(sink_tokens=0))
        assert torch.equal(alone(ids).logits[0, -1], alone(other).logits[0, -1])


def test_a_bias_hides_the_memory(kind: str) -> None:
    """With a very negative bias on memory tokens a block reads as if nothing stood before it."""
    model = pair(kind, fam_bias=-1e4)[1]
    ids = some_tokens(1, 2 * B)
    with torch.no_grad():
        alone = model(ids[:, B:]).logits
        torch.testing.assert_close(model(ids).logits[:, B:], alone, rtol=0, atol=1e-9)


class Counting:
    """Texts that count up from a random token."""

    def draw(self, number: int) -> Example:
        first = random.Random(f"text/{number}").randrange(VOCABULARY)
        ids = [3 + (first + i) % (VOCABULARY - 3) for i in range(4 * B)]
        return Example(tuple(ids), (1.0,) * len(ids))


@pytest.mark.parametrize("bptt_blocks", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_few_steps_of_training_lower_the_loss(kind: str, bptt_blocks: int) -> None:
    recipe = Recipe.from_dict(
        {
            "fam": {n: v for n, v in config(kind).to_dict().items() if v is not None},
            "train": {"rank": 4},
            "data": {"layout": "single", "length": 4 * B, "batch_size": 4},
            "optimizer": {"learning_rate": 2e-2},
            "feedback": {"bptt_blocks": bptt_blocks, "bias_steps": 3},
            "run": {"steps": 8, "activation_checkpointing": not bptt_blocks},
        }
    )
    model = adapt(converted(recipe.fam, dtype=torch.float32), recipe.train, seed=0)
    before = model.get_base_model().model.fam_prompt.weight.detach().clone()
    losses = Trainer(recipe, model, Counting(), quiet=True).run().losses
    first, last = (float(loss or 0.0) for loss in (losses[0], losses[-1]))
    assert 0 < last < first - 0.1
    assert not torch.equal(model.get_base_model().model.fam_prompt.weight, before)


def test_a_model_is_saved_loaded_and_read_with_its_windows(kind: str, tmp_path: Path) -> None:
    model = converted(config(kind), dtype=torch.float32)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.fam_config == config(kind)
    ids = some_tokens(1, T)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    windows = readers_of(model, ["model", "bswa", "sinks", "full"], full_limit=None)
    assert [r.config.recurrence for r in windows] == [kind, "layer", "layer", "layer"]


def test_questions_of_evaluation_are_asked_and_leave_the_memory(kind: str) -> None:
    model = pair(kind)[1]
    ids = some_tokens(1, T)[0].tolist()
    answer = list(generate(model, ids, max_new_tokens=B + 1))
    assert Recite(ids, answer).ask(model)["exact"] == 1.0
    wrong = [*answer[:-1], (answer[-1] + 1) % 64]
    assert Recite(ids, wrong).ask(model)["exact"] == 0.0


def test_a_failing_call_leaves_the_memory(kind: str) -> None:
    model = pair(kind)[1]
    memory = Memory.for_model(model)
    with torch.no_grad():
        model(some_tokens(1, 7), past_key_values=memory)
        before = {name: t.clone() for name, t in memory.tensors()}
        with pytest.raises(IndexError):
            model(some_tokens(1, 7), past_key_values=memory, logits_to_keep=torch.tensor([99]))
    assert memory.position == (7,)
    for name, tensor in memory.tensors():
        assert torch.equal(tensor, before[name])


def test_what_cannot_be_is_refused_with_one_sentence(kind: str) -> None:
    model = pair(kind)[1]
    ids = some_tokens(2, 6)
    mask = torch.ones(2, 6)
    mask[0, 0] = 0
    with pytest.raises(ValueError, match="Rows cannot be padded under recurrence"):
        model(ids, attention_mask=mask)
    with pytest.raises(ValueError, match="output_hidden_states is not there"):
        model(ids, output_hidden_states=True)
    for looks in ({"fam_losses": FeedbackLosses(1.0)}, {"fam_observer": lambda seen: None}):
        with pytest.raises(ValueError, match="fam_losses and fam_observer look at the FAM of each"):
            model(ids, **looks)
    memory = Memory.for_model(model, 2)
    with torch.no_grad():
        model(ids, past_key_values=memory)
        with pytest.raises(ValueError, match="must stand equally far"):
            model(ids, past_key_values=memory.restart((True, False)))
    with pytest.raises(ValueError, match="layers have none"):
        Memory.for_model(model).begin_with([torch.zeros(1, N, 32)] * 3)
    with pytest.raises(ValueError, match="made with another recurrence"):
        model(ids, past_key_values=Memory(FamConfig.paper(**_other()), 2, 3))


def _other() -> dict[str, Any]:
    changes: dict[str, Any] = config("rmt").to_dict()
    return {**changes, "recurrence": "layer"}
