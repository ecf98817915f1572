"""The list of variants: every line can be set, trained and counted; a new one is a line."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from command_line import Run
from families import converted, some_tokens

from transformerfam import FamConfig, Memory, variants
from transformerfam.commands.info import model_shape
from transformerfam.cost import SMOLLM2, ModelShape, state_bytes
from transformerfam.training.recipe import Recipe, find
from transformerfam.variants import VARIANTS, Variant

B = 8
SMALL = FamConfig.paper(block_size=B, memory_segments=1, fam_length=2)


def test_names_are_different_and_so_are_settings() -> None:
    assert len({v.name for v in VARIANTS}) == len(VARIANTS)
    settings = [v.settings for v in VARIANTS]
    assert len(set(settings)) == len(settings)
    assert all(v.paper and v.about for v in VARIANTS)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_its_settings_are_those_of_a_recipe(variant: Variant) -> None:
    # As `fam variants` says: fam train paper SETTINGS.
    recipe = Recipe.load(find("paper"), ["data.sources.0.path=x", *variant.settings.split()])
    assert recipe.fam == variant.config(FamConfig.paper())
    assert all(getattr(recipe.feedback, n) == value for n, value in variant.feedback.items())


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_it_reads_and_carries_the_bytes_that_are_counted(variant: Variant) -> None:
    config = variant.config(SMALL)
    model: Any = converted(config)
    shape = model_shape(model)
    memory = Memory.for_model(model)
    for length in (1, 2 * B + 3):
        with torch.no_grad():
            model(some_tokens(1, length), past_key_values=memory)
        assert memory.nbytes == state_bytes(config, shape, memory.position[0], 8)


def test_the_default_shape_is_the_default_models() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=576,
                intermediate_size=1536,
                num_hidden_layers=30,
                num_attention_heads=9,
                num_key_value_heads=3,
                vocab_size=49152,
            )
        )
    assert model_shape(model) == SMOLLM2


def test_the_command_lists_all_for_a_shape(fam: Run, folder: str) -> None:
    code, shown, err = fam("variants", "--block-size", "256", "--length", "10,000")
    assert (code, err) == (0, "")
    for variant in VARIANTS:
        assert f"{variant.name} ({variant.paper})" in shown and variant.settings in shown
    code, shown, _ = fam("variants", "--json", "--model", folder, "--dtype", "bfloat16")
    found = {line["name"]: line for line in json.loads(shown)}
    growing = {name for name, line in found.items() if line["grows"]}
    assert growing == {"full attention", "BigBird", "Sparse Transformer", "AutoCompressor"}
    shape = ModelShape(3, 0, 0, 32, 16, 32, 8)
    assert found["SUM FAM"]["state_bytes"] == state_bytes(
        FamConfig.paper(fam_query="static"), shape, 65536, 2
    )
    assert found["M0"]["flops_per_token"] < found["M12"]["flops_per_token"]


def test_what_does_not_go_is_told_by_name(fam: Run) -> None:
    words = ["--block-size", "4", "--fam-length", "2"]
    code, _, err = fam("variants", *words)
    assert code == 2
    assert "Sparse Transformer does not go with this geometry: summary_tokens=8" in err
    code, _, err = fam("variants", "--model", "./nowhere")
    assert code == 2 and "nowhere" in err


def test_a_new_variant_is_a_line(fam: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As CONTRIBUTING.md says."""
    line = Variant("one slot", "nobody", "one slot for all of a block", {"fam_length": 1})
    monkeypatch.setattr(variants, "VARIANTS", (*VARIANTS, line))
    test_its_settings_are_those_of_a_recipe(line)
    test_it_reads_and_carries_the_bytes_that_are_counted(line)
    code, shown, err = fam("variants")
    assert (code, err) == (0, "")
    assert "one slot (nobody)\n  one slot for all of a block\n  fam.fam_length=1\n  state" in shown
