"""From one row of data to token ids, each with how much predicting it counts (B.2).

Knows tokenizers and their chat templates. Knows no files; where rows come from is not asked here.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformerfam.errors import UserError
from transformerfam.text import READ_BYTES, Encoder, TokenIds, start_tokens

REPEAT_MARKER = "[repeat random segment]:"

# Stands for an answer: private-use characters, which no template trims or takes for its own.
_MARK = "\ue000answer\ue001"
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class BadRow(Exception):
    """A row that cannot be used.

    Attributes:
        reason: why, as the end of a sentence without its full stop.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Example:
    """One text to learn from.

    Attributes:
        ids: (T,) token ids.
        weights: (T,); weights[i] is how much predicting ids[i] from the tokens before it counts.
        asked_from: the first token that is asked, see `FamConfig.fam_seen`; those before it are read.
        told: so many tokens tell all that is asked, and
        question: from this one on it is asked; None: nobody knows.
        stands_in_for: rows before it that were drawn and could not be used.
    """

    ids: Sequence[int]
    weights: Sequence[float]
    asked_from: int = 0
    told: int = 0
    question: int | None = None
    stands_in_for: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.weights):
            raise ValueError(f"{len(self.ids)} token ids have {len(self.weights)} weights.")

    def __len__(self) -> int:
        return len(self.ids)


def plain(tokenizer: Any, text: str) -> Example:
    """A text of which every token counts 1, behind the tokenizer's start tokens."""
    # A part at a time takes less time and memory; the tokens are those of the whole, see `pieces`.
    parts = (text[i : i + READ_BYTES] for i in range(0, len(text), READ_BYTES))
    ids = tuple(TokenIds(tokenizer, parts))
    return Example(ids, (1.0,) * len(ids))


def prompted(tokenizer: Any, prompt: str, completion: str) -> Example:
    """A prompt, whose tokens count 0, and what shall be said to it, whose tokens count 1.

    The tokenizer's start tokens come first and its end token, if it has one, last. The ids are those
    of the joined text, unless a token would span the border: there the prompt keeps the tokens that
    it has when a model is asked.
    """
    start = start_tokens(tokenizer)
    before, said = continued(tokenizer, prompt, completion)
    end = tokenizer.eos_token_id
    if end is not None and said[-1:] != [end]:
        said = [*said, end]
    unlearnt = [*start, *before]
    return Example((*unlearnt, *said), (0.0,) * len(unlearnt) + (1.0,) * len(said))


def continued(tokenizer: Any, text: str, rest: str) -> tuple[list[int], list[int]]:
    """Token ids of a text and of what goes on it, joined those of the joined text where possible."""
    encoder = Encoder(tokenizer)
    if not text:
        return [], encoder.encode(rest, first=True) if rest else []
    before = encoder.encode(text, first=True)
    joined = encoder.encode(text + rest, first=True)
    if joined[: len(before)] == before:
        return before, joined[len(before) :]
    return before, encoder.encode(rest, first=False)


