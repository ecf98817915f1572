"""Figures: who sees whom (the paper's figures 1 and 2), and how a reading went.

Masks are drawn from the predicates of `masks`, so that a figure shows what the model computes.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, cycle
from os import PathLike
from pathlib import Path
from typing import Any

from transformerfam.config import FamConfig
from transformerfam.errors import UserError
from transformerfam.extras import require
from transformerfam.files import whole_file
from transformerfam.masks import (
    fam_sees_token,
    token_sees_anchor,
    token_sees_fam,
    token_sees_token,
)

ENDINGS = (".png", ".svg", ".pdf")

# What a cell of a mask is: the number of its colour and of its line in the legend.
UNSEEN, BLOCK, MEMORY, SINK, FAM_KEY, COMPRESSION, FAM_LOOP = range(7)
# Colours of Okabe and Ito, which people with any kind of colour vision tell apart.
_COLOURS = ("#f0f0f0", "#0072b2", "#7cc4ee", "#d55e00", "#f0b429", "#009e73", "#b0568c")
_MEANINGS = (
    "not seen",
    "a token sees its own block (1a: its window)",
    "a token sees a token of an earlier block",
    "a token sees a sink",
    "a token sees the FAM of the block before",
    "a FAM query sees the block that it compresses",
    "a FAM query sees the FAM of the block before",
)
_BORDER = "#333333"
_QUIET = "#777777"
_CURVE_COLOURS = (
    *("#999999", "#56b4e9", "#0072b2", "#009e73"),
    *("#b0568c", "#f0b429", "#d55e00", "#333333"),
)


@dataclass(frozen=True)
class Mask:
    """A mask to draw.

    Attributes:
        roles: (queries, keys) array of what each cell is, `UNSEEN` to `FAM_LOOP`.
        queries, keys: (label, size) of the groups on each side, blocks and FAMs, in order.
    """

    roles: Any
    queries: tuple[tuple[str, int], ...]
    keys: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Curve:
    """A line with a band around it.

    Attributes:
        name: for the legend; curves of the same name look the same in all panels.
        x: places.
        y, low, high: the line, and the edges of the band, at each of them.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def draw_masks(path: str | PathLike[str], *, sink_tokens: int = 0) -> None:
    """Draw figures 1a to 1d, 2a and 2b of the paper, and patterns of others, into one file.

    The paper draws figure 2 with arrows. Here it is a mask over a stream of four blocks, with FAM
    among the tokens where a layer reads it.

    Args:
        path: ends in .png, .svg or .pdf.
        sink_tokens: attention sinks in figure 2, 0 to 4; the paper has none.

    Raises:
        UserError: if `path` ends in something else or cannot be written.
        ValueError: for more sinks than a block of figure 2 holds.
        MissingExtraError: if matplotlib is not installed.
    """
    figure = new_figure(path, 15, 16)
    (a, b, c), (d, e, f), others = figure.subplots(3, 3)
    bswa = FamConfig.paper(block_size=2, memory_segments=1, fam_length=0)
    swa = bswa.replace(attention="swa", window=3)
    fam = FamConfig.paper(block_size=4, memory_segments=2, fam_length=2, sink_tokens=sink_tokens)
    sinks = f", {sink_tokens} sink tokens" if sink_tokens else ""

    _draw_mask(a, mask_of(swa, 6), "1a", "Sliding window attention", "window 3")
    _draw_mask(b, mask_of(bswa, 6), "1b", "Block sliding window attention", "B = 2, M = 1")
    two = bswa.replace(memory_segments=2)
    _draw_mask(c, mask_of(two, 6), "1c", "BSWA with two memory segments", "B = 2, M = 2")
    _draw_receptive_field(d, bswa, blocks=6, depth=4)
    _title(d, "1d", "Receptive field of BSWA", "B = 2, M = 1, depth 4, last token")
    plain = mask_of(fam.without_feedback(), 4)
    _draw_mask(e, plain, "2a", "TransformerBSWA", f"B = 4, M = 2{sinks}")
    setting = f"B = 4, M = 2, N = 2{sinks}; F₋₁ is the prompt"
    _draw_mask(f, mask_of(fam, 4), "2b", "TransformerFAM", setting)
    for axes, (title, setting, config) in zip(others, _patterns_of_others(), strict=True):
        _draw_mask(axes, mask_of(config, 8), "", title, setting)
    _draw_legend(figure, [role for role in range(7) if sink_tokens or role != SINK])
    write_figure(figure, path)


