"""What `fam bench` and `fam demo` measure is what they say: same weights, same tokens, right sizes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import converted, some_tokens, tiny

from transformerfam import FamConfig, benchmark, models
from transformerfam.commands import bench, demo
from transformerfam.text import language_reference

Run = Callable[..., tuple[int, str, str]]
CONFIG = FamConfig.paper(block_size=8, memory_segments=1, fam_length=2)


def test_readers_share_weights_and_the_last_is_the_original() -> None:
    ids = some_tokens(1, 40)
    with torch.no_grad():
        original = tiny()(ids).logits
    model = converted(CONFIG)
    fam, windows, full = benchmark.readers(model, CONFIG)
    assert fam.model.fam_config == CONFIG
    assert windows.model.fam_config == CONFIG.without_feedback()
    assert fam.model.lm_head.weight is full.model.lm_head.weight
    with torch.no_grad():
        assert torch.equal(full.model(ids).logits, original)


WINDOWS = CONFIG.without_feedback()
GEOMETRIES = {
    "FAM / BSWA": CONFIG,
    "RMT / BSWA": CONFIG.replace(memory_segments=0, recurrence="rmt"),
    "AutoCompressor / BSWA": CONFIG.replace(memory_segments=0, recurrence="autocompressor"),
    "Infini-attention / BSWA": WINDOWS.replace(compressive_memory="delta"),
    "FM / BSWA": WINDOWS.replace(memory_source="output"),
    "FAM / SPARSE": CONFIG.replace(attention="sparse", summary_tokens=2),
    # Nothing is compared with itself: windows alone are held against full attention.
    "BIGBIRD / full": WINDOWS.replace(attention="bigbird", random_blocks=1),
    "BSWA / full": WINDOWS,
}


@pytest.mark.parametrize("ratio", GEOMETRIES)
def test_every_geometry_is_measured_under_its_own_name(
    ratio: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "gauge_of_bytes", lambda _: None)  # a second for each call
    config = GEOMETRIES[ratio]
    model = converted(CONFIG, dtype=torch.float32)
    ((length, readers),) = benchmark.run(model, config, (16,), chunk=16, decode_tokens=1)
    assert (length, len(readers)) == (16, 2 if ratio.endswith("full") else 3)
    text = bench._as_text(readers, config)
    first, second = ratio.split(" / ")
    assert ratio in text and f"{first} / full" in text
    assert f"{first} takes" in text and f"times as long as {second}" in text


@pytest.mark.slow
def test_sizes_and_times_by_length() -> None:
    model = converted(CONFIG)
    seen = {}
    for length, readers in benchmark.run(model, CONFIG, (16, 64), chunk=12, decode_tokens=2):
        seen[length] = {reader.name: reader for reader in readers}
    fam, windows, full = seen[64].values()
    assert [fam.name, windows.name, full.name] == ["FAM", "BSWA", "full attention"]
    assert fam.state_bytes[16] == fam.state_bytes[64] > windows.state_bytes[64]
    assert full.state_bytes[64] == 4 * full.state_bytes[16]
    for reader in (fam, windows, full):
        assert 0 < reader.prefill_seconds[16] < reader.prefill_seconds[64]
        assert reader.decode_seconds[64] > 0
    assert len(fam.call_seconds) == 2 + 4  # 12 + 4 tokens, then 12 · 4
    assert fam.against(fam) == 1.0


@pytest.mark.slow
def test_bench_prints_a_table_or_json(fam: Run, folder: str) -> None:
    args = ["--model", folder, "--lengths", "16,32", "--chunk", "16", "--full-limit", "16"]
    args += ["--block-size", "8", "--memory-segments", "1", "--fam-length", "2"]
    code, out, _ = fam("bench", *args)
    assert code == 0
    assert "FAM / BSWA" in out
    assert "–" in out  # full attention was left out beyond its limit
    code, out, _ = fam("bench", *args, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["config"]["fam_length"] == 2
    assert list(found["readers"]["full attention"]["prefill_seconds"]) == ["16"]


def test_demo_reads_asks_saves_and_draws(
    fam: Run, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = FamConfig(block_size=64, memory_segments=1, fam_length=4)
    loaded = models.load
    monkeypatch.setattr(models, "load", lambda config=small, adapter=None: loaded(folder, config))
    monkeypatch.setattr(demo, "_FIRST_ASKED", 500)
    picture, numbers = tmp_path / "demo.png", tmp_path / "demo.json"
    files = ["--out", str(picture), "--json", str(numbers)]
    args = ["--tokens", "1000", "--full-limit", "600", *files]
    code, out, _ = fam("demo", *args)
    assert code == 0
    assert "The feedback memory has lost the key." in out  # nothing was trained
    assert "opened again and asked again: " in out
    assert out.index(f"> {demo._CONVERSATION[0]}") < out.index("(memory saved, ")
    assert out.index("(memory saved, ") < out.index(f"> {demo._CONVERSATION[1]}")
    assert picture.read_bytes().startswith(b"\x89PNG")
    found = json.loads(numbers.read_text())
    readers = {reader["name"]: reader for reader in found["readers"]}
    assert list(readers) == ["FAM 4", "without feedback", "full attention"]
    assert readers["full attention"]["tokens"] == 600
    assert readers["FAM 4"]["tokens"] == readers["without feedback"]["tokens"] == 1000
    asked = {said.pop("tokens"): list(said) for said in found["answers"]}
    assert asked == {500: list(readers), 1000: list(readers)[:2]}
    assert len({sizes["FAM 4"] for sizes in found["memory_bytes"]}) == 1
    assert len(found["key"]) == 5
    assert fam("demo", "--out", "picture.txt")[0] == 2


@pytest.mark.parametrize(
    ("feedback", "windows", "says"),
    [
        (
            (1, 1, 0),
            (1, 0, 0),
            "has the key after 32 tokens, of which the windows hold 16;\nthe same",
        ),
        ((1, 1, 0), (1, 0, 0), "do not, and after 64 it has lost it."),
        (
            (1, 1, 1),
            (1, 0, 0),
            "has the key after 64 tokens, of which the windows hold 16;\nthe same",
        ),
        ((1, 0, 0), (1, 0, 0), "read more than a window holds"),
        ((1, 0, 0), (0, 0, 0), "which still\nsee it in their windows, do not."),
        ((0, 0, 0), (1, 0, 0), "The feedback memory has lost the key."),
    ],
)
def test_demo_says_what_came_of_it(
    feedback: tuple[int, ...], windows: tuple[int, ...], says: str
) -> None:
    model = converted(FamConfig(block_size=8, memory_segments=1, fam_length=2))
    shown = demo.Shown("12345", demo._readers(model, model, 16))
    fam_name, plain, full = (v.name for v in shown.variants)
    for tokens, ours, theirs in zip((16, 32, 64), feedback, windows, strict=True):
        said = {fam_name: ours, plain: theirs, full: True}
        shown.answers[tokens] = {n: "12345" if right else "1" for n, right in said.items()}
    assert says in demo._verdict(shown)


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("12345", "12345 ✓"),
        ("12945", "12945 ✗ 4 of 5"),
        ("99999", "99999 ✗"),
        ("a key", "a key ✗"),
        ("123", "123 ✗"),
    ],
)
def test_the_demo_tells_how_many_digits_are_right(said: str, shown: str) -> None:
    assert demo._marked(said, "12345") == shown


def test_the_text_of_the_demo_is_long_and_english() -> None:
    text = language_reference()
    assert len(text) > 300_000
    assert " the " in text
