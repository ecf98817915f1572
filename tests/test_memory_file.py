"""A memory file is complete and of the right model, or it is refused with one sentence."""

from __future__ import annotations

import copy
import errno
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import converted, some_tokens, tiny
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from variants import VARIANTS

from transformerfam import FamConfig, Memory, MemoryFileError, memory_file, reconfigure

B = 6
CONFIG = FamConfig.paper(block_size=B, memory_segments=1, fam_length=3, sink_tokens=2)


def build(
    dtype: torch.dtype = torch.float32, config: FamConfig = CONFIG, **changes: Any
) -> PreTrainedModel:
    return converted(config, dtype=dtype, **{"num_hidden_layers": 2, **changes})


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build()


@torch.no_grad()
def read(model: PreTrainedModel, ids: Tensor, memory: Memory | None = None) -> Memory:
    return model(ids, past_key_values=memory).past_key_values


@pytest.fixture
def saved(model: PreTrainedModel, tmp_path: Path) -> Path:
    path = tmp_path / "stream.fam"
    read(model, some_tokens(1, 2 * B + 3)).save(path, model)
    return path


def assert_equal(a: Memory, b: Memory) -> None:
    ours, theirs = dict(a.tensors()), dict(b.tensors())
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype
        assert torch.equal(ours[name], theirs[name])
    assert (a.position, a.config, len(a)) == (b.position, b.config, len(b))


def refusal(action: Callable[[], object]) -> str:
    """The message of the MemoryFileError, which is one sentence and has nothing behind it."""
    with pytest.raises(MemoryFileError) as caught:
        action()
    message, error = str(caught.value), caught.value
    assert message.endswith(".") and "\n" not in message
    assert error.__cause__ is None and (error.__context__ is None or error.__suppress_context__)
    return message


# ---- there and back


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_several_rows_at_different_positions_come_back(dtype: torch.dtype, tmp_path: Path) -> None:
    model = build(dtype)
    mask = torch.ones(3, 2 * B + 1, dtype=torch.long)
    mask[1, :B] = 0
    mask[2, 1:] = 0
    with torch.no_grad():
        memory = model(some_tokens(3, 2 * B + 1), attention_mask=mask).past_key_values
    memory.next_logits = torch.randn(3, 7)
    path = tmp_path / "rows.fam"
    memory.save(path, model)
    loaded = Memory.load(str(path), model)
    assert_equal(loaded, memory)
    ids = some_tokens(3, B, seed=1)
    with torch.no_grad():
        assert torch.equal(
            model(ids, past_key_values=loaded).logits, model(ids, past_key_values=memory).logits
        )


@pytest.mark.parametrize("name", [n for n, c in VARIANTS.items() if c.backend == "sdpa"])
def test_every_geometry_comes_back(name: str, tmp_path: Path) -> None:
    model = build(config=VARIANTS[name])
    for tokens in (2, 3 * B + 1):
        memory = read(model, some_tokens(1, tokens))
        memory.save(tmp_path / "m", model)
        assert_equal(Memory.load(tmp_path / "m", model), memory)


def test_an_empty_memory_comes_back(model: PreTrainedModel, tmp_path: Path) -> None:
    memory = Memory.for_model(model, 2)
    memory.save(tmp_path / "empty.fam", model)
    loaded = Memory.load(tmp_path / "empty.fam", model)
    assert_equal(loaded, memory)
    assert read(model, some_tokens(2, 3), loaded).position == (3, 3)


def test_a_huge_position_comes_back(model: PreTrainedModel, tmp_path: Path) -> None:
    memory = read(model, some_tokens(1, 3))
    memory.position = (3 + B * 10**18,)
    memory.save(tmp_path / "far.fam", model)
    assert Memory.load(tmp_path / "far.fam", model).position == (3 + B * 10**18,)


