from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from families import tiny
from peft import LoraConfig, get_peft_model
from tiny_tokenizer import tiny_tokenizer
from transformers import BertConfig, LlamaForCausalLM, T5Config

from transformerfam import FamConfig, UnsupportedModelError, load, models
from transformerfam.conversion import twin
from transformerfam.embedded import ModelError
from transformerfam.errors import UserError
from transformerfam.models import ADAPTER_FAM_CONFIG, is_trained, reading_config
from transformerfam.training import adaptation
from transformerfam.training.recipe import Recipe, find

IDS = torch.arange(3, 33)[None]
FAM = FamConfig.paper(block_size=8, memory_segments=1, fam_length=2, first_residual="prompt")

# ---- tiny models on disk


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama as transformers saves it."""
    folder = tmp_path_factory.mktemp("models") / "plain"
    tiny(dtype=torch.float32).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def changed(plain: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of `plain` in which files are replaced, or left out where None."""

    def make(**files: bytes | str | None) -> Path:
        folder = tmp_path / "changed"
        folder.mkdir()
        contents: dict[str, bytes | str | None] = {
            file.name: file.read_bytes() for file in plain.iterdir()
        }
        contents |= {name.replace("_json", ".json"): data for name, data in files.items()}
        for name, data in contents.items():
            if data is not None:
                (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)
        return folder

    return make


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(ids).logits


# ---- folders


def test_a_plain_model_is_set_up_for_reading(plain: Path) -> None:
    model, tokenizer = load(str(plain))
    assert model.fam_config == reading_config() == FamConfig(fam_length=0)
    assert not is_trained(model)
    assert not model.training
    assert model.dtype == torch.float32
    # Shorter than a block there is nothing that a window could hide.
    expected = logits(LlamaForCausalLM.from_pretrained(plain))
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    assert tokenizer.decode(tokenizer("without an end").input_ids) == "without an end"


def test_geometry_type_and_device_are_chosen(plain: Path) -> None:
    model, _ = load(str(plain), FAM, dtype="bfloat16", device="cpu")
    assert model.fam_config == FAM
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.get_decoder().fam_prompt.weight.shape == (2, 32)
    assert not is_trained(model)
    assert load(str(plain), dtype=torch.float64)[0].dtype == torch.float64
    with pytest.raises(ModelError, match="cannot be of type int8"):
        load(str(plain), dtype="int8")
    with pytest.raises(ModelError, match="cannot be of type floaty"):
        load(str(plain), dtype="floaty")


def test_a_saved_transformerfam_comes_back_as_it_was(plain: Path, tmp_path: Path) -> None:
    model, tokenizer = load(str(plain), FAM)
    with torch.no_grad():
        model.get_decoder().fam_prompt.weight.add_(1)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = load(str(tmp_path))
    assert again.fam_config == FAM
    assert is_trained(again)
    fresh = twin(again, again.fam_config.replace(fam_length=3))
    assert is_trained(again) and not is_trained(fresh)  # a prompt of another length is made anew
    assert torch.equal(logits(again), logits(model))

    wider: Any = load(str(tmp_path), FAM.replace(memory_segments=2))[0]
    assert wider.fam_config.memory_segments == 2
    assert is_trained(wider)
    assert torch.equal(wider.get_decoder().fam_prompt.weight, model.get_decoder().fam_prompt.weight)
    longer, _ = load(str(tmp_path), FAM.replace(fam_length=3))
    assert not is_trained(longer)  # its prompt is new
    without, _ = load(str(tmp_path), FAM.without_feedback())
    assert not is_trained(without)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no configuration": ({"config_json": None}, "holds no model: it has no config.json"),
    "configuration cut short": ({"config_json": '{"model_'}, "does not understand the config.json"),
    "configuration of nothing": ({"config_json": "{}"}, "does not understand the config.json"),
    "unknown family": ({"config_json": '{"model_type": "x1"}'}, "does not understand .* `x1`"),
    "translation model": (
        {"config_json": T5Config(d_model=8).to_json_string()},
        "is a t5 model, which transformers does not know as a causal language model",
    ),
    "no tokenizer": (
        {"tokenizer_json": None, "tokenizer_config_json": None},
        "has no tokenizer that can be used",
    ),
    "tokenizer cut short": ({"tokenizer_json": '{"version": "1.0"'}, "has no tokenizer that can"),
    "no weights": ({"model.safetensors": None}, "The weights of .* cannot be loaded"),
    "weights cut short": ({"model.safetensors": b"\x10"}, "The weights of .* cannot be loaded"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_in_one_sentence(name: str, changed: Callable[..., Path]) -> None:
    files, reason = REFUSED[name]
    folder = changed(**files)
    with pytest.raises(ModelError, match=reason) as caught:
        load(str(folder))
    message = str(caught.value)
    assert str(folder) in message
    assert "\n" not in message
    assert len(message) < 450
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, UserError)


