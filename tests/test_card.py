"""The model card: what the hub reads at its head, and what a person reads below."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from transformerfam.training import values
from transformerfam.training.card import model_card, package_versions
from transformerfam.training.recipe import Recipe
from transformerfam.training.settings import (
    DataSettings,
    ModelSettings,
    RunSettings,
    SourceSettings,
    TrainSettings,
)

PASSKEY = SourceSettings(kind="passkey", lengths=(1024, 8192), share=0.5)
RESULTS = {"heldout": {"a|b": 2.34567, "mean": 2.5}, "passkey": {"2048": 1.0, "4096": 0.9}}
FACTS = {
    "seconds": 336.0,
    "steps": 1500,
    "tokens": 12345678,
    "processes": 2,
    "versions": {"torch": "9.9", "transformerfam": "0.1.0"},
}


def recipe(**changes: Any) -> Recipe:
    made = Recipe(
        data=DataSettings(sources=(SourceSettings(path="texts.jsonl"), PASSKEY)),
        run=RunSettings(output="some/where/my-adapter", seed=7),
    )
    return made.replace(**changes)


def card(made: Recipe | None = None, results: Any = RESULTS, facts: Any = FACTS) -> str:
    return model_card(made or recipe(), results, facts)


def head(text: str) -> dict[str, Any]:
    """The front matter as the hub reads it."""
    found: dict[str, Any] = ModelCard(text, ignore_metadata_errors=False).data.to_dict()
    return found


def test_the_hub_understands_the_head() -> None:
    found = head(card())
    assert found["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert found["base_model_relation"] == "adapter"
    assert found["library_name"] == "peft"
    assert found["pipeline_tag"] == "text-generation"
    assert {"transformerfam", "lora"} <= set(found["tags"])
    assert "datasets" not in found  # a file is no data set of the hub


def test_only_names_on_the_hub_are_named_as_such(tmp_path: Path) -> None:
    for base in (str(tmp_path), "./here", "model.gguf", "a/b/c"):
        assert "base_model" not in head(card(recipe(model=ModelSettings(base=base))))
    named = recipe(
        model=ModelSettings(base="org/model-1.5B"),
        data=DataSettings(sources=(SourceSettings(path="org/texts"), PASSKEY)),
    )
    assert head(card(named))["base_model"] == "org/model-1.5B"
    assert head(card(named))["datasets"] == ["org/texts"]


def test_a_whole_model_is_no_adapter() -> None:
    text = card(recipe(train=TrainSettings(what="full")))
    assert head(text)["library_name"] == "transformers"
    assert head(text)["base_model_relation"] == "finetune"
    assert "lora" not in head(text)["tags"]
    assert "fam merge" not in text
    assert "fam merge" in card()


def test_it_says_how_to_load_it() -> None:
    text = card()
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(code) == 1
    compile(code[0], "card", "exec")
    assert 'transformerfam.load("folder")' in code[0]
    assert "fam read book.txt --model folder" in text


def test_it_holds_the_recipe_as_it_can_be_used_again() -> None:
    toml = re.findall(r"```toml\n(.*?)```", card(), re.DOTALL)
    assert Recipe.from_dict(values.parse_toml(toml[0])) == recipe()


def test_tables_say_what_was_done_and_what_came_of_it() -> None:
    text = card()
    assert text.partition("---\n\n")[2].startswith("# my-adapter\n")
    for row in (
        "| fam_length | 64 |",
        '| first_residual | `"prompt"` |',
        "| data | `texts.jsonl`<br>PassKey texts of 1,024 to 8,192 tokens, share 0.5 |",
        "| steps | 1,500 |",
        "| tokens read | 12,345,678 |",
        "| duration | 5 min 36 s |",
        "| processes | 2 |",
        "| seed | 7 |",
        "| versions | torch 9.9, transformerfam 0.1.0 |",
        r"| a\|b | 2.346 |",
        "| 4096 | 0.9 |",
    ):
        assert f"{row}\n" in text, row
    assert "### heldout\n\nMean loss" in text
    assert "of 10 at each length" in text


def test_what_is_not_known_is_left_out() -> None:
    text = card(recipe(data=DataSettings(), run=RunSettings()), {}, {})
    assert "## Results" not in text
    assert "duration" not in text
    assert "| data | not of the recipe |" in text
    assert "# TransformerFAM\n" in text
    assert f"torch {package_versions()['torch']}" in text
    assert {"transformerfam", "transformers", "peft"} <= set(package_versions())


def test_a_model_without_feedback_is_called_that() -> None:
    made = recipe()
    text = card(made.replace(fam=made.fam.without_feedback()))
    assert "no feedback memory" in text


def test_other_memories_are_called_what_they_are() -> None:
    windows = recipe().fam.without_feedback()

    def of(what: Any, **changes: Any) -> str:
        made = recipe(fam=windows.changed(**changes))
        return card(made.replace(train=replace(made.train, what=what)))

    gates = of("lora", compressive_memory="delta")
    assert "a compressive memory in each head (delta rule)" in gates
    assert "[Infini-attention](https://arxiv.org/abs/2404.07143)" in gates
    assert "LoRA on its matrices and the gates of the memory." in gates
    assert "compressive-memory" in head(gates)["tags"]
    assert "the gates of the memory alone." in of("prompt", compressive_memory="linear")
    assert "past blocks as the layers' outputs" in of("lora", memory_source="output")
    rmt = of("lora", recurrence="rmt", fam_length=4, memory_segments=0)
    assert "4 memory tokens" in rmt and "[RMT](https://arxiv.org/abs/2207.06881)" in rmt
    assert "Trained was LoRA on its matrices.\n" in of("lora")


@pytest.mark.parametrize("what", ["lora", "prompt", "full"])
def test_it_says_what_was_trained(what: Any) -> None:
    words = {"lora": "LoRA", "prompt": "prompt alone", "full": "every weight"}
    made = recipe()
    assert words[what] in card(made.replace(train=replace(made.train, what=what)))
