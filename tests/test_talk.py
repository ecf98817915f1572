"""`fam generate` and `fam chat` as a person runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import Run, loaded, refused


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


@pytest.mark.parametrize("line", ["Who?", None])
def test_chat_saves_at_the_prompt_but_no_half_read_turn(
    fam: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str | None
) -> None:
    saved = tmp_path / "talk.fam"

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    if line is None:  # Ctrl-C while waiting for a turn
        monkeypatch.setattr("transformerfam.commands.chat.Chat._line", interrupt)
    else:  # the second Ctrl-C while the model works
        monkeypatch.setattr("transformerfam.stream._advance", interrupt)
    code, _, err = fam("chat", "--save", str(saved), stdin=f"{line}\n")
    assert code == 130
    assert saved.exists() == (line is None)
    assert ("saved" in err) and ("nothing was saved" in err) == (line is not None)
