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


class AttentionMask:
    """What queries see, in the form that each backend wants; made once and shared by layers.

    Args:
        seen: boolean (G or 1, 1, L, K), True where a query sees a key. Every query sees something.
        bias: (K,) added to the scores of each key, if any.
    """

    def __init__(self, seen: Tensor, bias: Tensor | None = None) -> None:
        self.seen = seen
        self.bias = bias
        self._additive: dict[torch.dtype, Tensor] = {}
        self._blocks: Any = None

    def additive(self, dtype: torch.dtype) -> Tensor:
        """The bias (0 without one) where seen, minus infinity elsewhere."""
        if dtype not in self._additive:
            start = torch.zeros(self.seen.shape, dtype=dtype, device=self.seen.device)
            if self.bias is not None:
                start = start + self.bias.to(dtype)
            self._additive[dtype] = start.masked_fill_(~self.seen, float("-inf"))
        return self._additive[dtype]

    def blocks(self) -> Any:
        """The BlockMask of FlexAttention."""
        if self._blocks is None:
            from torch.nn.attention.flex_attention import create_block_mask

            seen = self.seen[:, 0]  # (G or 1, L, K)
            shared = seen.shape[0] == 1
            self._blocks = create_block_mask(
                lambda g, h, i, j: seen[0 if shared else g, i, j],
                B=None if shared else seen.shape[0],
                H=None,
                Q_LEN=seen.shape[1],
                KV_LEN=seen.shape[2],
                device=seen.device,
            )
        return self._blocks


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask | None,
    style: AttentionStyle,
    backend: Backend,
) -> Tensor:
    """softmax(query · key, where mask) · value.

    Args:
        query: (G, H, L, D).
        key, value: (G, Hk, K, D) and (G, Hk, K, Dv), H a multiple of Hk.
        mask: what each query sees; None: every key.

    Returns:
        (G, H, L, Dv)
    """
    # SDPA knows no softcap and FlexAttention no dropout; the plain way knows all.
    # For few queries without a mask, FAM's, the fused kernel of CPUs is slower, most of all backward.
    few = mask is None and query.device.type == "cpu" and 4 * query.shape[2] <= key.shape[2]
    if backend == "sdpa" and style.softcap is None and not few:
        return _sdpa(query, key, value, mask, style)
    if backend == "flex" and not style.dropout:
        return _flex(query, key, value, mask, style)
    return _eager(query, key, value, mask, style)


def attention_weights(
    q: Tensor, k: Tensor, mask: AttentionMask | None, style: AttentionStyle
) -> Tensor:
    """softmax(query · key, where mask): what `attend` multiplies the values with.

    Args:
        q, k: (G, H, L, D) and (G, Hk, K, D), as in `attend`.

    Returns:
        (G, H, L, K) in the type of q. Rows sum to 1, or to less where a learned sink logit takes
        its share.
    """
    L, K, groups = q.shape[2], k.shape[2], k.shape[1]
    # Heads that share a key-value head become more queries of it: nothing is repeated.
    shared = q.unflatten(1, (groups, -1)).flatten(2, 3)  # (G, Hk, H/Hk · L, D)
    scores = (shared @ k.transpose(-1, -2)).unflatten(
        2, (-1, L)
    ) * style.scaling  # (G, Hk, H/Hk, L, K)
    scores = _capped(scores, style)
    if mask is not None:
        scores = scores + mask.additive(scores.dtype)[:, None]
    if style.sink_logits is not None:
        logits = style.sink_logits.to(scores.dtype).view(1, groups, -1, 1, 1)
        scores = torch.cat([scores, logits.expand(len(scores), -1, -1, L, -1)], dim=-1)
    weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return weights[..., :K].flatten(1, 2)