def test_refuses_weights_that_are_not_all_there(changed: Callable[..., Path]) -> None:
    """transformers would put random numbers in their place."""
    folder = changed()
    state = tiny(dtype=torch.float32).state_dict()
    del state["model.layers.1.mlp.up_proj.weight"]
    tiny(dtype=torch.float32).save_pretrained(folder, state_dict=state)
    with pytest.raises(ModelError, match=r"lacks 1 of its weights, .* model\.layers\.1\.mlp\.up"):
        load(str(folder))


def test_refuses_a_model_that_cannot_be_converted(changed: Callable[..., Path]) -> None:
    config = BertConfig(
        hidden_size=8, num_attention_heads=1, num_hidden_layers=1, is_decoder=True, vocab_size=64
    )
    folder = changed()
    from transformers import BertLMHeadModel

    BertLMHeadModel(config).save_pretrained(folder)
    with pytest.raises(UnsupportedModelError):
        load(str(folder))


@pytest.mark.parametrize("name", ["./nothing-here", "/nowhere/at/all", "~/no-such-folder-here"])
def test_refuses_paths_that_lead_nowhere(name: str) -> None:
    with pytest.raises(ModelError, match="neither a folder with a model"):
        load(name)


def test_refuses_files_that_are_no_models(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"neither a folder with a model nor a \.gguf file"):
        load(str(plain / "config.json"))
    with pytest.raises(ModelError, match=r"There is no file .*x\.gguf"):
        load(str(tmp_path / "x.gguf"))
    (tmp_path / "x.gguf").write_bytes(b"not what it says" * 9)
    with pytest.raises(ModelError, match=r"x\.gguf cannot be read as a language model"):
        load(str(tmp_path / "x.gguf"))


# ---- the hub, which no test may ask


def no_network(name: str, **options: Any) -> None:
    raise ConnectionError("[Errno -2] Name or service not known")


def busy(name: str, **options: Any) -> None:
    kind = huggingface_hub.errors.HfHubHTTPError
    error: Any = kind.__new__(kind)
    error.response = SimpleNamespace(status_code=503)
    raise error


def test_an_unknown_name_without_a_network_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "model_info", no_network)
    start = time.monotonic()
    with pytest.raises(ModelError, match=r"There is no folder some/model, and the hub, .* reached"):
        load("some/model")
    assert time.monotonic() - start < 5


def test_a_name_that_the_hub_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    class NotThere(huggingface_hub.errors.HfHubHTTPError):
        def __init__(self) -> None:
            Exception.__init__(self, "404")

    def refuse(name: str, **options: Any) -> None:
        raise NotThere

    monkeypatch.setattr(huggingface_hub, "model_info", refuse)
    with pytest.raises(ModelError, match="no model of that name on the hub that you may read"):
        load("some/model")
    monkeypatch.undo()
    with pytest.raises(ModelError, match="it cannot be a name on the hub"):
        load("no such//name")


def test_what_was_fetched_before_needs_no_network(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "models--some--model"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("a" * 40)
    (place / "snapshots").mkdir()
    (place / "snapshots" / ("a" * 40)).symlink_to(plain)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for out_of_reach in (no_network, busy):
        monkeypatch.setattr(huggingface_hub, "model_info", out_of_reach)
        start = time.monotonic()
        model, _ = load("some/model")
        assert time.monotonic() - start < 10
        assert model.name_or_path == "some/model"
        assert torch.equal(logits(model), logits(load(str(plain))[0]))


# ---- adapters


@pytest.fixture
def adapter(plain: Path, tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """A trained adapter of `plain` with its own FAM prompt, and the logits that it gives."""
    model, _ = load(str(plain), FAM)
    lora = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], modules_to_save=["fam_prompt"])
    adapted: Any = get_peft_model(model, lora)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 if "lora" in name else 1.0)
    folder = tmp_path / "adapter"
    adapted.save_pretrained(folder)
    (folder / ADAPTER_FAM_CONFIG).write_text(json.dumps(FAM.to_dict()))
    return folder, logits(adapted.eval())


