"""Training in several processes is training in one; a process that is killed loses nothing."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from transformerfam.training.recipe import Recipe
from transformerfam.training.trainer import train

STEPS = 4
KINDS: dict[str, dict[str, Any]] = {
    "packed": {
        "data": {"layout": "packed"},
        "feedback": {"state_passing": 0.7, "position_offset": 0.5, "bias_steps": 0},
    },
    "documents": {"data": {"layout": "documents"}, "feedback": {"bptt_blocks": 2, "bias_steps": 0}},
}

# Accelerate shards weights on GPUs only; told that these are some, it does so on the CPU.
FSDP = """
import sys
from accelerate import PartialState
from accelerate.utils import DistributedType
PartialState(cpu=True)
PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
from transformerfam import cli
sys.argv[0] = "fam"
sys.exit(cli.main())
"""
FSDP_ENVIRONMENT = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


@pytest.fixture
def table(folder: str, tmp_path: Path) -> dict[str, Any]:
    """A recipe for the tiny model, all but layout and feedback."""
    # Documents end at different times in different rows.
    rows = [{"text": f"Number {n} is said in a stream. " * (1 + n % 5)} for n in range(20)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": {"base": folder},
        "fam": {"block_size": 8, "memory_segments": 1, "fam_length": 2},
        "train": {"rank": 2, "alpha": 2.0},
        "data": {
            "length": 24,
            "batch_size": 4,
            "sources": [{"path": str(tmp_path / "texts.jsonl")}],
        },
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2},
        "run": {
            "steps": STEPS,
            "checkpoint_every": 2,
            "tensorboard": False,
            "activation_checkpointing": False,
        },
    }


def of_kind(table: dict[str, Any], kind: str, output: Path, **run: Any) -> Recipe:
    sections = {**table, "feedback": KINDS[kind]["feedback"]}
    sections["data"] = {**table["data"], **KINDS[kind]["data"]}
    sections["run"] = {**table["run"], "output": str(output), **run}
    return Recipe.from_dict(sections)


def command(recipe: Recipe, *options: str) -> list[str]:
    file = Path(recipe.run.output).with_suffix(".toml")
    file.write_text(recipe.to_toml())
    return ["train", str(file), "--quiet", *options]


def in_two(recipe: Recipe, *options: str, sharded: bool = False) -> str:
    """Train in two processes; what they said."""
    place = Path(recipe.run.output).parent
    (place / "sharded.py").write_text(FSDP)
    program = [str(place / "sharded.py")] if sharded else ["-m", "transformerfam"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    done = subprocess.run(
        [sys.executable, *launch, *program, *command(recipe, *options)],
        env=environment(**(FSDP_ENVIRONMENT if sharded else {})),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **more}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in lines(folder)]


def assert_same_run(ours: Path, theirs: Path) -> None:
    for name in ("loss", "grad_norm"):
        values, expected = ([line[name] for line in lines(f)] for f in (ours, theirs))
        assert values == pytest.approx(expected, rel=1e-5)
    for name in ("step", "tokens", "rate"):
        assert [line[name] for line in lines(ours)] == [line[name] for line in lines(theirs)]
    adapter, expected_adapter = (load_file(f / "adapter_model.safetensors") for f in (ours, theirs))
    assert adapter.keys() == expected_adapter.keys()
    for name, tensor in adapter.items():
        # Where a gradient is nearly 0, Adam follows its sign.
        torch.testing.assert_close(tensor, expected_adapter[name], rtol=1e-3, atol=1e-4)


# ---- two processes


@pytest.mark.slow
def test_two_processes_train_what_one_does(table: dict[str, Any], tmp_path: Path) -> None:
    train(of_kind(table, "packed", tmp_path / "one"), quiet=True)
    out = in_two(of_kind(table, "packed", tmp_path / "two"))
    assert out.count("wrote ") == 1  # the first one speaks
    assert_same_run(tmp_path / "two", tmp_path / "one")
    assert "| processes | 2 |" in (tmp_path / "two" / "README.md").read_text()


@pytest.mark.slow
def test_two_processes_ask_what_one_does(table: dict[str, Any], tmp_path: Path) -> None:
    """Also where a process has nothing to ask behind a block: the other must not wait for it."""
    table["fam"] |= {"block_size": 32, "adapted": "fam", "fam_seen": "asked"}
    source = {"kind": "passkey", "lengths": [240, 250, 300], "where": "anywhere", "digits": 2}
    table["data"] |= {"layout": "single", "length": 400, "sources": [source]}
    one = Recipe.from_dict({**table, "feedback": {"asked_blocks": 2, "bias_steps": 0}})
    one, two = (
        one.replace(run=replace(one.run, output=str(tmp_path / name))) for name in ("one", "two")
    )
    train(one, quiet=True)
    in_two(two)
    assert_same_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_two_processes_replay_what_one_does(table: dict[str, Any], tmp_path: Path) -> None:
    """Their gradients come in pieces, past the wrapper that would add them up."""
    table["fam"] |= {"block_size": 200, "adapted": "fam", "fam_seen": "asked"}
    source = {"kind": "passkey", "lengths": [300], "where": "anywhere", "digits": 2}
    table["data"] |= {"layout": "single", "length": 400, "sources": [source]}
    replay = {"blocks": 4, "before": [0, 1], "behind": [1, 3], "times": 2, "rows_at_once": 1}
    feedback = {"asked_blocks": 2, "bptt_blocks": 2, "bias_steps": 0}
    one = Recipe.from_dict({**table, "feedback": feedback, "replay": replay})
    one, two = (
        one.replace(run=replace(one.run, output=str(tmp_path / name))) for name in ("one", "two")
    )
    train(one, quiet=True)
    in_two(two)
    assert_same_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["DDP", "FSDP2"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_that_go_on_train_what_one_does_at_once(
    kind: str, sharded: bool, table: dict[str, Any], tmp_path: Path
) -> None:
    steps = 8
    train(of_kind(table, kind, tmp_path / "one", steps=steps), quiet=True)
    two = tmp_path / "two"
    in_two(of_kind(table, kind, two, steps=3), sharded=sharded)
    assert losses(two) == pytest.approx(losses(tmp_path / "one")[:3], rel=1e-5)
    in_two(of_kind(table, kind, two, steps=steps), "--resume", sharded=sharded)
    assert_same_run(two, tmp_path / "one")


@pytest.mark.slow
def test_what_two_processes_began_one_may_go_on_with(table: dict[str, Any], tmp_path: Path) -> None:
    train(of_kind(table, "packed", tmp_path / "one", steps=6), quiet=True)
    in_two(of_kind(table, "packed", tmp_path / "two", steps=3))
    train(of_kind(table, "packed", tmp_path / "two", steps=6), resume=True, quiet=True)
    assert_same_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_documents_must_go_on_with_as_many_processes(table: dict[str, Any], tmp_path: Path) -> None:
    from transformerfam.errors import UserError

    in_two(of_kind(table, "documents", tmp_path / "two", steps=2))
    with pytest.raises(UserError, match=r"the memories of 2 processes .*; go on with 2 processes"):
        train(of_kind(table, "documents", tmp_path / "two"), resume=True, quiet=True)


# ---- killed


def killed(recipe: Recipe, after_lines: int, delay: float, *options: str) -> int:
    """Train in a process that is killed `delay` seconds after it wrote so many lines more.

    Returns:
        Its exit status: 0 if it was done before.
    """
    file = Path(recipe.run.output) / "metrics.jsonl"
    before = file.stat().st_mtime_ns if file.exists() else 0
    process = subprocess.Popen(
        [sys.executable, "-m", "transformerfam", *command(recipe, *options)],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    wrote, give_up = 0, time.monotonic() + 60
    while process.poll() is None and wrote < after_lines and time.monotonic() < give_up:
        time.sleep(0.002)
        if file.exists() and (now := file.stat().st_mtime_ns) != before:
            before, wrote = now, wrote + 1
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    said = process.communicate()[1].decode()
    assert process.returncode in (0, -signal.SIGKILL), said
    return process.returncode


def has_checkpoint(folder: Path) -> bool:
    return any((folder / "checkpoints").glob("step-*"))


def assert_exactly_the_same_run(ours: Path, theirs: Path) -> None:
    assert [line["step"] for line in lines(ours)] == [line["step"] for line in lines(theirs)]
    assert losses(ours) == losses(theirs)
    adapter, expected = (load_file(f / "adapter_model.safetensors") for f in (ours, theirs))
    assert all(torch.equal(adapter[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_exactly(table: dict[str, Any], tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 20, "checkpoint_every": 1}
    folder = tmp_path / "killed"
    recipe = of_kind(table, "documents", folder, **options)
    assert killed(recipe, 4, random.Random(0).uniform(0, 0.1)) == -signal.SIGKILL
    assert has_checkpoint(folder) and not (folder / "README.md").exists()
    train(recipe, resume=True, quiet=True)
    train(of_kind(table, "documents", tmp_path / "whole", **options), quiet=True)
    assert_exactly_the_same_run(folder, tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_killed_again_and_again_ends_the_same(
    kind: str, table: dict[str, Any], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"steps": 60, "checkpoint_every": 2}
    folder, rng = tmp_path / "killed", random.Random(f"kill/{kind}")
    recipe, status, kills = of_kind(table, kind, folder, **options), -9, 0
    while status:
        resume = ["--resume"] if has_checkpoint(folder) else []
        often = rng.randint(4, 20) if kills < 8 else 10**9
        status = killed(recipe, often, rng.uniform(0, 0.2), *resume)
        kills += 1
    assert kills > 4
    train(of_kind(table, kind, tmp_path / "whole", **options), quiet=True)
    assert_exactly_the_same_run(folder, tmp_path / "whole")
    # Nothing half written is left behind.
    assert not [p.name for p in folder.rglob(".*") if p.name.startswith(".step-")]
