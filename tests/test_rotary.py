"""Rotation by any real position, in every layout, as exact near a hundred million as near zero."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from families import FAMILIES, converted
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from transformerfam import FamConfig
from transformerfam.rotary import Rotary, Tables, rotate

PI = Fraction("3.14159265358979323846264338327950288419716939937510")
INV_FREQ = 10000.0 ** -(torch.arange(4, dtype=torch.float64) / 4)


def rotated(rotary: Rotary, x: Tensor, positions: Tensor) -> Tensor:
    return rotate(x, rotary.tables(positions, x))


def by_definition(x: Tensor, position: float, inv_freq: Tensor, interleaved: bool) -> Tensor:
    """One vector: each pair (a, b) becomes (a cos - b sin, b cos + a sin)."""
    out, n = x.clone(), len(inv_freq)
    for i, frequency in enumerate(inv_freq.tolist()):
        first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + n)
        cos, sin = math.cos(position * frequency), math.sin(position * frequency)
        out[first] = x[first] * cos - x[second] * sin
        out[second] = x[second] * cos + x[first] * sin
    return out


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("features", [8, 9, 20])
def test_rotation_is_the_definition(interleaved: bool, features: int) -> None:
    """All features or, in a partial rotary, the first eight of them."""
    x = torch.randn(2, 5, features, dtype=torch.float64)
    positions = torch.tensor([0.0, 1.0, -7.0, 2.25, 1000.0])
    out = rotated(Rotary(INV_FREQ, interleaved), x, positions)
    for row in range(2):
        for i, position in enumerate(positions.tolist()):
            expected = by_definition(x[row, i], position, INV_FREQ, interleaved)
            torch.testing.assert_close(out[row, i], expected, rtol=0, atol=1e-12)
    assert torch.equal(out[:, 0], x[:, 0])
    assert torch.equal(out[..., 8:], x[..., 8:])


def test_a_layer_without_positions_rotates_nothing() -> None:
    x = torch.randn(2, 5, 8)
    assert Rotary(None).tables(torch.arange(5), x) is None
    assert rotate(x, None) is x


@pytest.mark.parametrize("position", [10**8, 10**8 + 12345, 123_456_789])
def test_angles_at_a_hundred_million_are_exact(position: int) -> None:
    tables = Rotary(INV_FREQ).tables(torch.tensor([position]), torch.zeros(0, dtype=torch.float64))
    assert tables is not None
    for i, frequency in enumerate(INV_FREQ.tolist()):
        angle = Fraction(frequency) * position
        angle -= 2 * PI * math.floor(angle / (2 * PI))
        assert math.isclose(float(tables.cos[0, i]), math.cos(angle), abs_tol=5e-8)
        assert math.isclose(float(tables.sin[0, i]), math.sin(angle), abs_tol=5e-8)


@given(st.integers(-(10**8), 10**8), st.integers(0, 2000), st.integers(0, 2000), st.booleans())
@settings(max_examples=50, deadline=None)
def test_scores_depend_on_differences_of_positions_only(
    offset: int, query: int, key: int, interleaved: bool
) -> None:
    random = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 8, dtype=torch.float64, generator=random)
    rotary, scores = Rotary(INV_FREQ, interleaved), []
    for moved in (0, offset):
        places = torch.tensor([[query + moved], [key + moved]], dtype=torch.float64)
        scores.append(rotated(rotary, q, places[0]) @ rotated(rotary, k, places[1]).T)
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=2e-6)


def test_rotations_add_up() -> None:
    """What moves the keys of a memory to the frame of the next block: R(a) R(b) = R(a + b)."""
    x, rotary = torch.randn(5, 8, dtype=torch.float64), Rotary(INV_FREQ)
    a, b = torch.arange(5.0), torch.tensor([-6.0, 100.0, 0.5, -0.25, 3.0])
    twice = rotated(rotary, rotated(rotary, x, a), b)
    torch.testing.assert_close(twice, rotated(rotary, x, a + b), rtol=0, atol=1e-12)


def test_positions_of_rows_broadcast_over_heads() -> None:
    x = torch.randn(3, 2, 5, 8, dtype=torch.float64)  # rows, heads, length, features
    positions = torch.arange(15.0).view(3, 5)
    tables = Rotary(INV_FREQ).tables(positions, x)
    assert tables is not None
    out = Tables(tables.cos[:, None], tables.sin[:, None], False).rotate(x)
    for row in range(3):
        for head in range(2):
            alone = rotated(Rotary(INV_FREQ), x[row, head], positions[row])
            assert torch.equal(out[row, head], alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(dtype: torch.dtype) -> None:
    x = torch.randn(100, 8).to(dtype)
    out = rotated(Rotary(INV_FREQ), x, torch.arange(100) + 10**6)
    exact = rotated(Rotary(INV_FREQ), x.double(), torch.arange(100) + 10**6)
    assert out.dtype == dtype
    # Half a unit in the last place, and a little for the cos and sin in float32.
    assert bool(
        ((out.double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps / 2 + 1e-5).all()
    )


# ---- what the probe finds

INTERLEAVED = {"Cohere 2", "GLM-4"}
PARTIAL = {"GLM-4": 4, "GPT-NeoX": 2, "Phi-3": 4, "StableLM": 2}
WITHOUT_POSITIONS = {"Cohere 2": [3], "SmolLM3": [3]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_probe_finds_how_each_family_rotates(family: str, dtype: torch.dtype) -> None:
    model = converted(FamConfig.paper(block_size=6, fam_length=0), family, dtype)
    rotaries = model.get_decoder().rotaries()
    assert len(rotaries) == model.config.num_hidden_layers
    for layer, rotary in enumerate(rotaries):
        if layer in WITHOUT_POSITIONS.get(family, []):
            assert rotary.inv_freq is None
            continue
        assert rotary.inv_freq is not None and rotary.inv_freq.dtype == torch.float64
        assert rotary.interleaved == (family in INTERLEAVED)
        assert 2 * len(rotary.inv_freq) == PARTIAL.get(family, 8)


def test_the_probe_tells_local_from_global_layers() -> None:
    rope = {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    model = converted(
        FamConfig.paper(block_size=6, fam_length=0),
        "Gemma 3 (text)",
        rope_parameters=rope,
        layer_types=kinds,
    )
    for kind, rotary in zip(kinds, model.model.rotaries(), strict=True):
        assert rotary.inv_freq is not None
        factor, theta = (8.0, 1e6) if kind == "full_attention" else (1.0, 1e4)
        expected = theta ** -(torch.arange(4, dtype=torch.float64) / 4) / factor
        torch.testing.assert_close(rotary.inv_freq, expected, rtol=1e-6, atol=0)