def test_a_memory_of_training_is_saved_without_its_graph(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    memory = model(some_tokens(1, B + 1)).past_key_values
    memory.save(tmp_path / "m", model)
    loaded = Memory.load(tmp_path / "m", model)
    assert_equal(loaded, memory)
    assert not any(t.requires_grad for _, t in loaded.tensors())


def test_reading_on_leaves_the_file_as_it_is(model: PreTrainedModel, saved: Path) -> None:
    before = saved.read_bytes()
    memory = Memory.load(saved, model)
    for tokens in (1, 1, 1, B):
        read(model, some_tokens(1, tokens), memory)
    assert saved.read_bytes() == before


def test_a_loaded_memory_does_not_depend_on_the_file(model: PreTrainedModel, saved: Path) -> None:
    memory, again = Memory.load(saved, model), Memory.load(saved, model)
    with open(saved, "r+b") as file:  # written over in place: the same inode
        file.write(bytes(saved.stat().st_size))
    assert_equal(memory, again)
    assert any(bool(t.any()) for _, t in memory.tensors())


# ---- damaged files


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Memory, bytes, Path]:
    """A model, its memory, the bytes of the memory's file, and a path to put damaged ones at."""
    model = build(
        config=FamConfig.paper(block_size=4, memory_segments=0, fam_length=1), num_hidden_layers=1
    )
    memory = read(model, some_tokens(1, 6))
    memory.next_logits = torch.randn(1, 3)
    path = tmp_path_factory.mktemp("damaged") / "m.fam"
    memory.save(path, model)
    return model, memory, path.read_bytes(), path


Small = tuple[PreTrainedModel, Memory, bytes, Path]


def check_damaged(small: Small, data: bytes) -> None:
    """`data` is refused, unless it says the very same as the good file."""
    model, memory, good, path = small
    path.write_bytes(data)
    try:
        loaded = Memory.load(path, model)
    except MemoryFileError:
        return
    assert data == good or len(data) == len(good)
    assert_equal(loaded, memory)


def test_any_flipped_bit_of_the_header_is_noticed(small: Small) -> None:
    good = small[2]
    header = 8 + int.from_bytes(good[:8], "little")
    for index in (*range(64), *range(64, header, 5)):
        damaged = bytearray(good)
        damaged[index] ^= 1 << (index * 5 % 8)
        check_damaged(small, bytes(damaged))


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_any_flipped_bits_are_noticed(small: Small, data: st.DataObject) -> None:
    damaged = bytearray(small[2])
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    check_damaged(small, bytes(damaged))


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_any_replaced_bytes_are_noticed(small: Small, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(small[2])))
    put = data.draw(st.binary(min_size=1, max_size=12))
    check_damaged(small, small[2][:start] + put + small[2][start + len(put) :])
    check_damaged(small, small[2][:start] + put + small[2][start:])


@given(st.integers(0, 10**9))
@settings(max_examples=60, deadline=None)
@example(0)
@example(7)
@example(8)
def test_any_cut_is_noticed(small: Small, length: int) -> None:
    model, _, good, path = small
    path.write_bytes(good[: length % len(good)])
    assert "damaged" in refusal(lambda: Memory.load(path, model))
    path.write_bytes(good + good[: 1 + length % len(good)])
    assert "damaged" in refusal(lambda: Memory.load(path, model))


def rewritten(path: Path, **changes: str | None) -> None:
    """The file at `path` with another header and, as far as its writer knows how, a right checksum."""
    with safe_open(str(path), framework="pt") as file:
        header = dict(file.metadata())
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    for key, value in changes.items():
        if value is None:
            del header[key]
        else:
            header[key] = value
    header["checksum"] = memory_file._checksum(header, tensors)
    save_file(tensors, path, metadata=header)


# ---- files that are whole and not for this model


def test_another_version_is_refused_by_its_number(model: PreTrainedModel, saved: Path) -> None:
    rewritten(saved, version="7")
    message = refusal(lambda: Memory.load(saved, model))
    assert "format 7" in message and "reads format 2" in message


def test_a_geometry_of_a_later_version_is_refused(model: PreTrainedModel, saved: Path) -> None:
    rewritten(saved, config=json.dumps({**CONFIG.to_dict(), "fam_kind": "new"}))
    assert "fam_kind" in refusal(lambda: Memory.load(saved, model))


