"""A tiny random model of every supported family."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from transformerfam import FamConfig, convert, reconfigure

VOCABULARY = 64

_SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}

# name of the family -> (prefix of its classes, what its configuration needs besides the shape)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Cohere 2": ("Cohere2", {"sliding_window": 20, "num_hidden_layers": 4}),
    "GLM-4": ("Glm4", {}),
    "GPT-NeoX": ("GPTNeoX", {}),
    "Gemma 2": ("Gemma2", {"sliding_window": 20}),
    "Gemma 3 (text)": ("Gemma3", {"sliding_window": 20}),
    "gpt-oss": ("GptOss", {"sliding_window": 20, **_EXPERTS}),
    "Granite": ("Granite", {"embedding_multiplier": 3.0, "residual_multiplier": 0.5}),
    "Llama": ("Llama", {}),
    "Mistral": ("Mistral", {"sliding_window": 20}),
    "Mixtral": ("Mixtral", {**_EXPERTS}),
    "OLMo 2": ("Olmo2", {}),
    "Phi-3": ("Phi3", {"partial_rotary_factor": 0.5}),
    "Qwen2": ("Qwen2", {}),
    "Qwen3": ("Qwen3", {}),
    "Qwen3-MoE": (
        "Qwen3Moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "SmolLM3": ("SmolLM3", {"num_hidden_layers": 4}),
    "StableLM": ("StableLm", {}),
    "Starcoder 2": ("Starcoder2", {}),
}


def config_class(family: str) -> Callable[..., Any]:
    """The configuration class of a family."""
    prefix = FAMILIES[family][0]
    return getattr(transformers, f"{prefix}TextConfig" if prefix == "Gemma3" else f"{prefix}Config")


def tiny(
    family: str = "Llama", dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """A model of the family with weights large enough that attention matters."""
    prefix, needs = FAMILIES[family]
    torch.manual_seed(seed)
    config = config_class(family)(**{**_SHAPE, **needs, **changes})
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(noise * 0.15 if parameter.dim() > 1 else parameter + noise * 0.1)
    return model.to(dtype).eval()


_WINDOWS = FamConfig.paper(fam_length=0)
_CONVERTED: dict[str, PreTrainedModel] = {}


def converted(
    config: FamConfig,
    family: str = "Llama",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    **changes: Any,
) -> Any:
    """A tiny model as a TransformerFAM: what converting it would give, without its rehearsal."""
    key = repr((family, dtype, seed, changes))
    if key not in _CONVERTED:
        _CONVERTED[key] = convert(tiny(family, dtype, seed, **changes), _WINDOWS)
    torch.manual_seed(seed)
    return reconfigure(copy.deepcopy(_CONVERTED[key]), config)


def some_tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """(rows, length) random ids without special ones."""
    return torch.randint(
        3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed)
    )
