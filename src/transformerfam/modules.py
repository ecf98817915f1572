"""Finding our way in a model, and the modules that it gets beside its family's.

Knows where a model of transformers keeps its decoder and layers; nothing of what they compute.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# β of the compressive memory at the start: sigmoid(-6) = 0.0025 of what a head reads is from it. What
# an untrained memory gives back is an average over all of the past, and does harm; a gate that is
# wholly shut would get no gradient.
_GATE_START = -6.0


def decoder_of(model: PreTrainedModel) -> Any:
    """The decoder of a causal language model."""
    return model.get_decoder()


def layers_of(decoder: Any) -> list[nn.Module]:
    """The decoder's layers, bottom first."""
    layers = getattr(decoder, "layers", None)
    return [] if layers is None else list(layers)


def is_adapted(module: nn.Module) -> bool:
    """Whether PEFT has put a module in the place of another, to change what it computes."""
    return hasattr(module, "_disable_adapters")


def adapted_modules(module: nn.Module) -> list[Any]:
    """The modules inside that PEFT has put in the place of others."""
    return [m for m in module.modules() if is_adapted(m)]


def trained_for_fam(decoder: Any) -> list[Tensor]:
    """Trained parameters in the layers that FAM alone goes through."""
    if decoder.fam_config.adapted == "all":
        return []
    found = (p for m in adapted_modules(decoder.layers) for p in m.parameters())
    return [parameter for parameter in found if parameter.requires_grad]


def add_prompt(model: PreTrainedModel) -> None:
    """Add a FAM prompt (or prefix) of the configured length to the decoder, with random values."""
    decoder = decoder_of(model)
    if not decoder.fam_config.has_feedback:
        return
    rows = decoder.fam_config.prompt_rows(len(layers_of(decoder)))
    prompt = _rows_beside_the_embeddings(decoder, rows, model.config.hidden_size)
    if not prompt.weight.is_meta:
        nn.init.normal_(prompt.weight, std=getattr(model.config, "initializer_range", 0.02))
    decoder.fam_prompt = prompt


def add_gates(model: PreTrainedModel) -> None:
    """Add the gates of a compressive memory to the decoder, nearly shut, unless they are there."""
    decoder = decoder_of(model)
    if decoder.fam_config.compressive_memory == "none" or "memory_gates" in decoder._modules:
        return
    heads = model.config.num_attention_heads
    gates = _rows_beside_the_embeddings(decoder, len(layers_of(decoder)), heads)
    if not gates.weight.is_meta:
        nn.init.constant_(gates.weight, _GATE_START)
    decoder.memory_gates = gates


def _rows_beside_the_embeddings(decoder: Any, rows: int, width: int) -> nn.Embedding:
    """A module, which is what PEFT can save, of the type and on the device of the embeddings."""
    weight = decoder.get_input_embeddings().weight
    dtype = weight.dtype if weight.is_floating_point() else torch.get_default_dtype()
    return nn.Embedding(rows, width, device=weight.device, dtype=dtype)
