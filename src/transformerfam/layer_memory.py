"""What one layer of a TransformerFAM carries from block to block, as tensors and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from transformerfam.config import FamConfig


@dataclass(frozen=True)
class KeyValue:
    """Keys (R, Hk, L, D) and values (R, Hk, L, Dv) of the same L tokens or slots."""

    keys: Tensor
    values: Tensor

    @staticmethod
    def cat(parts: Sequence[KeyValue]) -> KeyValue:
        """One after the other along L."""
        return KeyValue(
            torch.cat([p.keys for p in parts], 2), torch.cat([p.values for p in parts], 2)
        )

    def cut(self, start: int, end: int | None) -> KeyValue:
        """Slots from `start` up to `end`."""
        return KeyValue(self.keys[:, :, start:end], self.values[:, :, start:end])

    def map(self, change: Callable[[Tensor], Tensor]) -> KeyValue:
        """Both passed through `change`."""
        return KeyValue(change(self.keys), change(self.values))

    def zip(self, other: KeyValue, join: Callable[[Tensor, Tensor], Tensor]) -> KeyValue:
        """Keys joined with keys, values with values."""
        return KeyValue(join(self.keys, other.keys), join(self.values, other.values))


_TENSORS = ("keys", "values", "anchor_keys", "fam")


@dataclass(frozen=True)
class LayerMemory:
    """What one layer keeps. W = P + A + k·N + B slots, in this order:

        [ past (P) | anchors (A) | FAMs, oldest first (k·N) | block being read (B) ]

    Keys are rotated relative to the start of the block being read, so nothing in here depends on how
    much was read before. Slots that are not filled yet hold zeros and are masked.

    Attributes:
        keys, values: (R, Hk, W, D) and (R, Hk, W, Dv).
        anchor_keys: (R, Hk, A, D), the anchors' keys as they came, not rotated.
        fam: (R, N, d), F of the last finished block.
        extra: what a variant keeps beside these, by name, each (R, ...); see
            `FamConfig.extra_state`.
        owned: keys and values belong to this object alone, and no gradient needs them: free slots
            may be filled in place.
    """

    keys: Tensor
    values: Tensor
    anchor_keys: Tensor
    fam: Tensor
    extra: Mapping[str, Tensor] = field(default_factory=dict, kw_only=True)
    owned: bool = field(default=False, kw_only=True)

    @classmethod
    def empty(cls, config: FamConfig, key: Tensor, value: Tensor, hidden: Tensor) -> LayerMemory:
        """A layer that has read nothing, of the shapes and types of its key, value and input."""
        rows, heads, _, features = key.shape
        # Where everything is kept the past starts empty and grows by whole blocks; no anchors.
        slots = config.slots or config.previous_fams * config.fam_length + config.block_size
        anchors = len(config.anchor_positions)
        fam = hidden.new_zeros(rows, config.fam_length, hidden.shape[-1])
        return cls(
            keys=key.new_zeros(rows, heads, slots, features),
            values=value.new_zeros(rows, heads, slots, value.shape[-1]),
            anchor_keys=key.new_zeros(rows, heads, anchors, features),
            fam=fam,
            extra={"fam_input": torch.zeros_like(fam)} if config.is_static else {},
            owned=not torch.is_grad_enabled(),
        )

    @classmethod
    def without_slots(cls, key: Tensor, value: Tensor, hidden: Tensor) -> LayerMemory:
        """A layer that holds nothing and has no FAM, of the types of its key, value and input."""
        keys, values = (t.new_zeros(*t.shape[:2], 0, t.shape[3]) for t in (key, value))
        return cls(keys, values, keys.clone(), hidden.new_zeros(len(hidden), 0, hidden.shape[-1]))

    def with_tokens(self, tokens: KeyValue) -> LayerMemory:
        """The same with other keys and values."""
        return replace(self, keys=tokens.keys, values=tokens.values)

    @staticmethod
    def names(config: FamConfig) -> tuple[str, ...]:
        """Names of the tensors that a layer keeps under `config`, in a fixed order."""
        return (*_TENSORS, *config.extra_state)

    @classmethod
    def from_tensors(cls, named: Mapping[str, Tensor]) -> LayerMemory:
        """The inverse of `named_tensors`."""
        extra = {name: tensor for name, tensor in named.items() if name not in _TENSORS}
        return cls(*(named[name] for name in _TENSORS), extra=extra)

    def named_tensors(self) -> list[tuple[str, Tensor]]:
        """(name, tensor), in a fixed order."""
        return [*((name, getattr(self, name)) for name in _TENSORS), *self.extra.items()]

    def fit(self, key: Tensor, value: Tensor, hidden: Tensor) -> LayerMemory:
        """This memory, ready for more tokens with such keys, values and layer inputs.

        Raises:
            ValueError: if they are of another shape or type.
        """
        for kept, new in ((self.keys, key), (self.values, value), (self.fam, hidden)):
            same_shape = kept.shape[:-2] == new.shape[:-2] and kept.shape[-1] == new.shape[-1]
            if not same_shape or kept.dtype != new.dtype or kept.device != new.device:
                raise ValueError(
                    "The memory was made by a model of another shape, type or device: it holds "
                    f"{kept.dtype} {tuple(kept.shape)} on {kept.device}, and the model brings "
                    f"{new.dtype} {tuple(new.shape)} on {new.device}."
                )
        if self.keys.is_inference() and not torch.is_inference_mode_enabled():
            return self.map(Tensor.clone)
        return self

    @property
    def tokens(self) -> KeyValue:
        """Keys and values, all W slots."""
        return KeyValue(self.keys, self.values)

    def without_oldest(self, count: int) -> LayerMemory:
        """The same without so many of the oldest slots of the past."""
        if not count:
            return self
        return self.with_tokens(self.tokens.map(lambda x: x[:, :, count:].clone()))

    def map(self, change: Callable[[Tensor], Tensor]) -> LayerMemory:
        """Every tensor passed through `change`."""
        return self.from_tensors({name: change(tensor) for name, tensor in self.named_tensors()})
