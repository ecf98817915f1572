"""`fam train` and `fam merge` as a person runs them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from command_line import Run, refused
from peft import LoraConfig, get_peft_model

from transformerfam import cli, load
from transformerfam.config import FamConfig
from transformerfam.models import ADAPTER_FAM_CONFIG, is_trained
from transformerfam.training.recipe import Recipe

FAM = FamConfig.paper(block_size=16, memory_segments=1, fam_length=2, first_residual="prompt")
IDS = torch.arange(3, 60)[None]
ROWS = [{"prompt": f"The number {n} is", "completion": " a number."} for n in range(12)]


@pytest.fixture
def recipe(tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A recipe that trains the tiny model on a few rows; we stand in its folder."""
    monkeypatch.chdir(tmp_path)
    Path("texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    Path("my.toml").write_text(
        f"[model]\nbase = '{folder}'\n"
        "[fam]\nblock_size = 16\nmemory_segments = 1\nfam_length = 2\n"
        "[train]\nrank = 2\nalpha = 2\n"
        "[data]\nlength = 48\nbatch_size = 2\n[[data.sources]]\npath = 'texts.jsonl'\n"
        "[run]\nsteps = 3\ncheckpoint_every = 2\n"
    )
    return "my.toml"


Calls = list[tuple[Recipe, dict[str, Any]]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Training is not done but written down: the recipe and how it was called."""
    made: Calls = []

    def train(recipe: Recipe, **options: Any) -> SimpleNamespace:
        made.append((recipe, options))
        interrupted = options["stop"]()
        return SimpleNamespace(
            folder=Path(recipe.run.output),
            results={"passkey": {"2048": 0.5}},
            steps=2 if interrupted else recipe.run.steps,
            interrupted=interrupted,
        )

    fake: Any = ModuleType("transformerfam.training.trainer")
    fake.train = train
    monkeypatch.setitem(sys.modules, "transformerfam.training.trainer", fake)
    return made


# ---- fam train: from words to a recipe


def test_training_is_called_with_the_recipe_and_its_changes(
    fam: Run, recipe: str, calls: Calls
) -> None:
    code, out, _ = fam("train", recipe, "run.steps=7", "run.output=there", "--quiet")
    assert code == 0
    (found, options), *_ = calls
    assert found == Recipe.load(recipe, ["run.steps=7", "run.output=there"])
    assert options["quiet"] is True
    assert options["resume"] is False
    assert not options["stop"]()
    assert "passkey\n  2048   0.5\n" in out
    assert out.endswith("wrote there after 7 steps; read with it: fam read FILE --model there\n")


ORDERS = [
    ["my.toml", "run.steps=7", "run.seed=1", "--output", "out", "--resume"],
    ["my.toml", "--output", "out", "run.steps=7", "--resume", "run.seed=1"],
    ["--output=out", "--resume", "my.toml", "run.steps=7", "run.seed=1"],
    ["my.toml", "run.steps=7", "--output", "out", "run.seed=1", "--resume"],
]


@pytest.mark.parametrize("words", ORDERS, ids=" ".join)
def test_changes_may_stand_before_and_behind_options(
    words: list[str], fam: Run, recipe: str, calls: Calls
) -> None:
    assert fam("train", *words)[0] == 0
    (found, options), *_ = calls
    assert (found.run.output, found.run.steps, found.run.seed) == ("out", 7, 1)
    assert options["resume"] is True


def test_a_shipped_recipe_is_known_by_its_name(
    fam: Run, calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert fam("train", "passkey", "--output", "2048")[0] == 0
    assert calls[0][0].data.sources[0].kind == "passkey"
    assert calls[0][0].run.output == "2048"


REFUSED: dict[str, tuple[list[str], str]] = {
    "nothing": ([], "Name a recipe, a file or one of paper, passkey"),
    "no file": (["none.toml"], "There is no recipe file none.toml"),
    "no output": (["my.toml"], "no run.output; name a folder with --output"),
    "no data": (["my.toml", "data.sources=[]", "run.output=x"], "The recipe has no data"),
    "unknown": (["my.toml", "run.stepz=1"], "perhaps steps is meant"),
    "not a change": (["my.toml", "run.steps"], "write section.key=VALUE"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_is_refused_in_one_sentence(
    name: str, fam: Run, recipe: str, calls: Calls
) -> None:
    words, reason = REFUSED[name]
    refused(fam("train", *words), reason)
    assert not calls


def test_a_word_that_is_no_change_is_not_taken_for_one(fam: Run, recipe: str) -> None:
    code, out, err = fam("train", recipe, "--output", "x", "word")
    assert (code, out) == (2, "")
    assert "unrecognized arguments: word" in err


def test_settings_are_listed_with_defaults_and_meanings(fam: Run) -> None:
    code, out, _ = fam("train", "--settings")
    assert code == 0
    for words in ("[[data.sources]]", "[fam]", "learning_rate = 0.001", "sink_tokens = 4"):
        assert words in out
    assert "rank of LoRA" in out
    assert max(map(len, out.splitlines())) <= 110


# ---- fam train: stopping, several processes


def test_ctrl_c_ends_after_the_step_and_says_how_to_go_on(
    fam: Run, recipe: str, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer: Any = sys.modules["transformerfam.training.trainer"]
    finished = trainer.train

    def pressed(*args: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return finished(*args, **options)

    monkeypatch.setattr(trainer, "train", pressed)
    code, out, err = fam("train", recipe, "run.seed=1", "--output", "my out")
    assert (code, out) == (130, "")
    assert "stopped after step 2; go on with: " in err
    again = "fam train my.toml run.seed=1 --output 'my out' --resume"
    assert again in err and f"{again} run.steps=2" in err


def test_of_several_processes_one_speaks(
    fam: Run, recipe: str, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert fam("train", recipe, "--output", "out") == (0, "", "")
    assert calls[0][1]["quiet"] is True
    monkeypatch.setenv("RANK", "0")
    assert "wrote out" in fam("train", recipe, "--output", "out")[1]
    assert calls[1][1]["quiet"] is False


def test_it_runs_as_a_module_as_accelerate_starts_it() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "transformerfam", "train", "none.toml"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("fam: There is no recipe file none.toml")


# ---- fam train: for real


def test_an_adapter_comes_of_a_recipe_and_can_be_used(fam: Run, recipe: str) -> None:
    code, out, err = fam("train", recipe, "--output", "out")
    assert code == 0, err
    assert "wrote out after 3 steps" in out
    assert "step 3/3" in err
    written = {path.name for path in Path("out").iterdir()}
    assert {
        "adapter_model.safetensors",
        ADAPTER_FAM_CONFIG,
        "README.md",
        "metrics.jsonl",
    } <= written
    steps = [
        json.loads(line)["step"] for line in Path("out/metrics.jsonl").read_text().splitlines()
    ]
    assert steps == [1, 2, 3]
    model, _ = load("out")
    assert is_trained(model)
    # A run that is there is not trained over.
    refused(fam("train", recipe, "--output", "out", "--quiet"), "--resume")
    assert fam("train", recipe, "--output", "out", "--resume", "run.steps=4")[0] == 0
    assert Path("out/metrics.jsonl").read_text().count("\n") == 4
    assert fam("merge", "out", "merged")[0] == 0
    torch.testing.assert_close(logits(load("merged")[0]), logits(load("out")[0]))


def test_a_dry_run_shows_settings_rows_and_a_sample(fam: Run, recipe: str) -> None:
    with Path("texts.jsonl").open("a") as file:
        file.write('{"promt": "a row that nobody can use"}\n')
    code, out, err = fam("train", recipe, "--dry-run", "optimizer.learning_rate=1e-4")
    assert code == 0, err
    assert "learning_rate = 0.0001" in out
    assert "texts.jsonl, 12 rows, 1 more that cannot be used: " in out
    assert "texts.jsonl:13" in out
    assert "first of " in out
    assert " is a number." in out
    assert "no run.output yet" in err
    assert {path.name for path in Path().iterdir()} == {"my.toml", "texts.jsonl"}


# ---- fam merge


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(IDS).logits
    return found


@pytest.fixture(scope="module")
def adapter(folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A trained adapter of the tiny model."""
    model, _ = load(folder, FAM)
    lora = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], modules_to_save=["fam_prompt"])
    adapted: Any = get_peft_model(model, lora)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 if "lora" in name else 1.0)
    path = tmp_path_factory.mktemp("trained") / "adapter"
    adapted.save_pretrained(path)
    (path / ADAPTER_FAM_CONFIG).write_text(json.dumps(FAM.to_dict()))
    return str(path)


