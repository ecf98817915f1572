"""Questions and answers on a memory: what each turn adds to the stream, and nothing else.

A chat template renders a whole conversation. A memory has read the turns before, so only the new text
may be fed. What that is follows from differences of templates: render a conversation with a mark in
the place of the answer, and take what stands behind the mark. Knows no files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from transformerfam.errors import UserError
from transformerfam.memory import Memory
from transformerfam.stream import Sampling, generate
from transformerfam.text import Decoder, Encoder, start_tokens

# Stands for an answer: private-use characters, which no template trims or takes for its own.
_MARK = "\ue000answer\ue001"


class Turns:
    """The parts of a conversation in the tokenizer's chat template.

    The tokens fed for `opening`, answer and `closing` of all turns, in order, are the tokens of the
    template of the whole conversation. Without a template a plain form is used:

        Question: ...
        Answer: ...

    Args:
        tokenizer: a tokenizer of transformers.
        system: a system message for the start of the conversation.

    Attributes:
        has_template: whether the tokenizer has a chat template.
    """

    def __init__(self, tokenizer: Any, *, system: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._encoder = Encoder(tokenizer)
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self.has_template = bool(getattr(tokenizer, "chat_template", None))
        self._closing = self._behind_mark() if self.has_template else ""

    def opening(self, text: str, *, first: bool, fresh: bool) -> list[int]:
        """Token ids from the end of the turn before up to where the answer begins.

        Args:
            text: what the user says.
            first: the first turn of a conversation: the template's beginning comes too, such as a
                system message. Small models answer better about a text that was read before if the
                question behind it begins a conversation.
            fresh: the memory has read nothing: the template's start token comes too.
        """
        if not self.has_template:
            ids = start_tokens(self._tokenizer) if fresh else []
            lead = "" if fresh else "\n\n" if first else "\n"
            return ids + self._encoder.encode(f"{lead}Question: {text}\nAnswer:", first=fresh)
        user = {"role": "user", "content": text}
        if first:
            whole = self._render([*self._system, user], reply=True)
            start = getattr(self._tokenizer, "bos_token", None)
            if start and not fresh and not self._starts_turns(start):
                whole = whole.removeprefix(start)
            return self._encoder.encode(whole, first=True)
        behind = self._behind_mark(user)
        if not behind.startswith(self._closing):
            raise UserError(
                "The chat template of this model changes earlier turns when a new one comes, so a "
                "memory cannot follow it; use fam generate."
            )
        return self._encoder.encode(behind[len(self._closing) :], first=True)

    def closing(self) -> list[int]:
        """Token ids that end an answer, with the end-of-turn token that `generate` stops at."""
        text = self._closing if self.has_template else "\n"
        return self._encoder.encode(text, first=self.has_template) if text else []

    def stop_tokens(self, model: Any) -> set[int]:
        """Token ids at which an answer is over."""
        found = end_tokens(model, self._tokenizer)
        # Some models end a turn with a token that their configuration does not name.
        special = set(self._tokenizer.all_special_ids)
        return found | (set(self.closing()[:1]) & special if self.has_template else set())

    # ---- parts

    def _starts_turns(self, token: str) -> bool:
        """Whether the start token is part of every turn, as `<|im_start|>` of some tokenizers."""
        return token in self._behind_mark({"role": "user", "content": "a"})

    def _behind_mark(self, user: dict[str, str] | None = None) -> str:
        """What the template puts behind an answer: its end, and the next turn if there is one."""
        before = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK}]
        after = [] if user is None else [user]
        text = self._render([*self._system, *before, *after], reply=user is not None)
        if _MARK not in text:
            raise UserError("The chat template of this model leaves answers out; use fam generate.")
        return text.rpartition(_MARK)[2]

    def _render(self, messages: list[dict[str, str]], *, reply: bool) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=reply
            )
        except Exception as error:  # templates are programs, and refuse in their own words
            reason = " ".join(str(error).split()).rstrip(".")
            raise UserError(f"The chat template of this model refuses this: {reason}.") from error
        return text


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Token ids that the model or its tokenizer calls an end."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = set(ends) if isinstance(ends, (list, tuple)) else {ends}
    found.add(getattr(tokenizer, "eos_token_id", None))
    return {token for token in found if token is not None}


def answer(
    model: Any,
    tokenizer: Any,
    memory: Memory,
    text: str,
    *,
    turns: Turns | None = None,
    first: bool = True,
    sampling: Sampling | None = None,
    max_new_tokens: int = 200,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[str]:
    """Say something on a memory and give out the answer as it is made.

    When the iteration has ended, the memory has consumed the turn and its end, and nothing else.

    Args:
        model: a TransformerFAM.
        tokenizer: its tokenizer.
        memory: advanced in place; give a fork to keep it as it is.
        text: what the user says.
        turns: the conversation's form; the tokenizer's template by default.
        first: this begins a conversation; what the memory has read before is no turn of it.
        sampling: how to choose tokens; by default the likeliest.
        max_new_tokens: longest answer.
        stopped: asked before each token whether to end the answer here.
    """
    turns = Turns(tokenizer) if turns is None else turns
    opening = turns.opening(text, first=first, fresh=memory.position[0] == 0)
    decoder, begun = Decoder(tokenizer), False
    for token in generate(
        model,
        opening,
        memory,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=turns.stop_tokens(model),
    ):
        part = decoder.put(token)
        part = part if begun else part.lstrip()
        begun = begun or bool(part)
        if begun and not turns.has_template and "\n" in part:
            # Without a template a model goes on with questions of its own.
            yield part.partition("\n")[0]
            return
        yield part
        if stopped():
            break
    yield decoder.end()
    for _ in generate(model, turns.closing(), memory, max_new_tokens=0):
        pass
