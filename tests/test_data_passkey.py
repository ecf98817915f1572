"""PassKey texts: exactly as long as asked, with the right keys in the right places."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_text import TOKENIZERS, train
from test_turns import CHATML
from tiny_tokenizer import tiny_tokenizer
from tokenizers import decoders
from tokenizers.processors import TemplateProcessing

from transformerfam.data.examples import Example
from transformerfam.data.haystack import sentences_of
from transformerfam.data.passkey import (
    DEFAULT_SENTENCES,
    INTRODUCTION,
    NAMES,
    PasskeySample,
    PasskeyTexts,
)
from transformerfam.errors import UserError
from transformerfam.text import Encoder
from transformerfam.turns import Turns

TOKENIZER = TOKENIZERS["gpt2"]
SENTENCEPIECE = train("sentencepiece")
SENTENCEPIECE.backend_tokenizer.decoder = decoders.Sequence(
    [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
)
KINDS = {**TOKENIZERS, "sentencepiece": SENTENCEPIECE}
BOOK = """It was 1842. "Who waits?" said Ann.
Nobody spoke of the ship that was not there (it had sailed). The harbour lay grey!

A heading without a stop

No. The number 12345 is no key... 海は静かだった。「待つ。」第二章"""
TOLD = re.compile(
    r"The pass key(?: of (\w+))? is (\d+)\. Remember it\. (\d+) is the pass key(?: of (\w+))?\."
)


def shown(ids: Any, tokenizer: Any = TOKENIZER) -> str:
    text: str = tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
    return text


def made(seed: int, length: int, **settings: Any) -> tuple[PasskeySample, str]:
    texts = PasskeyTexts(TOKENIZER, lengths=[length], **settings)
    sample = texts.sample(random.Random(seed))
    return sample, shown(sample.example.ids)


def test_one_key_makes_the_text_of_figure_10() -> None:
    sample, text = made(0, 500)
    begin = (
        f"{INTRODUCTION} The pass key is {sample.key}. Remember it. {sample.key} is the pass key. "
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
        "The grass is green. "
    )
    assert text.startswith(begin)
    assert text.endswith(f" What is the pass key? The pass key is {sample.key}")
    assert len(sample.example.ids) == 500
    assert text.count(sample.key) == 3
    assert re.fullmatch("[1-9][0-9]{4}", sample.key)
    assert sample.depth == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_for_every_tokenizer_the_parts_joined_are_the_text_and_its_tokens(kind: str) -> None:
    texts = PasskeyTexts(KINDS[kind], lengths=[10])  # no filler, so no sentence is cut
    sample = texts.sample(random.Random(3))
    text = shown(sample.example.ids, KINDS[kind])
    assert text == (
        f"{INTRODUCTION} The pass key is {sample.key}. Remember it. {sample.key} is the pass key. "
        f"What is the pass key? The pass key is {sample.key}"
    )
    whole = KINDS[kind](text, add_special_tokens=False)["input_ids"]
    assert list(sample.example.ids) == whole
    assert shown(sample.example.ids[sample.answer], KINDS[kind]).strip() == sample.key
    long = texts.sample(random.Random(3), 700)
    assert len(long.example.ids) == 700
    filler = " ".join(DEFAULT_SENTENCES * 3)
    assert f"{long.key} is the pass key. {filler}" in shown(long.example.ids, KINDS[kind])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    length=st.integers(500, 900),
    keys=st.integers(1, 4),
    where=st.sampled_from(["start", "anywhere", 0.0, 0.3, 1.0]),
    digits=st.integers(2, 7),
)
def test_keys_differ_and_only_the_one_asked_for_is_the_answer(
    seed: int, length: int, keys: int, where: str | float, digits: int
) -> None:
    sample, text = made(seed, length, keys=keys, where=where, digits=digits)
    assert len(sample.example.ids) == length
    told = TOLD.findall(text)
    assert len({key for _, key, _, _ in told}) == len(told) == keys
    assert all(key == again and name == same for name, key, again, same in told)
    assert len({name for name, *_ in told}) == keys
    for name, key, *_ in told:
        assert len(key) == digits
        assert text.count(key) == (3 if key == sample.key else 2)
        if key == sample.key:
            of = f" of {name}" if keys > 1 else ""
            assert text.endswith(f" What is the pass key{of}? The pass key{of} is {key}")
    ids, weights = sample.example.ids, sample.example.weights
    assert shown(ids[sample.answer]).strip() == sample.key
    assert [bool(w) for w in weights] == [i >= sample.answer.start for i in range(length)]
    assert sample.answer.stop == length


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("keys", [1, 3])
def test_a_key_stands_at_its_depth(depth: float, keys: int) -> None:
    for seed in range(5):
        sample, text = made(seed, 2500, keys=keys, where=depth)
        assert sample.depth == pytest.approx(depth, abs=0.02)
        filler = TOLD.sub("", text[len(INTRODUCTION) : text.index("What is the")])
        place = re.search(rf"The pass key[^.]* is {sample.key}\.", text)
        assert place
        before = TOLD.sub("", text[len(INTRODUCTION) : place.start()])
        # In characters it is not quite the same as in tokens.
        assert len(before) / len(filler) == pytest.approx(depth, abs=0.03)


def test_at_the_start_means_all_keys_before_the_filler_and_anywhere_means_spread() -> None:
    _, text = made(0, 1500, keys=4)
    assert re.match(rf"{re.escape(INTRODUCTION)}( {TOLD.pattern}){{4}} The grass", text)
    depths = [made(seed, 1500, keys=2, where="anywhere")[0].depth for seed in range(60)]
    assert len(set(depths)) > 20
    assert min(depths) < 0.15 and max(depths) > 0.85
    _, text = made(1, 1500, keys=3, where="anywhere")
    places = [match.start() for match in TOLD.finditer(text)]
    assert max(places) - min(places) > 300
    # Between sentences, never in one: without the keys the filler is whole.
    filler = re.sub(f" {TOLD.pattern}", "", text[len(INTRODUCTION) : text.index(" What is the")])
    assert " ".join(["", *DEFAULT_SENTENCES * 30]).startswith(filler)


@pytest.mark.parametrize("keys", [1, 3])
@pytest.mark.parametrize("where", ["anywhere", 1.0])
def test_all_keys_may_stand_near_the_start(where: str | float, keys: int) -> None:
    samples = [made(seed, 1500, keys=keys, where=where, within=700)[0] for seed in range(30)]
    told = [sample.example.told for sample in samples]
    assert max(told) <= 700
    if where == "anywhere":
        assert len(set(told)) > 20 and max(told) > 600
    # Without room for filler before them they stand in front of it.
    assert made(0, 1500, keys=keys, where=where, within=1)[0].depth == 0


def test_each_name_and_each_place_in_line_is_asked_for() -> None:
    asked: Counter[int] = Counter()
    for seed in range(90):
        sample, text = made(seed, 900, keys=3)
        asked[[key for _, key, *_ in TOLD.findall(text)].index(sample.key)] += 1
    assert set(asked) == {0, 1, 2}
    assert min(asked.values()) > 10


# ---- filler


@pytest.mark.parametrize("asked", [1, 2, 3])
def test_several_keys_may_be_asked_for_and_each_answer_counts(asked: int) -> None:
    sample, text = made(2, 700, keys=3, asked=asked, where=0.5)
    told = {name: key for name, key, *_ in TOLD.findall(text)}
    questions = re.findall(
        r" What is the pass key of (\w+)\? The pass key of (\w+) is (\d+)(?=\. |$)",
        text[text.index(" What is") - 1 :].replace(". What", ".  What"),
    )
    assert len(sample.example.ids) == 700
    assert len({name for name, *_ in questions}) == len(questions) == asked
    assert all(name == same and told[name] == key for name, same, key in questions)
    assert questions[-1][-1] == sample.key and text.endswith(sample.key)
    counted = [i for i, w in zip(sample.example.ids, sample.example.weights, strict=True) if w]
    assert shown(counted).replace(".", "").split() == [key for *_, key in questions]


def test_prose_is_cut_into_sentences() -> None:
    assert sentences_of(BOOK) == [
        "It was 1842.",
        '"Who waits?"',
        "said Ann.",
        "Nobody spoke of the ship that was not there (it had sailed).",
        "The harbour lay grey!",
        "A heading without a stop",
        "No.",
        "The number 12345 is no key...",
        "海は静かだった。",
        "「待つ。」",
        "第二章",
    ]
    assert sentences_of(" \n\n") == []
    assert [sentences_of(s) for s in DEFAULT_SENTENCES] == [[s] for s in DEFAULT_SENTENCES]


def test_prose_comes_from_a_random_place_in_its_order_without_numbers_like_a_key() -> None:
    prose = [s for s in sentences_of(BOOK) if "12345" not in s]
    seen = set()
    for seed in range(40):
        _, text = made(seed, 600, filler=[BOOK])
        filler = text[TOLD.search(text).end() + 1 : text.index(" What is the")]  # type: ignore[union-attr]
        starts = [n for n, s in enumerate(prose) if filler.startswith(s + " ")]
        assert len(starts) == 1
        round_ = prose[starts[0] :] + prose[: starts[0]]
        assert (" ".join(round_ * 20)).startswith(filler.rstrip("\ufffd"))
        seen.add(starts[0])
    assert len(seen) > 5


def test_sentences_are_tokenised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = PasskeyTexts(TOKENIZER, lengths=[3000])
    texts.draw(0)
    calls: list[str] = []
    encode, encode_all = Encoder.encode, Encoder.encode_all

    def counting(self: Any, piece: str, *, first: bool) -> list[int]:
        calls.append(piece)
        return encode(self, piece, first=first)

    def counting_all(self: Any, pieces: Sequence[str]) -> list[list[int]]:
        calls.extend(pieces)
        return encode_all(self, pieces)

    monkeypatch.setattr(Encoder, "encode", counting)
    monkeypatch.setattr(Encoder, "encode_all", counting_all)
    texts.draw(1)
    assert calls
    assert all("pass key" in call for call in calls)
    calls.clear()
    PasskeyTexts(TOKENIZER, lengths=[3000]).draw(0)
    assert not all("pass key" in call for call in calls), "new texts tokenise their own"


def test_filler_may_count_too() -> None:
    """All of it together as much as is said, however long the text."""
    for length in (400, 4000):
        texts = PasskeyTexts(
            TOKENIZER, lengths=[length], keys=3, asked=2, filler_share=0.25, where="anywhere"
        )
        sample = texts.sample(random.Random(0))
        assert set(sample.example.weights[sample.answer]) == {1.0}
        answers = sum(w for w in sample.example.weights if w == 1.0)
        assert sum(sample.example.weights) == pytest.approx(1.25 * answers)
        assert len(set(sample.example.weights)) == 2


# ---- lengths and draws


def test_lengths_are_one_a_range_or_a_choice() -> None:
    def lengths(*given: int, steps_of: int = 1) -> set[int]:
        texts = PasskeyTexts(TOKENIZER, lengths=given, steps_of=steps_of)
        return {len(texts.draw(n).ids) for n in range(60)}

    assert lengths(400) == {400}
    assert lengths(400, 403) == {400, 401, 402, 403}
    assert lengths(400, 700, steps_of=128) == {512, 640}
    assert lengths(400, 500, 700) == {400, 500, 700}


def test_a_text_without_room_for_filler_is_as_long_as_its_keys() -> None:
    sample, text = made(0, 10)
    assert text == (
        f"{INTRODUCTION} The pass key is {sample.key}. Remember it. {sample.key} is the pass key. "
        f"What is the pass key? The pass key is {sample.key}"
    )
    assert sample.depth == 0.0
    longer = len(sample.example.ids) + 1
    assert len(made(0, longer)[0].example.ids) == longer


def test_examples_are_a_pure_function_of_seed_and_number() -> None:
    def draws(seed: int, numbers: list[int]) -> dict[int, Example]:
        texts = PasskeyTexts(
            TOKENIZER, lengths=[400, 600], keys=2, where="anywhere", filler=[BOOK], seed=seed
        )
        return {n: texts.draw(n) for n in numbers}

    forward = draws(1, [0, 1, 2, 3])
    assert draws(1, [3, 1, 0, 2]) == forward
    assert len({tuple(e.ids) for e in forward.values()}) == 4
    assert draws(2, [0])[0] != forward[0]


def test_a_question_may_be_put_in_the_chat_template() -> None:
    tokenizer = deepcopy(TOKENIZER)
    tokenizer.chat_template = CHATML
    texts = PasskeyTexts(tokenizer, lengths=[600], keys=2, chat=True)
    sample = texts.sample(random.Random(0))
    ids, turns = sample.example.ids, Turns(tokenizer)
    assert len(ids) == 600
    told = {key: name for name, key, *_ in TOLD.findall(shown(ids, tokenizer))}
    what = f"pass key of {told[sample.key]}"
    opening = turns.opening(f"What is the {what}?", first=True, fresh=False)
    start = sample.answer.start
    assert list(ids[start - len(opening) : start]) == opening
    end = turns.closing()[:1]
    assert list(ids[sample.answer][len(ids[sample.answer]) - len(end) :]) == end
    said = ids[start : sample.answer.stop - len(end)]
    assert shown(said, tokenizer) == f"The {what} is {sample.key}."
    assert [bool(w) for w in sample.example.weights] == [i >= start for i in range(600)]


def test_the_start_token_comes_first_and_is_one_of_the_length() -> None:
    tokenizer = train("gpt2")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    example = PasskeyTexts(tokenizer, lengths=[400]).draw(0)
    assert len(example.ids) == 400
    assert list(example.ids).count(tokenizer.bos_token_id) == 1
    assert example.ids[0] == tokenizer.bos_token_id


WRONG = [
    ({"lengths": []}, "at least one token"),
    ({"lengths": [0, 5]}, "at least one token"),
    ({"lengths": [10, 20], "steps_of": 64}, "No multiple of 64 lies between"),
    ({"digits": 0}, "at least one digit"),
    ({"keys": 0}, "has 1 to 32 pass keys"),
    ({"keys": 2, "asked": 3}, "Of 2 pass keys 1 to 2 can be asked for"),
    ({"keys": 10, "digits": 1}, "has 1 to 9 pass keys"),
    ({"keys": len(NAMES) + 1}, "has 1 to 32 pass keys"),
    ({"where": "end"}, "at a depth of 0 to 1, not end"),
    ({"where": 1.5}, "at a depth of 0 to 1, not 1.5"),
    ({"filler": ["The key is 12345."]}, "no sentence without a number of 5 digits"),
    ({"filler": []}, "no sentence"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=[str(w) for w, _ in WRONG])
def test_what_cannot_be_made_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        PasskeyTexts(TOKENIZER, **{"lengths": [400], **wrong})


def test_a_tokenizer_without_digits_is_refused() -> None:
    with pytest.raises(UserError, match="no tokens for digits"):
        PasskeyTexts(tiny_tokenizer(), lengths=[400])
    assert len(PasskeyTexts(TOKENIZER, lengths=[900], keys=9, digits=1).draw(0).ids) == 900


@pytest.mark.parametrize("chat", [False, True])
def test_prose_before_the_question_may_be_asked_too(chat: bool) -> None:
    options: dict[str, Any] = {"keys": 3, "asked": 2, "where": "anywhere", "chat": chat}
    sample, _ = made(1, 600, filler_share=0.2, asked_prose=20, **options)
    example = sample.example
    assert example.question is not None and example.asked_from == example.question - 20
    # All that is asked about is told by then, and not before.
    told = shown(example.ids[: example.told])
    assert f"{sample.key} is the pass key of" in told
    asked = shown(example.ids[example.question :])
    assert asked.count("What is the pass key of") == 2
    # Nothing counts before: the first token that is asked is predicted by one that is not.
    first = next(n for n, weight in enumerate(example.weights) if weight)
    assert first == example.asked_from + 1
    answers = [w for w in example.weights if w == 1]
    assert sum(example.weights) == pytest.approx(1.2 * len(answers), rel=0.02)
    plain, _ = made(1, 600, filler_share=0.2, **options)
    assert plain.example.ids == example.ids and min(plain.example.weights) > 0
