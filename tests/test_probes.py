"""What is measured during training is what reading and generating would find."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from families import VOCABULARY, converted, some_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from test_text import train
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

import transformerfam
from transformerfam import FamConfig, stream
from transformerfam.data.examples import Example
from transformerfam.data.passkey import PasskeyTexts
from transformerfam.training import probes
from transformerfam.training.probes import HeldOut, Passkey, logits_from, said_right

CONFIG = FamConfig.paper(block_size=4, memory_segments=1, fam_length=2, sink_tokens=1)
MODEL: Any = converted(CONFIG)
TOKENIZER = train("gpt2")


def reader() -> Any:
    """A model for the tokenizer's vocabulary."""
    return converted(CONFIG, dtype=torch.float32, vocab_size=len(TOKENIZER))


# ---- greedy decoding


@settings(max_examples=15, deadline=None)
@given(
    length=st.integers(1, 21),
    answers=st.lists(st.tuples(st.integers(1, 5), st.integers(-1, 4)), min_size=1, max_size=3),
    seed=st.integers(0, 100),
)
def test_what_is_said_right_is_what_greedy_decoding_generates(
    length: int, answers: Sequence[tuple[int, int]], seed: int
) -> None:
    ids = some_tokens(len(answers), length + 5, seed)
    for row, (said, wrong) in enumerate(answers):
        text = ids[row, : length + 5 - said].tolist()
        generated = list(stream.generate(MODEL, text, max_new_tokens=said))
        ids[row, length + 5 - said :] = torch.tensor(generated)
        if 0 <= wrong < said:
            place = length + 5 - said + wrong
            ids[row, place] = (ids[row, place] + 1) % VOCABULARY
    expected = [not 0 <= wrong < said for said, wrong in answers]
    slices = [slice(length + 5 - said, length + 5) for said, _ in answers]
    assert said_right(MODEL, ids, slices) == expected


@pytest.mark.parametrize(("blocks", "tokens"), [(1, 2048), (2, 1), (8, 2048), (3, 16)])
@pytest.mark.parametrize("start", [0, 1, 4, 13, 30])
def test_how_a_text_is_cut_into_calls_does_not_matter(
    blocks: int, tokens: int, start: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "_CHUNK_BLOCKS", blocks)
    monkeypatch.setattr(probes, "_CHUNK_TOKENS", tokens)
    ids = some_tokens(2, 31)
    with torch.no_grad():
        whole = MODEL(input_ids=ids).logits[:, start:]
    torch.testing.assert_close(logits_from(MODEL, ids, start), whole)


# ---- held-out texts


def example(length: int, seed: int, weights: Sequence[float] | None = None) -> Example:
    ids = tuple(some_tokens(1, length, seed)[0].tolist())
    return Example(ids, tuple(weights or [1.0] * length))


def test_the_loss_of_a_text_is_the_one_that_read_finds() -> None:
    texts = {"short": example(5, 0), "long": example(67, 1)}
    found = HeldOut(texts)(MODEL)
    for name, text in texts.items():
        chunks = list(transformerfam.stream.read(MODEL, text.ids, chunk_tokens=7))
        scored = sum(c.scored for c in chunks)
        assert scored == len(text.ids) - 1
        assert found[name] == pytest.approx(sum(c.nats for c in chunks) / scored, rel=1e-6)
    assert found["mean"] == pytest.approx((found["short"] + found["long"]) / 2)


def test_only_tokens_that_count_are_in_the_loss_of_a_text() -> None:
    weights = [0.5, 0.0, 1.0, 0.0, 0.25] + [0.0] * 20 + [2.0]
    text = example(len(weights), 2, weights)
    ids = torch.tensor([text.ids])
    with torch.no_grad():
        each = cross_entropy(MODEL(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none")
    counts = torch.tensor(weights[1:])
    expected = float((each * counts).sum() / counts.sum())
    assert HeldOut({"text": text})(MODEL)["text"] == pytest.approx(expected, rel=1e-6)


# ---- PassKey


def rig(model: Any, ids: Tensor, wrong: Sequence[int] = ()) -> None:
    """Let the model predict exactly the tokens of `ids`, but for the last one of some rows."""
    told = torch.cat([ids, ids[:, :1]], 1)
    told[list(wrong), ids.shape[1] - 1] += 1

    def hook(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        end, count = kwargs["past_key_values"].position[0], output.logits.shape[1]
        next_tokens = told[:, end - count + 1 : end + 1]
        output.logits = one_hot(next_tokens, output.logits.shape[-1]).float()
        return output

    model.register_forward_hook(hook, with_kwargs=True)


@pytest.mark.parametrize("keys", [1, 3])
def test_a_model_that_knows_the_keys_says_them_and_a_random_one_does_not(keys: int) -> None:
    texts = PasskeyTexts(TOKENIZER, lengths=[400], keys=keys)
    probe = Passkey(texts, lengths=[400], samples=4, seed=7)
    model = reader()
    assert probe(model) == {"400": 0.0}
    samples = [texts.sample(random.Random(f"7/probe/400/{n}"), 400) for n in range(4)]
    assert len({sample.key for sample in samples}) == 4
    ids = torch.tensor([sample.example.ids for sample in samples])
    for wrong in ([], [2], [0, 1, 2, 3]):
        model = reader()
        rig(model, ids, wrong)
        assert probe(model) == {"400": 1 - len(wrong) / 4}


@pytest.mark.slow
def test_how_many_texts_are_read_side_by_side_does_not_matter() -> None:
    """Texts without room for filler are of several lengths, and still all of them are counted."""
    texts = PasskeyTexts(TOKENIZER, lengths=[1, 300], digits=1)
    model = reader()
    seen: list[int] = []

    def counted(module: Any, args: Any, kwargs: Any) -> None:
        if kwargs["past_key_values"].position[0] == 0:
            seen.append(len(kwargs["input_ids"]))

    model.register_forward_pre_hook(counted, with_kwargs=True)
    results = []
    for rows in (1, 2, 5):
        seen.clear()
        results.append(Passkey(texts, [1, 300], samples=5, seed=1, rows=rows)(model))
        assert sum(seen) == 10 and max(seen) <= rows
    assert results[0] == results[1] == results[2]
    assert results[0].keys() == {"1", "300"}
