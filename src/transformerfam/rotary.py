"""Rotary positions that stay small: rotate by any real position, exactly, whatever the family.

The model's own rotary embedding is always fed position 0, so that queries and keys reach attention
unrotated; they are rotated here, relative to the block being read (B.2.1 makes every score depend on
differences only). How a family lays out its rotary pairs is not looked up but found by a probe, see
`transformerfam.probe`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rotary:
    """R(p) for one layer: rotates the first 2n of the D features of a query or key by p · inv_freq.

    Attributes:
        inv_freq: (n,) float64 on the CPU, radians per position; None for a layer without positions.
        interleaved: pairs are features (0, 1), (2, 3) .. instead of (0, n), (1, n + 1) ..
    """

    inv_freq: Tensor | None
    interleaved: bool = False

    def tables(self, positions: Tensor, like: Tensor) -> Tables | None:
        """cos and sin for `positions` (..., L), any real numbers, on the device of `like`.

        Angles are computed in float64 on the CPU: a position of a hundred million is as good as 1.
        """
        if self.inv_freq is None:
            return None
        angles = positions.to("cpu", torch.float64)[..., None] * self.inv_freq  # (..., L, n)
        if self.interleaved:
            angles = angles.repeat_interleave(2, dim=-1)
        else:
            angles = torch.cat([angles, angles], dim=-1)  # (..., L, 2n)
        dtype = torch.promote_types(like.dtype, torch.float32)
        return Tables(
            angles.cos().to(like.device, dtype),
            angles.sin().to(like.device, dtype),
            self.interleaved,
        )


@dataclass(frozen=True, eq=False)
class Tables:
    """cos and sin of some positions, (..., L, 2n), broadcast against (..., L, D) features."""

    cos: Tensor
    sin: Tensor
    interleaved: bool

    def rotate(self, x: Tensor) -> Tensor:
        """R(p) x for x (..., L, D); features from 2n on pass through. Rounds once, to x's type."""
        width = self.cos.shape[-1]
        turned = x[..., :width]
        if self.interleaved:
            quarter = torch.stack([-turned[..., 1::2], turned[..., 0::2]], dim=-1).flatten(-2)
        else:
            first, second = turned.chunk(2, dim=-1)
            quarter = torch.cat([-second, first], dim=-1)
        turned = (turned * self.cos + quarter * self.sin).to(x.dtype)
        return turned if width == x.shape[-1] else torch.cat([turned, x[..., width:]], dim=-1)


def rotate(x: Tensor, tables: Tables | None) -> Tensor:
    """`x` rotated, or as it is for a layer without positions."""
    return x if tables is None else tables.rotate(x)