@pytest.mark.parametrize("field", ["position", "layers", "model", "config"])
def test_a_header_that_makes_no_sense_is_refused_though_its_checksum_is_right(
    model: PreTrainedModel, saved: Path, field: str
) -> None:
    good = saved.read_bytes()
    for value in (None, "", "{", "[]", "[-1]", "0", "null", '["a"]', "[1.5]", "[1, 2]"):
        saved.write_bytes(good)
        rewritten(saved, **{field: value})
        refusal(lambda: Memory.load(saved, model))


def test_another_geometry_is_refused_by_the_name_of_the_field(saved: Path) -> None:
    for field, value in (
        ("block_size", 7),
        ("fam_length", 2),
        ("feedback_norm", "rms"),
        ("sink_tokens", 0),
    ):
        other = build(config=CONFIG.replace(**{field: value}))
        assert f"{field}=" in refusal(lambda other=other: Memory.load(saved, other))  # type: ignore[misc]


def step(model: PreTrainedModel) -> None:
    """One step of training."""
    model(some_tokens(1, 8), labels=some_tokens(1, 8)).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1e-2).step()


def flip_one_bit(model: PreTrainedModel) -> None:
    """The last bit of one weight."""
    weight = model.model.layers[1].mlp.up_proj.weight.data
    weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(10.0))


CHANGES: dict[str, Callable[[PreTrainedModel], object]] = {
    "a step of training": step,
    "one bit": flip_one_bit,
    "another type": lambda m: m.to(torch.bfloat16),
    "another prompt": lambda m: m.model.fam_prompt.weight.data.add_(1e-3),
    "another output layer": lambda m: m.lm_head.weight.data.mul_(1.001),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_weights_are_refused(saved: Path, change: str) -> None:
    other = build()
    assert Memory.load(saved, other).position == (2 * B + 3,)
    CHANGES[change](other)
    assert "other weights" in refusal(lambda: Memory.load(saved, other))


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        {"rms_norm_eps": 1e-3},
        {"hidden_act": "gelu"},
    ],
)
def test_a_model_of_the_same_weights_that_computes_something_else_is_refused(
    saved: Path, changes: dict[str, Any]
) -> None:
    refusal(lambda: Memory.load(saved, build(**changes)))