def chat(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> Example:
    """A conversation in the model's chat template; what the assistant says counts 1, all else 0.

    An assistant's turn is what it says and the token that ends the turn. A template that marks it
    with {% generation %} is believed; in others its place is found by rendering the conversation
    again with a mark instead.

    Raises:
        UserError: the tokenizer has no chat template.
        BadRow: the template refuses the messages, or leaves an answer out.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "This model has no chat template for rows of messages; give rows of prompt and completion."
        )
    turns = [dict(message) for message in messages]
    if _GENERATION.search(tokenizer.get_chat_template()):
        made = _apply(tokenizer, turns, return_dict=True, return_assistant_tokens_mask=True)
        return Example(tuple(made["input_ids"]), tuple(map(float, made["assistant_masks"])))
    text = _apply(tokenizer, turns, tokenize=False)
    made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    spans = [
        _turn(tokenizer, turns, text, n)
        for n, message in enumerate(turns)
        if message["role"] == "assistant"
    ]
    weights = [0.0] * len(made["input_ids"])
    for token, (start, end) in enumerate(made["offset_mapping"]):
        if any(start < last and end > first for first, last in spans):
            weights[token] = 1.0
    return Example(tuple(made["input_ids"]), tuple(weights))


def checked(row: object, text_column: str | None = None) -> dict[str, Any]:
    """The columns of a row that are learnt from: {prompt, completion}, {messages} or {text}.

    Args:
        row: what a line or a table holds; other columns are left alone.
        text_column: the column of plain texts, if it is not `text`; no other is then looked at.

    Raises:
        BadRow: none of these sets of columns is there, or not of the right types.
    """
    if not isinstance(row, Mapping):
        raise BadRow("it is not an object with named columns")
    if text_column is not None:
        return {"text": _text(row, text_column)}
    if "prompt" in row and "completion" in row:
        prompt = _text(row, "prompt", may_be_empty=True)
        return {"prompt": prompt, "completion": _text(row, "completion")}
    if "messages" in row:
        return {"messages": _messages(row["messages"])}
    if "text" in row:
        return {"text": _text(row, "text")}
    has = ", ".join(map(str, row)) or "nothing"
    raise BadRow(f"it has {has}, but not prompt and completion, messages, or text")


def from_row(tokenizer: Any, row: Mapping[str, Any]) -> Example:
    """The example that a row is, by its columns; see `checked`.

    Raises:
        BadRow: the row cannot be used, with the reason.
        UserError: no row of this kind can be used with this tokenizer.
    """
    row = checked(row)
    if "messages" in row:
        example = chat(tokenizer, row["messages"])
    elif "prompt" in row:
        example = prompted(tokenizer, row["prompt"], row["completion"])
    else:
        example = plain(tokenizer, row["text"])
    if not any(example.weights[1:]):
        raise BadRow("it has no token to learn")
    return example


def with_repeat_task(
    ids: Sequence[int],
    weights: Sequence[float],
    marker_ids: Sequence[int],
    rng: random.Random,
    length: int = 256,
    weight: float = 0.1,
) -> tuple[list[int], list[float]]:
    """Tokens with a random segment of them repeated behind a marker (B.2's repeat task).

    Args:
        ids: (T,) token ids.
        weights: (T,) their weights.
        marker_ids: tokens of `REPEAT_MARKER`; they count 0.
        rng: chooses the segment.
        length: tokens of the segment, at most T.
        weight: how much each of the repeated tokens counts.

    Returns:
        ids and weights, (T + marker + length,).
    """
    length = min(length, len(ids))
    start = rng.randrange(len(ids) - length + 1)
    repeated = ids[start : start + length]
    return (
        [*ids, *marker_ids, *repeated],
        [*weights, *(0.0 for _ in marker_ids), *(weight for _ in repeated)],
    )


def repeat_marker(tokenizer: Any) -> list[int]:
    """Token ids of `REPEAT_MARKER` behind a text, on a line of its own."""
    return Encoder(tokenizer).encode("\n" + REPEAT_MARKER, first=False)


# ---- parts


def _text(row: Mapping[str, Any], column: str, *, may_be_empty: bool = False) -> str:
    if column not in row:
        raise BadRow(f"it has no {column}")
    text = row[column]
    if not isinstance(text, str):
        raise BadRow(f"its {column} is not text but {_kind(text)}")
    if not may_be_empty and not text.strip():
        raise BadRow(f"its {column} is empty")
    _check_unicode(text, f"its {column}")
    return text


def _messages(messages: object) -> list[dict[str, Any]]:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise BadRow("its messages are not a list with something in it")
    for n, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            raise BadRow(f"message {n} is not an object with role and content")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise BadRow(f"the {key} of message {n} is not text but {_kind(message.get(key))}")
            _check_unicode(message[key], f"the {key} of message {n}")
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRow("none of its messages is the assistant's")
    return [dict(message) for message in messages]


def _check_unicode(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can say \ud800, which no tokenizer takes
        raise BadRow(f"{what} has half of a surrogate pair") from None


def _kind(value: object) -> str:
    names = {type(None): "null", dict: "an object", list: "a list", bool: "true or false"}
    return names.get(
        type(value), "a number" if isinstance(value, (int, float)) else "something else"
    )


def _apply(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except Exception as error:  # templates are programs, and refuse in their own words
        reason = " ".join(str(error).split()).rstrip(".")
        raise BadRow(f"the chat template of this model refuses it: {reason}") from error


def _turn(
    tokenizer: Any, messages: list[dict[str, Any]], text: str, number: int
) -> tuple[int, int]:
    """Where in the rendered text message `number` stands, with the token that ends it."""
    marked = [*messages]
    marked[number] = {**messages[number], "content": _MARK}
    before, mark, behind = _apply(tokenizer, marked, tokenize=False).partition(_MARK)
    if not mark:
        raise BadRow("the chat template of this model leaves answers out")
    start, end = len(before), len(text) - len(behind)
    if start > end or not (text.startswith(before) and text.endswith(behind)):
        raise BadRow("the chat template of this model changes other turns with an answer")
    # The rest of the turn: up to where a conversation that ends here ends, if nothing changes then.
    try:
        until = _apply(tokenizer, messages[: number + 1], tokenize=False)
    except BadRow:
        until = ""
    known = len(until) >= end and text.startswith(until)
    rest = until[end:] if known else behind
    special = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    ends = re.match(r"\s*(?:" + "|".join(map(re.escape, sorted(special))) + ")", rest)
    if special and ends:
        return start, end + ends.end()  # a line end behind the token is the template's
    return start, end + (len(rest.rstrip()) or len(rest) if known else 0)
