"""A memory on disk: one safetensors file, complete and of the right model, or refused.

The header carries the format version, the geometry, the position of each row, a fingerprint of the
weights that made the memory, maybe one of the text that it has read, and a checksum over all of it and
every tensor. No pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from transformerfam.config import ADDED_MODULES, FamConfig
from transformerfam.errors import UserError
from transformerfam.files import whole_file
from transformerfam.layer_memory import LayerMemory
from transformerfam.memory import Memory
from transformerfam.modules import is_adapted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = "transformerfam memory"
VERSION = 2
_FINGERPRINT_SAMPLES = 64
# Names of the configuration's entries that change what a model computes.
_COMPUTES = re.compile(r"eps|rope|scal|multiplier|softcap|window|layer_types|_act|experts|norm")


class MemoryFileError(UserError, ValueError):
    """A memory file cannot be written, or is not one that this model can use."""


def fingerprint(model: PreTrainedModel) -> str:
    """A short name of what a model computes: its weights, and the settings beside them.

    Takes names, shapes and types, the sum of the bits of each parameter and buffer and
    `_FINGERPRINT_SAMPLES` of its values, the numbers of the configuration that enter the computation,
    and which adapters are active, with their scale. One pass over the weights, so any changed weight
    changes it.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    digest = hashlib.sha256()
    unused = set(ADDED_MODULES) - set(_geometry(model).added_modules)
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
        if any(module in name for module in unused):
            continue  # left from another geometry; nothing reads it
        flat = tensor.detach().contiguous().flatten()
        sample = flat[:: max(1, flat.numel() // _FINGERPRINT_SAMPLES)].to("cpu", torch.float64)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {_sum_of_bits(flat)}".encode())
        digest.update(sample.numpy().tobytes())
    values = model.config.to_dict()
    settings = {key: values[key] for key in sorted(values) if _COMPUTES.search(key)}
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, module in model.named_modules():
        if is_adapted(module):
            scales = sorted(getattr(module, "scaling", {}).items())
            active = sorted(module.active_adapters), bool(module.disable_adapters)
            digest.update(f"{name} {active} {scales}".encode())
    return digest.hexdigest()


def _sum_of_bits(flat: Tensor) -> int:
    """All bits of a contiguous tensor, added up as whole numbers of 64 bits."""
    if flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()
    raw = flat.view(torch.uint8)
    whole = len(raw) // 8 * 8
    return int(raw[:whole].view(torch.int64).sum()) + int(raw[whole:].sum())


def save_memory(
    memory: Memory,
    path: str | os.PathLike[str],
    model: PreTrainedModel,
    *,
    text: str | None = None,
) -> None:
    """Write `memory`, which `model` made, to `path`: beside it first, then renamed.

    Args:
        memory: what to write.
        path: where to.
        model: that made it.
        text: a fingerprint of the one text that it has read, by which to find where that goes on;
            empty: it has read other things too; None: nobody knows.

    Raises:
        MemoryFileError: if the file cannot be written, or the model did not make the memory; what
            was there before stays.
    """
    differences = _geometry(model).memory_differences(memory.config)
    if len(memory) != model.config.get_text_config().num_hidden_layers:
        differences = ["number of layers"]
    if differences:
        raise MemoryFileError(
            f"Only the model that made a memory can save it; this one has another {differences[0]}."
        )
    target = Path(path)
    tensors = {name: t.detach().cpu().contiguous() for name, t in memory.tensors()}
    header = {
        "format": FORMAT,
        "version": str(VERSION),
        "config": json.dumps(memory.config.to_dict(), sort_keys=True),
        "position": json.dumps(list(memory.position)),
        "layers": str(len(memory.layers_memory)),
        "model": fingerprint(model),
    }
    if memory.passed_fams is not None:
        raise MemoryFileError("This memory has read nothing since it was passed; read something.")
    if text is not None:
        header["text"] = text
    if any(memory.passed) or memory.offset:
        header["start"] = json.dumps({"passed": list(memory.passed), "offset": memory.offset})
    header["checksum"] = _checksum(header, tensors)
    try:
        with whole_file(target) as temporary:
            # safetensors refuses tensors that share storage.
            save_file({name: t.clone() for name, t in tensors.items()}, temporary, metadata=header)
    # safetensors reports a full disk as an error of its own; a path may hold a zero byte.
    except (OSError, SafetensorError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise MemoryFileError(f"Cannot write the memory to {target}: {reason}.") from None


def _geometry(model: object) -> FamConfig:
    config = getattr(model, "fam_config", None)
    if not isinstance(config, FamConfig):
        raise MemoryFileError("A memory belongs to a TransformerFAM; convert the model first.")
    return config


def load_memory(path: str | os.PathLike[str], model: PreTrainedModel) -> Memory:
    """Read the memory at `path` for `model`, onto the model's device.

    Raises:
        MemoryFileError: if there is no such file, if it is damaged, or if it was made by other
            weights, another geometry or another version.
    """
    geometry = _geometry(model)
    header, tensors = _read(Path(path))
    if header.get("format") != FORMAT:
        raise MemoryFileError(f"{path} is not a memory saved by transformerfam.")
    if header.get("version") != str(VERSION):
        raise MemoryFileError(
            f"{path} has memory format {header.get('version')}, and this version of transformerfam "
            f"reads format {VERSION}."
        )
    if header.get("checksum") != _checksum(header, tensors):
        raise _damaged(path)
    config = _config_of(header, path)
    differences = geometry.memory_differences(config)
    if differences:
        name = differences[0]
        raise MemoryFileError(
            f"{path} was made with {name}={getattr(config, name)!r}, and the model has "
            f"{name}={getattr(geometry, name)!r}; load the model with the same geometry."
        )
    if header.get("model") != fingerprint(model):
        raise MemoryFileError(
            f"{path} was made by a model with other weights (or another type or adapter); only the "
            "model that read a text can use its memory of it."
        )
    return _assemble(config, header, tensors, model.device, path)


def memory_header(path: str | os.PathLike[str]) -> dict[str, str] | None:
    """The header of a saved memory, without its tensors; None if the file is no memory."""
    try:
        with safe_open(str(path), framework="pt") as file:
            header = dict(file.metadata() or {})
    except (OSError, SafetensorError, ValueError):
        return None
    return header if header.get("format") == FORMAT else None


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            header = dict(file.metadata() or {})
            # Copies: a memory must not change with its file.
            return header, {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise MemoryFileError(f"There is no memory file {path}.") from None
    except OSError as error:
        raise MemoryFileError(
            f"Cannot read the memory file {path}: {error.strerror or error}."
        ) from None
    # A damaged header can surface from safetensors and torch as any of these.
    except (
        SafetensorError,
        ValueError,
        RuntimeError,
        TypeError,
        KeyError,
        MemoryError,
        OverflowError,
    ):
        raise _damaged(path) from None


def _damaged(path: str | os.PathLike[str]) -> MemoryFileError:
    return MemoryFileError(
        f"{path} is damaged or incomplete; read the text again to make a new memory."
    )


def _checksum(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    named = {key: value for key, value in header.items() if key != "checksum"}
    digest.update(json.dumps(named, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        # bfloat16 has no numpy type; its bytes do.
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _config_of(header: Mapping[str, str], path: str | os.PathLike[str]) -> FamConfig:
    try:
        return FamConfig.from_dict(json.loads(header["config"]))
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError):
        raise _damaged(path) from None
    except ValueError as error:
        raise MemoryFileError(f"{path} has a geometry that is not understood: {error}") from None


def _assemble(
    config: FamConfig,
    header: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    device: Any,
    path: str | os.PathLike[str],
) -> Memory:
    position, layers = _whole_numbers(header, path)
    memory = Memory(config, len(position), layers)
    on_device = {name: t.to(device) for name, t in tensors.items()}
    next_logits, written = on_device.pop("next_logits", None), on_device.pop("written", None)
    if (written is not None) != (config.through_stack and any(position)):
        raise _damaged(path)
    if on_device or any(position):
        kept = LayerMemory.names(config)
        names = [{name: f"{index}.{name}" for name in kept} for index in range(layers)]
        if sorted(on_device) != sorted(full for layer in names for full in layer.values()):
            raise _damaged(path)
        if any(t.shape[0] != len(position) for t in on_device.values()):
            raise _damaged(path)
        found = [
            LayerMemory.from_tensors({name: on_device[full] for name, full in layer.items()})
            for layer in names
        ]
        memory.advance(found, position, next_logits, written)
    if "start" in header:
        start = json.loads(header["start"])
        memory.passed, memory.offset = tuple(start["passed"]), start["offset"]
    return memory


def _whole_numbers(
    header: Mapping[str, str], path: str | os.PathLike[str]
) -> tuple[tuple[int, ...], int]:
    """Position of each row, and the number of layers."""
    try:
        position, layers = json.loads(header["position"]), int(header["layers"])
    except (KeyError, ValueError):
        raise _damaged(path) from None
    rows_are_right = isinstance(position, list) and len(position) > 0
    if not rows_are_right or layers < 1 or not all(type(p) is int and p >= 0 for p in position):
        raise _damaged(path)
    return tuple(position), layers
