"""`generate` of transformers: every mode that can work does, through block boundaries and turns."""

from __future__ import annotations

import string
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from families import converted, some_tokens, tiny
from tokenizers import Tokenizer, models
from tokenizers.decoders import Fuse
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast
from transformers.generation.streamers import BaseStreamer

from transformerfam import FamConfig, Memory

B = 6
CONFIG = FamConfig.paper(block_size=B, memory_segments=1, fam_length=3, sink_tokens=1)
NEW = 2 * B + 2
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "max_new_tokens": NEW}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return converted(CONFIG, num_hidden_layers=2)


@torch.no_grad()
def greedily(model: PreTrainedModel, ids: Tensor, new: int = NEW) -> Tensor:
    """The definition: read everything again for every new token."""
    for _ in range(new):
        best = model(ids, use_cache=False).logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, best], 1)
    return ids


# ---- greedily


@pytest.mark.parametrize("length", [1, B - 1, B, B + 1, 4 * B + 1])
def test_greedy_equals_reading_everything_again(model: PreTrainedModel, length: int) -> None:
    ids = some_tokens(2, length)
    expected = greedily(model, ids)
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    assert torch.equal(model.generate(ids, use_cache=False, **GREEDY), expected)


@pytest.mark.parametrize("family", ["Gemma 3 (text)", "GPT-NeoX", "Phi-3", "Cohere 2", "SmolLM3"])
def test_other_families(family: str) -> None:
    model = converted(CONFIG, family)
    ids = some_tokens(1, B + 2)
    assert torch.equal(model.generate(ids, **GREEDY), greedily(model, ids))


