"""Cross-entropy over a large vocabulary in little memory.

Computed as usual, a loss over n tokens keeps several (n, V) tensors in float32; for tens of thousands
of tokens these are larger than everything else in a training step. Knows no model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_PIECE = 2048  # tokens whose probabilities are in memory at a time


def weighted_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Sum over tokens of weight times -log softmax(logits)[target], in nats.

    The gradient takes the place of the logits in memory: they cannot be used after a backward pass.

    Args:
        logits: (n, V).
        targets: (n,) token ids.
        weights: (n,).

    Returns:
        A scalar in float32.
    """
    total: Tensor = _WeightedCrossEntropy.apply(logits, targets, weights)
    return total


class _WeightedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        # log Σ exp of each token: with it a probability is one subtraction and one exponential.
        whole = torch.cat([piece.float().logsumexp(-1) for piece in logits.split(_PIECE)])
        of_target = logits.gather(-1, targets[:, None])[:, 0].float()
        ctx.save_for_backward(logits, targets, weights, whole)
        return ((whole - of_target) * weights).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, targets, weights, whole = ctx.saved_tensors
        scale = (weights * grad)[:, None]
        pieces = (part.split(_PIECE) for part in (logits, targets, scale, whole))
        for piece, target, factor, log_sum in zip(*pieces, strict=True):
            gradient = (piece.float() - log_sum[:, None]).exp_()
            gradient.scatter_add_(1, target[:, None], gradient.new_full((len(target), 1), -1.0))
            piece.copy_(gradient.mul_(factor))
        return logits, None, None