def test_an_adapter_that_is_switched_on_or_off_is_noticed(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(build(), adapter)
    path = tmp_path / "m.fam"
    read(model, some_tokens(1, B)).save(path, model)
    assert Memory.load(path, model).position == (B,)
    with model.disable_adapter():
        refusal(lambda: Memory.load(path, model))
    model.add_adapter("other", adapter)
    model.set_adapter("other")
    refusal(lambda: Memory.load(path, model))


def test_the_scale_of_an_adapter_is_noticed(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def scaled(alpha: int) -> Any:
        torch.manual_seed(0)
        lora = peft.LoraConfig(
            target_modules="all-linear", lora_alpha=alpha, init_lora_weights=False
        )
        return peft.get_peft_model(build(), lora)

    path, model = tmp_path / "m.fam", scaled(2)
    read(model, some_tokens(1, B)).save(path, model)
    refusal(lambda: Memory.load(path, scaled(64)))


def test_windows_go_on_from_windows_whatever_else_the_model_has(tmp_path: Path) -> None:
    """A prompt that nothing reads is no part of what a model computes."""
    had_fam, windows = build(), CONFIG.without_feedback()
    reconfigure(had_fam, windows)
    path = tmp_path / "m.fam"
    read(had_fam, some_tokens(1, B)).save(path, had_fam)
    assert Memory.load(path, build(config=windows)).position == (B,)


def test_a_file_of_weights_is_no_memory(model: PreTrainedModel, tmp_path: Path) -> None:
    for metadata in (None, {"format": "pt"}):
        save_file({"weight": torch.zeros(3)}, tmp_path / "w.safetensors", metadata=metadata)
        message = refusal(lambda: Memory.load(tmp_path / "w.safetensors", model))
        assert "not a memory saved by transformerfam" in message


def test_what_is_no_file_or_empty_is_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("It is a truth universally acknowledged")
    for name in ("empty", "text", "", "missing", "missing/m.fam", "nul\0byte"):
        refusal(lambda name=name: Memory.load(f"{tmp_path}/{name}", model))  # type: ignore[misc]


def test_a_plain_model_is_refused(model: PreTrainedModel, saved: Path, tmp_path: Path) -> None:
    memory = Memory.load(saved, model)
    for action in (lambda: Memory.load(saved, tiny()), lambda: memory.save(tmp_path / "p", tiny())):
        with pytest.raises(ValueError, match="TransformerFAM"):
            action()
    assert not (tmp_path / "p").exists()


def test_a_memory_is_not_saved_as_that_of_another_geometry(saved: Path, tmp_path: Path) -> None:
    memory = Memory.load(saved, build())
    for other in (build(config=CONFIG.replace(block_size=7)), build(num_hidden_layers=1)):
        with pytest.raises(ValueError):
            memory.save(tmp_path / "m.fam", other)
        assert not (tmp_path / "m.fam").exists()


# ---- writing


@pytest.fixture(params=["no space", "safetensors", "interrupt", "at the rename"])
def broken_disk(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[type[BaseException]]:
    """Writing fails half way; gives the exception that is to reach the caller."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    errors: dict[str, BaseException] = {
        "no space": full,
        "safetensors": SafetensorError("I/O error: No space left on device (os error 28)"),
        "interrupt": KeyboardInterrupt(),
        "at the rename": full,
    }

    def half(tensors: object, filename: str, metadata: object = None) -> None:
        Path(filename).write_bytes(b"half of a file")
        raise errors[request.param]

    def fail(*_: object) -> None:
        raise full

    if request.param == "at the rename":
        monkeypatch.setattr(os, "replace", fail)
    else:
        monkeypatch.setattr(memory_file, "save_file", half)
    yield KeyboardInterrupt if request.param == "interrupt" else MemoryFileError


def test_a_failed_save_leaves_the_file_that_was_there_and_nothing_else(
    model: PreTrainedModel, saved: Path, broken_disk: type[BaseException]
) -> None:
    before = saved.read_bytes()
    memory = read(model, some_tokens(1, 3))
    for path in (saved, saved.with_name("new.fam")):
        if broken_disk is MemoryFileError:
            assert "Cannot write the memory" in refusal(lambda path=path: memory.save(path, model))  # type: ignore[misc]
        else:
            with pytest.raises(broken_disk):
                memory.save(path, model)
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_who_may_read_a_memory_may_read_what_takes_its_place(
    model: PreTrainedModel, saved: Path
) -> None:
    usual = os.umask(0o027)
    try:
        read(model, some_tokens(1, 3)).save(saved.with_name("new.fam"), model)
    finally:
        os.umask(usual)
    assert stat.S_IMODE(saved.with_name("new.fam").stat().st_mode) == 0o640
    saved.chmod(0o600)
    read(model, some_tokens(1, 3)).save(saved, model)
    assert stat.S_IMODE(saved.stat().st_mode) == 0o600


def test_places_that_cannot_be_written(model: PreTrainedModel, tmp_path: Path) -> None:
    memory = read(model, some_tokens(1, 3))
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for name in ("missing/m.fam", "folder", "file/m.fam", "a" * 300, "nul\0byte"):
        assert "Cannot write" in refusal(lambda name=name: memory.save(tmp_path / name, model))  # type: ignore[misc]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_without_permission(model: PreTrainedModel, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        assert "Permission denied" in refusal(
            lambda: read(model, some_tokens(1, 3)).save(tmp_path / "m.fam", model)
        )
    finally:
        tmp_path.chmod(0o700)


def test_saving_changes_neither_model_nor_memory(model: PreTrainedModel, tmp_path: Path) -> None:
    memory = read(model, some_tokens(1, 3))
    weights, held = copy.deepcopy(model.state_dict()), memory.fork()
    memory.save(tmp_path / "a.fam", model)
    memory.save(tmp_path / "b.fam", model)
    assert_equal(memory, held)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    a, b = (Memory.load(tmp_path / name, model) for name in ("a.fam", "b.fam"))
    assert_equal(a, b)
