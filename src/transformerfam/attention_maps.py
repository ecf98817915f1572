"""Figure 11 of the paper: what block queries and FAM queries look at. Knows an `Inspection`."""

from __future__ import annotations

from itertools import accumulate
from os import PathLike
from typing import Any

from transformerfam.extras import require
from transformerfam.inspection import Inspection, LayerInspection
from transformerfam.plots import check_ending, name_groups, new_figure, write_figure

_NAMES = {"past": "past segments", "anchors": "sinks", "fams": "FAM", "own": "block"}
# Few columns among many: drawn wider than those of tokens, to be seen.
_WIDER = {"anchors": 4, "fams": 4}


def check_figure(path: str | PathLike[str]) -> None:
    """Refuse what `draw_attention_maps` would refuse, before there is anything to draw.

    Raises:
        UserError: if `path` ends in something else than .png, .svg or .pdf.
        MissingExtraError: if matplotlib is not installed.
    """
    check_ending(path)
    require("matplotlib", "plot")


def draw_attention_maps(path: str | PathLike[str], inspection: Inspection) -> None:
    """Draw the attention maps of the last whole block in each layer, mean over heads.

    The upper map of a layer has the block's queries over [past segments | sinks | FAM | block], the
    lower one the FAM queries over [FAM | block] in the same columns.

    Args:
        path: ends in .png, .svg or .pdf.
        inspection: what to draw: all of its layers.

    Raises:
        UserError: if `path` ends in something else or cannot be written.
        MissingExtraError: if matplotlib is not installed.
    """
    block = inspection.grid.blocks[-1]
    columns = min(3, len(inspection.layers))
    rows = -(-len(inspection.layers) // columns)
    figure = new_figure(path, 6.4 * columns, 5.0 * rows)
    panels = figure.subplots(
        2 * rows, columns, squeeze=False, height_ratios=[3, 1] * rows, sharex=True
    )
    image = None
    for index in range(rows * columns):
        upper, lower = panels[index // columns * 2 : index // columns * 2 + 2, index % columns]
        if index < len(inspection.layers):
            image = _draw_layer(upper, lower, inspection, inspection.layers[index], block)
        else:
            upper.set_visible(False)
            lower.set_visible(False)
    bar = figure.colorbar(image, ax=panels, shrink=0.5, pad=0.01)
    bar.set_label("share of a query's attention, square-root scale", fontsize=11)
    write_figure(figure, path)


def _draw_layer(
    upper: Any, lower: Any, inspection: Inspection, layer: LayerInspection, block: int
) -> Any:
    """The two maps of a layer; what the colour bar belongs to."""
    np = require("numpy", "plot")
    norm = require("matplotlib.colors", "plot").PowerNorm(0.5, vmin=0, vmax=1)
    weights = layer.maps[block].mean(0).numpy()  # (cells + N, cells)
    N, cell = inspection.config.fam_length, inspection.grid.cell
    sizes = inspection.map_keys[block]
    names = {**_NAMES, "anchors": "globals"} if inspection.config.global_positions else _NAMES
    widths = {region: size * _WIDER.get(region, 1) for region, size in sizes.items() if size}
    # A line lower where there is little room for a name.
    keys = tuple(("\n" * (r in _WIDER) + names[r], width) for r, width in widths.items())
    edges = [0, *accumulate(w for r in widths for w in [_WIDER.get(r, 1)] * sizes[r])]
    image = None
    for axes, part, label in (
        (upper, weights[:-N], "block queries"),
        (lower, weights[-N:], "FAM queries"),
    ):
        # What is not seen has a weight of 0, and stays white.
        shown = np.ma.masked_equal(part, 0)
        lines = range(len(part) + 1)
        image = axes.pcolormesh(edges, lines, shown, cmap="magma_r", norm=norm, rasterized=True)
        axes.invert_yaxis()
        name_groups(axes.xaxis, keys, axes.axvline)
        axes.set_yticks([])
        axes.set_ylabel(label, fontsize=11)
    upper.tick_params(labelbottom=False)
    joined = f", {cell} tokens a cell" if cell > 1 else ""
    upper.set_title(f"layer {layer.layer}, block {block}{joined}", loc="left", fontsize=12)
    return image
