"""The one attention operation, and the three ways to compute it.

Knows queries, keys, values and a mask; nothing of blocks, memories or models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from transformerfam.config import Backend


@dataclass(frozen=True)
class AttentionStyle:
    """What a model family does to its attention besides the softmax.

    Attributes:
        scaling: factor on the scores.
        dropout: probability on the attention weights, 0 outside training.
        softcap: scores become softcap · tanh(score / softcap) (Gemma 2).
        sink_logits: (H,) a learned extra logit in each head's softmax that no key owns (gpt-oss).
        sliding_window: the layer's own window in tokens, a further limit on what tokens see.
    """

    scaling: float
    dropout: float = 0.0
    softcap: float | None = None
    sink_logits: Tensor | None = None
    sliding_window: int | None = None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    style: AttentionStyle,
    backend: Backend,
) -> Tensor:
    """softmax(query · key, where mask) · value.

    Args:
        query: (G, H, L, D).
        key, value: (G, Hk, K, D) and (G, Hk, K, Dv), H a multiple of Hk.
        mask: boolean (G or 1, 1, L, K), True where a query sees a key; None: everywhere. Every
            query sees at least one key.

    Returns:
        (G, H, L, Dv)
    """
    # SDPA knows no softcap and FlexAttention no dropout; the plain way knows all.
    if backend == "sdpa" and style.softcap is None:
        return _sdpa(query, key, value, mask, style)
    if backend == "flex" and not style.dropout:
        return _flex(query, key, value, mask, style)
    return _eager(query, key, value, mask, style)


def _eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, style: AttentionStyle) -> Tensor:
    k, v = _share_heads(k, q), _share_heads(v, q)
    scores = (q @ k.transpose(-1, -2)) * style.scaling  # (G, H, L, K)
    if style.softcap is not None:
        scores = style.softcap * torch.tanh(scores / style.softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if style.sink_logits is not None:
        scores = torch.cat([scores, _per_head(style.sink_logits, scores)], dim=-1)
    weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    weights = F.dropout(weights[..., : k.shape[-2]], style.dropout)
    return weights @ v


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, style: AttentionStyle) -> Tensor:
    if style.sink_logits is not None:
        # One more key of zeros scores 0, to which the mask adds the learned logit.
        bias = _per_head(style.sink_logits, q)
        if mask is None:
            mask = torch.ones(1, 1, q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device)
        seen = torch.zeros(mask.shape, dtype=q.dtype, device=q.device)
        seen = seen.masked_fill(~mask, float("-inf")).expand(*bias.shape[:3], -1)
        mask = torch.cat([seen, bias], dim=-1)
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=style.dropout,
        scale=style.scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, style: AttentionStyle) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask

    block_mask = None
    if mask is not None:
        seen = mask[:, 0]  # (G or 1, L, K)
        shared = seen.shape[0] == 1
        block_mask = create_block_mask(
            lambda g, h, i, j: seen[0 if shared else g, i, j],
            None if shared else q.shape[0],
            None,
            q.shape[-2],
            k.shape[-2],
            device=q.device,
        )
    cap = style.softcap
    score_mod = None if cap is None else (lambda s, g, h, i, j: cap * torch.tanh(s / cap))
    out, log_sum = _flex_attention(q.device.type)(
        q,
        k,
        v,
        score_mod=score_mod,
        block_mask=block_mask,
        scale=style.scaling,
        enable_gqa=q.shape[1] != k.shape[1],
        return_lse=True,
    )
    if style.sink_logits is not None:
        share = torch.sigmoid(log_sum - style.sink_logits[None, :, None])
        out = out * share[..., None].to(out.dtype)
    return out


@cache
def _flex_attention(device: str) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    # Without a compiler FlexAttention is the dense definition; that is what a CPU test wants.
    return torch.compile(flex_attention) if device == "cuda" else flex_attention


def _share_heads(x: Tensor, query: Tensor) -> Tensor:
    """(G, Hk, K, D) repeated to the query's H heads (grouped-query attention)."""
    return x.repeat_interleave(query.shape[1] // x.shape[1], dim=1)


def _per_head(logits: Tensor, like: Tensor) -> Tensor:
    """(H,) as a last column (G, H, L, 1)."""
    return logits.to(like.dtype)[None, :, None, None].expand(*like.shape[:3], 1)
