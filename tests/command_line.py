"""Commands run as a person runs them, on a tiny model in a folder."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny
from test_text import PROSE, train
from test_turns import CHATML, SPECIAL

from transformerfam import cli, models
from transformerfam.config import FamConfig

GEOMETRY = ["--block-size", "16", "--memory-segments", "1"]
CONFIG = models.reading_config().replace(block_size=16, memory_segments=1)
TEXT = PROSE * 6
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A plain model of transformers as it is saved: weights, tokenizer, chat template."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    tokenizer = train("gpt2")
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template = CHATML
    model = tiny(dtype=torch.float32, vocab_size=len(tokenizer))
    with torch.no_grad():
        model.lm_head.weight[tokenizer.all_special_ids] = 0
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def book(tmp_path: Path) -> str:
    path = tmp_path / "book.txt"
    path.write_text(TEXT)
    return str(path)


@pytest.fixture
def fam(
    folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Run a command on the tiny model: (exit code, standard output, standard error)."""

    def run(command: str, *args: str, stdin: str = "", model: str = folder) -> tuple[int, str, str]:
        argv = [command, *args]
        if command in ("read", "generate", "chat"):
            argv += ["--model", model]
        if "--load" not in args and command in ("read", "generate", "chat", "info"):
            argv += GEOMETRY
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        capsys.readouterr()
        code = cli.main(argv)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def refused(result: tuple[int, str, str], *words: str) -> None:
    """Exit code 2, nothing on standard output, one sentence on standard error."""
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("fam: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    for word in words:
        assert word in err


def loaded(folder: str, config: FamConfig = CONFIG) -> tuple[Any, Any]:
    return models.load(folder, config)


def start(*argv: str, **options: Any) -> subprocess.Popen[bytes]:
    script = (
        "import sys; sys.argv[0] = 'fam'; from transformerfam.cli import main; sys.exit(main())"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", script, *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        **options,
    )


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
