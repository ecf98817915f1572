"""A decoder layer of any family that FAM rows can re-enter, and attention that is ours to answer.

Knows how transformers calls layers and attention; nothing of what a pass computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

# Not public, but the only way to tell transformers' recording hooks which calls are not tokens.
from transformers.utils.output_capturing import _active_collector

from transformerfam.attention import AttentionStyle
from transformerfam.blocks import TokenPass
from transformerfam.call import AttentionPass, Call
from transformerfam.compressive import CompressivePass
from transformerfam.feedback_segments import FeedbackSegmentsPass
from transformerfam.modules import adapted_modules
from transformerfam.probe import Probe
from transformerfam.recurrent import SegmentCall
from transformerfam.replayed_blocks import ReplayPass

ATTENTION_NAME = "transformerfam"


def fam_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention function registered with transformers under `ATTENTION_NAME`."""
    if not callable(attention_mask):
        raise RuntimeError("Attention of a TransformerFAM was called outside of its decoder.")
    style = AttentionStyle(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        dropout=dropout,
        softcap=softcap,
        sink_logits=s_aux,
        sliding_window=sliding_window,
    )
    return attention_mask(query, key, value, style), None


AttentionInterface.register(ATTENTION_NAME, fam_attention)
# Masks are made by the plan of each call; without this entry transformers drops padding masks.
AttentionMaskInterface.register(ATTENTION_NAME, lambda *args, **kwargs: None)


def _mix(mixin: Any, base: Any) -> Any:
    """`base` with `mixin` before it.

    Under its own name: FSDP, device maps and the recording of hidden states go by class names.
    """
    return type(
        base.__name__,
        (mixin, base),
        {"__module__": base.__module__, "__qualname__": base.__qualname__},
    )


mixed: Callable[[Any, Any], Any] = cache(_mix)


class Picklable:
    """An object of a class made by `mixed`: a pickle names the family's class and the mixin."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Rebuild by mixing again; the rest is the object's attributes."""
        mixin, base = type(self).__bases__
        return _blank, (mixin, base), self.__dict__


def _blank(mixin: Any, base: Any) -> Any:
    made = mixed(mixin, base)
    return made.__new__(made)


class FamLayer(Picklable):
    """A decoder layer that FAM rows can re-enter. Mixed in before the family's own layer class."""

    fam_index: int

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        fam_call: Call | SegmentCall | Probe | None = None,
        **kwargs: Any,
    ) -> Any:
        """The family's layer, with a pass of `fam_call` in place of the attention mask."""
        if fam_call is None:
            raise RuntimeError("A layer of a TransformerFAM was called outside of its decoder.")
        plain = super().forward  # type: ignore[misc]  # of the family's layer
        kwargs.update(past_key_values=None, use_cache=False)
        fams_own = _adapters_of_fam(self, fam_call)

        def reenter(rows: Tensor, attention: AttentionPass) -> Tensor:
            # Past the checkpointing wrapper and past forward hooks: part of the same forward.
            own = {name: _for_rows(name, value, rows) for name, value in kwargs.items()}
            own["attention_mask"] = attention
            with _nothing_recorded(), _switched_off(fams_own):
                out = plain(rows, *args, **own)
            return out[0] if isinstance(out, tuple) else out

        if isinstance(fam_call, SegmentCall):
            hidden_states = fam_call.inputs(self.fam_index, hidden_states)
        if isinstance(fam_call, (Probe, SegmentCall)):
            tokens: AttentionPass = fam_call.enter(self.fam_index, hidden_states)
        else:
            kind = _token_pass(fam_call)
            tokens = kind(fam_call, self.fam_index, hidden_states, reenter)
        own = {**kwargs, "attention_mask": tokens}
        with _switched_off(dict.fromkeys(fams_own, True)):
            return plain(hidden_states, *args, **own)


def _adapters_of_fam(layer: Any, call: Call | SegmentCall | Probe) -> dict[Any, bool]:
    """Modules of PEFT that are to change FAM alone, and whether each is switched off now."""
    if not isinstance(call, Call) or call.config.adapted == "all":
        return {}
    # PEFT's public switch would also take the gradient from the adapter's parameters.
    return {module: module._disable_adapters for module in adapted_modules(layer)}


@contextmanager
def _switched_off(adapters: Mapping[Any, bool]) -> Iterator[None]:
    """Modules of PEFT switched off, where True, and on, where False, meanwhile."""
    before = {module: module._disable_adapters for module in adapters}
    for module, is_off in adapters.items():
        module._disable_adapters = is_off
    try:
        yield
    finally:
        for module, was_off in before.items():
            module._disable_adapters = was_off


def _token_pass(call: Call) -> type[TokenPass]:
    """What answers for the attention of tokens."""
    if call.given is not None:
        return ReplayPass
    config = call.config
    if config.memory_source == "output":
        return FeedbackSegmentsPass
    return TokenPass if config.compressive_memory == "none" else CompressivePass


@contextmanager
def _nothing_recorded() -> Iterator[None]:
    """Router logits and the like, which transformers records by hooks, are those of tokens alone."""
    recording = _active_collector.get()
    if recording is None:
        yield
        return
    before = _active_collector.set(None)
    try:
        yield
    finally:
        _active_collector.reset(before)


def _for_rows(name: str, value: Any, rows: Tensor) -> Any:
    """A layer's keyword for FAM rows in place of tokens: all stand at position 0, see rotary.py."""
    if name not in ("position_embeddings", "position_ids"):
        return value
    if isinstance(value, Tensor):
        return value[:1, :1].expand(rows.shape[0], rows.shape[1], *value.shape[2:])
    if isinstance(value, (tuple, list)):
        return type(value)(_for_rows(name, v, rows) for v in value)
    return value
