"""`fam inspect`: the page holds the numbers and needs nothing else; the command as people run it."""

from __future__ import annotations

import base64
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import TEXT, Run, refused
from families import some_tokens, tiny

from transformerfam import FamConfig, convert
from transformerfam.attention_maps import draw_attention_maps
from transformerfam.errors import UserError
from transformerfam.extras import MissingExtraError
from transformerfam.inspection import Inspection, inspect_stream
from transformerfam.inspection_page import page, quantised

CONFIG = FamConfig(block_size=6, memory_segments=1, fam_length=3, sink_tokens=2)
NASTY = [
    "</script>",
    "<script>alert(1)</script>",
    "{{data}}",
    "{{title}}",
    "<!--",
    "\\",
    '"',
    "&amp;",
]
INSPECT = ["--block-size", "16", "--memory-segments", "1", "--fam-length", "4"]


@pytest.fixture(scope="module")
def found() -> Inspection:
    model = convert(tiny(), CONFIG, prompt="vocabulary")
    return inspect_stream(model, some_tokens(1, 23)[0].tolist())


def written(found: Inspection, words: list[str] | None = None, title: str = "a text") -> str:
    words = words or ["word "] * len(found.tokens)
    return page(found, words, title=title, facts=["tiny"], trained=False)


def data_of(made: str) -> dict[str, Any]:
    (inside,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', made, re.S)
    return json.loads(inside)


def weights_of(data: dict[str, Any], name: str) -> torch.Tensor:
    """As the page's script unpacks them."""
    kind, start, count, scale = data["arrays"][name]
    blob = gzip.decompress(base64.b64decode(data["blob"]))
    if kind == "int":
        return torch.frombuffer(bytearray(blob[start : start + 4 * count]), dtype=torch.int32)
    part = torch.frombuffer(bytearray(blob[start : start + count]), dtype=torch.uint8)
    return (part.float() / 255) ** 2 * scale


def test_the_page_holds_the_numbers(found: Inspection) -> None:
    data = data_of(written(found))
    assert data["losses"][0] is None
    assert data["losses"][1:] == pytest.approx(found.losses[1:].tolist(), rel=1e-3)
    for layer, told in zip(found.layers, data["layers"], strict=True):
        assert told["layer"] == layer.layer
        assert told["rms"][2] == pytest.approx(layer.rms[2].tolist(), rel=1e-3)
        assert told["change"][0] == [None] * 3
        for name in ("shares", "read_by_slot", "read_by_head", "written_by_slot"):
            unpacked = weights_of(data, f"{layer.layer}.{name}")
            expected = getattr(layer, name).flatten()
            assert (unpacked - expected).abs().max() <= expected.max() / 250
        drawn = weights_of(data, f"{layer.layer}.map2")
        assert (drawn - layer.maps[2].flatten()).abs().max() < 0.004
        strongest = weights_of(data, f"{layer.layer}.strongest")
        assert strongest.tolist() == layer.strongest.flatten().tolist()


def test_small_weights_survive_beside_large_ones() -> None:
    packed, scale = quantised(torch.tensor([1.0, 0.01, 0.0001, 0.0]))
    again = (packed.float() / 255) ** 2 * scale
    assert again.tolist() == pytest.approx([1.0, 0.01, 0.0001, 0.0], rel=0.4, abs=1e-9)
    assert quantised(torch.zeros(3))[0].tolist() == [0, 0, 0]


def test_the_page_asks_for_nothing_from_outside(found: Inspection) -> None:
    made = written(found)
    assert not re.search(
        r"https?:|//[a-z0-9-]+\.[a-z]|@import|url\(", made.replace(data_text(made), "")
    )
    assert not re.search(r"<(link|img|iframe|script[^>]* src)", made)
    assert "default-src 'none'" in made


def data_text(made: str) -> str:
    return made.partition('id="data">')[2].partition("</script>")[0]


def test_a_text_with_scripts_and_places_of_the_template_is_text(found: Inspection) -> None:
    plain = written(found)
    words = (NASTY * 3)[: len(found.tokens)]
    title = "<img src=x onerror=alert(1)>{{data}}"
    made = written(found, words, title)
    assert data_of(made)["words"] == words
    assert data_of(made)["title"] == title
    for mark in ("<script", "</script", "<!--", "<img"):
        assert made.count(mark) == plain.count(mark)


def test_the_script_finds_every_value_that_it_asks_for(found: Inspection) -> None:
    made = written(found)
    asked = set(re.findall(r"\bD\.([a-z_]+)", made))
    assert len(asked) > 15 and asked <= data_of(made).keys()
    arrays = {name.partition(".")[2] for name in data_of(made)["arrays"]}
    assert {"shares", "strongest", "strongest_weights"} == set(re.findall(r'\bat\("(\w+)"\)', made))
    assert {"shares", "strongest", "strongest_weights", "read_by_slot", "written_by_head"} <= arrays


def test_the_same_numbers_are_the_same_page(found: Inspection) -> None:
    assert written(found) == written(found)


# ---- figure 11


def test_figure_11_is_drawn_for_every_layer(found: Inspection, tmp_path: Path) -> None:
    path = tmp_path / "maps.svg"
    draw_attention_maps(path, found)
    drawn = path.read_text()
    for layer in (0, 1, 2):
        assert f"layer {layer}, block 2" in drawn
    for region in ("past segments", "sinks", "FAM", "block queries", "FAM queries"):
        assert region in drawn
    with pytest.raises(UserError, match=r"not as maps\.gif"):
        draw_attention_maps(tmp_path / "maps.gif", found)


# ---- the command


def test_the_command_writes_a_page_and_a_figure(
    fam: Run, folder: str, book: str, tmp_path: Path
) -> None:
    output, figure = tmp_path / "look.html", tmp_path / "maps.png"
    code, out, err = fam(
        *("inspect", book, "--model", folder, *INSPECT, "--tokens", "70", "--layers", "0,2"),
        *("--output", str(output), "--figure", str(figure)),
    )
    assert code == 0, err
    assert "first 70 tokens, and the rest of the text was left out; --tokens reads more" in out
    assert re.search(
        r"^loss +\d+\.\d+ nats a token, \d+\.\d+ with the feedback memory off$", out, re.M
    )
    data = data_of(output.read_text())
    assert "".join(data["words"]) == TEXT[: len("".join(data["words"]))]
    assert (len(data["words"]), data["blocks"], data["slots"]) == (70, 4, 4)
    assert [layer["layer"] for layer in data["layers"]] == [0, 2]
    assert data["trained"] is False
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_standard_input_without_a_baseline(fam: Run, folder: str, tmp_path: Path) -> None:
    output = tmp_path / "look.html"
    code, out, err = fam(
        *("inspect", "-", "--model", folder, *INSPECT, "--no-baseline", "--layers", "all"),
        *("--output", str(output)),
        stdin=TEXT[:300],
    )
    assert code == 0, err
    assert "feedback memory off" not in out and "left out" not in out
    data = data_of(output.read_text())
    assert data["without"] is None and len(data["layers"]) == 3
    assert "".join(data["words"]) == TEXT[:300]


def test_mistakes_are_told_in_one_sentence(
    fam: Run, folder: str, book: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short, out = tmp_path / "short.txt", tmp_path / "out.html"
    short.write_text("a few words")
    model = ["--model", folder, "--quiet", "--output", str(out)]

    def told(*args: str) -> tuple[int, str, str]:
        return fam("inspect", *args, *model)

    refused(told(book), "no feedback memory", "--fam-length")
    stack = ["--block-size", "16", "--memory-segments", "0", "--fam-length", "4"]
    refused(told(book, *stack, "--recurrence", "rmt"), "through the whole stack", "layer")
    refused(told(book, "--memory-source", "output"), "(FM) has no slots", "--memory-source input")
    refused(told(book, "--compressive-memory", "delta"), "Infini", "--compressive-memory none")
    refused(told(str(short), *INSPECT), "less than one block of 16", "--block-size")
    refused(told(str(tmp_path / "none.txt"), *INSPECT), "There is no file")
    refused(told(book, *INSPECT, "--layers", "0,7"), "layers of this model are 0 to 2")
    refused(told(book, *INSPECT, "--figure", str(tmp_path / "maps.gif")), "maps.gif")
    refused(told(book, *INSPECT, "--figure", str(tmp_path / "no" / "maps.png")), "no folder")
    refused(fam("inspect", book, "--output", str(tmp_path)), "is a folder")
    before = Path(book).read_bytes()
    refused(fam("inspect", book, "--output", book), "FILE and --output", "different files")
    assert Path(book).read_bytes() == before
    code, _, err = told(book, "--layers", "first")
    assert code == 2 and "must be numbers with commas, or all" in err
    assert not out.exists()

    def missing(module: str, extra: str) -> None:
        raise MissingExtraError(f"This needs {module}; install transformerfam[{extra}]")

    monkeypatch.setattr("transformerfam.attention_maps.require", missing)
    refused(told(book, *INSPECT, "--figure", str(tmp_path / "maps.png")), "[plot]")
