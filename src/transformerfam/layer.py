"""A decoder layer of any family that FAM rows can re-enter, and attention that is ours to answer.

Knows how transformers calls layers and attention; nothing of what a pass computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class FamilyMask:
    """What matters of a family's own mask: the layer's window, which some name nowhere else."""

    window: int

    def around(self, tokens: AttentionPass) -> AttentionPass:
        """`tokens`, told of the window if the layer does not tell of one itself."""

        def attend(query: Tensor, key: Tensor, value: Tensor, style: AttentionStyle) -> Tensor:
            window = self.window if style.sliding_window is None else style.sliding_window
            return tokens(query, key, value, replace(style, sliding_window=window))

        return attend


def family_mask(*_: Any, local_size: int | None = None, **__: Any) -> FamilyMask | None:
    """The mask function registered with transformers; masks are made by the plan of each call."""
    return None if local_size is None else FamilyMask(local_size)


AttentionInterface.register(ATTENTION_NAME, fam_attention)
# Without this entry transformers drops padding masks.
AttentionMaskInterface.register(ATTENTION_NAME, family_mask)


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
        is_fams_own = _is_fams_own(self, fam_call)

        def reenter(rows: Tensor, attention: AttentionPass) -> Tensor:
            # Past the checkpointing wrapper and past forward hooks: part of the same forward.
            own = {name: _for_rows(name, value, rows) for name, value in kwargs.items()}
            own["attention_mask"] = attention
            with _nothing_recorded(), _passing(tokens=False):
                out = plain(rows, *args, **own)
            return out[0] if isinstance(out, tuple) else out

        if isinstance(fam_call, SegmentCall):
            hidden_states = fam_call.inputs(self.fam_index, hidden_states)
        if isinstance(fam_call, (Probe, SegmentCall)):
            tokens: AttentionPass = fam_call.enter(self.fam_index, hidden_states)
        else:
            kind = _token_pass(fam_call)
            tokens = kind(fam_call, self.fam_index, hidden_states, reenter)
        mask = kwargs.get("attention_mask")
        attend = mask.around(tokens) if isinstance(mask, FamilyMask) else tokens
        with _passing(tokens=is_fams_own):
            return plain(hidden_states, *args, **{**kwargs, "attention_mask": attend})


_tokens_pass: ContextVar[bool] = ContextVar("tokens_pass", default=False)


class AdapterOfFam(Picklable):
    """A module of PEFT whose adapter is FAM's alone: when tokens pass it is as if switched off.

    Mixed in before PEFT's own class. Not by the module's own switch: threads share a model.
    """

    @property
    def disable_adapters(self) -> bool:
        """Whether the adapter adds nothing now; read by PEFT's forward."""
        return _tokens_pass.get() or super().disable_adapters  # type: ignore[misc]  # PEFT's

    def merge(self, *_: Any, **__: Any) -> None:
        """Refused: merged, it would change the way of tokens too."""
        raise ValueError(
            "An adapter that is FAM's alone (adapted='fam') cannot be merged into the weights, which "
            "tokens use too; keep it beside them."
        )


@contextmanager
def _passing(*, tokens: bool) -> Iterator[None]:
    """Tell adapters that are FAM's alone who passes meanwhile: tokens, or FAM."""
    before = _tokens_pass.set(tokens)
    try:
        yield
    finally:
        _tokens_pass.reset(before)


def _is_fams_own(layer: Any, call: Call | SegmentCall | Probe) -> bool:
    """Whether adapters in a layer are to change FAM alone; they then heed who passes."""
    if not isinstance(call, Call) or call.config.adapted == "all":
        return False
    for module in adapted_modules(layer):
        kind = type(module)
        if not issubclass(kind, AdapterOfFam):
            module.__class__ = mixed(AdapterOfFam, kind)
    return True


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
