"""A memory on disk: one safetensors file, complete and of the right model, or refused.

The header carries the format version, the geometry, the position of each row, a fingerprint of the
weights that made the memory, and a checksum over all of it and every tensor. No pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from transformerfam.config import FamConfig
from transformerfam.memory import LayerMemory, Memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = "transformerfam memory"
VERSION = 1
_FINGERPRINT_SAMPLES = 64
_LAYER_FIELDS = ("keys", "values", "anchor_keys", "fam")


class MemoryFileError(ValueError):
    """A memory file cannot be written, or is not one that this model can use."""


def fingerprint(model: PreTrainedModel) -> str:
    """A short name of a model's weights: names, shapes, types and a sample of every parameter.

    Samples `_FINGERPRINT_SAMPLES` values spread over each parameter, so it takes milliseconds and
    changes with any training step, quantisation or adapter.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        step = max(1, flat.numel() // _FINGERPRINT_SAMPLES)
        sample = flat[::step].to("cpu", torch.float64)
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def save_memory(memory: Memory, path: str | os.PathLike[str], model: PreTrainedModel) -> None:
    """Write `memory`, which `model` made, to `path`: beside it first, then renamed.

    Raises:
        MemoryFileError: if the file cannot be written; what was there before stays.
    """
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
    header["checksum"] = _checksum(header, tensors)
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        os.close(handle)
        # safetensors refuses tensors that share storage; a fresh stream of one row may alias none.
        save_file({name: t.clone() for name, t in tensors.items()}, temporary, metadata=header)
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise MemoryFileError(f"Cannot write the memory to {target}: {error.strerror or error}.") from None
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def load_memory(path: str | os.PathLike[str], model: PreTrainedModel) -> Memory:
    """Read the memory at `path` for `model`, onto the model's device.

    Raises:
        MemoryFileError: if there is no such file, if it is damaged, or if it was made by other
            weights, another geometry or another version.
    """
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
    differences = model.fam_config.memory_differences(config)
    if differences:
        name = differences[0]
        raise MemoryFileError(
            f"{path} was made with {name}={getattr(config, name)!r}, and the model has "
            f"{name}={getattr(model.fam_config, name)!r}; load the model with the same geometry."
        )
    if header["model"] != fingerprint(model):
        raise MemoryFileError(
            f"{path} was made by a model with other weights (or another type or adapter); only the "
            "model that read a text can use its memory of it."
        )
    return _assemble(config, header, tensors, model.device)


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            header = dict(file.metadata() or {})
            return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise MemoryFileError(f"There is no memory file {path}.") from None
    except OSError as error:
        raise MemoryFileError(f"Cannot read the memory file {path}: {error.strerror or error}.") from None
    # A damaged header can surface from safetensors and torch as any of these.
    except (SafetensorError, ValueError, RuntimeError, TypeError, KeyError, MemoryError, OverflowError):
        raise _damaged(path) from None


def _damaged(path: str | os.PathLike[str]) -> MemoryFileError:
    return MemoryFileError(f"{path} is damaged or incomplete; read the text again to make a new memory.")


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
    except (KeyError, TypeError, ValueError) as error:
        raise MemoryFileError(f"{path} has a geometry that is not understood: {error}") from None


def _assemble(
    config: FamConfig, header: Mapping[str, str], tensors: Mapping[str, Tensor], device: Any
) -> Memory:
    position = tuple(json.loads(header["position"]))
    memory = Memory(config, len(position), int(header["layers"]))
    on_device = {name: t.to(device) for name, t in tensors.items()}
    next_logits = on_device.pop("next_logits", None)
    if on_device:
        layers = [
            LayerMemory(*(on_device[f"{index}.{field}"] for field in _LAYER_FIELDS))
            for index in range(len(memory.layers_memory))
        ]
        memory.advance(layers, position, next_logits)
    return memory
