"""The loss in little memory is the usual loss, and so are its gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from transformerfam.training import cross_entropy as ours
from transformerfam.training.cross_entropy import weighted_cross_entropy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_loss_and_gradient(
    tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours, "_PIECE", 3)
    torch.manual_seed(0)
    scores = (torch.randn(tokens, 50) * 5).to(dtype)
    targets = torch.randint(50, (tokens,))
    weights = torch.rand(tokens)
    weights[0] = 0
    one, other = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    expected = (cross_entropy(one.float(), targets, reduction="none") * weights).sum()
    # As after a model's head: what is overwritten is not a leaf.
    found = weighted_cross_entropy(other * 1, targets, weights)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    (expected * 0.7).backward()
    (found * 0.7).backward()
    torch.testing.assert_close(
        other.grad, one.grad, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-6
    )


def test_without_a_gradient_nothing_is_overwritten() -> None:
    scores = torch.randn(4, 5)
    before = scores.clone()
    with torch.no_grad():
        weighted_cross_entropy(scores, torch.zeros(4, dtype=torch.long), torch.ones(4))
    assert torch.equal(scores, before)