def test_a_family_that_drops_its_cache_on_long_texts_keeps_its_memory() -> None:
    """Phi-3's own `generate` starts over where its positions are stretched."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.5],
        "long_factor": [2.0, 4.0],
        "original_max_position_embeddings": 16,
        "partial_rotary_factor": 0.5,
    }
    model = converted(CONFIG, "Phi-3", rope_parameters=rope, original_max_position_embeddings=16)
    ids, memory = some_tokens(1, B), Memory.for_model(model)
    out = model.generate(ids, past_key_values=memory, **GREEDY)
    assert torch.equal(out, greedily(model, ids))
    assert memory.position == (B + NEW - 1,)


def test_a_ragged_batch_equals_each_row_alone(model: PreTrainedModel) -> None:
    ids = some_tokens(3, 2 * B + 1)
    mask = torch.ones_like(ids)
    mask[1, : B + 3] = 0
    mask[2, :-1] = 0
    out = model.generate(ids, attention_mask=mask, **GREEDY)
    beams = model.generate(ids, attention_mask=mask, num_beams=2, **GREEDY)
    for row in range(3):
        alone = ids[row][mask[row].bool()][None]
        assert torch.equal(out[row, -NEW:], greedily(model, alone)[0, -NEW:])
        assert torch.equal(
            beams[row, -NEW:], model.generate(alone, num_beams=2, **GREEDY)[0, -NEW:]
        )


@pytest.mark.parametrize("chunk", [1, 4, B, 30])
def test_a_long_prompt_can_be_read_in_chunks(model: PreTrainedModel, chunk: int) -> None:
    ids = some_tokens(2, 12 * B + 3)
    expected = model.generate(ids, **GREEDY)
    memory = Memory.for_model(model, 2)
    out = model.generate(ids, prefill_chunk_size=chunk, past_key_values=memory, **GREEDY)
    assert torch.equal(out, expected)
    assert memory.position == (12 * B + 3 + NEW - 1,) * 2


def test_embeddings_instead_of_ids(model: PreTrainedModel) -> None:
    ids = some_tokens(2, B + 2)
    embeds = model.get_input_embeddings()(ids)
    expected = model.generate(ids, **GREEDY)[:, B + 2 :]
    assert torch.equal(model.generate(inputs_embeds=embeds, **GREEDY), expected)


def test_training_mode_with_checkpointing(model: PreTrainedModel) -> None:
    training = converted(CONFIG, num_hidden_layers=2).train()
    enable = getattr(training, "activation_checkpointing_enable", None)  # the name from 5.23 on
    (enable or training.gradient_checkpointing_enable)()
    ids = some_tokens(1, B + 2)
    assert torch.equal(training.generate(ids, **GREEDY), greedily(model, ids))


def test_threads_share_a_model(model: PreTrainedModel) -> None:
    """As in a server: nothing of a stream is kept on the model."""
    texts = [some_tokens(1, 3 + turn, seed=turn) for turn in range(4)]
    expected = [model.generate(text, **GREEDY) for text in texts]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda text: model.generate(text, **GREEDY), texts))
    assert all(torch.equal(a, b) for a, b in zip(together, expected, strict=True))


# ---- rows that end early


def test_a_row_that_ends_early_does_not_disturb_the_others(model: PreTrainedModel) -> None:
    ids = some_tokens(3, B + 2)
    free = model.generate(ids, **GREEDY)
    end = int(free[1, B + 5])
    out = model.generate(ids, **{**GREEDY, "eos_token_id": end, "pad_token_id": 0})
    for row in range(3):
        new = free[row, B + 2 :].tolist()
        length = new.index(end) + 1 if end in new else NEW
        got = out[row, B + 2 :].tolist()
        assert got[:length] == new[: min(length, len(got))]
        assert set(got[length:]) <= {0}


# ---- sampling and several continuations

SAMPLING: dict[str, Any] = {**GREEDY, "do_sample": True, "temperature": 1.5, "top_k": 20}


def sampled(model: PreTrainedModel, ids: Tensor, **options: Any) -> Tensor:
    torch.manual_seed(5)
    return model.generate(ids, **{**SAMPLING, **options})


def test_sampling_is_the_same_with_memory_and_without_for_one_seed(model: PreTrainedModel) -> None:
    ids = some_tokens(2, B + 2)
    out = sampled(model, ids)
    assert torch.equal(out, sampled(model, ids))
    assert torch.equal(out, sampled(model, ids, use_cache=False))
    assert not torch.equal(out, model.generate(ids, **GREEDY))


def test_several_continuations_of_one_stream(model: PreTrainedModel) -> None:
    text, ids = some_tokens(1, 2 * B + 1, seed=3), some_tokens(1, 3)
    whole = sampled(model, torch.cat([text, ids], 1), num_return_sequences=3, use_cache=False)
    with torch.no_grad():
        memory = model(text).past_key_values
    out = sampled(model, ids, num_return_sequences=3, past_key_values=memory)
    assert torch.equal(out[:, 3:], whole[:, -NEW:])
    assert len({tuple(row) for row in out.tolist()}) == 3
    assert memory.position == (2 * B + 1,)  # each continuation went on with a copy
    given = memory.select_rows([0, 0, 0])
    assert torch.equal(sampled(model, ids, num_return_sequences=3, past_key_values=given), out)
    assert given.position == (2 * B + 1 + 3 + NEW - 1,) * 3


# ---- beams


@pytest.mark.parametrize("options", [{}, {"num_return_sequences": 2}, {"length_penalty": 2.0}])
def test_beams_equal_beams_that_read_everything_again(
    model: PreTrainedModel, options: dict[str, Any]
) -> None:
    ids = some_tokens(2, B + 2)
    out = model.generate(ids, num_beams=3, **GREEDY, **options)
    assert torch.equal(out, model.generate(ids, num_beams=3, use_cache=False, **GREEDY, **options))


def test_two_beams_by_hand(model: PreTrainedModel) -> None:
    ids, new = some_tokens(1, B - 1), B + 2
    beams = [(0.0, ids)]
    for _ in range(new):
        candidates = []
        for score, text in beams:
            with torch.no_grad():
                scores = model(text, use_cache=False).logits[0, -1].float().log_softmax(-1)
            top = scores.topk(3)
            for value, token in zip(top.values, top.indices, strict=True):
                candidates.append((score + float(value), torch.cat([text, token[None, None]], 1)))
        beams = sorted(candidates, key=lambda c: -c[0])[:2]
    out = model.generate(ids, num_beams=2, **{**GREEDY, "max_new_tokens": new})
    assert torch.equal(out, beams[0][1])


def test_sampled_beams(model: PreTrainedModel) -> None:
    ids = some_tokens(1, B + 2)
    out = sampled(model, ids, num_beams=3)
    assert torch.equal(out, sampled(model, ids, num_beams=3, use_cache=False))


def test_beams_go_on_from_a_memory(model: PreTrainedModel) -> None:
    text, ids = some_tokens(1, 2 * B + 1, seed=3), some_tokens(1, 3)
    with torch.no_grad():
        memory = model(text).past_key_values
    out = model.generate(ids, past_key_values=memory, num_beams=3, **GREEDY)
    whole = model.generate(torch.cat([text, ids], 1), num_beams=3, use_cache=False, **GREEDY)
    assert torch.equal(out[:, 3:], whole[:, -NEW:])
    assert memory.position == (2 * B + 1,)


# ---- a memory of several turns


def test_several_turns_equal_one_long_stream(model: PreTrainedModel) -> None:
    memory, stream = Memory.for_model(model, 2), torch.zeros(2, 0, dtype=torch.long)
    for turn, length in enumerate((B + 2, 1, 3 * B)):
        said = some_tokens(2, length, seed=turn)
        # The last generated token has not been read yet: it comes first in the next turn.
        new = torch.cat([stream[:, -1:], said], 1)
        stream = torch.cat([stream, said], 1)
        out = model.generate(new, past_key_values=memory, **GREEDY)
        stream = torch.cat([stream, out[:, -NEW:]], 1)
        assert torch.equal(stream, greedily(model, stream[:, :-NEW]))
        assert memory.position == (stream.shape[1] - 1,) * 2


def test_several_turns_with_rows_of_different_lengths(model: PreTrainedModel) -> None:
    memory = Memory.for_model(model, 2)
    rows: list[Tensor] = [torch.zeros(0, dtype=torch.long)] * 2
    last = torch.zeros(2, 0, dtype=torch.long)
    for turn, (a, b) in enumerate(((B + 2, 3), (1, 2 * B))):
        width = max(a, b)
        said = some_tokens(2, width, seed=turn)
        mask = torch.ones(2, last.shape[1] + width, dtype=torch.long)
        new = torch.cat([last, said], 1)
        for row, length in enumerate((a, b)):
            pad = width - length
            # Padding is on the left of all that is new in a row.
            new[row] = torch.cat([said[row, :pad], last[row], said[row, pad:]])
            mask[row, :pad] = 0
            rows[row] = torch.cat([rows[row], said[row, pad:]])
        out = model.generate(new, attention_mask=mask, past_key_values=memory, **GREEDY)
        for row in range(2):
            expected = greedily(model, rows[row][None])[0]
            assert torch.equal(out[row, -NEW:], expected[-NEW:])
            rows[row] = expected
        last = out[:, -1:]
    assert memory.position == tuple(len(row) - 1 for row in rows)


def test_the_memory_comes_back_with_the_rest_of_the_output(model: PreTrainedModel) -> None:
    ids = some_tokens(1, B + 2)
    out = model.generate(
        ids, return_dict_in_generate=True, output_logits=True, output_scores=True, **GREEDY
    )
    assert isinstance(out.past_key_values, Memory)
    assert out.past_key_values.position == (B + 2 + NEW - 1,)
    with torch.no_grad():
        logits = model(out.sequences[:, :-1]).logits[:, -NEW:]
    torch.testing.assert_close(
        torch.stack(out.logits, 1).double(), logits, rtol=0, atol=1e-5
    )  # transformers keeps them in float32
    memory = Memory.for_model(model)
    out = model.generate(ids, past_key_values=memory, return_dict_in_generate=True, **GREEDY)
    assert out.past_key_values is memory


def test_max_length_counts_the_ids_given_not_the_stream(model: PreTrainedModel) -> None:
    memory = Memory.for_model(model)
    for _ in range(3):
        out = model.generate(
            some_tokens(1, 3),
            past_key_values=memory,
            max_length=8,
            do_sample=False,
            eos_token_id=None,
        )
        assert out.shape == (1, 8)
    assert memory.position == (3 * 7,)


def test_generating_changes_nothing_for_the_next_call(model: PreTrainedModel) -> None:
    ids = some_tokens(1, B + 2)
    with torch.no_grad():
        before = model(ids).logits
        model.generate(ids, num_beams=2, **GREEDY)
        assert torch.equal(model(ids).logits, before)


# ---- streamers, stop strings, guidance


class Collector(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_a_streamer_sees_every_token(model: PreTrainedModel) -> None:
    ids, streamer = some_tokens(1, B + 2), Collector()
    out = model.generate(ids, streamer=streamer, **GREEDY)
    assert streamer.tokens == out[0].tolist()
    assert streamer.ended


class Interrupting(BaseStreamer):
    """Somebody presses Ctrl-C at the third token."""

    def __init__(self) -> None:
        self.seen = 0

    def put(self, value: Tensor) -> None:
        self.seen += 1
        if self.seen == 4:  # the prompt came first
            raise KeyboardInterrupt

    def end(self) -> None:
        raise AssertionError


def test_what_is_interrupted_leaves_the_memory_where_it_was(model: PreTrainedModel) -> None:
    ids = some_tokens(1, B + 2)
    memory, untouched = Memory.for_model(model), Memory.for_model(model)
    for each in (memory, untouched):
        model.generate(ids, past_key_values=each, **GREEDY)
    with pytest.raises(KeyboardInterrupt):
        model.generate(ids, past_key_values=memory, streamer=Interrupting(), **GREEDY)
    assert memory.position == untouched.position and not memory.asking
    again = model.generate(ids, past_key_values=memory, **GREEDY)
    assert torch.equal(again, model.generate(ids, past_key_values=untouched, **GREEDY))


def test_stop_strings(model: PreTrainedModel) -> None:
    letters = string.digits + string.ascii_letters + "+-"  # one for each of the 64 ids
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.decoder = Fuse()
    spelled = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    ids = some_tokens(1, B + 2)
    free = model.generate(ids, **GREEDY)[0].tolist()
    stop = spelled.decode(free[B + 2 + 4 : B + 2 + 6])
    memory = Memory.for_model(model)
    out = model.generate(
        ids, past_key_values=memory, stop_strings=[stop], tokenizer=spelled, **GREEDY
    )
    assert out[0].tolist() == free[: B + 2 + 6]
    assert memory.position == (B + 2 + 5,)


def test_guidance_reads_a_second_stream(model: PreTrainedModel) -> None:
    ids = some_tokens(1, B + 2)
    options = {**GREEDY, "guidance_scale": 1.5, "negative_prompt_ids": some_tokens(1, 4, seed=1)}
    out = model.generate(ids, **options)
    assert torch.equal(out, model.generate(ids, use_cache=False, **options))
    assert not torch.equal(out, model.generate(ids, **GREEDY))


def test_an_adapted_model_generates() -> None:
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(
        target_modules="all-linear", modules_to_save=["fam_prompt"], init_lora_weights=False
    )
    model = peft.get_peft_model(converted(CONFIG, num_hidden_layers=2), adapter).eval()
    ids, memory = some_tokens(2, B + 2), Memory.for_model(model, 2)
    out = model.generate(input_ids=ids, past_key_values=memory, **GREEDY)
    assert torch.equal(out, greedily(model, ids))
    assert memory.position == (B + 2 + NEW - 1,) * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = converted(CONFIG, dtype=dtype, num_hidden_layers=2)
    out = model.generate(some_tokens(2, B + 2), **GREEDY)
    assert out.shape == (2, B + 2 + NEW)


# ---- modes that cannot work


@pytest.mark.parametrize("kind", ["static", "quantized", "dynamic", "offloaded"])
def test_other_kinds_of_cache_are_refused_by_name(model: PreTrainedModel, kind: str) -> None:
    with pytest.raises(ValueError, match=f"own memory.*remove cache_implementation='{kind}'"):
        model.generate(some_tokens(1, 3), cache_implementation=kind, **GREEDY)


@pytest.mark.parametrize(
    "mode", ["prompt_lookup_num_tokens", "assistant_model", "assistant_early_exit"]
)
def test_modes_that_take_back_tokens_are_refused(model: PreTrainedModel, mode: str) -> None:
    value = tiny() if mode == "assistant_model" else 2
    with pytest.raises(
        ValueError, match="assisted generation is not supported with stateful models"
    ):
        model.generate(some_tokens(1, 3), **{mode: value}, **GREEDY)


def test_a_memory_cannot_be_read_into_again_and_again(model: PreTrainedModel) -> None:
    memory = Memory.for_model(model)
    with pytest.raises(ValueError, match="use_cache"):
        model.generate(some_tokens(1, 3), past_key_values=memory, use_cache=False, **GREEDY)
    assert memory.position == (0,)


def test_a_model_whose_configuration_says_no_cache() -> None:
    """As training with activation checkpointing leaves it: the memory must not be read twice."""
    model = converted(CONFIG, num_hidden_layers=2)
    model.config.use_cache = model.generation_config.use_cache = False
    memory, ids = Memory.for_model(model), some_tokens(1, B + 2)
    try:
        out = model.generate(ids, past_key_values=memory, **GREEDY)
    except ValueError as error:
        assert "use_cache" in str(error)
        assert memory.position == (0,)
    else:
        assert torch.equal(out, greedily(model, ids))
        assert memory.position == (B + 2 + NEW - 1,)


def test_memories_that_do_not_fit_are_refused(model: PreTrainedModel) -> None:
    for cache, message in (
        (Memory.for_model(model, 3), "3 streams and the input has 2 rows"),
        (DynamicCache(), "not a DynamicCache"),
        (Memory(CONFIG.replace(block_size=7), 2, 2), "block_size"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(some_tokens(2, 3), past_key_values=cache, **GREEDY)
