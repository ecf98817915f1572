"""What a model does with positions, found out by asking it instead of by a table of families.

A probe runs the decoder with attention that lets nothing through, so that every layer sees the same
input whatever the positions, and records the keys that each layer brings to attention. Keys at
position 0 against keys at other positions tell how the layer rotates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from transformerfam.attention import AttentionStyle
from transformerfam.call import AttentionPass
from transformerfam.errors import UserError
from transformerfam.rotary import Rotary, rotate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_POSITIONS = (0, 1, 2, 3, 5, 8)


class UnsupportedModelError(UserError, ValueError):
    """The model cannot become a TransformerFAM; the message says why."""


class Probe:
    """Stands in for a `Call`: records inputs and keys of every layer.

    Attributes:
        inputs: layer -> (1, T, d), what entered the layer.
        keys: layer -> (1, Hk, T, D), what it brought to attention.
        calls: layer -> how often it called attention.
    """

    def __init__(self) -> None:
        self.inputs: dict[int, Tensor] = {}
        self.keys: dict[int, Tensor] = {}
        self.calls: dict[int, int] = {}

    def enter(self, layer: int, hidden: Tensor) -> AttentionPass:
        """The pass of one layer, whose input is `hidden`."""
        self.inputs[layer] = hidden

        def record(query: Tensor, key: Tensor, value: Tensor, style: AttentionStyle) -> Tensor:
            self.calls[layer] = self.calls.get(layer, 0) + 1
            self.keys[layer] = key
            rows, heads, length, _ = query.shape
            return query.new_zeros(rows, length, heads, value.shape[-1])

        return record


@torch.compiler.disable
@torch.no_grad()
def run_probe(decoder: PreTrainedModel, tokens: Tensor, positions: Tensor) -> Probe:
    """Send `tokens` (T,) at `positions` (T,) through a decoder with TransformerFAM's layers."""
    probe, training = Probe(), decoder.training
    decoder.eval()
    try:
        device = decoder.get_input_embeddings().weight.device
        decoder.plain_forward(  # FamDecoder's own
            input_ids=tokens[None].to(device),
            position_ids=positions[None].to(device),
            fam_call=probe,
        )
    finally:
        decoder.train(training)
    return probe


def find_rotaries(decoder: PreTrainedModel, layers: int) -> tuple[Rotary, ...]:
    """How each layer rotates its keys.

    Raises:
        UnsupportedModelError: if a layer has no attention, or positions that are not rotary.
    """
    name = decoder.config.model_type
    tables = [
        b.detach().to("cpu", torch.float64)
        for n, b in decoder.named_buffers()
        if n.endswith("inv_freq") and "original" not in n
    ]
    if not tables:
        raise UnsupportedModelError(
            f"A {name} model has no rotary positions; TransformerFAM needs positions that can move "
            "along with the text."
        )
    vocabulary = decoder.get_input_embeddings().weight.shape[0]
    tokens = torch.arange(1, 1 + len(_POSITIONS)) * 7 % vocabulary
    positions = torch.tensor(_POSITIONS)
    still = run_probe(decoder, tokens, torch.zeros_like(positions))
    moved = run_probe(decoder, tokens, positions)
    strange = [layer for layer in range(layers) if still.calls.get(layer) != 1]
    if strange:
        raise UnsupportedModelError(
            f"Layer {strange[0]} of this {name} model does not have one attention that transformers "
            "lets us replace (but a state space, linear attention, or an attention of its own)."
        )
    candidates = [Rotary(None)]
    candidates += [Rotary(t, interleaved) for t in tables for interleaved in (False, True)]
    return tuple(
        _explain(
            candidates,
            still.keys[layer],
            moved.keys[layer],
            positions,
            f"layer {layer} of this {name} model",
        )
        for layer in range(layers)
    )


def _explain(
    candidates: list[Rotary], still: Tensor, moved: Tensor, positions: Tensor, where: str
) -> Rotary:
    """The candidate that takes the keys at position 0 to the keys at `positions`."""
    still, moved = still.to("cpu", torch.float64), moved.to("cpu", torch.float64)

    def error(rotary: Rotary) -> float:
        if rotary.inv_freq is not None and 2 * len(rotary.inv_freq) > still.shape[-1]:
            return float("inf")
        turned = rotate(still, rotary.tables(positions, still))
        return float((turned - moved).norm() / moved.norm().clamp(min=1e-12))

    best = min(candidates, key=error)
    # Half precision rounds keys to three digits; a wrong layout is off by tens of percent.
    if not error(best) < 0.03:
        raise UnsupportedModelError(
            f"The positions of {where} are not rotary in a way that is understood."
        )
    return best
