"""Auxiliary losses of a feedback memory (C.4, C.5), collected while a call runs.

Knows F, queries, keys and values of one layer and block; nothing of plans, memories or training. The
paper says what these losses are for and gives no formulas; the formulas are our reading.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from transformerfam.attention import AttentionStyle, attend
from transformerfam.config import Backend
from transformerfam.layer_memory import KeyValue


class FeedbackLosses:
    """What the layers of one call add, each for every row of the batch.

    Of row r the mean, over layers and over the blocks that it finished in the call, of

        diversity · D_τ + reconstruction · R_τ

    with `diversity` and `reconstruction` of this module; 0 where it finished none.

    Args:
        diversity: weight of D.
        reconstruction: weight of R.
    """

    def __init__(self, diversity: float = 0.0, reconstruction: float = 0.0) -> None:
        self.diversity = diversity
        self.reconstruction = reconstruction
        self._of_layers: dict[int, Tensor] = {}

    def add(self, layer: int, of_rows: Tensor) -> None:
        """Take a layer's (R,). Recomputation under checkpointing comes again; the first stays."""
        self._of_layers.setdefault(layer, of_rows)

    def total(self) -> Tensor:
        """(R,), differentiable; or one number, 0, if no row finished a block."""
        found = list(self._of_layers.values())
        if not found:
            return torch.zeros(())
        # A model may be split over devices.
        return torch.stack([f.to(found[0].device) for f in found]).mean(0)


def diversity(fam: Tensor) -> Tensor:
    """(R,): how alike the rows of F (R, N, d) are, N at least 2.

    D = 1 / (N·(N - 1)) · sum over i ≠ j of cos²(F_i, F_j)
    """
    N = fam.shape[1]
    unit = normalize(fam.to(torch.promote_types(fam.dtype, torch.float32)), dim=-1)
    with torch.autocast(unit.device.type, enabled=False):  # it would round them again
        squared = (unit @ unit.transpose(1, 2)).pow(2)  # (R, N, N)
    own = squared.diagonal(dim1=1, dim2=2)
    return (squared.sum((1, 2)) - own.sum(1)) / (N * (N - 1))


def reconstruction(
    query: Tensor,
    taken: Tensor,
    fam: KeyValue,
    block: KeyValue,
    style: AttentionStyle,
    backend: Backend,
) -> Tensor:
    """(R,): how far what a block's queries read from FAM is from what they read from the block.

        R = mean over queries, heads and features of (A(Q_τ; Kf, Vf) - sg(A(Q_τ; K_τ, V_τ)))²

    Kf and Vf are those of F_τ, which compresses block τ; A is softmax attention, without a mask. It
    is the attention reconstruction loss of Compressive Transformers (arXiv 1911.05507), with FAM for
    its compressed memory; as there no gradient goes to Q_τ. Unlike there queries and keys have their
    positions.

    Args:
        query: (R, H, L, D), rotated, as all keys here.
        taken: (R or 1, L), where there is a query.
        fam, block: N and B keys and values.
    """
    still = replace(style, dropout=0.0)
    query = query.detach()
    with torch.no_grad():
        target = attend(query, block.keys, block.values, None, still, backend)
    found = attend(query, fam.keys, fam.values, None, still, backend)  # (R, H, L, Dv)
    wide = torch.promote_types(found.dtype, torch.float32)
    squared = (found.to(wide) - target.to(wide)).pow(2).mean((1, 3))  # (R, L)
    return (squared * taken).sum(1) / taken.sum(1).clamp(min=1)
