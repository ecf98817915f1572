from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from transformerfam import plots
from transformerfam.config import FamConfig
from transformerfam.errors import UserError
from transformerfam.extras import MissingExtraError, require

# One letter a cell, in the order UNSEEN .. FAM_LOOP.
LETTERS = ".bmsfco"


def picture(config: FamConfig, blocks: int) -> str:
    roles = plots.mask_of(config, blocks).roles
    return "\n".join("".join(LETTERS[cell] for cell in row) for row in roles)


def test_figure_1_is_the_papers() -> None:
    """Figure 1a to 1c, first three blocks: window 3; B = 2 with one and two memory segments."""
    bswa = FamConfig.paper(block_size=2, memory_segments=1, fam_length=0)
    assert picture(bswa.replace(attention="swa", window=3), 3).split() == [
        "b.....",
        "bb....",
        "bbb...",
        ".bbb..",
        "..bbb.",
        "...bbb",
    ]
    assert picture(bswa, 3).split() == [
        "b.....",
        "bb....",
        "mmb...",
        "mmbb..",
        "..mmb.",
        "..mmbb",
    ]
    assert picture(bswa.replace(memory_segments=2), 3).split() == [
        "b.....",
        "bb....",
        "mmb...",
        "mmbb..",
        "mmmmb.",
        "mmmmbb",
    ]


def test_bigbird_and_sparse_are_theirs() -> None:
    """Two tokens a block: the first block and a drawn one; the last token of every block."""
    alone = FamConfig.paper(block_size=2, memory_segments=0, fam_length=0)
    sparse = alone.replace(attention="sparse", summary_tokens=1)
    assert picture(sparse, 3).split() == [
        "b.....",
        "bb....",
        ".mb...",
        ".mbb..",
        ".m.mb.",
        ".m.mbb",
    ]
    bigbird = alone.replace(attention="bigbird", random_blocks=1)
    assert picture(bigbird, 4).split()[:6] == [
        "b.......",
        "bb......",
        "mmb.....",
        "mmbb....",
        "mmmmb...",
        "mmmmbb..",
    ]
    assert picture(bigbird, 4).split()[6] in ("mmmm..b.", "mm..mmb.")


def test_figure_2_shows_feedback_and_sinks() -> None:
    """Keys: F before each block. Rows: a block's tokens, then the FAM that compresses it."""
    config = FamConfig.paper(block_size=2, memory_segments=1, fam_length=1, sink_tokens=1)
    mask = plots.mask_of(config, 3)
    assert [name for name, _ in mask.queries] == ["block 0", "F₀", "block 1", "F₁", "block 2", "F₂"]
    assert [name for name, _ in mask.keys] == ["F₋₁", "block 0", "F₀", "block 1", "F₁", "block 2"]
    assert picture(config, 3).split() == [
        ".b.......",
        ".bb......",
        "occ......",
        ".mmfb....",
        ".mmfbb...",
        "...occ...",
        ".s..mmfb.",
        ".s..mmfbb",
        "......occ",
    ]


def test_receptive_field_of_figure_1d() -> None:
    """Each layer reaches M blocks further back, from the last token of block 5 to block 1."""
    config = FamConfig.paper(block_size=2, memory_segments=1, fam_length=0)
    reached = plots.receptive_field(config, 11, 4)
    assert [min(layer) for layer in reached] == [2, 4, 6, 8, 11]
    assert reached[0] == set(range(2, 12))
    # Depth times window, as section 2.1 estimates it, is never exceeded.
    estimate = config.receptive_field(4)
    assert estimate is not None
    assert len(reached[0]) <= estimate


@pytest.mark.parametrize(
    ("name", "beginning"),
    [
        ("m.png", b"\x89PNG"),
        pytest.param("m.SVG", b"<?xml", marks=pytest.mark.slow),
        pytest.param("m.pdf", b"%PDF", marks=pytest.mark.slow),
    ],
)
def test_draws_a_file_of_its_kind(name: str, beginning: bytes, tmp_path: Path) -> None:
    plots.draw_masks(tmp_path / name)
    written = (tmp_path / name).read_bytes()
    assert written.startswith(beginning)
    assert len(written) > 10_000
    assert [file.name for file in tmp_path.iterdir()] == [name]


@pytest.mark.slow
def test_same_figure_same_file_and_sinks_are_seen(tmp_path: Path) -> None:
    first, second, sinks = (tmp_path / f"{n}.svg" for n in "abc")
    plots.draw_masks(first)
    plots.draw_masks(str(second))
    plots.draw_masks(sinks, sink_tokens=2)
    assert first.read_bytes() == second.read_bytes()
    assert ElementTree.parse(first).getroot().tag.endswith("svg")
    vermilion = "#d55e00"
    assert vermilion not in first.read_text()
    # Two sinks, seen by the four tokens of the last block, in two panels; and the legend.
    assert sinks.read_text().count(vermilion) == 2 * 4 * 2 + 1


def test_draws_a_reading(tmp_path: Path) -> None:
    """One that stopped early, one that went on, and one that read nothing."""
    losses = {"full": [(0, 256, 3.0)], "FAM": [(0, 256, 3.1), (256, 500, 2.5)], "none": []}
    sizes = {"full": [(512, 10**8)], "FAM": [(512, 10**7), (1024, 10**7)], "none": []}
    plots.draw_reading(tmp_path / "reading.svg", losses, sizes)
    drawn = (tmp_path / "reading.svg").read_text()
    assert ElementTree.fromstring(drawn).tag.endswith("svg")
    assert all(colour in drawn for colour in ("#333333", "#0072b2"))
    with pytest.raises(UserError, match=r"not as reading\.txt"):
        plots.draw_reading("reading.txt", losses, sizes)


def test_refuses_other_kinds_and_places_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"written as \.png, \.svg, \.pdf, not as masks\.jpg"):
        plots.draw_masks(tmp_path / "masks.jpg")
    with pytest.raises(UserError, match="cannot be written: No such file or directory"):
        plots.draw_masks(tmp_path / "nowhere" / "masks.png")


def test_failing_to_write_leaves_the_old_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "masks.png"
    path.write_bytes(b"old")

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="No space left on device"):
        plots.draw_masks(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_asks_for_matplotlib_by_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [m for m in sys.modules if m.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        MissingExtraError,
        match=r"needs matplotlib; install it with: pip install 'transformerfam\[plot\]'",
    ) as caught:
        plots.draw_masks(tmp_path / "masks.png")
    assert isinstance(caught.value, ImportError)
    assert isinstance(caught.value, UserError)


def test_a_broken_package_is_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half_there.py").write_text("import a_part_of_it_that_is_missing")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_part_of_it_that_is_missing") as caught:
        require("half_there", "plot")
    assert not isinstance(caught.value, MissingExtraError)
