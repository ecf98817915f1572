"""Turns of a conversation: what is fed, turn by turn, is the chat template of the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import tiny
from test_text import train

from transformerfam import stream
from transformerfam.config import FamConfig
from transformerfam.conversion import convert
from transformerfam.errors import UserError
from transformerfam.memory import Memory
from transformerfam.turns import Turns, answer

CHATML = """{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system
Be helpful.<|im_end|>
{% endif %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
LLAMA2 = """{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\n' + messages[0].content
+ '\n<</SYS>>\n\n' %}{% set rest = messages[1:] %}{% else %}{% set system = '' %}
{%- set rest = messages %}{% endif %}
{%- for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Roles must alternate.') }}{% endif %}
{%- if m.role == 'user' %}{{ '<s>[INST] ' + (system if loop.first else '') + m.content + ' [/INST]' }}
{%- else %}{{ ' ' + m.content | trim + ' </s>' }}{% endif %}{% endfor %}"""
GEMMA = """<s>{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}
{%- endif %}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}
{{ m.content | trim }}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""
TEMPLATES = {"chatml": CHATML, "llama2": LLAMA2, "gemma": GEMMA}
SPECIAL = ["<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]"]
CONVERSATION = ["Who is Ann?", "She waits.", "Since  when?\nSay.", "1842.", "Why?", "Nobody knows."]


def tokenizer_with(template: str | None) -> Any:
    tokenizer = train("gpt2")
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("system", [None, "You are brief."])
@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_fed_is_the_template_of_the_whole(name: str, system: str | None) -> None:
    tokenizer = tokenizer_with(TEMPLATES[name])
    messages = [] if system is None else [{"role": "system", "content": system}]
    if name == "gemma" and system:
        with pytest.raises(UserError, match="System role not supported"):
            Turns(tokenizer, system=system)
        return
    turns = Turns(tokenizer, system=system)
    fed: list[int] = []
    for said, reply in zip(CONVERSATION[::2], CONVERSATION[1::2], strict=True):
        fed += turns.opening(said, first=not fed, fresh=not fed)
        messages.append({"role": "user", "content": said})
        whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(fed) == whole
        lead = " " if name == "llama2" else ""
        fed += tokenizer(lead + reply, add_special_tokens=False)["input_ids"]
        fed += turns.closing()
        messages.append({"role": "assistant", "content": reply})
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        assert fed == ids


def test_a_conversation_behind_a_text_has_no_start_token() -> None:
    tokenizer = tokenizer_with(GEMMA)
    turns = Turns(tokenizer)
    turn = "<start_of_turn>user\nWho?<end_of_turn>\n<start_of_turn>model\n"
    for fresh, expected in ((False, turn), (True, "<s>" + turn)):
        assert tokenizer.decode(turns.opening("Who?", first=True, fresh=fresh)) == expected
    # Here the start token is what every turn begins with, as in SmolLM2.
    tokenizer = tokenizer_with(CHATML)
    tokenizer.bos_token = "<|im_start|>"
    ids = Turns(tokenizer).opening("Who?", first=True, fresh=False)
    assert tokenizer.decode(ids).startswith("<|im_start|>system\nBe helpful.<|im_end|>\n")


def test_a_template_that_rewrites_or_drops_answers_is_refused() -> None:
    drops = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(UserError, match="leaves answers out"):
        Turns(tokenizer_with(drops))
    rewrites = "{% for m in messages %}{{ m.content }}{% if loop.last %}END{% endif %}{% endfor %}"
    turns = Turns(tokenizer_with(rewrites))
    with pytest.raises(UserError, match="changes earlier turns"):
        turns.opening("again", first=False, fresh=False)


def test_without_a_template_turns_are_questions_and_answers() -> None:
    tokenizer = tokenizer_with(None)
    turns = Turns(tokenizer)
    first, second = (
        turns.opening(said, first=first, fresh=first)
        for said, first in [("Who?", True), ("Why?", False)]
    )
    text = "".join(tokenizer.decode(ids) for ids in (first, turns.closing(), second))
    assert text == "Question: Who?\nAnswer:\n\nQuestion: Why?\nAnswer:"


# ---- answers


def model_for(tokenizer: Any) -> Any:
    model = tiny(vocab_size=len(tokenizer))
    with torch.no_grad():  # logits of 0, so that an answer of random weights has no special tokens
        model.lm_head.weight[tokenizer.all_special_ids] = 0
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("</s>")
    return convert(model, FamConfig.paper(block_size=16, memory_segments=1, fam_length=2))


def record(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    fed: list[int] = []
    advance = stream._advance

    def recording(model: Any, ids: list[int], memory: Memory, *, keep: int) -> Any:
        logits = advance(model, ids, memory, keep=keep)
        fed.extend(ids)
        return logits

    monkeypatch.setattr(stream, "_advance", recording)
    return fed


@pytest.mark.parametrize("name", ["chatml", "gemma"])
def test_answers_on_one_memory_are_fed_as_the_template_has_them(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tokenizer_with(TEMPLATES[name])
    model = model_for(tokenizer)
    memory = Memory.for_model(model)
    fed = record(monkeypatch)
    messages: list[dict[str, str]] = []
    for said in ("Who is Ann?", "Why?"):
        parts = answer(model, tokenizer, memory, said, first=not messages, max_new_tokens=12)
        reply = "".join(parts)
        messages += [
            {"role": "user", "content": said},
            {"role": "assistant", "content": reply},
        ]
    assert memory.position == (len(fed),)
    shown = tokenizer.decode(fed, clean_up_tokenization_spaces=False)
    # An answer of random weights may begin or end with blanks, which templates trim.
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert "".join(shown.split()) == "".join(whole.split())


def test_an_answer_ends_at_the_end_of_the_turn_and_when_told_to() -> None:
    tokenizer = tokenizer_with(CHATML)
    turns, model = Turns(tokenizer), model_for(tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert turns.stop_tokens(model) == {end, tokenizer.eos_token_id}
    told = iter([False, False, True])
    memory = Memory.for_model(model)
    list(answer(model, tokenizer, memory, "Who?", turns=turns, stopped=lambda: next(told)))
    expected = len(turns.opening("Who?", first=True, fresh=True)) + 3 + len(turns.closing())
    assert memory.position == (expected,)


def test_a_fork_answers_and_the_memory_stays() -> None:
    tokenizer = tokenizer_with(CHATML)
    model = model_for(tokenizer)
    memory = Memory.for_model(model)
    list(stream.read(model, tokenizer("Ann waits.")["input_ids"], memory))
    before = memory.position, memory.next_logits
    list(answer(model, tokenizer, memory.fork(), "Who?", max_new_tokens=3))
    assert (memory.position, memory.next_logits) == before
