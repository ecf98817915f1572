"""Text in pieces: the tokens of the whole, in constant memory, and a sentence for what is no text."""

from __future__ import annotations

import io
import itertools
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from transformerfam import models
from transformerfam import text as text_module
from transformerfam.embedded import embedded_file
from transformerfam.errors import UserError
from transformerfam.text import Decoder, Encoder, TextSource, TokenIds, pieces, start_tokens

# The pre-tokeniser of Llama 3 and, but for the digits, of GPT-4 and Qwen.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PROSE = """The harbour lay grey under the morning rain, and nobody spoke of the ship that wasn't there.

"Well," said Ann, "it's 1842; we've waited 365 days." They'd waited longer.\n\tNothing came.
第一章。海は静かだった。\n第二章。
Ça et là, l'été — déjà vu...  two  blanks,   three.\r\nAnd a line.\n\n\n
"""

WORDS = ["ann", "it's", " ", "  ", "\n", "\n\n", "\r\n", "\t", ".", "...", "1842", "第", "。"]
WORDS += ["é", "e\u0301", "\u3000", "\u00a0", "_", "-", "'s", "//", "\u200b", "😀", "a", "harbour"]


def corpus() -> list[str]:
    """Prose, and all manner of joins, so that whatever may be one token has become one."""
    random = Random(0)
    return [PROSE, *("".join(random.choices(WORDS, k=30)) for _ in range(400))]


def train(kind: str) -> PreTrainedTokenizerFast:
    """A tiny tokenizer of one of the kinds that pretrained models come with."""
    tokenizer = Tokenizer(
        tokenizer_models.BPE(byte_fallback=kind == "sentencepiece", unk_token=None)
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    if kind == "gpt2":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif kind == "llama3":
        split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    else:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        # Only for training: SentencePiece learns no piece that spans two words or a line end.
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Metaspace(prepend_scheme="never"),
                pre_tokenizers.Split(Regex(r"\s+"), "isolated"),
            ]
        )
        alphabet = sorted(set(PROSE + "▁"))
        special += [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    if kind == "sentencepiece":
        tokenizer.pre_tokenizer = None
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


TOKENIZERS = {kind: train(kind) for kind in ("gpt2", "llama3", "sentencepiece")}
TEXTS = st.lists(
    st.one_of(st.sampled_from(WORDS), st.text(st.characters(codec="utf-8"), max_size=3)),
    max_size=40,
).map("".join)


def whole(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(data=st.data(), text=TEXTS)
def test_any_division_gives_the_tokens_of_the_whole(
    kind: str, data: st.DataObject, text: str
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    parts = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
    tokenizer = TOKENIZERS[kind]
    assert list(TokenIds(tokenizer, parts, fresh=False)) == whole(tokenizer, text)


@settings(max_examples=80, deadline=None)
@given(text=TEXTS, limit=st.integers(1, 5))
def test_pieces_lose_nothing_and_a_hard_cut_still_decodes_to_the_text(
    text: str, limit: int
) -> None:
    assert "".join(pieces(text, limit=limit)) == text
    tokenizer = TOKENIZERS["gpt2"]
    ids = list(TokenIds(tokenizer, text, fresh=False, limit=limit))
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_pieces_are_cut_only_where_no_token_crosses() -> None:
    assert list(pieces(["one two", " three.\n", "Four"])) == ["one", " two", " three.\n", "Four"]
    assert list(pieces(["(a).\n\n", "(b)"])) == ["(a).\n\n(b)"]  # GPT-4: `).\n\n` is one word


def test_a_run_without_a_cut_does_not_fill_the_memory() -> None:
    def endless() -> Iterator[str]:
        yield from itertools.repeat("=" * 1000, 5000)

    tracemalloc.start()
    longest = max(len(piece) for piece in pieces(endless()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert longest <= text_module.HARD_LIMIT + 1000
    assert peak < 2_000_000


def test_start_tokens_come_once_and_only_before_a_fresh_text() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = train("gpt2")
    assert start_tokens(tokenizer) == []
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", bos), ("</s>", tokenizer.eos_token_id)]
    )
    assert start_tokens(tokenizer) == [bos]
    fresh = list(TokenIds(tokenizer, ["The ship", " and the", " rain"], fresh=True))
    rest = list(TokenIds(tokenizer, ["The ship", " and the", " rain"], fresh=False))
    assert fresh == [bos, *rest]
    assert bos not in rest


@settings(max_examples=80, deadline=None)
@given(text=TEXTS)
def test_decoder_gives_the_text_token_by_token(text: str) -> None:
    tokenizer = TOKENIZERS["gpt2"]
    decoder = Decoder(tokenizer)
    shown = [decoder.put(token) for token in whole(tokenizer, text)]
    assert "".join(shown) + decoder.end() == text


def test_decoder_holds_a_character_back_until_it_is_whole_and_not_for_ever() -> None:
    tokenizer = TOKENIZERS["gpt2"]
    decoder = Decoder(tokenizer)
    shown = [decoder.put(token) for token in whole(tokenizer, "🧭")]
    assert len(shown) > 1
    assert shown == [""] * (len(shown) - 1) + ["🧭"]
    broken = whole(tokenizer, "🧭")[0]
    decoder = Decoder(tokenizer)
    assert "\ufffd" in "".join(decoder.put(broken) for _ in range(20))


@pytest.mark.slow
def test_the_embedded_tokenizer_too() -> None:
    if embedded_file() is None:
        pytest.skip("the default model is not installed")
    _, tokenizer = models.load()
    text = PROSE * 50

    @settings(max_examples=80, deadline=None)
    @given(extra=TEXTS, size=st.integers(1, 200))
    def check(extra: str, size: int) -> None:
        joined = text[:500] + extra + text[500:1000]
        parts = [joined[i : i + size] for i in range(0, len(joined), size)]
        assert list(TokenIds(tokenizer, parts, fresh=False)) == whole(tokenizer, joined)

    check()


# ---- sources


def write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


@settings(max_examples=100, deadline=None)
@given(text=TEXTS, size=st.integers(1, 7))
def test_source_decodes_across_borders(text: str, size: int) -> None:
    class Drip(io.BytesIO):
        def read1(self, limit: int | None = -1) -> bytes:
            return self.read(size)

    text = "x" + text.replace("\0", "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", type("Stdin", (), {"buffer": Drip(text.encode())}))
        with TextSource("-") as source:
            assert "".join(source) == text
            assert source.bytes_read == len(text.encode())


def test_source_knows_the_size_of_a_file_and_takes_a_mark_off(tmp_path: Path) -> None:
    with TextSource(write(tmp_path / "a.txt", b"\xef\xbb\xbfOnce")) as source:
        assert source.bytes_total == 7
        assert list(source) == ["Once"]


def test_bytes_done_follows_the_tokens() -> None:
    ids = TokenIds(TOKENIZERS["gpt2"], PROSE, fresh=False)
    total, half = len(PROSE.encode()), len(whole(TOKENIZERS["gpt2"], PROSE)) // 2
    stream = iter(ids)
    list(itertools.islice(stream, half))
    assert 0.3 * total < ids.bytes_done < 0.7 * total
    list(stream)
    assert ids.bytes_done == pytest.approx(total)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b" \n\n ", "is empty"),
        (b"MZ\x90\0\0", "is not a text file: it has a NUL byte at byte 3"),
        ("\ufeffhi".encode("utf-16-le"), "is UTF-16 text"),
        (b"caf\xe9 au lait", "is not UTF-8 text: byte 3 cannot be decoded"),
        (b"ends in the middle \xe2\x82", "is not UTF-8 text: byte 19 cannot be decoded"),
        (b"x" * 70000 + b"\0", "NUL byte at byte 70,000"),
        (b"x" * 65535 + b"\xc3" + b"x", "byte 65,535 cannot be decoded"),
    ],
)
def test_what_is_no_text_is_told_in_a_sentence(
    tmp_path: Path, content: bytes, sentence: str
) -> None:
    path = write(tmp_path / "input", content)
    with pytest.raises(UserError, match=sentence) as caught, TextSource(path) as source:
        list(source)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize("lenient", [False, True])
def test_a_mark_of_byte_order_is_no_text_however_it_arrives(lenient: bool, tmp_path: Path) -> None:
    path = tmp_path / "marked"
    for content in (b"\xef\xbb\xbfHello", b"Hello"):
        path.write_bytes(content)
        for cut in range(len(content)):
            parts = iter([content[:cut], content[cut:], b""] if cut else [content, b""])
            with TextSource(str(path), lenient=lenient) as source:
                source._first, source._take = None, parts.__next__  # type: ignore[method-assign]
                assert "".join(source) == "Hello"


def test_lenient_reads_on_over_bad_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "log", b"caf\xe9 \0 end\xe2\x82")
    with TextSource(path, lenient=True) as source:
        assert "".join(source) == "caf\ufffd \ufffd end\ufffd"


def test_missing_folder_and_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="There is no file"):
        TextSource(str(tmp_path / "none.txt"))
    with pytest.raises(UserError, match="is a folder"):
        TextSource(str(tmp_path))
    with pytest.raises(UserError, match="cannot be opened"):
        TextSource("bad\0name")
    path = write(tmp_path / "secret.txt", b"words")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(UserError, match="permission denied"):
        TextSource(path)


def test_a_pipe_is_read_as_it_comes() -> None:
    read_end, write_end = os.pipe()
    os.write(write_end, b"first ")
    with (
        os.fdopen(read_end, "rb") as pipe,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr("sys.stdin", type("Stdin", (), {"buffer": pipe}))
        texts = iter(TextSource("-"))
        assert next(texts) == "first "  # does not wait for a whole piece
        os.write(write_end, b"second")
        os.close(write_end)
        assert list(texts) == ["second"]


PIECES = [" a day", "\n\nIt rains", "now", " 12345", "…", " ünï cödé", "\t", " 。次", "a" * 300]


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_many_pieces_at_once_are_each_by_itself(name: str) -> None:
    encoder = Encoder(TOKENIZERS[name])
    assert encoder.encode_all(PIECES) == [encoder.encode(piece, first=False) for piece in PIECES]
    assert encoder.encode_all([]) == []
