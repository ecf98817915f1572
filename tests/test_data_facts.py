"""Facts in prose: told once, asked for in their own words, and no two alike in a text."""

from __future__ import annotations

import random
import re
from copy import deepcopy

import pytest
from test_data_passkey import shown
from test_text import TOKENIZERS
from test_turns import CHATML

from transformerfam.data.facts import _PEOPLE as PEOPLE
from transformerfam.data.facts import _SUBJECTS as SUBJECTS
from transformerfam.data.facts import _THINGS as THINGS
from transformerfam.data.facts import KINDS, MOST, FactTexts
from transformerfam.errors import UserError
from transformerfam.turns import Turns

TOKENIZER = TOKENIZERS["gpt2"]
SLOT = re.compile(r"{\w+}")


def pattern(sentence: str) -> re.Pattern[str]:
    """What a sentence with its slots filled looks like."""
    return re.compile(SLOT.sub(".+?", sentence.replace(".", r"\.").replace("?", r"\?")), re.I)


@pytest.mark.parametrize("number", range(8))
def test_every_fact_is_told_once_and_the_key_ends_the_text(number: int) -> None:
    texts = FactTexts(TOKENIZER, lengths=[700], keys=3, where="anywhere")
    sample = texts.sample(random.Random(number), 700)
    text = shown(sample.example.ids)
    assert len(sample.example.ids) == 700
    for thing in texts._things(random.Random(number)):
        assert text.count(f" {thing.sentence}") == 1
    told = [kind for kind in KINDS if pattern(kind.told).search(text)]
    assert told
    assert text.endswith(f" {sample.key}")
    before, _, _ = text.rpartition(f" {sample.key}")
    assert sample.key in before, "the key was told"
    said = shown(sample.example.ids[sample.answer])
    assert said == f" {sample.key}"


def test_questions_of_one_text_have_one_answer() -> None:
    """No two facts of a text share a person or a thing."""
    texts = FactTexts(TOKENIZER, lengths=[900], keys=MOST)
    for number in range(200):
        told = [thing.sentence.lower() for thing in texts._things(random.Random(number))]
        for name in (*PEOPLE, *THINGS, *SUBJECTS):
            alone = re.compile(rf"\b{name.lower()}\b")
            assert sum(bool(alone.search(sentence)) for sentence in told) <= 1, name


def test_questions_in_the_chat_template_are_one_conversation() -> None:
    tokenizer = deepcopy(TOKENIZER)
    tokenizer.chat_template = CHATML
    texts = FactTexts(tokenizer, lengths=[900], keys=3, asked=2, chat=True, where="anywhere")
    example = texts.sample(random.Random(1)).example
    text, turns = shown(example.ids, tokenizer), Turns(tokenizer)
    assert text.count("<|im_start|>user") == 2
    assert text.count("<|im_start|>assistant") == 2
    answers, now = [], []
    for token, weight in zip(example.ids, example.weights, strict=True):
        if weight:
            now.append(token)
        elif now:
            answers.append(now)
            now = []
    answers.append(now)
    assert len(answers) == 2
    for answer in answers:
        assert answer[-1] == turns.closing()[0], "an answer ends its turn"
        sentence = shown(answer[:-1], tokenizer)
        assert sentence.endswith(".") and f"assistant\n{sentence}" in text
    # The tokens are those of the template of the whole conversation.
    asked = re.findall(r"<\|im_start\|>user\n(.+?)<\|im_end\|>", text)
    messages = []
    for question, answer in zip(asked, answers, strict=True):
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": shown(answer[:-1], tokenizer)})
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole.rstrip().startswith(text[text.index("<|im_start|>") :].rstrip())


def test_texts_are_functions_of_seed_and_number() -> None:
    one, two = (FactTexts(TOKENIZER, lengths=[300, 600], keys=2, seed=3) for _ in range(2))
    assert one.draw(5) == two.draw(5) != one.draw(6)


@pytest.mark.parametrize("keys", [0, MOST + 1, 40])
def test_too_many_facts_are_refused(keys: int) -> None:
    with pytest.raises(UserError, match=f"1 to {MOST} facts, not {keys}"):
        FactTexts(TOKENIZER, lengths=[900], keys=keys)


@pytest.mark.parametrize("keys", [1, 3])
def test_texts_of_the_bare_length_are_of_that_length(keys: int) -> None:
    bare = FactTexts(TOKENIZER, lengths=[900], keys=keys).bare_length
    texts = FactTexts(TOKENIZER, lengths=[bare], keys=keys)
    lengths = [len(texts.draw(n).ids) for n in range(200)]
    assert lengths.count(bare) >= 196 and max(lengths) <= bare + 20