def test_a_merged_model_gives_what_the_adapter_gives(
    fam: Run, adapter: str, tmp_path: Path
) -> None:
    target = tmp_path / "merged"
    code, out, err = fam("merge", adapter, str(target), "--quiet")
    assert (code, err) == (0, "")
    assert out.startswith(f"wrote {target}, ")
    assert f"fam read FILE --model {target}" in out
    model, tokenizer = load(str(target))
    assert model.fam_config == FAM
    assert is_trained(model)
    assert tokenizer.chat_template
    torch.testing.assert_close(logits(model), logits(load(adapter)[0]))
    assert not (target / "adapter_config.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_model_and_type_of_the_weights_can_be_chosen(
    fam: Run, adapter: str, folder: str, tmp_path: Path
) -> None:
    target = tmp_path / "merged"
    target.mkdir()  # an empty folder may be there
    words = ["--model", folder, "--dtype", "bfloat16"]
    assert fam("merge", adapter, str(target), *words)[0] == 0
    model, _ = load(str(target))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.fam_config == FAM


def test_merging_refuses_what_it_would_overwrite_or_cannot_use(
    fam: Run, adapter: str, folder: str, tmp_path: Path
) -> None:
    refused(fam("merge", adapter, folder), "is not empty")
    refused(fam("merge", adapter, str(Path(adapter) / "README.md")), "is a file; name a folder")
    refused(fam("merge", adapter, str(tmp_path / "no" / "where")), "There is no folder")
    refused(fam("merge", folder, str(tmp_path / "x")), "holds no adapter")
    refused(fam("merge", "some/adapter", str(tmp_path / "x")), "name its model with --model")
    assert not list(tmp_path.iterdir())


def test_a_merge_that_fails_leaves_nothing(
    fam: Run, adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def part(folder: Path) -> None:
        (folder / "config.json").write_text("{}")

    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    model = SimpleNamespace(save_pretrained=part, fam_config=FAM)
    parts = model, SimpleNamespace(save_pretrained=full)
    monkeypatch.setattr("transformerfam.models.load", lambda *args, **options: parts)
    code, out, err = fam("merge", adapter, str(tmp_path / "merged"))
    assert (code, out) == (1, "")
    assert "No space left on device" in err
    assert not list(tmp_path.iterdir())


def test_both_commands_are_in_the_help_after_chat() -> None:
    names = cli.command_names()
    assert names[names.index("chat") :][:3] == ["chat", "train", "merge"]
