"""Files and pipes to text to token ids and back, a piece at a time, in constant memory.

Knows no model. The one thing to get right is where a text may be cut: tokenising the pieces has to
give the tokens of the whole. See `pieces` for the places and `Encoder` for the first word of a piece.
"""

from __future__ import annotations

import codecs
import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, BinaryIO

from transformerfam.errors import UserError, reason_of

READ_BYTES = 1 << 16
# A run with no place to cut is cut hard here, so that a file without a space cannot fill the memory.
HARD_LIMIT = 1 << 16

# Borders that pre-tokenisers of the GPT-2, GPT-4 (Llama 3, Qwen) and SentencePiece kinds never cross.
# A line end after punctuation is no such border: GPT-4's rule takes `.\n` for one word.
_SAFE_CUT = re.compile(
    r"(?<=[^\W_])(?=\s)"  # after a letter or digit, before white space
    r"|(?<=\S)(?=[ \t])"  # after anything, before a blank
    r"|(?<=\S\n)(?=[^\W_])"  # after a single line end, before a letter or digit
)


class TextSource:
    """A text file or a pipe, read as UTF-8 a piece at a time.

    Iterating gives the text in pieces of at most `READ_BYTES` characters, as they arrive. The first
    bytes are read at once, so that most wrong inputs are refused before a model is loaded.

    Args:
        path: the file, or "-" for standard input.
        lenient: put U+FFFD in place of bytes that are not UTF-8 and of NUL, instead of refusing.

    Attributes:
        name: what to call the source in a message.
        bytes_read: bytes taken so far.
        bytes_total: size of a regular file, None for a pipe.

    Raises:
        UserError: for a source that is missing, unreadable, a folder, empty or no UTF-8 text; while
            iterating too, since a bad byte may come late.
    """

    def __init__(self, path: str, *, lenient: bool = False) -> None:
        self.path = path
        self.name = "standard input" if path == "-" else path
        self.bytes_read = 0
        self.bytes_total: int | None = None
        self._lenient = lenient
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace" if lenient else "strict")
        self._file = self._open()
        self._first: bytes | None = None
        try:
            self._first = self._begin()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> TextSource:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; standard input stays open."""
        if self.path != "-":
            self._file.close()

    def __iter__(self) -> Iterator[str]:
        start, begun = 0, False  # bytes decoded so far; whether there was any text
        data = self._first if self._first is not None else self._take()
        self._first = None
        while True:
            text, problem = self._decode(data, start)
            if text and not begun:
                text, begun = text.removeprefix("\ufeff"), True
            if text:
                yield text
            if problem is not None:
                raise problem
            if not data:
                return
            start += len(data)
            data = self._take()

    # ---- parts

    def _open(self) -> BinaryIO:
        if self.path == "-":
            if sys.stdin is None:
                raise UserError("There is no standard input to read from; name a file.")
            return sys.stdin.buffer
        try:
            file = open(self.path, "rb")  # noqa: SIM115  # closed by close()
        except FileNotFoundError:
            raise UserError(f"There is no file {self.path}.") from None
        except IsADirectoryError:
            raise UserError(f"{self.path} is a folder; name a text file in it.") from None
        except PermissionError:
            raise UserError(f"{self.path} may not be read: permission denied.") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path} cannot be opened: {reason_of(error)}.") from None
        status = os.fstat(file.fileno())
        if stat.S_ISREG(status.st_mode):
            self.bytes_total = status.st_size
        return file

    def _take(self) -> bytes:
        try:
            # read1 gives what a pipe holds now; read would wait until a whole piece is there.
            data: bytes = self._file.read1(READ_BYTES)  # type: ignore[attr-defined]
        except OSError as error:
            raise UserError(f"{self.name} cannot be read: {reason_of(error)}.") from None
        self.bytes_read += len(data)
        return data

    def _begin(self) -> bytes:
        """The first piece, refused if it is no text; blanks alone do not make one."""
        data = self._take()
        while len(data) < READ_BYTES and not data.removeprefix(codecs.BOM_UTF8).strip():
            more = self._take()
            if not more:
                raise UserError(f"{self.name} is empty: there is no text to read.")
            data += more
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise UserError(
                f"{self.name} is UTF-16 text; convert it first: iconv -f UTF-16 -t UTF-8."
            )
        for piece, start in (data, 0), (b"", len(data)):
            if piece or self.bytes_total == len(data):  # that was all of the file
                _, problem = self._decode(piece, start)
                if problem is not None:
                    raise problem
        self._decoder.reset()
        return data

    def _decode(self, data: bytes, start: int) -> tuple[str, UserError | None]:
        """The text of a piece up to where it stops being text, and what is wrong there.

        `start` is the place of the piece in the source; no data means its end.
        """
        if self._lenient:
            return self._decoder.decode(data, final=not data).replace("\0", "\ufffd"), None
        pending = len(self._decoder.getstate()[0])
        good, nul, _ = data.partition(b"\0")
        try:
            text = self._decoder.decode(good, final=not data or bool(nul))
        except UnicodeDecodeError as error:
            if nul:  # more telling: it is not text in another encoding, but none
                return "", self._not_text(start + len(good))
            place = start - pending + error.start
            return error.object[: error.start].decode(), UserError(
                f"{self.name} is not UTF-8 text: byte {place:,} cannot be decoded; "
                "convert it with iconv, or read on over such bytes with --lenient."
            )
        return text, self._not_text(start + len(good)) if nul else None

    def _not_text(self, place: int) -> UserError:
        return UserError(f"{self.name} is not a text file: it has a NUL byte at byte {place:,}.")


# ---- text to tokens


def pieces(texts: Iterable[str], *, limit: int = HARD_LIMIT) -> Iterator[str]:
    """Cut a stream of text where tokenising the pieces gives the tokens of the whole.

    A cut falls between a letter or digit and white space, between anything and a blank, or after
    a single line end before a letter or digit. Pre-tokenisers of byte-level BPE (GPT-2, Llama 3,
    Qwen, SmolLM) and the word borders of SentencePiece have a border at each of these, so no token
    spans it. A run of more than `limit` characters with no such place (a long base64 string, a page
    without spaces) is cut where the limit falls, and there the tokens may differ from the whole's.

    Args:
        texts: the text in any division; nothing of it is held longer than needed for a cut.
        limit: longest run kept while waiting for a place to cut, in characters.
    """
    held, searched = "", 0  # what waits for a cut, and up to where none was found
    for text in texts:
        held += text
        while cut := _last_cut(held, searched) or (limit if len(held) > limit else 0):
            yield held[:cut]
            held, searched = held[cut:], 0
        searched = len(held)
    if held:
        yield held


def _last_cut(text: str, start: int) -> int:
    """The last safe place to cut at `start` or behind, inside the text; 0 if there is none."""
    end, width = len(text), 256
    while end > start:
        # Looking back from the end finds one soon in ordinary text.
        begin = max(start, end - width)
        places = [m.start() for m in _SAFE_CUT.finditer(text, begin, end + 1) if m.start() > 0]
        if places:
            return places[-1]
        end, width = begin, 2 * width
    return 0


class Encoder:
    """A tokenizer for the pieces of one text: no special token, no blank put before a piece.

    SentencePiece tokenizers write a blank before whatever they get. So a piece that goes on a text
    is tokenised behind a letter, whose tokens are then taken off.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._before = [(lead, self._ids(lead)) for lead in ("a", "a\n")]

    def encode(self, piece: str, *, first: bool) -> list[int]:
        """Token ids of a piece; `first` says that no text stands before it."""
        if not first:
            lead, ids = self._before[0 if piece[0].isspace() else 1]
            joined = self._ids(lead + piece)
            if joined[: len(ids)] == ids:
                return joined[len(ids) :]
        return self._ids(piece)

    def encode_all(self, pieces: Sequence[str]) -> list[list[int]]:
        """`encode` of each piece by itself, behind other text, in one call of the tokenizer."""
        if not pieces:
            return []
        leads = [self._before[0 if piece[0].isspace() else 1] for piece in pieces]
        texts = [lead + piece for (lead, _), piece in zip(leads, pieces, strict=True)]
        found = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [
            joined[len(ids) :] if joined[: len(ids)] == ids else self._ids(piece)
            for joined, (_, ids), piece in zip(found, leads, pieces, strict=True)
        ]

    def _ids(self, text: str) -> list[int]:
        # verbose=False: a piece may be longer than the model's window; that is what we are for.
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids


