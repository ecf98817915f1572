"""Folders of a run: what cannot be used is refused before anything is loaded, and nothing is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import Run, refused
from test_adaptation import base_folder, short, trained_on

from transformerfam.errors import UserError
from transformerfam.training import places
from transformerfam.training.recipe import Recipe


@pytest.fixture
def made(tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A recipe for the tiny model; we stand in its folder."""
    monkeypatch.chdir(tmp_path)
    Path("texts.jsonl").write_text('{"text": "a number is a number"}\n')
    return Recipe.from_dict(
        {
            "model": {"base": folder},
            "fam": {"block_size": 8, "fam_length": 2},
            "data": {"length": 16, "batch_size": 1, "sources": [{"path": "texts.jsonl"}]},
            "run": {"output": "out", "steps": 1},
        }
    )


def refusal(recipe: Recipe) -> str:
    with pytest.raises(UserError) as caught:
        places.check(recipe)
    return str(caught.value)


def changed(recipe: Recipe, section: str, **values: Any) -> Recipe:
    table = recipe.to_dict()
    table[section].update(values)
    return Recipe.from_dict(table)


def test_an_adapter_is_no_base_unless_all_is_trained(made: Recipe, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    on_it = changed(made, "model", base="adapter")
    assert "give it as model.adapter" in refusal(on_it)
    places.check(changed(on_it, "train", what="full"))


@pytest.mark.parametrize("key", ["base", "adapter"])
def test_what_is_read_is_not_overwritten(made: Recipe, tmp_path: Path, key: str) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "config.json").write_text("{}")
    (tmp_path / "there" / "adapter_config.json").write_text("{}")
    recipe = changed(made, "train", what="full") if key == "base" else made
    recipe = changed(recipe, "model", **{key: "there"})
    assert f"run.output and model.{key} are both" in refusal(
        changed(recipe, "run", output=str(tmp_path / "there"))
    )


def test_a_folder_of_other_things_is_not_written_into(made: Recipe) -> None:
    Path("out").mkdir()
    places.check(made)  # empty
    Path("out/README.md").write_text("mine")
    assert "is not empty and holds no run" in refusal(made)
    Path("out/metrics.jsonl").write_text("")
    places.check(made)


def test_a_place_that_cannot_be_written_is_refused(made: Recipe) -> None:
    assert "is a file" in refusal(changed(made, "run", output="texts.jsonl"))
    assert "cannot be written" in refusal(changed(made, "run", output="texts.jsonl/out"))


def test_a_home_folder_is_put_in_full(
    made: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    full = places.with_full_paths(changed(made, "run", output="~/out"))
    assert full.run.output == str(tmp_path / "out")
    assert full.model == made.model


def test_the_command_refuses_before_it_loads_a_model(
    made: Recipe, fam: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformerfam.training import adaptation

    monkeypatch.setattr(adaptation, "load", lambda *_, **__: pytest.fail("loaded a model"))
    Path("my.toml").write_text(made.to_toml())
    refused(fam("train", "my.toml", "--output", "texts.jsonl"), "texts.jsonl is a file")


def test_a_run_that_failed_in_its_first_step_blocks_nothing(made: Recipe, fam: Run) -> None:
    Path("my.toml").write_text(made.to_toml())
    Path("texts.jsonl").write_text('{"text": "a"}\n')  # one token, nothing to predict
    refused(fam("train", "my.toml", "--quiet"), "no row that can be used")
    Path("texts.jsonl").write_text('{"text": "a number is a number"}\n')
    code, _, err = fam("train", "my.toml", "--quiet")
    assert code == 0, err
    lines = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1]


def test_an_adapter_names_the_model_of_its_recipe(tmp_path: Path) -> None:
    first, second = tmp_path / "one", tmp_path / "two"
    for place in (first, second):
        place.mkdir()
    trained_on(short(tmp_path, base_folder(first)))
    base = base_folder(second)
    trained_on(short(tmp_path, base, "on", model={"adapter": str(tmp_path / "adapter")}))
    config = json.loads((tmp_path / "on" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base