def _patterns_of_others() -> list[tuple[str, str, FamConfig]]:
    """Title, setting and geometry of the third row."""
    xl = FamConfig.paper(block_size=2, memory_segments=1, fam_length=0, attention="xl")
    bigbird = FamConfig.paper(
        block_size=2, memory_segments=1, fam_length=0, attention="bigbird", random_blocks=1
    )
    sparse = FamConfig.paper(
        block_size=4, memory_segments=0, fam_length=0, attention="sparse", summary_tokens=1
    )
    return [
        ("TransformerXL", "B = 2, M = 1, window 2", xl),
        ("BigBird", "B = 2, M = 1, the first block and one drawn", bigbird),
        ("Sparse Transformer", "fixed, B = 4, M = 0, one token of each block", sparse),
    ]


def draw_reading(
    path: str | PathLike[str],
    losses: Mapping[str, Sequence[tuple[int, int, float]]],
    sizes: Mapping[str, Sequence[tuple[int, int]]],
) -> None:
    """Draw how several readers read the same text: loss by place, and memory by length.

    Args:
        path: ends in .png, .svg or .pdf.
        losses: reader -> (first token, token after the last, mean loss in nats) of each part.
        sizes: reader -> (tokens read, bytes of memory) as the reading went on.

    Raises:
        UserError: if `path` ends in something else or cannot be written.
        MissingExtraError: if matplotlib is not installed.
    """
    figure = new_figure(path, 13, 5.2)
    left, right = figure.subplots(1, 2)
    for n, ((name, parts), line) in enumerate(
        zip(losses.items(), cycle(_line_styles()), strict=False)
    ):
        style = {**line, "zorder": 2.4 - n / 10}  # thin lines over wide ones where they agree
        if parts:
            edges = [*(start for start, _, _ in parts), parts[-1][1]]
            left.stairs([loss for _, _, loss in parts], edges, baseline=None, **style)
        tokens, nbytes = [t for t, _ in sizes[name]], [n / 1e6 for _, n in sizes[name]]
        right.plot(tokens, nbytes, label=name, **style)
    _plain_axes(left, "Loss in nats a token, by place in the text")
    _plain_axes(right, "Memory in MB, by tokens read")
    right.set_ylim(bottom=0)
    figure.legend(loc="outside lower center", ncols=max(1, len(losses)), frameon=False, fontsize=11)
    write_figure(figure, path)


# ---- from predicates to cells


def draw_curves(
    path: str | PathLike[str],
    panels: Mapping[str, Sequence[Curve]],
    *,
    x: str,
    y: str,
    marks: Mapping[str, Mapping[str, float]],
) -> None:
    """Draw panels of curves over a logarithmic axis, values from 0 to 1.

    Args:
        path: ends in .png, .svg or .pdf.
        panels: title -> curves.
        x, y: what the axes are.
        marks: title -> name -> place of a vertical line in that panel.

    Raises:
        UserError: if `path` ends in something else or cannot be written.
        MissingExtraError: if matplotlib is not installed.
    """
    columns = 1 if len(panels) == 1 else 2
    rows = -(-len(panels) // columns)
    figure = new_figure(path, 7.2 * columns, 4.6 * rows)
    every = [axes for row in figure.subplots(rows, columns, squeeze=False) for axes in row]
    for axes in every[len(panels) :]:
        axes.set_visible(False)
    names = list(dict.fromkeys(curve.name for curves in panels.values() for curve in curves))
    colours = dict(zip(names, cycle(_CURVE_COLOURS), strict=False))
    for axes, (title, curves) in zip(every, panels.items(), strict=False):
        _plain_axes(axes, title)
        places = sorted({place for curve in curves for place in curve.x})
        axes.set_xscale("log", base=2)
        axes.set_xlim(places[0] / 1.15, places[-1] * 1.15)
        axes.set_xticks(places, [f"{place:g}" for place in places], fontsize=8)
        axes.minorticks_off()
        axes.set_xlabel(x, fontsize=11)
        axes.set_ylabel(y, fontsize=11)
        axes.set_ylim(-0.03, 1.05)
        for curve in curves:
            colour = colours[curve.name]
            axes.plot(curve.x, curve.y, label=curve.name, color=colour, linewidth=2, marker=".")
            axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.15, linewidth=0)
        for name, place in marks[title].items():
            axes.axvline(place, color=_QUIET, linewidth=1, linestyle=":")
            axes.text(place * 1.06, 1.01, name, color=_QUIET, fontsize=9)
        axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    write_figure(figure, path)


