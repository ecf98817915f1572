"""Linear attention from scratch: what it computes, how large it is, that it learns the toy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from transformerfam import FamConfig
from transformerfam.reproduction import experiment, linear, toy
from transformerfam.reproduction.items import ITEMS
from transformerfam.reproduction.linear import linear_logits, linear_model, linear_state_bytes

ITS = ITEMS["figure7"].experiment
RUN = next(p.run for p in experiment.plan(ITS, [0]) if p.variant == "linear attention")


def size(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_it_is_about_as_large_as_the_toy_that_it_is_compared_with() -> None:
    config = FamConfig.paper(block_size=16, memory_segments=0, fam_length=8)
    assert size(linear_model(ITS.shape, 0)) == pytest.approx(
        size(toy.toy_model(config, ITS.shape, 0)), rel=0.2
    )


def test_its_state_does_not_grow_and_is_the_matrices_of_its_heads() -> None:
    model = linear_model(ITS.shape, 0)
    head, layers, kernel = 16, 2, 4
    convolution = 3 * 64 * kernel
    assert linear_state_bytes(model) == 4 * layers * (4 * head * head + convolution)


def test_layers_are_the_gated_delta_rule() -> None:
    """One layer against the formula, token by token: S ← α (S - β k (kᵀS)) + β k vᵀ."""
    model = linear_model(ITS.shape, 1).double().eval()
    layer = model.model.layers[0].linear_attn
    hidden = torch.randn(1, 9, 64, dtype=torch.float64)
    with torch.no_grad():
        ours = layer(hidden)
        torch.testing.assert_close(ours, by_hand(layer, hidden), rtol=1e-4, atol=1e-5)


def by_hand(layer: Any, hidden: Tensor) -> Tensor:
    mixed = layer.in_proj_qkv(hidden)[0]  # (T, 3·64)
    kernel = layer.conv1d.weight[:, 0]  # (3·64, 4)
    padded = torch.cat([mixed.new_zeros(3, mixed.shape[1]), mixed])
    mixed = torch.stack([(padded[t : t + 4] * kernel.T).sum(0) for t in range(len(mixed))])
    q, k, v = torch.nn.functional.silu(mixed).unflatten(1, (3, 4, 16)).unbind(1)
    q, k = (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    beta = layer.in_proj_b(hidden)[0].sigmoid()
    step = torch.nn.functional.softplus(layer.in_proj_a(hidden)[0] + layer.dt_bias)
    alpha = torch.exp(-layer.A_log.exp() * step)
    said = []
    S = hidden.new_zeros(4, 16, 16)
    for t in range(len(mixed)):
        S = alpha[t, :, None, None] * S
        error = v[t] - torch.einsum("hkv,hk->hv", S, k[t])
        S = S + torch.einsum("hk,hv->hkv", k[t], beta[t, :, None] * error)
        said.append(torch.einsum("hkv,hk->hv", S, q[t]) / 16**0.5)
    out = torch.stack(said)  # (T, 4, 16)
    out = out * torch.rsqrt(out.pow(2).mean(-1, keepdim=True) + layer.layer_norm_epsilon)
    gate = torch.nn.functional.silu(layer.in_proj_z(hidden)[0].unflatten(1, (4, 16)))
    return layer.out_proj((layer.norm.weight * out * gate).flatten(1))[None]


def test_read_in_chunks_it_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = linear_model(ITS.shape, 0).eval()
    ids = torch.randint(64, (2, 150), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits[:, 140:]
    monkeypatch.setattr("transformerfam.reproduction.linear._CHUNK_TOKENS", 2 * 37)
    torch.testing.assert_close(linear_logits(model, ids, 140), whole, rtol=0, atol=1e-5)


def test_heads_remember_from_the_start() -> None:
    """Time steps are between 1/1000 and 1/10: softplus of the bias says so."""
    for layer in linear_model(ITS.shape, 0).model.layers:
        step = torch.nn.functional.softplus(layer.linear_attn.dt_bias.detach())
        assert float(step.min()) >= 1e-3 and float(step.max()) <= 0.1 + 1e-6


def test_training_is_the_same_each_time_and_asks_like_the_others() -> None:
    one, two = (linear.trained({**RUN, "steps": 2}) for _ in range(2))
    assert one[1] == two[1] and len(one[1]) == 2
    asked = toy.ToyPasskeys(ITS.shape)
    share = toy.digit_accuracy(one[0], asked, 2, 8, linear_logits)
    assert 0 <= share <= 0.5  # it has learned nothing yet
    run = {**RUN, "lengths": [2], "count": 8}
    assert linear.asked(one[0], run) == {"1 start": {"2": share}}


@pytest.mark.slow
def test_it_learns_the_toy_within_the_trained_lengths() -> None:
    model, losses = linear.trained({**RUN, "steps": 400})
    assert losses[-1] < 0.05
    asked = toy.ToyPasskeys(ITS.shape)
    found = {n: toy.digit_accuracy(model, asked, n, 32, linear_logits) for n in (2, 3, 16)}
    print("linear attention:", found)
    assert found[2] >= 0.95 and found[3] >= 0.95, found
