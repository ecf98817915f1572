"""An `Inspection` as one HTML page that needs nothing else: the template with the numbers in it.

Knows how numbers are packed for the page's script; nothing of models or of what the page shows.
"""

from __future__ import annotations

import base64
import gzip
import html
import json
import math
import re
from collections.abc import Sequence
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from transformerfam.inspection import STRONGEST, Inspection, LayerInspection

_WEIGHTS = (
    *("shares", "read_by_slot", "read_by_head"),
    *("written_by_slot", "written_by_head", "strongest_weights"),
)
_NUMBERS = ("rms", "change", "cosine", "kept")


def page(
    inspection: Inspection,
    words: Sequence[str],
    *,
    title: str,
    facts: Sequence[str],
    trained: bool,
) -> str:
    """The page.

    Args:
        inspection: the numbers.
        words: what each token adds to the text.
        title: what was read.
        facts: short remarks for the head of the page.
        trained: whether the feedback memory was trained; the page says so if not.
    """
    filled = {
        "title": html.escape(f"Inside the memory: {title}"),
        "data": _script_json(
            {
                "title": title,
                "facts": list(facts),
                "trained": trained,
                "words": list(words),
                **_facts_of(inspection),
                **_packed(inspection),
            }
        ),
    }
    template = resources.files("transformerfam").joinpath("inspection.html").read_text("utf-8")
    # In one pass: a text may hold what looks like a place of the template.
    return re.sub(r"\{\{(title|data)\}\}", lambda m: filled[m[1]], template)


def _script_json(values: dict[str, Any]) -> str:
    """JSON that may stand in a script element: nothing in it can end the element."""
    return json.dumps(values, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _facts_of(inspection: Inspection) -> dict[str, Any]:
    """What the script has to know of the geometry, and the numbers that are few."""
    config, B = inspection.config, inspection.config.block_size
    starts = range(0, len(inspection.tokens), B)
    P = config.past_length
    return {
        "block_size": B,
        "slots": config.fam_length,
        "previous_fams": config.previous_fams,
        "heads": inspection.layers[0].read_by_head.shape[1],
        "blocks": inspection.blocks,
        "model_layers": inspection.model_layers,
        "anchor_positions": list(config.anchor_positions),
        "anchors_name": "globals" if config.global_positions else "sinks",
        "window_start": [0 if P is None else max(0, start - P) for start in starts],
        "cell": inspection.grid.cell,
        "map_blocks": list(inspection.grid.blocks),
        "map_keys": inspection.map_keys,
        "strongest": STRONGEST,
        "losses": _rounded(inspection.losses),
        "without": None
        if inspection.losses_without is None
        else _rounded(inspection.losses_without),
        "layers": [
            {"layer": found.layer, **{name: _rounded(getattr(found, name)) for name in _NUMBERS}}
            for found in inspection.layers
        ],
    }


def _rounded(numbers: Tensor) -> Any:
    """Nested lists of four digits; null for NaN."""
    if numbers.dim() > 1:
        return [_rounded(row) for row in numbers]
    return [None if math.isnan(x) else float(f"{x:.4g}") for x in numbers.tolist()]


# ---- many numbers: bytes, one after another, compressed once


def _packed(inspection: Inspection) -> dict[str, Any]:
    """`arrays`: name -> (kind, first byte, how many, scale); `blob`: base64 of their gzip."""
    arrays: dict[str, tuple[str, int, int, float]] = {}
    parts: list[bytes] = []
    start = 0
    for found in inspection.layers:
        for name, kind, numbers in _arrays(found):
            scale = 1.0
            if kind == "weight":
                numbers, scale = quantised(numbers)
            data = numbers.contiguous().numpy().tobytes()
            arrays[f"{found.layer}.{name}"] = (kind, start, numbers.numel(), scale)
            parts.append(data)
            start += len(data)
    # Without a time the same numbers are the same page.
    blob = base64.b64encode(gzip.compress(b"".join(parts), mtime=0)).decode()
    return {"arrays": arrays, "blob": blob}


def _arrays(found: LayerInspection) -> list[tuple[str, str, Tensor]]:
    return [
        ("strongest", "int", found.strongest.int()),
        *((name, "weight", getattr(found, name)) for name in _WEIGHTS),
        *((f"map{block}", "weight", weights) for block, weights in found.maps.items()),
    ]


def quantised(weights: Tensor) -> tuple[Tensor, float]:
    """Bytes q and a scale, with weights ≈ (q / 255)² · scale.

    Attention is mostly small numbers and a few large ones: on a square-root scale a byte tells
    1/65,025 of the largest from nothing.
    """
    scale = float(weights.max()) if weights.numel() else 0.0
    if not scale:
        return torch.zeros(weights.shape, dtype=torch.uint8), 1.0
    return (weights.clamp(min=0) / scale).sqrt().mul(255).round().to(torch.uint8), scale
