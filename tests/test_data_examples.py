"""Rows become token ids and weights: prompts count 0, answers 1, and the ids are the text's."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_text import PROSE, TEXTS, TOKENIZERS, train
from test_turns import CONVERSATION, TEMPLATES, tokenizer_with
from tokenizers.processors import TemplateProcessing

from transformerfam.data import examples
from transformerfam.data.examples import (
    REPEAT_MARKER,
    BadRow,
    Example,
    chat,
    checked,
    from_row,
    plain,
    prompted,
    repeat_marker,
    with_repeat_task,
)
from transformerfam.errors import UserError

GENERATION = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{{ '\n' }}
{%- else %}{{ m.content }}<|im_end|>{{ '\n' }}{% endif %}{% endfor %}"""
MESSAGES = [
    {"role": "user" if n % 2 == 0 else "assistant", "content": said}
    for n, said in enumerate(CONVERSATION)
]


def whole(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def with_start_token() -> Any:
    tokenizer = train("gpt2")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def taught(tokenizer: Any, example: Example) -> list[str]:
    """The runs of tokens that count, decoded."""
    runs: list[list[int]] = []
    before = 0.0
    for token, weight in zip(example.ids, example.weights, strict=True):
        if weight:
            runs += [] if before else [[]]
            runs[-1].append(token)
        before = weight
    return [tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs]


# ---- plain texts, prompts


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_every_token_of_a_plain_text_counts_and_a_long_one_is_as_if_tokenised_at_once(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examples, "READ_BYTES", 17)
    example = plain(TOKENIZERS[kind], PROSE * 5)
    assert list(example.ids) == whole(TOKENIZERS[kind], PROSE * 5)
    assert set(example.weights) == {1.0}


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(prompt=TEXTS, completion=TEXTS)
def test_prompts_count_0_and_completions_1(kind: str, prompt: str, completion: str) -> None:
    tokenizer = TOKENIZERS[kind]
    example = prompted(tokenizer, prompt, completion)
    prompt_ids = whole(tokenizer, prompt)
    assert list(example.ids[: len(prompt_ids)]) == prompt_ids
    assert [w == 0 for w in example.weights] == [i < len(prompt_ids) for i in range(len(example))]
    assert example.ids[-1] == tokenizer.eos_token_id
    joined = whole(tokenizer, prompt + completion)
    if joined[: len(prompt_ids)] == prompt_ids:
        assert list(example.ids[:-1]) == joined


def test_a_token_over_the_border_is_split_as_when_the_model_is_asked() -> None:
    tokenizer = train("gpt2")
    assert len(whole(tokenizer, "harbour")) == 1
    example = prompted(tokenizer, "har", "bour")
    assert taught(tokenizer, example) == ["bour</s>"]
    assert tokenizer.decode(example.ids) == "harbour</s>"


def test_texts_begin_with_the_start_token_and_an_end_token_comes_once() -> None:
    tokenizer = with_start_token()
    bos = tokenizer.bos_token_id
    assert plain(tokenizer, "Ann waits.").ids[0] == bos
    example = prompted(tokenizer, "Ann", " waits.</s>")
    assert (example.ids[0], example.weights[0]) == (bos, 0.0)
    assert tokenizer.decode(example.ids) == "<s>Ann waits.</s>"
    tokenizer.eos_token = None
    assert tokenizer.decode(prompted(tokenizer, "Ann", " waits.").ids) == "<s>Ann waits."


def test_an_empty_prompt_leaves_the_completion() -> None:
    tokenizer = train("gpt2")
    assert taught(tokenizer, prompted(tokenizer, "", "Ann waits.")) == ["Ann waits.</s>"]


# ---- conversations

TURN_ENDS = {"chatml": "<|im_end|>", "llama2": " </s>", "gemma": "<end_of_turn>"}


@pytest.mark.parametrize("name", TEMPLATES)
def test_exactly_what_the_assistant_says_and_its_end_counts(name: str) -> None:
    tokenizer = tokenizer_with(TEMPLATES[name])
    example = chat(tokenizer, MESSAGES)
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert list(example.ids) == whole(tokenizer, text)
    said = [run.removeprefix(" ") for run in taught(tokenizer, example)]
    assert said == [reply + TURN_ENDS[name] for reply in CONVERSATION[1::2]]


def test_a_template_that_marks_what_is_generated_is_believed() -> None:
    tokenizer = tokenizer_with(GENERATION)
    marked = chat(tokenizer, MESSAGES)
    assert taught(tokenizer, marked) == [reply + "<|im_end|>" for reply in CONVERSATION[1::2]]
    tokenizer.chat_template = GENERATION.replace("{% generation %}", "").replace(
        "{% endgeneration %}", ""
    )
    assert chat(tokenizer, MESSAGES) == marked


def test_a_turn_without_an_end_token_ends_where_the_conversation_would() -> None:
    lines = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ END }}{% endfor %}"
    for end, counts in (("'.'", "."), ("'.\\n'", "."), ("'\\n'", "\n"), ("''", "")):
        tokenizer = tokenizer_with(lines.replace("END", end))
        runs = taught(tokenizer, chat(tokenizer, MESSAGES))
        assert [r.removeprefix(" ") for r in runs] == [a + counts for a in CONVERSATION[1::2]]