def mask_of(config: FamConfig, blocks: int) -> Mask:
    """The mask of one layer over a stream of `blocks` whole blocks.

    Queries are each block's tokens and then the FAM queries that compress it; keys are, for each
    block, F of the block before and then the block's tokens.
    """
    np = require("numpy", "plot")
    B, N = config.block_size, config.fam_length
    block_names = [(f"block {τ}", B) for τ in range(blocks)]
    fam_queries = [(f"F{_subscript(τ)}", N) for τ in range(blocks)]
    fam_keys = [("F₋₁", N), *fam_queries[:-1]]
    queries = [g for pair in zip(block_names, fam_queries, strict=True) for g in pair if g[1]]
    keys = [g for pair in zip(fam_keys, block_names, strict=True) for g in pair if g[1]]

    # Where each query and key stands: a token by its position, a FAM slot by its block.
    tokens = np.arange(blocks * B).reshape(blocks, B)
    fams = np.repeat(np.arange(blocks), N).reshape(blocks, N)
    q = np.concatenate([tokens, fams], axis=1).reshape(-1, 1)  # (queries, 1)
    k = np.concatenate([fams - 1, tokens], axis=1).reshape(1, -1)  # (1, keys)
    q_is_fam = np.tile(np.arange(B + N) >= B, blocks)[:, None]
    k_is_fam = np.tile(np.arange(B + N) < N, blocks)[None, :]

    between_tokens = ~q_is_fam & ~k_is_fam
    window = token_sees_token(config)(q, k) & between_tokens
    # The window of SWA knows no blocks; the paper shows it in one piece.
    own = (q // B == k // B) | (config.attention == "swa")
    roles = np.zeros((q.size, k.size), dtype=int)
    roles[window & own] = BLOCK
    roles[window & ~own] = MEMORY
    anchors = np.isin(k, config.anchor_positions)
    roles[token_sees_anchor(config)(q, k) & anchors & between_tokens] = SINK
    roles[token_sees_fam(config)(q, k) & ~q_is_fam & k_is_fam] = FAM_KEY
    roles[fam_sees_token(config)(q, k) & q_is_fam & ~k_is_fam] = COMPRESSION
    # The FAM queries of block τ are F of block τ-1 and see themselves, not causally.
    roles[(k == q - 1) & q_is_fam & k_is_fam] = FAM_LOOP
    if config.attention == "swa":
        queries = keys = [("tokens", blocks * B)]
    return Mask(roles, tuple(queries), tuple(keys))


def receptive_field(config: FamConfig, token: int, depth: int) -> list[set[int]]:
    """Positions that reach `token` through `depth` layers: one set a layer, the input's first."""
    sees = token_sees_token(config)
    reached = [{token}]
    for _ in range(depth):
        reached.insert(0, {k for q in reached[0] for k in range(q + 1) if sees(q, k)})
    return reached


# ---- drawing


def _draw_mask(axes: Any, mask: Mask, number: str, title: str, setting: str) -> None:
    """Cells in the colours of their roles; groups named at the sides and ruled off."""
    colours = require("matplotlib.colors", "plot").ListedColormap(_COLOURS)
    axes.pcolormesh(mask.roles, cmap=colours, vmin=-0.5, vmax=6.5, edgecolors="white", linewidth=1)
    axes.invert_yaxis()
    axes.set_aspect("equal")
    name_groups(axes.xaxis, mask.keys, axes.axvline)
    name_groups(axes.yaxis, mask.queries, axes.axhline)
    axes.set_xlabel("key", fontsize=11)
    axes.set_ylabel("query", fontsize=11)
    for spine in axes.spines.values():
        spine.set_color(_BORDER)
    _title(axes, number, title, setting)


def name_groups(axis: Any, groups: tuple[tuple[str, int], ...], rule: Any) -> None:
    """Write the name of each group beside its middle and rule it off from the next."""
    ends = list(accumulate(size for _, size in groups))
    middles = [end - size / 2 for end, (_, size) in zip(ends, groups, strict=True)]
    axis.set_ticks(middles, [name for name, _ in groups], fontsize=9)
    axis.set_tick_params(length=0)
    for end in ends[:-1]:
        rule(end, color=_BORDER, linewidth=0.8)


def _draw_receptive_field(axes: Any, config: FamConfig, blocks: int, depth: int) -> None:
    """Layers above each other, and every way down from the last token of the top layer."""
    B = config.block_size
    last = blocks * B - 1
    reached = receptive_field(config, last, depth)
    sees = token_sees_token(config)
    for layer in range(1, depth + 1):
        for query in reached[layer]:
            for key in [k for k in range(query + 1) if sees(query, k)]:
                role = BLOCK if key // B == query // B else MEMORY
                ends = [key, query], [layer - 1, layer]
                axes.plot(*ends, color=_COLOURS[role], linewidth=1.3, zorder=role == BLOCK)
    for layer in range(depth + 1):
        for token in range(last + 1):
            face = _BORDER if token in reached[layer] else "white"
            axes.scatter(token, layer, s=50, facecolor=face, edgecolor=_QUIET, zorder=3)
    first = min(reached[0])
    axes.plot([first, first, last, last], [-0.3, -0.5, -0.5, -0.3], color=_BORDER, linewidth=1.3)
    axes.text((first + last) / 2, -0.85, f"{last - first + 1} tokens", ha="center", fontsize=11)
    axes.set_xticks(
        [B * τ + (B - 1) / 2 for τ in range(blocks)],
        [f"block {τ}" for τ in range(blocks)],
        fontsize=9,
    )
    layers = ["input", *(f"layer {n}" for n in range(1, depth + 1))]
    axes.set_yticks(range(depth + 1), layers, fontsize=9)
    axes.tick_params(length=0)
    axes.set_ylim(-1.1, depth + 0.4)
    axes.set_box_aspect(1)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _title(axes: Any, number: str, title: str, setting: str) -> None:
    axes.set_title(f"{number}  {title}".strip(), loc="left", fontsize=13, fontweight="bold", pad=22)
    axes.text(0, 1.02, setting, transform=axes.transAxes, fontsize=11, color=_QUIET, va="bottom")


def _draw_legend(figure: Any, roles: list[int]) -> None:
    patch = require("matplotlib.patches", "plot").Patch
    figure.legend(
        handles=[
            patch(facecolor=_COLOURS[role], edgecolor="#bbbbbb", label=_MEANINGS[role])
            for role in roles
        ],
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=12,
    )


def _line_styles() -> list[dict[str, Any]]:
    """Colours, dashes and widths in which lines that lie on each other are still all seen."""
    colours = ("#333333", "#0072b2", "#d55e00", "#009e73", "#b0568c", "#f0b429")
    dashes = ("-", "-", (0, (5, 2)), (0, (2, 1.5)), (0, (6, 2, 1, 2)), (0, (1, 1)))
    widths = (2.0, 4.0, 2.6, 2.0, 1.8, 1.6)
    return [
        {"color": colour, "linestyle": dash, "linewidth": width}
        for colour, dash, width in zip(colours, dashes, widths, strict=True)
    ]


def _plain_axes(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
    axes.set_xlabel("tokens", fontsize=11)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(axis="y", color="#e4e4e4")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _subscript(number: int) -> str:
    return str(number).translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉"))


def check_ending(path: str | PathLike[str]) -> None:
    """Refuse a name that no figure can be written to."""
    if Path(path).suffix.lower() not in ENDINGS:
        raise UserError(f"A figure is written as {', '.join(ENDINGS)}, not as {Path(path).name}.")


def new_figure(path: str | PathLike[str], width: float, height: float) -> Any:
    """An empty figure, in inches, that can be written to `path`."""
    check_ending(path)
    # Without pyplot, which keeps figures and picks a window system.
    make = require("matplotlib.figure", "plot").Figure
    figure = make(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.15)
    return figure


def write_figure(figure: Any, path: str | PathLike[str]) -> None:
    """Draw into memory first: what is written is a whole figure."""
    drawn = io.BytesIO()
    ending = Path(path).suffix.lower()[1:]
    # Without a date the same figure is the same file.
    dateless = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(ending)
    with require("matplotlib", "plot").rc_context({"svg.hashsalt": "transformerfam"}):
        figure.savefig(drawn, format=ending, dpi=150, metadata=dateless)
    try:
        with whole_file(path) as beside:
            beside.write_bytes(drawn.getvalue())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}.") from error
