"""The command line as a whole: help, documentation, errors and endings; `fam info` and `fam masks`."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from command_line import CONFIG, Run, loaded, refused, start

from transformerfam import cli, models
from transformerfam.commands import _compare, _options, _session
from transformerfam.commands.eval import _data
from transformerfam.config import FamConfig
from transformerfam.embedded import SHIPPED

DOCS = Path(__file__).parents[1] / "docs" / "cli.md"


def test_help_is_quick_it_imports_no_torch() -> None:
    script = (
        "import sys; sys.argv = ['fam']\n"
        "from transformerfam import cli\n"
        "for name in [None, *cli.command_names()]:\n"
        "    assert cli.main([*([name] if name else []), '--help']) == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_documentation_of_the_command_line_is_current(tmp_path: Path) -> None:
    cli.write_docs(tmp_path / "cli.md")
    assert (tmp_path / "cli.md").read_text() == DOCS.read_text(), (
        "run: python -m transformerfam.cli --write-docs docs/cli.md"
    )


def test_every_command_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert {"read", "generate", "chat", "info", "masks"} <= set(cli.command_names())
    for name in cli.command_names():
        assert re.search(rf"^    {name}\s", shown, re.MULTILINE)


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["write"],
        ["read"],
        ["read", "a", "--max-tokens", "0"],
        ["read", "a", "--max-tokens", "9" * 20],
        ["generate", "a", "--seed", str(2**64)],
    ],
)
def test_wrong_arguments_exit_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    assert "usage: fam" in capsys.readouterr().err


def test_data_of_a_task_may_stand_in_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    assert _data("longqa=~/q.jsonl") == ("longqa", "/home/ann/q.jsonl")


def test_every_field_of_the_geometry_has_an_option() -> None:
    given = {
        "block_size": ("32", 32),
        "memory_segments": ("2", 2),
        "fam_length": ("2", 2),
        "fam_position": ("float", "float"),
        "fam_query_position": ("block_end", "block_end"),
        "fam_start": ("prefix", "prefix"),
        "fam_query": ("static", "static"),
        "first_residual": ("prompt", "prompt"),
        "feedback_norm": ("1,2.5", (1.0, 2.5)),
        "feedback_rms": ("0.5", 0.5),
        "previous_fams": ("2", 2),
        "fam_bias": ("-2.5", -2.5),
        "fam_seen": ("asked", "asked"),
        "attention": ("longformer", "longformer"),
        "window": ("7", 7),
        "global_positions": ("0,3", (0, 3)),
        "random_blocks": ("3", 3),
        "summary_tokens": ("8", 8),
        "sink_tokens": ("4", 4),
        "memory_source": ("output", "output"),
        "compressive_memory": ("delta", "delta"),
        "recurrence": ("rmt", "rmt"),
        "adapted": ("fam", "fam"),
        "stop_gradient": (None, True),
        "backend": ("eager", "eager"),
    }
    assert list(given) == [f.name for f in fields(FamConfig)] == list(_options.GEOMETRY)
    words = ["read", "book.txt"]
    for name, (text, _) in given.items():
        words += ["--" + name.replace("_", "-"), *([text] if text else [])]
    changes = _options.geometry_changes(cli.build_parser(["read"]).parse_args(words))
    assert changes == {name: value for name, (_, value) in given.items()}
    nothing = cli.build_parser(["read"]).parse_args(["read", "book.txt"])
    assert _options.geometry_changes(nothing) == {}


@pytest.mark.parametrize(
    ("words", "saved", "adapter"),
    [
        ([], None, SHIPPED),
        (["--no-adapter"], None, None),
        (["--adapter", "mine"], None, "mine"),
        (["--model", "mine"], None, None),
        (["--memory-source", "output"], None, None),
        (["--model", "mine", "--adapter", "theirs"], None, "theirs"),
        ([], FamConfig(adapted="fam"), SHIPPED),
        ([], models.reading_config(), None),  # made with --no-adapter
    ],
)
def test_the_default_model_comes_with_its_memory(
    words: list[str], saved: FamConfig | None, adapter: str | None
) -> None:
    args = cli.build_parser(["read"]).parse_args(["read", "book.txt", *words])
    assert _session.adapter_of(args, saved) == adapter


def test_an_adapter_and_none_are_not_asked_for_at_once(fam: Run, book: str) -> None:
    code, _, err = fam("read", book, "--adapter", "mine", "--no-adapter")
    assert code == 2 and "not allowed with argument --adapter" in err


@pytest.mark.parametrize(
    ("base", "changes", "expected"),
    [
        (CONFIG, {"attention": "full"}, CONFIG.replace(attention="full", sink_tokens=0)),
        (
            FamConfig.paper(fam_length=2, feedback_norm=(1.0, 2.0), previous_fams=2),
            {"fam_length": 0},
            FamConfig.paper(fam_length=0),
        ),
        (
            FamConfig.paper(fam_length=2, feedback_norm=(1.0, 2.0)),
            {"fam_length": 4},
            FamConfig.paper(fam_length=4),
        ),
        (FamConfig.paper(attention="swa", window=9), {"attention": "bswa"}, FamConfig.paper()),
        (
            FamConfig.paper(fam_length=0, memory_source="output"),
            {"attention": "full"},
            FamConfig.paper(fam_length=0, attention="full"),
        ),
    ],
)
def test_what_contradicts_a_change_goes(
    base: FamConfig, changes: dict[str, Any], expected: FamConfig
) -> None:
    assert _options.changed(base, changes) == expected


# ---- info and masks


def test_info_tells_sizes_and_costs(fam: Run, folder: str, tmp_path: Path, book: str) -> None:
    code, out, _ = fam("info", folder, "--fam-length", "4")
    assert code == 0
    assert "4 feedback slots (untrained)" in out
    facts = json.loads(fam("info", folder, "--fam-length", "4", "--json")[1])
    read_with = json.loads(fam("read", book, "--json", "--fam-length", "4")[1])
    model, _ = loaded(folder)
    next_logits = 4 * model.config.vocab_size
    assert facts["memory_bytes"] == read_with["memory_bytes"] - next_logits
    assert facts["parameters"] == sum(p.numel() for p in model.parameters()) + 4 * 32
    assert facts["receptive_field"] == (3 * 1 + 1) * 16
    assert [c["length"] for c in facts["cost"]] == [1024 * 4**i for i in range(6)]
    over_full = [c["over_full_attention"] for c in facts["cost"]]
    assert over_full == sorted(over_full, reverse=True)
    assert all(1 < c["over_no_feedback"] < 2 for c in facts["cost"])


def test_info_counts_a_prefix_and_a_memory_that_grows(
    fam: Run, folder: str, book: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = json.loads(
        fam("info", folder, *["--fam-length", "4", "--fam-start", "prefix", "--json"])[1]
    )
    assert prefix["prompt_parameters"] == 3 * 4 * 32
    grows = [
        "--block-size",
        "16",
        "--memory-segments",
        "0",
        "--fam-length",
        "4",
        "--recurrence",
        "autocompressor",
    ]
    assert cli.main(["info", folder, *grows]) == 0
    shown = capsys.readouterr().out
    assert "in the first block, and it grows with the text" in shown
    lengths = shown.splitlines()[-2:]
    assert lengths[0].split()[-4:-2] != lengths[1].split()[-4:-2]  # 12.3 MB  45.6 MB
    assert cli.main(["read", book, "--model", folder, *grows]) == 0
    assert ", and it grows with the text" in capsys.readouterr().out


def test_info_knows_other_memories_and_whether_they_are_trained(
    fam: Run, folder: str, tmp_path: Path
) -> None:
    gates = ["--compressive-memory", "delta"]
    out = fam("info", folder, *gates)[1]
    assert "a compressive memory (delta rule) (untrained)" in out
    assert "further back through its memory" in out
    model, tokenizer = loaded(folder, CONFIG.replace(compressive_memory="delta"))
    model.save_pretrained(tmp_path / "kept")
    tokenizer.save_pretrained(tmp_path / "kept")
    assert "a compressive memory (delta rule) (trained)" in fam("info", str(tmp_path / "kept"))[1]
    prefix = ["--fam-length", "4", "--fam-start", "prefix", "--json"]
    assert json.loads(fam("info", folder, *prefix)[1])["prompt_parameters"] == 3 * 4 * 32


def test_what_is_said_of_an_untrained_memory_is_right_for_every_command(
    fam: Run, folder: str, book: str
) -> None:
    few = ["--max-tokens", "20"]
    assert (
        "worse with it than without one (--fam-length 0)"
        in fam("read", book, *few, "--fam-length", "4")[2]
    )
    assert (
        "its gates are nearly shut" in fam("read", book, *few, "--compressive-memory", "delta")[2]
    )
    assert "untrained" not in fam("read", book, *few, "--memory-source", "output")[2]
    assert _session.untrained_remark(FamConfig(), trained=True) == ""


def test_a_memory_of_another_kind_is_compared_under_its_own_name() -> None:
    windows = FamConfig(fam_length=0, block_size=16, memory_segments=1)
    gates = windows.replace(compressive_memory="delta")
    stack = FamConfig(block_size=16, memory_segments=0, fam_length=4, recurrence="rmt")
    for config, trained, name in (
        (windows, True, "FAM 16, untrained"),  # it has none of its own
        (windows.replace(fam_length=4), True, "FAM 4"),
        (gates, True, "Infini-attention"),
        (gates, False, "Infini-attention, untrained"),
        (windows.replace(memory_source="output"), False, "FM"),
        (stack, False, "RMT 4, untrained"),
    ):
        compared = _compare._configs(config, trained)
        assert list(compared)[3] == name
        assert config in compared.values()


def test_info_about_a_memory(fam: Run, book: str, tmp_path: Path) -> None:
    saved = str(tmp_path / "book.fam")
    fam("read", book, "--save", saved, "--max-tokens", "50")
    code, out, _ = fam("info", saved)
    assert code == 0
    assert "50 tokens" in out
    assert "blocks of 16" in out


def test_masks_draws(fam: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    target = tmp_path / "masks.svg"
    assert fam("masks", str(target))[0] == 0
    assert target.read_text().startswith("<?xml")
    refused(fam("masks", str(tmp_path / "masks.gif")))


# ---- endings


def test_a_bug_is_one_line_and_exit_code_1(
    fam: Run, book: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the sky fell\nand more")

    monkeypatch.setattr(models, "load", fail)
    code, out, err = fam("read", book)
    assert (code, out) == (1, "")
    assert err == f"fam: RuntimeError: the sky fell ({cli.DEBUG}=1 says where)\n"
    monkeypatch.setenv(cli.DEBUG, "1")
    assert "Traceback" in fam("read", book)[2]


def test_interrupts_ask_once_and_then_insist(capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)  # a shell that sends tests to the background has none
    with _session.StopOnInterrupt("Stopping soon.") as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        assert capfd.readouterr().err == "\nStopping soon.\n"
        assert list(stop.until([1, 2])) == []
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device")
@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("variants > /dev/full", 1, "No space"),
        ("--version > /dev/full", 1, "No space"),
        ("--version >&-", 0, ""),
        ("variants >&-", 0, ""),
        ("read nowhere.txt 2>&-", 2, ""),
        ("read nowhere.txt <&- 2>&1", 2, ""),
    ],
)
def test_streams_that_are_full_or_closed(line: str, code: int, said: str) -> None:
    script = (
        "import sys; sys.argv[0] = 'fam'; from transformerfam.cli import main; sys.exit(main())"
    )
    argv = f'exec "$0" -c "$1" {line}'
    environment = {name: x for name, x in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        ["sh", "-c", argv, sys.executable, script],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
    )
    assert done.returncode == code
    assert said in done.stderr and "Traceback" not in done.stderr and "ignored" not in done.stderr
    assert done.stderr.count("\n") <= 1
    assert ("2>&-" in line or "read" not in line) == (not done.stdout or code == 0)


@pytest.mark.slow
def test_a_reader_that_goes_away_ends_it_quietly(
    folder: str, processes: list[subprocess.Popen[bytes]]
) -> None:
    process = start("info", folder)
    processes.append(process)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert process.wait() == 141
