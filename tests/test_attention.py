"""Every backend computes the one attention operation, held against its definition in python loops."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from transformerfam.attention import AttentionMask, AttentionStyle, attend
from transformerfam.config import Backend

BACKENDS: tuple[Backend, ...] = get_args(Backend)
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def by_definition(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, style: AttentionStyle
) -> Tensor:
    """softmax over the keys that are seen, one query of one head at a time."""
    G, H, L, _ = q.shape
    out = torch.zeros(G, H, L, v.shape[-1], dtype=q.dtype)
    for g in range(G):
        for h in range(H):
            head = h // (
                H // k.shape[1]
            )  # so many query heads, one after another, share a key head
            for i in range(L):
                terms = []  # (exp of the score, value)
                for j in range(k.shape[2]):
                    if seen is not None and not seen[min(g, len(seen) - 1), 0, i, j]:
                        continue
                    score = float(q[g, h, i] @ k[g, head, j]) * style.scaling
                    if style.softcap is not None:
                        score = style.softcap * math.tanh(score / style.softcap)
                    terms.append((math.exp(score), v[g, head, j]))
                total = sum(weight for weight, _ in terms)
                if style.sink_logits is not None:
                    total += math.exp(float(style.sink_logits[h]))
                for weight, value in terms:
                    out[g, h, i] += weight / total * value
    return out


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_backends_equal_the_definition(data: st.DataObject) -> None:
    draw = data.draw
    G, Hk, groups = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    L, K, D, Dv = (draw(st.integers(1, most)) for most in (4, 9, 4, 5))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    q, k, v = normal(G, Hk * groups, L, D), normal(G, Hk, K, D), normal(G, Hk, K, Dv)
    seen = None
    if draw(st.booleans()):
        seen = torch.rand(draw(st.sampled_from([1, G])), 1, L, K, generator=random) < 0.5
        seen[..., draw(st.integers(0, K - 1))] = True  # every query sees something
    style = AttentionStyle(
        scaling=draw(st.sampled_from([1.0, 0.3])),
        softcap=draw(st.sampled_from([None, 0.7])),
        sink_logits=normal(Hk * groups) if draw(st.booleans()) else None,
    )
    expected = by_definition(q, k, v, seen, style)
    mask = None if seen is None else AttentionMask(seen)
    for backend in BACKENDS:
        if backend == "flex" and (Dv != D or D == 1):
            continue  # a limit of FlexAttention itself
        for _ in range(2):  # the mask keeps what it made for the first layer
            out = attend(q, k, v, mask, style, backend)
            torch.testing.assert_close(
                out, expected, rtol=0, atol=1e-5 if backend == "flex" else 1e-9
            )


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradients_of_the_backends_agree(softcap: float | None) -> None:
    found = []
    for backend in ("sdpa", "eager"):
        torch.manual_seed(0)
        shapes = ((2, 4, 3, 8), (2, 2, 5, 8), (2, 2, 5, 8), (4,))
        q, k, v, sinks = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
        seen = torch.ones(2, 1, 3, 5).tril(1).bool()
        style = AttentionStyle(0.3, softcap=softcap, sink_logits=sinks)
        attend(q, k, v, AttentionMask(seen), style, backend).square().sum().backward()
        found.append([q.grad, k.grad, v.grad, sinks.grad])
    for ours, theirs in zip(*found, strict=True):
        assert ours is not None and bool(ours.abs().max() > 0)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_seen_has_no_influence(backend: Backend) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 6, 4), torch.randn(1, 2, 6, 4)
    seen = torch.tensor([True, False, True, True, False, True]).expand(1, 1, 3, 6)
    style, mask = AttentionStyle(0.5, sink_logits=torch.randn(2)), AttentionMask(seen)
    before = attend(q, k, v, mask, style, backend)
    k[:, :, [1, 4]] = 1e4
    v[:, :, [1, 4]] = -1e4
    assert torch.equal(attend(q, k, v, mask, style, backend), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_keeps_its_type_and_is_close(backend: Backend, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 40, 8), torch.randn(2, 2, 40, 8)
    seen = torch.rand(2, 1, 3, 40) < 0.7
    for softcap in (None, 5.0):
        style = AttentionStyle(0.4, softcap=softcap, sink_logits=torch.randn(4))
        exact = attend(q, k, v, AttentionMask(seen), style, "eager")
        out = attend(q.to(dtype), k.to(dtype), v.to(dtype), AttentionMask(seen), style, backend)
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), exact, rtol=0, atol=0.05)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_leaves_out_weights_and_doubles_the_others(backend: Backend) -> None:
    torch.manual_seed(0)
    K = 50
    q, k = torch.randn(1, 1, 20, 4), torch.randn(1, 1, K, 4)
    values = torch.eye(K)[None, None]  # so that what comes out are the weights
    weights = attend(q, k, values, None, AttentionStyle(0.5), backend)
    dropped = attend(q, k, values, None, AttentionStyle(0.5, dropout=0.5), backend)
    left = dropped > 0
    assert 0.4 < float(left.float().mean()) < 0.6
    torch.testing.assert_close(dropped[left], 2 * weights[left])
    assert not torch.equal(attend(q, k, values, None, AttentionStyle(0.5, 0.5), backend), dropped)