def attend_beside(
    query: Tensor,
    own: tuple[Tensor, Tensor],
    shared: tuple[Tensor, Tensor],
    style: AttentionStyle,
) -> Tensor:
    """`attend` over keys of each row's own and, behind them, keys that all rows share, without a mask.

    The shared ones are not repeated: queries of all rows ask them together.

    Args:
        query: (G, H, L, D).
        own: keys (G, Hk, N, D) and values (G, Hk, N, Dv).
        shared: keys (1, Hk, K, D) and values (1, Hk, K, Dv).

    Returns:
        (G, H, L, Dv)
    """
    (own_keys, own_values), (keys, values) = own, shared
    G, groups, N, L = len(query), own_keys.shape[1], own_keys.shape[2], query.shape[2]
    asks = query.unflatten(1, (groups, -1)).flatten(2, 3)  # (G, Hk, H/Hk · L, D)

    def together(x: Tensor) -> Tensor:
        """(Hk, G · H/Hk · L, ..)"""
        return x.transpose(0, 1).flatten(1, 2)

    to_own = together(asks @ own_keys.transpose(-1, -2))
    scores = torch.cat([to_own, together(asks) @ keys[0].transpose(-1, -2)], dim=-1)
    scores = _capped(scores * style.scaling, style)
    if style.sink_logits is not None:
        logits = style.sink_logits.to(scores.dtype).view(groups, 1, -1, 1)
        logits = logits.expand(-1, G, -1, L).flatten(1)[..., None]
        scores = torch.cat([scores, logits], dim=-1)
    weights = F.dropout(scores.softmax(-1), style.dropout)
    of_own = weights[..., :N].unflatten(1, (G, -1)).transpose(0, 1) @ own_values
    of_shared = weights[..., N : N + keys.shape[2]] @ values[0]
    out = of_own + of_shared.unflatten(1, (G, -1)).transpose(0, 1)
    return out.unflatten(2, (-1, L)).flatten(1, 2)


def _capped(scores: Tensor, style: AttentionStyle) -> Tensor:
    if style.softcap is None:
        return scores
    return style.softcap * torch.tanh(scores / style.softcap)


def _eager(
    q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None, style: AttentionStyle
) -> Tensor:
    weights = F.dropout(attention_weights(q, k, mask, style), style.dropout)  # (G, H, L, K)
    shared = weights.unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # (G, Hk, H/Hk · L, K)
    return (shared @ v).unflatten(2, (-1, q.shape[2])).flatten(1, 2)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None, style: AttentionStyle
) -> Tensor:
    bias = None if mask is None else mask.additive(q.dtype)
    if style.sink_logits is not None:
        # One more key of zeros scores 0, to which the bias adds the learned logit.
        if bias is None:
            bias = q.new_zeros(1, 1, q.shape[2], k.shape[2])
        logits = style.sink_logits.to(q.dtype)[None, :, None, None]
        shape = (len(bias), q.shape[1], q.shape[2])
        bias = torch.cat([bias.expand(*shape, -1), logits.expand(*shape, 1)], dim=-1)
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    shared = q.shape[1] // k.shape[1]
    if q.is_cuda and bias is not None and shared > 1:
        # With a mask and shared heads PyTorch has no fused kernel, only scores in memory.
        k, v, shared = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1), 1
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=bias,
        dropout_p=style.dropout,
        scale=style.scaling,
        enable_gqa=shared > 1,
    )


def _flex(
    q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None, style: AttentionStyle
) -> Tensor:
    from torch.nn.attention.flex_attention import AuxRequest

    out, aux = _flex_attention(q.device.type)(
        q,
        k,
        v,
        score_mod=_score_mod(style.softcap, None if mask is None else mask.bias),
        block_mask=None if mask is None else mask.blocks(),
        scale=style.scaling,
        enable_gqa=q.shape[1] != k.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    if style.sink_logits is not None:
        share = torch.sigmoid(aux.lse - style.sink_logits[None, :, None])
        out = out * share[..., None].to(out.dtype)
    return out


def _score_mod(cap: float | None, bias: Tensor | None) -> Callable[..., Tensor] | None:
    """What FlexAttention does to a score before the softmax."""
    if cap is None and bias is None:
        return None

    def change(score: Tensor, g: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if cap is not None:
            score = cap * torch.tanh(score / cap)
        return score if bias is None else score + bias[j]

    return change


@cache
def _flex_attention(device: str) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    # Without a compiler FlexAttention is the dense definition; that is what a CPU test wants.
    compiled: Callable[..., Any] = flex_attention
    return torch.compile(compiled) if device == "cuda" else compiled