@pytest.fixture
def shipped_logits(
    plain: Path, adapter: tuple[Path, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> torch.Tensor:
    """What the shipped adapter gives, where `plain` is the default model and `adapter` is shipped."""
    monkeypatch.setattr(models, "shipped_adapter", lambda: str(adapter[0]))
    monkeypatch.setattr(models, "embedded_folder", lambda: plain)
    return adapter[1]


def test_an_adapter_brings_its_geometry_and_prompt(
    plain: Path, adapter: tuple[Path, torch.Tensor]
) -> None:
    folder, expected = adapter
    for model, tokenizer in (load(str(plain), adapter=str(folder)), load(str(folder))):
        assert type(model).__name__ == "FamLlamaForCausalLM"  # merged: no PEFT around it
        assert model.fam_config == FAM
        assert is_trained(model)
        torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
        assert tokenizer.eos_token == "</s>"
    assert not torch.allclose(logits(load(str(plain), FAM)[0]), expected, atol=1e-2)


def test_a_tilde_is_the_home_folder(
    plain: Path, adapter: tuple[Path, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, expected = adapter
    monkeypatch.setenv("HOME", str(folder.parent))
    for model, _ in (load(f"~/{folder.name}"), load(str(plain), adapter=f"~/{folder.name}")):
        torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)


def test_training_may_go_on_from_the_shipped_adapter(
    plain: Path, shipped_logits: torch.Tensor
) -> None:
    changes = ["model.adapter=shipped", "fam.fam_seen=always", "data.sources.0.asked_prose=0"]
    recipe = replace(Recipe.load(find("smollm2-begin"), changes), fam=FAM)
    model: Any = adaptation.load_for_training(recipe)[0]
    torch.testing.assert_close(logits(model.eval()), shipped_logits, atol=1e-4, rtol=1e-4)
    elsewhere = replace(recipe, model=replace(recipe.model, base=str(plain)))
    with pytest.raises(ModelError, match="shipped belongs to the default model"):
        adaptation.load_for_training(elsewhere)


def test_an_adapter_may_come_from_the_hub(
    plain: Path, adapter: tuple[Path, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "model_info", lambda name, timeout: None)
    asked: dict[str, Any] = {}

    def fetch(name: str, **options: Any) -> str:
        asked.update(options)
        return str(adapter[0])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    model, _ = load(str(plain), adapter="some/adapter")
    torch.testing.assert_close(logits(model), adapter[1], atol=1e-4, rtol=1e-4)
    assert "checkpoints/*" in asked["ignore_patterns"]  # what a run leaves beside it
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    with pytest.raises(ModelError, match="some/adapter cannot be fetched from the hub"):
        load(str(plain), adapter="some/adapter")


def test_an_adapter_says_what_it_lacks(plain: Path, adapter: tuple[Path, torch.Tensor]) -> None:
    folder = adapter[0]
    (folder / ADAPTER_FAM_CONFIG).write_text(json.dumps(FAM.replace(fam_length=3).to_dict()))
    with pytest.raises(ModelError, match="cannot be put on this model"):
        load(str(plain), adapter=str(folder))
    (folder / ADAPTER_FAM_CONFIG).write_text("[]")
    with pytest.raises(ModelError, match="holds no table of values"):
        load(str(folder))
    (folder / ADAPTER_FAM_CONFIG).write_text("{")
    with pytest.raises(ModelError, match=f"{ADAPTER_FAM_CONFIG} is no JSON file"):
        load(str(folder))
    (folder / ADAPTER_FAM_CONFIG).write_text('{"global_positions": 5}')
    with pytest.raises(ModelError, match=f"{ADAPTER_FAM_CONFIG} is no geometry: global_positions"):
        load(str(folder))
    (folder / ADAPTER_FAM_CONFIG).unlink()
    with pytest.raises(ModelError, match=f"has no {ADAPTER_FAM_CONFIG}; give the configuration"):
        load(str(folder))
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = None
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="does not say which model it belongs to"):
        load(str(folder))


def test_an_adapter_may_be_used_with_another_geometry(
    plain: Path, adapter: tuple[Path, torch.Tensor]
) -> None:
    wider, _ = load(str(plain), FAM.replace(memory_segments=2), adapter=str(adapter[0]))
    assert is_trained(wider)
    longer: Any = load(str(plain), FAM.replace(fam_length=3), adapter=str(adapter[0]))[0]
    assert not is_trained(longer)  # a fresh prompt
    assert longer.model.fam_prompt.weight.shape[0] == 3
    windows: Any = load(str(plain), FAM.without_feedback(), adapter=str(adapter[0]))[0]
    assert not is_trained(windows) and windows.fam_config.fam_length == 0
    changed = windows.model.layers[0].self_attn.q_proj.weight
    assert not torch.equal(changed, load(str(plain))[0].model.layers[0].self_attn.q_proj.weight)


def test_the_shipped_adapter_goes_on_the_default_model_alone(
    plain: Path, shipped_logits: torch.Tensor
) -> None:
    shipped: Any = load(adapter=models.SHIPPED)[0]
    assert is_trained(shipped)
    torch.testing.assert_close(logits(shipped), shipped_logits, atol=1e-4, rtol=1e-4)
    assert load()[0].fam_config == reading_config()
    with pytest.raises(ModelError, match="shipped belongs to the default model"):
        load(str(plain), adapter=models.SHIPPED)