def start_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text: usually nothing or one beginning-of-text token."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for i in range(len(full) - len(bare) + 1):
        if full[i : i + len(bare)] == bare:
            return list(full[:i])
    return []


class TokenIds:
    """Token ids of a text that comes in parts, one at a time, in constant memory. Iterate it once.

    Args:
        tokenizer: a tokenizer of transformers.
        texts: the text, in any division.
        fresh: the text begins a stream, so the tokenizer's start tokens come first.
        limit: see `pieces`.

    Attributes:
        bytes_done: bytes of text whose tokens were given out, nearly: inside a piece by share.
    """

    def __init__(
        self, tokenizer: Any, texts: Iterable[str], *, fresh: bool = True, limit: int = HARD_LIMIT
    ) -> None:
        self._encoder = Encoder(tokenizer)
        self._start = start_tokens(tokenizer) if fresh else []
        self._pieces = pieces(texts, limit=limit)
        self.bytes_done = 0.0

    def __iter__(self) -> Iterator[int]:
        yield from self._start
        first = True
        for piece in self._pieces:
            ids = self._encoder.encode(piece, first=first)
            first = False
            share = len(piece.encode()) / max(1, len(ids))
            for token in ids:
                self.bytes_done += share
                yield token


# ---- tokens to text


class Decoder:
    """Token ids to text, one at a time: gives out whole characters as soon as they are known."""

    _KEPT = 4  # tokens that stay as context, since decoding may depend on the token before
    _LONGEST = 64  # tokens held before the context is shortened
    _PATIENCE = 8  # tokens that one character may take; what is no character by then never will be

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0  # characters of the decoded ids that were given out
        self._waiting = 0

    def put(self, token: int) -> str:
        """The text that this token completes; empty in the middle of a character."""
        self._ids.append(token)
        text = self._decode(self._ids)
        self._waiting += 1
        if text.endswith("\ufffd") and self._waiting < self._PATIENCE:
            return ""
        new, self._shown, self._waiting = text[self._shown :], len(text), 0
        if len(self._ids) > self._LONGEST:
            self._ids = self._ids[-self._KEPT :]
            self._shown = len(self._decode(self._ids))
        return new

    def end(self) -> str:
        """What is still held back at the end of the text."""
        return self._decode(self._ids)[self._shown :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


def language_reference() -> str:
    """Some hundred kB of English that every Python carries."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in sorted(topics))


def words_of(tokenizer: Any, ids: Iterable[int]) -> list[str]:
    """What each token adds to the text; a special token its name, part of a character nothing."""
    decoder, special = Decoder(tokenizer), set(tokenizer.all_special_ids)
    return [
        str(tokenizer.convert_ids_to_tokens(i)) if i in special else decoder.put(i) for i in ids
    ]
