"""`fam generate` and `fam chat` as a person runs them."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Run, loaded, refused
from test_text import PROSE

from transformerfam import cli, stream
from transformerfam.commands.chat import Chat
from transformerfam.errors import UserError
from transformerfam.turns import Turns


def test_generate_writes_the_continuation(fam: Run, folder: str, tmp_path: Path) -> None:
    saved = str(tmp_path / "made.fam")
    options = ("--temperature", "0", "--max-new-tokens", "12")
    code, out, err = fam("generate", "The harbour", *options, "--save", saved)
    assert code == 0
    assert "12 tokens in" in err
    model, tokenizer = loaded(folder)
    ids = tokenizer("The harbour", return_tensors="pt")["input_ids"]
    made = model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None)[
        0, ids.shape[1] :
    ]
    assert out == tokenizer.decode(made[:12]) + "\n"
    more = fam("generate", "--load", saved, *options)[1]
    assert more == tokenizer.decode(made[12:]) + "\n"
    piped = fam("generate", "-", *options, stdin="The harbour")[1]
    assert piped == out


def test_generate_samples_repeatably_with_a_seed(fam: Run) -> None:
    def made(*args: str) -> str:
        return fam("generate", "Ann", "--max-new-tokens", "12", "--temperature", "2", *args)[1]

    assert made("--seed", "1") == made("--seed", "1") != made("--seed", "2")


def test_generate_refuses(fam: Run, tmp_path: Path) -> None:
    refused(fam("generate"), "PROMPT")
    refused(fam("generate", "-"), "empty")
    refused(fam("generate", "Ann", "--top-p", "0"), "top_p")


def test_generate_saves_what_it_read_before_a_bad_byte(fam: Run, tmp_path: Path) -> None:
    saved, prompt = tmp_path / "made.fam", PROSE * 400 + "\0"
    refused(fam("generate", "-", "--quiet", "--save", str(saved), stdin=prompt), "NUL")
    assert json.loads(fam("info", str(saved), "--json")[1])["position"][0] > 1000
    assert fam("generate", "-", "--lenient", "--max-new-tokens", "2", stdin=prompt)[0] == 0


# ---- chat


def test_chat_takes_piped_turns_and_commands(fam: Run, tmp_path: Path) -> None:
    saved = tmp_path / "talk.fam"
    lines = [
        "Who?",
        "/info",
        f"/save {saved}",
        "Why?",
        "/reset",
        "/info",
        f"/load {saved}",
        "/info",
    ]
    lines += ["/load", "/load none.fam", "/what", "", "/quit", "Never read."]
    code, out, err = fam(
        "chat", "--temperature", "0", "--max-new-tokens", "5", stdin="\n".join(lines)
    )
    assert code == 0
    assert len(out.split("\n\n")) == 3  # two answers
    said = [line for line in err.splitlines() if "tokens read" in line]
    assert said[0].split()[0] == said[2].split()[0] != "0"
    assert said[1].startswith("0 tokens")
    assert saved.exists()
    for part in ("/load needs", "no memory file none.fam", "/what is no command"):
        assert part in err


def test_chat_goes_on_with_a_book_and_saves(fam: Run, book: str, tmp_path: Path) -> None:
    saved, talk = str(tmp_path / "book.fam"), str(tmp_path / "talk.fam")
    fam("read", book, "--save", saved)
    code, out, err = fam("chat", "--load", saved, "--save", talk, "--quiet", stdin="Who is Ann?\n")
    assert (code, err) == (0, "")
    assert out.strip()
    facts = [json.loads(fam("info", path, "--json")[1]) for path in (saved, talk)]
    assert facts[0]["position"][0] < facts[1]["position"][0]


def test_a_saved_conversation_goes_on_where_it_stopped(fam: Run, tmp_path: Path) -> None:
    talk = str(tmp_path / "talk.fam")
    options = ("--temperature", "0", "--max-new-tokens", "8", "--quiet")
    whole = fam("chat", *options, stdin="Who?\nWhy?\n")[1]
    first = fam("chat", *options, "--save", talk, stdin="Who?\n")[1]
    rest = fam("chat", *options, "--load", talk, "--continue", stdin="Why?\n")[1]
    anew = fam("chat", *options, "--load", talk, stdin="Why?\n")[1]
    assert first + rest == whole
    assert anew != rest
    refused(fam("chat", *options, "--continue"), "--load")


def test_a_chat_in_which_nothing_is_said_leaves_an_older_one_alone(
    fam: Run, book: str, tmp_path: Path
) -> None:
    saved, talk = str(tmp_path / "book.fam"), tmp_path / "talk.fam"
    fam("read", book, "--save", saved)
    fam("chat", "--load", saved, "--save", str(talk), stdin="Who is Ann?\n")
    before = talk.read_bytes()
    for stdin in ("", "/info\n/quit\n", "/what\n"):
        code, _, err = fam("chat", "--load", saved, "--save", str(talk), stdin=stdin)
        assert code == 0 and "Nothing was said" in err
        assert talk.read_bytes() == before
    assert "saved" in fam("chat", "--save", str(talk), stdin="/reset\n")[2]
    assert talk.read_bytes() != before


def test_commands_in_a_chat_know_the_home_folder_and_survive_any_name(
    fam: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    lines = ["Who?", f"/save {'x' * 300}", "/save ~/talk.fam", "/load ~/talk.fam", "Why?"]
    code, out, err = fam("chat", "--max-new-tokens", "5", stdin="\n".join(lines))
    assert code == 0 and out
    assert "cannot be saved" in err and "loaded" in err
    assert (tmp_path / "talk.fam").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, BrokenPipeError])
def test_whatever_ends_a_chat_the_turns_before_are_saved(
    fam: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    """Ctrl-C for the second time in the middle of a turn; or nobody reads what is said."""
    talk, cut = tmp_path / "talk.fam", tmp_path / "cut.fam"
    options = ("--temperature", "0", "--max-new-tokens", "5")
    fam("chat", *options, "--save", str(talk), stdin="Who?\n")
    whole, turns = Chat._turn, []

    def turn(chat: Chat, text: str) -> None:
        turns.append(text)
        if len(turns) == 2:
            monkeypatch.setattr("transformerfam.stream._advance", broken(error, after=1))
        whole(chat, text)

    monkeypatch.setattr(Chat, "_turn", turn)
    code, _, err = fam("chat", *options, "--save", str(cut), stdin="Who?\nWhy?\n")
    assert code == (130 if error is KeyboardInterrupt else 141)
    assert "saved" in err and turns == ["Who?", "Why?"]
    expected, found = (json.loads(fam("info", str(p), "--json")[1]) for p in (talk, cut))
    assert found["position"] == expected["position"]


def broken(error: type[BaseException], after: int) -> Callable[..., Any]:
    """`stream._advance` for some calls, and then an error."""
    calls = iter(range(after))

    def advance(*args: Any, **options: Any) -> Any:
        if next(calls, None) is None:
            raise error
        return whole(*args, **options)

    whole = stream._advance
    return advance


def test_a_turn_that_is_refused_is_none_and_the_conversation_goes_on(
    fam: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--temperature", "0", "--max-new-tokens", "5")
    expected = fam("chat", *options, stdin="Who?\nWhy?\n")[1]
    opening = Turns.opening

    def refusing(turns: Turns, text: str, **which: bool) -> list[int]:
        if text == "no":
            raise UserError("The chat template of this model refuses this: no.")
        return opening(turns, text, **which)

    monkeypatch.setattr(Turns, "opening", refusing)
    code, out, err = fam("chat", *options, stdin="Who?\nno\nWhy?\n")
    assert (code, out) == (0, expected)
    assert "refuses this: no." in err


def test_bytes_that_are_no_text_are_no_accident(
    fam: Run, book: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = "caf\udce9"  # how Python gives a byte of the command line that is not UTF-8
    for argv in (["generate", bad], ["read", book, "--ask", bad], ["chat", "--system", bad]):
        assert cli.main(argv) == 2
        assert "is not UTF-8" in capsys.readouterr().err


def test_nobody_reads_and_the_memory_is_saved(
    fam: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = tmp_path / "made.fam"
    monkeypatch.setattr("transformerfam.stream._advance", broken(BrokenPipeError, after=3))
    options = ("--temperature", "0", "--max-new-tokens", "12", "--save", str(saved))
    assert fam("generate", "The harbour", *options)[0] == 141
    assert saved.exists()


def test_ctrl_c_in_the_prompt_makes_nothing_up(
    fam: Run, book: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, advance = tmp_path / "made.fam", stream._advance

    def interrupted(*args: Any, **options: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return advance(*args, **options)

    monkeypatch.setattr("transformerfam.stream._advance", interrupted)
    text = Path(book).read_text(encoding="utf-8") * 4
    code, out, err = fam("generate", "-", "--save", str(saved), stdin=text)
    assert (code, out) == (130, "\n")
    assert "Stopped after" in err and "of the prompt" in err
    assert saved.exists()