def test_a_template_that_shows_the_last_turn_otherwise_is_followed() -> None:
    thinks = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if loop.last %}<think></think>{% endif %}{{ m.content }}<|im_end|>
{% endfor %}"""
    tokenizer = tokenizer_with(thinks)
    runs = taught(tokenizer, chat(tokenizer, MESSAGES))
    assert runs == [reply + "<|im_end|>" for reply in CONVERSATION[1::2]]


def test_templates_refuse_in_their_own_words_and_none_at_all_is_the_users_mistake() -> None:
    tokenizer = tokenizer_with(TEMPLATES["llama2"])
    with pytest.raises(BadRow, match=r"refuses it: Roles must alternate$"):
        chat(tokenizer, MESSAGES[1:])
    drops = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(BadRow, match="leaves answers out"):
        chat(tokenizer_with(drops), MESSAGES)
    twists = "{% for m in messages %}{{ messages[-1].content | length }}{{ m.content }}{% endfor %}"
    with pytest.raises(BadRow, match="changes other turns"):
        chat(tokenizer_with(twists), MESSAGES)
    with pytest.raises(UserError, match="no chat template"):
        chat(tokenizer_with(None), MESSAGES)


# ---- rows


def test_columns_say_what_a_row_is() -> None:
    tokenizer = tokenizer_with(TEMPLATES["chatml"])
    asked = {"prompt": "Who?", "completion": " Ann.", "text": "not this", "id": 3}
    assert from_row(tokenizer, asked) == prompted(tokenizer, "Who?", " Ann.")
    assert from_row(tokenizer, {"messages": MESSAGES}) == chat(tokenizer, MESSAGES)
    assert from_row(tokenizer, {"text": PROSE, "prompt": None}) == plain(tokenizer, PROSE)
    assert checked({"book": "Ann", "text": 3}, "book") == {"text": "Ann"}


BAD = [
    (["text"], "it is not an object with named columns"),
    ({}, "it has nothing, but not prompt and completion, messages, or text"),
    ({"prompt": "a", "answer": "b"}, "it has prompt, answer, but not .*"),
    ({"text": None}, "its text is not text but null"),
    ({"text": 3.5}, "its text is not text but a number"),
    ({"text": True}, "its text is not text but true or false"),
    ({"text": " \n"}, "its text is empty"),
    ({"text": "a \ud800"}, "its text has half of a surrogate pair"),
    ({"prompt": "a", "completion": ""}, "its completion is empty"),
    ({"prompt": ["a"], "completion": "a"}, "its prompt is not text but a list"),
    ({"messages": []}, "its messages are not a list with something in it"),
    ({"messages": "a"}, "its messages are not a list with something in it"),
    ({"messages": ["a"]}, "message 1 is not an object with role and content"),
    ({"messages": [{"role": "user"}]}, "the content of message 1 is not text but null"),
    (
        {"messages": [{"role": "user", "content": {}}]},
        "the content of message 1 is not text but an object",
    ),
    (
        {"messages": [{"role": "user", "content": "a"}]},
        "none of its messages is the assistant's",
    ),
]


@pytest.mark.parametrize(("row", "reason"), BAD, ids=[str(n) for n in range(len(BAD))])
def test_a_bad_row_says_why(row: object, reason: str) -> None:
    with pytest.raises(BadRow, match=f"^{reason}$"):
        checked(row)


def test_a_row_with_nothing_to_learn_is_bad() -> None:
    with pytest.raises(BadRow, match="no token to learn"):
        from_row(train("gpt2"), {"text": "a"})  # one token: nothing stands before it
    with pytest.raises(BadRow, match="no book"):
        checked({"text": "a"}, "book")


def test_ids_and_weights_go_together() -> None:
    with pytest.raises(ValueError, match="2 token ids have 1 weights"):
        Example((1, 2), (1.0,))


# ---- the repeat task


@given(
    ids=st.lists(st.integers(10, 99), min_size=1, max_size=40),
    length=st.integers(1, 50),
    seed=st.integers(0, 9),
)
def test_a_segment_is_repeated_behind_the_marker(ids: list[int], length: int, seed: int) -> None:
    weights = [1.0] * len(ids)
    out, counts = with_repeat_task(ids, weights, [1, 2], random.Random(seed), length, 0.25)
    repeated = out[len(ids) + 2 :]
    assert out[: len(ids) + 2] == [*ids, 1, 2]
    assert len(repeated) == min(length, len(ids))
    assert any(ids[i : i + len(repeated)] == repeated for i in range(len(ids)))
    assert counts == [*weights, 0.0, 0.0, *[0.25] * len(repeated)]


def test_the_segment_may_lie_anywhere() -> None:
    ids = list(range(10))
    starts = {
        with_repeat_task(ids, [1.0] * 10, [], random.Random(seed), 4)[0][10] for seed in range(200)
    }
    assert starts == set(range(7))


def test_the_marker_is_the_papers() -> None:
    tokenizer = train("gpt2")
    assert tokenizer.decode(repeat_marker(tokenizer)) == "\n[repeat random segment]:"
    assert REPEAT_MARKER == "[repeat random segment]:"
